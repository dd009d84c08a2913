"""Whether vLLM can draw the responses of a run, as far as that is known before its models load."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import os
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fastppo.config import ResponseSettings
from fastppo.rollout.answers import SamplerError

TESTED = "0.32"  # version, to the minor one: what is called here has another form in others

# Before vLLM is imported. Its engine is in this process, as ranks and the weights they send are; it reports to nobody;
# and what it tells of its own settings at every start is not what a user of fastppo has set.
FORCED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
DEFAULTS = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

# Arguments of `vllm.LLM` that are not the user's, and what decides them.
TAKEN = {
    "model": "the model that the run samples from",
    "tokenizer": "the model that the run samples from",
    "skip_tokenizer_init": "responses are token ids",
    "load_format": "weights come from the trainer",
    "dtype": "that of the weights",
    "max_model_len": "data.max_prompt_tokens + sampling.max_new_tokens",
    "seed": "each response has a seed of its own",
    "generation_config": "sampling decides",
    "logprobs_mode": "the logprobs of the distribution that is drawn from are needed",
    "tensor_parallel_size": "rollout.vllm.tensor_parallel_size decides",
    "gpu_memory_utilization": "rollout.vllm.gpu_memory_utilization decides",
    "distributed_executor_backend": "each rank of the run is a rank of vLLM",
    "pipeline_parallel_size": "each rank of the run is a rank of vLLM, in groups of rollout.vllm.tensor_parallel_size",
    "data_parallel_size": "each group of rollout.vllm.tensor_parallel_size ranks samples for itself",
    "enable_sleep_mode": "it sleeps outside of sampling",
    "enable_lora": "adapters are merged into the weights that it gets",
    "model_impl": "vLLM's own, since its other one rewrites the trainer's classes",
}


def import_vllm() -> Any:
    """vLLM's module. Raises SamplerError if it is absent, cannot be imported, or has a version that was not tried."""
    os.environ.update(FORCED)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # until it has read that itself
    way = "Install it with `pip install 'fastppo[vllm]'` (docs/vllm.md), or set rollout.engine to inprocess."
    try:
        vllm = importlib.import_module("vllm")
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "vllm":
            raise SamplerError(f"rollout.engine is vllm, and the package vllm is not installed. {way}") from error
        raise SamplerError(f"rollout.engine is vllm, and vllm cannot be imported here: {error}. {way}") from error
    if ".".join(vllm.__version__.split(".")[:2]) != TESTED:
        raise SamplerError(
            f"rollout.engine is vllm, and vllm {vllm.__version__} is installed; fastppo was tested with {TESTED}, and"
            f" others take weights in other ways. {way}"
        )
    return vllm


def check_vllm(config: ResponseSettings) -> None:
    """Raises SamplerError if vLLM is not there, or for an argument that it does not have or that is not the user's."""
    vllm = import_vllm()
    known = {*inspect.signature(vllm.LLM).parameters, *(field.name for field in fields(vllm.EngineArgs))}
    for name in config.rollout.vllm.arguments:
        if name in TAKEN:
            raise SamplerError(f"rollout.vllm.arguments has {name}, which fastppo sets: {TAKEN[name]}. Leave it out.")
        if name not in known:
            near = difflib.get_close_matches(name, known - {*TAKEN}, n=1)
            raise SamplerError(
                f"rollout.vllm.arguments has {name}, which vllm.LLM {vllm.__version__} does not."
                + (f" Did you mean {near[0]}?" if near else " Leave it out.")
            )


def check_vllm_model(config: PreTrainedConfig) -> None:
    """Raises SamplerError for a model that vLLM does not have. config: that of the model to sample from.

    Some it runs with transformers' own classes, which it rewrites as it does: the trainer, in the same process, could
    not compute with them any more.
    """
    vllm = import_vllm()
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)
    entry = vllm.ModelRegistry.models.get(architecture)
    if entry is None or "transformers" in getattr(entry, "module_name", "").split("."):
        own = "no" if entry is None else "no class of its own for"
        raise SamplerError(
            f"rollout.engine is vllm, and vllm {vllm.__version__} has {own} {architecture}, the architecture of the"
            " model to sample from. Set rollout.engine to inprocess."
        )
