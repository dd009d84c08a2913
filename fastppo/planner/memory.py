"""Bytes that each role of a run holds in each phase: on the GPU, in the host's memory and on NVMe. Arithmetic alone.

P parameters of which T train, in weights of b bytes, on N ranks. What DeepSpeed 0.19 holds for a trained role:

| zero.stage           | weights   | gradients            | optimizer: fp32 master weights, two moments |
|----------------------|-----------|----------------------|---------------------------------------------|
| 0 (fp32)             | b P       | 4 T                  | 8 T: no master, the weights are fp32        |
| 1                    | b P       | 4 T                  | 12 T / N                                    |
| 1, offloaded         | b P       | 4 T, and 4 T / N     | 12 T / N                                    |
| 2                    | b P       | (b + 4) T / N        | 12 T / N                                    |
| 3                    | b P / N   | 4 T / N              | 12 T / N                                    |

In bf16 gradients add up in fp32 (grad_accum_dtype): at stage 1 of all parameters on every rank, each as it arrives, at
2 and 3 of the rank's own part. Offloading leaves the 4 T of stage 1 on the GPU. At stage 3 the weights of one module at
a time are gathered, and its gradients made whole. Stages 2 and 3 are as DeepSpeed's own estimators have them
(`estimate_zero2_model_states_mem_needs` and its sister); what these leave out is in `buffers` and `reducing`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

from fastppo.config import AnyConfig, OptimConfig, ResponseSettings
from fastppo.distributed import PartName, Placement
from fastppo.ops import blocks, workspace_bytes
from fastppo.planner.batch import Batch
from fastppo.planner.footprint import Footprint

# DeepSpeed's defaults, in elements.
REDUCE_BUCKET = 500_000_000  # gradients on their way to the other ranks
PREFETCH_BUCKET = 50_000_000  # stage 3: weights that are fetched ahead
SUB_GROUP = 1_000_000_000  # stage 3: how many parameters are updated at a time when their states are on NVMe
NVME_OPTIMIZER_BUFFERS = 4  # master weights, gradient and two moments of a sub-group, in fp32
NVME_PARAMETER_BUFFERS = 5 * 100_000_000  # buffers of weights on their way, pinned

Change = dict[str, Any]  # of settings: name -> value, as on the command line

STEP_TOKENS = 128  # a decode step of so many rows computes about what a pass over as many tokens does
GATHER_BYTES = 2**28  # weights that are gathered at a time for sampling, on top of the whole copy


@dataclass(frozen=True)
class Bytes:
    """What fills a memory."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    buffers: int = 0  # that stay: DeepSpeed's own, and the cached outputs of a frozen prefix
    activations: int = 0
    cache: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))

    @property
    def states(self) -> int:
        """Weights, gradients and optimizer: what DeepSpeed's estimators count."""
        return self.weights + self.gradients + self.optimizer

    @property
    def passing(self) -> Bytes:
        """What is held for a while: activations, cache, workspace."""
        return Bytes(activations=self.activations, cache=self.cache, workspace=self.workspace)

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Places:
    """Bytes of one rank."""

    gpu: Bytes = field(default_factory=Bytes)
    host: Bytes = field(default_factory=Bytes)
    nvme: Bytes = field(default_factory=Bytes)

    def __add__(self, other: Places) -> Places:
        return Places(self.gpu + other.gpu, self.host + other.host, self.nvme + other.nvme)


@dataclass(frozen=True)
class Share:
    """What one role holds in one phase, on one rank."""

    role: str
    phase: str
    places: Places
    first: bool = False  # on the first rank alone


@dataclass(frozen=True)
class Role:
    """A role, its model's sizes, and what stands in for weights that it shares with another role."""

    name: str  # actor, critic, reference, reward 1, ..., judge 1, ...; model of an offline method
    size: Footprint
    trains: bool
    weights: int  # parameters of its own; fewer than the model has where they are shared


def on(place: str, amount: Bytes) -> Places:
    """place: none (the GPU), cpu or nvme, as in `zero.offload`."""
    return Places(**{{"none": "gpu", "cpu": "host", "nvme": "nvme"}[place]: amount})


def placed(part: PartName, amount: Bytes, phase: str, placement: Placement, *, cpu: bool) -> Places:
    """Where a part is in a phase. cpu: whether the run is on the CPU, where there is one memory and nothing moves."""
    if cpu:
        return Places(gpu=amount)
    gpu = Places(gpu=amount) if placement.holds(phase, part) else Places()
    return gpu + (Places(host=amount) if placement.copied(part) else Places())


def model_states(role: Role, config: AnyConfig, ranks: int) -> Places:
    """Weights, gradients and optimizer states of one rank while the role learns, or is asked if it never does."""
    zero, size = config.zero, role.size
    weights, trained, b = role.weights * size.bytes, size.trained, size.bytes
    if zero.stage == 3:
        live = Bytes(weights=size.largest * b, gradients=size.largest * b if role.trains else 0)
        place = zero.parameters_on if role.trains else zero.frozen_on
        found = on("none", live) + on(place, Bytes(weights=weights // ranks))
    else:
        found = on("none", Bytes(weights=weights))
    if not role.trains:
        return found
    if zero.stage == 0:
        return found + on("none", Bytes(gradients=4 * trained, optimizer=8 * trained))
    place, fp32 = zero.optimizer_on, 4 * trained // ranks
    if zero.stage == 1:
        found += on("none", Bytes(gradients=4 * trained))
    if place != "none" or zero.stage == 3:
        found += on(place, Bytes(gradients=fp32))
    elif zero.stage == 2:
        found += on(place, Bytes(gradients=b * trained // ranks + fp32))
    return found + on(place, Bytes(optimizer=3 * fp32))


def buffers(role: Role, config: AnyConfig, ranks: int) -> Places:
    """What DeepSpeed makes once beside the states of a role and keeps. On the GPU only learning uses it."""
    zero, size = config.zero, role.size
    b, part = size.bytes, size.trained // ranks
    place = zero.parameters_on if role.trains else zero.frozen_on
    gpu = host = 0
    if zero.stage == 3 and place == "nvme":
        host += NVME_PARAMETER_BUFFERS * b
    if role.trains:
        if zero.stage == 3:
            gpu += _reduce_bucket(size) * b
            host += 4 * part if zero.optimizer_on != "none" else 0  # the sums, beside what the optimizer is handed
        elif zero.optimizer_on != "none":
            gpu += size.largest_trained * b  # one parameter's gradient on its way to the host
            host += (part + size.largest_trained) * b  # that gradient's other end, and new weights on their way back
            host += 4 * part if zero.stage == 2 and b == 4 else 0  # the sums; in bf16 they are on the GPU (`reducing`)
        if zero.optimizer_on == "nvme":
            host += NVME_OPTIMIZER_BUFFERS * 4 * min(part, SUB_GROUP)
    return Places(gpu=Bytes(buffers=gpu), host=Bytes(buffers=host))


def reducing(role: Role, config: AnyConfig, ranks: int, needs: Bytes | None = None) -> Places:
    """What DeepSpeed needs while a role learns, to fetch weights and to bring gradients together, with what a
    microbatch needs: one after the other or together."""
    needs = needs or Bytes()
    zero, size, b, sums = config.zero, role.size, role.size.bytes, 0
    bucket, part = min(size.trained, REDUCE_BUCKET), size.trained // ranks
    if zero.stage == 3:  # the gradients that wait for the bucket, and their sum in fp32 before it is added
        gpu = bucket * b + 4 * (bucket // ranks)
    elif zero.stage == 2:  # the bucket, and the gradients that wait for it beyond the rank's own part
        gpu = (_reduce_bucket(size) + max(bucket - part, 0)) * b
        if ranks == 1 and size.on_cpu:  # nothing is written to the bucket: a gradient is added where it arrives
            gpu = size.largest_trained * b
        sums = (
            4 * part if zero.optimizer_on != "none" and b < 4 else 0
        )  # of all microbatches, before they are handed on
    elif summed_on_arrival(role, config):
        gpu = b * size.largest_trained  # a gradient on its way to the sum
    else:
        # When the last backward pass is over, so that all it needed is free: one flat copy of the gradients that are
        # being reduced, and then of the rank's part, which the optimizer is handed.
        gpu, flat = 0, Bytes(workspace=4 * max(bucket, part))
        needs = max(needs, flat, key=lambda amount: amount.total)
    return prefetch(role, config) + Places(gpu=needs + Bytes(gradients=sums, workspace=gpu))


def summed_on_arrival(role: Role, config: AnyConfig) -> bool:
    """Whether each gradient is added where it arrives to a sum that is made once, as `BF16_Optimizer` does."""
    return config.zero.stage == 1 and config.zero.optimizer_on == "none" and role.size.bytes < 4


def _reduce_bucket(size: Footprint) -> int:
    """Its elements: it is allocated whole. On the CPU only those of its pages are in memory that were written to."""
    return min(size.trained, REDUCE_BUCKET) if size.on_cpu else REDUCE_BUCKET


def head_workspace(size: Footprint, tokens: int, *, reference: bool, gradient: bool) -> tuple[int, int]:
    """Bytes of the vocabulary head over `tokens` response tokens: while it runs, and of its gradients afterwards.

    As `fastppo.ops.chunked_head` allocates them: logits of a chunk of rows, the weight's gradient in fp32 if there are
    several.
    """
    summed = gradient and size.head_trains and size.bytes < 4
    workspace = workspace_bytes(cpu=size.on_cpu)
    parts = blocks(tokens, size.vocabulary, size.width, size.bytes, workspace, summed=summed)
    row = size.vocabulary * size.bytes
    logits = (parts.chunk + (parts.largest if reference else 0)) * row
    if not gradient:
        return logits, 0
    d_hidden = tokens * size.width * size.bytes
    d_weight = row * size.width if size.head_trains else 0
    in_fp32 = 4 * size.vocabulary * size.width if summed and not parts.one_chunk else 0
    return logits + d_hidden + in_fp32 + d_weight, d_hidden + d_weight


def sampling_needs(actor: Footprint, config: ResponseSettings, batch: Batch) -> Bytes:
    """Cache and workspace of the sampler."""
    cache = batch.rows * (batch.prompt + config.sampling.max_new_tokens) * actor.position
    prefill = actor.passes(batch.prefilled, batch.prompt, gradient=False).peak
    if batch.continued:  # several together have no more tokens than rows full of prompts
        prefill = max(
            actor.passes(batch.rows, batch.prompt, gradient=False).peak,
            actor.passes(1, batch.continued, gradient=False).peak,
        )
    gather = max(GATHER_BYTES, actor.largest * actor.bytes) if config.zero.stage == 3 else 0  # or one larger weight
    return Bytes(activations=prefill, cache=cache, workspace=max(step_logits(actor, batch), gather))


def step_logits(actor: Footprint, batch: Batch) -> int:
    """Bytes of the logits of a decode step; drawing from them needs no copy."""
    return batch.rows * actor.vocabulary * actor.bytes


def recording_holds(actor: Footprint, config: ResponseSettings, batch: Batch) -> Bytes:
    """What the sampler keeps on a GPU from its first batch on, outside of sampling too, if it records decode steps: the
    memory in which the largest step computes, and the tokens and logprobs of each row."""
    if actor.on_cpu or not config.sampling.cuda_graphs or config.rollout.engine != "inprocess":
        return Bytes()
    passes = actor.passes(-(-batch.rows // STEP_TOKENS), STEP_TOKENS, gradient=False)
    written = batch.rows * (config.sampling.max_new_tokens + 1) * (8 + 4)
    return Bytes(buffers=passes.peak + step_logits(actor, batch) + written)


def prefix_states(role: Role, batch: Batch) -> int:
    """Outputs of the frozen prefix for the whole batch, from experience to the end of learning."""
    return batch.tokens * role.size.width * role.size.bytes if role.trains and role.size.prefix else 0


def learning_needs(role: Role, batch: Batch, optim: OptimConfig, *, head: bool, reference: bool = False) -> Bytes:
    """Activations and the workspace of a vocabulary head of one microbatch, forward and backward.

    head: whether there is one, else one number comes from each state; reference: whether it reads the reference's too.
    """
    size = role.size
    recomputed = optim.recomputed_layers(size.layers)
    flow = size.passes(batch.sequences, batch.length, gradient=True, recomputed=recomputed, split=batch.split)
    states = batch.own_responses * size.width * size.bytes  # hidden states at the response tokens
    if not head:
        values = batch.own_responses * size.width * 4  # such a head computes in fp32
        return Bytes(activations=max(flow.kept + values, flow.peak) + states)
    during, after = head_workspace(size, batch.own_responses, reference=reference, gradient=True)
    # Two moments can be the highest: while the head runs on all that was kept, and within the backward pass.
    if flow.kept + during > flow.peak + after + states:
        return Bytes(activations=flow.kept + states, workspace=during)
    return Bytes(activations=flow.peak + 2 * states, workspace=after)


def asking_needs(role: Role, batch: Batch, *, head: bool, reference: bool = False) -> Bytes:
    """A pass without gradient over one microbatch."""
    size = role.size
    peak = size.passes(batch.sequences, batch.length, gradient=False, split=batch.split).peak
    states = batch.own_responses * size.width * size.bytes
    states *= 2 if reference else 1
    logits = head_workspace(size, batch.own_responses, reference=reference, gradient=False)[0] if head else 0
    return Bytes(activations=peak + states, workspace=logits)


def prefetch(role: Role, config: AnyConfig) -> Places:
    """What DeepSpeed needs beside the states of a role that is asked."""
    if config.zero.stage < 3:
        return Places()
    return Places(gpu=Bytes(workspace=min(PREFETCH_BUCKET, role.weights) * role.size.bytes))


def by_phase(shares: list[Share]) -> Iterator[tuple[str, Places]]:
    """Each phase with the sum over its roles.

    Roles run one after the other: of what they need for a while only the largest counts.
    """
    for phase in dict.fromkeys(share.phase for share in shares):
        own = [share for share in shares if share.phase == phase]
        passing = max((share.places.gpu.passing for share in own), key=lambda amount: amount.total)
        lasting = sum((replace(share.places, gpu=_without(share.places.gpu)) for share in own), Places())
        yield phase, lasting + Places(gpu=passing)


def _without(amount: Bytes) -> Bytes:
    """Less what is held for a while."""
    return replace(amount, activations=0, cache=0, workspace=0)
