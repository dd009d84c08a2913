"""What would make a run fit that does not: the smallest change of its settings, as flags."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any, cast

from fastppo.config import AnyConfig, ResponseSettings, command_of
from fastppo.errors import ConfigError
from fastppo.models import ModelError
from fastppo.planner.machine import Machine, in_gb
from fastppo.planner.memory import Change, Role
from fastppo.planner.plan import FILLED, PROCESS_GPU, PROCESS_HOST, VLLM, Plan, make_plan, measured_roles, method_of

RANKS = "rollout.vllm.tensor_parallel_size"
# A pass over so many tokens forward takes as long as gathering all weights for a pass and for its backward pass, as
# modelled for H100s: 2 bytes x 2 gathers at 300 GB/s against 2 FLOP a token at 400 TFLOP/s, less what is overlapped.
GATHERED_TOKENS = 2_500


def smallest_change(plan: Plan) -> Change | None:
    """The least that makes a run fit: one change if one does, else several, taken in the order of what they cost."""
    if plan.machine.host < plan.machine.gpus * PROCESS_HOST:
        return None  # not even the processes have room
    roles: dict[object, list[Role]] = {}  # few changes need other models, and building them takes the time

    def planned(change: Change) -> Plan | None:
        config, nodes = plan.config, plan.machine.nodes
        for name, value in change.items():
            if name == "nodes":
                nodes = value
            else:
                config = _changed(config, name.split("."), value)
        machine = replace(plan.machine, nodes=nodes)
        key = (*config.trained.values(), config.optim.dtype, config.zero.stage == 3)
        try:
            command_of(config).check(config, machine.ranks)
            if key not in roles:
                roles[key] = measured_roles(config, cpu=machine.gpu is None)
            return make_plan(config, machine, roles[key])
        except (ConfigError, ModelError):  # LoRA where nothing could have an adapter, heads that cannot be split
            return None

    def fits(change: Change) -> bool:
        made = planned(change)
        return made is not None and made.fits

    whole = bool(_whole_weights(plan)) and plan.vllm is None  # which another sampler alone can change
    samplers = list(_samplers(plan))
    options = list(_options(plan.config, plan.machine))
    for change in samplers if whole else samplers + options:
        if fits(change):
            return change
    enough = (change for change in samplers if (made := planned(change)) and made.vllm and made.vllm.fits)
    unchanged: list[Change] = [] if whole else [{}]
    for first in [*unchanged, *_smallest_groups(enough)]:
        several: Change
        for several in accumulate(options, lambda one, other: one | other, initial=first):
            if fits(several):
                for setting in list(several):  # what a later change made needless
                    fewer = {key: value for key, value in several.items() if key != setting}
                    if fewer and fits(fewer):
                        several = fewer
                for stage in range(plan.config.zero.stage + 1, several.get("zero.stage", 0)):
                    if fits(lower := several | {"zero.stage": stage}):
                        return lower
                return several
    return None


def lower_stage(plan: Plan) -> Change | None:
    """ZeRO stage 2 for a run at stage 3 that fits, where it would fit as well and take less time.

    At stage 3 weights are gathered from all ranks in each pass, and once more to sample from. At stage 2 more layers
    may recompute their activations, which takes their share of a forward pass.
    """
    config, zero = plan.config, plan.config.zero
    whole = zero.stage == 3 and "none" == zero.parameters_on == zero.frozen_on and plan.machine.ranks > 1
    if not config.trained or not whole or not plan.fits:
        return None
    change: Change = {"zero.stage": 2}
    given = config if plan.recomputed is None else _changed(config, ["optim", "activation_checkpointing"], "auto")
    lower = _changed(given, ["zero", "stage"], 2)
    try:
        command_of(lower).check(lower, plan.machine.ranks)
    except ConfigError:
        return None
    found = make_plan(lower, plan.machine, plan.roles)
    (more, depth), (present, _) = found.recomputed or (0, 1), plan.recomputed or (0, 1)
    tokens = config.microbatch_tokens * (more - present) / max(depth, 1)
    return change if found.fits and tokens <= GATHERED_TOKENS else None


def _samplers(plan: Plan) -> Iterator[Change]:
    """Other ways to draw responses, if vLLM draws them or if no GPU can hold all weights to draw from.

    vLLM over as many ranks or more, and of each the share of memory that is nearest to the present one first.
    """
    config, machine = plan.config, plan.machine
    if plan.vllm is None and not (config.trained and _whole_weights(plan)):
        return
    present = cast(ResponseSettings, config).rollout.vllm
    shares = sorted((n / 20 for n in range(1, 20)), key=lambda share: abs(share - present.gpu_memory_utilization))
    for ranks in range(present.tensor_parallel_size, machine.gpus + 1):
        if machine.gpus % ranks:
            continue
        for share in dict.fromkeys([present.gpu_memory_utilization, *shares]):
            found: Change = {} if plan.vllm is not None else {"rollout.engine": "vllm"}
            if ranks != present.tensor_parallel_size:
                found[RANKS] = ranks
            if share != present.gpu_memory_utilization:
                found["rollout.vllm.gpu_memory_utilization"] = share
            if found:
                yield found
    if plan.vllm is not None:  # whose settings would then have no effect, which is refused
        default = {f"rollout.vllm.{name}": value for name, value in vars(type(present)()).items()}
        given = {f"rollout.vllm.{name}": value for name, value in vars(present).items()}
        yield {"rollout.engine": "inprocess"} | {name: default[name] for name in given if given[name] != default[name]}


def _smallest_groups(changes: Iterable[Change]) -> list[Change]:
    """Of changes with as many ranks to a group the first one."""
    first: dict[int | None, Change] = {}
    for change in changes:
        first.setdefault(change.get(RANKS), change)
    return list(first.values())


def _options(config: AnyConfig, machine: Machine) -> Iterator[Change]:
    """Changes from the cheapest to the dearest; of a kind, the smallest step first."""
    gpu, zero, method = machine.gpu is not None, config.zero, method_of(config)
    if not config.trained:  # it has neither an optimizer nor a gradient
        yield from method.smaller_passes(config)
        return
    if config.optim.activation_checkpointing not in ("auto", True):
        yield {"optim.activation_checkpointing": "auto"}
    yield from method.smaller_passes(config)
    if machine.ranks > 1:
        for stage in (1, 2, 3):
            if stage > zero.stage:
                yield {"zero.stage": stage}
        for together in (2, 4, 8):
            if config.sequence_ranks < together <= machine.gpus and machine.ranks % together == 0:
                yield {"parallel.sequence": together}
    if gpu:
        if zero.optimizer_on == "none":
            yield {"zero.offload_optimizer": "cpu"}
            if machine.ranks > 1 and zero.stage < 2:
                yield {"zero.stage": 2, "zero.offload_optimizer": "cpu"}
        if zero.frozen_on == "none" and method.asks_frozen_roles(config):
            yield {"zero.stage": 3, "zero.offload_frozen": "cpu"}
        if zero.parameters_on == "none":
            yield {"zero.stage": 3, "zero.offload": "cpu"}
    if next(iter(config.trained.values())).lora.rank == 0:
        yield {f"{name}.lora.rank": 16 for name in config.trained}
    if gpu and "nvme" not in (zero.optimizer_on, zero.parameters_on):
        yield {"zero.stage": 3, "zero.offload": "nvme", "zero.nvme_path": zero.nvme_path or "/local_nvme"}
    for times in (2, 4, 8, 16):
        if all(batch % (times * machine.ranks) == 0 for batch in config.batches):
            yield {"nodes": times * machine.nodes, "zero.stage": 3}


def _changed(node: Any, path: list[str], value: Any) -> Any:
    """The settings with one of them replaced."""
    return replace(node, **{path[0]: value if len(path) == 1 else _changed(getattr(node, path[0]), path[1:], value)})


def flags(change: Change) -> str:
    """As it is typed: `--zero.stage 3 --zero.offload cpu`."""
    return " ".join(f"--{name} {str(value).lower()}" for name, value in change.items())


def advice(plan: Plan) -> str:
    """Why a run does not fit and what would."""
    phase, _ = plan.peak
    short = [
        f"{in_gb(needed)} GB of {name} memory are needed and {in_gb(there)} GB are there (most in {phase})"
        for name, (needed, there) in plan.needs.items()
        if needed > there and name != VLLM
    ]
    if plan.vllm is not None and not plan.vllm.fits:
        short.append(plan.vllm.problem())
    reason = f"this run does not fit: {'; '.join(short)}."
    name, whole = "actor" if plan.config.trained else "model", _whole_weights(plan) if plan.vllm is None else 0
    if whole:
        reason += f" The {name}'s weights alone, whole on each GPU to sample from, take {in_gb(whole)} GB there"
    change = smallest_change(plan) if plan.config.trained or not whole else None
    if whole and change is None:
        return (
            f"{reason}, which no setting changes: use GPUs with more memory, from {in_gb(_gpu_for(plan))} GB, or a"
            f" smaller {name}."
        )
    if change is None:
        return f"{reason} No change of settings that is known here would do; use more or larger GPUs or smaller models."
    instead = "; vLLM splits them over ranks." if whole else ""
    return f"{reason}{instead} The smallest change that fits: {flags(change)}"


def _whole_weights(plan: Plan) -> int:
    """Bytes of the weights that are sampled from where they are more than a GPU can hold, else 0."""
    sampled = (s.places.gpu.weights for s in plan.shares if s.phase == "sampling" and s.role in ("actor", "model"))
    found = next(sampled, 0)
    return found if found > plan.needs.get("GPU", (0, found))[1] else 0


def _gpu_for(plan: Plan) -> int:
    """The least memory of a GPU on which the sampler fits as it is configured."""
    return int(plan.needs["GPU"][0] / FILLED) + PROCESS_GPU
