"""The command `fastppo`: `fastppo train --config quickstart`, or equally `python -m fastppo train ...`.

A training command starts ranks, as `deepspeed --module fastppo.train ...` does. DeepSpeed's launcher runs in this
process, as in the script `deepspeed`. There is one difference: SIGTERM and SIGINT are passed on to the ranks, which
save the run. The script `deepspeed` would end and leave the ranks running.
"""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from types import FrameType
from typing import Any

import psutil

from fastppo import __version__
from fastppo.config import COMMANDS, Command, parse


@dataclass(frozen=True)
class Program:
    """What `fastppo NAME` runs."""

    module: str  # its `main(argv)` is called, in each rank's process or in this one
    line: str  # its description in --help
    trains: Command[Any] | None = None  # training commands only, which run on ranks


OTHERS = {
    "best-of-n": Program("fastppo.best_of_n", "what keeping the best of n responses would give, from scored responses"),
    "plan": Program("fastppo.plan", "predict the memory of a run, without loading weights"),
    "report": Program("fastppo.report.__main__", "write a report of one run or several, as one HTML file"),
    "serve-reward": Program("fastppo.serve_reward", "serve a reward model over HTTP"),
}

LAUNCHER = """\
Flags of DeepSpeed's launcher must come before all settings:

  fastppo {name} --num_gpus 4 --config my_run.yaml

`deepspeed --help` lists these flags. Without them, one rank is started for each GPU of this machine. After SIGTERM or
Ctrl-C the run saves itself and ends; `--resume auto` continues it. The settings are:
"""


def programs() -> dict[str, Program]:
    """All by name; those that train come first."""
    return {name: Program(command.module, command.line, command) for name, command in COMMANDS.items()} | OTHERS


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    name, args = (argv[0], argv[1:]) if argv else ("", [])
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(__version__)
    elif (program := programs().get(name)) is None:
        exit_with_usage(name)
    elif program.trains is None:
        import_module(program.module).main(args)
    elif {"-h", "--help"} & set(args):
        print(LAUNCHER.format(name=name))
        parse(["--help"], program.trains)
    else:
        launch(name, args)


def usage() -> str:
    width = max(map(len, programs()))
    lines = [f"  {name:{width}}  {program.line}" for name, program in programs().items()]
    start = "usage: fastppo COMMAND [ARGUMENT ...]\n\nPPO for language models. The commands:\n"
    return "\n".join([start, *lines, "\n`fastppo COMMAND --help` lists the arguments of a command."])


def exit_with_usage(name: str) -> None:
    """Print what is wrong with the command's name, and exit with status 2."""
    if not name:
        print(usage(), file=sys.stderr)
    elif name.startswith("-"):
        print(f"fastppo: the command comes before {name}, as in `fastppo train {name} ...`.", file=sys.stderr)
    else:
        near = difflib.get_close_matches(name, programs(), n=1)
        way_out = f"did you mean {near[0]}?" if near else f"there are {', '.join(programs())}."
        print(f"fastppo: unknown command {name}; {way_out}", file=sys.stderr)
    raise SystemExit(2)


def launch(name: str, args: list[str]) -> None:
    """Run a training command on ranks. Exits as DeepSpeed's launcher does: with 0 if all ranks exit with 0."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _tell_ranks)
    from deepspeed.launcher import runner

    flags, settings = split(name, args, launcher_flags())
    try:
        runner.main([*flags, "--module", programs()[name].module, *settings])
    except (AssertionError, OSError, RuntimeError, ValueError) as error:  # the launcher's own errors
        print(f"fastppo: DeepSpeed's launcher cannot start the ranks: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def split(name: str, args: list[str], flags: dict[str, bool]) -> tuple[list[str], list[str]]:
    """Split arguments into the launcher's flags, which come first, and the settings after them.

    flags: the launcher's flags, and whether each takes a value. Exits with status 2 if one comes after a setting.
    """
    end = 0
    while end < len(args) and (flag := args[end].partition("=")[0]) in flags:
        end += 1 + (flags[flag] and "=" not in args[end])
    for late in args[end:]:
        if late.startswith("--") and late.partition("=")[0] in flags:
            print(
                f"fastppo: {late} is for DeepSpeed's launcher, whose flags come first:"
                f" `fastppo {name} {late.partition('=')[0]} ... {args[end]} ...`.",
                file=sys.stderr,
            )
            raise SystemExit(2)
    return args[:end], args[end:]


def launcher_flags() -> dict[str, bool]:
    """Every flag of DeepSpeed's launcher, and whether it takes a value, read from the launcher's parser."""
    from deepspeed.launcher import runner

    def caught(parser: Any, *_: Any, **__: Any) -> Any:  # the parser is local to a function; return it
        return parser

    parse_args = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = caught  # type: ignore[assignment, method-assign]
    try:
        parser = runner.parse_args([])
    finally:
        argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]
    return {flag: action.nargs != 0 for action in parser._actions for flag in action.option_strings}


def _tell_ranks(number: int, _: FrameType | None) -> None:
    """Send SIGTERM to each rank. If no rank has started yet, end the launcher, and this process as the signal does.

    It sends SIGTERM and not SIGINT: in a terminal one Ctrl-C already reaches the ranks, and a second SIGINT would end
    them without saving. On several nodes with `pdsh`, DeepSpeed's own handlers replace this one.
    """
    children = psutil.Process().children()
    launchers = [child for child in children if "deepspeed.launcher.launch" in _command_line(child)]
    ranks = [rank for child in launchers for rank in child.children()]
    for process in [*(child for child in children if child not in launchers), *(ranks or launchers)]:
        with suppress(psutil.Error):
            process.terminate()
    if not ranks and children == launchers:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


if __name__ == "__main__":
    main()
