"""Where a PPO run is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

from fastppo.checkpoint import State, random_state, seed_random
from fastppo.config import Config
from fastppo.data import Experience, Moments, Packed, Update
from fastppo.online import Continued, Drawn, InFlight, Progress


@dataclass
class PPOProgress(Progress):
    """A run after `step` PPO steps, and as far as it has learned from the batch of the next one.

    Data order, sampling and the plan of microbatches are functions of seed, step and the number of batches of prompts
    drawn, so they need no other state; with `rollout.partial_tokens` responses in flight are state too. Phases before
    learning leave nothing behind that counts: a run that was stopped in one of them repeats it, and where a step draws
    several batches or samples in rounds, all of them.
    """

    batches: int = 0  # of prompts, drawn for the steps done and for `experience`
    drawn: Drawn | None = None  # for `experience`, with `sampling.until_informative`
    in_flight: tuple[InFlight, ...] = ()  # drawn, and neither learned from nor for `experience`
    continued: Continued | None = None  # for `experience`, with `rollout.partial_tokens`
    moments: Moments = field(default_factory=Moments)  # of all end scores
    experience: Experience | None = None  # of the next step, once it can be learned from
    updates: list[Update] = field(default_factory=list)  # done on it

    @staticmethod
    def begin(config: Config, rank: int) -> PPOProgress:
        seed_random(config.seed, rank)
        return PPOProgress(kl_coef=config.ppo.kl_coef)

    @property
    def within_step(self) -> str:
        return "" if self.experience is None else f"-update-{len(self.updates):04d}"

    def add_experience(
        self,
        experience: Experience,
        moments: Moments,
        batches: int,
        drawn: Drawn | None,
        in_flight: tuple[InFlight, ...] = (),
        continued: Continued | None = None,
    ) -> None:
        """moments: of all end scores, this step's included; batches, drawn, continued: what was drawn for the
        experience, and sampled; in_flight: what is left for the next steps."""
        self.experience, self.moments, self.random = experience, moments, random_state()
        self.batches, self.drawn = self.batches + batches, drawn
        self.in_flight, self.continued = in_flight, continued

    def end_step(self) -> None:
        self.step += 1
        self.skipped = self.updates[-1].skipped
        self.experience, self.drawn, self.continued = None, None, None
        self.updates, self.random = [], random_state()

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
        continued = state.get("continued")
        self.continued = continued and Continued(**continued)
