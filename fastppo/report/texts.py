"""The sections of responses by step: held-out responses of each evaluation, and training responses with advantages.

The output of a model can contain anything. It is shown as text, with its own writing direction and without control
characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from operator import itemgetter
from typing import Any

from fastppo.report.curves import number
from fastppo.report.lines import Record
from fastppo.report.run import Run

COLUMNS = 8  # the number of steps shown of a run, evenly spaced, including the first and the last
TOKENS = 400  # the maximum number of tokens shown of a response
SHADES = 4  # colours for positive advantages, and as many for negative ones
UNSHOWN = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")  # control characters and lone surrogates


def heldout(runs: Sequence[Run]) -> str:
    """Each held-out prompt with the response of each run at each evaluation."""
    prompts = list(dict.fromkeys(r["prompt"] for run in runs for r in run.heldout))
    have_turns = any("said" in r for run in runs for r in run.heldout)
    return (_turns_legend() if have_turns else "") + "".join(_prompt(prompt, runs) for prompt in prompts)


def _prompt(prompt: str, runs: Sequence[Run]) -> str:
    strips = []
    for i, run in enumerate(runs):
        rows = [r for r in run.heldout if r["prompt"] == prompt]
        cards = "".join(_card(r, _said(r)) for r in _spaced(rows))
        if cards:
            strips.append(_strip(i, run, cards, named=len(runs) > 1))
    return f'<article class="prompt"><h3><span>Prompt</span> <bdi>{text(prompt)}</bdi></h3>{"".join(strips)}</article>'


def _strip(i: int, run: Run, cards: str, named: bool) -> str:
    name = f'<p class="whose"><i class="swatch run{i}"></i>{escape(run.name)}</p>' if named else ""
    return f'{name}<div class="strip" tabindex="0" role="group" aria-label="{escape(run.name)}, by step">{cards}</div>'


def _card(record: Record, shown: str, prompt: str = "") -> str:
    return (
        f'<div class="card"><p class="head"><span>step {record["step"]}</span>'
        f'<b>{number(record["score"])}</b></p>{prompt}<p class="words" dir="auto">{shown}</p></div>'
    )


def training(runs: Sequence[Run]) -> str:
    """Training responses, one column per step; tokens are coloured by their advantage if they have one."""
    chosen = [_steps(run) for run in runs]
    shown = [record for steps in chosen for rows in steps for record in rows]
    scale = _scale(a for record in shown for a in record.get("advantages", ()) if a is not None)
    strips = []
    for i, (run, steps) in enumerate(zip(runs, chosen, strict=True)):
        columns = [
            "".join(_card(r, _words(r, scale), f'<p class="of" dir="auto">{text(r["prompt"])}</p>') for r in rows)
            for rows in steps
        ]
        if columns:
            cards = "".join(f'<div class="column">{column}</div>' for column in columns)
            strips.append(_strip(i, run, cards, named=len(runs) > 1))
    legends = _legend(scale) if any("advantages" in record for record in shown) else ""
    legends += _turns_legend() if any("written" in record for record in shown) else ""
    return legends + "".join(strips)


def _steps(run: Run) -> list[list[Record]]:
    steps = sorted({r["step"] for r in run.training})
    return [[r for r in run.training if r["step"] == step] for step in _spaced(steps)]


def _spaced(rows: Sequence[Any]) -> list[Any]:
    if len(rows) <= COLUMNS:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)]


def _scale(advantages: Iterable[float]) -> float:
    """The advantage with the strongest colour: 95% are below it, so that one outlier does not make the others pale."""
    sizes = sorted(abs(a) for a in advantages)
    return sizes[int(0.95 * (len(sizes) - 1))] or 1.0 if sizes else 1.0


def _words(record: Record, scale: float) -> str:
    if "response" in record:
        return _said(record)
    pieces = record["tokens"]
    advantages, written = record.get("advantages"), record.get("written", [True] * len(pieces))
    more = f" <i>… {len(pieces) - TOKENS} more tokens</i>" if len(pieces) > TOKENS else ""
    spans = [
        _token(piece, advantages[i], scale) if advantages and written[i] else f'<span class="t">{text(piece)}</span>'
        for i, piece in enumerate(pieces[:TOKENS])
    ]
    if "written" not in record:
        return "".join(spans) + more
    parts = [
        (None if is_written else "observed", "".join(span for _, span in part))
        for is_written, part in groupby(zip(written, spans, strict=False), itemgetter(0))
    ]
    return _turns(parts, record.get("turn_rewards")) + more


def _said(record: Record) -> str:
    """A whole response; of a conversation each turn and observation apart."""
    if "said" not in record:
        return text(record["response"].strip())
    parts = [
        (None if m["role"] == "assistant" else f"observed, {text(m['role'])}", text(m["text"].strip()))
        for m in record["said"]
    ]
    return _turns(parts, record.get("turn_rewards"))


def _turns(parts: Iterable[tuple[str | None, str]], rewards: Sequence[float | None] | None) -> str:
    """Turns, numbered and with their rewards, and observations, as blocks.

    parts: label, None for a turn of the policy, and text, both as HTML.
    """
    blocks, turn = [], 0
    for label, shown in parts:
        kind = "observed"
        if label is None:
            reward = f" · reward {_reward(rewards[turn])}" if rewards and turn < len(rewards) else ""
            turn += 1
            kind, label = "turn", f"turn {turn}{reward}"
        blocks.append(f'<span class="{kind}"><small>{label}</small>{shown}</span>')
    return "".join(blocks)


def _reward(value: float | None) -> str:
    return number(None) if value is None else _signed(value)


def _turns_legend() -> str:
    return (
        '<p class="scale"><span class="observed">observed</span>'
        " <small>behind a double line, in grey: what the environment wrote, which the policy read and does not learn;"
        " all else is of the policy, turn by turn, with the environment's reward for each</small></p>"
    )


def _token(piece: str, advantage: float | None, scale: float) -> str:
    if advantage is None:
        return f'<span class="t" title="advantage {number(None)}">{text(piece)}</span>'
    shade = min(round(abs(advantage) / scale * SHADES), SHADES)
    sign = "m" if advantage < 0 else "p"
    colour = f" {sign}{shade}" if shade else ""
    return f'<span class="t{colour}" title="advantage {_signed(advantage)}">{text(piece)}</span>'


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(float(f"{value:.3g}"))


def _legend(scale: float) -> str:
    shades = [f"m{s}" for s in range(SHADES, 0, -1)] + [""] + [f"p{s}" for s in range(1, SHADES + 1)]
    cells = "".join(f'<span class="t {shade}">&nbsp;</span>' for shade in shades)
    return (
        f'<p class="scale">advantage <span>{_signed(-scale)}</span>'
        f'<span class="cells" aria-hidden="true">{cells}</span><span>{_signed(scale)}</span>'
        " <small>dashed underline: worse than expected; solid underline: better</small>"
        '<output class="token" aria-live="polite"></output></p>'
    )


def text(words: Any) -> str:
    """A text as HTML, escaped, with control characters replaced."""
    return escape(UNSHOWN.sub("\N{REPLACEMENT CHARACTER}", str(words)))
