"""Where an online run is: all that its future depends on beside the models and their optimizers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from fastppo.checkpoint import RollbackRecord, State, random_state
from fastppo.monitor import Alarm, Health
from fastppo.online.evaluation import Evaluation


@dataclass
class Progress:
    """A run after `step` steps. What a method has done of the next step, it adds."""

    step: int = 0  # done
    skipped: int = 0  # updates in a row that were not applied
    kl_coef: float = 0.0  # beta, of the KL penalty; 0 for a method without one
    evaluated: int = -1  # after which step the last evaluation was; -1 before the first
    evaluations: list[Evaluation] = field(default_factory=list)  # the first and the last
    seconds: dict[str, float] = field(default_factory=dict)  # of the next step's phases
    health: Health = field(default_factory=Health)
    random: State = field(default_factory=random_state)  # as it was where the run would go on
    ended: RollbackRecord | None = None  # by an alarm; where the run went back to

    @property
    def within_step(self) -> str:
        """How far the next step is, as the end of a checkpoint's name; empty between two steps."""
        return ""

    @property
    def name(self) -> str:
        """Names sort as runs proceed."""
        return f"step-{self.step:08d}{self.within_step}"

    @property
    def score(self) -> float | None:
        """The held-out score, where the run is at an evaluation."""
        at_evaluation = self.evaluated == self.step and not self.within_step
        return self.evaluations[-1].held_out if self.evaluations and at_evaluation else None

    @property
    def good(self) -> int | None:
        return self.health.good

    def add_evaluation(self, evaluation: Evaluation) -> None:
        self.evaluations = [*self.evaluations[:1], evaluation]
        self.evaluated = self.step
        self.note_random_state()

    def note_random_state(self) -> None:
        """The run is where it would go on."""
        self.random = random_state()

    def state(self) -> State:
        """Plain values and tensors, the same on every rank; `random` is each rank's own."""
        same = ("step", "skipped", "evaluated", "seconds")
        return {name: getattr(self, name) for name in same} | {
            "beta": self.kl_coef,
            "evaluations": [asdict(e) for e in self.evaluations],
            "health": self.health.state(),
        }

    def restore(self, state: State, own: State) -> None:
        """What `state` gave; own: this rank's `random`."""
        self.step, self.skipped, self.evaluated = state["step"], state["skipped"], state["evaluated"]
        self.kl_coef, self.random = state["beta"], own
        self.seconds.clear()
        self.seconds.update(state["seconds"])
        self.evaluations = [Evaluation(**e) for e in state["evaluations"]]
        self.health = Health.from_state(state["health"])

    def recall(self, since: RollbackRecord) -> None:
        """What the run that went back to where this one is knew beyond it."""
        self.kl_coef = since.kl_coef
        self.health.roll_backs = since.roll_backs
        self.health.alarms = [Alarm(**alarm) for alarm in since.alarms]
