"""Reward modelling as pure functions: the Bradley-Terry loss, how right and how sure its scores are, and their mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 10  # of probability, from 0.5 to 1
CONFIDENCE = 0.95
Z = 1.959964  # its quantile of the normal distribution, two-sided


def preference_loss(chosen: Tensor, rejected: Tensor, margins: Tensor) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected - margin) of each pair (Bradley and Terry, 1952; Touvron et al., 2023, eq. 2).

    All (P,) fp32 -> (P,) fp32, nats.
    """
    return -F.logsigmoid(chosen - rejected - margins)


def centring_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(r_chosen + r_rejected)^2 of each pair: the loss above leaves their sum free (Eisenstein et al., 2023, eq. 4).

    (P,) fp32 -> (P,) fp32.
    """
    return (chosen + rejected).square()


@dataclass(frozen=True)
class Centring:
    """What takes the mean off the scores of a linear head without a bias, as sequence classifiers have it.

    With m the mean hidden state of the reference responses, the head's component along m is what gives them their mean
    score: w - (w.m / |m|^2) m scores 0 on average. Differences of scores change by w.m (h - h').m / |m|^2, which is
    little where w.m is, and `centring_loss` holds it small.
    """

    mean_hidden: Tensor  # (H,) fp64
    mean_score: float

    @property
    def shift(self) -> Tensor:
        """(H,) fp64, to be subtracted from the head's weights."""
        return self.mean_score / self.mean_hidden.square().sum().clamp(min=1e-12) * self.mean_hidden

    def weight(self, weight: Tensor) -> Tensor:
        """The head's weight (1, H), centred, in its own dtype."""
        return (weight.double() - self.shift.to(weight.device)).to(weight.dtype)

    def scores(self, scores: Tensor, hidden: Tensor) -> Tensor:
        """Scores (R,) of hidden states (R, H) as the head gives them once it is centred; fp64."""
        return scores.double() - hidden.double() @ self.shift


def rightness(gaps: Tensor) -> Tensor:
    """1 for a pair whose chosen answer scores higher, 0 for one whose rejected does; a tie is half right.

    gaps (P,): chosen - rejected -> (P,) in their dtype.
    """
    return (gaps.sign() + 1) / 2


def accuracy(gaps: Tensor) -> float:
    """The share of pairs that are right. gaps (P,)."""
    return float(rightness(gaps.double()).mean())


def wilson_interval(share: float, count: int, z: float = Z) -> tuple[float, float]:
    """Where the true share lies, with 95% confidence, if `share` of `count` was seen (Wilson, 1927); within [0, 1]."""
    if count == 0:
        return 0.0, 1.0
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max((middle - spread) / scale, 0.0), min((middle + spread) / scale, 1.0)


@dataclass(frozen=True)
class Bin:
    """The pairs of which the model is about as sure, and how often it is right about them."""

    low: float  # from this probability ...
    high: float  # ... to this
    pairs: int
    predicted: float  # mean probability; NaN without pairs, as `observed`
    observed: float  # share that is right
    observed_low: float  # its 95% interval
    observed_high: float


def reliability(gaps: Tensor, bins: int = BINS) -> list[Bin]:
    """Predicted against observed, by how sure the model is: p = sigmoid(|chosen - rejected|). gaps (P,)."""
    sure, right, which = _sorted_into_bins(gaps, bins)
    rows = []
    for number in range(bins):
        inside = which == number
        count = int(inside.sum())
        predicted, observed = (float(x[inside].mean()) if count else math.nan for x in (sure, right))
        low, high = wilson_interval(observed, count)
        edges = (0.5 + 0.5 * number / bins, 0.5 + 0.5 * (number + 1) / bins)
        rows.append(Bin(*edges, count, predicted, observed, low, high))
    return rows


def calibration_error(gaps: Tensor, bins: int = BINS) -> float:
    """|predicted - observed|, averaged over pairs by bin (Naeini et al., 2015, ECE); 0 is perfect. gaps (P,)."""
    sure, right, which = _sorted_into_bins(gaps, bins)
    off = torch.zeros(bins, dtype=torch.float64).index_add(0, which, sure - right)
    return float(off.abs().sum()) / max(len(gaps), 1)


def bootstrap_interval(
    gaps: Tensor, statistic: Callable[[Tensor], float], repeats: int = 500, seed: int = 0
) -> tuple[float, float]:
    """The 95% percentile interval of a statistic over resampled pairs (Efron, 1979). gaps (P,)."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(gaps), (repeats, len(gaps)), generator=generator)
    values = torch.tensor([statistic(gaps[draw]) for draw in draws], dtype=torch.float64)
    tail = (1 - CONFIDENCE) / 2
    return float(values.quantile(tail)), float(values.quantile(1 - tail))


def _sorted_into_bins(gaps: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each pair's probability, whether it is right, both fp64, and its bin, int64; all (P,)."""
    sure = torch.sigmoid(gaps.double().abs())
    return sure, rightness(gaps.double()), ((sure - 0.5) * 2 * bins).long().clamp(max=bins - 1)
