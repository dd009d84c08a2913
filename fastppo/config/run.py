"""What a run evaluates, records and saves of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Names(NamedTuple):
    """Settings that DeepSpeed has names of its own for, as a command has them."""

    batch_size: str
    microbatch: str
    learning_rate: str


@dataclass(frozen=True)
class EvaluationConfig:
    """When a run is evaluated, whatever on."""

    every: int = 0
    """Steps between evaluations; 0 evaluates before and after training only."""

    @property
    def size(self) -> int:
        """Of what is held out; 0 turns evaluation off."""
        raise NotImplementedError

    def is_due(self, step: int, steps: int, evaluated: int) -> bool:
        """Whether after `step` of `steps`: before the first, after the last and every `every`, each of them once.

        evaluated: the step after which the last evaluation was (-1: none); a resumed run is not evaluated once more.
        """
        due = step in (0, steps) or (self.every > 0 and step % self.every == 0)
        return self.size > 0 and due and evaluated < step


@dataclass(frozen=True)
class EvalConfig(EvaluationConfig):
    """Evaluation on held-out prompts, with a seed of its own, before training and at the end."""

    every: int = 0
    """PPO steps between evaluations; 0 evaluates before and after training only."""
    prompts: int = 64
    """Held-out prompts; 0 turns evaluation off."""
    seed: int = 1234
    """Seed of the samples, the same in every evaluation and for every `seed`."""
    temperature: float = 1.0
    """Temperature of the samples."""
    show: int = 4
    """Responses shown before and after, side by side, at the end of the run."""

    @property
    def size(self) -> int:
        return self.prompts


@dataclass(frozen=True)
class TrackConfig:
    """What a run records beside `metrics.jsonl`."""

    tensorboard: bool = True
    """Write TensorBoard events to `output`/tensorboard."""
    wandb: str | None = None
    """Weights & Biases project that the run is logged to as well; the package is `pip install wandb`. With
    WANDB_MODE=offline in the environment nothing leaves the machine until `wandb sync`."""
    responses: int = 4
    """Responses kept for the report in `responses.jsonl`: so many of each evaluation, always to the same prompts, and so
    many of a training step from the best scored to the worst, with each token's advantage; 0 keeps none."""
    responses_every: int = 10
    """PPO steps between those whose training responses are kept; those of step 1 are, too."""
    progress: Literal["auto", "always", "never"] = "auto"
    """`auto`: a progress bar if the output is a terminal, else one line a step."""
    profile_steps: tuple[int, ...] = ()
    """PPO steps, counted from 1, to record with torch's profiler, each stage named; traces go to `output`/profile."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run saves of itself in `output`/checkpoints, to be resumed from there bit for bit."""

    every: int = 50
    """PPO steps between checkpoints; 0 saves only when the run is told to stop."""
    keep_last: int = 2
    """How many of the newest checkpoints stay; older ones are deleted once a newer one is whole."""
    keep_best: int = 0
    """How many checkpoints with the highest held-out score (the judge's, if there is one) stay beside those; each checkpoint must be evaluated then
    (`eval.every`)."""
    on_error: Literal["continue", "stop"] = "continue"
    """A checkpoint that cannot be written, on a full disk for example: `continue` logs the error and trains on, `stop`
    ends the run."""
