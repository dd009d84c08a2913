"""Settings of the health figures, the judge and the alarms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fastppo.config.rewards import RewardConfig

FigureName = Literal[
    "entropy",
    "distinct_1",
    "distinct_2",
    "distinct_3",
    "self_bleu",
    "repetition",
    "duplicates",
    "length_spread",
    "kl_token",
    "kl_sequence",
    "kl_exact",
    "kl_exact_sequence",
    "perplexity",
    "judge",
    "judge_gap",
    "judge_turn",
    "length_correlation",
    "rewarded_phrase",
    "approx_kl",
    "sampler_error",
    "sampler_kl",
    "effective_samples",
]
Action = Literal["warn", "raise_kl", "stop_epoch", "roll_back", "stop"]


class Figure(NamedTuple):
    """How a figure is compared with a level."""

    worse: Literal["lower", "higher", "either"]
    level_is: Literal["times start", "from start", "deviations from start", "value"]
    warn: float  # the level of the default warning

    def threshold(self, level: float, start: float, spread: float) -> float:
        """Convert a level to the figure's unit. start: the figure's mean in the first steps; spread: the standard
        deviation there."""
        if self.level_is == "value":
            return level
        if self.level_is == "times start":
            return level * start
        distance = level if self.worse == "higher" else -level
        return start + distance * (spread if self.level_is == "deviations from start" else 1.0)


QUIET_STEPS = 10  # steps before the same alarm is raised again

# The quickstart must stay within all of these levels, which bench/quickstart_seeds.py checks. Its batches are small, 32
# responses of 20 tokens, so that its figures are among the noisiest.
FIGURES: dict[FigureName, Figure] = {
    "entropy": Figure("lower", "times start", 0.5),
    "distinct_1": Figure("lower", "times start", 0.6),
    "distinct_2": Figure("lower", "times start", 0.7),
    "distinct_3": Figure("lower", "times start", 0.75),
    "self_bleu": Figure("higher", "from start", 0.3),
    "repetition": Figure("higher", "from start", 0.2),
    "duplicates": Figure("higher", "from start", 0.2),
    "length_spread": Figure("lower", "from start", 0.25),
    "kl_token": Figure("higher", "value", 1.0),
    "kl_sequence": Figure("higher", "value", 100.0),
    "kl_exact": Figure("higher", "value", 1.0),
    "kl_exact_sequence": Figure("higher", "value", 100.0),
    "perplexity": Figure("higher", "times start", 2.0),
    "judge": Figure("lower", "deviations from start", 0.75),
    "judge_gap": Figure("higher", "value", 2.0),
    "judge_turn": Figure("higher", "value", 2.6),
    "length_correlation": Figure("either", "value", 0.7),
    "rewarded_phrase": Figure("higher", "value", 0.4),
    "approx_kl": Figure("higher", "value", 0.5),
    # SmolLM2-135M in bf16: 0.04 from rounding alone, 0.06 with a top_p of 0.95, 0.10 with 0.9.
    "sampler_error": Figure("higher", "value", 0.08),
    # SmolLM2-135M in bf16: 0.002 from rounding alone, 0.005 to 0.012 with the quickstart's batches sampled a step ahead. A
    # normal log rho with as much has 0.9 effective samples.
    "sampler_kl": Figure("higher", "value", 0.05),
    # A top_p of p leaves at least 4p / (1 + p)^2 (Kantorovich's inequality), and rounding in bf16 as much as one of 0.9,
    # which is 0.997: less comes of few tokens with a large ratio.
    "effective_samples": Figure("lower", "value", 0.9),
}


# Figures whose default warning supposes that the policy that learns has sampled all tokens.
OF_ONE_POLICY: tuple[FigureName, ...] = ("sampler_error",)


@dataclass(frozen=True)
class AlarmConfig:
    """A level of one figure, and the action if the figure is beyond it."""

    figure: FigureName
    """A figure of the table in docs/health.md."""
    level: float | None = None
    """The level, in the unit of that table: a multiple of the figure's value at the start, a distance from it, or a
    value. null with `warn` turns the figure's default warning off."""
    action: Action = "warn"
    """`warn` writes to the log. The other actions also: `raise_kl` multiply the KL coefficient by `health.raise_kl`;
    `roll_back` return to the last checkpoint before the figure went beyond the level, with a raised coefficient; `stop`
    end the run at the best such checkpoint; `stop_epoch`, only for approx_kl, leave out the remaining updates of the
    batch, from the one beyond the level on."""


@dataclass(frozen=True)
class HealthConfig:
    """Figures of every batch that show collapse, drift and reward hacking, and alarms on them."""

    judge: tuple[RewardConfig, ...] = ()
    """Held-out judge: sources in the form of `rewards` that score the same responses but are not part of the reward.
    Empty: no judge, and none of its figures."""
    alarms: tuple[AlarmConfig, ...] = ()
    """Levels with actions, or with `warn` in place of the figure's default warning."""
    window: int = 3
    """Number of PPO steps whose median is compared with a level, so that a single outlier raises no alarm. A figure's
    value at the start is its mean over as many first steps."""
    raise_kl: float = 2.0
    """Factor by which `raise_kl` and `roll_back` multiply the KL coefficient."""
    roll_backs: int = 3
    """Maximum number of rollbacks of a run; the next one stops it instead."""

    @property
    def kl_limit(self) -> float:
        """The approximate KL beyond which the remaining updates of a batch are left out; infinity if no alarm sets it."""
        levels = [alarm.level for alarm in self.alarms if alarm.action == "stop_epoch" and alarm.level is not None]
        return min(levels, default=math.inf)
