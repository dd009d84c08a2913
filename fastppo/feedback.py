"""Feedback: one score for each whole response, from reward models and Python functions."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastppo.batch import Packed, Rollout, Scored, concatenate, pack
from fastppo.config import Config, PPOConfig, RewardConfig
from fastppo.data import PromptSet
from fastppo.engine import World, all_gather
from fastppo.errors import FastPPOError
from fastppo.load import DTYPES, load_reward
from fastppo.microbatch import pack_even
from fastppo.models import RewardModel

log = logging.getLogger("fastppo")


class RewardError(FastPPOError):
    """A source of reward that is missing, fails or answers with something that is not one finite number a response."""


@dataclass(frozen=True)
class Responses:
    """What a source of reward sees: text, and for reward models with the actor's tokenizer the tokens themselves."""

    prompts: list[str]
    texts: list[str]
    columns: dict[str, list[Any]]  # every other column of the data, one value a response
    packed: Packed


Source = Callable[[Responses], Sequence[float]]


def load_functions(rewards: Sequence[RewardConfig]) -> dict[str, Source]:
    """The Python functions among the sources, imported. Done before any model loads, so a typo costs no minutes."""
    return {r.function: _function_source(r.function) for r in rewards if r.function is not None}


def load_sources(
    config: Config, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> list[tuple[Source, float]]:
    """Every source of the config with its weight, in order."""
    functions = load_functions(config.rewards)
    sources: list[tuple[Source, float]] = []
    for reward in config.rewards:
        if reward.function is not None:
            sources.append((functions[reward.function], reward.weight))
        else:
            model, theirs = load_reward(reward, DTYPES[config.optim.dtype], device)
            sources.append((_ModelSource(model, theirs, tokenizer, config.ppo.microbatch_tokens), reward.weight))
    return sources


def load_judge(config: Config, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> list[tuple[Source, float]]:
    """The sources of the held-out judge; none if there is no judge."""
    return load_sources(replace(config, rewards=config.health.judge), tokenizer, device)


def score(
    rollout: Rollout,
    prompts: PromptSet,
    sources: Sequence[tuple[Source, float]],
    tokenizer: PreTrainedTokenizerBase,
    ppo: PPOConfig,
    judge: Sequence[tuple[Source, float]] = (),
) -> Scored:
    """The weighted sum of all sources, clipped if so configured, less the penalty for a response that was cut.

    judge: sources that score the same responses and that nothing learns from.
    """
    rows = rollout.sources.tolist()
    responses = Responses(
        prompts=[prompts.texts[row] for row in rows],
        texts=_decode(rollout.packed, tokenizer),
        columns={name: [column[row] for row in rows] for name, column in prompts.columns.items()},
        packed=rollout.packed,
    )
    scores = _weighted(sources, responses)
    judged = _weighted(judge, responses) if judge else torch.full_like(scores, math.nan)
    if ppo.score_clip is not None:
        scores = scores.clamp(-ppo.score_clip, ppo.score_clip)
    return Scored(rollout, scores - ppo.truncation_penalty * (~rollout.ended).float(), judged)


def _weighted(sources: Sequence[tuple[Source, float]], responses: Responses) -> Tensor:
    """(B,) fp32, the weighted sum of what the sources say."""
    scores = torch.zeros(len(responses.texts))
    if responses.texts:
        for source, weight in sources:
            scores += weight * torch.tensor(source(responses), dtype=torch.float32)
    return scores


def gather_scored(scored: Scored, world: World) -> Scored:
    """The scored rollouts of all ranks as one, the same on every rank, in the order of the prompts."""
    return concatenate(all_gather(scored, world))


def _decode(packed: Packed, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The responses' text, without special tokens."""
    parts = packed.responses.split(packed.response_lengths.tolist())
    return list(tokenizer.batch_decode([part.tolist() for part in parts], skip_special_tokens=True))


def _function_source(name: str) -> Source:
    function = _import_function(name)

    def source(responses: Responses) -> list[float]:
        try:
            answer = function(prompts=responses.prompts, responses=responses.texts, **responses.columns)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            raise RewardError(f"rewards.function = {name} raised {type(error).__name__}: {error} ({where})") from error
        return _checked(name, answer, responses)

    return source


def _checked(name: str, answer: Any, responses: Responses) -> list[float]:
    """One finite number for each response, or an error that shows the first that is not."""
    if isinstance(answer, Tensor):
        answer = answer.tolist()
    try:
        numbers = list(answer)
    except TypeError:
        raise RewardError(
            f"rewards.function = {name} returned {type(answer).__name__}, not one number for each response"
        ) from None
    if len(numbers) != len(responses.texts):
        raise RewardError(
            f"rewards.function = {name} returned {len(numbers)} numbers for {len(responses.texts)} responses"
        )
    for i, (number, text) in enumerate(zip(numbers, responses.texts, strict=True)):
        try:
            finite = math.isfinite(number)
        except TypeError:
            raise RewardError(
                f"rewards.function = {name} returned {number!r} ({type(number).__name__}), not a number, for"
                f" response {i}: {text[:200]!r}"
            ) from None
        if not finite:
            raise RewardError(f"rewards.function = {name} returned {number} for response {i}: {text[:200]!r}")
    return [float(n) for n in numbers]


def _import_function(name: str) -> Callable[..., Any]:
    """`module:function`, the module importable from here, or `path/to/file.py:function`."""
    module_name, _, attribute = name.rpartition(":")
    if not module_name or not attribute:
        raise RewardError(f"rewards.function = {name}: write it as module:function or file.py:function")
    try:
        if module_name.endswith(".py"):
            module = _import_file(Path(module_name))
        else:
            sys.path.insert(0, str(Path.cwd()))  # the launcher's scripts do not see the folder they were started in
            try:
                module = importlib.import_module(module_name)
            finally:
                sys.path.pop(0)
    except Exception as error:
        raise RewardError(
            f"rewards.function = {name}: {module_name} could not be imported ({type(error).__name__}: {error})"
        ) from error
    function: Any = getattr(module, attribute, None)
    if not callable(function):
        found = ", ".join(n for n in vars(module) if not n.startswith("_") and callable(vars(module)[n])) or "none"
        raise RewardError(f"rewards.function = {name}: {module_name} has no function {attribute}; it has: {found}")
    return cast("Callable[..., Any]", function)


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _ModelSource:
    """A reward model. With the actor's tokenizer it reads the very tokens; with another, the text anew."""

    def __init__(
        self, model: RewardModel, tokenizer: PreTrainedTokenizerBase, actors: PreTrainedTokenizerBase, budget: int
    ):
        self.model, self.tokenizer, self.budget = model, tokenizer, budget
        self.same = tokenizer.get_vocab() == actors.get_vocab()
        self.context = getattr(model.model.config, "max_position_embeddings", None)
        if not self.same:
            log.info("the reward model has a tokenizer of its own: prompts and responses are tokenised anew for it")

    @torch.no_grad()
    def __call__(self, responses: Responses) -> list[float]:
        packed = responses.packed if self.same else self._tokenised(responses)
        longest = int(packed.lengths.max())
        if self.context is not None and longest > self.context:
            raise RewardError(f"a prompt and response of {longest} tokens do not fit the reward model's {self.context}")
        scores = torch.zeros(len(packed))
        everything = torch.arange(len(packed))
        for part in pack_even(everything, packed.lengths, max(self.budget, longest), ranks=1):
            scores[part] = self.model.score(packed.select(part).to(self.model.device)).cpu()
        for i in (~scores.isfinite()).nonzero().flatten().tolist():
            raise RewardError(f"the reward model gave {float(scores[i])} to response {i}: {responses.texts[i][:200]!r}")
        numbers: list[float] = scores.tolist()
        return numbers

    def _tokenised(self, responses: Responses) -> Packed:
        texts = [p + r for p, r in zip(responses.prompts, responses.texts, strict=True)]
        tokens = [ids or [self.tokenizer.eos_token_id] for ids in self.tokenizer(texts)["input_ids"]]
        return pack(tokens, [1] * len(tokens))
