"""Rules about tools, which hold for every command whose data may have them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from chat_templates import tool

from fastppo.config import AnswersConfig, DataConfig, PairsConfig
from fastppo.config.command_line import GENERATE, PPO, REST, SFT, dump, parse
from fastppo.config.validation.data import check_template
from fastppo.errors import ConfigError

ADD = tool("add", "a", "b")


def with_function(**changes: Any) -> dict[str, Any]:
    return ADD | {"function": ADD["function"] | changes}


@pytest.mark.parametrize("kind", [DataConfig, AnswersConfig, PairsConfig])
def test_tools_with_names_of_their_own_are_allowed(kind):
    bare = {"type": "function", "function": {"name": "now"}}
    check_template(kind(tools=(ADD, tool("search", "query"), bare), template={"thinking": False}))
    check_template(kind())


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ((ADD, {"name": "add"}), r'data.tools\[1\] is no function. A tool has the form \{"type": "function"'),
        (("add",), r"data.tools\[0\] is no function"),
        ((ADD | {"type": "retrieval"},), r"data.tools\[0\] is no function"),
        ((with_function(name=" "),), r"data.tools\[0\] has no name, which must be a text"),
        ((with_function(name=None),), r"data.tools\[0\] has no name"),
        ((with_function(parameters=["a"]),), r"data.tools\[0\] \(add\) has parameters that are no JSON schema"),
        ((with_function(parameters={"required": "a"}),), r"\(add\) has parameters.required that is no list of names"),
        ((with_function(default=math.nan),), r"data.tools\[0\] \(add\) cannot be written as JSON"),
        ((with_function(default={1, 2}),), r"data.tools\[0\] \(add\) cannot be written as JSON"),
        ((ADD, tool("now"), ADD), r"data.tools\[0\] and data.tools\[2\] are both named add: .* a name of its own"),
    ],
)
@pytest.mark.parametrize("kind", [DataConfig, AnswersConfig])
def test_what_is_no_tool_is_refused_with_its_place(kind, tools, words):
    with pytest.raises(ConfigError, match=words):
        check_template(kind(tools=tools))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tools": (ADD,), "template": {"tools": [ADD]}}, "data.tools and data.template both have tools"),
        ({"tools": (ADD,), "chat": "never"}, "data.tools has add and data.chat is never: .* auto or always"),
        ({"tool_format": "hermes"}, "data.tool_format is hermes and data.tools is empty: no call would be read"),
    ],
)
def test_what_contradicts_tools_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        check_template(DataConfig(**settings))


@pytest.mark.parametrize(
    ("command", "preset"),
    [(PPO, "quickstart"), (REST, "quickstart-rest"), (SFT, "quickstart-sft"), (GENERATE, "quickstart-generate")],
)
def test_every_command_with_prompts_or_demonstrations_checks_its_tools(capsys, command, preset):
    twice = json.dumps([ADD, ADD])
    with pytest.raises(SystemExit):
        parse(["--config", preset, "--data.tools", twice], command, ranks=1)
    assert "data.tools[0] and data.tools[1] are both named add" in capsys.readouterr().err


def test_tools_come_from_the_command_line_and_a_dumped_config_reads_back(tmp_path):
    config = parse(["--config", "quickstart-sft", "--data.tools", json.dumps([ADD])], SFT, ranks=1)
    assert config.data.tools == (ADD,)
    (tmp_path / "config.yaml").write_text(dump(config), encoding="utf-8")
    assert parse(["--config", str(tmp_path / "config.yaml")], SFT, ranks=1) == config
