"""The rollout engines by name, and the one place where a run's sampler is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedConfig

from fastppo.config import ResponseSettings
from fastppo.distributed import World
from fastppo.errors import import_user_code
from fastppo.models import SampledModel
from fastppo.rollout.answers import SamplerError
from fastppo.rollout.inprocess import make_inprocess
from fastppo.rollout.sampler import ActorSampler, Sampler, explained
from fastppo.rollout.stop_tokens import stop_ids
from fastppo.rollout.vllm.check import check_vllm, check_vllm_model
from fastppo.rollout.vllm.engine import make_vllm

# What makes an engine; a class is one. The stop ids are the tokens that end a response, all of them.
Make = Callable[[ResponseSettings, SampledModel, Sequence[int], World], Sampler]


class Engine(NamedTuple):
    """An engine of fastppo's. The checks raise SamplerError for what it cannot do."""

    make: Make
    check: Callable[[ResponseSettings], None] | None = None  # before anything is read
    check_model: Callable[[PreTrainedConfig], None] | None = None  # of the model to sample from: before weights load


ENGINES: Mapping[str, Engine] = {
    "inprocess": Engine(make_inprocess),
    "vllm": Engine(make_vllm, check_vllm, check_vllm_model),
}

METHODS, BOTH_OR_NEITHER = ("sync", "sample"), ("sleep", "wake")


class ChosenEngine(NamedTuple):
    """A way to make an engine."""

    setting: str  # as errors name it
    make: Make
    folder: Path | None = None  # of its file, if it is the user's


def find_engine(config: ResponseSettings) -> ChosenEngine:
    """That of `rollout.engine`. Before any model loads: a typo should not cost those minutes. Raises SamplerError."""
    name = config.rollout.engine
    setting = f"rollout.engine = {name}"
    if (engine := ENGINES.get(name)) is not None:
        if engine.check is not None:
            engine.check(config)
        return ChosenEngine(setting, engine.make)
    make, folder = import_user_code(name, setting, "class", SamplerError)
    if isinstance(make, type):
        _check_methods(setting, make)
    return ChosenEngine(setting, make, folder)


def check_sampled_model(config: ResponseSettings, model: PreTrainedConfig) -> None:
    """Raises SamplerError if the engine cannot sample from a model of this config. Before its weights load."""
    engine = ENGINES.get(config.rollout.engine)
    if engine is not None and engine.check_model is not None:
        engine.check_model(model)


def _check_methods(setting: str, sampler: object) -> None:
    sleeps = any(hasattr(sampler, method) for method in BOTH_OR_NEITHER)
    needed = (*METHODS, *BOTH_OR_NEITHER) if sleeps else METHODS
    absent = [method for method in needed if not callable(getattr(sampler, method, None))]
    if absent:
        raise SamplerError(
            f"{setting} has no {' and no '.join(absent)}; a sampler has the methods of fastppo.rollout.Sampler:"
            f" {' and '.join(METHODS)}; one with GPU memory of its own also {' and '.join(BOTH_OR_NEITHER)}."
        )


def make_sampler(config: ResponseSettings, roles: SampledModel, world: World) -> ActorSampler:
    """The sampler that training and evaluation ask, in the residency of the roles. All ranks call it."""
    setting, make, folder = find_engine(config)
    ids = stop_ids(roles.policy, roles.tokenizer, config.sampling)
    with explained(setting, folder):
        engine = make(config, roles, ids, world)
    _check_methods(setting, engine)
    sampler = ActorSampler(setting, engine, roles, config, ids, folder)
    roles.residency.add_sleeper("sampler", sampler)
    return sampler
