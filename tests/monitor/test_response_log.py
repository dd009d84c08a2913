"""fastppo.monitor.response_log: which responses a run keeps, and its tokens as pieces of text."""

from __future__ import annotations

import finished_talks
import pytest
import tiny
import torch

from fastppo.data.batch import Experience, Measured
from fastppo.data.continuation import decode_pieces
from fastppo.data.packed import Packed, cumulative
from fastppo.monitor.response_log import as_text, heldout_responses, said_behind, spread, training_responses


@pytest.mark.parametrize("text", ["a good film", "長い film \U0001f642!", "", "\n\n é"])
def test_pieces_are_one_for_each_token_and_together_the_text(text):
    tokenizer = tiny.tokenizer()
    tokens = tokenizer(text)["input_ids"]
    found = decode_pieces((), tokens, tokenizer)
    assert len(found) == len(tokens) and "".join(found) == text
    if "長" in text:  # three bytes, three tokens
        assert found[:6] == ["", "", "長", "", "", "い"]


def test_a_text_cut_within_a_character_and_its_end_are_shown():
    tokenizer = tiny.tokenizer()
    tokens = [*tokenizer("a長")["input_ids"][:-1], tokenizer.eos_token_id]
    assert decode_pieces((), tokens, tokenizer)[0] == "a"
    assert "".join(decode_pieces((), tokens, tokenizer)).endswith("<eos>")
    assert decode_pieces((), tokens[:-1], tokenizer)[-1] == "\ufffd"


def test_responses_are_taken_from_the_best_to_the_worst():
    scores = [0.1, 0.9, 0.5, 0.3, 0.7]
    assert spread(scores, 3) == [1, 2, 0]
    assert spread(scores, 2) == [1, 0]
    assert spread(scores, 1) == [1]
    assert spread(scores, 9) == [1, 4, 2, 3, 0]


def test_heldout_responses_are_those_to_the_same_first_prompts():
    found = heldout_responses(["p", "q", "r"], ["a", "b", "c"], [1.0, 2.0, 3.0], count=2)
    assert found == [
        {"of": "heldout", "prompt": "p", "response": "a", "score": 1.0},
        {"of": "heldout", "prompt": "q", "response": "b", "score": 2.0},
    ]
    assert heldout_responses(["p"], ["a"], [1.0], count=0) == []


def test_training_responses_have_their_prompt_and_each_tokens_advantage():
    tokenizer = tiny.tokenizer()
    texts = [("I saw ", "it"), ("The film ", "is bad"), ("", "!")]
    tokens = [[tokenizer(part)["input_ids"] for part in pair] for pair in texts]
    packed = Packed(
        torch.tensor([t for prompt, response in tokens for t in prompt + response]),
        cumulative(torch.tensor([len(prompt) + len(response) for prompt, response in tokens])),
        cumulative(torch.tensor([len(response) for _, response in tokens])),
    )
    rows = torch.arange(9.0)
    names = ("sampler_logprobs", "old_logprobs", "ref_logprobs", "entropy", "kl", "rewards", "values", "returns")
    experience = Experience(
        packed=packed,
        scores=torch.tensor([0.5, -1.0, 2.0]),
        by_source=torch.tensor([[0.5], [-1.0], [2.0]]),
        judged=torch.full((3,), torch.nan),
        ended=torch.ones(3, dtype=torch.bool),
        advantages=rows / 10,
        **{name: rows for name in names},
    )
    first, second = training_responses(experience, tokenizer, count=2)
    assert (first["of"], first["prompt"], first["score"]) == ("training", "", 2.0)
    assert (first["tokens"], first["advantages"]) == (["!"], [0.8])
    assert (second["prompt"], second["tokens"]) == ("The film ", list("is bad"))
    assert second["advantages"] == [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]


def test_training_responses_tell_written_tokens_from_observed_ones():
    first, _, last = training_responses(finished_talks.experience(), tiny.tokenizer(), count=3)
    assert first["prompt"] == "one" and first["tokens"] == ["a", "b", "?", "c", "d", "<eos>"]
    assert first["written"] == [True, True, False, True, True, True]
    assert first["advantages"] == [0.0, 0.1, None, 0.2, 0.3, 0.4] and first["turn_rewards"] == [0.25, -1.0]
    assert "".join(last["tokens"]) == "f!!g?hi" and last["turn_rewards"] == [0.0, 0.5, 0.125]


def test_a_method_without_advantages_keeps_turns_too():
    whole = finished_talks.experience()
    plain = Measured(**{name: getattr(whole, name) for name in Measured.__dataclass_fields__})
    [record] = training_responses(plain, tiny.tokenizer(), count=1)
    assert record["written"] == [True, True, False, True, True, True] and "advantages" not in record


def test_heldout_responses_are_text_with_roles_and_messages():
    said = [said_behind(conversation, None) for conversation in finished_talks.rollout().conversations]
    texts = [*map(as_text, said)]
    first, second = heldout_responses(
        finished_talks.PROMPTS, texts, [1.0, 2.0, 3.0], said, finished_talks.REWARDS, count=2
    )
    assert first["response"] == "assistant: ab\nuser: ?\nassistant: cd" and first["turn_rewards"] == (0.25, -1.0)
    assert second["said"] == [{"role": "assistant", "text": "e"}]


def test_tool_calls_are_part_of_what_is_said():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call, {"name": "now", "arguments": "{}"}]}
    conversation = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, turn]
    [said] = said_behind(conversation, conversation[:2])
    assert said == {"role": "assistant", "text": 'add {"a": 1, "b": "é"}\nnow {}'}
