"""Around the loop of a ReST run: what it begins with beside what every online run has, and what each step leaves."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from fastppo.config import ImproveConfig, RestConfig
from fastppo.data import Examples, Measured, Prompts, load_texts, template_arguments
from fastppo.distributed import World, all_gather
from fastppo.generation import Parts, part_schema
from fastppo.monitor import Alarm, Tracker, training_responses
from fastppo.online import Setup
from fastppo.online import set_up as set_up_online
from fastppo.rest.metrics import step_metrics
from fastppo.rest.progress import Improved, RestProgress
from fastppo.rest.selection import prompt_groups, prompts_of_equal_scores

log = logging.getLogger("fastppo")


@dataclass(frozen=True)
class RestSetup(Setup[RestConfig, RestProgress]):
    """What a ReST run has in hand before its first step."""

    schema: Any  # `pyarrow.Schema` of a Grow's parts

    def grows(self) -> Iterator[Prompts]:
        """The prompts of each Grow from here on, every one of them with its samples."""
        return self.prompts(self.config.grow.prompts, start=self.progress.step)

    def parts(self, step: int) -> Parts:
        """The files with the responses of the Grow of this step, counted from 1."""
        return Parts(self.output / "grows" / f"step-{step:08d}", self.schema, self.world)

    def save_within_step(self, done: int) -> None:
        """Save a checkpoint after every `checkpoint.within_step` batches or updates; done: how many, in this half."""
        every = self.config.checkpoint.within_step
        if every and done % every == 0:
            phase = self.roles.residency.phase
            self.checkpoints.save_or_tell(self.progress)
            self.roles.residency.enter(phase)  # a checkpoint is a phase of its own


class Step(NamedTuple):
    """What a ReST step found and did."""

    grown: Measured
    health: dict[str, float]  # health/FIGURE
    alarms: list[Alarm]


def set_up(config: RestConfig, world: World) -> RestSetup | None:
    """What the run begins with, as `fastppo.online.set_up` finds it; None if an alarm has ended the run for good."""
    progress = RestProgress.begin(config, world.rank)
    schema = partial(
        part_schema,
        sources=len(config.rewards),
        judge=bool(config.judge),
        environment=config.rollout.environment is not None,
    )
    texts = partial(_demonstrations, config)
    setup = set_up_online(config, world, progress, texts, "mixture.path", schema)  # a fault in it costs no loading
    if setup is None:
        return None
    found = RestSetup(**vars(setup), schema=schema(setup.data))
    _remove_later_grows(found)
    return found


def _demonstrations(config: RestConfig, tokenizer: PreTrainedTokenizerBase, context: int | None) -> Examples | None:
    if config.mixture.share == 0:
        return None
    return load_texts(config.mixture, tokenizer, context=context, template=template_arguments(config.data))


def _remove_later_grows(setup: RestSetup) -> None:
    """Those that a run wrote after the checkpoint from which it goes on: it writes them again."""
    step = setup.progress.step
    if setup.world.rank == 0:
        for folder in sorted((setup.output / "grows").glob("step-*")):
            if folder.name[5:].isdecimal() and int(folder.name[5:]) > step + 1:
                log.info("%s was written after the checkpoint; the run writes it again", folder)
                with suppress(OSError):
                    shutil.rmtree(folder)
    all_gather(None, setup.world)  # before a rank asks what is there
    setup.parts(step + 1).remove_from(len(setup.progress.grown))


def log_step(setup: RestSetup, done: Step, tracker: Tracker) -> None:
    """The metrics, responses and alarms of a step. Its phases' times begin anew."""
    run, number = setup.progress, setup.progress.step + 1
    groups = prompt_groups(done.grown, setup.config)
    equal = prompts_of_equal_scores(done.grown.scores, groups)
    tracker.log(number, step_metrics(done.grown, run.improves, equal, setup.phases.take()) | done.health)
    if tracker.wants_responses(number):
        count = setup.config.track.responses
        tracker.log_responses(number, training_responses(done.grown, setup.roles.tokenizer, count=count))
    tracker.log_alarms([asdict(alarm) for alarm in done.alarms])
    if setup.world.rank == 0:
        _tell(number, setup.config.improve, run.improves, len(done.grown.packed), equal)


def _tell(step: int, config: ImproveConfig, improves: Sequence[Improved], responses: int, equal_prompts: int) -> None:
    """Say what was learned from, and what teaches nothing."""
    if equal_prompts:
        log.info("step %d: all responses to each of %d prompts have the same score", step, equal_prompts)
    reached = {"quantile": ", score at least {:.4g}", "value": ", score above {:.4g}", "best": ""}[config.keep]
    for number, improve in enumerate(improves, start=1):
        log.info(
            "step %d, Improve %d of %d: %d of %d responses, of %d prompts%s; loss %.4f nats a token",
            *(step, number, len(improves), improve.kept, responses, improve.prompts),
            reached.format(improve.threshold),
            improve.loss / max(improve.tokens, 1),
        )
