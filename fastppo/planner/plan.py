"""Whether a run fits a machine: what its roles hold, against the memory that there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar, cast

from fastppo.config import AnyConfig, GenerateConfig, OfflineConfig, OnlineConfig, ResponseSettings
from fastppo.distributed import PartName, Placement
from fastppo.models import layers_as
from fastppo.planner.machine import CONTEXT, Machine
from fastppo.planner.memory import Bytes, Change, Places, Role, Share, by_phase
from fastppo.planner.meta_models import generation_roles, offline_roles, online_roles
from fastppo.planner.methods import generation, offline, online
from fastppo.planner.placement import beside_computing, choose_placement, described
from fastppo.planner.vllm_memory import VllmMemory, samples_with_vllm, vllm_memory
from fastppo.rollout import bucket

C = TypeVar("C", bound=AnyConfig)

# What a process takes before it holds a tensor: Python and the libraries, on a GPU the CUDA context and NCCL.
PROCESS_HOST, PROCESS_GPU = 1 << 30, CONTEXT
# The part of a GPU that PyTorch's allocator can fill; the rest is lost between blocks of different sizes.
FILLED = 0.95
# What is chosen, of layers that recompute and of parts that stay, fills at most this part of the memory there is: the
# plan is up to a tenth off (bench/plan_accuracy.py), and a choice to be faster should not end a run.
CHOSEN = 0.9
# The most that `sampling.rows: auto` chooses on a CPU: a step of more rows takes as much longer there. On one thread
# SmolLM2-135M in bf16 draws 165 tokens a second through 16 rows, 278 through 32, 287 through 64 and 201 through 128.
CPU_ROWS = 64
VLLM = "vLLM"  # of what it may take, in `Plan.needs`


class Moves(NamedTuple):
    """What the plan knows of a kind of run whose parts may be moved between GPU and host."""

    parts: Callable[[list[Role], Any, int], dict[PartName, Bytes]]  # (roles, config, ranks): with what is on a GPU
    least: Callable[[Any], Placement]  # each part is on the GPU only while it is used
    cycle: tuple[str, ...]  # the phases of a step


class Method(NamedTuple):
    """What the plan knows of a kind of run. Each function takes the settings of that kind."""

    roles: Callable[..., list[Role]]  # (config, *, cpu), on the meta device
    # (roles, config, ranks, placement): bytes by role and phase
    shares: Callable[[list[Role], Any, int, Placement | None], list[Share]]
    smaller_passes: Callable[[Any], Iterator[Change]]
    asks_frozen_roles: Callable[[Any], bool]  # whether there are models that only answer
    # The role that responses are drawn from and the most that are drawn together, over all ranks; None: none are drawn.
    sampled: Callable[[Any], tuple[str, int]] | None = None
    moves: Moves | None = None  # None: all of it stays on the GPU


METHODS = {
    OnlineConfig: Method(
        online_roles,
        online.shares,
        online.smaller_passes,
        asks_frozen_roles=lambda config: True,
        sampled=lambda config: ("actor", max(config.drawn_together + config.in_flight_together, config.eval.prompts)),
        moves=Moves(online.parts, online.least, online.PHASES),
    ),
    OfflineConfig: Method(
        offline_roles,
        offline.shares,
        offline.smaller_passes,
        asks_frozen_roles=lambda config: config.frozen_model is not None,
    ),
    GenerateConfig: Method(
        generation_roles,
        generation.shares,
        generation.smaller_passes,
        asks_frozen_roles=lambda config: True,
        sampled=lambda config: (generation.SAMPLED, config.batch_size),
        moves=Moves(generation.parts, generation.least, generation.PHASES),
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
    # Layers that recompute their activations, where `optim.activation_checkpointing` is auto, and how many there are.
    recomputed: tuple[int, int] | None = None
    vllm: VllmMemory | None = None  # if it draws the responses
    placement: Placement | None = None  # None: nothing is moved
    parts: Mapping[PartName, int] = field(default_factory=dict)  # bytes of what may be moved
    roles: list[Role] = field(default_factory=list, repr=False, compare=False)

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
    def choices(self) -> list[str]:
        """What the plan has chosen, a line each."""
        found = [] if self.rows is None else [f"sampling.rows: {self.rows}, chosen by the memory that there is"]
        if self.recomputed is not None:
            count, depth = self.recomputed
            layers = "no layer" if count == 0 else "all layers" if count >= depth else f"{count} of {depth} layers"
            found.append(f"optim.activation_checkpointing: {layers}, chosen by the memory that there is")
        if self.placement is not None and self.machine.gpu is not None:
            found.append(described(self.parts, self.placement))
        return found

    @property
    def fits(self) -> bool:
        return all(needed <= there for needed, there in self.needs.values())

    def leaves_reserve(self, least: Plan | None = None) -> bool:
        """Whether it fits, and leaves the reserve that choices leave in each phase in which `least` leaves it too."""
        memory = "host" if self.machine.gpu is None else "GPU"
        before = {} if least is None else least._filled(memory)
        room = CHOSEN * self.needs[memory][1]
        return self.fits and all(used <= max(room, before.get(p, 0)) for p, used in self._filled(memory).items())

    def _filled(self, memory: str) -> dict[str, int]:
        """Bytes needed of a memory in each phase."""
        phases = dict.fromkeys(share.phase for share in self.shares)
        return {p: self._needs([s for s in self.shares if s.phase == p])[memory][0] for p in phases}

    def fits_in(self, phase: str) -> bool:
        """Whether there is room for one phase, whatever the others need."""
        shares = [share for share in self.shares if share.phase == phase]
        return all(needed <= there for needed, there in self._needs(shares).values())


def make_plan(config: AnyConfig, machine: Machine, roles: list[Role] | None = None) -> Plan:
    """The plan, with what it chooses: the most rows that fit where `sampling.rows` is auto, then the fewest layers that
    recompute their activations where that is auto, then the fewest bytes that are moved.

    In this order, as a row costs the most time and a move the least. roles: the roles, where they are at hand. Raises
    ModelError where a model's config cannot be read.
    """
    if roles is None:
        roles = measured_roles(config, cpu=machine.gpu is None)
    if not config.trained or config.optim.activation_checkpointing != "auto":
        return _with_most_rows(config, machine, roles)
    trained = [role.size for role in roles if role.trains]
    depth = max(size.layers for size in trained) if all(size.can_recompute for size in trained) else 0
    none = replace(_with_most_rows(with_recomputed(config, 0), machine, roles), recomputed=(0, depth))
    if not depth or (none.leaves_reserve() and none.rows == max(_row_counts(config, machine), default=None)):
        return none
    best = replace(_with_most_rows(with_recomputed(config, depth), machine, roles), recomputed=(depth, depth))
    every, too_few, enough = best, -1, depth
    while enough - too_few > 1 and every.fits:
        count = (too_few + enough) // 2
        plan = _with_given_rows(with_recomputed(every.config, count), machine, roles)
        if plan.leaves_reserve(every):
            best, enough = replace(plan, rows=every.rows, recomputed=(count, depth)), count
        else:
            too_few = count
    return best


def _row_counts(config: AnyConfig, machine: Machine) -> list[int]:
    """The numbers of rows that the plan chooses from, rising; none where it is not to choose."""
    if not rows_are_open(config):
        return []
    _, responses = cast(Any, method_of(config).sampled)(config)
    drawn = -(-responses // machine.ranks)
    if machine.gpu is None:
        drawn = min(drawn, CPU_ROWS)
    return sorted({bucket(rows) for rows in range(1, drawn + 1)})


def _with_most_rows(config: AnyConfig, machine: Machine, roles: list[Role]) -> Plan:
    sizes = _row_counts(config, machine)
    if not sizes:
        return _with_given_rows(config, machine, roles)
    plans = [replace(_with_given_rows(with_rows(config, rows), machine, roles), rows=rows) for rows in sizes]
    best = plans[0]
    for plan in plans[1:]:  # what does not fit with the fewest rows either is no matter of rows
        if plan.fits if plans[0].fits else plan.fits_in("sampling"):
            best = plan
    return best


def _with_given_rows(config: AnyConfig, machine: Machine, roles: list[Role]) -> Plan:
    """The plan with the fewest bytes that are moved."""
    moves = method_of(config).moves
    if moves is None:
        return _with_placement(config, machine, roles, None)
    least = moves.least(config)
    plan = _with_placement(config, machine, roles, least)
    if machine.gpu is None:
        return plan
    sizes = {name: amount.total for name, amount in moves.parts(roles, config, machine.ranks).items() if amount.total}
    taken = {phase: places.gpu.total for phase, places in by_phase(plan.shares)}
    (_, room), (host, there) = plan.needs["GPU"], plan.needs["host"]
    placement = choose_placement(sizes, least, taken, int(CHOSEN * room), -((there - host) // machine.gpus))
    placement = beside_computing(sizes, placement, least, taken, int(CHOSEN * room), moves.cycle)
    return replace(_with_placement(config, machine, roles, placement), parts=sizes)


def _with_placement(config: AnyConfig, machine: Machine, roles: list[Role], placement: Placement | None) -> Plan:
    method = method_of(config)
    shares = method.shares(roles, config, machine.ranks, placement)
    if method.sampled is None or not samples_with_vllm(drawing := cast(ResponseSettings, config)):
        return Plan(config, machine, shares, placement=placement, roles=roles)
    name, responses = method.sampled(config)
    size = next(role.size for role in roles if role.name == name)
    places = dict(by_phase(shares))["sampling"]
    beside = PROCESS_HOST + places.host.total + places.gpu.total - places.gpu.passing.total
    vllm = vllm_memory(size, drawing, responses, machine, beside)
    shares = shares + vllm.shares(dict.fromkeys(share.phase for share in shares))
    return Plan(config, machine, shares, vllm=vllm, placement=placement, roles=roles)


def rows_are_open(config: AnyConfig) -> bool:
    """Whether the plan is to choose the number of rows that are decoded together. vLLM has none."""
    if method_of(config).sampled is None:
        return False
    drawing = cast(ResponseSettings, config)
    return drawing.sampling.rows == "auto" and not samples_with_vllm(drawing)


def with_rows(config: C, rows: int) -> C:
    settings: Any = config
    return cast(C, replace(settings, sampling=replace(settings.sampling, rows=rows)))


def with_recomputed(config: C, layers: int) -> C:
    settings: Any = config
    return cast(C, replace(settings, optim=replace(settings.optim, activation_checkpointing=layers or False)))
