"""The trained critic as a model: at the end of a run, and in its best checkpoint."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from fastppo.checkpoint import ExportedModel, Run, export_best_critic, export_critic
from fastppo.distributed import World
from fastppo.models import Critic, Policy, Roles, whole_state


def leave_critic(roles: Roles, folder: Path, run: Run, world: World) -> ExportedModel | None:
    """Export the critic at the end of a run; None if there is none. All ranks call it, in the phase `export`."""
    if roles.value_role is None:
        return None
    role, state = _whole(roles, world)
    return export_critic(role, roles.tokenizer, folder, run, world, state)


def add_to_checkpoint(roles: Roles, world: World, checkpoint: Path, run: Run) -> None:
    """Export the critic into a checkpoint that is being written, for `Checkpoints`. All ranks call it."""
    with roles.residency.holding("export"):
        role, state = _whole(roles, world)
        export_best_critic(role, roles.tokenizer, checkpoint, run, world, state)


def _whole(roles: Roles, world: World) -> tuple[Critic | Policy, dict[str, Tensor] | None]:
    """The module with the value head, and its state if it is not whole itself.

    A shared critic has the room in which its backbone is sampled from whole, if there is one. Else weights are gathered
    one at a time, into the host memory of the first rank.
    """
    if roles.critic is None and roles.sampling_weights.has_memory:
        return roles.sampling_weights.gather(), None
    role = roles.value_role
    assert role is not None
    return role, whole_state(role, world)
