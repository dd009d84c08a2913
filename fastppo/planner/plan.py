"""Whether a run fits a machine: what its roles hold, against the memory that there is."""

from __future__ import annotations

from dataclasses import dataclass

from fastppo.config import AnyConfig
from fastppo.planner.machine import CONTEXT, Machine
from fastppo.planner.memory import Places, Role, Share, by_phase
from fastppo.planner.methods import measured_roles, method_of

# What a process takes before it holds a tensor: Python and the libraries, on a GPU the CUDA context and NCCL.
PROCESS_HOST, PROCESS_GPU = 1 << 30, CONTEXT
# The part of a GPU that PyTorch's allocator can fill; the rest is lost between blocks of different sizes.
FILLED = 0.95


@dataclass(frozen=True)
class Plan:
    config: AnyConfig
    machine: Machine
    shares: list[Share]

    @property
    def peak(self) -> tuple[str, Places]:
        """The phase in which a rank's GPU holds most (on the CPU: the rank), and what it holds then."""
        return max(by_phase(self.shares), key=lambda item: item[1].gpu.total + self._on_cpu(item[1]))

    def _on_cpu(self, places: Places) -> int:
        return places.host.total if self.machine.gpu is None else 0

    @property
    def needs(self) -> dict[str, tuple[int, int]]:
        """Bytes needed and bytes there are: of a GPU, of a node's memory, of a node's NVMe."""
        machine, most = self.machine, list(by_phase(self.shares))
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


def make_plan(config: AnyConfig, machine: Machine, roles: list[Role] | None = None) -> Plan:
    """roles: the roles, where they are at hand. Raises ModelError where a model's config cannot be read."""
    if roles is None:
        roles = measured_roles(config, cpu=machine.gpu is None)
    return Plan(config, machine, method_of(config).shares(roles, config, machine.ranks))
