"""Quantised checkpoints: which are unpacked while they load, and which are refused before.

What trains are plain weights in the run's dtype, and those are what a run exports. A checkpoint that stays quantised in
memory cannot learn, and one that is packed again when it is saved is another model than the one that was trained. So
the forms that transformers unpacks at load are loaded so on every machine, also where a GPU could compute on them as
they are, and of all others a message names the way out.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, cast

from transformers import PreTrainedConfig, PreTrainedModel

from fastppo.errors import ModelError

# What transformers unpacks at load into plain modules (`dequantize` in its config of the form). compressed-tensors is
# none of them: its unpacked layers keep their scales, and round what they read.
UNPACKED = ("fp8", "mxfp8", "mxfp4")

# Where `model.dequantize()` makes plain weights of a loaded model, and the package that loads it.
UNPACKS_ITSELF = {"bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes", "higgs": "flute-kernel"}

# How the tensors end by which quantised weights are told: scales, zeros, packed rows.
SCALES = (
    *("weight_scale", "weight_scale_inv", "weight_packed", "weight_zero_point", "input_scale", "activation_scale"),
    *("qweight", "qzeros", "scales", "g_idx", "absmax", "quant_map", "SCB", "_blocks", "_scales", "qbiases"),
)


def quantization_of(config: PreTrainedConfig) -> dict[str, Any] | None:
    """What a config.json says of quantised weights; None where they are plain."""
    text = config.get_text_config()
    for part in (config, text):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            return dict(found if isinstance(found, dict) else found.to_dict())
    return None


def method_of(quantization: dict[str, Any]) -> str:
    """What transformers calls the form, as its own `AutoHfQuantizer` tells it."""
    if quantization.get("load_in_4bit"):
        return "bitsandbytes_4bit"
    if quantization.get("load_in_8bit"):
        return "bitsandbytes_8bit"
    method = quantization.get("quant_method")
    return "an unknown form" if method is None else str(getattr(method, "value", method))


def check_quantization(source: str, name: str, quantization: dict[str, Any]) -> None:
    """Raises ModelError for weights that cannot be unpacked while they load. source, name: setting and model."""
    method = method_of(quantization)
    if method in UNPACKED:
        return
    way = "Give the checkpoint that it was quantised from, or dequantise it first"
    if package := UNPACKS_ITSELF.get(method):
        if find_spec(MODULES[package]) is None:
            way += f" with {package}, which is not installed (pip install {package})"
        way += (
            f': AutoModelForCausalLM.from_pretrained("{name}").dequantize().save_pretrained("FOLDER"), its'
            " tokenizer into the same folder, and give that."
        )
    else:
        way += f" with the tools that made it. Unpacked while they load are {', '.join(UNPACKED)} and GGUF files."
    raise ModelError(f"{source} is quantised ({method}), and such weights cannot be trained as they are. {way}")


MODULES = {"bitsandbytes": "bitsandbytes", "flute-kernel": "flute"}  # what a package is imported as


def unquantized(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config without what it says of quantised weights, which is how a model is run and exported."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            delattr(part, "quantization_config")
    return config


def forget_quantization(model: PreTrainedModel) -> None:
    """Of a model whose weights were unpacked at load; transformers would refuse to train it, or pack it to save it."""
    unquantized(model.config)
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    for attribute in ("is_quantized", "quantization_method"):
        if hasattr(model, attribute):
            setattr(model, attribute, None)
    # How tensors of the files became the model's, which saving would undo: packing them again as far as it goes.
    # Without it transformers takes its own mapping of this architecture, which knows names and layouts alone.
    if getattr(model, "_weight_conversions", None) is not None:
        cast(Any, model)._weight_conversions = None


def check_plain(model: PreTrainedModel) -> None:
    """Raises ModelError where loading has left weights that are no plain numbers to learn."""
    for name, p in model.named_parameters():
        if not p.dtype.is_floating_point or p.dtype.itemsize < 2:
            raise ModelError(f"{name} is still {p.dtype} after loading, which cannot learn. {PLAIN}")


def check_scales(unexpected: Iterable[str]) -> None:
    """Raises ModelError where files hold scales of quantised weights, without which those would be other weights.

    unexpected: the names of tensors in the files that have no place in the model.
    """
    for name in sorted(unexpected):
        if name.endswith(SCALES):
            raise ModelError(
                f"its files hold {name} beside quantised weights, and its config.json says nothing of how to unpack"
                f" them. {PLAIN}"
            )


PLAIN = "Give a checkpoint with plain weights."
