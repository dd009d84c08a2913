"""The constants of this machine, measured: `python -m fastppo.plan --measure FILE`, also launched by deepspeed.

All ranks measure at the same time, so that each has the share of memory, cores and links that it has in a run; the file
has the mean over ranks. With the settings of a run the kernels that the plan counts are measured one by one, too: on a
CPU the speed of a product depends on its shape by a factor of ten.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fastppo import ops
from fastppo.config import OptimConfig, ZeroConfig
from fastppo.data import pack
from fastppo.distributed import Frozen, World, all_gather
from fastppo.models import Policy, fuse_head
from fastppo.planner.constants.replay import call_seconds, seconds_of
from fastppo.planner.constants.values import Constant, Constants, not_writable, write_constants
from fastppo.planner.time.work import BACKWARD, Recording, Work, attention_flops

LARGE = 1 << 25  # elements of a tensor that no cache holds
COLLECTIVE = (1 << 12, 1 << 23)  # elements, for the latency and for the bandwidth
MODULES = 16  # of the stack that ZeRO-3 gathers
ROUNDS = 5


def check_writable(path: Path) -> None:
    """Raises ConstantsError where no file can be written, before anything is measured."""
    existed = path.exists()
    try:
        with path.open("a", encoding="utf-8"):
            pass
        if not existed:
            path.unlink(missing_ok=True)  # ranks check at the same time
    except OSError as error:
        raise not_writable(path, error) from None


def measure(path: Path, world: World, work: Work | None) -> Constants:
    """Measure, and write the file on the first rank. work: the kernels of a run, if there is one. All ranks call it."""
    device = world.device
    found = dict(_own(device))
    if world.ranks > 1:
        found |= _links(world)
    kernels = seconds_of(work.calls, device) if work is not None else {}
    gathered: list[tuple[dict[str, float], dict[str, float]]] = all_gather((found, kernels), world)
    source = f"measured on {name_of(device)}, {described(device, world)}"
    values = {name: Constant(_mean(name, [one[0] for one in gathered]), source) for name in found}
    values |= _assumed(device)
    times = {name: float(f"{_mean(name, [one[1] for one in gathered]):.4g}") for name in kernels}
    constants = Constants(name_of(device), device.type == "cpu", values, times, f"--constants {path}")
    if world.rank == 0:
        write_constants(constants, path)
    return constants


def _mean(name: str, ranks: list[dict[str, float]]) -> float:
    known = [rank[name] for rank in ranks if name in rank]
    return sum(known) / len(known)


def _assumed(device: torch.device) -> dict[str, Constant]:
    """What is not measured."""
    if device.type == "cpu":
        source = "by design: kernels run one after another on the core of their rank, and gloo shares it"
        return {name: Constant(0.0, source) for name in ("gap", "graph_gap", "hidden")}
    return {
        "gap": Constant(1.5e-6, "assumed"),
        "graph_gap": Constant(1e-6, "assumed"),
        "hidden": Constant(0.8, "assumed: DeepSpeed gathers ahead on a stream of its own"),
    }


def name_of(device: torch.device) -> str:
    """The processor or the card."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def described(device: torch.device, world: World) -> str:
    threads = f", {torch.get_num_threads()} threads each" if device.type == "cpu" else ""
    return f"{world.ranks} rank{'s' if world.ranks > 1 else ''}{threads}, torch {torch.__version__}"


def _own(device: torch.device) -> Mapping[str, float]:
    """What a rank does alone."""
    gpu = device.type == "cuda"
    found = {f"products_{name}": _products(dtype, device) for name, dtype in DTYPES.items()}
    found["memory"] = _memory(device)
    found["attention"] = _attention(device)
    found["decode"] = _decode(device)
    found["adam"] = _adam(device)
    found |= _launches(device)
    if gpu:
        found["pcie"] = _pcie(device)
        found["host_adam"] = _adam(torch.device("cpu"))
    return found


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _products(dtype: torch.dtype, device: torch.device) -> float:
    width = 8192 if device.type == "cuda" else 1024
    x = torch.randn(width, width, device=device).to(dtype)  # a GPU draws less power on ones, and is faster
    return 2 * width**3 / call_seconds([lambda: x @ x], device)


def _memory(device: torch.device) -> float:
    a, b, c = (torch.ones(LARGE, device=device) for _ in range(3))
    return 3 * a.nbytes / call_seconds([lambda: torch.add(a, b, out=c)], device)


def _attention(device: torch.device) -> float:
    """Forward and backward of sequences of 1,024 tokens, through PyTorch."""
    heads, length, width = (32, 1024, 128) if device.type == "cuda" else (4, 1024, 64)
    query, key, value = (
        torch.randn(1, heads, length, width, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )

    def both() -> None:
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out.backward(torch.ones_like(out))

    return (1 + BACKWARD) * attention_flops(1, length, heads * width) / call_seconds([both], device)


def _decode(device: torch.device) -> float:
    rows, heads, length, width = (128, 8, 1024, 128) if device.type == "cuda" else (16, 4, 512, 64)
    query, key, value = (torch.randn(rows, heads, width, device=device).bfloat16() for _ in range(3))
    keys, values = (torch.zeros(rows, heads, length, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    lengths, at = torch.full((rows,), length - 1, device=device), torch.arange(rows, device=device)

    def step() -> Tensor:
        return ops.attend_cached(query, key, value, keys, values, lengths, at, scale=0.1, window=0, softcap=0.0)

    return 2 * keys.nbytes / call_seconds([step], device)


def _adam(device: torch.device) -> float:
    """PyTorch's AdamW in one kernel, over the states of an eighth of a large tensor's elements."""
    weights = nn.Parameter(torch.ones(LARGE // 8, device=device))
    weights.grad = torch.ones_like(weights)
    adam = torch.optim.AdamW([weights], lr=1e-9, fused=True)
    adam.step()
    return 28 * weights.numel() / call_seconds([adam.step], device)


def _launches(device: torch.device) -> dict[str, float]:
    """Of the host for a kernel: what a pass of a tiny model takes beside its kernels, forward and backward."""
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
    shape |= {"num_hidden_layers": 4, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=256, pad_token_id=None, **shape))
    policy, packed = Policy(fuse_head(model.to(device))), pack([tuple(range(16))], [8]).to(device)

    def both() -> None:
        policy.hidden(packed).sum().backward()

    with (recording := Recording()):
        both()
    count = recording.work.kernels
    taken = call_seconds([both], device)
    if device.type == "cuda":  # kernels as small as these run beside the host, which is what takes the time
        return {"launch": taken / count}
    kernels = seconds_of(recording.work.calls, device)
    inside = sum(times * kernels.get(call.name, 0.0) for call, times in recording.work.calls.items())
    return {"launch": max(taken - inside, 0.0) / count}


def _pcie(device: torch.device) -> float:
    host, there = torch.ones(LARGE).pin_memory(), torch.ones(LARGE, device=device)
    return host.nbytes / call_seconds([lambda: there.copy_(host, non_blocking=True)], device)


def _links(world: World) -> dict[str, float]:
    """Sums over all ranks of a small and of a large tensor, and what ZeRO-3 adds to a module."""
    device, ranks = world.device, world.ranks
    small, large = (torch.ones(size, device=device) for size in COLLECTIVE)
    latency, whole = (_collective(partial(dist.all_reduce, x), device) for x in (small, large))
    nodes = max(ranks // int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or ranks), 1)
    name = "link" if nodes == 1 else "network"
    rate = 2 * large.nbytes * (ranks - 1) / ranks / max(whole - latency, 1e-9)
    return {name: rate, f"{name}_latency": latency, "zero3_module": _module_at_stage_3(device)}


def _collective(call: Callable[[], Any], device: torch.device) -> float:
    """The median of the seconds that pass, as ranks wait for each other."""
    times = []
    for _ in range(1 + ROUNDS):
        dist.barrier()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _module_at_stage_3(device: torch.device) -> float:
    """Seconds of the host's thread that a module takes longer whose weights are gathered."""
    width = 512
    with torch.random.fork_rng(devices=[]):
        plain, split = (
            nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(MODULES))).to(device) for _ in range(2)
        )
    x = torch.ones(1, width, device=device)
    frozen = Frozen(split, OptimConfig(dtype="fp32"), ZeroConfig(stage=3))
    taken = []
    with torch.no_grad():
        for model in (plain, frozen):
            for _ in range(3):  # DeepSpeed learns in which order modules follow
                model(x)
            start = time.thread_time()
            for _ in range(ROUNDS):
                model(x)
            taken.append((time.thread_time() - start) / ROUNDS)
    frozen.release()
    return max(taken[1] - taken[0], 0.0) / MODULES
