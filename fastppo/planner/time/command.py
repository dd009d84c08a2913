"""What `python -m fastppo.plan` does with `--time`, `--constants`, `--node` and `--measure`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from rich.console import Console

from fastppo.config import AnyConfig
from fastppo.distributed import World
from fastppo.errors import FastPPOError
from fastppo.planner.constants.measure import check_writable, measure
from fastppo.planner.constants.nodes import constants_of, node_named
from fastppo.planner.constants.values import Constants, read_constants
from fastppo.planner.machine import Machine, parse_count
from fastppo.planner.plan import Plan, make_plan
from fastppo.planner.time.phases import Lengths
from fastppo.planner.time.predict import kernels_of, lengths_of, predict
from fastppo.planner.time.table import print_line, show_constants, show_step


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--time", action="store_true", help="model the seconds of a step, too, from constants")
    options.add_argument(
        "--constants", type=Path, metavar="FILE", help="constants of a machine, as --measure writes them"
    )
    options.add_argument("--node", metavar="NAME", help="a node by its datasheet: a100, h100, h200 or b200")
    options.add_argument("--measure", type=Path, metavar="FILE", help="measure the constants of this machine")
    options.add_argument("--prompt-tokens", type=parse_count, metavar="N", help="mean length of prompts")
    options.add_argument("--response-tokens", type=parse_count, metavar="N", help="mean length of responses")
    options.add_argument(
        "--reward-seconds", type=_seconds, default=0.0, metavar="S", help="of functions and services in a step"
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or more")
    return seconds


def check_options(given: argparse.Namespace) -> None:
    """Raises FastPPOError for options that have no effect together."""
    sources = [name for name in ("constants", "node", "measure") if getattr(given, name) is not None]
    if given.time and not sources:
        raise FastPPOError(
            "--time needs the constants of a machine: --node h100 takes them from a datasheet, --measure FILE measures"
            " this machine, and --constants FILE reads what was measured."
        )
    if given.time and len(sources) > 1:
        raise FastPPOError(f"--{sources[0]} and --{sources[1]} both give the constants; leave one out.")
    if given.constants is not None and not given.time:
        raise FastPPOError("--constants has no effect without --time.")
    if given.node is not None:
        node_named(given.node)
    if given.measure is not None:
        check_writable(given.measure)


def machine_of(given: argparse.Namespace) -> Machine | None:
    """The nodes that `--node` names, with what else is given; None without it."""
    if given.node is None:
        return None
    node = node_named(given.node)
    gpu, host = given.gpu_memory or node.gpu_memory, given.host_memory or node.host_memory
    return Machine(given.gpus or node.gpus, given.nodes, gpu, host, given.nvme)


def timing_of(given: argparse.Namespace, config: AnyConfig, machine: Machine) -> tuple[Constants, Lengths] | None:
    """What the seconds of a plan depend on beside it; None without `--time`. Raises FastPPOError."""
    if not given.time:
        return None
    return _constants(given, machine), lengths_of(
        config, given.prompt_tokens, given.response_tokens, given.reward_seconds
    )


def _constants(given: argparse.Namespace, machine: Machine) -> Constants:
    """Those of a file or of a datasheet."""
    constants = read_constants(given.constants) if given.constants is not None else constants_of(given.node)
    if constants.cpu != (machine.gpu is None):
        kinds = ("a CPU", "GPUs") if constants.cpu else ("GPUs", "a CPU")
        raise FastPPOError(
            f"{constants.origin} has constants of {kinds[0]}, and this plan is for {kinds[1]} (--gpu-memory says how"
            " large GPUs are)."
        )
    return constants


def show_time(plan: Plan, constants: Constants, lengths: Lengths, console: Console) -> None:
    """The constants, and the seconds of a step. Raises FastPPOError."""
    step = predict(plan, constants, lengths)
    peak = constants["products_bf16" if plan.config.optim.dtype == "bf16" else "products_fp32"]
    show_constants(constants, step.work, console)
    show_step(step, lengths, peak, console)
    print_line(console, "modelled from these constants, and not measured (docs/cost-model.md)")


def measure_machine(
    given: argparse.Namespace, config: AnyConfig | None, machine: Machine, world: World, console: Console
) -> None:
    """Measure this machine and write the file; with a run's settings its kernels, too, and with `--time` its seconds.
    All ranks call it. Raises FastPPOError."""
    if config is None:
        constants = measure(given.measure, world, None)
        if world.rank == 0:
            show_constants(constants, None, console)
    else:
        lengths = lengths_of(config, given.prompt_tokens, given.response_tokens, given.reward_seconds)
        plan = make_plan(config, machine)
        work = kernels_of(plan, lengths)
        constants = measure(given.measure, world, work)
        if world.rank == 0 and given.time:
            show_time(plan, constants, lengths, console)
        elif world.rank == 0:
            show_constants(constants, work, console)
    if world.rank == 0:
        print_line(console, f"written to {given.measure}")
