"""Evaluation of the stages before PPO, on examples that are held out of training."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastppo import ops
from fastppo.config import RewardTrainingConfig, SFTConfig
from fastppo.data import Examples, pack_even
from fastppo.distributed import World, all_gather, all_sum, even_passes, stop
from fastppo.models import PrefixStates, width_of
from fastppo.offline.model import Learner
from fastppo.offline.preference import (
    Centring,
    accuracy,
    bootstrap_interval,
    calibration_error,
    preference_loss,
    reliability,
    wilson_interval,
)
from fastppo.ops import TokenStats


@dataclass(frozen=True)
class PairEvaluation:
    """A reward model on pairs, once its scores are centred."""

    chosen: Tensor  # (P,) fp64 scores, in the order of the pairs
    rejected: Tensor  # (P,) fp64
    margins: Tensor  # (P,) fp32, of the loss
    centring: Centring | None  # what has been subtracted, and is to be in an export

    @property
    def gaps(self) -> Tensor:  # (P,)
        return self.chosen - self.rejected

    @property
    def tells_nothing_apart(self) -> bool:
        """Whether all answers score the same."""
        scores = torch.cat([self.chosen, self.rejected])
        return bool((scores == scores[0]).all())

    @property
    def loss(self) -> float:
        return float(preference_loss(self.chosen, self.rejected, self.margins).mean())

    def metrics(self) -> dict[str, float]:
        gaps, right = self.gaps, accuracy(self.gaps)
        low, high = wilson_interval(right, len(gaps))
        off_low, off_high = bootstrap_interval(gaps, calibration_error)
        return {
            "loss": self.loss,
            "accuracy": right,
            "accuracy_low": low,
            "accuracy_high": high,
            "calibration_error": calibration_error(gaps),
            "calibration_error_low": off_low,
            "calibration_error_high": off_high,
            "score_chosen": float(self.chosen.mean()),
            "score_rejected": float(self.rejected.mean()),
            "score_std": float(torch.cat([self.chosen, self.rejected]).std(correction=0)),
        }


@dataclass(frozen=True)
class AnswerEvaluation:
    """A language model on responses."""

    loss: float  # nats a response token
    tokens: float  # of responses

    def metrics(self) -> dict[str, float]:
        return {"loss": self.loss, "perplexity": math.exp(min(self.loss, 700.0)), "tokens": self.tokens}


@torch.no_grad()
def evaluate_pairs(
    learner: Learner, pairs: Examples, prefix: PrefixStates, config: RewardTrainingConfig, world: World
) -> PairEvaluation:
    """Scores of both answers of each pair, the same on every rank, and what centres them on `config.centre`."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []  # sequences, scores, hidden states of this rank
    with stop.together(world):
        for part in _share(pairs, config, world):
            packed, prefix_states = learner.select(pairs, part, prefix)
            scores, hidden = learner.engine(packed, lambda role, hidden: (role.head(hidden), hidden), prefix_states)
            sequences = pairs.sequences(part)
            seen.append((sequences, *(x.double().cpu()[: len(sequences)] for x in (scores, hidden))))
    width = width_of(learner.model.model)
    totals = torch.zeros(width + 2, dtype=torch.float64)  # sum of hidden states, of scores, count
    for sequences, scores, hidden in seen:
        counted = (sequences % 2 == 0) if config.centre == "chosen" else torch.ones_like(sequences, dtype=torch.bool)
        totals[:width] += hidden[counted].sum(0)
        totals[width] += scores[counted].sum()
        totals[width + 1] += counted.sum()
    means = all_sum(totals, world).cpu()
    centring = None
    if config.centre != "off":
        centring = Centring(means[:width] / means[-1], float(means[width] / means[-1]))
    mine = [(s, score if centring is None else centring.scores(score, hidden)) for s, score, hidden in seen]
    scores = torch.zeros(len(pairs.packed), dtype=torch.float64)
    for sequences, part_scores in (part for parts in all_gather(mine, world) for part in parts):
        scores[sequences] = part_scores
    chosen, rejected = scores.view(-1, 2).unbind(1)
    return PairEvaluation(chosen, rejected, pairs.margins + config.margin, centring)


@torch.no_grad()
def evaluate_answers(
    learner: Learner, answers: Examples, prefix: PrefixStates, config: SFTConfig, world: World
) -> AnswerEvaluation:
    """Over all response tokens."""
    total = torch.zeros(2, dtype=torch.float64)
    with stop.together(world):
        for part in _share(answers, config, world):
            packed, prefix_states = learner.select(answers, part, prefix)
            found = learner.engine(packed, partial(response_logprobs, targets=packed.responses), prefix_states)
            found = found[: int(answers.response_lengths[part].sum())]
            total += torch.tensor([-float(found.double().sum()), len(found)], dtype=torch.float64)
    negative, tokens = all_sum(total, world).tolist()
    return AnswerEvaluation(negative / tokens, tokens)


def response_logprobs(role: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Of each response token, under a policy; hidden (M, H), targets (M,) int64 -> (M,) fp32."""
    stats: TokenStats = role.head(hidden, ops.linear_logprobs, targets)
    return stats.logprobs


def write_reliability(path: Path, evaluation: PairEvaluation) -> None:
    """Predicted against observed, one JSON object a bin, with the field names of `preference.Bin`."""
    rows = [{k: None if v != v else v for k, v in asdict(row).items()} for row in reliability(evaluation.gaps)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _share(examples: Examples, config: RewardTrainingConfig | SFTConfig, world: World) -> Iterator[Tensor]:
    """This rank's microbatches of all examples, each example on one rank; at ZeRO stage 3 each rank has as many."""
    everything = pack_even(torch.arange(len(examples)), examples.lengths, config.microbatch_tokens, ranks=1)
    for part in even_passes(everything[world.rank :: world.ranks], config.zero, world):
        if config.zero.stage == 3:  # no rank may leave another alone in a pass
            stop.check(world)
        else:
            stop.check_alone()
        yield part
