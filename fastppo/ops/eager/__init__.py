"""Every op in plain PyTorch, as in its paper: the oracle against which kernels are tested, written for clarity.

Each function works in fp32, bf16, fp16 and fp64; statistics are fp32, or fp64 for fp64 inputs, so that gradients
can be checked against finite differences. Arguments are not checked here: `fastppo.ops` checks them.
M tokens, vocabulary V, hidden size H, B sequences, R rows.

`estimators` and `losses` are oracles of what is no op: estimators of advantages and policy losses.
"""

from fastppo.ops.eager import estimators as estimators
from fastppo.ops.eager import losses as losses
from fastppo.ops.eager.sampling import restrict as restrict
from fastppo.ops.eager.sampling import sample_tokens as sample_tokens
from fastppo.ops.eager.tokens import at_targets as at_targets
from fastppo.ops.eager.tokens import attend_cached as attend_cached
from fastppo.ops.eager.tokens import bounded_exp as bounded_exp
from fastppo.ops.eager.tokens import exp_less_tangent as exp_less_tangent
from fastppo.ops.eager.tokens import gae as gae
from fastppo.ops.eager.tokens import kl_estimate as kl_estimate
from fastppo.ops.eager.tokens import linear_logprobs as linear_logprobs
from fastppo.ops.eager.tokens import linear_policy_loss as linear_policy_loss
from fastppo.ops.eager.tokens import policy_loss as policy_loss
from fastppo.ops.eager.tokens import project as project
from fastppo.ops.eager.tokens import scaled as scaled
from fastppo.ops.eager.tokens import statistics_dtype as statistics_dtype
from fastppo.ops.eager.tokens import term as term
from fastppo.ops.eager.tokens import token_logprobs as token_logprobs
from fastppo.ops.eager.tokens import value_loss as value_loss
