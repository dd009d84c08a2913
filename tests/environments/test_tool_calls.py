"""Tool calls in the text of a turn: which are made, and what the actor is told of those that are not."""

from __future__ import annotations

import json
from typing import Any

import chat_templates
import pytest
import tiny
from chat_templates import KINDS, tool

from fastppo.config import DataConfig
from fastppo.data import DataError
from fastppo.environments.tool_calls import Call, ToolCalls, call_texts, parse_calls, tool_form

TOOLS = (tool("calculate", "expression"), tool("now"), tool("search", "query", "folder"))
SUM = Call("calculate", {"expression": "1+2"})


def hermes(text: str) -> ToolCalls:
    return parse_calls(text, "hermes", TOOLS)


def llama3(text: str) -> ToolCalls:
    return parse_calls(text, "llama3", TOOLS)


def written(call: Call, key: str = "arguments") -> str:
    return json.dumps({"name": call.name, key: call.arguments})


def between(json_text: str) -> str:
    return f"<tool_call>\n{json_text}\n</tool_call>"


def test_a_turn_without_a_call_is_its_text():
    assert hermes(" The sum is 3.\n") == ToolCalls("The sum is 3.")
    assert llama3(" The sum is 3.\n") == ToolCalls("The sum is 3.")


def test_hermes_calls_are_found_in_their_order_and_the_text_around_them_is_content():
    text = f"First.\n{between(written(SUM))}{between(written(Call('now', {})))}\nThen."
    assert hermes(text) == ToolCalls("First.\n\nThen.", (SUM, Call("now", {})))


def test_a_call_needs_no_line_breaks_and_its_strings_may_hold_the_marker():
    call = Call("calculate", {"expression": "</tool_call> <tool_call>"})
    assert hermes(f"<tool_call>{written(call)}</tool_call>").calls == (call,)


def test_arguments_may_be_left_out_where_none_is_required():
    assert hermes(between('{"name": "now"}')).calls == (Call("now", {}),)
    assert llama3('{"name": "now"}').calls == (Call("now", {}),)


def test_a_thought_is_no_place_for_calls():
    thought = "<think>Shall I write <tool_call>?</think>"
    assert hermes(thought + between(written(SUM))) == ToolCalls(thought, (SUM,))
    assert hermes("Shall I write <tool_call>?</think>" + between(written(SUM))).calls == (SUM,)
    assert hermes(f"<think>{between(written(SUM))}") == ToolCalls(f"<think>{between(written(SUM))}")
    assert llama3('<think>{"name": "now"}</think>' + written(SUM, "parameters")).calls == (SUM,)


@pytest.mark.parametrize("tag", ["", "<|python_tag|>"])
def test_a_llama_turn_is_one_call_or_several(tag):
    text = written(SUM, "parameters")
    assert llama3(f" {tag}{text} ") == ToolCalls("", (SUM,))
    assert llama3(f"{tag}{text}; {text};{text}").calls == (SUM, SUM, SUM)
    typed = json.dumps({"type": "function", "name": "calculate", "parameters": SUM.arguments})
    assert llama3(tag + typed).calls == (SUM,)


def test_text_before_the_tag_is_content():
    assert llama3("I compute.<|python_tag|>" + written(SUM, "parameters")) == ToolCalls("I compute.", (SUM,))


@pytest.mark.parametrize(
    "text", ['{"answer": 3}', "{x | x > 0} is open", "{}", 'It is {"name": "now"}.', '["name"]', '"name"']
)
def test_a_llama_turn_that_looks_like_no_call_is_text(text):
    assert llama3(text) == ToolCalls(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<tool_call>\n" + written(SUM), "<tool_call> is not closed; write </tool_call> after the JSON object"),
        (written(SUM) + "</tool_call>", "there is a </tool_call> without a <tool_call> before it"),
        (
            between("calculate(1+2)"),
            "a JSON object between <tool_call> and </tool_call> is needed, and there is 'calcul",
        ),
        (between(""), "and there is '</tool_call>'"),
        (between('{"name": "now", }'), "its JSON is wrong at character 17, '}"),
        (between('{"name": "now"'), "its JSON is wrong at character 16, '</tool_call>': Expecting ',' delimiter"),
        (between(written(SUM) + "}"), r"</tool_call> must follow the JSON object, not '}\n</tool_call>'"),
        (between('{"arguments": {}}'), 'the name of the tool is missing; write {"name": ..., "arguments": {...}}'),
        (between('{"name": 3}'), "the name of the tool is missing"),
        (between('{"name": "sum"}'), "there is no tool sum (the tools are: calculate, now, search)"),
        (between('{"name": "now", "arguments": "1"}'), '"arguments" must be a JSON object, {...}, not \'"1"\''),
        (
            between('{"name": "calculate", "parameters": {}}'),
            'the key of the arguments is "arguments", not "parameters"',
        ),
        (between('{"name": "search", "arguments": {"q": 1}}'), "search needs query, folder in its arguments"),
        (between('{"name": "calculate"}'), "calculate needs expression in its arguments"),
        (between('{"name": "now", "arguments": {"a": NaN}}'), "a number that cannot be used: NaN is no number of JSON"),
        (between('{"name": "now", "arguments": {"a": 1e999}}'), "1e999 is too large"),
        (between('{"name": "now", "arguments": {"a": %s}}' % ("9" * 5000)), "a number that cannot be used: Exceeds"),
        (between('{"name": "now", "arguments": {"a": "\\ud83d"}}'), "half of a character"),
        (between('{"a":' * 100_000), "too many brackets within each other"),
        (between(written(SUM)) + between("{"), "its JSON is wrong at character 3"),
    ],
)
def test_a_malformed_hermes_call_says_what_is_wrong_and_no_call_is_made(text, problem):
    found = hermes(f"So: {text}")
    assert found.problem is not None and problem in found.problem
    assert found.problem.startswith("The tool call was not made: ") and found.problem.endswith(".")
    assert found.calls == () and found.content == f"So: {text}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"name": "now", }', "its JSON is wrong at character 17"),
        ('{"name": "sum"}', "there is no tool sum"),
        ('{"name": "now", "arguments": {}}', 'the key of the arguments is "parameters", not "arguments"'),
        ('{"name": "now"} and', "nothing may follow a call but ; and another call, and there is 'and'"),
        ('{"name": "now"}; then', "a JSON object is needed, and there is 'then'"),
        ('{"name": "now"};', "a JSON object is needed, and there is nothing"),
        ("<|python_tag|>print(3)", "a JSON object behind <|python_tag|> is needed, and there is 'print(3)'"),
        ('<|python_tag|>{"answer": 3}', 'the name of the tool is missing; write {"name": ..., "parameters": {...}}'),
    ],
)
def test_a_malformed_llama_call_says_what_is_wrong(text, problem):
    found = llama3(text)
    assert found.problem is not None and problem in found.problem and found.calls == ()


@pytest.mark.parametrize("kind", ["qwen2.5", "hermes"])  # whose <tool_call> is a token, special in the second
@pytest.mark.parametrize("end", ["", "<|im_end|>"])
def test_hermes_calls_are_read_from_tokens_whether_their_marker_is_special_or_not(kind, end):
    tokenizer = chat_templates.tokenizer(kind)
    prompt, turn = (tokenizer(text)["input_ids"] for text in ("q<|im_start|>", "Well. " + between(written(SUM)) + end))
    (text,) = call_texts([prompt], [turn], tokenizer, "hermes")
    assert hermes(text) == ToolCalls("Well.", (SUM,))


@pytest.mark.parametrize("end", ["", "<|eot_id|>", "<|eom_id|>"])
def test_llama_calls_are_read_from_tokens_behind_the_special_token(end):
    tokenizer = chat_templates.tokenizer("llama3")
    turn = tokenizer("<|python_tag|>" + written(SUM, "parameters") + end, add_special_tokens=False)["input_ids"]
    (text,) = call_texts([tokenizer("q")["input_ids"]], [turn], tokenizer, "llama3")
    assert llama3(text) == ToolCalls("", (SUM,))


@pytest.mark.parametrize(
    ("kind", "form"), [("qwen2.5", "hermes"), ("hermes", "hermes"), ("qwen3", "hermes"), ("llama3", "llama3")]
)
def test_the_form_is_the_one_that_the_chat_template_teaches(kind, form):
    assert tool_form(chat_templates.tokenizer(kind), DataConfig(tools=TOOLS)) == form


def test_of_several_templates_the_one_for_tools_is_read():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = {"default": KINDS["smollm2"].template, "tool_use": KINDS["qwen2.5"].template}
    assert tool_form(tokenizer, DataConfig(tools=TOOLS)) == "hermes"


@pytest.mark.parametrize(
    "template", [KINDS["gemma"].template, "<tool_call><function=name><parameter=x>{{ tools | tojson }}", None]
)
def test_a_template_that_teaches_no_known_form_is_an_error_unless_the_form_is_named(template):
    tokenizer: Any = tiny.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"data.tool_format is auto, .* Set data.tool_format to the form"):
        tool_form(tokenizer, DataConfig(tools=TOOLS))
    assert tool_form(tokenizer, DataConfig(tools=TOOLS, tool_format="llama3")) == "llama3"
