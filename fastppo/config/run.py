"""Settings of evaluation, tracking and checkpoints."""

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
    """When a run is evaluated; the subclasses say on which data."""

    every: int = 0
    """Steps between evaluations; 0: evaluate before and after training only."""

    @property
    def size(self) -> int:
        """The number of held-out prompts or examples; 0 turns evaluation off."""
        raise NotImplementedError

    def is_due(self, step: int, steps: int, evaluated: int) -> bool:
        """Whether to evaluate after `step` of `steps`: before the first, after the last and after each `every`, once.

        evaluated: the step after which the last evaluation was (-1: none); a resumed run does not repeat it.
        """
        due = step in (0, steps) or (self.every > 0 and step % self.every == 0)
        return self.size > 0 and due and evaluated < step


@dataclass(frozen=True)
class EvalConfig(EvaluationConfig):
    """Evaluation on held-out prompts before and after training, with a separate seed."""

    every: int = 0
    """PPO steps between evaluations; 0: evaluate before and after training only."""
    prompts: int = 64
    """Number of held-out prompts; 0 turns evaluation off."""
    seed: int = 1234
    """Seed of the responses in every evaluation. It does not depend on the run's `seed`."""
    temperature: float = 1.0
    """Sampling temperature in evaluation."""
    show: int = 4
    """Number of prompts whose responses before and after training are shown side by side at the end of the run."""

    @property
    def size(self) -> int:
        return self.prompts


@dataclass(frozen=True)
class TrackConfig:
    """Records of a run in addition to `metrics.jsonl`."""

    tensorboard: bool = True
    """Write TensorBoard events to `output`/tensorboard."""
    wandb: str | None = None
    """Weights & Biases project to log to; needs `pip install wandb`. With WANDB_MODE=offline in the environment no data
    is uploaded until `wandb sync`."""
    responses: int = 4
    """Number of responses written to `responses.jsonl` for the report: of each evaluation, always to the same prompts;
    and of training steps (see `responses_every`), from the highest score to the lowest, with the advantage of each
    token. 0: none."""
    responses_every: int = 10
    """PPO steps between those whose training responses are written; those of step 1 are always written."""
    progress: Literal["auto", "always", "never"] = "auto"
    """`auto`: a progress bar if the output is a terminal, otherwise one line per step."""
    profile_steps: tuple[int, ...] = ()
    """PPO steps, counted from 1, to record with torch's profiler, in which the phases are named; traces are written to
    `output`/profile."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints in `output`/checkpoints, from which a run resumes bit for bit."""

    every: int = 50
    """PPO steps between checkpoints; 0: save only when the run is stopped by a signal."""
    keep_last: int = 2
    """Number of the newest checkpoints to keep; an older one is deleted after a newer one is complete."""
    keep_best: int = 0
    """Number of checkpoints with the highest held-out score (the judge's, if there is one) to keep in addition. An
    evaluation is then needed at every checkpoint (`eval.every`). In PPO `output`/critic-best is the critic of the best
    one, as a model."""
    on_error: Literal["continue", "stop"] = "continue"
    """What to do if a checkpoint cannot be written, for example on a full disk: `continue` logs the error and trains on,
    `stop` ends the run."""
