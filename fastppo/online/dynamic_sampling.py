"""Dynamic sampling (DAPO; Yu et al., 2025, section 3.2): a step draws on until its batch can be learned from.

A group, the responses to one prompt, is informative if their scores differ: where all are equal, every response scores
as the group does, and an estimator that compares them learns nothing from the score. A score is that of the sources of
reward, weighted and summed in fp32, before `ppo` normalises, clips and penalises it: DAPO, too, filters by accuracy and
not by the reward with its length penalty. So what is informative depends on the group alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastppo.config import Config
from fastppo.data import Scored, concatenate


@dataclass(frozen=True)
class Drawn:
    """What a step has drawn with `sampling.until_informative`, over all ranks."""

    batches: int  # of prompts
    groups: int
    uninformative: int  # groups that were dropped since their scores are all equal
    surplus: int  # informative groups that were dropped since the batch was full
    filled: int  # uninformative groups that were kept since there were too few informative ones
    written: int  # tokens of all responses, the dropped ones included
    read: int  # tokens of all prompts and responses, the dropped ones included
    score: float  # mean over all responses, the dropped ones included

    def metrics(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """The counts, and speeds that include what was dropped. seconds: `time/PHASE` of the step's phases."""
        return {
            "batches_drawn": self.batches,
            "groups_drawn": self.groups,
            "groups_dropped_uninformative": self.uninformative,
            "groups_dropped_surplus": self.surplus,
            "groups_kept_uninformative": self.filled,
            "tokens_drawn": self.written,
            "score_drawn": self.score,
            "tokens_per_second": self.written / sum(seconds.values()),
            "tokens_per_second/sampling": self.written / seconds["time/sampling"],
            "tokens_per_second/feedback": self.read / seconds["time/feedback"],
        }


class Draws:
    """The scored batches that a step draws; they are global, so every rank decides the same.

    Without `sampling.until_informative` the first one is the step's batch. They are held in host memory: ids of tokens,
    and their logprobs.
    """

    def __init__(self, config: Config):
        sampling = config.sampling
        self._most = sampling.until_informative  # batches; None: one, whatever its scores
        self._samples = sampling.samples_per_prompt
        self._wanted = config.ppo.batch_size // self._samples  # groups in the step's batch
        self._informative = 0  # groups so far
        self._scored: list[Scored] = []

    @property
    def batches(self) -> int:
        """How many there are."""
        return len(self._scored)

    @property
    def done(self) -> bool:
        """Whether the step's batch is full, or no more may be drawn."""
        return self.batches == (self._most or 1) or self._informative >= self._wanted

    @property
    def end_scores(self) -> Tensor:
        """(B,) fp32, of all responses in the order drawn, those included that are not learned from."""
        return torch.cat([scored.end_scores for scored in self._scored])

    def add(self, scored: Scored) -> None:
        """scored: the responses to a batch of prompts, in their order."""
        self._scored.append(scored)
        if self._most is not None:
            self._informative += int(informative(scored.scores, self._samples).sum())

    def batch(self) -> tuple[Scored, Drawn | None]:
        """What the step learns from, in the order drawn: the first informative groups, filled up with the first others
        where there are too few. And what was drawn for it; None without `sampling.until_informative`."""
        if self._most is None:
            return self._scored[0], None
        everything = _end_to_end(self._scored)
        differs = informative(everything.scores, self._samples)
        first = torch.cat([differs.nonzero().flatten(), (~differs).nonzero().flatten()])[: self._wanted]
        groups = first.sort().values
        sequences = (groups[:, None] * self._samples + torch.arange(self._samples)).flatten()
        return everything.select(sequences), self._counts(everything, filled=int((~differs[groups]).sum()))

    def _counts(self, everything: Scored, filled: int) -> Drawn:
        groups, packed = self.batches * self._wanted, everything.rollout.packed
        return Drawn(
            batches=self.batches,
            groups=groups,
            uninformative=groups - self._informative - filled,
            surplus=max(self._informative - self._wanted, 0),
            filled=filled,
            written=len(everything.rollout.logprobs),
            read=len(packed.tokens),
            score=float(everything.scores.mean()),
        )


def informative(scores: Tensor, samples: int) -> Tensor:
    """(G,) bool, whether the scores of each group are not all equal. scores: (G * samples,) fp32, group by group."""
    groups = scores.view(-1, samples)
    return groups.amin(1) < groups.amax(1)


def _end_to_end(parts: Sequence[Scored]) -> Scored:
    rollout = concatenate([part.rollout for part in parts])
    by_source, scores, judged = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("by_source", "scores", "judged")
    )
    of_sources = [part.of_sources for part in parts if part.of_sources is not None]
    return Scored(rollout, by_source, scores, judged, torch.cat(of_sources) if of_sources else None)
