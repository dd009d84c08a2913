"""Around the loop of an online run: what it begins with, its evaluations, and what is there at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from fastppo.checkpoint import (
    Checkpoints,
    ExportedModel,
    check_exports,
    export_model,
    find_run,
    open_folder,
    random_state,
    set_random_state,
)
from fastppo.config import OnlineConfig
from fastppo.data import Examples, Prompts, PromptSet, batches, load_prompts
from fastppo.distributed import World, in_phase
from fastppo.environments import check_conversations, check_environment
from fastppo.models import (
    Roles,
    actor_config,
    actor_context,
    assemble,
    check_actor_tokens,
    check_models,
    load_actor_tokenizer,
    whole_state,
)
from fastppo.monitor import TERMINAL, Phases, Tracker, heldout_responses, show_samples, write_samples
from fastppo.online.critic import add_to_checkpoint, leave_critic
from fastppo.online.evaluation import evaluate, samples
from fastppo.online.progress import Progress
from fastppo.planner import check_plan
from fastppo.rewards import Source, check_chats, check_imports, check_references, load_judge, load_sources
from fastppo.rollout import ActorSampler, check_sampled_model, find_engine, make_sampler, named_stop_ids

C = TypeVar("C", bound=OnlineConfig)
P = TypeVar("P", bound=Progress)

LoadTexts = Callable[[PreTrainedTokenizerBase, int | None], Examples | None]  # (tokenizer, context in tokens)


@dataclass(frozen=True)
class Setup(Generic[C, P]):
    """What a run has in hand before its first step."""

    config: C
    world: World
    roles: Roles
    sampler: ActorSampler  # of responses, in training and in evaluation
    sources: Sequence[tuple[Source, float]]  # of reward, with their weights
    judge: Sequence[tuple[Source, float]]  # the held-out one; empty without
    data: PromptSet  # to train on
    heldout: PromptSet
    texts: Examples | None  # given ones, mixed into the updates
    checkpoints: Checkpoints
    progress: P  # where the run is; the one part that changes
    phases: Phases  # seconds of each

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    def prompts(self, count: int, start: int) -> Iterator[Prompts]:
        """The global batches of the run from number `start` on: `count` prompts each, every one with its samples.

        A prompt's index is its place in the run's order of prompts, so that no two batches share random numbers.
        """
        samples, shuffle = self.config.sampling.samples_per_prompt, self.config.data.shuffle
        rows_of_batches = batches(self.data, size=count, seed=self.config.seed, shuffle=shuffle, start=start)
        for number, rows in enumerate(rows_of_batches, start=start):
            yield Prompts.of(self.data.tokens, rows, first=number * count, samples=samples, data=self.data)

    def evaluating(self) -> AbstractContextManager[object]:
        """Within this context an evaluation has the sources of reward for itself."""
        return nullcontext()

    def tracker(self) -> Tracker:
        config, done = self.config, self.progress.step
        return Tracker(self.output, config.track, steps=config.steps, rank=self.world.rank, done=done)


def set_up(
    config: C,
    world: World,
    progress: P,
    load_texts: LoadTexts,
    texts_setting: str,
    check_prompts: Callable[[PromptSet], object] | None = None,
) -> Setup[C, P] | None:
    """The run's folder, models, sources of reward and prompts, and its progress if it is resumed.

    None if an alarm has ended the run, and would again. What can be wrong is looked at in the order of what it costs to
    find out. An earlier run in the folder is moved aside when only the weights are left to be read.

    progress: of a new run; load_texts: reads given texts to learn from; texts_setting: where they are, for messages;
    check_prompts: what else the method asks of its prompts.
    """
    check_imports(config.rewards)  # a typo in a function's name should not cost the minutes of loading models
    check_imports(config.judge, config.judge_setting)
    check_environment(config)
    find_engine(config)
    checkpoint = find_run(config, world)
    if checkpoint is not None and checkpoint.ended(config, world):
        return None
    planned = check_plan(config, world)
    tokenizer, context = load_actor_tokenizer(config), actor_context(config)
    check_models(config, tokenizer)
    check_sampled_model(config, actor_config(config))
    named_stop_ids(tokenizer, config.sampling)  # a text that is no token should not cost these minutes either
    data, heldout = load_prompts(
        config.data,
        tokenizer,
        prompts_heldout=config.eval.prompts,
        context=context,
        reserve=config.sampling.max_new_tokens,
    )
    check_chats(config, tokenizer, data, heldout)
    check_references(config, world, data, heldout)
    check_conversations(config, tokenizer, data, heldout)
    check_actor_tokens(config, tokenizer, (*data.tokens, *heldout.tokens), "data.path")
    if check_prompts is not None:
        check_prompts(data)
    texts = load_texts(tokenizer, context)
    if texts is not None:
        check_actor_tokens(config, tokenizer, texts.tokens, texts_setting)
    open_folder(config, checkpoint, world)
    roles = assemble(planned.config, world, tokenizer, planned.placement)
    sampler = make_sampler(planned.config, roles, world)
    sources, judge = (load(config, tokenizer, world, roles.residency) for load in (load_sources, load_judge))
    learned = [data.tokens, heldout.tokens, *([] if texts is None else [texts.tokens])]
    export_best = None if roles.value_role is None else partial(add_to_checkpoint, roles, world)
    holding = roles.residency.holding
    checkpoints = Checkpoints(config, roles.saved, learned, world, holding=holding, export_best=export_best)
    checkpoints.load(checkpoint, progress)
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
    )


def evaluate_if_due(setup: Setup[Any, Any], tracker: Tracker) -> None:
    """Evaluate before the first step, after the last, and every `eval.every` steps; a resumed run not once more."""
    config, run = setup.config, setup.progress
    if not config.eval.is_due(run.step, config.steps, run.evaluated):
        return
    with in_phase("evaluation"):
        _evaluate(setup, tracker)


def _evaluate(setup: Setup[Any, Any], tracker: Tracker) -> None:
    config, run = setup.config, setup.progress
    roles, sampler, world = setup.roles, setup.sampler, setup.world
    look = partial(evaluate, roles, sampler, setup.heldout, setup.sources, config, world, setup.judge)
    with setup.evaluating():
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
    shown = (evaluation.responses, evaluation.scores, evaluation.said, evaluation.turn_rewards)
    tracker.log_responses(run.step, heldout_responses(setup.heldout.texts, *shown, count=config.track.responses))


def finish(setup: Setup[Any, Any], tracker: Tracker) -> None:
    """Leave the actor in `output`/actor and a critic in `output`/critic; then show held-out responses before and after.

    All ranks call it. Raises ExportError at the end if one of the models is elsewhere, or nowhere.
    """
    config, world, roles, evaluations = setup.config, setup.world, setup.roles, setup.progress.evaluations
    left = []
    with roles.residency.holding("export"):
        if roles.average is not None:
            with roles.average.in_place():
                left.append(_leave(setup, setup.output / "actor-average"))
        left.append(_leave(setup, setup.output / "actor"))
        if (critic := leave_critic(roles, setup.output / "critic", setup.progress, world)) is not None:
            left.append(critic)
    if world.rank == 0 and setup.progress.ended is not None:
        setup.progress.ended.write(setup.checkpoints.folder)
    if world.rank == 0 and len(evaluations) > 1:
        shown = samples(setup.heldout, evaluations[0], evaluations[-1])
        with tracker.guard("samples.jsonl"):
            write_samples(setup.output / "samples.jsonl", shown)
        with tracker.guard(TERMINAL):
            show_samples(shown[: config.eval.show])
    check_exports(left, setup.checkpoints, setup.progress)


def _leave(setup: Setup[Any, Any], folder: Path) -> ExportedModel:
    """Export the actor. All ranks call it.

    If it was sampled from whole on each GPU, it has room there again. Else its weights are gathered one at a time, into
    the host memory of the first rank: they may fit no GPU.
    """
    roles, world, state = setup.roles, setup.world, None
    policy = roles.policy
    if roles.sampling_weights.has_memory:
        policy = roles.sampling_weights.gather()
    else:
        state = whole_state(policy.model, world)
    return export_model(policy, roles.tokenizer, folder, setup.config.actor.lora, world, state)
