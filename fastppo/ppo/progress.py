"""Where a PPO run is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

from torch import Tensor

from fastppo.checkpoint import State, random_state, seed_random
from fastppo.config import Config
from fastppo.data import Experience, Moments, Packed, Scored, Update
from fastppo.online import Ahead, Continued, Drawn, InFlight, Progress


@dataclass(frozen=True)
class StepBatch:
    """What a step learns from, and what was drawn for it."""

    scored: Scored
    end_scores: Tensor  # (B,) fp32, of all responses drawn, those included that are not learned from
    batches: int  # of prompts
    in_flight: tuple[InFlight, ...] = ()  # what is left for the next batches
    drawn: Drawn | None = None  # with `sampling.until_informative`
    continued: Continued | None = None  # with `rollout.partial_tokens`
    ahead: Ahead | None = None  # the next step's batch, with `ppo.steps_ahead` 1
    random: State | None = None  # with `ppo.steps_ahead` 1, as it was before `ahead` began to be scored


@dataclass
class PPOProgress(Progress):
    """A run after `step` PPO steps, and as far as it has learned from the batch of the next one.

    Data order, sampling and the plan of microbatches are functions of seed, step and the number of batches of prompts
    drawn, so they need no other state; with `rollout.partial_tokens` responses in flight are state too. Phases before
    learning leave nothing behind that counts: a run that was stopped in one of them repeats it, and where a step draws
    several batches or samples in rounds, all of them.

    With `ppo.steps_ahead` 1 the batch of the next step is state, and `random` is as it was before that began to be
    scored: a run that goes on scores it again.
    """

    batches: int = 0  # of prompts, drawn for the steps done and for `experience`
    drawn: Drawn | None = None  # for `experience`, with `sampling.until_informative`
    in_flight: tuple[InFlight, ...] = ()  # drawn, and neither learned from nor for `experience`
    continued: Continued | None = None  # for `experience`, with `rollout.partial_tokens`
    moments: Moments = field(default_factory=Moments)  # of all end scores
    ahead: Ahead | None = None  # the batch behind `experience`, or without one the next step's
    experience: Experience | None = None  # of the next step, once it can be learned from
    updates: list[Update] = field(default_factory=list)  # done on it

    @staticmethod
    def begin(config: Config, rank: int) -> PPOProgress:
        seed_random(config.seed, rank)
        return PPOProgress(kl_coef=config.ppo.kl_coef)

    @property
    def within_step(self) -> str:
        return "" if self.experience is None else f"-update-{len(self.updates):04d}"

    @property
    def next_batch(self) -> int:
        """The number of the first batch of prompts that nobody has drawn."""
        return self.batches + (0 if self.ahead is None else self.ahead.batches)

    def add_experience(self, experience: Experience, moments: Moments, batch: StepBatch) -> None:
        """moments: of all end scores, this step's included; batch: what the experience is made of."""
        self.experience, self.moments = experience, moments
        self.batches, self.drawn = self.batches + batch.batches, batch.drawn
        self.in_flight, self.continued = batch.in_flight, batch.continued
        self.ahead, self.random = batch.ahead, batch.random or random_state()

    def end_step(self) -> None:
        self.step += 1
        self.skipped = self.updates[-1].skipped
        self.experience, self.drawn, self.continued = None, None, None
        self.updates = []
        self.note_random_state()

    def note_random_state(self) -> None:
        if self.ahead is None:  # else functions may be drawing random numbers for it
            super().note_random_state()

    def state(self) -> State:
        experience = None
        if self.experience is not None:
            experience = {f.name: getattr(self.experience, f.name) for f in fields(Experience)}
            experience["packed"] = {f.name: getattr(self.experience.packed, f.name) for f in fields(Packed)}
        return super().state() | {
            "batches": self.batches,
            "drawn": self.drawn and asdict(self.drawn),
            "in_flight": [one.state() for one in self.in_flight],
            "continued": self.continued and asdict(self.continued),
            "moments": asdict(self.moments),
            "updates": [asdict(u) for u in self.updates],
            "ahead": self.ahead and self.ahead.state(),
            "experience": experience,
        }

    def restore(self, state: State, own: State) -> None:
        super().restore(state, own)
        self.moments = Moments(**state["moments"])
        self.updates = [Update(**u) for u in state["updates"]]
        experience = state["experience"]
        self.experience = experience and Experience(**experience | {"packed": Packed(**experience["packed"])})
        # every step of a run from before this was saved drew one batch
        self.batches = state.get("batches", self.step + (self.experience is not None))
        drawn = state.get("drawn")
        self.drawn = drawn and Drawn(**drawn)
        self.in_flight = tuple(InFlight.from_state(one) for one in state.get("in_flight", ()))
        ahead = state.get("ahead")
        self.ahead = ahead and Ahead.from_state(ahead)
        continued = state.get("continued")
        self.continued = continued and Continued(**continued)
