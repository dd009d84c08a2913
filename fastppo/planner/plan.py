"""Whether a run fits a machine: what its roles hold, against the memory that there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar, cast

from fastppo.config import AnyConfig, GenerateConfig, OfflineConfig, OnlineConfig, ResponseSettings
from fastppo.models import layers_as
from fastppo.planner import generation_memory, offline_memory, online_memory
from fastppo.planner.machine import CONTEXT, Machine
from fastppo.planner.memory import Change, Places, Role, Share, by_phase
from fastppo.planner.meta_models import generation_roles, offline_roles, online_roles
from fastppo.planner.vllm_memory import VllmMemory, samples_with_vllm, vllm_memory
from fastppo.rollout import bucket

C = TypeVar("C", bound=AnyConfig)

# What a process takes before it holds a tensor: Python and the libraries, on a GPU the CUDA context and NCCL.
PROCESS_HOST, PROCESS_GPU = 1 << 30, CONTEXT
# The part of a GPU that PyTorch's allocator can fill; the rest is lost between blocks of different sizes.
FILLED = 0.95
# The most that `sampling.rows: auto` chooses on a CPU: a step of more rows takes as much longer there. On one thread
# SmolLM2-135M in bf16 draws 165 tokens a second through 16 rows, 278 through 32, 287 through 64 and 201 through 128.
CPU_ROWS = 64
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
    with layers_as(fused=config.model.fused):
        return method_of(config).roles(config, cpu=cpu)


@dataclass(frozen=True)
class Plan:
    config: AnyConfig
    machine: Machine
    shares: list[Share]
    rows: int | None = None  # that the plan has chosen, where `sampling.rows` is auto
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
        return self._needs(self.shares)

    def _needs(self, shares: list[Share]) -> dict[str, tuple[int, int]]:
        machine, most = self.machine, list(by_phase(shares))
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
        return _with_given_rows(config, machine, roles)
    _, responses = cast(Any, method_of(config).sampled)(config)
    drawn = -(-responses // machine.ranks)
    if machine.gpu is None:
        drawn = min(drawn, CPU_ROWS)
    sizes = sorted({bucket(rows) for rows in range(1, drawn + 1)})
    plans = [replace(_with_given_rows(with_rows(config, rows), machine, roles), rows=rows) for rows in sizes]
    best = plans[0]
    for plan in plans[1:]:  # what does not fit with the fewest rows either is no matter of rows
        if plan.fits if plans[0].fits else plan.fits_in("sampling"):
            best = plan
    return best


def _with_given_rows(config: AnyConfig, machine: Machine, roles: list[Role]) -> Plan:
    method = method_of(config)
    shares = method.shares(roles, config, machine.ranks)
    if method.sampled is None or not samples_with_vllm(drawing := cast(ResponseSettings, config)):
        return Plan(config, machine, shares)
    name, responses = method.sampled(config)
    size = next(role.size for role in roles if role.name == name)
    places = dict(by_phase(shares))["sampling"]
    beside = PROCESS_HOST + places.host.total + places.gpu.total - places.gpu.passing.total
    vllm = vllm_memory(size, drawing, responses, machine, beside)
    return Plan(config, machine, shares + vllm.shares(dict.fromkeys(share.phase for share in shares)), vllm=vllm)


def rows_are_open(config: AnyConfig) -> bool:
    """Whether the plan is to choose the number of rows that are decoded together. vLLM has none."""
    if method_of(config).sampled is None:
        return False
    drawing = cast(ResponseSettings, config)
    return drawing.sampling.rows == "auto" and not samples_with_vllm(drawing)


def with_rows(config: C, rows: int) -> C:
    settings: Any = config
    return cast(C, replace(settings, sampling=replace(settings.sampling, rows=rows)))
