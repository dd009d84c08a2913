"""DPO: a policy learns from preference pairs against a reference, and its evaluation on held-out pairs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastppo.config import DPOConfig
from fastppo.data import Examples, Packed
from fastppo.distributed import World, to_device
from fastppo.models import PrefixStates
from fastppo.offline.dpo_losses import dpo_loss, ipo_loss, loss_at_start, nll_term
from fastppo.offline.model import TrainedModel
from fastppo.offline.preference import rightness, wilson_interval
from fastppo.offline.reference import answer_logprobs, heldout_logprobs
from fastppo.offline.updates import Objective, Watched

log = logging.getLogger("fastppo")

DPO_STATISTICS = (
    *("loss", "accuracy", "reward_chosen", "reward_rejected", "margin"),
    *("kl", "logprob_chosen", "logprob_chosen_change"),
)
TOLERANCE = 1e-6  # of the mean loss before the first update


@dataclass(frozen=True)
class PairFigures:
    """Each pair under the policy and the reference, all (P,) fp64."""

    losses: Tensor  # without the NLL term
    rewards: Tensor  # (P, 2), implicit, of chosen and rejected: beta times the log ratio that the loss reads
    logratios: Tensor  # (P, 2), ln(policy/reference), nats an answer
    chosen: Tensor  # mean logprob of the chosen answer, nats a token ...
    chosen_change: Tensor  # ... minus the reference's

    @property
    def margins(self) -> Tensor:
        return self.rewards[:, 0] - self.rewards[:, 1]

    def statistics(self) -> Tensor:
        """Sums over pairs, in the order of `DPO_STATISTICS`.

        The KL is estimated from the log ratios as that from the reference to the policy, so it is one only where the
        answers were drawn from the reference; of other answers it says how far the policy is from it on them.
        """
        parts = [self.losses, rightness(self.margins), self.rewards[:, 0], self.rewards[:, 1], self.margins]
        parts += [-self.logratios.mean(1), self.chosen, self.chosen_change]
        return torch.stack([part.sum() for part in parts])


def pair_figures(policy: Tensor, reference: Tensor, lengths: Tensor, config: DPOConfig) -> PairFigures:
    """policy, reference: summed logprobs of chosen and rejected, (P, 2) fp64; lengths: tokens of these, (P, 2)."""
    means, reference_means = policy / lengths, reference / lengths
    read = (policy - reference) if config.loss == "dpo" else (means - reference_means)
    margins = read[:, 0] - read[:, 1]
    if config.loss == "dpo":
        losses = dpo_loss(margins, config.beta, config.label_smoothing)
    else:
        losses = ipo_loss(margins, config.beta)
    change = means[:, 0] - reference_means[:, 0]
    return PairFigures(losses, config.beta * read, policy - reference, means[:, 0], change)


def direct_preference(config: DPOConfig, reference: Tensor) -> Objective:
    """The loss of a microbatch of pairs, and sums of `DPO_STATISTICS` over them.

    reference: summed logprobs of the examples' answers, (E, 2) fp64 on the CPU.
    """

    def objective(
        policy: Any, hidden: Tensor, *, packed: Packed, examples: Examples, part: Tensor
    ) -> tuple[Tensor, Tensor]:
        sums, lengths = answer_logprobs(policy, hidden, packed).view(-1, 2), packed.response_lengths.view(-1, 2)
        figures = pair_figures(sums, to_device(reference[part], sums.device), lengths, config)
        losses = figures.losses + config.nll_coef * nll_term(figures.chosen)
        return losses.sum().float(), figures.statistics().detach()

    return objective


@dataclass(frozen=True)
class DPOEvaluation:
    """A policy on held-out pairs."""

    means: dict[str, float]  # of `DPO_STATISTICS`
    pairs: int

    @property
    def loss(self) -> float:
        return self.means["loss"]

    def metrics(self) -> dict[str, float]:
        low, high = wilson_interval(self.means["accuracy"], self.pairs)
        return self.means | {"accuracy_low": low, "accuracy_high": high}


def evaluation_against(
    reference: Tensor,
) -> Callable[[TrainedModel, Examples, PrefixStates, DPOConfig, World], DPOEvaluation]:
    """reference: summed logprobs of the held-out answers, (E, 2) fp64."""

    def evaluate(
        trained: TrainedModel, pairs: Examples, prefix: PrefixStates, config: DPOConfig, world: World
    ) -> DPOEvaluation:
        found = heldout_logprobs(trained, pairs, prefix, config, world)
        figures = pair_figures(found, reference, pairs.packed.response_lengths.view(-1, 2), config)
        means = (figures.statistics() / len(pairs)).tolist()
        return DPOEvaluation(dict(zip(DPO_STATISTICS, means, strict=True)), len(pairs))

    return evaluate


def watching_chosen(config: DPOConfig, world: World) -> Callable[[int, Mapping[str, float]], list[Watched]]:
    """What looks at the means of each update: whether the first one began at the reference, and, as a figure with an
    alarm, whether the chosen answers have become much less likely."""

    def watch(step: int, means: Mapping[str, float]) -> list[Watched]:
        if step == 1 and world.rank == 0:
            _check_start(means, config)
        if config.chosen_fall is None:
            return []
        change = means["logprob_chosen_change"]
        message = (
            f"the chosen answers' mean logprob has fallen by {-change:.2f} nats a token (to"
            f" {means['logprob_chosen']:.2f}), more than chosen_fall {config.chosen_fall:g}: the policy learns to"
            " prefer them while both answers become unlikely, and may sample neither. Raise nll_coef"
            f" ({config.nll_coef:g}) or beta ({config.beta:g}), lower model.lr ({config.model.lr:g}), or train for"
            " fewer steps."
        )
        return [Watched("logprob_chosen_change", change, -config.chosen_fall, message)]

    return watch


def _check_start(means: Mapping[str, float], config: DPOConfig) -> None:
    """Before the first update the policy is the reference, so every log ratio is 0; unless that is another model."""
    if config.frozen_model is not None:
        log.info(
            "the reference is another model (reference.model = %s), so margins need not be 0 before the first update:"
            " the mean margin is %.4g and the mean loss %.4g",
            *(config.frozen_model.model, means["margin"], means["loss"]),
        )
        return
    expected, off = loss_at_start(config.loss, config.beta), max(abs(means["reward_chosen"]), abs(means["margin"]))
    if off == 0 and abs(means["loss"] - expected) <= TOLERANCE * max(expected, 1.0):
        log.info("before the first update every margin is 0, and the mean loss %.6f", means["loss"])
        return
    log.warning(
        "before the first update the mean loss is %.9f and should be %.9f, and the mean margin %.3g and should be 0:"
        " the policy has other logprobs than the reference, which are the same weights. A batch_size (%d) above the"
        " number of pairs has some twice, in two microbatches; otherwise passes on this device are not deterministic.",
        *(means["loss"], expected, means["margin"], config.batch_size),
    )
