"""The settings section: all settings, those that differ from the default, and those that differ between two runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from html import escape
from typing import Any

from fastppo.config import COMMANDS
from fastppo.report import texts
from fastppo.report.curves import number
from fastppo.report.run import Run, flat


def settings(runs: Sequence[Run]) -> str:
    """Tables of all settings, in bold those that are not the default; for two runs the differences come first."""
    if not any(run.settings for run in runs):
        return ""
    defaults = [_defaults(run) for run in runs]
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    different = [n for n in names if len({_yaml(run.settings.get(n)) for run in runs}) > 1]
    head = ""
    if len(runs) > 1:
        rows = "".join(_setting(n, n, runs, defaults) for n in different)
        head = f"<h3>Differences</h3>{_table(rows, runs)}" if rows else "<p>The settings are the same.</p>"
    groups = dict.fromkeys(name.partition(".")[0] if "." in name else "" for name in names)
    tables = "".join(
        f"<div><h3>{escape(group or 'run')}</h3>"
        + _table(
            "".join(_setting(n, n.partition(".")[2] or n, runs, defaults) for n in names if _is_of(n, group)), runs
        )
        + "</div>"
        for group in groups
    )
    note = '<p class="note">Bold: not the default.</p>'
    whole = f'{note}<div class="groups">{tables}</div>'
    return f"{head}<details><summary>All settings</summary>{whole}</details>" if head else whole


def _defaults(run: Run) -> dict[str, Any]:
    """The default settings of the command that shares the most settings with the run."""
    defaults = [flat(dataclasses.asdict(command.root())) for command in COMMANDS.values()]
    return max(defaults, key=lambda settings: len(settings.keys() & run.settings.keys()))


def _is_of(name: str, group: str) -> bool:
    return name.startswith(f"{group}.") if group else "." not in name


def _table(rows: str, runs: Sequence[Run]) -> str:
    head = "".join(f'<th><i class="swatch run{i}"></i>{escape(run.name)}' for i, run in enumerate(runs))
    return f'<table class="settings">{f"<thead><tr><th>{head}</thead>" if len(runs) > 1 else ""}<tbody>{rows}</table>'


def _setting(name: str, label: str, runs: Sequence[Run], defaults: Sequence[dict[str, Any]]) -> str:
    cells = []
    for run, default in zip(runs, defaults, strict=True):
        value = _yaml(run.settings[name]) if name in run.settings else number(None)
        changed = name in run.settings and name in default and value != _yaml(default[name])
        cells.append(f"<td><b>{texts.text(value)}</b>" if changed else f"<td>{texts.text(value)}")
    return f"<tr><th>{escape(label)}{''.join(cells)}"


def _yaml(value: Any) -> str:
    """A value as it is written in a config file."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
