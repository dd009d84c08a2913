"""The settings of a ReST run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fastppo.config.commands.online import OnlineConfig
from fastppo.config.data import SAMPLER_ROUNDING, MixtureConfig
from fastppo.config.run import CheckpointConfig, Names

QUANTILES = (0.5, 0.75, 0.9)  # of an Improve each, if nothing is said


@dataclass(frozen=True)
class GrowConfig:
    """Grow: the actor writes responses to many prompts, and they are scored."""

    prompts: int = 1024
    """Number of prompts of each Grow; each gets `sampling.samples_per_prompt` responses."""
    batch_size: int = 512
    """Number of responses, over all ranks, that are sampled, scored and measured together; then they are written to
    `output`/grows. They do not depend on it."""


@dataclass(frozen=True)
class ImproveConfig:
    """Improve: the actor is fine-tuned on the responses of the Grow whose score is high enough."""

    keep: Literal["quantile", "value", "best"] = "quantile"
    """The responses that are learned from. `quantile`: those at or above a quantile of all scores of the Grow; `value`:
    those above a score; `best`: the best one to each prompt, which is rejection sampling fine-tuning (RAFT, Dong et al.,
    2023)."""
    thresholds: tuple[float, ...] | None = None
    """The quantile (at least 0, below 1) or the score of each Improve, rising: there are as many Improves to a Grow as
    thresholds. Default for `quantile`: 0.5, 0.75 and 0.9. `best` has one Improve and no threshold."""
    max_per_prompt: int | None = None
    """Maximum number of responses to a prompt that an Improve learns from, those with the highest score, so that easy
    prompts do not outweigh others. Default: no limit."""
    epochs: int = 1
    """Number of passes over the responses in each Improve."""
    batch_size: int = 64
    """Number of responses per update, over all ranks, demonstrations included."""
    microbatch_tokens: int = 8192
    """Maximum number of tokens in one pass on one rank. The update does not depend on it."""
    lr_factor: float = 1.0
    """Factor by which the learning rate of each Improve of a Grow is that of the one before (Gulcehre et al., 2023, lower
    it from Improve to Improve)."""

    @property
    def levels(self) -> tuple[float | None, ...]:
        """The threshold of each Improve of a Grow; None where each prompt's best is learned from."""
        if self.keep == "best":
            return (None,)
        return QUANTILES if self.thresholds is None and self.keep == "quantile" else (self.thresholds or ())


@dataclass(frozen=True)
class RestCheckpointConfig(CheckpointConfig):
    """Checkpoints in `output`/checkpoints, from which a run resumes bit for bit."""

    every: int = 1
    """Steps (a Grow and its Improves) between checkpoints; 0: save only when the run is stopped by a signal."""
    within_step: int = 100
    """Batches of a Grow, or updates of an Improve, between further checkpoints within a step, which can take hours; 0:
    none."""


@dataclass(frozen=True)
class RestConfig(OnlineConfig):
    """fastppo: ReST, reinforced self-training (Gulcehre et al., 2023), and rejection sampling fine-tuning."""

    names: ClassVar[Names] = Names("improve.batch_size", "improve.microbatch_tokens", "actor.lr")
    rounding: ClassVar[tuple[str, ...]] = ("improve.microbatch_tokens", *SAMPLER_ROUNDING)

    output: str = "runs/rest"
    """Folder of the run: config, metrics, samples, the responses of each Grow with their scores, and the trained actor in
    `output`/actor."""
    steps: int = 1
    """Number of steps. Each is one Grow and its Improves."""
    checkpoint: RestCheckpointConfig = field(default_factory=RestCheckpointConfig)
    grow: GrowConfig = field(default_factory=GrowConfig)
    improve: ImproveConfig = field(default_factory=ImproveConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)

    @property
    def demonstrations(self) -> int:
        """In each update, over all ranks."""
        return round(self.mixture.share * self.improve.batch_size)

    @property
    def microbatch_tokens(self) -> int:
        return self.improve.microbatch_tokens

    @property
    def drawn_in_a_step(self) -> int:
        return self.grow.prompts * self.sampling.samples_per_prompt

    @property
    def drawn_together(self) -> int:
        return min(self.grow.batch_size, self.drawn_in_a_step)

    @property
    def learned_together(self) -> int:
        return self.improve.batch_size - self.demonstrations

    @property
    def mixed_in(self) -> tuple[int, int] | None:
        return (self.demonstrations, self.mixture.max_tokens) if self.mixture.share else None

    @property
    def batches(self) -> tuple[int, ...]:
        return (self.improve.batch_size,)

    @property
    def data_paths(self) -> dict[str, str]:
        return super().data_paths | ({"mixture.path": self.mixture.path} if self.mixture.path else {})
