"""The environment of a run, before a model loads: what `rollout.environment` may name, and what it may ask for."""

import logging
import os
import sys
import textwrap
from dataclasses import replace

import chat_templates
import pytest
import scripted
import tiny
import torch

from fastppo.config import Config, DataConfig, GenerateConfig, RolloutConfig
from fastppo.environments import ConversationError, check_environment, check_environment_columns, load_environment

RIGHT = """
    def plain(conversation, turn): ...
    async def later(**columns): ...
    class Game:
        def __init__(self, size=3): ...
        def reset(self, *, seed=None, options=None): ...
        def step(self, action): ...
    class Static:
        @staticmethod
        def reset(seed, options): ...
        @classmethod
        def step(cls, action): ...
    class Called:
        def __call__(self, turn): ...
    called = Called()
"""
WRONG = """
    import torch
    value = 5
    class Empty: ...
    class NoStep:
        def reset(self, *, seed=None, options=None): ...
    class NoSeed:
        def reset(self): ...
        def step(self, action): ...
    class TwoActions:
        def reset(self, seed=None, options=None): ...
        def step(self, action, other): ...
    class Sized:
        def __init__(self, size): ...
        def reset(self, seed=None, options=None): ...
        def step(self, action): ...
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes talk.py into an empty folder, and goes there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield lambda text: (tmp_path / "talk.py").write_text(textwrap.dedent(text))
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def config(name="talk.py:talk", **data):
    return replace(Config(), rollout=RolloutConfig(environment=name), data=DataConfig(**data))


@pytest.mark.parametrize("name", ["plain", "later", "Game", "Static", "called"])
def test_functions_and_classes_are_loaded(write, name):
    write(RIGHT)
    check_environment(config(f"talk.py:{name}"))
    environment = load_environment(config(f"talk.py:{name}"), tiny.tokenizer())
    assert environment.is_class == name[0].isupper() and environment.setting == f"rollout.environment = talk.py:{name}"
    assert load_environment(GenerateConfig(rollout=RolloutConfig(environment=f"talk:{name}")), tiny.tokenizer())


def test_without_the_setting_there_is_none():
    check_environment(Config())
    check_environment_columns(Config(), scripted.plain("Ask"))
    assert load_environment(Config(), tiny.tokenizer()) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere:talk", "nowhere could not be imported (ModuleNotFoundError"),
        ("nowhere.py:talk", "no file nowhere.py"),
        ("talk.py", "write it as module:function"),
        ("talk.py:value", "has no function value; it has: Empty"),
        ("talk.py:Empty", "is a class without reset and without step"),
        (
            "talk.py:NoStep",
            "is a class without step; an environment has, after Gymnasium, reset(seed=..., options=...)",
        ),
        (
            "talk.py:NoSeed",
            "cannot be called as reset(seed=..., options=...): got an unexpected keyword argument 'seed'",
        ),
        (
            "talk.py:TwoActions",
            "cannot be called as step(action): missing a required argument: 'other'. Give its other",
        ),
        ("talk.py:Sized", "cannot be called as Sized(): missing a required argument: 'size'"),
    ],
)
def test_what_is_no_environment_is_refused_with_the_setting(write, name, words):
    write(WRONG)
    with pytest.raises(ConversationError) as error:
        check_environment(config(name))
    assert str(error.value).startswith(f"rollout.environment = {name}") and words in str(error.value)


def test_what_an_import_changes_of_the_process_is_undone(write, tmp_path):
    write("import os, torch; torch.set_default_dtype(torch.float64); os.chdir('/')\ndef talk(): ...")
    check_environment(config())
    assert torch.get_default_dtype() == torch.float32 and os.getcwd() == str(tmp_path)


def test_a_parameter_that_is_no_column_is_refused_with_the_names_that_there_are(write):
    write("def talk(turn, answer, hint=None): ...")
    check_environment_columns(
        config(), scripted.plain("Ask", answer=["x"]), scripted.plain("Tell", answer=["y"], hint=["z"])
    )
    words = r"has the parameter answer, .* conversation, turn, calls, ended, seed, topic\. Rename it"
    with pytest.raises(ConversationError, match=words):
        check_environment_columns(config(), scripted.plain("Ask", answer=["x"]), scripted.plain("Tell", topic=["y"]))


def test_columns_with_the_names_of_arguments_are_said_to_be_hidden(write, caplog):
    write(RIGHT)
    with caplog.at_level(logging.INFO, "fastppo"):
        check_environment_columns(config("talk.py:plain"), scripted.plain("Ask", turn=[1], seed=[2], answer=[3]))
    assert "rollout.environment = talk.py:plain does not receive the columns turn, seed: reserved names" in caplog.text


def test_a_class_may_ask_for_any_column(write):
    write(RIGHT)
    check_environment_columns(config("talk.py:Game"), scripted.plain("Ask"))


@pytest.mark.parametrize(("kind", "form"), [("qwen2.5", "hermes"), ("llama3", "llama3")])
def test_tools_are_read_in_the_form_of_the_actors_template(write, kind, form):
    write(RIGHT)
    tools = (chat_templates.tool("add", "a"),)
    settings = config("talk.py:plain", tools=tools, template={"enable_thinking": False})
    environment = load_environment(settings, chat_templates.tokenizer(kind))
    assert (environment.tools, environment.form) == (tools, form)
    assert environment.arguments == {"enable_thinking": False, "tools": list(tools)}
