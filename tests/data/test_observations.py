"""Observations as tokens: a conversation goes on as its chat template would write it, and no turn is written again."""

from __future__ import annotations

from typing import Any

import chat_templates
import pytest
import spellings
import tiny
from chat_templates import KINDS, tool
from transformers import PreTrainedTokenizerBase

from fastppo.config import DataConfig
from fastppo.data.continuation import decode_after, plain_tokens
from fastppo.data.conversations import NO_ARGUMENTS, template_arguments, template_text, template_tokens
from fastppo.data.observations import check_observations, observation_tokens, text_observation_tokens
from fastppo.data.tables import DataError

WITH_TOOLS = DataConfig(tools=(tool("calculate", "expression"),))


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


ASKED = [message("user", "What is 1+2?")]
ANSWER = message("assistant", "It is 4.")
REPLY = [message("user", "No,\nanother one.")]
ANSWERS = [message("tool", "3"), message("tool", "4")]


def written(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_prompt_turns_and_observations_are_the_templates_own_text(name, cut):
    """Over two turns, of which each ends with its token or is cut before it."""
    tokenizer, end = chat_templates.tokenizer(name), "" if cut else KINDS[name].end
    turn = written(ANSWER["content"] + end, tokenizer)
    chat = [*ASKED, ANSWER]
    tokens = [*template_tokens(ASKED, "here", tokenizer, to_be_answered=True), *turn]
    for _ in range(2):
        tokens += [*observation_tokens(chat, REPLY, turn, tokenizer, "here"), *turn]
        chat += [*REPLY, ANSWER]
    whole = template_text(chat, "here", tokenizer, to_be_answered=False)
    assert tokenizer.decode(tokens) == whole.rstrip("\n").removesuffix(KINDS[name].end) + end
    assert tokens == written(whole, tokenizer)[: len(tokens)]


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.tools])
def test_the_answers_of_tools_follow_a_turn_of_calls_as_the_template_writes_them(name):
    tokenizer, arguments = chat_templates.tokenizer(name), template_arguments(WITH_TOOLS)
    if name == "llama3":
        turn, answers = '{"name": "calculate", "parameters": {"expression": "1+2"}}<|eot_id|>', ANSWERS[:1]
    else:
        call = '<tool_call>\n{"name": "calculate", "arguments": {"expression": "1+2"}}\n</tool_call>'
        turn, answers = f"{call}\n{call}<|im_end|>", ANSWERS
    call = {"type": "function", "function": {"name": "calculate", "arguments": {"expression": "1+2"}}}
    if name == "qwen3":  # the test's template of it writes no calls
        said: dict[str, Any] = message("assistant", turn.removesuffix("<|im_end|>"))
    else:
        said = message("assistant", "") | {"tool_calls": [call] * len(answers)}
    prompt = template_tokens(ASKED, "here", tokenizer, to_be_answered=True, arguments=arguments)
    ids = written(turn, tokenizer)
    tokens = [*prompt, *ids, *observation_tokens([*ASKED, said], answers, ids, tokenizer, "here", arguments)]
    whole = template_text([*ASKED, said, *answers], "here", tokenizer, to_be_answered=True, arguments=arguments)
    assert tokenizer.decode(tokens) == whole and tokens == written(whole, tokenizer)


def test_earlier_turns_may_have_several_calls_though_the_template_writes_but_one():
    tokenizer, arguments = chat_templates.tokenizer("llama3"), template_arguments(WITH_TOOLS)
    call = {"type": "function", "function": {"name": "calculate", "arguments": {"expression": "1+2"}}}
    chat = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [call, call]}, *ANSWERS, ANSWER]
    tokens = observation_tokens(chat, REPLY, written("It is 4.<|eot_id|>", tokenizer), tokenizer, "here", arguments)
    assert tokenizer.decode(tokens) == (
        "<|start_header_id|>user<|end_header_id|>\n\nNo,\nanother one.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_what_the_template_would_change_in_a_turn_stays_as_the_actor_wrote_it():
    """Qwen3's template drops its thought, and Llama-3's the spaces around it; both would end it a second time."""
    for name, text in (("qwen3", "<think>\nHm.\n</think>\n\nIt is 4."), ("llama3", "  It is 4.\n"), ("gemma", " 4 ")):
        tokenizer = chat_templates.tokenizer(name)
        short, long = (written(each + KINDS[name].end, tokenizer) for each in ("4", text))
        chats = [[*ASKED, message("assistant", each)] for each in ("4", text)]
        found = {observation_tokens(c, REPLY, t, tokenizer, "here") for c, t in zip(chats, (short, long), strict=True)}
        assert len(found) == 1


def test_a_turn_that_waits_for_a_tool_has_ended_with_llamas_token_for_that():
    tokenizer = chat_templates.tokenizer("llama3")
    ended, waiting, cut = (written("4" + end, tokenizer) for end in ("<|eot_id|>", "<|eom_id|>", ""))
    after = [observation_tokens([*ASKED, ANSWER], REPLY, turn, tokenizer, "here") for turn in (ended, waiting, cut)]
    assert after[0] == after[1] and after[2] == (ended[-1], *after[0])


def test_a_turn_cut_at_a_special_token_that_ends_no_turn_is_ended():
    tokenizer = chat_templates.tokenizer("hermes")
    turn = written("<tool_call></tool_call>", tokenizer)
    (text,) = decode_after(
        [turn], [observation_tokens([*ASKED, ANSWER], REPLY, turn, tokenizer, "here")], tokenizer, special=True
    )
    assert text.startswith("<|im_end|>\n<|im_start|>user\nNo,")


@pytest.mark.parametrize("said", ["TURN0", "TURN1 TURN0", "an odd TURN"])
def test_an_observation_may_hold_any_word(said):
    tokenizer = chat_templates.tokenizer("smollm2")
    tokens = observation_tokens([*ASKED, ANSWER], [message("user", said)], written("4", tokenizer), tokenizer, "here")
    assert tokenizer.decode(tokens) == f"<|im_end|>\n<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("spelling", spellings.KINDS)
@pytest.mark.parametrize("name", ["mistral", "gemma"])
def test_tokenizers_that_add_spaces_write_an_observation_as_within_the_whole_conversation(spelling, name):
    """Some put one behind each special token; none is added or lost beside these."""
    tokenizer = chat_templates.give(spellings.KINDS[spelling](), KINDS[name])
    chat, reply = [*ASKED, message("assistant", "it is")], [message("user", "a film")]
    whole = template_tokens([*chat, *reply], "here", tokenizer, to_be_answered=True)
    turn, end = written("it is", tokenizer), written(KINDS[name].end, tokenizer)[-1]
    behind = whole[-whole[::-1].index(end) - 1 :]  # from the last token that ends a turn
    if name == "gemma":  # which ends a user's turn with it too
        behind = whole[-whole[::-1].index(end, whole[::-1].index(end) + 1) - 1 :]
    assert observation_tokens(chat, reply, turn, tokenizer, "here") == behind
    assert observation_tokens(chat, reply, [*turn, end], tokenizer, "here") == behind[1:]


@pytest.mark.parametrize("spelling", [kind for kind in spellings.KINDS if kind != "WordPiece"])
@pytest.mark.parametrize("text", ["it is", " it is", "\nfilm: 50"])
def test_an_observation_of_plain_text_goes_on_from_the_turn(spelling, text):
    tokenizer = spellings.KINDS[spelling]()
    turn = plain_tokens(["the film was;"], tokenizer)[0]
    tokens = text_observation_tokens(text, turn, tokenizer)
    assert decode_after([turn], [list(tokens)], tokenizer)[0] == text
    assert tokenizer.bos_token_id not in tokens


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (KINDS["gemma"].template, r"line 3: turn 1 is refused by the tokenizer's chat template: .*must alternate"),
        (
            "{{ messages[-1].content }}",
            r"line 3: turn 1: .* leaves out the assistant's message .*user, assistant, tool",
        ),
        ("{{ messages[1].content }}", r"line 3: turn 1: .* writes nothing behind the assistant's message"),
        (None, r"line 3: turn 1 is chat, but the tokenizer has no chat template"),
    ],
)
def test_a_template_that_cannot_write_an_observation_is_an_error_with_its_reason(template, words):
    tokenizer: Any = tiny.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=words):
        observation_tokens([*ASKED, ANSWER], ANSWERS[:1], written("4", tokenizer), tokenizer, "line 3: turn 1")


@pytest.mark.parametrize("name", KINDS)
def test_before_a_model_is_loaded_the_template_is_asked_to_write_an_observation(name):
    tokenizer = chat_templates.tokenizer(name)
    check_observations(tokenizer, DataConfig(), True)
    if KINDS[name].tools:
        check_observations(tokenizer, WITH_TOOLS, True)


@pytest.mark.parametrize(
    ("template", "config", "words"),
    [
        (KINDS["gemma"].template, WITH_TOOLS, r"rollout.environment: a message of the role tool .* is refused by"),
        (
            "{% for m in messages if m.role != 'tool' %}<{{ m.content }}>{% endfor %}",
            WITH_TOOLS,
            r"rollout.environment: a message of the role tool after one of the assistant is left out .* Use a model",
        ),
        (
            "{% for m in messages[:2] %}<{{ m.content }}>{% endfor %}",
            DataConfig(),
            r"a message of the role user after one of the assistant is left out",
        ),
        (
            "{{ messages[0].content }}",
            DataConfig(),
            r"a message of the role user .* leaves out the assistant's message",
        ),
        (None, DataConfig(), r"is chat, but the tokenizer has no chat template"),
    ],
)
def test_a_template_without_observations_is_an_error_before_a_model_is_loaded(template, config, words):
    tokenizer: Any = tiny.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=words):
        check_observations(tokenizer, config, True)
    check_observations(tokenizer, config, False)


def test_arguments_of_the_template_hold_for_observations_too():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}{{ mark }}>{% endfor %}"
    turn = written("4", tokenizer)
    found = [
        tokenizer.decode(observation_tokens([*ASKED, ANSWER], REPLY[:1], turn, tokenizer, "here", arguments))
        for arguments in (NO_ARGUMENTS, {"mark": "!"})
    ]
    assert found == [">\n<No,\nanother one.>".replace(">\n", ">"), "!><No,\nanother one.!>"]
