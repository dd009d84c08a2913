"""All commands under one name: `fastppo train --config quickstart`, or `python -m fastppo train ...` for the same.

A command that trains runs on ranks, as `deepspeed --module fastppo.train ...` does. The launcher of DeepSpeed runs in
this process, as it does in that of the script `deepspeed`, with one difference: SIGTERM and SIGINT reach the ranks,
which save the run. By itself the launcher would end alone and leave them at work.
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
    """What is run for a name on the command line."""

    module: str  # its `main(argv)` does it, on one rank or alone
    line: str  # of --help
    trains: Command[Any] | None = None  # on ranks


OTHERS = {
    "plan": Program("fastppo.plan", "the memory of a run, before anything is loaded"),
    "report": Program("fastppo.report.__main__", "a run, or two, as one HTML file"),
    "serve-reward": Program("fastppo.serve_reward", "a reward model as a service"),
}

LAUNCHER = """\
Flags of DeepSpeed's launcher come first, before all settings:

  fastppo {name} --num_gpus 4 --config my_run.yaml

`deepspeed --help` lists them. Without one, each GPU of this machine is a rank. SIGTERM and Ctrl-C let the run save
itself, and `--resume auto` goes on from there. What follows them are settings:
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
    return "\n".join([start, *lines, "\n`fastppo COMMAND --help` tells what each takes."])


def exit_with_usage(name: str) -> None:
    """Says what is wrong with the name of a command and leaves with status 2."""
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
    """Run a command on ranks, and exit as DeepSpeed's launcher does: with 0 where all ranks did."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _tell_ranks)
    from deepspeed.launcher import runner

    flags, settings = split(name, args, launcher_flags())
    try:
        runner.main([*flags, "--module", programs()[name].module, *settings])
    except (AssertionError, OSError, RuntimeError, ValueError) as error:  # the launcher's own; it runs nothing of ours
        print(f"fastppo: DeepSpeed's launcher cannot start the ranks: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def split(name: str, args: list[str], flags: dict[str, bool]) -> tuple[list[str], list[str]]:
    """The launcher's flags, which come first, and the settings behind them.

    flags: those of the launcher, and whether each takes a value. Exits with 2 where one stands behind a setting.
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
    """Every flag of DeepSpeed's launcher, and whether it takes a value; as its parser knows them."""
    from deepspeed.launcher import runner

    def caught(parser: Any, *_: Any, **__: Any) -> Any:  # that parser lives within a function, which returns this
        return parser

    parse_args = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = caught  # type: ignore[assignment, method-assign]
    try:
        parser = runner.parse_args([])
    finally:
        argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]
    return {flag: action.nargs != 0 for action in parser._actions for flag in action.option_strings}


def _tell_ranks(number: int, _: FrameType | None) -> None:
    """SIGTERM to each rank; where there is none yet, to what would start them, and the signal's usual end here.

    One Ctrl-C reaches the ranks of a terminal beside this process, and a second SIGINT would end them unsaved: SIGTERM
    never does. On several nodes by `pdsh` DeepSpeed has put its own handlers in the place of this one.
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
