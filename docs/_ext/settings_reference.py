"""The directive `settings`: every setting of a command with its type, default and meaning, from its config class."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import typing
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def meanings(kind: type) -> dict[str, str]:
    """The string below each field of a dataclass, base classes included."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(inspect.getsource(base)).body[0].body  # type: ignore[attr-defined]
        for field, below in pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[field.target.id] = inspect.cleandoc(below.value.value)  # type: ignore[union-attr]
    return found


def settings(kind: type, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Dotted name, type, default and meaning of every setting, groups unfolded."""
    hints, said = typing.get_type_hints(kind), meanings(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from settings(hint, f"{prefix}{field.name}.")
            continue
        yield prefix + field.name, _type(hint), _default(field), said.get(field.name, "")
        item = typing.get_args(hint)[:1]
        if item and dataclasses.is_dataclass(item[0]):
            yield from settings(item[0], f"{prefix}{field.name}[].")


def _type(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(str(value) for value in typing.get_args(hint))
    if args := typing.get_args(hint):
        if typing.get_origin(hint) is tuple:
            return f"list of {_type(args[0])}"
        return " | ".join(_type(arg) for arg in args)
    return {"NoneType": "null"}.get(hint.__name__, hint.__name__)


def _default(field: dataclasses.Field[Any]) -> str:
    """As JSON has it; empty where there is none."""
    made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return "" if made is dataclasses.MISSING else json.dumps(made)


class Settings(SphinxDirective):
    """`.. settings:: fastppo.config.Config`"""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].rpartition(".")
        lists = nodes.definition_list()
        for setting, kind, default, meaning in settings(getattr(import_module(module), name)):
            term = nodes.term("", "", nodes.literal(text=f"--{setting}"))
            term += nodes.Text(f"  {kind}" + (", default " if default else ""))
            term += nodes.literal(text=default) if default else nodes.Text("")
            text, _ = self.parse_inline(meaning)
            lists += nodes.definition_list_item("", term, nodes.definition("", nodes.paragraph("", "", *text)))
        return [lists]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("settings", Settings)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
