"""The environment of a run: what `rollout.environment` names, looked at before a model is loaded."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastppo.config import ResponseSettings, RolloutConfig
from fastppo.data import PromptSet, check_observations, template_arguments
from fastppo.environments.answers import ConversationError
from fastppo.environments.tool_calls import ToolForm, tool_form
from fastppo.errors import UserCode, import_user_code
from fastppo.user_code import Signature, module_state, signature_of

log = logging.getLogger("fastppo")

# What a function is given, if it has a parameter of the name, beside the columns of the data.
ARGUMENTS = ("conversation", "turn", "calls", "ended", "seed")
# How the methods of a class are called, in words and as arguments, of which the first is `self`.
METHODS: Mapping[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "reset": ("(seed=..., options=...)", (None,), {"seed": 0, "options": {}}),
    "step": ("(action)", (None, ""), {}),
}


@dataclass(frozen=True)
class Environment:
    """A function or a class of the user, and all that a conversation with it depends on."""

    setting: str  # as in `rollout.environment = file.py:NAME`
    called: Callable[..., Any] = field(repr=False)
    folder: Path  # of its file
    limits: RolloutConfig
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    arguments: Mapping[str, Any]  # of the chat template
    tools: tuple[dict[str, Any], ...] = ()  # JSON schemas; empty: the actor's turns are not searched for calls
    form: ToolForm | None = None  # of its calls, where there are tools

    @property
    def is_class(self) -> bool:
        """Whether each conversation has an instance of its own, with `reset` and `step`."""
        return isinstance(self.called, type)

    @cached_property
    def signature(self) -> Signature:
        return signature_of(self.called)


def load_environment(config: ResponseSettings, tokenizer: PreTrainedTokenizerBase) -> Environment | None:
    """That of `rollout.environment`; None without one. tokenizer: the actor's.

    Raises ConversationError, or DataError for tools in a form that cannot be told.
    """
    if config.rollout.environment is None:
        return None
    setting, code = _imported(config.rollout.environment)
    data = config.data
    return Environment(
        *(setting, code.called, code.folder, config.rollout, tokenizer, template_arguments(data)),
        tools=data.tools,
        form=tool_form(tokenizer, data) if data.tools else None,
    )


def check_environment(config: ResponseSettings) -> None:
    """Import it and look at its kind before a model is loaded, which takes minutes. Raises ConversationError."""
    if config.rollout.environment is not None:
        _imported(config.rollout.environment)


def check_keeps_nothing(config: ResponseSettings, setting: str) -> None:
    """Raises ConversationError for a class, whose instances keep what is nowhere else. Before a model is loaded.

    setting: for which conversations are to go on in another process, and its value.
    """
    if config.rollout.environment is not None and isinstance(_imported(config.rollout.environment)[1].called, type):
        raise ConversationError(
            f"rollout.environment is {config.rollout.environment}, a class, and {setting}: what its instances know of a"
            " conversation that goes on is not in checkpoints. Give a function, which is told the whole conversation,"
            f" or leave out {setting.split()[0]}."
        )


def check_conversations(config: ResponseSettings, tokenizer: PreTrainedTokenizerBase, *prompts: PromptSet) -> None:
    """Check, before a model is loaded, that the chat template writes observations, and that the data has the columns
    that a function asks for. tokenizer: the actor's. Raises DataError or ConversationError."""
    if config.rollout.environment is None:
        return
    check_observations(tokenizer, config.data, any(chat is not None for part in prompts for chat in part.messages))
    check_environment_columns(config, *prompts)


def check_environment_columns(config: ResponseSettings, *prompts: PromptSet) -> None:
    """Raises ConversationError, with the names that a function may ask for, if it asks for another."""
    if config.rollout.environment is None:
        return
    setting, code = _imported(config.rollout.environment)
    for part in prompts:
        if hidden := [name for name in ARGUMENTS if name in part.columns]:
            log.info("%s does not receive the columns %s: reserved names", setting, ", ".join(hidden))
        available = dict.fromkeys((*ARGUMENTS, *part.columns))
        missing = [] if isinstance(code.called, type) else signature_of(code.called).required
        for name in missing:
            if name not in available:
                raise ConversationError(
                    f"{setting} has the parameter {name}, which is none of those that an environment is given and no"
                    f" column of the data; these are: {', '.join(available)}. Rename it, or give it a default."
                )


def _imported(name: str) -> tuple[str, UserCode]:
    """The setting, for messages, and what it names; what the import changes of process-wide state is undone."""
    setting = f"rollout.environment = {name}"
    module = name.rpartition(":")[0]
    with module_state(str(Path(module).resolve()) if module.endswith(".py") else module)(importing=True):
        code = import_user_code(name, setting, error=ConversationError)
    if isinstance(code.called, type):
        _check_class(setting, code.called)
    return setting, code


def _check_class(setting: str, kind: type) -> None:
    if absent := [name for name in METHODS if not callable(getattr(kind, name, None))]:
        raise ConversationError(
            f"{setting} is a class without {' and without '.join(absent)}; an environment has, after Gymnasium,"
            " reset(seed=..., options=...) and step(action). Add what is missing, or give a function."
        )
    kinds = {name: inspect.getattr_static(kind, name) for name in METHODS}
    # Of methods of another kind, such as static ones, Python tells the parameters in another way.
    calls = {name: (kinds[name], METHODS[name]) for name in METHODS if inspect.isfunction(kinds[name])}
    for name, (function, (how, positional, named)) in {kind.__name__: (kind, ("()", (), {})), **calls}.items():
        try:
            inspect.signature(function).bind(*positional, **named)
        except TypeError as error:
            raise ConversationError(
                f"{setting} cannot be called as {name}{how}: {error}. Give its other parameters defaults."
            ) from error
        except ValueError:  # of some classes written in C the parameters are not known
            continue
