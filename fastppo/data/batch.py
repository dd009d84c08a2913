"""The types that the phases of a step pass on, all in one layout: packed, without padding.

B sequences (prompt and response) form one row of N tokens. The responses alone form a second, shorter row of M tokens:
all quantities per token of PPO (logprobs, KL, rewards, values, advantages, returns) have the shape `(M,)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from fastppo.distributed import to_device


@dataclass(frozen=True)
class Packed:
    """B sequences end to end, each a prompt followed by its response. Every response has at least one token."""

    tokens: Tensor  # (N,) int64
    cu_seqlens: Tensor  # (B+1,) int32, where each sequence starts in `tokens`; the last entry is N
    response_cu_seqlens: Tensor  # (B+1,) int32, where each response starts in an (M,) tensor; the last entry is M

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    @cached_property
    def lengths(self) -> Tensor:  # (B,) int64
        return self.cu_seqlens.diff().long()

    @cached_property
    def response_lengths(self) -> Tensor:  # (B,) int64
        return self.response_cu_seqlens.diff().long()

    @cached_property
    def lengths_on_host(self) -> list[int]:  # B numbers, known without waiting for the device
        return self.lengths.tolist()

    @cached_property
    def response_lengths_on_host(self) -> list[int]:
        return self.response_lengths.tolist()

    @cached_property
    def positions(self) -> Tensor:  # (N,) int64, from 0 in every sequence
        return segment_offsets(self.lengths)

    @cached_property
    def last_rows(self) -> Tensor:  # (B,) int64, the row of each sequence's last token
        return self.cu_seqlens[1:].long() - 1

    def last_rows_without(self, padding: int | None) -> Tensor:
        """(B,) int64, the row of each sequence's last token that is not `padding`; its first row if all tokens are."""
        if padding is None:
            return self.last_rows
        rows = torch.arange(len(self.tokens), device=self.tokens.device)
        last_other = torch.where(self.tokens != padding, rows, 0).cummax(0).values[self.last_rows]
        return torch.maximum(last_other, self.cu_seqlens[:-1].long())

    @cached_property
    def predictors(self) -> Tensor:  # (M,) int64, the row whose hidden state predicts each response token
        first = self.last_rows - self.response_lengths  # the last prompt token predicts the first response token
        return first.repeat_interleave(self.response_lengths) + segment_offsets(self.response_lengths)

    @cached_property
    def responses(self) -> Tensor:  # (M,) int64, the response tokens
        return self.tokens[self.predictors + 1]

    @cached_property
    def last_response_tokens(self) -> Tensor:  # (B,) int64, where each response ends in an (M,) tensor
        return self.response_cu_seqlens[1:].long() - 1

    def to(self, device: torch.device) -> Packed:
        """On the device, with what else takes the lengths on the host to compute: no use of it waits for a GPU."""
        if self.tokens.device == device:
            return self
        moved = Packed(*(to_device(getattr(self, f.name), device) for f in fields(self)))
        on_host = {name: getattr(self, name) for name in ("lengths_on_host", "response_lengths_on_host")}
        rows = {name: to_device(getattr(self, name), device) for name in ("positions", "predictors")}
        moved.__dict__.update(on_host | rows)  # where `cached_property` looks
        return moved

    def select(self, sequences: Tensor) -> Packed:
        """The given sequences (an int64 tensor of indices), in the given order."""
        rows = segment_rows(self.cu_seqlens, sequences)
        return Packed(
            self.tokens[rows], cumulative(self.lengths[sequences]), cumulative(self.response_lengths[sequences])
        )

    def select_tokens(self, values: Tensor, sequences: Tensor) -> Tensor:
        """The part of an (M,) tensor that belongs to the given sequences."""
        return values[segment_rows(self.response_cu_seqlens, sequences)]


@dataclass(frozen=True)
class Prompts:
    """Prompts for which responses are sampled. A prompt with n responses occurs n times."""

    tokens: tuple[tuple[int, ...], ...]  # B prompts
    streams: Tensor  # (B,) int64, prompt index * n + sample index: selects the random numbers of a response
    sources: Tensor  # (B,) int64, the row of each prompt in its prompt set, for its text and columns

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def of(tokens: Sequence[Sequence[int]], rows: Sequence[int], *, first: int = 0, samples: int = 1) -> Prompts:
        """The given rows of a prompt set, each `samples` times; first: prompt index of the first row."""
        repeated = [row for row in rows for _ in range(samples)]
        streams = torch.arange(len(repeated)) + first * samples
        return Prompts(
            tuple(tuple(tokens[row]) for row in repeated), streams, torch.tensor(repeated, dtype=torch.int64)
        )

    def of_rank(self, rank: int, ranks: int) -> Prompts:
        """This rank's part; the parts of the ranks are contiguous and in the order of ranks."""
        return self.select(torch.arange(len(self)).tensor_split(ranks)[rank].tolist())

    def select(self, indices: Sequence[int]) -> Prompts:
        rows = torch.as_tensor(list(indices), dtype=torch.int64)
        return Prompts(tuple(self.tokens[i] for i in indices), self.streams[rows], self.sources[rows])


@dataclass(frozen=True)
class Rollout:
    """The result of sampling."""

    packed: Packed
    logprobs: Tensor  # (M,) fp32, of the distribution that each token was sampled from
    ended: Tensor  # (B,) bool, False where the response was cut at the maximum length
    sources: Tensor  # (B,) int64, the row of each prompt in its prompt set

    def select(self, sequences: Tensor) -> Rollout:
        """The given responses (an int64 tensor of indices), in the given order."""
        logprobs = self.packed.select_tokens(self.logprobs, sequences)
        return Rollout(self.packed.select(sequences), logprobs, self.ended[sequences], self.sources[sequences])


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations from the mean (m2) of all scores of a run so far."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def add(self, x: Tensor) -> Moments:
        """The moments with the numbers x (B,) added, by merging moments (Chan et al., 1983): sums would lose digits."""
        x = x.double()
        count, delta = self.count + len(x), float(x.mean()) - self.mean
        m2 = self.m2 + float((x - x.mean()).square().sum()) + delta**2 * self.count * len(x) / count
        return Moments(count, self.mean + delta * len(x) / count, m2)

    @property
    def std(self) -> float:
        return math.sqrt(self.m2 / self.count)


@dataclass(frozen=True)
class Scored:
    """The rollouts of all ranks, and the scores of the reward sources for each whole response."""

    rollout: Rollout
    by_source: Tensor  # (B, S) fp32, the score of each of the S reward sources
    scores: Tensor  # (B,) fp32, their weighted sum
    judged: Tensor  # (B,) fp32, the score of the held-out judge; NaN without a judge

    def select(self, sequences: Tensor) -> Scored:
        """The given responses (an int64 tensor of indices), in the given order."""
        rows = (self.by_source[sequences], self.scores[sequences], self.judged[sequences])
        return Scored(self.rollout.select(sequences), *rows)


@dataclass(frozen=True)
class Measured:
    """Scored responses, and what actor and reference say of each token; the global batch, the same on every rank."""

    packed: Packed
    scores: Tensor  # (B,) fp32, the weighted sum of the scores of the reward sources
    by_source: Tensor  # (B, S) fp32, the score of each source
    judged: Tensor  # (B,) fp32, the score of the held-out judge, not used in learning; NaN without a judge
    ended: Tensor  # (B,) bool
    sampler_logprobs: Tensor  # (M,) fp32
    old_logprobs: Tensor  # (M,) fp32, of the trainer's own forward pass before the first update
    ref_logprobs: Tensor  # (M,) fp32
    entropy: Tensor  # (M,) fp32, of the policy that sampled
    kl: Tensor  # (M,) fp32, to the reference, of the configured kind


@dataclass(frozen=True)
class Experience(Measured):
    """The input of learning in PPO."""

    rewards: Tensor  # (M,) fp32, the shaped score on the last token, and the KL penalty on each token
    values: Tensor | None  # (M,) fp32; None without a critic
    advantages: Tensor  # (M,) fp32, whitened if so configured
    returns: Tensor | None  # (M,) fp32, before whitening; None without a critic
    advantage_std: float = math.nan  # before whitening, over the M tokens


def concatenate(rollouts: Sequence[Rollout]) -> Rollout:
    """Rollouts of several ranks, end to end."""
    packed = end_to_end([r.packed for r in rollouts])
    return Rollout(
        packed, *(torch.cat([getattr(r, name) for r in rollouts]) for name in ("logprobs", "ended", "sources"))
    )


def end_to_end(parts: Sequence[Packed]) -> Packed:
    return Packed(
        torch.cat([part.tokens for part in parts]),
        cumulative(torch.cat([part.lengths for part in parts])),
        cumulative(torch.cat([part.response_lengths for part in parts])),
    )


def cumulative(lengths: Tensor) -> Tensor:
    """(B,) lengths -> (B+1,) int32 starts, from 0 to the total."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def written_starts(mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Where each segment starts once the tokens that mask, (M,) bool, leaves out are gone: (B+1,) int32."""
    return torch.nn.functional.pad(mask.cumsum(0), (1, 0))[cu_seqlens.long()].to(torch.int32)


def spread(x: Tensor, mask: Tensor) -> Tensor:
    """Numbers of the tokens of a mask back to their places, (M,); 0, or False, between them."""
    return x.new_zeros(len(mask)).masked_scatter(mask, x)


def segment_offsets(lengths: Tensor) -> Tensor:
    """(B,) lengths -> (sum,) int64: 0, 1, ... within each segment."""
    starts = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum()), device=lengths.device) - starts.repeat_interleave(lengths)


def segment_rows(cu_seqlens: Tensor, segments: Tensor) -> Tensor:
    """The rows of the given segments of a packed tensor, in the given order; int64."""
    starts = cu_seqlens[:-1].long()[segments]
    lengths = cu_seqlens.diff().long()[segments]
    return starts.repeat_interleave(lengths) + segment_offsets(lengths)


def pack(sequences: Sequence[Sequence[int]], response_lengths: Sequence[int]) -> Packed:
    """Lists of tokens (prompt and response) -> `Packed`, on the CPU."""
    lengths = torch.tensor([len(s) for s in sequences], dtype=torch.int64)
    tokens = torch.tensor([t for s in sequences for t in s], dtype=torch.int64)
    return Packed(tokens, cumulative(lengths), cumulative(torch.tensor(response_lengths, dtype=torch.int64)))


@dataclass(frozen=True)
class Update:
    """Metrics of the update by one minibatch: means over its tokens on all ranks; those of the policy are NaN during
    critic warm-up, those of the critic without one."""

    epoch: int
    policy_loss: float  # as `ppo.aggregate` has it
    entropy: float  # nats a token
    kl_loss: float  # the KL term of the loss before its coefficient, nats a token; 0 if the penalty is in the reward
    approx_kl: float  # k3 between the policy before and after, nats a token
    clip_fraction: float
    dual_clip_fraction: float
    ratio_mean: float
    ratio_max: float
    value_loss: float
    value_clip_fraction: float
    actor_grad_norm: float  # before clipping; of both if actor and critic share a backbone
    critic_grad_norm: float
    ptx_loss: float = 0.0  # of the PPO-ptx text, before its coefficient, nats a token; 0 without such text
    nll_loss: float = 0.0  # of good responses, before its coefficient, nats a token; 0 without `ppo.nll_coef`
    skipped: int = 0  # consecutive updates, up to this one, that were not applied: loss or gradient was not finite
    stopped: bool = False  # not applied, and the last of its batch: its approx_kl exceeds `health.kl_limit`
