"""Whether a run fits a machine: what its roles hold, against the memory that there is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from fastppo.config import AnyConfig
from fastppo.planner.machine import CONTEXT, Machine
from fastppo.planner.memory import Places, Role, Share, by_phase
from fastppo.planner.methods import measured_roles, method_of
from fastppo.rollout import bucket

C = TypeVar("C", bound=AnyConfig)

# What a process takes before it holds a tensor: Python and the libraries, on a GPU the CUDA context and NCCL.
PROCESS_HOST, PROCESS_GPU = 1 << 30, CONTEXT
# The part of a GPU that PyTorch's allocator can fill; the rest is lost between blocks of different sizes.
FILLED = 0.95
# The most that `sampling.rows: auto` chooses on a CPU: a step of more rows takes as much longer there. On one thread
# SmolLM2-135M in bf16 draws 165 tokens a second through 16 rows, 278 through 32, 287 through 64 and 201 through 128.
CPU_ROWS = 64


@dataclass(frozen=True)
class Plan:
    config: AnyConfig
    machine: Machine
    shares: list[Share]
    rows: int | None = None  # that the plan has chosen, where `sampling.rows` is auto

    @property
    def peak(self) -> tuple[str, Places]:
        """The phase in which a rank's GPU holds most (on the CPU: the rank), and what it holds then."""
        return max(by_phase(self.shares), key=lambda item: item[1].gpu.total + self._on_cpu(item[1]))

    def _on_cpu(self, places: Places) -> int:
        return places.host.total if self.machine.gpu is None else 0

    @property
    def needs(self) -> dict[str, tuple[int, int]]:
        """Bytes needed and bytes there are: of a GPU, of a node's memory, of a node's NVMe."""
        return self._needs(self.shares)

    def _needs(self, shares: list[Share]) -> dict[str, tuple[int, int]]:
        machine, most = self.machine, list(by_phase(shares))
        gpu = max(places.gpu.total for _, places in most)
        host = max(places.host.total + (places.gpu.total if machine.gpu is None else 0) for _, places in most)
        nvme = max(places.nvme.total for _, places in most)
        found = {"host": (machine.gpus * (host + PROCESS_HOST), machine.host)}
        if machine.gpu is not None:
            found = {"GPU": (gpu, int(FILLED * (machine.gpu - PROCESS_GPU)))} | found
        if machine.nvme is not None:
            found["NVMe"] = (machine.gpus * nvme, machine.nvme)
        return found

    @property
    def fits(self) -> bool:
        return all(needed <= there for needed, there in self.needs.values())

    def fits_in(self, phase: str) -> bool:
        """Whether there is room for one phase, whatever the others need."""
        shares = [share for share in self.shares if share.phase == phase]
        return all(needed <= there for needed, there in self._needs(shares).values())


def make_plan(config: AnyConfig, machine: Machine, roles: list[Role] | None = None) -> Plan:
    """The plan, with the most rows that fit where `sampling.rows` is auto.

    roles: the roles, where they are at hand. Raises ModelError where a model's config cannot be read.
    """
    if roles is None:
        roles = measured_roles(config, cpu=machine.gpu is None)
    if not rows_are_open(config):
        return Plan(config, machine, method_of(config).shares(roles, config, machine.ranks))
    drawn = method_of(config).drawn(config, machine.ranks)
    if machine.gpu is None:
        drawn = min(drawn, CPU_ROWS)
    sizes = sorted({bucket(rows) for rows in range(1, drawn + 1)})
    plans = [replace(make_plan(with_rows(config, rows), machine, roles), rows=rows) for rows in sizes]
    best = plans[0]
    for plan in plans[1:]:  # what does not fit with the fewest rows either is no matter of rows
        if plan.fits if plans[0].fits else plan.fits_in("sampling"):
            best = plan
    return best


def rows_are_open(config: AnyConfig) -> bool:
    """Whether the plan is to choose the number of rows that are decoded together."""
    sampling = getattr(config, "sampling", None)
    return sampling is not None and sampling.rows == "auto"


def with_rows(config: C, rows: int) -> C:
    settings: Any = config
    return cast(C, replace(settings, sampling=replace(settings.sampling, rows=rows)))
