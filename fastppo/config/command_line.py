"""The command line: presets, YAML files and single settings, from the left to the right, into a command's config.

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
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings  # type: ignore[attr-defined]

from fastppo.config.commands.generate import GenerateConfig
from fastppo.config.commands.offline import DPOConfig, RewardTrainingConfig, SFTConfig
from fastppo.config.commands.ppo import AnyConfig, Config
from fastppo.config.commands.rest import RestConfig
from fastppo.config.dtype import with_settled_dtype
from fastppo.config.launch import LaunchError, check_launch, first_of_many
from fastppo.config.validation import validate
from fastppo.config.validation.generate import validate_generate
from fastppo.config.validation.offline import validate_dpo, validate_reward, validate_sft
from fastppo.config.validation.rest import validate_rest
from fastppo.errors import ConfigError

OTHER_OPTIONS = ("help", "config", "print_config", "local_rank")

C = TypeVar("C", bound=AnyConfig)


@dataclasses.dataclass(frozen=True)
class Command(Generic[C]):
    """A program that runs on ranks: where it is, which settings it takes, and which of them can work together."""

    name: str  # as in `fastppo NAME`
    module: str  # its `main(argv)` is one rank of it
    line: str  # of `fastppo --help`
    root: type[C]  # its config class, which says what else there is to know of it
    check: Callable[[C, int], None]  # (config, ranks); raises ConfigError
    suffix: str = ""  # its presets end so

    @property
    def script(self) -> str:
        """Its path in a clone."""
        return f"{self.module.replace('.', '/')}.py"

    @property
    def call(self) -> str:
        """How it is started here: by its script in a clone, by its name where there is none or it was begun so."""
        begun = Path(sys.argv[0] if sys.argv else "")
        named = begun.name == "fastppo" or begun.parts[-2:] == ("fastppo", "__main__.py")
        return f"fastppo {self.name}" if named or not Path(self.script).is_file() else f"deepspeed {self.script}"

    @cached_property
    def groups(self) -> set[str]:
        return {name for name, kind in _fields(self.root) if dataclasses.is_dataclass(kind)}

    @cached_property
    def settings(self) -> dict[str, Any]:
        return {name: kind for name, kind in _fields(self.root) if name not in self.groups}

    @cached_property
    def lists(self) -> set[str]:
        """Lists of mappings."""
        return {name for name in self.settings if any(other.startswith(name + ".") for other in self.settings)}

    @property
    def presets(self) -> dict[str, Path]:
        return {name: path for name, path in _presets().items() if _command_of(name) is self}


PPO = Command("train", "fastppo.train", "PPO: train a language model with rewards", Config, validate)
SFT = Command(
    "sft", "fastppo.train_sft", "supervised fine-tuning on prompts and responses", SFTConfig, validate_sft, "-sft"
)
REWARD = Command(
    "reward",
    "fastppo.train_reward",
    "train a reward model on preference pairs",
    RewardTrainingConfig,
    validate_reward,
    "-reward",
)
DPO = Command(
    "dpo",
    "fastppo.train_dpo",
    "train a language model on preference pairs, without rewards",
    DPOConfig,
    validate_dpo,
    "-dpo",
)
REST = Command(
    "rest",
    "fastppo.train_rest",
    "ReST and rejection sampling: fine-tune a language model on its best responses",
    RestConfig,
    validate_rest,
    "-rest",
)
GENERATE = Command(
    "generate",
    "fastppo.generate",
    "draw responses from a model, and score them",
    GenerateConfig,
    validate_generate,
    "-generate",
)
COMMANDS: dict[str, Command[Any]] = {command.name: command for command in (PPO, SFT, REWARD, DPO, REST, GENERATE)}


def command_of(config: AnyConfig) -> Command[Any]:
    """The command that has such settings."""
    return next(command for command in COMMANDS.values() if command.root is type(config))


def parse(
    argv: list[str] | None = None,
    command: Command[C] = PPO,  # type: ignore[assignment]
    ranks: int | None = None,
    *,
    gpu: bool = False,
) -> C:
    """The checked settings of a run; `argv` is `sys.argv[1:]` when left out.

    `--help` prints every setting and exits with 0. A mistake prints one message on stderr and exits with 2.
    The rules between settings hold for so many ranks; when left out, for those in the environment's WORLD_SIZE, which
    must be one that a launcher could have set. gpu: it is for a machine with GPUs, which this one need not be.
    """
    try:
        config = _read(sys.argv[1:] if argv is None else argv, command)
        if ranks is None:
            check_launch()
            ranks = int(os.environ.get("WORLD_SIZE") or "1")
        config = with_settled_dtype(config, gpu=gpu)
        command.check(config, ranks)
    except (ConfigError, LaunchError) as error:
        if first_of_many():  # once, and not once for each rank
            print(f"fastppo: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return config


def dump(config: AnyConfig) -> str:
    """All settings as YAML, which `--config` reads back."""
    plain = dataclasses.asdict(config, dict_factory=lambda items: {k: _listed(v) for k, v in items})
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read(argv: list[str], command: Command[C]) -> C:
    for argument in argv:
        if argument.startswith("--"):
            _check_option(argument[2:].partition("=")[0], command)
    parser = _parser(command, command.call)
    try:
        found = parser.instantiate(parser.parse_args(argv))
    except ArgumentError as error:
        raise ConfigError(_explain(str(error), command)) from error
    return command.root(**{field.name: found[field.name] for field in dataclasses.fields(command.root)})


@cache  # it takes most of the time of reading a command line, and does not change
def _parser(command: Command[Any], call: str) -> ArgumentParser:
    """call: how the command was started, for the first line of `--help`."""
    # the sentinel tells a null in a file from a setting that the file leaves out
    set_parsing_settings(docstring_parse_attribute_docstrings=True, unset_sentinel=True)
    usage = f"{call} --config PRESET|FILE.yaml [--SETTING VALUE ...]"
    parser = ArgumentParser(usage=usage, exit_on_error=False, allow_abbrev=False)
    parser.add_argument(
        "--config",
        action=_ConfigFile,
        command=command,
        metavar="PRESET|FILE",
        help=f"A preset ({', '.join(command.presets)}) or a YAML file. Can be repeated; later values replace earlier ones.",
    )
    parser.add_argument("--local_rank", type=int, help=SUPPRESS)  # the deepspeed launcher adds it
    parser.add_class_arguments(command.root)
    for action in parser._actions:
        if action.dest in command.groups:
            action.help = SUPPRESS  # `--ppo FILE`: one way to give settings is enough
    return parser


class _ConfigFile(ActionConfigFile):
    """jsonargparse's `--config`, for presets by name too, and with keys checked by us."""

    def __init__(self, *, command: Command[Any], **kwargs: Any):
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self._command = command

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        path = _checked_file(values, self._command)
        super().__call__(parser, cfg, str(path), option_string)  # type: ignore[no-untyped-call]


def _presets() -> dict[str, Path]:
    """Those of all commands."""
    folder = Path(str(files("fastppo"))) / "presets"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _command_of(preset: str) -> Command[Any]:
    own = (command for command in COMMANDS.values() if command.suffix and preset.endswith(command.suffix))
    return next(own, PPO)


def _checked_file(name: str, command: Command[Any]) -> Path:
    """The YAML file of a preset or path, once it can be read and every key in it is known."""
    presets = _presets()
    path, known = presets.get(name, Path(name)), ", ".join(command.presets)
    if name in presets and (other := _command_of(name)) is not command:
        raise ConfigError(f"--config {name}: this preset is for {other.call}. The presets of {command.call}: {known}.")
    try:
        tree = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise ConfigError(
            f"--config {name}: there is no such file, and no such preset. The presets: {known}."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {name}: the file cannot be read ({error}).") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}, line {line}: this is not YAML ({error.problem}).") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ConfigError(f"{path}: this is not YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(tree, yaml.MappingNode):
        raise ConfigError(f"{path}, line 1: a config is a mapping from settings to values, as in `seed: 1`.")
    _check_keys(tree, "", path, command)
    return path


def _check_keys(node: yaml.Node, prefix: str, path: Path, command: Command[Any]) -> None:
    """Walks a mapping, or the items of a list of mappings; jsonargparse checks the values later."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, prefix, path, command)
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        name, line = prefix + str(key.value), key.start_mark.line + 1
        if name in seen:
            raise ConfigError(f"{path}, line {line}: {name} is set twice.")
        seen.add(name)
        if name in command.groups and not isinstance(value, yaml.MappingNode):
            raise ConfigError(f"{path}, line {line}: {name} is a group of settings; write them below it, indented.")
        if name not in command.groups and name not in command.settings:
            raise ConfigError(f"{path}, line {line}: {_unknown(name, command)}")
        if name in command.groups or name in command.lists:
            _check_keys(value, name + ".", path, command)


def _check_option(name: str, command: Command[Any]) -> None:
    if name in command.groups:
        example = next(setting for setting in command.settings if setting.startswith(name + "."))
        raise ConfigError(f"--{name} is a group of settings; give each by its own name, as in --{example}.")
    known = name in command.settings or name in OTHER_OPTIONS or name.removesuffix(".help") in command.lists
    if not known:
        raise ConfigError(_unknown(name, command))
    group, _, field = name.rpartition(".")
    if group in command.lists and name in command.settings:
        raise ConfigError(f"--{name}: {group} is a list; give all of it, as in --{group} '[{{\"{field}\": ...}}]'.")


def _unknown(name: str, command: Command[Any]) -> str:
    last = name.rpartition(".")[2]
    near = [known for known in command.settings if known.rpartition(".")[2] == last and known != name]
    near = near or difflib.get_close_matches(name, command.settings, n=1, cutoff=0.5)
    others = [f"fastppo {other.name}" for other in COMMANDS.values() if name in other.groups | other.settings.keys()]
    elsewhere = f", which belongs to {', '.join(others)}" if others else ""
    advice = f"did you mean {' or '.join(near)}?" if near else "--help lists them all."
    return f"unknown setting {name}{elsewhere}; {advice}"


def _explain(message: str, command: Command[Any]) -> str:
    """jsonargparse's message about a wrong value in our words; as it is if it says something else."""
    name = ".".join(re.findall(r'Parser key "([\w.]+)"', message))
    if unknown := re.search(r"Option '([^']+)' is not accepted", message):
        return _unknown(f"{name}.{unknown[1]}", command)
    if missing := re.search(r"the following arguments are required: (.+)", message):
        return f"an item of {name} lacks {missing[1].strip()}, which has no default."
    value = re.findall(r"(?:Got|Given) value: (.*)", message, re.DOTALL)
    if name in command.settings and value:
        text = value[-1].strip()
        text = {"": "empty", "None": "null", "True": "true", "False": "false"}.get(text, text)
        return f"{name} is {text}; it must be {_allowed(command.settings[name])}."
    return " ".join(message.split())


def _allowed(kind: Any) -> str:
    """What a value of this type may be, in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(str(argument) for argument in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_allowed(argument) for argument in arguments)
    if origin is dict:
        return """a mapping from names to values, as in '{"enable_thinking": false}'"""
    if origin is tuple:
        item = arguments[0]
        fields = [field.name for field in dataclasses.fields(item)] if dataclasses.is_dataclass(item) else None
        what = (
            f"mappings with {', '.join(fields)}" if fields else ITEMS.get(item) or WORDS[item].partition(" ")[2] + "s"
        )
        return f"a list of {what}" if arguments[-1] is ... else f"a list of {len(arguments)} {what}"
    return WORDS[kind]


def _fields(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of every setting and of every group of settings."""
    hints = get_type_hints(kind)
    for name, hint in ((field.name, hints[field.name]) for field in dataclasses.fields(kind)):
        yield prefix + name, hint
        item = get_args(hint)[0] if get_origin(hint) is tuple else hint
        if dataclasses.is_dataclass(item):
            yield from _fields(item, f"{prefix}{name}.")


ITEMS = {dict[str, Any]: "mappings"}
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}
