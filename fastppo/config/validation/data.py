"""Rules about the settings of prompts and sampling."""

from __future__ import annotations

import difflib
import json
from typing import Any

from fastppo.config.commands.generate import GenerateConfig
from fastppo.config.commands.offline import ExamplesConfig
from fastppo.config.commands.online import OnlineConfig
from fastppo.config.data import DataConfig, RolloutConfig, VllmConfig
from fastppo.errors import ConfigError


def check_data(config: OnlineConfig) -> None:
    data, prompts = config.data, config.eval.prompts
    check_prompts(data)
    if prompts == 0 and (config.eval.every or data.eval_path is not None):
        setting = f"eval.every is {config.eval.every}" if config.eval.every else f"data.eval_path is {data.eval_path}"
        raise ConfigError(f"{setting} but eval.prompts is 0, which turns evaluation off. Set eval.prompts above 0.")
    check_heldout(data, "eval.prompts", prompts, "prompts")


def check_prompts(data: DataConfig) -> None:
    if not data.path:
        raise ConfigError("data.path is not set: give a dataset on the hub, a directory or a file with prompts.")
    if data.first_tokens is not None:
        if data.chat == "always":
            raise ConfigError(
                f"data.first_tokens is {data.first_tokens} and data.chat is always: first_tokens truncates plain text,"
                " and a truncated chat prompt would lack the end of its template. Set data.chat to auto or never,"
                " or leave out data.first_tokens."
            )
        if data.first_tokens > data.max_prompt_tokens:
            raise ConfigError(
                f"data.first_tokens is {data.first_tokens} and data.max_prompt_tokens {data.max_prompt_tokens}:"
                " every prompt would be too long. Raise max_prompt_tokens or lower first_tokens."
            )
        if data.suffix:
            raise ConfigError(
                f"data.first_tokens is {data.first_tokens} and data.suffix {data.suffix!r}: prompts are cut after the"
                " suffix is added, so that no prompt would have it. Leave out one of the two."
            )
    check_template(data)


def check_heldout(data: DataConfig | ExamplesConfig, setting: str, count: int, what: str) -> None:
    """Whether so many can be held out as the setting says; what: they are."""
    if data.eval_path is None and data.eval_split != "train":
        raise ConfigError(
            f"data.eval_split is {data.eval_split} but data.eval_path is not set, so that held-out {what} are taken"
            f" from data.path. Set data.eval_path to {data.path} to evaluate on another split of it."
        )
    if data.eval_path is None and data.limit is not None and data.limit <= count:
        raise ConfigError(
            f"data.limit is {data.limit} and {setting} {count}: if these are held out, no {what} remain for training."
            f" Raise data.limit, lower {setting}, or give data.eval_path."
        )


def check_template(data: DataConfig | ExamplesConfig) -> None:
    if data.template and data.chat == "never":
        raise ConfigError(
            f"data.template is {data.template} and data.chat is never: without chat no template is applied. Leave out"
            " data.template, or set data.chat to auto or always."
        )
    check_tools(data)


FORM = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}'


def check_tools(data: DataConfig | ExamplesConfig) -> None:
    if not data.tools:
        if isinstance(data, DataConfig) and data.tool_format != "auto":
            raise ConfigError(
                f"data.tool_format is {data.tool_format} and data.tools is empty: no call would be read. Give"
                " data.tools, or leave out data.tool_format."
            )
        return
    names: list[str] = []
    for i, tool in enumerate(data.tools):
        if (problem := _tool_problem(tool)) is not None:
            raise ConfigError(f"data.tools[{i}] {problem}. A tool has the form {FORM}, with a JSON schema.")
        names.append(tool["function"]["name"])
        if names.count(names[-1]) > 1:
            raise ConfigError(
                f"data.tools[{names.index(names[-1])}] and data.tools[{i}] are both named {names[-1]}: a call could mean"
                " either. Give each tool a name of its own."
            )
    if "tools" in data.template:
        raise ConfigError(
            "data.tools and data.template both have tools, and the chat template takes one list. Leave tools out of"
            " data.template."
        )
    if data.chat == "never":
        raise ConfigError(
            f"data.tools has {', '.join(names)} and data.chat is never: only a chat template tells the model of tools."
            " Leave out data.tools, or set data.chat to auto or always."
        )


def _tool_problem(tool: Any) -> str | None:
    """What is wrong with the JSON schema of a tool, or None."""
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        return "is no function"
    function = tool["function"]
    if not isinstance(name := function.get("name"), str) or not name.strip():
        return "has no name, which must be a text"
    parameters = {} if function.get("parameters") is None else function["parameters"]
    if not isinstance(parameters, dict):
        return f"({name}) has parameters that are no JSON schema of an object"
    required = parameters.get("required", [])
    if not isinstance(required, list) or not all(isinstance(each, str) for each in required):
        return f"({name}) has parameters.required that is no list of names"
    try:
        json.dumps(tool, allow_nan=False)
    except (TypeError, ValueError) as error:
        return f"({name}) cannot be written as JSON ({error})"
    return None


def check_sampling(config: OnlineConfig | GenerateConfig) -> None:
    sampling, budget, longest = config.sampling, config.microbatch_tokens, config.data.max_prompt_tokens
    if sampling.min_new_tokens > sampling.max_new_tokens:
        raise ConfigError(
            f"sampling.min_new_tokens is {sampling.min_new_tokens} and sampling.max_new_tokens"
            f" {sampling.max_new_tokens}: the minimum length must not exceed the maximum. Lower min_new_tokens or raise"
            " max_new_tokens."
        )
    if "" in sampling.stop_tokens:
        raise ConfigError("sampling.stop_tokens contains an empty text; each must be a token of the tokenizer.")
    if sampling.ignore_eos and sampling.stop_tokens:
        raise ConfigError(
            f"sampling.stop_tokens is {list(sampling.stop_tokens)} and sampling.ignore_eos is true: with ignore_eos"
            " no token ends a response before max_new_tokens. Leave out one of the two."
        )
    if longest + sampling.max_new_tokens > budget:
        raise ConfigError(
            f"{config.names.microbatch} is {budget}, but one sequence can have"
            f" {longest + sampling.max_new_tokens} tokens (data.max_prompt_tokens {longest} +"
            f" sampling.max_new_tokens {sampling.max_new_tokens}) and must fit into one microbatch. Raise"
            " microbatch_tokens, or lower one of the other two."
        )


COLDEST, HOTTEST = 0.01, 2.0  # the temperatures that vLLM computes with; below it uses 0.01 and says so in its log only


ENGINES = ("inprocess", "vllm")  # fastppo's own

# Settings of `rollout` that belong to `rollout.environment`.
OF_ENVIRONMENT = ("max_turns", "turn_tokens", "time_limit", "concurrency")


def check_rollout(config: OnlineConfig | GenerateConfig, ranks: int) -> None:
    check_engine(config.rollout.engine)
    check_conversations(config, ranks)
    vllm, engine = config.rollout.vllm, config.rollout.engine
    if engine != "vllm":
        for name, default in vars(VllmConfig()).items():
            if (value := getattr(vllm, name)) != default:
                raise ConfigError(
                    f"rollout.vllm.{name} is {value} and rollout.engine {engine}: it would have no effect. Set"
                    f" rollout.engine to vllm, or leave out rollout.vllm.{name}."
                )
        return
    size = vllm.tensor_parallel_size
    if ranks % size:
        possible = " or ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise ConfigError(
            f"rollout.vllm.tensor_parallel_size is {size}, and the run has {ranks} rank(s): groups of so many ranks must"
            f" make up all of them. Set it to {possible}, or start a multiple of {size} ranks (in a plan: --gpus)."
        )
    temperatures = {"sampling.temperature": config.sampling.temperature}
    if isinstance(config, OnlineConfig):
        temperatures["eval.temperature"] = config.eval.temperature
    for name, temperature in temperatures.items():
        if not COLDEST <= temperature <= HOTTEST:
            raise ConfigError(
                f"{name} is {temperature} and rollout.engine vllm, which computes with temperatures from {COLDEST} to"
                f" {HOTTEST:g} only. Choose one of these, or set rollout.engine to inprocess."
            )


def check_engine(name: str) -> None:
    """Refuse an engine that is neither one of fastppo's nor written as a class of the user's."""
    if name not in ENGINES and ":" not in name:
        near = difflib.get_close_matches(name, ENGINES, n=1)
        raise ConfigError(
            f"rollout.engine is {name or 'empty'}; it must be {' or '.join(ENGINES)}, or a class of yours as"
            f" module:Class or file.py:Class.{f' Did you mean {near[0]}?' if near else ''}"
        )


def check_conversations(config: OnlineConfig | GenerateConfig, ranks: int) -> None:
    rollout, sampling = config.rollout, config.sampling
    if rollout.environment is None:
        for name in OF_ENVIRONMENT:
            if (value := getattr(rollout, name)) != getattr(RolloutConfig(), name):
                raise ConfigError(
                    f"rollout.{name} is {value} and rollout.environment is not set: it would have no effect. Set"
                    f" rollout.environment, or leave out rollout.{name}."
                )
        return
    environment = f"rollout.environment is {rollout.environment}"
    if rollout.engine not in ENGINES:
        raise ConfigError(
            f"{environment} and rollout.engine {rollout.engine}: only fastppo's own engines write conversations. Set"
            " rollout.engine to inprocess or vllm, or leave out rollout.environment."
        )
    if rollout.turn_tokens is not None and rollout.turn_tokens > sampling.max_new_tokens:
        raise ConfigError(
            f"rollout.turn_tokens is {rollout.turn_tokens} and sampling.max_new_tokens {sampling.max_new_tokens}, the"
            " maximum of the whole conversation, which no turn can exceed. Raise max_new_tokens or lower turn_tokens."
        )
    if sampling.min_new_tokens:
        raise ConfigError(
            f"sampling.min_new_tokens is {sampling.min_new_tokens} and {environment}: a minimum length has no meaning for"
            " a response of several turns. Set sampling.min_new_tokens to 0."
        )
    if sampling.ignore_eos and rollout.turn_tokens is None:
        raise ConfigError(
            f"sampling.ignore_eos is true and {environment}: no token would end the first turn, which would take the"
            " whole conversation. Set rollout.turn_tokens, or leave out sampling.ignore_eos."
        )
    longest = rollout.max_turns * rollout.time_limit
    if ranks > 1 and longest >= config.timeout:
        raise ConfigError(
            f"rollout.max_turns is {rollout.max_turns} and rollout.time_limit {rollout.time_limit:g}: the environment may"
            f" take {longest:g} s for one conversation, but the other ranks wait only timeout = {config.timeout:g} s."
            f" Raise timeout above {longest:g}, or lower one of these."
        )
