"""Making vLLM's engine: from the model's config alone, in the process of the trainer, which it leaves as it was."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastppo.config import ResponseSettings
from fastppo.distributed import World, leave_without_cleanup
from fastppo.models import Policy
from fastppo.rollout.answers import SamplerError
from fastppo.rollout.vllm.refusals import REFUSALS, is_of_another_rank

log = logging.getLogger("fastppo")


def start_vllm(vllm: Any, config: ResponseSettings, policy: Policy, world: World) -> Any:
    """A `vllm.LLM` with weights that mean nothing yet. All ranks call it. Raises SamplerError."""
    arguments = _arguments(vllm, config, policy, world)
    try:
        leave_without_cleanup()
        torch.cuda.empty_cache()  # vLLM counts what is free
        with _process_left_alone(world.device), _own_shared_memory(world):
            llm = vllm.LLM(**arguments)
    except REFUSALS as error:
        if is_of_another_rank(error):
            raise
        raise SamplerError(_explanation(vllm, config, error)) from error
    # Where its engine is collected, at the end of the process at the latest, it would end the groups of all ranks, also
    # those of the run: alone, and in an order in which ranks can wait for each other.
    llm.llm_engine.engine_core._finalizer.detach()
    size = arguments["tensor_parallel_size"]
    if world.rank == 0:
        where = f"on {world.ranks} rank(s)" if size == 1 else f"over each {size} of {world.ranks} ranks"
        log.info("vLLM %s samples: %s, a copy of it %s", vllm.__version__, type(policy.model).__name__, where)
    return llm


def _arguments(vllm: Any, config: ResponseSettings, policy: Policy, world: World) -> dict[str, Any]:
    settings, on_cpu = config.rollout.vllm, world.device.type == "cpu"
    share = settings.gpu_memory_utilization
    if on_cpu:  # the ranks of a machine share what vLLM counts as the memory of each
        share /= int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return {
        "enforce_eager": on_cpu,  # compiling takes minutes there
        **settings.arguments,
        "model_impl": "vllm",
        "model": str(_config_folder(vllm, policy)),
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": str(policy.model.dtype).removeprefix("torch."),
        "max_model_len": config.data.max_prompt_tokens + config.sampling.max_new_tokens,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "tensor_parallel_size": settings.tensor_parallel_size,
        "gpu_memory_utilization": share,
        "distributed_executor_backend": "external_launcher",
        "enable_sleep_mode": not on_cpu,
    }


def _config_folder(vllm: Any, policy: Policy) -> Path:
    """A folder with the config of the model, as it is here, and nothing else.

    It is where vLLM keeps what it has compiled, under a name made of the content: what an earlier run compiled for this
    model is found by it.
    """
    config = json.loads(policy.model.config.to_json_string())
    config["architectures"] = [type(policy.model).__name__]
    for name in ("auto_map", "quantization_config"):  # no code comes with weights, and these are plain
        config.pop(name, None)
    content = json.dumps(config, indent=2, sort_keys=True)
    folder = Path(vllm.envs.VLLM_CACHE_ROOT) / "fastppo" / hashlib.sha256(content.encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            file.write(content)
        os.replace(file.name, folder / "config.json")  # ranks of one machine write the same
    except OSError as error:
        raise SamplerError(
            f"rollout.engine is vllm, and nothing can be written to its cache {folder} ({error.strerror}). Set the"
            " environment variable VLLM_CACHE_ROOT to a folder with space."
        ) from error
    return folder


@contextmanager
def _process_left_alone(device: torch.device) -> Iterator[None]:
    """Afterwards everything that vLLM sets for its process, as if it were its own, is as it was before.

    That is: the random generators, which a reward function draws from and a resumed run goes on with; the number of
    threads; environment variables that other programs read, which functions of the user start (LD_PRELOAD).
    """
    environment, threads, set_threads = dict(os.environ), torch.get_num_threads(), torch.set_num_threads
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_num_threads = set_threads  # replaced by one that does nothing
        torch.set_num_threads(threads)
        for name in {*os.environ, *environment}:
            if name.startswith("VLLM_"):
                continue
            if name in environment:
                os.environ[name] = environment[name]
            else:
                del os.environ[name]


@contextmanager
def _own_shared_memory(world: World) -> Iterator[None]:
    """Within this context the shared memory of ranks that compute together on the CPU has a name of this run's.

    vLLM's names are the same in each run on a machine, so that the second would fail; so would all after one that was
    killed. Afterwards the ranks have mapped it, and it has no name any more.
    """
    if world.device.type != "cpu":
        yield
        return
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    named, names = _CPUSHMDistributed.make_group_name, []

    def of_this_run(communicator: Any) -> str:
        names.append(f"fastppo-{os.environ['MASTER_PORT']}-{named(communicator).replace('/', '')}")
        return str(names[-1])

    _CPUSHMDistributed.make_group_name = staticmethod(of_this_run)
    try:
        yield
    finally:
        _CPUSHMDistributed.make_group_name = staticmethod(named)
        for path in (path for name in names for path in Path("/dev/shm").glob(f"{glob.escape(name)}_*")):
            path.unlink(missing_ok=True)


def _explanation(vllm: Any, config: ResponseSettings, error: BaseException) -> str:
    settings = config.rollout.vllm
    said = " ".join(str(error).split())[:600]
    name = f"vLLM {vllm.__version__}"
    memory = f"rollout.vllm.gpu_memory_utilization = {settings.gpu_memory_utilization}"
    if isinstance(error, torch.OutOfMemoryError) or "less than desired" in said:
        return (
            f"{name} could not take its memory ({memory}): {said}. Lower it, or leave more free: a higher zero.stage,"
            " or zero.offload. `python -m fastppo.plan` shows what is in memory while the run samples."
        )
    if "KV cache" in said or "cache blocks" in said:
        return (
            f"{name} has no memory for its key/value cache ({memory}): {said}. Raise it, or"
            " rollout.vllm.tensor_parallel_size; or lower data.max_prompt_tokens or sampling.max_new_tokens."
        )
    given = f", with rollout.vllm.arguments {settings.arguments}" if settings.arguments else ""
    return (
        f"{name} did not start{given}: {type(error).__name__}: {said}. If it is not these arguments, set rollout.engine"
        " to inprocess."
    )
