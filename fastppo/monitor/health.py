"""Alarms: the history of a run's health figures, and the checks of each figure against its warning and action levels.

`Health` holds everything that an alarm depends on. It is part of a checkpoint and the same on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, median
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from fastppo.config import FIGURES, OF_ONE_POLICY, QUIET_STEPS, AlarmConfig, FigureName, HealthConfig, OnlineConfig
from fastppo.data import Experience, Measured, Update, decode_after
from fastppo.monitor.health_metrics import figures, rewarded_phrases
from fastppo.monitor.trend_tests import slope, trend

TREND_STEPS = 10  # the number of steps over which the judge must fall
MIN_TREND_STEPS = 6  # with fewer steps no trend is computed
MIN_STANDARD_ERRORS = 4.0  # the judge must fall by at least this many standard errors
ROLLBACK_ACTIONS = ("roll_back", "stop")  # the actions that return to an earlier checkpoint
REWARD_FIGURES = ("judge", "judge_gap", "judge_turn", "length_correlation", "rewarded_phrase")


@dataclass(frozen=True)
class Alarm:
    """A figure beyond a configured level; one line of `alarms.jsonl`."""

    step: int
    figure: str
    value: float  # the median of the last `health.window` steps
    threshold: float  # the level, converted to the figure's unit
    level: str  # warn or act
    action: str | None  # the action besides the warning; None if there is none
    good: int  # the last step that ended a full window within the threshold; 0 if there is none
    message: str


@dataclass
class Health:
    """The health figures and alarms of a run so far."""

    history: dict[str, list[float]] = field(default_factory=dict)  # figure name -> one value per step
    raised: dict[str, int] = field(default_factory=dict)  # rule -> the step of its last alarm
    alarms: list[Alarm] = field(default_factory=list)
    good: int | None = None  # the last good step of all figures with a rollback action; None if none has such an action
    roll_backs: int = 0

    @property
    def steps(self) -> int:
        return len(self.history.get("entropy", ()))

    def add(self, values: Mapping[str, float]) -> None:
        """Append one step's value of each figure."""
        for name, value in values.items():
            self.history.setdefault(name, []).append(value)

    def start(self, name: str, window: int) -> float:
        """The baseline: the mean of a figure's finite values in the first `window` steps; NaN without any."""
        values = [x for x in self.history[name][:window] if math.isfinite(x)]
        return fmean(values) if values else math.nan

    def spread(self, name: str, window: int) -> float:
        """The standard deviation, within a batch, of the score or the judge: the root mean square over the first
        `window` steps in which it is not 0. NaN while there is no such step.

        Steps with 0 do not count because a reward rule that no response satisfies at first gives all the same score.
        """
        spreads = [x for x in self.history[f"{name}_std"] if x > 0][:window]
        return math.sqrt(fmean(x * x for x in spreads)) if spreads else math.nan

    def state(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_state(state: dict[str, Any]) -> Health:
        return Health(**state | {"alarms": [Alarm(**alarm) for alarm in state["alarms"]]})


class Checkup(NamedTuple):
    """The health metrics and the alarms of one step."""

    metrics: dict[str, float]  # health/FIGURE
    alarms: list[Alarm]


def watch(
    experience: Experience,
    updates: Sequence[Update],
    health: Health,
    config: OnlineConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Checkup:
    """Append the figures of a PPO step to `health` and raise the alarms of those that are beyond a level."""
    applied = [update.approx_kl for update in updates if not update.skipped]
    found = figures(experience, exact_kl=config.exact_kl) | {"approx_kl": fmean(applied) if applied else math.nan}
    stopped = _stopped_epoch(updates, health.steps + 1, config.health)
    return check_figures(found, experience, len(experience.packed), health, config, tokenizer, stopped)


def check_figures(
    found: Mapping[str, float],
    batch: Measured,
    responses: int,
    health: Health,
    config: OnlineConfig,
    tokenizer: PreTrainedTokenizerBase,
    more: Sequence[Alarm] = (),
) -> Checkup:
    """Append the figures of a step to `health` and raise the alarms of those that are beyond a level.

    batch: in which rewarded phrases are looked for; responses: over how many the figures are means; more: alarms that
    the step has raised already.
    """
    window, has_judge = config.health.window, bool(config.health.judge)
    for name in found:  # a figure that is newer than the run is unknown for the steps before
        health.history.setdefault(name, [math.nan] * health.steps)
    health.add(found)
    if has_judge:
        turn = judge_turn(health, responses=responses, window=window)
        health.add({"judge_gap": judge_gap(health, window), "judge_turn": turn})
    shown = [name for name in FIGURES if name in health.history and (has_judge or name != "judge")]
    rules = _rules(config.health, shown, silent=OF_ONE_POLICY if config.earlier_policies else ())
    alarms = [alarm for rule in rules if (alarm := _alarm(rule, health, window)) is not None]
    health.good = min(
        (_last_good_step(rule, health, window) for rule in rules if rule.action in ROLLBACK_ACTIONS), default=None
    )
    alarms += more
    if any(alarm.figure in REWARD_FIGURES for alarm in alarms):
        alarms = [_with_phrases(alarm, batch, tokenizer) for alarm in alarms]
    health.alarms += alarms
    return Checkup({f"health/{name}": health.history[name][-1] for name in shown}, alarms)


def judge_gap(health: Health, window: int) -> float:
    """The rise of the score minus the rise of the judge, each in standard deviations within a batch at the start.

    (s_t - s_0) / sd(s_0) - (j_t - j_0) / sd(j_0); s and j are the batch means of score and judge, index 0 is the
    baseline from the first `window` steps. The division makes a common scale unnecessary (Gao et al., 2022, normalise
    proxy and gold reward models in the same way).
    """
    proxy, judge = (
        (health.history[name][-1] - health.start(name, window)) / health.spread(name, window)
        for name in ("score", "judge")
    )
    return proxy - judge


def judge_turn(health: Health, *, responses: int, window: int) -> float:
    """A test for a falling judge while the score rises: over-optimisation as in Gao et al. (2022, figure 1).

    Returns the negated Mann-Kendall statistic z of the last `TREND_STEPS` means of the judge, at least 0. A value of
    2.33 or more occurs by chance in one of a hundred series without a trend. Returns 0 if the score's Theil-Sen slope
    is not positive, or if the judge's slope over these steps is a fall of less than `MIN_STANDARD_ERRORS` standard
    errors of a mean over `responses` responses: the means of a policy that moves at random are autocorrelated, and z
    alone would take that for a trend. Slope and z compare pairs of steps, so that one or two outliers have no effect.
    """
    score, judge = (health.history[name][-TREND_STEPS:] for name in ("score", "judge"))
    if len(judge) < MIN_TREND_STEPS or slope(score) <= 0:
        return 0.0
    fall = -slope(judge) * (len(judge) - 1)
    is_small = fall < MIN_STANDARD_ERRORS * health.spread("judge", window) / math.sqrt(responses)
    return 0.0 if is_small else max(-trend(judge), 0.0)


def _rules(settings: HealthConfig, names: Sequence[FigureName], silent: Sequence[FigureName] = ()) -> list[AlarmConfig]:
    """The rules for the figures `names`: those of `health.alarms`, and the default warning of each figure for which
    `health.alarms` has no warning; silent: figures without a default warning."""
    configured = {alarm.figure for alarm in settings.alarms if alarm.action == "warn"} | {*silent}
    defaults = [AlarmConfig(name, figure.warn) for name, figure in FIGURES.items() if name not in configured]
    rules = [rule for rule in (*defaults, *settings.alarms) if rule.level is not None and rule.action != "stop_epoch"]
    return [rule for rule in rules if rule.figure in names]


def _alarm(rule: AlarmConfig, health: Health, window: int) -> Alarm | None:
    """The alarm of a rule at this step; None if its figure is within the level, or if the rule raised an alarm in the
    last `QUIET_STEPS` steps."""
    values, step = health.history[rule.figure], health.steps
    recent, figure = values[-window:], FIGURES[rule.figure]
    if len(values) < window + (figure.level_is != "value") or any(map(math.isnan, recent)):
        return None
    value, threshold, name = (
        median(recent),
        _threshold(rule, health, window),
        f"{rule.figure} {rule.action} {rule.level}",
    )
    if not _beyond(rule, value, threshold) or step - health.raised.get(name, -QUIET_STEPS) < QUIET_STEPS:
        return None
    health.raised[name] = step
    good = _last_good_step(rule, health, window)
    action = None if rule.action == "warn" else rule.action
    return Alarm(
        step=step,
        figure=rule.figure,
        value=value,
        threshold=threshold,
        level="act" if action else "warn",
        action=action,
        good=good,
        message=_message(rule, health, value, threshold, good, window),
    )


def _last_good_step(rule: AlarmConfig, health: Health, window: int) -> int:
    """The last step that ended a full window within the threshold; 0 if there is none."""
    values, threshold = health.history[rule.figure], _threshold(rule, health, window)
    run_length = 0  # consecutive steps within the threshold, counted backwards from the newest
    for step in range(len(values), 0, -1):
        run_length = 0 if _beyond(rule, values[step - 1], threshold) else run_length + 1
        if run_length == min(window, step + run_length - 1):
            return step + run_length - 1
    return 0


def _threshold(rule: AlarmConfig, health: Health, window: int) -> float:
    """The rule's level, converted to the figure's unit."""
    assert rule.level is not None
    figure, start = FIGURES[rule.figure], health.start(rule.figure, window)
    spread = health.spread(rule.figure, window) if figure.level_is == "deviations from start" else 0.0
    return figure.threshold(rule.level, start, spread)


def _beyond(rule: AlarmConfig, value: float, threshold: float) -> bool:
    worse = FIGURES[rule.figure].worse
    if worse == "either":
        return abs(value) > threshold
    return value < threshold if worse == "lower" else value > threshold


def _message(rule: AlarmConfig, health: Health, value: float, threshold: float, good: int, window: int) -> str:
    figure = FIGURES[rule.figure]
    side = {"lower": "below", "higher": "above", "either": "beyond +/-"}[figure.worse]
    start = "" if figure.level_is == "value" else f"; at the start it was {health.start(rule.figure, window):.4g}"
    text = f"{rule.figure} is {value:.4g}, the median of {window} steps, {side} {threshold:.4g}{start}"
    if rule.figure == "judge_turn":
        text += f"; {_peak(health)}"
    last = f"Step {good} was the last to end a full window within it" if good else "No full window was within it"
    return f"{text}. {last}."


def _peak(health: Health) -> str:
    """The turning point of the judge, for a message: the step with the highest median of three steps."""
    judge, kl = health.history["judge"], health.history["kl_sequence"]
    medians = [median(judge[max(i - 1, 0) : i + 2]) for i in range(len(judge))]
    top = max(range(len(medians)), key=medians.__getitem__)
    return f"the judge was highest at step {top + 1}, where sqrt(KL) was {math.sqrt(max(kl[top], 0)):.2f}"


def _stopped_epoch(updates: Sequence[Update], step: int, settings: HealthConfig) -> list[Alarm]:
    """The alarm of a batch whose remaining updates were left out because the KL was too high; empty otherwise."""
    if not updates[-1].stopped:
        return []
    value, limit = updates[-1].approx_kl, settings.kl_limit
    message = (
        f"approx_kl of update {len(updates)} is {value:.4g}, above {limit:.4g}: it was not applied, and the learning"
        " from this batch ended there."
    )
    return [Alarm(step, "approx_kl", value, limit, "act", "stop_epoch", step, message)]


def _with_phrases(alarm: Alarm, batch: Measured, tokenizer: PreTrainedTokenizerBase) -> Alarm:
    """The alarm, with the phrases that the policy is possibly rewarded for added to its message."""
    if alarm.figure not in REWARD_FIGURES:
        return alarm
    phrases = rewarded_phrases(batch)
    tokens = [phrase.tokens for phrase in phrases]
    texts = decode_after(tokens, tokens, tokenizer, special=True)  # decoded as inside a text, with the space before it
    descriptions = [
        f"{text!r} in {phrase.share:.0%} of the responses, score"
        f" {phrase.gain:+.1f} deviations, {math.exp(min(phrase.surprise, 20)):.0f} times likelier than under"
        " the reference"
        for phrase, text in zip(phrases, texts, strict=True)
    ]
    if not descriptions:
        return alarm
    return replace(alarm, message=f"{alarm.message} Phrases: {'; '.join(descriptions)}.")
