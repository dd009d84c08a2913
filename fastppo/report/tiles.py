"""What a reader sees first: where a run stands, the alarm that ended it, and its few most telling numbers."""

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
    whole = run.settings.get("steps")
    return f"{run.steps} of {whole} steps" if isinstance(whole, int) else f"{run.steps} steps"


def endings(runs: Sequence[Run]) -> str:
    """For each run that an alarm has ended, which and when."""
    found = [(i, run, *ended) for i, run in enumerate(runs) if (ended := ending(run))]
    return "".join(
        f'<p class="ended">{f"{swatch(i)}{text(run.name)}: " if len(runs) > 1 else ""}<a href="#alarm-{i}-{n}">'
        f"{SIGNS['act']} Ended by an alarm of {text(e.figure)} at step {e.last}</a> <span>{text(e.message)}</span>"
        f"<span>Done: {text(e.action)}; the actor is that of the best checkpoint from before, if one is left.</span>"
        "</p>"
        for i, run, n, e in found
    )


def ending(run: Run) -> tuple[int, Episode] | None:
    """The alarm that ended the run, with its place among the episodes; None if it went on, or may roll back."""
    allowed = run.settings.get("health.roll_backs")
    ends = {"stop"}
    if isinstance(allowed, int) and sum(alarm["action"] == "roll_back" for alarm in run.alarms) > allowed:
        ends.add("roll back")
    found = [(n, e) for n, e in enumerate(episodes(run)) if e.action in ends and e.last >= run.steps]
    return found[-1] if found else None


def tiles(runs: Sequence[Run]) -> str:
    """Those that some run has something for."""
    cells = []
    for title, tell in TILES:
        told = [tell(run) for run in runs]
        if any(told):
            values = "".join(f'<dd class="run{i}">{value or number(None)}</dd>' for i, value in enumerate(told))
            cells.append(f"<div><dt>{title}</dt>{values}</div>")
    return f'<dl class="tiles{" two" if len(runs) > 1 else ""}">{"".join(cells)}</dl>' if cells else ""


def _from_to(run: Run, name: str, beside: str = "") -> str:
    points = run.curve(name).points
    if not points:
        return ""
    before = f"{_short(points[0][1])} → " if len(points) > 1 else ""
    return before + _short(points[-1][1]) + (f" <small>{beside}</small>" if beside else "")


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
    return f"{last} <small>nats a response</small>" if last else ""


def _accuracy(run: Run) -> str:
    low, high = (_last(run, f"eval/accuracy_{end}") for end in ("low", "high"))
    return _from_to(run, "eval/accuracy", f"95%: {low} to {high}" if low and high else "")


def _took(run: Run) -> str:
    stages = ["time/step"] if "time/step" in run.names else [name for name in run.names if name.startswith("time/")]
    seconds = sum(y for name in stages for _, y in run.curve(name).points)
    speeds = [y for _, y in run.curve("tokens_per_second").points]
    speed = f" <small>{_short(fmean(speeds))} tokens/s</small>" if speeds else ""
    return duration(seconds) + speed if seconds else ""


def _alarms(run: Run) -> str:
    found = episodes(run)
    if not found:
        return "none" if run.is_watched else ""
    acted = sum(e.level == "act" for e in found)
    return f'<a href="#health">{len(found)}</a>' + (f" <small>of them {acted} acted</small>" if acted else "")


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
    ("Time", _took),
    ("Alarms", _alarms),
)
