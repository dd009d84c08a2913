"""Around the loop of a PPO run: what it begins with beside what every online run has, and what each step leaves."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

from fastppo.checkpoint import random_state, set_random_state
from fastppo.config import Config, SamplingConfig
from fastppo.data import Experience, Minibatch, Prompts, Update, imbalance
from fastppo.distributed import World
from fastppo.environments import check_keeps_nothing
from fastppo.monitor import Alarm, Tracker, training_responses
from fastppo.online import Ahead, FeedbackAhead, InFlight, Setup, sample_ahead
from fastppo.online import set_up as set_up_online
from fastppo.ppo.advantages import Estimator, load_estimator
from fastppo.ppo.experience import StepContext
from fastppo.ppo.losses import PolicyLoss, load_loss
from fastppo.ppo.metrics import step_metrics
from fastppo.ppo.progress import PPOProgress
from fastppo.ppo.ptx import Texts, read_texts
from fastppo.ppo.schedule import step_rates

log = logging.getLogger("fastppo")


@dataclass(frozen=True)
class PPOSetup(Setup[Config, PPOProgress]):
    """What a PPO run has in hand before its first step."""

    estimator: Estimator
    loss: PolicyLoss
    feedback: FeedbackAhead  # with `ppo.steps_ahead` 1

    def batches(self) -> Iterator[Prompts]:
        """Batches of the prompts that nobody has drawn, `ppo.batch_size` each, the samples counted."""
        count = self.config.ppo.batch_size // self.config.sampling.samples_per_prompt
        return self.prompts(count, start=self.progress.next_batch)

    def go_on(self) -> Iterator[Prompts]:
        """Begin where the run is, or is again: `batches` from there, and feedback on what a checkpoint has ahead."""
        self.feedback.drop()
        if self.progress.ahead is not None:
            set_random_state(self.progress.random)  # what was dropped may have drawn numbers since the run went back
            self.feedback.begin(self.progress.ahead.rollout)
        return self.batches()

    def sync_sampler(self) -> None:
        """Give the sampler the actor's weights. Another engine than fastppo's own may set what all threads share
        meanwhile, as vLLM does with the default dtype while it loads weights, so it waits for what is being scored."""
        if self.config.rollout.engine != "inprocess":
            self.feedback.settle()
        self.sampler.sync()

    def sample_ahead(self, prompts: Iterator[Prompts], step: int, in_flight: Sequence[InFlight]) -> Ahead:
        """The batch of step number `step`, from 0; in_flight: what the batch before has left."""
        return sample_ahead(self.sampler, prompts, step, in_flight, self.data, self.config, self.world)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """An evaluation waits for feedback, and leaves the random numbers of functions as it found them: a run that is
        resumed scores what is ahead once more, and does not evaluate once more."""
        if not self.feedback.begun:
            yield
            return
        self.feedback.settle()
        before = random_state()
        yield
        set_random_state(before)

    def step_context(self) -> StepContext:
        """What the step that the run is at depends on beside its batch."""
        return StepContext(
            self.roles,
            self.config,
            self.world,
            self.estimator,
            self.loss,
            Texts.of(self.texts, self.config),
            step=self.progress.step,
            kl_coef=self.progress.kl_coef,
            skipped=self.progress.skipped,
        )


class Step(NamedTuple):
    """What a PPO step found and did."""

    experience: Experience
    plan: list[list[Minibatch]]
    updates: list[Update]
    health: dict[str, float]  # health/FIGURE
    alarms: list[Alarm]


def set_up(config: Config, world: World) -> PPOSetup | None:
    """What the run begins with, as `fastppo.online.set_up` finds it; None if an alarm has ended the run for good."""
    estimator, loss = load_estimator(config.ppo), load_loss(config.ppo)
    progress = PPOProgress.begin(config, world.rank)
    if config.ppo.importance == "auto" and config.other_sampler:
        log.info("ppo.importance auto is %s, for %s", config.importance.kind, ", ".join(config.other_sampler))
    if (most := config.rollout.partial_tokens) is not None:
        check_keeps_nothing(config, f"rollout.partial_tokens is {most}")
        log.info(
            "rollout.partial_tokens %d: tokens of a response may come from the policies of several steps (metrics"
            " earlier_tokens, sampler_error, effective_samples; ppo.importance is %s), and a response depends on the"
            " steps in which it was continued, not on seed, prompt and sample alone",
            *(most, config.importance.kind),
        )
    if config.ppo.steps_ahead:
        said = "a batch is sampled from the policy before the update that comes before it, one step back"
        level = logging.WARNING if config.importance.kind == "none" else logging.INFO
        learns = "as if the policy that learns had sampled it" if level == logging.WARNING else "weighted for that"
        log.log(
            level,
            "ppo.steps_ahead %d: %s; ppo.importance is %s, so it is learned from %s (metrics sampler_kl, sampler_error,"
            " effective_samples)",
            *(config.ppo.steps_ahead, said, config.importance.kind, learns),
        )
    if config.ppo.loss == "clip" and not config.ppo.loss_is_fused:
        log.info(
            "with these settings ppo.loss clip is not computed in one op with the vocabulary head: see ppo.aggregate"
        )
    setup = set_up_online(config, world, progress, partial(read_texts, config), "ptx.path")
    if setup is None:
        return None
    feedback = FeedbackAhead(setup.data, setup.sources, setup.judge, setup.roles.tokenizer, world)
    return PPOSetup(**vars(setup), estimator=estimator, loss=loss, feedback=feedback)


def log_step(setup: PPOSetup, done: Step, tracker: Tracker) -> None:
    """The metrics, responses and alarms of a step. Its phases' times begin anew."""
    config, run, attention = setup.config, setup.progress, setup.roles.attention
    number, lengths = run.step + 1, done.experience.packed.lengths
    rates = dict(zip(("actor_lr", "critic_lr"), step_rates(config, run.step)[-1], strict=True))
    if config.value_function is None:
        del rates["critic_lr"]
    spread = imbalance(done.plan, lengths, setup.world.groups, attention)
    seconds = setup.phases.take()
    metrics = step_metrics(done.experience, done.updates, seconds, config.importance)
    metrics |= done.health | rates
    if run.drawn is not None:
        metrics |= run.drawn.metrics(seconds)
    if run.continued is not None:
        metrics |= run.continued.metrics(seconds)
    tracker.log(number, metrics | {"kl_coef": run.kl_coef, "imbalance": spread})
    if run.drawn is not None and run.drawn.filled:
        log.info(
            "step %d: the scores of only %d of %d groups differ after %d batches of prompts"
            " (sampling.until_informative); %d groups of equal scores fill the batch up",
            *(number, run.drawn.groups - run.drawn.uninformative - run.drawn.filled, run.drawn.groups),
            *(run.drawn.batches, run.drawn.filled),
        )
    if number == 1 and (settings := settings_that_truncate(config.sampling, setup.sampler.stop_ids)):
        log.info(
            "%s: tokens are left out of the draw, and learning knows the whole distribution; ppo.importance is %s, and"
            " no weight brings back what could not be drawn. In this first batch the sampler's logprobs are %.2g nats a"
            " token from the trainer's in the mean, by rounding too (sampler_error)",
            ", ".join(settings),
            config.importance.kind,
            metrics["sampler_error"],
        )
    if tracker.wants_responses(number):
        responses = training_responses(done.experience, setup.roles.tokenizer, count=config.track.responses)
        tracker.log_responses(number, responses)
    tracker.log_alarms([asdict(alarm) for alarm in done.alarms])


def settings_that_truncate(sampling: SamplingConfig, stop_ids: Sequence[int]) -> list[str]:
    """The settings, with their values, for which a response is not drawn from the distribution that is learned from."""
    truncates = {
        "top_p": sampling.top_p < 1.0,
        "top_k": sampling.top_k > 0,
        "min_new_tokens": sampling.min_new_tokens > 0 and len(stop_ids) > 0,
    }
    return [f"sampling.{name} {getattr(sampling, name)}" for name, does in truncates.items() if does]
