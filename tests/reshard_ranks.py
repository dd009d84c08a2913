"""What the ranks of test_reshard.py run: a trained run that goes on over and over, each time in another layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import whole_runs
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state
from ppo_step import config_of, context_of, conversations, roles_of
from torch import Tensor

from fastppo.config import Config
from fastppo.data.batch import Moments
from fastppo.data.microbatches import plan_step
from fastppo.distributed.engine import Engine, gathered
from fastppo.distributed.world import World, start_world
from fastppo.models.assembly import Roles
from fastppo.models.frozen_prefix import PrefixStates
from fastppo.ppo.experience import compute_experience
from fastppo.ppo.update import run_updates

RANKS = (1, 2, 4, 1)  # of the processes that follow one another
WARM_UP = ["--critic.warmup_steps", "1", "--steps", "99"]  # Adam's count of a group that begins later is another
CASES = {
    "separate critic, tied, average, fp32": ["--optim.dtype", "fp32", "--actor.average", "0.5"],
    "separate critic, LoRA, fp32": [
        *["--optim.dtype", "fp32", "--actor.lora.rank", "4", "--critic.lora.rank", "2", *WARM_UP],
    ],
    "shared critic, tied, average, bf16": [
        *["--optim.dtype", "bf16", "--critic.kind", "shared", "--actor.average", "0.5", *WARM_UP],
    ],
}
# Stages and offload that the processes of 1, 2, 4 and 1 ranks go through.
LAYOUTS = (
    (("0", "3"), ("1",), ("3 cpu",), ("2 cpu", "0")),
    (("0",), ("3 cpu",), (), ("1",)),
    (("1",), ("3 cpu",), ("2",), ("1 cpu", "3")),
)
MOMENTS = ("exp_avg", "exp_avg_sq")
State = dict[str, dict[str, Any]]


def layouts(case: str) -> Iterator[tuple[int, int, str]]:
    """Number of the process, ranks and layout of each part of a run."""
    for number, places in enumerate(LAYOUTS[list(CASES).index(case)]):
        for place in places:
            yield number, RANKS[number], place


def roles_in(case: str, place: str, folder: Path, world: World) -> tuple[Config, Roles]:
    stage, _, offload = place.partition(" ")
    zero = ["--zero.stage", stage, "--zero.offload", offload or "none"]
    if stage != "0":
        zero += ["--zero.deepspeed", str(folder / "split.json")]
    config = config_of(str(folder / "model"), "--rollout.environment", "made:up", *CASES[case], *zero)
    return config, roles_of(config, world)


def update(config: Config, roles: Roles, step: int, world: World) -> None:
    scored = conversations()
    plan = plan_step(scored.rollout.packed.lengths, config, 0, world.ranks, roles.attention)
    context, prefix = context_of(config, roles, world, step=step), PrefixStates()
    roles.residency.enter("experience")
    experience = compute_experience(scored, Moments().add(scored.end_scores), plan[0], prefix, context)
    roles.residency.enter("learning")
    assert len(list(run_updates(experience, plan, prefix, context))) == 1


def whole(roles: Roles, world: World) -> State:
    """All that is trained, put together by DeepSpeed's own functions: weights, masters, moments, steps; the average."""
    state = {f"{name}.{key}": value for name in ("actor", "critic") for key, value in of_engine(getattr(roles, name))}
    if roles.average is not None:
        for name, own in roles.average._average.items():
            p = dict(roles.policy.model.named_parameters())[name]
            parts: list[Any] = [None] * world.ranks
            dist.all_gather_object(parts, own)
            shape = getattr(p, "ds_shape", p.shape)
            cut = torch.cat([part.view(-1) for part in parts])[: shape.numel()].view(shape)
            state[f"average.{name}"] = {"average": cut if hasattr(p, "ds_shape") else own.clone()}
    return state


def of_engine(engine: Engine | None) -> Iterator[tuple[str, dict[str, Any]]]:
    if engine is None:
        return
    optimizer, adam = engine._optimizer, engine._adam
    for i, group in enumerate(getattr(optimizer, "bit16_groups", getattr(optimizer, "bf16_groups", []))):
        masters = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
        lazy_init_hp_params_optimizer_state(group, masters[i], adam.state)
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            continue
        with gathered([p]):
            found = {"weight": p.detach().clone()}
        state = adam.state.get(p, {}) if optimizer is adam else flat_state(optimizer, adam, p)
        step = float(state.get("step", 0))
        steps: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(steps, step)
        found["step"] = max(steps)
        for key in ("master", *MOMENTS):
            if key != "master" and found["step"] == 0:
                found[key] = torch.zeros(found["weight"].shape)
            elif optimizer is adam:
                found[key] = (p if key == "master" else state[key]).detach().clone()
            else:
                get = safe_get_full_fp32_param if key == "master" else safe_get_full_optimizer_state
                found[key] = get(p, *(() if key == "master" else (key,))).clone()
        yield name, found


def flat_state(optimizer: Any, adam: Any, p: Any) -> dict[str, Any]:
    """The state of the flat tensor that has a part of a weight on this rank."""
    if hasattr(p, "ds_id"):
        return adam.state[optimizer.fp32_partitioned_groups_flat[optimizer.grad_position[optimizer.get_param_id(p)][0]]]
    masters = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    return {} if p._hp_mapping is None else adam.state[masters[p._hp_mapping.param_group_index]]


def apart(one: State, other: State) -> dict[str, float]:
    """For each kind of tensor the largest norm of a difference, over that of the tensor; of steps the largest."""
    found: dict[str, float] = {}
    for name, tensors in one.items():
        for key, value in tensors.items():
            expected = other[name][key]
            if isinstance(value, Tensor):
                norm = max(float(expected.float().norm()), 1e-12)
                found[key] = max(found.get(key, 0.0), float((value.float() - expected.float()).norm()) / norm)
            else:
                found[key] = max(found.get(key, 0.0), abs(value - expected))
    return found


def save(roles: Roles, folder: Path) -> None:
    def write(state: Any, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)

    for name, part in roles.saved.items():
        part.save(folder, name, write)
    dist.barrier()


def walk(folder: str, number: int) -> None:
    """The parts of process `number` of every run."""
    world, found = start_world(1), {}
    for case in CASES:
        parts = list(layouts(case))
        for i, (process, ranks, place) in enumerate(parts):
            if process != number:
                continue
            assert ranks == world.ranks
            before, after = (Path(folder, f"{case}-{n}") for n in (i - 1, i))
            config, roles = roles_in(case, place, Path(folder), world)
            result: dict[str, Any] = {}
            if i:
                for name, part in roles.saved.items():
                    part.load(before, name)
                saved = torch.load(before / "state.pt")
                result["same"] = whole_runs.same(saved["state"], whole(roles, world), place)
            update(config, roles, i, world)
            if i:
                result["apart"] = apart(whole(roles, world), saved["next"])
            save(roles, after)
            state = whole(roles, world)
            update(config, roles, i + 1, world)
            if world.rank == 0:
                torch.save({"state": state, "next": whole(roles, world)}, after / "state.pt")
            else:
                whole(roles, world)
            found[f"{case}: {ranks} x {place}"] = result
            dist.barrier()
    Path(folder, f"{number}-{world.rank}.json").write_text(json.dumps(found))
