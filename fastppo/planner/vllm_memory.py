"""Bytes that vLLM takes on each GPU, or on the CPU in each rank's process, as vLLM 0.32 allocates them.

While it samples it takes a fixed share of a GPU, `gpu_memory_utilization` of all of its memory. Its part of the
weights, its CUDA graphs and what a pass needs come out of this share; keys and values fill the rest. Asleep it has
neither weights nor cache, but its graphs and buffers of communication stay. On the CPU it has no graphs and does not
sleep, and VLLM_CPU_KVCACHE_SPACE says how large the cache is; if that is not set, the ranks of a node divide the share
of its memory, and all that a rank's process holds counts as vLLM's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from fastppo.config import ResponseSettings
from fastppo.distributed import uses
from fastppo.errors import FastPPOError
from fastppo.models import ModelError
from fastppo.planner.footprint import Footprint
from fastppo.planner.machine import Machine, in_gb
from fastppo.planner.memory import GATHER_BYTES, Bytes, Places, Share

# Estimates for what vLLM allocates outside of the memory that sleeping frees. Its logs report 0.2 GiB of graphs for
# Llama-3.2-1B to 1.5 GB for Kimi-K2.6 on 8 GPUs, and 0.15 to 1.3 GiB outside of PyTorch. Not measured by us.
GRAPHS, COMMUNICATION = 3 << 29, 1 << 30
# Tokens of a cache block, tokens that a pass reads and sequences that it draws for, if no argument says otherwise.
BLOCK, CPU_BLOCK = 16, 128
LARGE_GPU, LARGE, SMALL, CPU = 70 << 30, (16384, 1024), (8192, 256), (4096, 256)

CPU_CACHE = "VLLM_CPU_KVCACHE_SPACE"  # in the environment, in GiB


@dataclass(frozen=True)
class VllmMemory:
    """Bytes of one GPU, or on the CPU of one rank."""

    whole: int  # of the model's weights, on all ranks of a group
    ranks: int  # in a group
    responses: int  # that a group draws together
    weights: int  # the rank's part
    beside: int  # that the process holds apart from vLLM where that comes out of the share, on the CPU
    resident: int  # graphs and buffers of communication, which stay while it sleeps
    passing: int  # what a pass or a draw needs
    length: int  # tokens of a prompt and its response, both as long as they may be
    response: int  # of the cache, for that many tokens
    given: int | None  # size of the cache where a setting says it
    share: int  # that all of it may take where no setting says the size of the cache
    share_of: str  # how the share came about
    cpu: bool

    @property
    def cache(self) -> int:
        """What is left of the share, but no less than one response needs."""
        if self.given is not None:
            return max(self.given, self.response)
        return max(self.share - self._taken, self.response)

    @property
    def _taken(self) -> int:
        """What of the share is no cache."""
        return self.beside + self.weights + self.resident + self.passing

    @property
    def needs(self) -> tuple[int, int]:
        """Bytes needed to draw one response at a time, and bytes there are."""
        if self.given is not None:
            return self.response, self.given
        return self._taken + self.response, self.share

    @property
    def fits(self) -> bool:
        """Whether what it may take is enough."""
        needed, there = self.needs
        return needed <= there

    def shares(self, phases: Iterable[str]) -> list[Share]:
        """What it holds in each phase, by the table of `residency`. On the CPU it does not sleep."""
        table, found = uses(loss_reads_reference=False), []
        for phase in phases:
            awake = "sampler" in table[phase]
            if awake:
                cache, passing = self.cache, self.passing
                held = Bytes(weights=self.weights, buffers=self.resident, activations=passing, cache=cache)
            else:  # a cache that stays is added to what other roles need for a while, as buffers are
                held = Bytes(buffers=self.resident)
                held += Bytes(weights=self.weights, buffers=self.cache) if self.cpu else Bytes()
            if held.total:
                found.append(Share("vLLM", phase, Places(gpu=held)))
        return found

    def lines(self) -> list[str]:
        """The arithmetic, in GB, for people."""
        weights = f"weights {in_gb(self.whole)}"
        if self.ranks > 1:
            weights += f" over {self.ranks} ranks = {in_gb(self.weights)}"
        parts = [weights, f"graphs and communication {in_gb(self.resident)}", f"a pass {in_gb(self.passing)}"]
        if self.given is None:
            beside = [f"the other parts of the run {in_gb(self.beside)}"] if self.beside else []
            left = in_gb(max(self.share - self._taken, 0))
            parts = [f"{self.share_of} = {in_gb(self.share)}", *beside, *parts, f"left for the cache {left}"]
        else:
            parts.append(f"cache {in_gb(self.given)} ({self.share_of})")
        at_once = self.cache // self.response if self.fits else 0
        group = f"{self.ranks} ranks draw" if self.ranks > 1 else "a rank draws"
        return [
            f"vLLM: {'; '.join(parts)}",
            f"vLLM: a prompt and its response, {self.length:,} tokens, take {in_gb(self.response)} of the cache:"
            f" {at_once:,} at once, of the {self.responses:,} that {group} together",
        ]

    def problem(self) -> str:
        """Why it does not fit."""
        needed, there = (in_gb(amount) for amount in self.needs)
        if self.given is not None:
            return f"vLLM needs {needed} GB of cache for one response, and {self.share_of} is {there} GB"
        return f"vLLM needs {needed} GB to draw one response at a time, and may take {self.share_of} = {there} GB"


def samples_with_vllm(config: ResponseSettings) -> bool:
    return config.rollout.engine == "vllm"


def vllm_memory(size: Footprint, config: ResponseSettings, responses: int, machine: Machine, beside: int) -> VllmMemory:
    """size: of the model that responses are drawn from; responses: that all ranks draw together; beside: bytes of the
    rest of the run while it samples.

    Raises ModelError where its attention heads cannot be split over the ranks of a group.
    """
    settings, cpu = config.rollout.vllm, machine.gpu is None
    ranks, arguments = settings.tensor_parallel_size, settings.arguments
    if not splits_over(size, ranks):
        raise ModelError(
            f"rollout.vllm.tensor_parallel_size = {ranks}, but the model has {size.heads} attention heads and"
            f" {size.key_value_heads} heads of keys and values, which vLLM cannot divide among {ranks} ranks; set it to"
            f" {', '.join(str(n) for n in range(1, 65) if splits_over(size, n))}."
        )
    if cpu:
        tokens, rows = (number * ranks for number in CPU)
    else:
        tokens, rows = LARGE if (machine.gpu or 0) >= LARGE_GPU else SMALL
    tokens, rows = int(arguments.get("max_num_batched_tokens", tokens)), int(arguments.get("max_num_seqs", rows))
    length = config.data.max_prompt_tokens + config.sampling.max_new_tokens
    block = CPU_BLOCK if cpu else BLOCK
    graphs = 0 if cpu or arguments.get("enforce_eager") else GRAPHS
    given, said = _given_cache(arguments.get("kv_cache_memory_bytes"), cpu=cpu)
    used = settings.gpu_memory_utilization
    if machine.gpu is not None:
        share, share_of = int(used * machine.gpu), f"{used:g} of {in_gb(machine.gpu)} GB"
    else:
        share, share_of = int(used * machine.host / machine.gpus), f"{used:g} of {in_gb(machine.host)} GB"
        share_of += f" / {machine.gpus} ranks" if machine.gpus > 1 else ""
    return VllmMemory(
        whole=size.part(1) * size.bytes,
        ranks=ranks,
        responses=-(-responses // machine.ranks) * ranks,
        weights=size.part(ranks) * size.bytes,
        beside=beside if cpu else 0,
        resident=graphs + (COMMUNICATION if ranks > 1 and not cpu else 0),
        passing=max(_pass(size, tokens, length, ranks), _draw(size, rows, config)),
        length=length,
        response=-(-length // block) * block * (size.position // min(ranks, size.key_value_heads)),
        given=given,
        share=share,
        share_of=share_of if said is None else said,
        cpu=cpu,
    )


def splits_over(size: Footprint, ranks: int) -> bool:
    """Whether vLLM can divide the attention heads: several ranks may have the same head of keys and values."""
    few, many = sorted((ranks, size.key_value_heads))
    return size.heads % ranks == 0 and many % few == 0


def streaming_needs(size: Footprint, config: ResponseSettings) -> Bytes:
    """What the actor needs while its weights are streamed into vLLM, which has no cache yet.

    At ZeRO stage 3 as many whole layers as a bucket holds, at least one; with adapters the same merged, one weight at a
    time in fp32. Other weights are sent as they are.
    """
    bucket = max(GATHER_BYTES, size.largest_layer * size.bytes)
    found = bucket if config.zero.stage == 3 else 0
    return Bytes(workspace=found + (bucket + 8 * size.largest if size.adapters else 0))


def _pass(size: Footprint, tokens: int, length: int, ranks: int) -> int:
    """Activations of a pass over so many tokens. What is inside of layers is split over ranks, states are not: the
    residual, the normed states, and what a layer adds before and after it is summed over ranks."""
    peak = size.passes(-(-tokens // length), length, gradient=False).peak
    return min(peak, peak // ranks + 4 * tokens * size.width * size.bytes)


def _draw(size: Footprint, rows: int, config: ResponseSettings) -> int:
    """Logits of every row in the model's dtype and in fp32 and the logprobs of what is drawn; with top_p or top_k also
    the logits sorted, their order in int64, and probabilities."""
    truncated = config.sampling.top_p < 1.0 or config.sampling.top_k > 0
    return rows * size.vocabulary * (size.bytes + 4 + 4 + (4 + 8 + 4 if truncated else 0))


def _given_cache(argument: int | None, *, cpu: bool) -> tuple[int | None, str | None]:
    """The size of the cache, in bytes, and what sets it; None: nothing does. Raises FastPPOError."""
    text = os.environ.get(CPU_CACHE, "") if cpu else ""
    if text:
        if not text.isdecimal():
            raise FastPPOError(f"{CPU_CACHE} is {text!r} in the environment; it must be a whole number of GiB.")
        return int(text) << 30, f"{CPU_CACHE} = {text}"
    return (None, None) if argument is None else (int(argument), "rollout.vllm.arguments.kv_cache_memory_bytes")
