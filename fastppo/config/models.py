"""The roles: which weights each starts from, and what of them trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ActorConfig:
    """The policy that is trained. The frozen reference is a second copy of the same weights."""

    model: str = ""
    """Hugging Face hub name, a directory, or `package:NAME` for weights inside an installed package. Required."""
    gguf_file: str | None = None
    """Name of a GGUF file inside `model`; its weights are unpacked at load."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    train: int | str = "all"
    """Which parameters train: `all`, an integer k for the upper k layers, or comma-separated name patterns
    (`*.mlp.*`)."""
    lr: float = 3e-6
    """Peak learning rate of the actor."""


@dataclass(frozen=True)
class CriticConfig:
    """The value function V(s), one number for each response token."""

    kind: Literal["separate", "shared"] = "separate"
    """`separate`: a model of its own; `shared`: a value head on the actor's backbone (one engine, less memory)."""
    model: str | None = None
    """Weights of a separate critic: hub name, directory or `package:NAME`; the actor's when left out."""
    gguf_file: str | None = None
    """GGUF file inside `model`."""
    train: int | str = "all"
    """Which parameters of a separate critic train, as for the actor. The value head always trains."""
    lr: float = 3e-6
    """Peak learning rate of a separate critic, or of the value head of a shared one."""
    warmup_steps: int = 0
    """PPO steps at the start that train the critic alone (shared: the value head alone)."""


@dataclass(frozen=True)
class ReferenceConfig:
    """The frozen model that the KL penalty holds the actor to."""

    model: str | None = None
    """Hub name, directory or `package:NAME`; the actor's own starting weights when left out. It must share the
    actor's tokenizer."""
    gguf_file: str | None = None
    """GGUF file inside `model`."""
