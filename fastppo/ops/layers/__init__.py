"""The ops of a transformer layer between its matrix products: normalisation, rotary positions, gated activations."""

from fastppo.ops.layers import eager as eager
from fastppo.ops.layers import registration as registration
from fastppo.ops.layers.glu import geglu as geglu
from fastppo.ops.layers.glu import geglu_joined as geglu_joined
from fastppo.ops.layers.glu import swiglu as swiglu
from fastppo.ops.layers.glu import swiglu_joined as swiglu_joined
from fastppo.ops.layers.rms_norm import rms_norm as rms_norm
from fastppo.ops.layers.rotary import rotary as rotary
