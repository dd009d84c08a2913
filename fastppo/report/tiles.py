"""What a reader sees first: where a run stands, and its few most telling numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from statistics import fmean

from fastppo.report.curves import duration, number
from fastppo.report.health import episodes
from fastppo.report.run import Run


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
