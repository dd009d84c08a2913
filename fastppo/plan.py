"""The memory of a run before anything is loaded: `python -m fastppo.plan --config PRESET|FILE [--gpus 8 ...]`.

Models are built on the meta device, from their configs alone. The table says what each role holds in each stage, on
each GPU, in the host's memory and on NVMe, whether that fits, and if not, the smallest change that would.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from fastppo.cli import parse
from fastppo.config import ActorConfig, Config, ConfigError, CriticConfig
from fastppo.errors import FastPPOError
from fastppo.footprint import Footprint
from fastppo.load import DTYPES, Source, outline
from fastppo.lora import add_adapters
from fastppo.machine import Machine, parse_bytes, parse_count, this_machine
from fastppo.memory import STAGES, Member, Places, Share, by_stage, shares
from fastppo.models import Backbone, Critic, Policy, RewardModel, ValueHead, fuse_head
from fastppo.rules import validate
from fastppo.trainable import set_trainable
from fastppo.world import World

# What a process takes before it holds a tensor: Python and the libraries, on a GPU the CUDA context and NCCL.
PROCESS_HOST, PROCESS_GPU = 1 << 30, 1 << 30
# The part of a GPU that PyTorch's allocator can fill; the rest is lost between blocks of different sizes.
FILLED = 0.95


class PlanError(FastPPOError):
    """A run that does not fit. The message names the smallest change that would."""


@dataclass(frozen=True)
class Plan:
    config: Config
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


def make_plan(config: Config, machine: Machine) -> Plan:
    """Raises ModelError where a model's config cannot be read."""
    members = cast_of(config, cpu=machine.gpu is None)
    return Plan(config, machine, shares(members, config, machine.ranks))


def cast_of(config: Config, *, cpu: bool) -> list[Member]:
    """The roles of a run, their models on the meta device."""
    dtype, actor, critic = DTYPES[config.optim.dtype], config.actor, config.critic
    checkpointing = config.optim.activation_checkpointing

    def member(name: str, role: Backbone, *, trains: bool = False, shared: int = 0) -> Member:
        size = Footprint(role, dtype, cpu=cpu, checkpointing=checkpointing and trains)
        return Member(name, size, trains, size.parameters - shared)

    own = Source("actor.model", actor.model, actor.gguf_file, actor.revision)
    policy = Policy(_causal(own, dtype))
    if critic.kind == "shared":
        policy.value_head = _value_head(policy.model, dtype)
    _choose(policy, "actor", actor)
    found = [member("actor", policy, trains=True)]
    if critic.kind == "separate":
        role = _critic(own if critic.model is None else Source("critic.model", critic.model, critic.gguf_file), dtype)
        _choose(role, "critic", critic)
        # Where both train adapters alone, the weights below them are the same ones, unless ZeRO has split them.
        both = critic.model is None and actor.lora.rank > 0 and critic.lora.rank > 0 and config.zero.stage < 3
        frozen = sum(p.numel() for p in role.parameters() if not p.requires_grad)
        found.append(member("critic", role, trains=True, shared=frozen if both else 0))
    reference = config.reference
    if reference.model is not None:
        own = Source("reference.model", reference.model, reference.gguf_file)
    if reference.model is not None or actor.lora.rank == 0:  # else the reference is the actor, its adapters off
        found.append(member("reference", Policy(_causal(own, dtype)).requires_grad_(False)))
    for kind, where, sources in (("reward", "rewards", config.rewards), ("judge", "health.judge", config.health.judge)):
        for i, source in enumerate(sources, start=1):
            for name in filter(None, (source.model, *source.ensemble)):
                model = outline(AutoModelForSequenceClassification, Source(f"{where}.model", name), dtype)
                found.append(member(f"{kind} {i}", RewardModel(model).requires_grad_(False)))
    return found


def _causal(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    return fuse_head(outline(AutoModelForCausalLM, source, dtype))


def _critic(source: Source, dtype: torch.dtype) -> Critic:
    model = outline(AutoModelForCausalLM, source, dtype)
    return Critic(cast(PreTrainedModel, model.base_model), _value_head(model, dtype))


def _value_head(model: PreTrainedModel, dtype: torch.dtype) -> ValueHead:
    return ValueHead(model.config.get_text_config().hidden_size, dtype, torch.device("meta"))


def _choose(role: Backbone, name: str, config: ActorConfig | CriticConfig) -> None:
    set_trainable(role, config.train)
    if config.lora.rank:
        add_adapters(role.model, name, config.lora, seed=0, source="")


# What to change


Change = dict[str, Any]  # setting -> value, as on the command line


def smallest_change(plan: Plan) -> Change | None:
    """The least that makes a run fit: one change if one does, else several, taken in the order of what they cost."""
    if plan.machine.host < plan.machine.gpus * PROCESS_HOST:
        return None  # not even the processes have room
    casts: dict[object, list[Member]] = {}  # few changes need other models, and building them takes the time

    def fits(change: Change) -> bool:
        config, nodes = plan.config, plan.machine.nodes
        for name, value in change.items():
            if name == "nodes":
                nodes = value
            else:
                config = _changed(config, name.split("."), value)
        machine = replace(plan.machine, nodes=nodes)
        try:
            validate(config, machine.ranks)
        except ConfigError:
            return False
        key = (config.actor, config.critic, config.optim)
        if key not in casts:
            casts[key] = cast_of(config, cpu=machine.gpu is None)
        return Plan(config, machine, shares(casts[key], config, machine.ranks)).fits

    options = list(_options(plan.config, plan.machine))
    for change in options:
        if fits(change):
            return change
    several: Change
    for several in accumulate(options, lambda one, other: one | other):
        if fits(several):
            for setting in list(several):  # what a later change made needless
                fewer = {key: value for key, value in several.items() if key != setting}
                if fewer and fits(fewer):
                    several = fewer
            return several
    return None


def _options(config: Config, machine: Machine) -> Iterator[Change]:
    """Changes from the cheapest to the dearest; of a kind, the smallest step first."""
    gpu, zero = machine.gpu is not None, config.zero
    longest = config.data.max_prompt_tokens + config.sampling.max_new_tokens
    texts, longest = (config.ptx.batch_size, max(longest, config.ptx.max_tokens)) if config.ptx.coef else (0, longest)
    if not config.optim.activation_checkpointing:
        yield {"optim.activation_checkpointing": True}
    for part in (2, 4, 8):
        if config.ppo.microbatch_tokens // part >= longest:
            yield {"ppo.microbatch_tokens": config.ppo.microbatch_tokens // part}
    for part in (2, 4):
        if config.sampling.rows // part >= 4:
            yield {"sampling.rows": config.sampling.rows // part}
    if machine.ranks > 1:
        for stage in (1, 2, 3):
            if stage > zero.stage:
                yield {"zero.stage": stage}
    if gpu:
        if zero.optimizer_on == "none":
            yield {"zero.offload_optimizer": "cpu"}
        if zero.frozen_on == "none":
            yield {"zero.stage": 3, "zero.offload_frozen": "cpu"}
        if zero.parameters_on == "none":
            yield {"zero.stage": 3, "zero.offload": "cpu"}
    if config.actor.lora.rank == 0:
        yield {"actor.lora.rank": 16} | ({"critic.lora.rank": 16} if config.critic.kind == "separate" else {})
    if gpu and "nvme" not in (zero.optimizer_on, zero.parameters_on):
        yield {"zero.stage": 3, "zero.offload": "nvme", "zero.nvme_path": zero.nvme_path or "/local_nvme"}
    for times in (2, 4, 8, 16):
        ranks = times * machine.ranks
        if config.ppo.batch_size // config.ppo.minibatches % ranks == 0 and texts % ranks == 0:
            yield {"nodes": times * machine.nodes, "zero.stage": 3}


def _changed(node: Any, path: list[str], value: Any) -> Any:
    """The settings with one of them replaced."""
    return replace(node, **{path[0]: value if len(path) == 1 else _changed(getattr(node, path[0]), path[1:], value)})


def flags(change: Change) -> str:
    """As it is typed: `--zero.stage 3 --zero.offload cpu`."""
    return " ".join(f"--{name} {str(value).lower()}" for name, value in change.items())


# What is shown


def _console() -> Console:
    """As wide as the terminal, and where there is none as wide as the table: a log should not lose columns."""
    return Console(width=None if sys.stdout.isatty() else 120)


def show(plan: Plan, console: Console) -> None:
    """The table, and below it what is needed of each memory and what there is."""
    columns = ("weights", "gradients", "optimizer", "activations", "cache", "workspace")
    cpu = plan.machine.gpu is None
    where = "rank" if cpu else "GPU"
    table = Table(box=None, pad_edge=False, title_justify="left", title=f"memory in GB of each {where}")
    table.add_column("stage")
    table.add_column("role")
    rows: list[list[str]] = []
    for stage in STAGES:
        for share in (s for s in plan.shares if s.stage == stage):
            places = share.places
            held = places.gpu + places.host if cpu else places.gpu
            outside = [] if cpu else [places.host.total, places.nvme.total]
            amounts = [*(getattr(held, name) for name in columns), held.total, *outside]
            rows.append([stage, share.role, *map(_gb, amounts)])
    for name in (*columns, where, *([] if cpu else ["host", "NVMe"])):
        table.add_column(name, justify="right")
    for row, before in zip(rows, [None, *rows[:-1]], strict=True):
        table.add_row("" if before and before[0] == row[0] else row[0], *row[1:])
    console.print(table)
    stage, _ = plan.peak
    for name, (needed, there) in plan.needs.items():
        verdict = "fits" if needed <= there else "does not fit"
        console.print(f"{name}: {_gb(needed)} of {_gb(there)} GB, {verdict}", highlight=False)
    console.print(f"highest in {stage}", highlight=False)


def _gb(amount: int) -> str:
    return f"{amount / 1e9:.1f}" if amount >= 1e10 else f"{amount / 1e9:.2f}"


def advice(plan: Plan) -> str:
    """Why a run does not fit and what would."""
    stage, _ = plan.peak
    short = [
        f"{_gb(needed)} GB of {name} memory are needed and {_gb(there)} GB are there"
        for name, (needed, there) in plan.needs.items()
        if needed > there
    ]
    reason = f"this run does not fit: {'; '.join(short)} (most in {stage})."
    if (whole := _whole_weights(plan)) and plan.machine.gpu is not None:
        return (
            f"{reason} The actor's weights alone, whole on each GPU to sample from, take {_gb(whole)} GB there, which"
            f" no setting changes: use GPUs with more memory, from {_gb(_gpu_for(plan))} GB, or a smaller actor."
        )
    change = smallest_change(plan)
    if change is None:
        return f"{reason} No change of settings that is known here would do; use more or larger GPUs or smaller models."
    return f"{reason} The smallest change that fits: {flags(change)}"


def _whole_weights(plan: Plan) -> int:
    """Bytes of the actor's weights where they are more than a GPU can hold, else 0."""
    found = next(s.places.gpu.weights for s in plan.shares if (s.role, s.stage) == ("actor", "sampling"))
    return found if found > plan.needs.get("GPU", (0, found))[1] else 0


def _gpu_for(plan: Plan) -> int:
    """The least memory of a GPU on which the sampler fits as it is configured."""
    return int(plan.needs["GPU"][0] / FILLED) + PROCESS_GPU


def check_plan(config: Config, world: World) -> None:
    """Show the plan of a run that begins here; raises PlanError where it does not fit and `plan` is check."""
    if config.plan == "off":
        return
    nodes = max(world.ranks // int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1), 1)
    plan = make_plan(config, this_machine(world.ranks // nodes, nodes, cpu=world.device.type == "cpu"))
    console = _console()
    if world.rank == 0:
        show(plan, console)
    if plan.fits:
        return
    if config.plan == "check":
        raise PlanError(f"{advice(plan)} To try it all the same: --plan warn")
    if world.rank == 0:
        console.print(advice(plan))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    options = argparse.ArgumentParser(prog="python -m fastppo.plan", add_help=False, allow_abbrev=False)
    options.add_argument("--gpus", type=parse_count, help="GPUs of each node; without a GPU, ranks on the CPU")
    options.add_argument("--gpu-memory", type=parse_bytes, metavar="80GB", help="memory of each GPU")
    options.add_argument("--host-memory", type=parse_bytes, metavar="1TB", help="memory of each node")
    options.add_argument("--nvme", type=parse_bytes, metavar="4TB", help="room on NVMe of each node")
    options.add_argument("--nodes", type=parse_count, default=1, help="how many nodes")
    given, settings = options.parse_known_args(argv)
    if {"-h", "--help"} & set(settings):
        print(f"{options.format_help()}\nWhat is left out is taken from this machine. All settings of a run:\n")
    cpu = given.gpu_memory is None and not torch.cuda.is_available()
    if given.gpu_memory is None or given.host_memory is None or (given.gpus is None and not cpu):
        here = this_machine(given.gpus, given.nodes, cpu=not torch.cuda.is_available())
    else:
        here = Machine(given.gpus or 1, given.nodes, given.gpu_memory, given.host_memory)
    machine = replace(
        here,
        gpu=here.gpu if given.gpu_memory is None else given.gpu_memory,
        host=given.host_memory or here.host,
        nvme=given.nvme,
    )
    config = parse(settings, ranks=machine.ranks)
    console = _console()
    try:
        plan = make_plan(config, machine)
        show(plan, console)
        if not plan.fits:
            raise PlanError(advice(plan))
    except FastPPOError as error:
        print(f"fastppo: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
