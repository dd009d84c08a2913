"""A run that draws responses: what it begins with, its batches, and what is said of them at the end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fastppo.checkpoint import seed_random
from fastppo.config import GenerateConfig, TrackConfig
from fastppo.data import Prompts, PromptSet, Scored, batches, load_prompts
from fastppo.distributed import Residency, World, stop
from fastppo.environments import check_conversations, check_environment
from fastppo.generation.folder import check_data, find_generation, open_output
from fastppo.generation.lines import Lines, check_json
from fastppo.generation.parts import Parts, part_schema
from fastppo.generation.rows import columns_left_out, scored_rows
from fastppo.generation.store import FOLDER, Store
from fastppo.models import (
    DTYPES,
    Policy,
    SamplingWeights,
    check_embedded,
    check_sampled,
    choose_attention,
    choose_layers,
    context_of,
    load_config,
    load_sampled,
    sampled_source,
)
from fastppo.monitor import METRICS, Phases, Tracker, distinct_pairs, read_lines, turn_metrics
from fastppo.planner import check_plan
from fastppo.rewards import Source, check_chats, check_imports, check_references, load_judge, load_sources, score
from fastppo.rollout import ActorSampler, check_sampled_model, find_engine, make_sampler, named_stop_ids

log = logging.getLogger("fastppo")


class Sampled:
    """The model to draw from, for rollout engines (`models.SampledModel`): frozen, and whole on each GPU."""

    version = 0  # its weights never change

    def __init__(self, policy: Policy, tokenizer: PreTrainedTokenizerBase, residency: Residency):
        self.policy, self.tokenizer, self.residency = policy, tokenizer, residency
        self.sampling_weights = SamplingWeights(policy, stage=0)
        residency.add("sampled", self, "model")

    def states(self) -> list[torch.Tensor]:
        return list(self.policy.parameters())


@dataclass(frozen=True)
class Work:
    """The responses that a run draws: numbered from 0, those to a prompt one after the other, in batches."""

    data: PromptSet
    order: Sequence[int]  # the rows of the data, as they are answered
    samples: int  # responses to a prompt
    size: int  # of a batch

    @staticmethod
    def of(data: PromptSet, config: GenerateConfig) -> Work:
        order = next(batches(data, size=len(data), seed=config.seed, shuffle=config.data.shuffle))
        return Work(data, order, config.sampling.samples_per_prompt, config.batch_size)

    @property
    def counts(self) -> list[int]:
        """The responses of each batch."""
        total = len(self.order) * self.samples
        return [min(self.size, total - start) for start in range(0, total, self.size)]

    def batch(self, number: int) -> Prompts:
        """The prompts of a batch, of all ranks. Neither its first nor its last prompt needs to have all its samples."""
        start, samples = number * self.size, self.samples
        end = min(start + self.size, len(self.order) * samples)
        first, last = start // samples, -(-end // samples)
        whole = Prompts.of(self.data.tokens, self.order[first:last], first=first, samples=samples, data=self.data)
        return whole.select(range(start - first * samples, end - first * samples))


@dataclass(frozen=True)
class Setup:
    """What a run has in hand before its first batch."""

    config: GenerateConfig
    world: World
    work: Work
    store: Store
    done: int  # batches that were there already
    model: Sampled
    sampler: ActorSampler
    sources: Sequence[tuple[Source, float]]
    judge: Sequence[tuple[Source, float]]

    @property
    def tracker(self) -> Tracker:
        track = TrackConfig(tensorboard=False, responses=0, progress=self.config.progress)
        steps = len(self.work.counts)
        return Tracker(Path(self.config.output), track, steps=steps, rank=self.world.rank, done=self.done)


def set_up(config: GenerateConfig, world: World) -> Setup | None:
    """The run's folder, prompts, models and sources of reward, and how far it is. None if all responses are there.

    What can be wrong is looked at in the order of what it costs to find out. An earlier run in the folder is moved
    aside when only the weights are left to be read.
    """
    check_imports(config.rewards)
    check_imports(config.judge, config.judge_setting)
    check_environment(config)
    find_engine(config)
    about = find_generation(config, world)
    planned = check_plan(config, world)
    tokenizer = check_sampled(config)
    check_sampled_model(config, load_config(sampled_source(config.model)))
    named_stop_ids(tokenizer, config.sampling)
    data = _prompts(config, tokenizer)
    check_references(config, world, data)
    check_conversations(config, tokenizer, data)
    check_data(about, data, config)
    work, store = Work.of(data, config), _store(config, data, world)
    done = 0 if about is None else store.whole(work.counts)
    if done == len(work.counts):
        log.info("all %d responses are in %s already: there is nothing to do", sum(work.counts), store.place)
        return None
    open_output(config, about, done, world)
    if about is not None:
        store.keep(done)
        log.info("continuing after %d of %d responses", sum(work.counts[:done]), sum(work.counts))
    residency = Residency(world.device, planned.placement)
    choose_attention(config.attention, DTYPES[config.dtype], world.device)
    choose_layers(fused=config.model.fused)
    model = Sampled(load_sampled(config, world.device), tokenizer, residency)
    sampler = make_sampler(planned.config, model, world)
    sources, judge = (load(config, tokenizer, world, residency) for load in (load_sources, load_judge))
    return Setup(config, world, work, store, done, model, sampler, sources, judge)


def _prompts(config: GenerateConfig, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    source, longest = sampled_source(config.model), config.sampling.max_new_tokens
    context = context_of(load_config(source))
    data, _ = load_prompts(config.data, tokenizer, prompts_heldout=0, context=context, reserve=longest)
    check_chats(config, tokenizer, data)
    check_embedded(source, tokenizer, data.tokens, "data.path")
    if left_out := columns_left_out(data, config.data.column):
        log.info(
            "%s: the columns %s of the data are not written: their names mean something else beside a response",
            *(config.data.path, ", ".join(left_out)),
        )
    return data


def _store(config: GenerateConfig, data: PromptSet, world: World) -> Store:
    output = Path(config.output)
    if config.format == "jsonl":
        check_json(data)
        return Lines(output / f"{FOLDER}.jsonl", config.sampling.samples_per_prompt, world)
    schema = part_schema(
        data, sources=len(config.rewards), judge=bool(config.judge), environment=config.rollout.environment is not None
    )
    return Parts(output / FOLDER, schema, world)


def draw(setup: Setup, number: int, phases: Phases) -> tuple[Prompts, Scored]:
    """The prompts of a batch, and their scored responses, of all ranks. Raises Stopped within sampling.

    A reward function that draws random numbers draws those that belong to seed, batch and rank, so that a batch that is
    done again is the same.
    """
    config, world, holding = setup.config, setup.world, setup.model.residency.holding
    prompts = setup.work.batch(number)
    with phases("sampling"), holding("sampling"), stop.together(world):
        setup.sampler.sync()
        rollout = setup.sampler.sample(prompts.of_rank(world.rank, world.ranks))
    seed_random(f"{config.seed}/{number}", world.rank)
    with phases("feedback"), holding("feedback", then="sampling"):
        scored = score(
            rollout,
            setup.work.data,
            setup.sources,
            setup.model.tokenizer,
            world,
            setup.judge,
            judge_setting=config.judge_setting,
        )
    return prompts, scored


def rows_of(setup: Setup, prompts: Prompts, scored: Scored) -> dict[str, list[Any]] | None:
    """What is written of a batch, on rank 0."""
    if setup.world.rank != 0:
        return None
    return scored_rows(scored, prompts, setup.work.data, setup.model.tokenizer, setup.work.samples)


def batch_metrics(scored: Scored, seconds: dict[str, float]) -> dict[str, float]:
    """Means over the responses of a batch. seconds: `time/PHASE` of its phases."""
    packed, scores = scored.rollout.packed, scored.scores.double()
    tokens = int(packed.response_cu_seqlens[-1])
    metrics: dict[str, float] = {"responses": len(packed)}
    if scored.by_source.shape[1]:
        metrics |= {"score": float(scores.mean()), "score_std": float(scores.std(correction=0))}
    if scored.by_source.shape[1] > 1:
        metrics |= {f"score/{i}": float(x) for i, x in enumerate(scored.by_source.double().mean(0))}
    if not scored.judged.isnan().any():
        metrics["judge"] = float(scored.judged.double().mean())
    metrics |= {
        "response_length": tokens / len(packed),
        "ended": float(scored.rollout.ended.double().mean()),
        "distinct_2": distinct_pairs(packed),
        **turn_metrics(packed, scored.rollout.turn_rewards),
    }
    return metrics | seconds | {"tokens_per_second": tokens / sum(seconds.values())}


def tell(setup: Setup) -> None:
    """What the run has drawn, as means over all its batches. Rank 0 only says it."""
    if setup.world.rank != 0:
        return
    lines = read_lines(Path(setup.config.output) / METRICS)
    count = sum(line["responses"] for line in lines)
    shown = {"score": "mean score {:.3f}", "judge": "judge {:.3f}", "ended": "ended {:.1%}"}
    shown |= {"turns": "turns {:.2f}", "turn_reward": "rewards of turns {:.3f}"}
    shown |= {"distinct_2": "distinct-2 {:.3f} (of a batch)"}
    said = [
        text.format(sum(line[name] * line["responses"] for line in lines) / count)
        for name, text in shown.items()
        if count and all(isinstance(line.get(name), int | float) for line in lines)
    ]
    prompts = len(setup.work.order)
    summary = f"{sum(setup.work.counts):,} responses to {prompts:,} prompts are in {setup.store.place}"
    log.info("%s: %s", summary, ", ".join(said)) if said else log.info("%s", summary)
