"""Constants of a machine: how fast it computes and moves, each with its source and the part of it that is reached."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fastppo.errors import FastPPOError
from fastppo.planner.time.work import Call, Work

# By name: the unit, and what it is. Those of a rank hold while all ranks of its node do the same.
NAMES = {
    "products_bf16": ("FLOP/s", "matrix products in bf16 of a rank"),
    "products_fp32": ("FLOP/s", "matrix products in fp32 of a rank"),
    "attention": ("FLOP/s", "attention of whole sequences of a rank"),
    "memory": ("B/s", "memory that kernels of a rank read and write"),
    "decode": ("B/s", "keys and values that decode steps of a rank read"),
    "launch": ("s", "of the host for a kernel, with the Python around it"),
    "gap": ("s", "on a GPU between a kernel and the next one"),
    "graph_gap": ("s", "the same in a CUDA graph, where the host launches nothing"),
    "adam": ("B/s", "states of AdamW that a rank reads and writes where it computes"),
    "host_adam": ("B/s", "states of AdamW that the CPUs of a node read and write, for all its ranks"),
    "pcie": ("B/s", "between a GPU and the host's pinned memory, each way"),
    "nvme": ("B/s", "NVMe of a node, for all its ranks"),
    "link": ("B/s", "that a rank sends to others of its node in collectives"),
    "link_latency": ("s", "of a collective within a node"),
    "network": ("B/s", "that a rank sends to other nodes in collectives, its share of its node's adapters"),
    "network_latency": ("s", "that each doubling of the nodes adds to a collective"),
    "zero3_module": ("s", "of the host for a module whose weights ZeRO-3 gathers, forward or backward"),
    "hidden": ("", "share of ZeRO's collectives and copies that can run beside computing"),
}
MAY_BE_0 = frozenset({"gap", "graph_gap", "launch", "link_latency", "network_latency", "zero3_module", "hidden"})


class ConstantsError(FastPPOError):
    """Constants that cannot be read, or lack what a plan needs."""


class Constant(NamedTuple):
    value: float
    source: str
    efficiency: float = 1.0  # the part of the value that is reached

    @property
    def reached(self) -> float:
        return self.value * self.efficiency


@dataclass(frozen=True)
class Seconds:
    """Of a phase, by what takes them. They add up; what runs beside something else is subtracted in `hidden`."""

    parts: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Seconds) -> Seconds:
        names = dict.fromkeys((*self.parts, *other.parts))
        return Seconds({name: self.parts.get(name, 0.0) + other.parts.get(name, 0.0) for name in names})

    def __rmul__(self, factor: float) -> Seconds:
        return Seconds({name: factor * x for name, x in self.parts.items()})

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def of(self, *names: str) -> float:
        return sum(self.parts.get(name, 0.0) for name in names)


@dataclass(frozen=True)
class Constants:
    """Of one machine."""

    name: str  # of the machine, for people
    cpu: bool  # whether ranks compute on its CPU, where kernels run one after another as the host calls them
    values: Mapping[str, Constant]
    kernels: Mapping[str, float] = field(default_factory=dict, repr=False)  # measured seconds, by the name of a `Call`
    origin: str = ""  # the file or the table, for errors

    def __getitem__(self, name: str) -> float:
        """Raises ConstantsError where it is not known."""
        if name not in self.values:
            unit, meaning = NAMES[name]
            raise ConstantsError(
                f"{self.origin} has no constant {name} ({unit + ', ' if unit else ''}{meaning}), which this plan needs."
                f" Add `{name}: {{value: ..., source: ...}}` to the constants of the file, or measure on a machine that"
                " has it (--measure)."
            )
        return self.values[name].reached

    def of_call(self, call: Call) -> float:
        """Seconds of a kernel: as measured, else its bytes or its FLOP, whichever take longer."""
        known = self.kernels.get(call.name)
        if known is not None:
            return known
        if call.kind == "products":
            rate = self["products_bf16" if call.dtype.itemsize < 4 else "products_fp32"]
            return max(call.flops / rate, call.moved / self["memory"])
        if call.kind == "attention" and call.name.startswith(DECODING):
            return call.moved / self["decode"]
        if call.kind == "attention":
            return max(call.flops / self["attention"], call.moved / self["memory"])
        return call.moved / self["memory"]

    def of_work(self, work: Work, *, in_graph: bool = False) -> Seconds:
        """Seconds of kernels, and what lies between them. On a GPU the host launches the next ones meanwhile."""
        kinds = {"products": 0.0, "attention": 0.0, "memory": 0.0}
        for call, times in work.calls.items():
            kinds[call.kind] += times * self.of_call(call)
        count = work.kernels
        if self.cpu:
            between = count * self["launch"]
        elif in_graph:
            between = count * self["graph_gap"]
        else:
            own = sum(kinds.values()) + count * self["gap"]
            between = max(own, count * self["launch"]) - sum(kinds.values())
        return Seconds(kinds | {"launches": between})


DECODING = ("fastppo.attend_cached", "attention_cached")


def read_constants(path: Path) -> Constants:
    """From a file that `write_constants` or a user wrote. Raises ConstantsError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConstantsError(f"--constants {path} cannot be read ({' '.join(str(error).split())}).") from None
    if not isinstance(content, dict) or not isinstance(content.get("constants"), dict):
        raise ConstantsError(
            f"--constants {path} has no table `constants` by name; --measure {path} writes such a file."
        )
    where = f"--constants {path}"
    values = {name: _constant(where, name, given) for name, given in content["constants"].items()}
    kernels = content.get("kernels") or {}
    if not isinstance(kernels, dict):
        raise ConstantsError(f"{where}: kernels is {kernels!r}; it must be a table of seconds by the name of a kernel.")
    for name, seconds in kernels.items():
        _checked(where, f"kernels: {name}", seconds, least=0.0)
    return Constants(str(content.get("machine", path.name)), bool(content.get("cpu", False)), values, kernels, where)


def write_constants(constants: Constants, path: Path) -> None:
    """Raises ConstantsError where it cannot be written."""
    content = {
        "machine": constants.name,
        "cpu": constants.cpu,
        "constants": {name: _said(constant) for name, constant in constants.values.items()},
        "kernels": dict(constants.kernels),
    }
    try:
        path.write_text(yaml.safe_dump(content, sort_keys=False, width=10**6, allow_unicode=True), encoding="utf-8")
    except OSError as error:
        raise not_writable(path, error) from None


def not_writable(path: Path, error: OSError) -> ConstantsError:
    return ConstantsError(
        f"--measure {path} cannot be written ({error.strerror}). Give it a file in a folder that exists and is yours."
    )


def _said(constant: Constant) -> dict[str, Any]:
    found: dict[str, Any] = {"value": float(f"{constant.value:.4g}"), "source": constant.source}
    return found if constant.efficiency == 1.0 else found | {"efficiency": constant.efficiency}


def _constant(where: str, name: str, given: Any) -> Constant:
    if name not in NAMES:
        raise ConstantsError(f"{where} has a constant {name!r}, which is unknown; known are {', '.join(NAMES)}.")
    given = given if isinstance(given, dict) else {"value": given}
    if unknown := given.keys() - {"value", "efficiency", "source"}:
        raise ConstantsError(
            f"{where}: {name} has {', '.join(sorted(unknown))}; it takes value, efficiency and source."
        )
    value = _checked(where, name, given.get("value"), least=0.0, more=name not in MAY_BE_0)
    if name == "hidden" and value > 1:
        raise ConstantsError(f"{where}: hidden is {value:g}; it is a share, from 0 to 1.")
    efficiency = _checked(where, f"efficiency of {name}", given.get("efficiency", 1.0), least=0.0, more=True)
    if efficiency > 1:
        raise ConstantsError(
            f"{where}: the efficiency of {name} is {efficiency:g}; it is a share of the value, at most 1."
        )
    return Constant(value, str(given.get("source", "given")), efficiency)


def _checked(where: str, name: str, value: Any, *, least: float, more: bool = False) -> float:
    """A number that may stand there: YAML reads 3e12 as text, so text is read as a number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number) or number < least or (more and number == least):
        bound = "above 0" if more else "of 0 or more"
        raise ConstantsError(f"{where}: {name} is {value!r}; it must be a number {bound}.")
    return number
