"""Where a run is: all that its future depends on beside the models and their optimizers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

from fastppo.checkpoint import RollbackRecord, State, random_state, seed_random
from fastppo.config import Config
from fastppo.data import Experience, Moments, Packed, Update
from fastppo.monitor import Alarm, Health
from fastppo.ppo.evaluation import Evaluation
from fastppo.ppo.schedule import KLController


@dataclass
class Progress:
    """A run after `step` PPO steps, and as far as it has learned from the batch of the next one.

    Data order, sampling and the plan of microbatches are functions of seed and step, so they need no state. Phases
    before learning leave nothing behind that counts: a run that was stopped in one of them repeats it.
    """

    beta: KLController
    step: int = 0  # done
    skipped: int = 0  # updates in a row that were not applied
    moments: Moments = field(default_factory=Moments)  # of all scores
    evaluated: int = -1  # after which step the last evaluation was; -1 before the first
    evaluations: list[Evaluation] = field(default_factory=list)  # the first and the last
    experience: Experience | None = None  # of the next step, once it can be learned from
    updates: list[Update] = field(default_factory=list)  # done on it
    seconds: dict[str, float] = field(default_factory=dict)  # of the next step's phases
    health: Health = field(default_factory=Health)
    random: State = field(default_factory=random_state)  # as it was where the run would go on
    ended: RollbackRecord | None = None  # by an alarm; where the run went back to

    @staticmethod
    def begin(config: Config, rank: int) -> Progress:
        seed_random(config.seed, rank)
        return Progress(KLController(config.ppo.kl_coef, config.ppo.kl_target, config.ppo.kl_horizon))

    @property
    def name(self) -> str:
        """Names sort as runs proceed."""
        return f"step-{self.step:08d}" + ("" if self.experience is None else f"-update-{len(self.updates):04d}")

    @property
    def score(self) -> float | None:
        """The held-out score, where the run is at an evaluation."""
        at_evaluation = self.evaluated == self.step and self.experience is None
        return self.evaluations[-1].held_out if self.evaluations and at_evaluation else None

    @property
    def good(self) -> int | None:
        return self.health.good

    def add_evaluation(self, evaluation: Evaluation) -> None:
        self.evaluations = [*self.evaluations[:1], evaluation]
        self.evaluated, self.random = self.step, random_state()

    def add_experience(self, experience: Experience, moments: Moments) -> None:
        self.experience, self.moments, self.random = experience, moments, random_state()

    def end_step(self) -> None:
        self.step += 1
        self.skipped = self.updates[-1].skipped
        self.experience, self.updates, self.random = None, [], random_state()

    def state(self) -> State:
        """Plain values and tensors, the same on every rank; `random` is each rank's own."""
        same = ("step", "skipped", "evaluated", "seconds")
        experience = None
        if self.experience is not None:
            experience = {f.name: getattr(self.experience, f.name) for f in fields(Experience)}
            experience["packed"] = {f.name: getattr(self.experience.packed, f.name) for f in fields(Packed)}
        return {name: getattr(self, name) for name in same} | {
            "beta": self.beta.value,
            "moments": asdict(self.moments),
            "evaluations": [asdict(e) for e in self.evaluations],
            "updates": [asdict(u) for u in self.updates],
            "health": self.health.state(),
            "experience": experience,
        }

    def restore(self, state: State, own: State) -> None:
        """What `state` gave; own: this rank's `random`."""
        self.step, self.skipped, self.evaluated = state["step"], state["skipped"], state["evaluated"]
        self.beta.value, self.random = state["beta"], own
        self.moments = Moments(**state["moments"])
        self.seconds.clear()
        self.seconds.update(state["seconds"])
        self.evaluations = [Evaluation(**e) for e in state["evaluations"]]
        self.updates = [Update(**u) for u in state["updates"]]
        self.health = Health.from_state(state["health"])
        experience = state["experience"]
        self.experience = experience and Experience(**experience | {"packed": Packed(**experience["packed"])})

    def recall(self, since: RollbackRecord) -> None:
        """What the run that went back to where this one is knew beyond it."""
        self.beta.value = since.kl_coef
        self.health.roll_backs = since.roll_backs
        self.health.alarms = [Alarm(**alarm) for alarm in since.alarms]
