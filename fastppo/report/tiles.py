"""The top of the page: the progress of a run, the alarm that ended it, and its most important numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from statistics import fmean

from fastppo.report.curves import duration, number
from fastppo.report.health import Episode, episodes
from fastppo.report.plot import SIGNS
from fastppo.report.run import Run
from fastppo.report.texts import text


def names(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return escape(runs[0].name)
    return " and ".join(f'<span class="name">{swatch(i)}{escape(run.name)}</span>' for i, run in enumerate(runs))


def swatch(i: int) -> str:
    return f'<i class="swatch run{i}"></i>'


def state(runs: Sequence[Run]) -> str:
    return " · ".join((f"{escape(run.name)}: " if len(runs) > 1 else "") + _done(run) for run in runs)


def _done(run: Run) -> str:
    total = run.settings.get("steps")
    return f"{run.steps} of {total} steps" if isinstance(total, int) else f"{run.steps} steps"


def endings(runs: Sequence[Run]) -> str:
    """The alarm that ended a run, for each run that was ended by one."""
    ended_runs = [(i, run, *ended) for i, run in enumerate(runs) if (ended := ending(run))]
    return "".join(
        f'<p class="ended">{f"{swatch(i)}{text(run.name)}: " if len(runs) > 1 else ""}<a href="#alarm-{i}-{n}">'
        f"{SIGNS['act']} Ended by an alarm of {text(e.figure)} at step {e.last}</a> <span>{text(e.message)}</span>"
        f"<span>Action: {text(e.action)}; the actor is that of the best checkpoint before the alarm, if there is one."
        "</span></p>"
        for i, run, n, e in ended_runs
    )


def ending(run: Run) -> tuple[int, Episode] | None:
    """The alarm that ended the run, with its index among the episodes; None if no alarm has ended it."""
    allowed = run.settings.get("health.roll_backs")
    ends = {"stop"}
    if isinstance(allowed, int) and sum(alarm["action"] == "roll_back" for alarm in run.alarms) > allowed:
        ends.add("roll back")
    ending_episodes = [(n, e) for n, e in enumerate(episodes(run)) if e.action in ends and e.last >= run.steps]
    return ending_episodes[-1] if ending_episodes else None


def tiles(runs: Sequence[Run]) -> str:
    """The tiles for which at least one run has a value."""
    cells = []
    for title, value_of in TILES:
        values = [value_of(run) for run in runs]
        if any(values):
            entries = "".join(f'<dd class="run{i}">{value or number(None)}</dd>' for i, value in enumerate(values))
            cells.append(f"<div><dt>{title}</dt>{entries}</div>")
    return f'<dl class="tiles{" two" if len(runs) > 1 else ""}">{"".join(cells)}</dl>' if cells else ""


def _from_to(run: Run, name: str, note: str = "") -> str:
    """The first and the last value of a metric, with a note in small print."""
    points = run.curve(name).points
    if not points:
        return ""
    first = f"{_short(points[0][1])} → " if len(points) > 1 else ""
    return first + _short(points[-1][1]) + (f" <small>{note}</small>" if note else "")


def _short(value: float) -> str:
    return number(float(f"{value:.3g}"))


def _last(run: Run, name: str) -> str:
    points = run.curve(name).points
    return _short(points[-1][1]) if points else ""


def _score(run: Run) -> str:
    error = _last(run, "eval/score_error")
    return _from_to(run, "eval/score", f"± {error}" if error else "")


def _training_score(run: Run) -> str:
    return "" if run.curve("eval/score").points else _from_to(run, "score")


def _judge(run: Run) -> str:
    return _from_to(run, "eval/judge") or _from_to(run, "health/judge")


def _kl(run: Run) -> str:
    last = _last(run, "kl") or _last(run, "eval/kl")
    return f"{last} <small>nats per response</small>" if last else ""


def _accuracy(run: Run) -> str:
    low, high = (_last(run, f"eval/accuracy_{end}") for end in ("low", "high"))
    return _from_to(run, "eval/accuracy", f"95%: {low} to {high}" if low and high else "")


def _duration(run: Run) -> str:
    names = ["time/step"] if "time/step" in run.names else [name for name in run.names if name.startswith("time/")]
    seconds = sum(y for name in names for _, y in run.curve(name).points)
    speeds = [y for _, y in run.curve("tokens_per_second").points]
    speed = f" <small>{_short(fmean(speeds))} tokens/s</small>" if speeds else ""
    return duration(seconds) + speed if seconds else ""


def _alarms(run: Run) -> str:
    alarms = episodes(run)
    if not alarms:
        return "none" if run.is_watched else ""
    acted = sum(e.level == "act" for e in alarms)
    return f'<a href="#health">{len(alarms)}</a>' + (f" <small>{acted} with an action</small>" if acted else "")


TILES: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("Score, held-out", _score),
    ("Score, training", _training_score),
    ("Held-out judge", _judge),
    ("KL to the reference", _kl),
    ("Loss, held-out", lambda run: _from_to(run, "eval/loss", "nats")),
    ("Perplexity, held-out", lambda run: _from_to(run, "eval/perplexity")),
    ("Accuracy, held-out", _accuracy),
    ("Calibration error", lambda run: _from_to(run, "eval/calibration_error")),
    ("Learning rate", lambda run: _from_to(run, "lr")),
    ("Time", _duration),
    ("Alarms", _alarms),
)
