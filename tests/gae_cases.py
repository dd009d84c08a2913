"""The cases that every backend of GAE is held to: the CPU at each SIMD level, the CUDA kernel on simulated threads."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from cases import assert_as_good, in_fp64
from torch import Tensor

from fastppo.ops import eager

Gae = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class GaeCase:
    name: str
    lengths: tuple[int, ...]
    gamma: float = 0.99
    lam: float = 0.95
    mask: str = ""  # some, ends, runs (of thousands), one a sequence, all: the tokens that are passed over
    bootstrap: bool = False
    scale: float = 1.0
    level: float = 0.0  # what the values lie around
    starts: torch.dtype = torch.int32

    def __str__(self) -> str:
        return self.name

    def build(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of `gae`."""
        random = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        tokens = sum(self.lengths)
        rewards, values = self.scale * torch.randn(2, tokens, generator=random, dtype=torch.float64)
        made: dict[str, Any] = {"rewards": rewards.to(dtype), "values": (values + self.level).to(dtype)}
        made["cu_seqlens"] = torch.tensor([0, *self.lengths]).cumsum(0).to(self.starts)
        made |= {"gamma": self.gamma, "lam": self.lam}
        if self.bootstrap:
            last = self.level + self.scale * torch.randn(len(self.lengths), generator=random)
            made["bootstrap"] = last.to(torch.promote_types(dtype, torch.float32))
        if self.mask:
            made["mask"] = torch.cat([self.kept(length, random) for length in self.lengths] or [torch.ones(0).bool()])
        return made

    def kept(self, length: int, random: torch.Generator) -> Tensor:
        """(length,) bool, True for the tokens that count."""
        at = torch.arange(length)
        if self.mask == "some":
            return torch.rand(length, generator=random) < 0.7
        if self.mask == "ends":
            return (at >= length // 3) & (at < length - length // 4)
        if self.mask == "runs":
            return at // 3000 % 2 == 1
        if self.mask == "one a sequence":
            return at == length // 2
        assert self.mask == "all"
        return at < 0


EACH_LENGTH = (0, 1, 2, 31, 32, 33, 1000, 0, 8191, 8193, 1024, 2048, 4097)
GAE_CASES = [
    GaeCase("no sequence", ()),
    GaeCase("no tokens", (0, 0)),
    *[
        GaeCase(f"gamma {gamma}, lambda {lam}", EACH_LENGTH, gamma, lam, bootstrap=True)
        for gamma in (0.0, 0.95, 1.0)
        for lam in (0.0, 0.95, 1.0)
    ],
    GaeCase("slow decay", (30_000, 5000), 0.99999, 0.9999, level=1.0),
    GaeCase("131,072 tokens", (131_072,), bootstrap=True, starts=torch.int64),
    GaeCase("131,072 tokens, no decay", (131_072,), 1.0, 1.0, level=1.0),
    GaeCase("131,072 tokens, runs masked", (131_072,), mask="runs", bootstrap=True),
    GaeCase("10,000 sequences", (*(i * 37 % 41 for i in range(9_996)), 3000, 1, 9000, 12_289)),
    *[
        GaeCase(f"{mask} masked", EACH_LENGTH, 0.99, 0.95, mask, bootstrap=True, starts=torch.int64)
        for mask in ("some", "ends", "one a sequence", "all")
    ],
    GaeCase("some masked, no decay", EACH_LENGTH, 1.0, 1.0, "some"),
    GaeCase("1e6", EACH_LENGTH, scale=1e6, bootstrap=True),
    GaeCase("values around 1e6", EACH_LENGTH, 1.0, 0.95, level=1e6, bootstrap=True),
    GaeCase("values around 1e6, gamma near 1", EACH_LENGTH, 0.9999, 0.95, "some", level=1e6, bootstrap=True),
]


def outputs(gae: Gae, arguments: dict[str, Any]) -> dict[str, Tensor]:
    advantages, returns = gae(**arguments)
    return {"advantages": advantages, "returns": returns}


def assert_right(gae: Gae, arguments: dict[str, Any]) -> None:
    truth = outputs(eager.gae, in_fp64(arguments))
    same_dtype = outputs(eager.gae, arguments)
    assert_as_good(outputs(gae, arguments), same_dtype, truth, arguments["rewards"].dtype)


def assert_alone_as_together(gae: Gae, arguments: dict[str, Any]) -> None:
    """Each sequence by itself has the very bits that it has in the batch."""
    together = torch.stack(gae(**arguments))
    starts = arguments["cu_seqlens"].tolist()
    for s, (begin, end) in enumerate(pairwise(starts)):
        own = {name: arguments[name][begin:end].clone() for name in ("rewards", "values", "mask") if name in arguments}
        own["cu_seqlens"] = torch.tensor([0, end - begin])
        if "bootstrap" in arguments:
            own["bootstrap"] = arguments["bootstrap"][s : s + 1]
        alone = torch.stack(gae(**(arguments | own)))
        assert torch.equal(alone, together[:, begin:end]), f"sequence {s}, tokens {begin} to {end}"
