"""Whether a run fits a machine: what its roles hold, against the memory that there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from fastppo.config import AnyConfig, GenerateConfig, OfflineConfig, OnlineConfig, ResponseSettings
from fastppo.planner import generation_memory, offline_memory, online_memory
from fastppo.planner.machine import CONTEXT, Machine
from fastppo.planner.memory import Change, Places, Role, Share, by_phase
from fastppo.planner.meta_models import generation_roles, offline_roles, online_roles
from fastppo.planner.vllm_memory import VllmMemory, samples_with_vllm, vllm_memory

# What a process takes before it holds a tensor: Python and the libraries, on a GPU the CUDA context and NCCL.
PROCESS_HOST, PROCESS_GPU = 1 << 30, CONTEXT
# The part of a GPU that PyTorch's allocator can fill; the rest is lost between blocks of different sizes.
FILLED = 0.95
VLLM = "vLLM"  # of what it may take, in `Plan.needs`


class Method(NamedTuple):
    """What the plan knows of a kind of run. Each function takes the settings of that kind."""

    roles: Callable[..., list[Role]]  # (config, *, cpu), on the meta device
    shares: Callable[[list[Role], Any, int], list[Share]]  # (roles, config, ranks): bytes by role and phase
    smaller_passes: Callable[[Any], Iterator[Change]]
    asks_frozen_roles: Callable[[Any], bool]  # whether there are models that only answer
    # The role that responses are drawn from and the most that are drawn together, over all ranks; None: none are drawn.
    sampled: Callable[[Any], tuple[str, int]] | None = None


METHODS = {
    OnlineConfig: Method(
        online_roles,
        online_memory.shares,
        online_memory.smaller_passes,
        asks_frozen_roles=lambda config: True,
        sampled=lambda config: ("actor", max(config.drawn_together, config.eval.prompts)),
    ),
    OfflineConfig: Method(
        offline_roles,
        offline_memory.shares,
        offline_memory.smaller_passes,
        asks_frozen_roles=lambda config: config.frozen_model is not None,
    ),
    GenerateConfig: Method(
        generation_roles,
        generation_memory.shares,
        generation_memory.smaller_passes,
        asks_frozen_roles=lambda config: True,
        sampled=lambda config: (generation_memory.SAMPLED, config.batch_size),
    ),
}


def method_of(config: AnyConfig) -> Method:
    """That of the settings' class, or of the class that it is derived from."""
    return next(METHODS[kind] for kind in type(config).__mro__ if kind in METHODS)


def measured_roles(config: AnyConfig, *, cpu: bool) -> list[Role]:
    """The roles of a run. cpu: whether it is on the CPU. Raises ModelError where a model's config cannot be read."""
    return method_of(config).roles(config, cpu=cpu)


@dataclass(frozen=True)
class Plan:
    config: AnyConfig
    machine: Machine
    shares: list[Share]
    vllm: VllmMemory | None = None  # if it draws the responses

    @property
    def peak(self) -> tuple[str, Places]:
        """The phase in which a rank's GPU holds most (on the CPU: the rank), and what it holds then."""
        return max(by_phase(self.shares), key=lambda item: item[1].gpu.total + self._on_cpu(item[1]))

    def _on_cpu(self, places: Places) -> int:
        return places.host.total if self.machine.gpu is None else 0

    def _in_host(self, places: Places) -> int:
        return places.host.total + (places.gpu.total if self.machine.gpu is None else 0)

    @property
    def needs(self) -> dict[str, tuple[int, int]]:
        """Bytes needed and bytes there are: of a GPU, of a node's memory, of a node's NVMe, of what vLLM may take."""
        machine, most = self.machine, list(by_phase(self.shares))
        gpu = max(places.gpu.total for _, places in most)
        others = dict(by_phase([share for share in self.shares if not share.first]))
        host = max(self._in_host(p) + (machine.gpus - 1) * self._in_host(others[phase]) for phase, p in most)
        nvme = max(places.nvme.total for _, places in most)
        found = {"host": (host + machine.gpus * PROCESS_HOST, machine.host)}
        if machine.gpu is not None:
            found = {"GPU": (gpu, int(FILLED * (machine.gpu - PROCESS_GPU)))} | found
        if machine.nvme is not None:
            found["NVMe"] = (machine.gpus * nvme, machine.nvme)
        if self.vllm is not None:
            found[VLLM] = self.vllm.needs
        return found

    @property
    def fits(self) -> bool:
        return all(needed <= there for needed, there in self.needs.values())


def make_plan(config: AnyConfig, machine: Machine, roles: list[Role] | None = None) -> Plan:
    """roles: the roles, where they are at hand. Raises ModelError where a model's config cannot be read."""
    method = method_of(config)
    if roles is None:
        roles = measured_roles(config, cpu=machine.gpu is None)
    shares = method.shares(roles, config, machine.ranks)
    if method.sampled is None or not samples_with_vllm(drawing := cast(ResponseSettings, config)):
        return Plan(config, machine, shares)
    name, responses = method.sampled(config)
    size = next(role.size for role in roles if role.name == name)
    places = dict(by_phase(shares))["sampling"]
    beside = PROCESS_HOST + places.host.total + places.gpu.total - places.gpu.passing.total
    vllm = vllm_memory(size, drawing, responses, machine, beside)
    return Plan(config, machine, shares + vllm.shares(dict.fromkeys(share.phase for share in shares)), vllm)
