"""Quantised checkpoints: which are unpacked at loading, and which raise an error before.

A run trains and exports plain weights in its dtype. Weights that stay quantised in memory cannot train, and weights
that are quantised again when they are saved are another model than the trained one. So the forms that transformers can
unpack are unpacked at loading on every machine, also where a GPU could compute with quantised weights; for all other
forms an error names the way out.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, cast

from transformers import PreTrainedConfig, PreTrainedModel

from fastppo.errors import ModelError

# The forms that transformers unpacks at loading into plain modules (`dequantize` in the quantisation config).
# compressed-tensors is not one of them: its unpacked layers keep their scales and round their inputs.
UNPACKED = ("fp8", "mxfp8", "mxfp4")

# The forms for which `model.dequantize()` unpacks a loaded model, and the package that is needed to load it.
UNPACKED_AFTER_LOADING = {
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "higgs": "flute-kernel",
}

# Endings of tensor names that only quantised checkpoints have: scales, zero points, packed rows.
SCALES = (
    *("weight_scale", "weight_scale_inv", "weight_packed", "weight_zero_point", "input_scale", "activation_scale"),
    *("qweight", "qzeros", "scales", "g_idx", "absmax", "quant_map", "SCB", "_blocks", "_scales", "qbiases"),
)


def quantization_of(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The quantisation settings of a config.json; None if the weights are plain."""
    text = config.get_text_config()
    for part in (config, text):
        quantization = getattr(part, "quantization_config", None)
        if quantization is not None:
            return dict(quantization if isinstance(quantization, dict) else quantization.to_dict())
    return None


def method_of(quantization: dict[str, Any]) -> str:
    """The name of the quantisation form, determined as in transformers' `AutoHfQuantizer`."""
    if quantization.get("load_in_4bit"):
        return "bitsandbytes_4bit"
    if quantization.get("load_in_8bit"):
        return "bitsandbytes_8bit"
    method = quantization.get("quant_method")
    return "an unknown form" if method is None else str(getattr(method, "value", method))


def check_quantization(source: str, name: str, quantization: dict[str, Any]) -> None:
    """Raises ModelError for weights that cannot be unpacked at loading. source, name: setting and model."""
    method = method_of(quantization)
    if method in UNPACKED:
        return
    way = "Give the checkpoint that it was quantised from, or dequantise it first"
    if package := UNPACKED_AFTER_LOADING.get(method):
        if find_spec(MODULES[package]) is None:
            way += f" with {package}, which is not installed (pip install {package})"
        way += (
            f': AutoModelForCausalLM.from_pretrained("{name}").dequantize().save_pretrained("FOLDER"), save its'
            " tokenizer in the same folder, and give that."
        )
    else:
        way += f" with the tools that made it. fastppo can unpack {', '.join(UNPACKED)} and GGUF files at loading."
    raise ModelError(f"{source} is quantised ({method}), and weights of this form cannot be trained. {way}")


MODULES = {"bitsandbytes": "bitsandbytes", "flute-kernel": "flute"}  # package -> module


def unquantized(config: PreTrainedConfig) -> PreTrainedConfig:
    """Remove the quantisation settings from the config; models are run and exported without them."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            delattr(part, "quantization_config")
    return config


def forget_quantization(model: PreTrainedModel) -> None:
    """Remove the quantisation settings of a model whose weights were unpacked at loading.

    With them transformers would refuse to train the model, or quantise it again when it is saved.
    """
    unquantized(model.config)
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    for attribute in ("is_quantized", "quantization_method"):
        if hasattr(model, attribute):
            setattr(model, attribute, None)
    # The conversions from the files to the model, which saving would invert, quantisation included. Without them
    # transformers uses the mapping of the architecture, which has names and layouts only.
    if getattr(model, "_weight_conversions", None) is not None:
        cast(Any, model)._weight_conversions = None


def check_plain(model: PreTrainedModel) -> None:
    """Raises ModelError if a weight is not in a trainable dtype after loading."""
    for name, p in model.named_parameters():
        if not p.dtype.is_floating_point or p.dtype.itemsize < 2:
            raise ModelError(f"{name} is still {p.dtype} after loading, which cannot be trained. {PLAIN}")


def check_scales(unexpected: Iterable[str]) -> None:
    """Raises ModelError if the files contain scales of quantised weights: without the scales the weights are wrong.

    unexpected: the names of tensors in the files that are not part of the model.
    """
    for name in sorted(unexpected):
        if name.endswith(SCALES):
            raise ModelError(
                f"its files contain {name} beside quantised weights, and its config.json does not say how to unpack"
                f" them. {PLAIN}"
            )


PLAIN = "Give a checkpoint with plain weights."
