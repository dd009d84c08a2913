"""fuzz_gae.py LIBRARY COUNT SEED: random inputs, most of them bad, for a build of fastppo._C under sanitizers.

test_gae_sanitizers.py runs it. torch's tensors come from the sanitizer's allocator then, so an access next to one
ends the process. A bad input must be a ValueError that names an argument; a good one must give the right numbers.
"""

import importlib.util
import math
import random
import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

NAMES = ("rewards", "values", "cu_seqlens", "gamma", "lam", "bootstrap", "mask")
LENGTHS = (0, 1, 2, 3, 15, 16, 17, 31, 33, 100, 2047, 2049)


def good() -> dict[str, Any]:
    lengths = [random.choice(LENGTHS) for _ in range(random.randrange(8))]
    if random.random() < 0.02:
        lengths.append(random.randrange(16_000, 40_000))
    tokens = sum(lengths)
    dtype = random.choice((torch.float32, torch.bfloat16))
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return {
        "rewards": torch.randn(tokens).to(dtype),
        "values": torch.randn(tokens).to(dtype),
        "cu_seqlens": starts.to(random.choice((torch.int32, torch.int64))),
        "gamma": random.choice((0.0, 0.95, 1.0, random.random())),
        "lam": random.choice((0.0, 0.95, 1.0, random.random())),
        "bootstrap": random.choice((None, torch.randn(len(lengths)))),
        "mask": random.choice((None, torch.rand(tokens) < random.random())),
    }


def reshaped(x: Tensor) -> Tensor:
    kinds = (x[:-1], torch.cat([x, x[:1], x[:1]]), x[None], x.new_zeros(()), torch.stack([x, x], -1)[:, 0])
    return random.choice(kinds)


def recast(x: Tensor) -> Tensor:
    return x.to(random.choice((torch.float64, torch.float16, torch.int8, torch.int32, torch.bool, torch.bfloat16)))


def wrong_starts(x: Tensor) -> Tensor:
    x = x.clone()
    for _ in range(random.randrange(1, 4)):
        limits = torch.iinfo(x.dtype)
        x[random.randrange(len(x))] = random.choice((limits.min, limits.max, -1, 0, 1, random.randrange(5000)))
    return x


def spoiled(arguments: dict[str, Any]) -> dict[str, Any]:
    name = random.choice(NAMES)
    value = arguments[name]
    if name in ("gamma", "lam"):
        value = random.choice((-1e-9, 1.0000001, math.nan, math.inf, -math.inf, 2.0))
    elif name == "cu_seqlens" and random.random() < 0.7:
        value = wrong_starts(value)
    elif value is not None:
        value = random.choice((reshaped, recast))(value)
    return arguments | {name: value}


def is_right(arguments: dict[str, Any], out: Tensor) -> bool:
    """A_t against delta_t + gamma lambda A_{t+1} of the outputs themselves, over the tokens that are not masked."""
    rewards, values = arguments["rewards"].double(), arguments["values"].double()
    mask = torch.ones(len(rewards)).bool() if arguments["mask"] is None else arguments["mask"]
    starts, (advantages, returns) = arguments["cu_seqlens"].tolist(), out.double()
    if advantages[~mask].any() or returns[~mask].any():
        return False
    for s, (begin, end) in enumerate(pairwise(starts)):
        own = torch.arange(begin, end)[mask[begin:end]]
        last = torch.zeros(1) if arguments["bootstrap"] is None else arguments["bootstrap"][s : s + 1]
        delta = rewards[own] + arguments["gamma"] * torch.cat([values[own][1:], last])[: len(own)] - values[own]
        after = torch.cat([advantages[own][1:], torch.zeros(1)])[: len(own)]
        expected = delta + arguments["gamma"] * arguments["lam"] * after
        size = 1.0 + float(expected.abs().max()) if len(own) else 1.0
        if not torch.allclose(advantages[own], expected, rtol=0, atol=3e-5 * size):
            return False
        if not torch.allclose(returns[own], advantages[own] + values[own], rtol=0, atol=3e-5 * size):
            return False
    return True


def is_here(module: ModuleType, level: str) -> bool:
    """Whether this processor has the instructions of that level."""
    try:
        module.set_simd(level)
    except ValueError:
        return False
    return True


def main(library: str, count: int, seed: int) -> None:
    spec = importlib.util.spec_from_file_location("_C", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(2)
    simd = [level for level in module.built()["simd"] if is_here(module, level)]
    taken = refused = 0
    for _ in range(count):
        module.set_simd(random.choice(simd))
        arguments = good()
        if random.random() < 0.7:
            arguments = spoiled(arguments)
        try:
            out = torch.ops.fastppo.gae(**arguments)
        except ValueError as error:
            if not str(error).startswith(tuple(f"{name} " for name in NAMES)):
                raise
            refused += 1
        else:
            assert is_right(arguments, out), arguments
            taken += 1
    print(f"{taken} taken, {refused} refused")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
