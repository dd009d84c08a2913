"""The command line: presets, YAML files and single settings, from the left to the right, into one `Config`.

jsonargparse does the work. What stands here beside it makes a mistake cheap: an unknown name gets the nearest
known one, a wrong value is told what is allowed, and a broken file is named with its line.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from argparse import SUPPRESS, ArgumentError
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings  # type: ignore[attr-defined]

from fastppo.config import Config, ConfigError
from fastppo.rules import validate

USAGE = "deepspeed fastppo/train.py --config PRESET|FILE.yaml [--SETTING VALUE ...]"
OTHER_OPTIONS = ("help", "config", "print_config", "local_rank")


def parse(argv: list[str] | None = None, ranks: int | None = None) -> Config:
    """The checked settings of a run; `argv` is `sys.argv[1:]` when left out.

    `--help` prints every setting and exits with 0. A mistake prints one message on stderr and exits with 2.
    The rules between settings hold for so many ranks; when left out, for those in the environment's WORLD_SIZE.
    """
    try:
        config = _read(sys.argv[1:] if argv is None else argv)
        validate(config, ranks=int(os.environ.get("WORLD_SIZE", "1")) if ranks is None else ranks)
    except ConfigError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once, and not once for each rank
            print(f"fastppo: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return config


def dump(config: Config) -> str:
    """All settings as YAML, which `--config` reads back."""
    plain = dataclasses.asdict(config, dict_factory=lambda items: {k: _listed(v) for k, v in items})
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read(argv: list[str]) -> Config:
    for argument in argv:
        if argument.startswith("--"):
            _check_option(argument[2:].partition("=")[0])
    parser = _parser()
    try:
        found = parser.instantiate(parser.parse_args(argv))
    except ArgumentError as error:
        raise ConfigError(_explain(str(error))) from error
    return Config(**{field.name: found[field.name] for field in dataclasses.fields(Config)})


def _parser() -> ArgumentParser:
    # the sentinel tells a null in a file from a setting that the file leaves out
    set_parsing_settings(docstring_parse_attribute_docstrings=True, unset_sentinel=True)
    parser = ArgumentParser(usage=USAGE, exit_on_error=False, allow_abbrev=False)
    presets = ", ".join(_presets())
    parser.add_argument(
        "--config",
        action=_ConfigFile,
        metavar="PRESET|FILE",
        help=f"A preset ({presets}) or a YAML file. May be given again; what comes later wins.",
    )
    parser.add_argument("--local_rank", type=int, help=SUPPRESS)  # the deepspeed launcher adds it
    parser.add_class_arguments(Config)
    for action in parser._actions:
        if action.dest in GROUPS:
            action.help = SUPPRESS  # `--ppo FILE`: one way to give settings is enough
    return parser


class _ConfigFile(ActionConfigFile):
    """jsonargparse's `--config`, for presets by name too, and with keys checked by us."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, cfg, str(_checked_file(values)), option_string)  # type: ignore[no-untyped-call]


def _presets() -> dict[str, Path]:
    folder = Path(str(files("fastppo"))) / "presets"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _checked_file(name: str) -> Path:
    """The YAML file of a preset or path, once it can be read and every key in it is known."""
    presets = _presets()
    path = presets.get(name, Path(name))
    try:
        tree = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise ConfigError(
            f"--config {name}: there is no such file, and no such preset. The presets: {', '.join(presets)}."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {name}: the file cannot be read ({error}).") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}, line {line}: this is not YAML ({error.problem}).") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ConfigError(f"{path}: this is not YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(tree, yaml.MappingNode):
        raise ConfigError(f"{path}, line 1: a config is a mapping from settings to values, as in `steps: 100`.")
    _check_keys(tree, "", path)
    return path


def _check_keys(node: yaml.Node, prefix: str, path: Path) -> None:
    """Walks a mapping, or the items of a list of mappings; jsonargparse checks the values later."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, prefix, path)
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        name, line = prefix + str(key.value), key.start_mark.line + 1
        if name in seen:
            raise ConfigError(f"{path}, line {line}: {name} is set twice.")
        seen.add(name)
        if name in GROUPS and not isinstance(value, yaml.MappingNode):
            raise ConfigError(f"{path}, line {line}: {name} is a group of settings; write them below it, indented.")
        if name not in GROUPS and name not in SETTINGS:
            raise ConfigError(f"{path}, line {line}: {_unknown(name)}")
        if name in GROUPS or name in LISTS:
            _check_keys(value, name + ".", path)


def _check_option(name: str) -> None:
    if name in GROUPS:
        example = next(setting for setting in SETTINGS if setting.startswith(name + "."))
        raise ConfigError(f"--{name} is a group of settings; give each by its own name, as in --{example}.")
    if name not in SETTINGS and name not in OTHER_OPTIONS and name.removesuffix(".help") not in LISTS:
        raise ConfigError(_unknown(name))
    group, _, field = name.rpartition(".")
    if group in LISTS and name in SETTINGS:
        raise ConfigError(f"--{name}: {group} is a list; give all of it, as in --{group} '[{{\"{field}\": ...}}]'.")


def _unknown(name: str) -> str:
    last = name.rpartition(".")[2]
    near = [known for known in SETTINGS if known.rpartition(".")[2] == last and known != name]
    near = near or difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.5)
    return f"unknown setting {name}; " + (f"did you mean {' or '.join(near)}?" if near else "--help lists them all.")


def _explain(message: str) -> str:
    """jsonargparse's message about a wrong value in our words; as it is if it says something else."""
    name = ".".join(re.findall(r'Parser key "([\w.]+)"', message))
    if unknown := re.search(r"Option '([^']+)' is not accepted", message):
        return _unknown(f"{name}.{unknown[1]}")
    if missing := re.search(r"the following arguments are required: (.+)", message):
        return f"an item of {name} lacks {missing[1].strip()}, which has no default."
    value = re.findall(r"(?:Got|Given) value: (.*)", message, re.DOTALL)
    if name in SETTINGS and value:
        text = value[-1].strip()
        text = {"": "empty", "None": "null", "True": "true", "False": "false"}.get(text, text)
        return f"{name} is {text}; it must be {_allowed(SETTINGS[name])}."
    return " ".join(message.split())


def _allowed(kind: Any) -> str:
    """What a value of this type may be, in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(str(argument) for argument in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_allowed(argument) for argument in arguments)
    if origin is tuple:
        item = arguments[0]
        fields = [field.name for field in dataclasses.fields(item)] if dataclasses.is_dataclass(item) else None
        what = f"mappings with {', '.join(fields)}" if fields else WORDS[item].partition(" ")[2] + "s"
        return f"a list of {what}" if arguments[-1] is ... else f"a list of {len(arguments)} {what}"
    return WORDS[kind]


def _fields(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of every setting and of every group of settings."""
    for name, hint in get_type_hints(kind).items():
        yield prefix + name, hint
        item = get_args(hint)[0] if get_origin(hint) is tuple else hint
        if dataclasses.is_dataclass(item):
            yield from _fields(item, f"{prefix}{name}.")


WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}
GROUPS = {name for name, kind in _fields(Config) if dataclasses.is_dataclass(kind)}
SETTINGS = {name: kind for name, kind in _fields(Config) if name not in GROUPS}
LISTS = {name for name in SETTINGS if any(other.startswith(name + ".") for other in SETTINGS)}  # lists of mappings
