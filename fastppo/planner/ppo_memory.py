"""Bytes that each role of a PPO run holds in each of its stages, as `memory` counts them.

What is on the GPU when is decided by the table of `residency`; here stands only how much there is of each kind.
"""

from __future__ import annotations

from dataclasses import replace

from fastppo.config import Config
from fastppo.distributed import REMADE, uses
from fastppo.planner.memory import (
    Batch,
    Bytes,
    Member,
    Places,
    Share,
    asking_needs,
    buffers,
    learning_needs,
    model_states,
    prefetch,
    prefix_states,
    reducing,
    sampling_needs,
    summed_on_arrival,
)

STAGES = ("sampling", "feedback", "experience", "learning")
EVALUATED = ("sampling", "feedback", "experience")  # the stages of an evaluation


def shares(members: list[Member], config: Config, ranks: int) -> list[Share]:
    """Every role in every stage on one rank, and the moving average of the actor's weights where there is one."""
    batch, table = Batch.of(config, ranks), uses(config)
    lone = not any(member.name == "reference" for member in members)  # it is the actor, adapters off
    found = []
    for stage in STAGES:
        for member in members:
            places = _lasting(member, stage, config, ranks, batch) + _live(member, stage, config)
            if stage in _computed(member, table):
                places += _needs(member, stage, config, ranks, batch, lone=lone)
            found.append(Share(member.name, stage, places))
        if config.actor.average is not None:
            actor = next(member for member in members if member.name == "actor")
            found.append(Share("average", stage, averaged(actor, stage, config, ranks)))
    return found


def kind_of(member: Member) -> str:
    """As in `residency.uses`."""
    return "optimizers" if member.trains else "reference" if member.name == "reference" else "rewards"


def kinds(member: Member, config: Config, ranks: int) -> dict[str, Bytes]:
    """What a role has on the GPU in the stages that use it, by kind as in `residency.uses`."""
    gpu, b = model_states(member, config, ranks).gpu, member.size.bytes
    live = member.size.largest * b if config.zero.stage == 3 else 0  # of one module, while the role is computed
    if not member.trains:
        return {kind_of(member): Bytes(weights=gpu.weights - live)}
    sums = gpu.gradients - live if _made_once(member, config) else 0
    found = {
        "optimizers": Bytes(optimizer=gpu.optimizer),
        "gradients": replace(buffers(member, config, ranks).gpu, gradients=sums),
    }
    if config.zero.stage == 3 and member.name == "actor":
        found["sampling_weights"] = Bytes(weights=member.size.parameters * b)
    return found


def placed(kind: str, amount: Bytes, stage: str, config: Config, *, cpu: bool) -> Places:
    """Where it is in a stage. cpu: whether the run is on the CPU, where there is one memory and nothing moves."""
    if cpu or kind in uses(config)[stage]:
        return Places(gpu=amount)
    return Places() if kind in REMADE else Places(host=amount)


def _made_once(member: Member, config: Config) -> bool:
    """Whether gradients are added up in a buffer that DeepSpeed keeps; else they are freed once they are used."""
    return config.zero.stage == 3 or summed_on_arrival(member, config)


def averaged(actor: Member, stage: str, config: Config, ranks: int) -> Places:
    """The average of what trains, in fp32, and in an evaluation of it the actor's own weights beside it."""
    part = actor.size.trained // (ranks if config.zero.stage == 3 else 1)
    aside = part * actor.size.bytes if stage in EVALUATED else 0
    return Places(host=Bytes(weights=4 * part + aside))


def _lasting(member: Member, stage: str, config: Config, ranks: int, batch: Batch) -> Places:
    """What a role has in a stage whether it is computed there or not."""
    states, cpu = model_states(member, config, ranks), member.size.on_cpu
    found = Places(host=states.host + buffers(member, config, ranks).host, nvme=states.nvme)
    for kind, amount in kinds(member, config, ranks).items():
        found += placed(kind, amount, stage, config, cpu=cpu)
    if member.trains:
        live = member.size.largest * member.size.bytes if config.zero.stage == 3 else 0
        found += Places(gpu=Bytes(weights=states.gpu.weights - live))
    if member.trains and not _made_once(member, config) and stage == "learning":
        found += Places(gpu=Bytes(gradients=states.gpu.gradients))
    if stage in ("experience", "learning"):
        found += Places(gpu=Bytes(buffers=prefix_states(member, batch)))
    return found


def _live(member: Member, stage: str, config: Config) -> Places:
    """At ZeRO stage 3 the module that is whole while a role is computed, and its gradients while it learns."""
    if config.zero.stage < 3 or stage == "sampling" or stage not in _computed(member, uses(config)):
        return Places()  # the sampler has weights of its own
    module = member.size.largest * member.size.bytes
    return Places(gpu=Bytes(weights=module, gradients=module if member.trains and stage == "learning" else 0))


def _computed(member: Member, table: dict[str, set[str]]) -> set[str]:
    """The stages in which a role is computed: those that use it, and what trains also where its outputs are asked."""
    using = {stage for stage in STAGES if kind_of(member) in table[stage]}
    if not member.trains:
        return using
    return using | {"experience"} | ({"sampling"} if member.name == "actor" else set())


def _needs(member: Member, stage: str, config: Config, ranks: int, batch: Batch, *, lone: bool) -> Places:
    """What a role adds to a stage in which it is computed for a while: activations, cache, workspace.

    lone: whether the reference is the actor itself.
    """
    if stage == "sampling":
        return Places(gpu=sampling_needs(member.size, config, batch))
    policy, exact = member.name in ("actor", "reference"), config.ppo.kl_kind == "exact"
    if stage == "learning" and member.trains:
        actor, reads = member.name == "actor", config.ppo.loss_reads_reference
        found = [learning_needs(member, batch, head=actor, reference=reads)]
        if actor and config.ptx.coef:
            found.append(learning_needs(member, batch.with_texts(config, ranks), head=True, reference=False))
        needs = max(found, key=lambda amount: amount.total)
        return reducing(member, config, ranks) + Places(gpu=needs + _whole_head(member, config, lone and reads))
    asked = batch if stage == "learning" else batch.asked(stage, config, ranks)
    needs = asking_needs(member, asked, head=policy, reference=exact)
    return prefetch(member, config) + Places(gpu=needs + _whole_head(member, config, lone and exact))


def _whole_head(member: Member, config: Config, read: bool) -> Bytes:
    """At stage 3 the reference's head stays whole while the actor is computed; that of a model of its own is counted
    with that model, as the module of it that is whole."""
    if config.zero.stage < 3 or member.name != "actor" or not read:
        return Bytes()
    return Bytes(workspace=member.size.vocabulary * member.size.width * member.size.bytes)
