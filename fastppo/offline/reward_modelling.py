"""Reward modelling: the Bradley-Terry objective, a reward model's evaluation on pairs, and how sure it is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastppo.config import RewardTrainingConfig
from fastppo.data import Examples, Packed
from fastppo.distributed import World, gather_groups, stop, sum_groups, to_device
from fastppo.models import PrefixStates, all_rows, width_of
from fastppo.offline.heldout import heldout_microbatches
from fastppo.offline.model import TrainedModel
from fastppo.offline.preference import (
    Centring,
    accuracy,
    bootstrap_interval,
    calibration_error,
    centring_loss,
    preference_loss,
    reliability,
    rightness,
    wilson_interval,
)
from fastppo.offline.updates import Objective


def bradley_terry(config: RewardTrainingConfig) -> Objective:
    """The loss of a microbatch of pairs, and sums over them: loss, how many are right, scores of both."""

    def objective(
        reward_model: Any, hidden: Tensor, *, packed: Packed, examples: Examples, part: Tensor
    ) -> tuple[Tensor, Tensor]:
        chosen, rejected = reward_model.head(hidden).view(-1, 2).unbind(1)
        losses = preference_loss(chosen, rejected, to_device(examples.margins[part], hidden.device) + config.margin)
        loss = losses + config.centre_coef * centring_loss(chosen, rejected)
        right = rightness(chosen - rejected)
        return loss.sum(), torch.stack([losses.sum(), right.sum(), chosen.sum(), rejected.sum()])

    return objective


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


@torch.no_grad()
def evaluate_pairs(
    trained: TrainedModel, pairs: Examples, prefix: PrefixStates, config: RewardTrainingConfig, world: World
) -> PairEvaluation:
    """Scores of both answers of each pair, the same on every rank, and what centres them on `config.centre`."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []  # sequences, scores, hidden states of this rank's group
    with stop.together(world):
        for part in heldout_microbatches(pairs, config, world):
            packed, prefix_states = trained.select(pairs, part, prefix)
            scores, hidden = trained.engine(
                packed, lambda role, hidden: (role.head(hidden), all_rows(hidden)), prefix_states
            )
            sequences = pairs.sequences(part)
            seen.append((sequences, *(x.double().cpu()[: len(sequences)] for x in (scores, hidden))))
    width = width_of(trained.role.model)
    totals = torch.zeros(width + 2, dtype=torch.float64)  # sum of hidden states, of scores, count
    for sequences, scores, hidden in seen:
        counted = (sequences % 2 == 0) if config.centre == "chosen" else torch.ones_like(sequences, dtype=torch.bool)
        totals[:width] += hidden[counted].sum(0)
        totals[width] += scores[counted].sum()
        totals[width + 1] += counted.sum()
    means = sum_groups(totals, world).cpu()
    centring = None
    if config.centre != "off":
        centring = Centring(means[:width] / means[-1], float(means[width] / means[-1]))
    mine = [(s, score if centring is None else centring.scores(score, hidden)) for s, score, hidden in seen]
    scores = torch.zeros(len(pairs.packed), dtype=torch.float64)
    for sequences, part_scores in (part for parts in gather_groups(mine, world) for part in parts):
        scores[sequences] = part_scores
    chosen, rejected = scores.view(-1, 2).unbind(1)
    return PairEvaluation(chosen, rejected, pairs.margins + config.margin, centring)


def write_reliability(path: Path, evaluation: PairEvaluation) -> None:
    """Predicted against observed, one JSON object a bin, with the field names of `preference.Bin`."""
    rows = [{k: None if v != v else v for k, v in asdict(row).items()} for row in reliability(evaluation.gaps)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
