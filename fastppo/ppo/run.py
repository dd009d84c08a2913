"""Around the loop of a run: what it begins with, what each step leaves in its folder, and what is there at the end."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fastppo.checkpoint import (
    Checkpoints,
    check_exports,
    export_model,
    find_run,
    open_folder,
    random_state,
    set_random_state,
)
from fastppo.config import Config, SamplingConfig
from fastppo.data import Experience, Minibatch, Prompts, PromptSet, Update, batches, imbalance, load_prompts
from fastppo.distributed import World
from fastppo.models import Roles, actor_context, assemble, check_actor_tokens, check_models, load_actor_tokenizer
from fastppo.monitor import (
    TERMINAL,
    Alarm,
    Phases,
    Tracker,
    heldout_responses,
    show_samples,
    training_responses,
    write_samples,
)
from fastppo.planner import check_plan
from fastppo.ppo.advantages import Estimator, load_estimator
from fastppo.ppo.evaluation import evaluate, samples
from fastppo.ppo.experience import StepContext
from fastppo.ppo.losses import PolicyLoss, load_loss
from fastppo.ppo.metrics import step_metrics
from fastppo.ppo.ptx import Texts
from fastppo.ppo.schedule import step_rates
from fastppo.ppo.train_state import Progress
from fastppo.rewards import Source, check_chats, load_functions, load_judge, load_sources
from fastppo.rollout import ActorSampler, find_engine, make_sampler, named_stop_ids

log = logging.getLogger("fastppo")


@dataclass(frozen=True)
class Setup:
    """What a run has in hand before its first step."""

    config: Config
    world: World
    roles: Roles
    sampler: ActorSampler  # of responses, in training and in evaluation
    sources: Sequence[tuple[Source, float]]  # of reward, with their weights
    judge: Sequence[tuple[Source, float]]  # the held-out one; empty without
    data: PromptSet  # to train on
    heldout: PromptSet
    texts: Texts | None  # mixed into the updates
    checkpoints: Checkpoints
    progress: Progress  # where the run is; the one part that changes
    phases: Phases  # seconds of each
    estimator: Estimator
    loss: PolicyLoss

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    def prompts(self) -> Iterator[Prompts]:
        """The global batches of the steps from here on, `ppo.batch_size` prompts each, the samples counted."""
        samples, step = self.config.sampling.samples_per_prompt, self.progress.step
        size, shuffle = self.config.ppo.batch_size // samples, self.config.data.shuffle
        rows_of_steps = batches(self.data, size=size, seed=self.config.seed, shuffle=shuffle, start=step)
        for number, rows in enumerate(rows_of_steps, start=step):
            yield Prompts.of(self.data.tokens, rows, first=number * size, samples=samples)

    def step_context(self) -> StepContext:
        """What the step that the run is at depends on beside its batch."""
        return StepContext(
            self.roles,
            self.config,
            self.world,
            self.estimator,
            self.loss,
            self.texts,
            step=self.progress.step,
            kl_coef=self.progress.beta.value,
            skipped=self.progress.skipped,
        )

    def tracker(self) -> Tracker:
        config, done = self.config, self.progress.step
        return Tracker(self.output, config.track, steps=config.steps, rank=self.world.rank, done=done)


class Step(NamedTuple):
    """What a PPO step found and did."""

    experience: Experience
    plan: list[list[Minibatch]]
    updates: list[Update]
    health: dict[str, float]  # health/FIGURE
    alarms: list[Alarm]


def set_up(config: Config, world: World) -> Setup | None:
    """The run's folder, models, sources of reward and prompts, and its progress if it is resumed.

    None if an alarm has ended the run, and would again. What can be wrong is looked at in the order of what it costs to
    find out. An earlier run in the folder is moved aside when only the weights are left to be read.
    """
    load_functions(config.rewards)  # a typo in a function's name should not cost the minutes of loading models
    load_functions(config.health.judge, "health.judge")
    find_engine(config)
    estimator, loss = load_estimator(config.ppo), load_loss(config.ppo)
    checkpoint = find_run(config, world)
    if checkpoint is not None and checkpoint.ended(config, world):
        return None
    check_plan(config, world)
    tokenizer, context = load_actor_tokenizer(config), actor_context(config)
    check_models(config, tokenizer)
    named_stop_ids(tokenizer, config.sampling)  # a text that is no token should not cost these minutes either
    data, heldout = load_prompts(
        config.data,
        tokenizer,
        prompts_heldout=config.eval.prompts,
        context=context,
        reserve=config.sampling.max_new_tokens,
    )
    check_chats(config, tokenizer, data, heldout)
    check_actor_tokens(config, tokenizer, (*data.tokens, *heldout.tokens), "data.path")
    texts = Texts.load(config, tokenizer, context=context)
    if texts is not None:
        check_actor_tokens(config, tokenizer, texts.examples.tokens, "ptx.path")
    open_folder(config, checkpoint, world)
    roles = assemble(config, world, tokenizer)
    sampler = make_sampler(config, roles, world)
    sources, judge = (load(config, tokenizer, world, roles.residency) for load in (load_sources, load_judge))
    learned = [data.tokens, heldout.tokens, *([] if texts is None else [texts.examples.tokens])]
    checkpoints = Checkpoints(config, roles.saved, learned, world, holding=roles.residency.holding)
    progress = checkpoints.load(checkpoint, Progress.begin(config, world.rank))
    if checkpoint is not None and checkpoint.rollback is not None:
        progress.recall(checkpoint.rollback)
    return Setup(
        config=config,
        world=world,
        roles=roles,
        sampler=sampler,
        sources=sources,
        judge=judge,
        data=data,
        heldout=heldout,
        texts=texts,
        checkpoints=checkpoints,
        progress=progress,
        phases=Phases(progress.seconds),
        estimator=estimator,
        loss=loss,
    )


def evaluate_if_due(setup: Setup, tracker: Tracker) -> None:
    """Evaluate before the first step, after the last, and every `eval.every` steps; a resumed run not once more."""
    config, run = setup.config, setup.progress
    if not config.eval.is_due(run.step, config.steps, run.evaluated):
        return
    roles, sampler, world = setup.roles, setup.sampler, setup.world
    look = partial(evaluate, roles, sampler, setup.heldout, setup.sources, config, world, setup.judge)
    evaluation = look()
    metrics = evaluation.metrics
    if roles.average is not None:
        after = random_state()  # a reward function that draws numbers goes on as if the average were not there
        with roles.average.in_place():
            averaged = look()
        set_random_state(after)
        metrics = metrics | {f"average/{name}": value for name, value in averaged.metrics.items()}
    run.add_evaluation(evaluation)
    tracker.log_evaluation(run.step, metrics)
    texts, count = setup.heldout.texts, config.track.responses
    tracker.log_responses(run.step, heldout_responses(texts, evaluation.responses, evaluation.scores, count=count))


def log_step(setup: Setup, done: Step, tracker: Tracker) -> None:
    """The metrics, responses and alarms of a step. Its phases' times begin anew."""
    config, run, attention = setup.config, setup.progress, setup.roles.attention
    number, lengths = run.step + 1, done.experience.packed.lengths
    rates = dict(zip(("actor_lr", "critic_lr"), step_rates(config, run.step)[-1], strict=True))
    spread = imbalance(done.plan, lengths, setup.world.ranks, attention)
    metrics = step_metrics(done.experience, done.updates, setup.phases.take()) | done.health | rates
    tracker.log(number, metrics | {"kl_coef": run.beta.value, "imbalance": spread})
    if number == 1 and (settings := settings_that_truncate(config.sampling, setup.sampler.stop_ids)):
        log.info(
            "%s: tokens are left out of the draw, and learning knows the whole distribution. In this first batch the"
            " sampler's logprobs are %.2g nats a token from the trainer's in the mean, by rounding too (sampler_error)",
            ", ".join(settings),
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


def finish(setup: Setup, tracker: Tracker) -> None:
    """Leave the actor in `output`/actor; then show held-out responses before and after. All ranks call it.

    Raises ExportError at the end if the actor is elsewhere, or nowhere.
    """
    config, world, roles, evaluations = setup.config, setup.world, setup.roles, setup.progress.evaluations
    leave = partial(export_model, tokenizer=roles.tokenizer, lora=config.actor.lora, world=world)
    left = []
    with roles.residency.holding("export"):
        if roles.average is not None:
            with roles.average.in_place():
                left.append(leave(roles.sampling_weights.gather(), folder=setup.output / "actor-average"))
        left.append(leave(roles.sampling_weights.gather(), folder=setup.output / "actor"))
    if world.rank == 0 and setup.progress.ended is not None:
        setup.progress.ended.write(setup.checkpoints.folder)
    if world.rank == 0 and len(evaluations) > 1:
        shown = samples(setup.heldout, evaluations[0], evaluations[-1])
        with tracker.guard("samples.jsonl"):
            write_samples(setup.output / "samples.jsonl", shown)
        with tracker.guard(TERMINAL):
            show_samples(shown[: config.eval.show])
    check_exports(left, setup.checkpoints, setup.progress)
