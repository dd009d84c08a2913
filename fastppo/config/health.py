"""What a run watches of itself, and what it does about it."""

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
]
Action = Literal["warn", "raise_kl", "stop_epoch", "roll_back", "stop"]


class Figure(NamedTuple):
    """How a figure is held against a level."""

    worse: Literal["lower", "higher", "either"]
    level_is: Literal["times start", "from start", "deviations from start", "value"]
    warn: float  # the level that warns where the settings give none

    def threshold(self, level: float, start: float, spread: float) -> float:
        """A level in the figure's own unit. start: its mean in the first steps; spread: its deviation there."""
        if self.level_is == "value":
            return level
        if self.level_is == "times start":
            return level * start
        distance = level if self.worse == "higher" else -level
        return start + distance * (spread if self.level_is == "deviations from start" else 1.0)


REST = 10  # steps after which an alarm that stays on is raised again

# The quickstart may go beyond none of these: bench/quickstart_seeds.py holds it to that. Its batches are small, 32
# responses of 20 tokens, and so as noisy as any.
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
    # SmolLM2-135M in bf16: 0.04 by rounding alone, 0.06 under a top_p of 0.95, 0.10 under one of 0.9.
    "sampler_error": Figure("higher", "value", 0.08),
}


@dataclass(frozen=True)
class AlarmConfig:
    """A level of one figure, and what happens beyond it."""

    figure: FigureName
    """A figure of the README's table (Health)."""
    level: float | None = None
    """In the unit of that table: a multiple of the figure's start, a distance from it, or a value. null with `warn`
    takes the figure's standing warning away."""
    action: Action = "warn"
    """`warn` writes to the log; `raise_kl` also multiplies the KL coefficient by `health.raise_kl`; `roll_back` goes
    back to the last checkpoint from before, with a raised coefficient; `stop` ends the run at the best checkpoint from
    before; `stop_epoch`, for approx_kl alone, ends the learning from a batch at the update that goes beyond."""


@dataclass(frozen=True)
class HealthConfig:
    """Figures of every batch that tell collapse, drift and reward hacking, and alarms on them."""

    judge: tuple[RewardConfig, ...] = ()
    """Held-out judge: sources in the form of `rewards` that score the same responses and are never trained on. Empty:
    no judge, and no figures of it."""
    alarms: tuple[AlarmConfig, ...] = ()
    """Levels that act, or that warn instead of the figure's standing warning."""
    window: int = 3
    """PPO steps whose median is held against a level, so that one odd batch raises no alarm; as many at the start of
    the run are what a figure started from."""
    raise_kl: float = 2.0
    """Factor by which `raise_kl` and `roll_back` raise the KL coefficient."""
    roll_backs: int = 3
    """How often a run may roll back; the next time it stops."""

    @property
    def kl_limit(self) -> float:
        """The approximate KL of an update beyond which the learning from a batch ends; infinity where no alarm sets it."""
        levels = [alarm.level for alarm in self.alarms if alarm.action == "stop_epoch" and alarm.level is not None]
        return min(levels, default=math.inf)
