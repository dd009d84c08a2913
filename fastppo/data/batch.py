"""The types that the phases of a step pass on, all in the layout of `Packed`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastppo.data.packed import Packed, cumulative, end_to_end

if TYPE_CHECKING:
    from fastppo.data.conversations import Messages
    from fastppo.data.prompts import PromptSet


@dataclass(frozen=True)
class Begun:
    """A response that is to go on: the n tokens behind its prompt so far, of which the policy wrote m."""

    tokens: Tensor  # (n,) int64
    written: Tensor  # (n,) bool, True where the policy wrote
    logprobs: Tensor  # (m,) fp32, of the distributions that these were sampled from, perhaps those of several steps
    turn_rewards: Tensor | None = None  # (m,) fp32, as in `Rollout`
    conversation: Messages | None = None  # all that was said, without a turn that has not ended; None: no environment

    @property
    def unfinished(self) -> int:
        """The number of tokens at its end that belong to a turn that has not ended: those behind what was observed."""
        behind_observations = (~self.written).nonzero().flatten() + 1
        return len(self.tokens) - int(behind_observations[-1:].sum())


@dataclass(frozen=True)
class Prompts:
    """Prompts for which responses are sampled. A prompt with n responses occurs n times."""

    tokens: tuple[tuple[int, ...], ...]  # B prompts
    streams: Tensor  # (B,) int64, prompt index * n + sample index: selects the random numbers of a response
    sources: Tensor  # (B,) int64, the row of each prompt in its prompt set, for its text and columns
    data: PromptSet | None = field(default=None, repr=False, compare=False)  # that prompt set, for an environment
    # B responses that go on; None where one begins, and where all do. What is sampled contains them.
    begun: tuple[Begun | None, ...] | None = None
    # The most tokens that the policy writes on each: a response may then be left incomplete. None: all are completed.
    extend_by: int | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def of(
        tokens: Sequence[Sequence[int]],
        rows: Sequence[int],
        *,
        first: int = 0,
        samples: int = 1,
        data: PromptSet | None = None,
    ) -> Prompts:
        """The given rows of a prompt set, each `samples` times; first: prompt index of the first row."""
        repeated = [row for row in rows for _ in range(samples)]
        streams = torch.arange(len(repeated)) + first * samples
        sources = torch.tensor(repeated, dtype=torch.int64)
        return Prompts(tuple(tuple(tokens[row]) for row in repeated), streams, sources, data)

    def of_rank(self, rank: int, ranks: int) -> Prompts:
        """This rank's part; the parts of the ranks are contiguous and in the order of ranks."""
        return self.select(torch.arange(len(self)).tensor_split(ranks)[rank].tolist())

    def select(self, indices: Sequence[int]) -> Prompts:
        rows = torch.as_tensor(list(indices), dtype=torch.int64)
        return replace(
            self,
            tokens=tuple(self.tokens[i] for i in indices),
            streams=self.streams[rows],
            sources=self.sources[rows],
            begun=None if self.begun is None else tuple(self.begun[i] for i in indices),
        )

    @property
    def tokens_so_far(self) -> tuple[tuple[int, ...], ...]:
        """Of each prompt its tokens and those of its response so far."""
        if self.begun is None:
            return self.tokens
        behind = (() if begun is None else begun.tokens.tolist() for begun in self.begun)
        return tuple((*prompt, *response) for prompt, response in zip(self.tokens, behind, strict=True))


@dataclass(frozen=True)
class Rollout:
    """The result of sampling."""

    packed: Packed
    logprobs: Tensor  # (M,) fp32, of the distribution that each token was sampled from
    ended: Tensor  # (B,) bool, False where the response was cut: at the maximum length, or by a limit of turns
    sources: Tensor  # (B,) int64, the row of each prompt in its prompt set
    turn_rewards: Tensor | None = None  # (M,) fp32, of an environment, on the last token of a turn; None without one
    conversations: tuple[Messages, ...] | None = None  # B, prompt and all that was said; None without an environment
    complete: Tensor | None = None  # (B,) bool, False where a response is to go on; None: all are complete

    def select(self, sequences: Tensor) -> Rollout:
        """The given responses (an int64 tensor of indices), in the given order."""
        of_tokens = (self.logprobs, self.turn_rewards)
        logprobs, rewards = (None if x is None else self.packed.select_tokens(x, sequences) for x in of_tokens)
        assert logprobs is not None
        said = self.conversations and tuple(self.conversations[i] for i in sequences.tolist())
        rows = (self.ended[sequences], self.sources[sequences])
        complete = None if self.complete is None else self.complete[sequences]
        return Rollout(self.packed.select(sequences), logprobs, *rows, rewards, said, complete)

    def begun(self) -> list[Begun]:
        """Each response as it is gone on with, in memory of its own."""
        packed, found = self.packed, []
        ends, firsts = packed.cu_seqlens[1:].tolist(), (packed.cu_seqlens[:-1] + packed.prompt_lengths).tolist()
        for i, behind in enumerate(map(slice, firsts, ends)):
            own = slice(*packed.response_cu_seqlens[i : i + 2].tolist())
            found.append(
                Begun(
                    packed.tokens[behind].clone(),
                    packed.written[behind].clone(),
                    self.logprobs[own].clone(),
                    None if self.turn_rewards is None else self.turn_rewards[own].clone(),
                    None if self.conversations is None else self.conversations[i],
                )
            )
        return found

    @property
    def rewards_of_turns(self) -> Tensor:  # (B,) fp64, the sum of a response's turn rewards; 0 without an environment
        sums = torch.zeros(len(self.packed), dtype=torch.float64)
        if self.turn_rewards is None:
            return sums
        response = torch.arange(len(sums)).repeat_interleave(self.packed.response_lengths)
        return sums.index_add(0, response, self.turn_rewards.double())


def rewards_by_turn(packed: Packed, turn_rewards: Tensor) -> list[list[float]]:
    """The rewards of each response's turns, a number a turn; turn_rewards (M,) fp32, as in `Rollout`."""
    ends = packed.turn_lengths.cumsum(0) - 1
    return [part.tolist() for part in turn_rewards[ends].split(packed.turn_counts.tolist())] if len(packed) else []


def responses_of(prompts: Prompts, ended: Tensor) -> Rollout:
    """Responses that have all begun as what was sampled, complete ones; ended: (B,) bool, as in `Rollout`."""
    begun = [one for one in prompts.begun or () if one is not None]
    heads = [torch.tensor(tokens, dtype=torch.int64) for tokens in prompts.tokens]
    parts = list(zip(heads, begun, strict=True))
    rewards = [one.turn_rewards for one in begun if one.turn_rewards is not None]
    said = [one.conversation for one in begun if one.conversation is not None]
    lengths = torch.tensor([len(head) + len(one.tokens) for head, one in parts], dtype=torch.int64)
    masks = [x for head, one in parts for x in (torch.zeros(len(head), dtype=torch.bool), one.written)]
    packed = Packed(
        torch.cat([x for head, one in parts for x in (head, one.tokens)]),
        cumulative(lengths),
        cumulative(torch.tensor([len(one.logprobs) for one in begun], dtype=torch.int64)),
        torch.cat(masks) if said else None,
    )
    logprobs = torch.cat([one.logprobs for one in begun])
    of_turns = (torch.cat(rewards), tuple(said)) if said else (None, None)
    return Rollout(packed, logprobs, ended, prompts.sources, *of_turns)


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
    by_source: Tensor  # (B, S) fp32, the score of each reward source; with an environment the last is its turns' sum
    scores: Tensor  # (B,) fp32, their weighted sum
    judged: Tensor  # (B,) fp32, the score of the held-out judge; NaN without a judge
    of_sources: Tensor | None = None  # (B,) fp32, `scores` without the environment's part; None without an environment

    @property
    def end_scores(self) -> Tensor:
        """(B,) fp32, what a response scores at its end: all but the rewards that an environment gave to its turns."""
        return self.scores if self.of_sources is None else self.of_sources

    def select(self, sequences: Tensor) -> Scored:
        """The given responses (an int64 tensor of indices), in the given order."""
        rows = (self.by_source[sequences], self.scores[sequences], self.judged[sequences])
        of_sources = None if self.of_sources is None else self.of_sources[sequences]
        return Scored(self.rollout.select(sequences), *rows, of_sources)


@dataclass(frozen=True)
class Measured:
    """Scored responses, and what actor and reference say of each token; the global batch, the same on every rank."""

    packed: Packed
    scores: Tensor  # (B,) fp32, as in `Scored`
    by_source: Tensor  # (B, S) fp32, as in `Scored`
    judged: Tensor  # (B,) fp32, the score of the held-out judge, not used in learning; NaN without a judge
    ended: Tensor  # (B,) bool
    sampler_logprobs: Tensor  # (M,) fp32
    old_logprobs: Tensor  # (M,) fp32, of the trainer's own forward pass before the first update
    ref_logprobs: Tensor  # (M,) fp32
    entropy: Tensor  # (M,) fp32, of the policy that sampled
    kl: Tensor  # (M,) fp32, to the reference, of the configured kind
    turn_rewards: Tensor | None = field(default=None, kw_only=True)  # (M,) fp32, as in `Rollout`


@dataclass(frozen=True)
class Experience(Measured):
    """The input of learning in PPO."""

    rewards: Tensor  # (M,) fp32, the shaped score on the last token, those of turns, the KL penalty on each token
    values: Tensor | None  # (M,) fp32; None without a critic
    advantages: Tensor  # (M,) fp32, whitened if so configured
    returns: Tensor | None  # (M,) fp32, before whitening; None without a critic
    advantage_std: float = math.nan  # before whitening, over the M tokens


def concatenate(rollouts: Sequence[Rollout]) -> Rollout:
    """Rollouts of several ranks, end to end; all of them are with an environment, or none."""
    packed = end_to_end([r.packed for r in rollouts])
    logprobs, ended, sources = (
        torch.cat([getattr(r, name) for r in rollouts]) for name in ("logprobs", "ended", "sources")
    )
    rewards = [r.turn_rewards for r in rollouts if r.turn_rewards is not None]
    said = [r.conversations for r in rollouts if r.conversations is not None]
    complete = [r.complete for r in rollouts if r.complete is not None]
    return Rollout(
        packed,
        logprobs,
        ended,
        sources,
        torch.cat(rewards) if rewards else None,
        tuple(conversation for part in said for conversation in part) if said else None,
        torch.cat(complete) if complete else None,
    )


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
    nll_loss: float = 0.0  # of good responses, before its coefficient, nats a token; 0 where there are none
    skipped: int = 0  # consecutive updates, up to this one, that were not applied: loss or gradient was not finite
    stopped: bool = False  # not applied, and the last of its batch: its approx_kl exceeds `health.kl_limit`
