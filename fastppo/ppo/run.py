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
    find_run,
    leave_model,
    open_folder,
    random_state,
    set_random_state,
    settle,
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
from fastppo.ppo.evaluation import evaluate, samples
from fastppo.ppo.metrics import step_metrics
from fastppo.ppo.ptx import Texts
from fastppo.ppo.schedule import step_rates
from fastppo.ppo.train_state import Progress, recall_experience
from fastppo.rewards import Source, check_chats, load_functions, load_judge, load_sources
from fastppo.rollout import named_stop_ids, stop_ids

log = logging.getLogger("fastppo")


@dataclass(frozen=True)
class Setup:
    """What a run has in hand before its first step."""

    config: Config
    world: World
    roles: Roles
    sources: Sequence[tuple[Source, float]]  # of reward, with their weights
    judge: Sequence[tuple[Source, float]]  # the held-out one; empty without
    data: PromptSet  # to train on
    heldout: PromptSet
    texts: Texts | None  # mixed into the updates
    stop_ids: list[int]  # tokens that end a response
    checkpoints: Checkpoints
    progress: Progress  # where the run is; the one part that changes
    phases: Phases

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
    found = find_run(config, world)
    if found is not None and found.ended(config, world):
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
    open_folder(config, found, world)
    roles = assemble(config, world, tokenizer)
    sources, judge = (load(config, tokenizer, world, roles.residency) for load in (load_sources, load_judge))
    learned = [data.tokens, heldout.tokens, *([] if texts is None else [texts.examples.tokens])]
    checkpoints = Checkpoints(config, roles.saved, learned, world, enter=roles.residency.enter)
    progress = checkpoints.load(found, Progress.begin(config, world.rank))
    if found is not None and found.since is not None:
        progress.recall(found.since)
    recall_experience(progress, roles, config, world)
    return Setup(
        config=config,
        world=world,
        roles=roles,
        sources=sources,
        judge=judge,
        data=data,
        heldout=heldout,
        texts=texts,
        stop_ids=_stop_ids(roles, config),
        checkpoints=checkpoints,
        progress=progress,
        phases=Phases(progress.seconds, roles.residency.enter),
    )


def _stop_ids(roles: Roles, config: Config) -> list[int]:
    """The tokens that end a response; the log says if there are none."""
    ids, longest = stop_ids(roles.policy, roles.tokenizer, config.sampling), config.sampling.max_new_tokens
    if not ids and config.sampling.ignore_eos:
        log.info("sampling.ignore_eos: every response has sampling.max_new_tokens = %d tokens", longest)
    elif not ids:
        log.warning(
            "no token ends a response: neither the actor's tokenizer nor its generation config has an EOS token, and"
            " sampling.stop_tokens is empty. Every response will be cut at sampling.max_new_tokens = %d. Name one with"
            " sampling.stop_tokens.",
            longest,
        )
    return ids


def evaluate_if_due(setup: Setup, tracker: Tracker) -> None:
    """Evaluate before the first step, after the last, and every `eval.every` steps; a resumed run not once more."""
    config, run = setup.config, setup.progress
    if not config.eval.is_due(run.step, config.steps, run.evaluated):
        return
    found = evaluate(setup.roles, setup.heldout, setup.sources, setup.stop_ids, config, setup.world, setup.judge)
    metrics = found.metrics
    if setup.roles.average is not None:
        after = random_state()  # a reward function that draws numbers goes on as if the average were not there
        with setup.roles.average.in_place():
            averaged = evaluate(
                setup.roles, setup.heldout, setup.sources, setup.stop_ids, config, setup.world, setup.judge
            )
        set_random_state(after)
        metrics = metrics | {f"average/{name}": value for name, value in averaged.metrics.items()}
    run.add_evaluation(found)
    tracker.log_evaluation(run.step, metrics)
    kept = heldout_responses(setup.heldout.texts, found.responses, found.scores, count=config.track.responses)
    tracker.log_responses(run.step, kept)


def log_step(setup: Setup, done: Step, tracker: Tracker) -> None:
    """The metrics, responses and alarms of a step. Its stages' times begin anew."""
    config, run, attention = setup.config, setup.progress, setup.roles.attention
    number, lengths = run.step + 1, done.experience.packed.lengths
    rates = dict(zip(("actor_lr", "critic_lr"), step_rates(config, run.step)[-1], strict=True))
    spread = imbalance(done.plan, lengths, setup.world.ranks, attention)
    metrics = step_metrics(done.experience, done.updates, setup.phases.take()) | done.health | rates
    tracker.log(number, metrics | {"kl_coef": run.beta.value, "imbalance": spread})
    if number == 1 and (settings := settings_that_truncate(config.sampling, setup.stop_ids)):
        log.info(
            "%s: tokens are left out of the draw, and learning knows the whole distribution. In this first batch the"
            " sampler's logprobs are %.2g nats a token from the trainer's in the mean, by rounding too (sampler_error)",
            ", ".join(settings),
            metrics["sampler_error"],
        )
    if tracker.wants_responses(number):
        kept = training_responses(done.experience, setup.roles.tokenizer, count=config.track.responses)
        tracker.log_responses(number, kept)
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
    leave = partial(leave_model, tokenizer=roles.tokenizer, lora=config.actor.lora, world=world)
    left = []
    roles.residency.enter("sampling")
    if roles.average is not None:
        with roles.average.in_place():
            left.append(leave(roles.gathered.policy(), folder=setup.output / "actor-average"))
    left.append(leave(roles.gathered.policy(), folder=setup.output / "actor"))
    if world.rank == 0 and setup.progress.ended is not None:
        setup.progress.ended.write(setup.checkpoints.folder)
    if world.rank == 0 and len(evaluations) > 1:
        shown = samples(setup.heldout, evaluations[0], evaluations[-1])
        with tracker.only_tells("samples.jsonl"):
            write_samples(setup.output / "samples.jsonl", shown)
        with tracker.only_tells(TERMINAL):
            show_samples(shown[: config.eval.show])
    settle(left, setup.checkpoints, setup.progress)
