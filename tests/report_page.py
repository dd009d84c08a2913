"""A report as its tests read it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from fastppo.report.page import page
from fastppo.report.run import Run, read_runs


class Parsed(HTMLParser):
    """Elements as (tag, attributes), and the text outside of scripts and styles."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.data, self._inside = "", "", ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script" and self.elements[-1][1].get("type") == "application/json":
            self.data += data
        elif self._inside not in ("script", "style"):
            self.text += data

    def all(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        found = [attributes for name, attributes in self.elements if name == tag]
        return [a for a in found if not kind or kind in (a.get("class") or "").split()]

    @property
    def ids(self) -> list[str]:
        return [a["id"] or "" for _, a in self.elements if "id" in a]


def runs(*folders: Path) -> list[Run]:
    return read_runs(folders)


def shown(*folders: Path) -> Parsed:
    return Parsed(page(runs(*folders)))


def charts(parsed: Parsed) -> dict[str, dict[str, Any]]:
    """The charts by their titles; of those with one title the last."""
    return {chart["title"]: chart for chart in json.loads(parsed.data).values()}
