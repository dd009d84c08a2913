"""Watching over a run: the history of its health figures, and alarms where one goes beyond its level.

All that an alarm depends on is in `Health`, which is part of a checkpoint and the same on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from fastppo.config import FIGURES, REST, AlarmConfig, Config, FigureName, HealthConfig
from fastppo.data import Experience, Update, decode_after
from fastppo.monitor.health_metrics import figures, rewarded_phrases
from fastppo.monitor.trend_tests import slope, trend

TREND = 10  # steps over which the judge must fall
LEAST = 6  # steps without which there is no trend
ERRORS = 4.0  # standard errors by which it must fall
GO_BACK = ("roll_back", "stop")  # actions that need a checkpoint from before
OF_REWARD = ("judge", "judge_gap", "judge_turn", "length_correlation", "rewarded_phrase")


@dataclass(frozen=True)
class Alarm:
    """A figure beyond a level of the settings; one line of `alarms.jsonl`."""

    step: int
    figure: str
    value: float  # the median of the last steps
    threshold: float  # the level in the figure's own unit
    level: str  # warn or act
    action: str | None  # what is done beside warning
    good: int  # the last step at whose end the figure had been within the level for a whole window
    message: str


@dataclass
class Health:
    """What a run has seen of its health so far."""

    history: dict[str, list[float]] = field(default_factory=dict)  # of each figure, one value a step
    raised: dict[str, int] = field(default_factory=dict)  # a rule -> the step of its last alarm
    alarms: list[Alarm] = field(default_factory=list)
    good: int | None = None  # the step up to which every figure that may end or take back the run has been good
    roll_backs: int = 0

    @property
    def steps(self) -> int:
        return len(self.history.get("entropy", ()))

    def add(self, found: dict[str, float]) -> None:
        for name, value in found.items():
            self.history.setdefault(name, []).append(value)

    def start(self, name: str, window: int) -> float:
        """The mean of a figure's first steps."""
        values = [x for x in self.history[name][:window] if math.isfinite(x)]
        return fmean(values) if values else math.nan

    def spread(self, name: str, window: int) -> float:
        """The standard deviation of the score's or the judge's single numbers in the first steps in which they
        differ: a rule that no response keeps at first says the same of all. NaN while there is no such step."""
        spreads = [x for x in self.history[f"{name}_std"] if x > 0][:window]
        return math.sqrt(fmean(x * x for x in spreads)) if spreads else math.nan

    def state(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(state: dict[str, Any]) -> Health:
        return Health(**state | {"alarms": [Alarm(**alarm) for alarm in state["alarms"]]})


class Checkup(NamedTuple):
    """What a step showed."""

    metrics: dict[str, float]  # health/FIGURE
    alarms: list[Alarm]


def watch(
    experience: Experience,
    updates: Sequence[Update],
    kept: Health,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
) -> Checkup:
    """Take the figures of a step into `kept`, and see which of them is beyond a level."""
    window, judged = config.health.window, bool(config.health.judge)
    kept.add(figures(experience, exact_kl=config.ppo.kl_kind == "exact"))
    applied = [update.approx_kl for update in updates if not update.skipped]
    kept.add({"approx_kl": fmean(applied) if applied else math.nan})
    if judged:
        turn = judge_turn(kept, responses=len(experience.packed), window=window)
        kept.add({"judge_gap": judge_gap(kept, window), "judge_turn": turn})
    shown = [name for name in FIGURES if name in kept.history and (judged or name != "judge")]
    rules = _rules(config.health, shown)
    alarms = [alarm for rule in rules if (alarm := _alarm(rule, kept, window)) is not None]
    kept.good = min((_good(rule, kept, window) for rule in rules if rule.action in GO_BACK), default=None)
    alarms += _stopped_epoch(updates, kept, config.health)
    if any(alarm.figure in OF_REWARD for alarm in alarms):
        alarms = [_with_phrases(alarm, experience, tokenizer) for alarm in alarms]
    kept.alarms += alarms
    return Checkup({f"health/{name}": kept.history[name][-1] for name in shown}, alarms)


def judge_gap(kept: Health, window: int) -> float:
    """How much more the score has risen than the judge, each in standard deviations of its single numbers at the start.

    (s_t - s_0) / sd(s_0) - (j_t - j_0) / sd(j_0), s and j the batch's mean score and judge, 0 the first `window` steps.
    So the two need no common scale (Gao et al., 2022, compare proxy and gold reward models normalised alike).
    """
    proxy, judge = (
        (kept.history[name][-1] - kept.start(name, window)) / kept.spread(name, window) for name in ("score", "judge")
    )
    return proxy - judge


def judge_turn(kept: Health, *, responses: int, window: int) -> float:
    """How surely the judge falls while the score still rises: over-optimisation as in Gao et al. (2022, figure 1).

    The Mann-Kendall statistic z of the last ten means of the judge, with its sign turned (2.33: one row of ten in a
    hundred falls so by chance); 0 where the score's Theil-Sen slope is not positive, or where the judge's, over these
    steps, falls by less than four standard errors of a mean of so many responses. z alone takes means that stay near
    the ones before, as those of a policy that wanders do, for a trend. Both slope and z hold the order of pairs
    against each other, so an odd batch or two decide nothing.
    """
    score, judge = (kept.history[name][-TREND:] for name in ("score", "judge"))
    if len(judge) < LEAST or slope(score) <= 0:
        return 0.0
    fall = -slope(judge) * (len(judge) - 1)
    small = fall < ERRORS * kept.spread("judge", window) / math.sqrt(responses)
    return 0.0 if small else max(-trend(judge), 0.0)


def _rules(health: HealthConfig, names: Sequence[FigureName]) -> list[AlarmConfig]:
    """The standing warnings that the settings leave, and the alarms that they add, of figures that there are."""
    own = {alarm.figure for alarm in health.alarms if alarm.action == "warn"}
    standing = [AlarmConfig(name, figure.warn) for name, figure in FIGURES.items() if name not in own]
    rules = [rule for rule in (*standing, *health.alarms) if rule.level is not None and rule.action != "stop_epoch"]
    return [rule for rule in rules if rule.figure in names]


def _alarm(rule: AlarmConfig, kept: Health, window: int) -> Alarm | None:
    """The alarm of a rule at this step, if its figure is beyond the level and it has not been raised lately."""
    values, step = kept.history[rule.figure], kept.steps
    recent, figure = values[-window:], FIGURES[rule.figure]
    if len(values) < window + (figure.level_is != "value") or any(map(math.isnan, recent)):
        return None
    value, threshold, name = median(recent), _threshold(rule, kept, window), f"{rule.figure} {rule.action} {rule.level}"
    if not _beyond(rule, value, threshold) or step - kept.raised.get(name, -REST) < REST:
        return None
    kept.raised[name] = step
    good = _good(rule, kept, window)
    action = None if rule.action == "warn" else rule.action
    return Alarm(
        step=step,
        figure=rule.figure,
        value=value,
        threshold=threshold,
        level="act" if action else "warn",
        action=action,
        good=good,
        message=_message(rule, kept, value, threshold, good, window),
    )


def _good(rule: AlarmConfig, kept: Health, window: int) -> int:
    """The last step at whose end the figure had been within the level for a whole window; 0 if there is none."""
    values, threshold = kept.history[rule.figure], _threshold(rule, kept, window)
    within = 0  # steps on end, going backwards
    for step in range(len(values), 0, -1):
        within = 0 if _beyond(rule, values[step - 1], threshold) else within + 1
        if within == min(window, step + within - 1):
            return step + within - 1
    return 0


def _threshold(rule: AlarmConfig, kept: Health, window: int) -> float:
    """The level in the figure's own unit."""
    assert rule.level is not None
    figure, start = FIGURES[rule.figure], kept.start(rule.figure, window)
    spread = kept.spread(rule.figure, window) if figure.level_is == "deviations from start" else 0.0
    return figure.threshold(rule.level, start, spread)


def _beyond(rule: AlarmConfig, value: float, threshold: float) -> bool:
    worse = FIGURES[rule.figure].worse
    if worse == "either":
        return abs(value) > threshold
    return value < threshold if worse == "lower" else value > threshold


def _message(rule: AlarmConfig, kept: Health, value: float, threshold: float, good: int, window: int) -> str:
    figure = FIGURES[rule.figure]
    side = {"lower": "below", "higher": "above", "either": "beyond +/-"}[figure.worse]
    start = "" if figure.level_is == "value" else f"; it began at {kept.start(rule.figure, window):.4g}"
    text = f"{rule.figure} is {value:.4g}, the median of {window} steps, {side} {threshold:.4g}{start}"
    if rule.figure == "judge_turn":
        text += f"; {_peak(kept)}"
    last = f"Step {good} was the last to end a whole window within it" if good else "It never was within it"
    return f"{text}. {last}."


def _peak(kept: Health) -> str:
    """Where the judge turned: the highest of the medians of three steps."""
    judge, kl = kept.history["judge"], kept.history["kl_sequence"]
    smooth = [median(judge[max(i - 1, 0) : i + 2]) for i in range(len(judge))]
    top = max(range(len(smooth)), key=smooth.__getitem__)
    return f"the judge was highest at step {top + 1}, where sqrt(KL) was {math.sqrt(max(kl[top], 0)):.2f}"


def _stopped_epoch(updates: Sequence[Update], kept: Health, health: HealthConfig) -> list[Alarm]:
    """The alarm of a batch whose learning was ended (`learn.learn`)."""
    if not updates[-1].stopped:
        return []
    value, limit, step = updates[-1].approx_kl, health.kl_limit, kept.steps
    message = (
        f"approx_kl of update {len(updates)} is {value:.4g}, above {limit:.4g}: it was not applied, and the learning"
        " from this batch ended there."
    )
    return [Alarm(step, "approx_kl", value, limit, "act", "stop_epoch", step, message)]


def _with_phrases(alarm: Alarm, experience: Experience, tokenizer: PreTrainedTokenizerBase) -> Alarm:
    """Alarms of the reward name what the policy may be paid for."""
    if alarm.figure not in OF_REWARD:
        return alarm
    phrases = rewarded_phrases(experience)
    tokens = [phrase.tokens for phrase in phrases]
    texts = decode_after(tokens, tokens, tokenizer, special=True)  # each as within a text, with the space before it
    said = [
        f"{text!r} in {phrase.share:.0%} of the responses, score"
        f" {phrase.gain:+.1f} deviations, {math.exp(min(phrase.surprise, 20)):.0f} times likelier than by the reference"
        for phrase, text in zip(phrases, texts, strict=True)
    ]
    return alarm if not said else Alarm(**asdict(alarm) | {"message": f"{alarm.message} Phrases: {'; '.join(said)}."})
