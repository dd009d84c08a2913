"""Which responses of a Grow an Improve learns from: pure functions of their scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastppo.config import ImproveConfig, RestConfig
from fastppo.data import Measured
from fastppo.errors import FastPPOError


class RestError(FastPPOError):
    """A ReST run that cannot go on. The message gives the numbers and the way out."""


@dataclass(frozen=True)
class Selection:
    """The responses that an Improve learns from."""

    rows: Tensor  # (K,) int64, rising
    threshold: float  # the score that they reach, or (value) are above; NaN where each prompt's best is taken
    prompts: int  # that have at least one of them


def prompts_of_equal_scores(scores: Tensor, groups: Tensor) -> int:
    """How many prompts with several responses have the same score for all: nothing tells their responses apart.

    scores (B,) fp32; groups (B,) int64, the prompt of each response, from 0 on.
    """
    lowest, highest, sizes = _extremes(scores, groups)
    return int(((lowest == highest) & (sizes > 1)).sum())


def prompt_groups(grown: Measured, config: RestConfig) -> Tensor:
    """The prompt of each response of a Grow, (B,) int64 from 0 on: the samples of a prompt follow each other."""
    return torch.arange(len(grown.packed)) // config.sampling.samples_per_prompt


def select(grown: Measured, level: float | None, config: RestConfig) -> Selection:
    """The responses of a Grow for one Improve, as `select_by_score` finds them."""
    return select_by_score(grown.scores, prompt_groups(grown, config), level, config.improve)


def select_by_score(scores: Tensor, groups: Tensor, level: float | None, config: ImproveConfig) -> Selection:
    """The responses of a Grow for one Improve.

    scores (B,) fp32, of the whole Grow; groups (B,) int64, the prompt of each response, from 0 on; level: as in
    `ImproveConfig.levels`. Of responses to a prompt that tie the first counts. Raises RestError if there are none.
    """
    if level is None:
        chosen, threshold = _best(scores, groups), math.nan
    elif config.keep == "quantile":
        place = math.ceil(level * (len(scores) - 1) - 1e-9)
        threshold = float(scores.sort().values[place])
        chosen = scores >= threshold
    else:
        threshold = level
        chosen = scores.double() > level
    if config.max_per_prompt is not None:
        chosen &= _ranks(scores, groups) < config.max_per_prompt
    rows = chosen.nonzero().flatten()
    if not len(rows):
        raise RestError(_why_empty(scores, groups, level))
    return Selection(rows, threshold, len(groups[rows].unique()))


def _best(scores: Tensor, groups: Tensor) -> Tensor:
    """(B,) bool: the first of the best to each prompt; none to a prompt whose scores are all equal."""
    lowest, highest, _ = _extremes(scores, groups)
    return (_ranks(scores, groups) == 0) & (lowest < highest)[groups]


def _ranks(scores: Tensor, groups: Tensor) -> Tensor:
    """(B,) int64: 0 for the best response to a prompt, 1 for the next; those that tie in their order."""
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(groups[order], stable=True)]  # prompt by prompt, the best first
    sizes = torch.bincount(groups)
    firsts = (sizes.cumsum(0) - sizes)[groups[order]]
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order)) - firsts
    return ranks


def _extremes(scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lowest and highest score of each prompt, and how many responses it has; (P,) each."""
    count = int(groups.max()) + 1
    lowest = torch.full((count,), math.inf).scatter_reduce(0, groups, scores, "amin")
    highest = torch.full((count,), -math.inf).scatter_reduce(0, groups, scores, "amax")
    return lowest, highest, torch.bincount(groups, minlength=count)


def _why_empty(scores: Tensor, groups: Tensor, level: float | None) -> str:
    if level is None:
        return (
            f"improve.keep is best, but all of the {int(groups.max()) + 1} prompts of this Grow have the same score for"
            " each of their responses, so that nothing can be learned from them. Raise sampling.samples_per_prompt or"
            " sampling.temperature, or use a reward that tells responses apart."
        )
    return (
        f"improve.thresholds has {level:g}, but none of the {len(scores)} responses of this Grow scores above it: the"
        f" highest score is {float(scores.max()):g}, the mean {float(scores.mean()):g}. Lower the threshold, draw more"
        " responses (sampling.samples_per_prompt), or use --improve.keep quantile. The responses and their scores are"
        " in the run's folder, in grows."
    )
