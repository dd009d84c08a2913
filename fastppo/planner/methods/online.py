"""Bytes that each role of an online run holds in each of its phases, as `memory` counts them.

What is on the GPU when is said by a `Placement`, the same that `Residency` has; here stands only how much there is of
each part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fastppo.config import OnlineConfig
from fastppo.distributed import PartName, Placement, uses
from fastppo.planner.batch import Batch
from fastppo.planner.memory import (
    Bytes,
    Change,
    Places,
    Role,
    Share,
    asking_needs,
    buffers,
    learning_needs,
    model_states,
    placed,
    prefetch,
    prefix_states,
    recording_holds,
    reducing,
    sampling_needs,
    summed_on_arrival,
)
from fastppo.planner.vllm_memory import samples_with_vllm, streaming_needs

PHASES = ("sampling", "feedback", "experience", "learning")
EVALUATED = ("sampling", "feedback", "experience")  # the phases of an evaluation


def shares(roles: list[Role], config: OnlineConfig, ranks: int, placement: Placement | None = None) -> list[Share]:
    """Every role in every phase on one rank, and the moving average of the actor's weights where there is one.

    placement: without one each part is on the GPU only while it is used.
    """
    batch, table = Batch.of(config, ranks), _uses(config)
    placement = placement or least(config)
    lone = not any(role.name == "reference" for role in roles)  # it is the actor, adapters off
    exported = _gathered_to_export(roles, config)
    found = []
    for phase in PHASES if exported is None else (*PHASES, "export"):
        for role in roles:
            places = _lasting(role, phase, config, ranks, batch, placement) + _live(role, phase, config)
            if phase in _computed(role, table):
                places += _needs(role, phase, config, ranks, batch, lone=lone)
            found.append(Share(role.name, phase, places))
        if config.actor.average is not None:
            actor = next(role for role in roles if role.name == "actor")
            found.append(Share("average", phase, averaged(actor, phase, config, ranks)))
    if exported is not None:
        whole = Places(host=Bytes(weights=exported.size.parameters * exported.size.bytes))
        found.append(Share(f"{exported.name}, rank 0", "export", whole, first=True))
    return found


def _gathered_to_export(roles: list[Role], config: OnlineConfig) -> Role | None:
    """The largest of the roles that stage 3 gathers into the first rank's host memory to export them, one by one.

    An actor that is sampled from nowhere in this process, and a critic of its own; a shared one is the actor.
    """
    names = {"critic", *(["actor"] if samples_with_vllm(config) else [])} if config.zero.stage == 3 else set()
    return max((r for r in roles if r.name in names), key=lambda role: role.size.parameters, default=None)


def least(config: OnlineConfig) -> Placement:
    """Each part is on the GPU only while it is used."""
    return Placement(_uses(config))


def _uses(config: OnlineConfig) -> dict[str, set[str]]:
    return uses(loss_reads_reference=config.loss_reads_reference)


def kind_of(role: Role) -> str:
    """As in `residency.uses`."""
    return "optimizers" if role.trains else "reference" if role.name == "reference" else "rewards"


def parts(roles: list[Role], config: OnlineConfig, ranks: int) -> dict[PartName, Bytes]:
    """What may be moved, with what each part has on the GPU in the phases that use it."""
    found: dict[PartName, Bytes] = {}
    for role in roles:
        for kind, amount in _kinds(role, config, ranks).items():
            found[kind, role.name] = found.get((kind, role.name), Bytes()) + amount  # an ensemble has one name
    return found


def _kinds(role: Role, config: OnlineConfig, ranks: int) -> dict[str, Bytes]:
    """By kind as in `residency.uses`."""
    gpu, b = model_states(role, config, ranks).gpu, role.size.bytes
    live = role.size.largest * b if config.zero.stage == 3 else 0  # of one module, while the role is computed
    if not role.trains:
        return {kind_of(role): Bytes(weights=gpu.weights - live)}
    sums = gpu.gradients - live if _made_once(role, config) else 0
    found = {
        "optimizers": Bytes(optimizer=gpu.optimizer),
        "gradients": replace(buffers(role, config, ranks).gpu, gradients=sums),
    }
    if config.zero.stage == 3 and role.name == "actor" and not samples_with_vllm(config):
        found["sampling_weights"] = Bytes(weights=role.size.parameters * b)
    return found


def _made_once(role: Role, config: OnlineConfig) -> bool:
    """Whether gradients are added up in a buffer that DeepSpeed keeps; else they are freed once they are used."""
    return config.zero.stage == 3 or summed_on_arrival(role, config)


def averaged(actor: Role, phase: str, config: OnlineConfig, ranks: int) -> Places:
    """The average of what trains, in fp32, and in the actor's dtype what is on its way there from a GPU; while the
    average is evaluated or exported the actor's own weights beside it."""
    part = actor.size.trained // (ranks if config.zero.stage == 3 else 1)
    aside = part * actor.size.bytes if phase in (*EVALUATED, "export") else 0
    staged = 0 if actor.size.on_cpu else part * actor.size.bytes
    return Places(host=Bytes(weights=4 * part + staged + aside))


def _lasting(role: Role, phase: str, config: OnlineConfig, ranks: int, batch: Batch, placement: Placement) -> Places:
    """What a role has in a phase whether it is computed there or not."""
    states, cpu = model_states(role, config, ranks), role.size.on_cpu
    found = Places(host=states.host + buffers(role, config, ranks).host, nvme=states.nvme)
    for kind, amount in _kinds(role, config, ranks).items():
        found += placed((kind, role.name), amount, phase, placement, cpu=cpu)
    if role.trains:
        live = role.size.largest * role.size.bytes if config.zero.stage == 3 else 0
        found += Places(gpu=Bytes(weights=states.gpu.weights - live))
    if role.trains and not _made_once(role, config) and phase == "learning":
        found += Places(gpu=Bytes(gradients=states.gpu.gradients))
    if role.name == "actor":
        found += Places(gpu=recording_holds(role.size, config, batch))
    if config.learns_as_measured and phase in ("experience", "learning"):
        found += Places(gpu=Bytes(buffers=prefix_states(role, batch)))
    return found


def _live(role: Role, phase: str, config: OnlineConfig) -> Places:
    """At ZeRO stage 3 the module that is whole while a role is computed, and its gradients while it learns."""
    if config.zero.stage < 3 or phase == "sampling" or phase not in _computed(role, _uses(config)):
        return Places()  # the sampler has weights of its own
    module = role.size.largest * role.size.bytes
    return Places(gpu=Bytes(weights=module, gradients=module if role.trains and phase == "learning" else 0))


def _computed(role: Role, table: dict[str, set[str]]) -> set[str]:
    """The phases in which a role is computed: those that use it, and what trains also where its outputs are asked."""
    using = {phase for phase in PHASES if kind_of(role) in table[phase]}
    if not role.trains:
        return using
    return using | {"experience"} | ({"sampling"} if role.name == "actor" else set())


def _needs(role: Role, phase: str, config: OnlineConfig, ranks: int, batch: Batch, *, lone: bool) -> Places:
    """What a role adds to a phase in which it is computed for a while: activations, cache, workspace.

    lone: whether the reference is the actor itself.
    """
    if phase == "sampling":
        vllm = samples_with_vllm(config)
        needs = streaming_needs(role.size, config) if vllm else sampling_needs(role.size, config, batch)
        return Places(gpu=needs)
    policy, exact = role.name in ("actor", "reference"), config.exact_kl
    if phase == "learning" and role.trains:
        actor, reads = role.name == "actor", config.loss_reads_reference
        found = [learning_needs(role, batch, config.optim, head=actor, reference=reads)]
        if actor and config.mixed_in is not None:
            texts = batch.with_texts(*config.mixed_in, config, ranks)
            found.append(learning_needs(role, texts, config.optim, head=True))
        needs = max(found, key=lambda amount: amount.total)
        return reducing(role, config, ranks, needs + _whole_head(role, config, lone and reads))
    asked = batch if phase == "learning" else batch.asked(phase, config, ranks)
    needs = asking_needs(role, asked, head=policy, reference=exact)
    return prefetch(role, config) + Places(gpu=needs + _whole_head(role, config, lone and exact))


def _whole_head(role: Role, config: OnlineConfig, read: bool) -> Bytes:
    """At stage 3 the reference's head stays whole while the actor is computed; that of a model of its own is counted
    with that model, as the module of it that is whole."""
    if config.zero.stage < 3 or role.name != "actor" or not read:
        return Bytes()
    return Bytes(workspace=role.size.vocabulary * role.size.width * role.size.bytes)


def smaller_passes(config: OnlineConfig) -> Iterator[Change]:
    """Changes that need less memory in a pass, from the least to the most."""
    longest = config.data.max_prompt_tokens + config.sampling.max_new_tokens
    if config.mixed_in is not None:
        longest = max(longest, config.mixed_in[1])
    for part in (2, 4, 8):
        if config.microbatch_tokens // part >= longest:
            yield {config.names.microbatch: config.microbatch_tokens // part}
    for part in () if samples_with_vllm(config) else (2, 4):
        if (rows := config.sampling.settled_rows // part) >= 4:
            yield {"sampling.rows": rows}
