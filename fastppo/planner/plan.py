"""Whether a run fits a machine: what its roles hold, against the memory that there is."""

from __future__ import annotations

from dataclasses import dataclass

from fastppo.config import AnyConfig, Config
from fastppo.planner.machine import CONTEXT, Machine
from fastppo.planner.memory import Member, Places, Share, by_stage
from fastppo.planner.meta_models import cast_of
from fastppo.planner.offline_memory import stage_shares
from fastppo.planner.ppo_memory import shares

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
        """The stage in which a rank's GPU holds most (on the CPU: the rank), and what it holds then."""
        return max(by_stage(self.shares), key=lambda item: item[1].gpu.total + self._on_cpu(item[1]))

    def _on_cpu(self, places: Places) -> int:
        return places.host.total if self.machine.gpu is None else 0

    @property
    def needs(self) -> dict[str, tuple[int, int]]:
        """Bytes needed and bytes there are: of a GPU, of a node's memory, of a node's NVMe."""
        machine, most = self.machine, list(by_stage(self.shares))
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


def make_plan(config: AnyConfig, machine: Machine, members: list[Member] | None = None) -> Plan:
    """members: the roles, where they are at hand. Raises ModelError where a model's config cannot be read."""
    if members is None:
        members = cast_of(config, cpu=machine.gpu is None)
    if isinstance(config, Config):
        return Plan(config, machine, shares(members, config, machine.ranks))
    return Plan(config, machine, stage_shares(members[0], config, machine.ranks))
