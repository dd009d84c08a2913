from functools import partial

import pytest
import spellings
import tiny
import torch

from fastppo import ops
from fastppo.config import SamplingConfig
from fastppo.data.batch import Prompts
from fastppo.errors import FastPPOError
from fastppo.models.roles import Policy, fuse_head, token_stats
from fastppo.rollout.inprocess import sample
from fastppo.rollout.stop_tokens import named_stop_ids, stop_ids

PROMPTS = [(5, 6, 7), (8, 9, 10, 11, 12, 13, 14, 15, 16), (17,), (18, 19, 20, 21, 22), (23, 24, 25)]


def policy(family="llama", **settings):
    return Policy(fuse_head(tiny.causal(family, **settings)))


def rollout(actor, chosen=range(5), *, seed=3, stops=(), temperature=1.0, samples=1, first=0, **settings):
    prompts = Prompts.of(PROMPTS, list(chosen), first=first, samples=samples)
    config = SamplingConfig(**{"max_new_tokens": 12, "temperature": temperature} | settings)
    return sample(actor, prompts, config, stop_ids=stops, seed=seed)


def responses(found):
    return [part.tolist() for part in found.packed.responses.split(found.packed.response_lengths.tolist())]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_near_zero_temperature_gives_the_greedy_tokens_of_generate(family):
    actor = policy(family)
    plain = tiny.causal(family)
    found = responses(rollout(actor, temperature=1e-3))
    for prompt, response in zip(PROMPTS, found, strict=True):
        expected = plain.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert response == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_a_response_depends_on_its_stream_and_seed_alone(family):
    actor = policy(family)
    together = responses(rollout(actor))
    alone = [responses(rollout(actor, [row], first=row))[0] for row in range(5)]
    assert together == alone
    assert responses(rollout(actor, rows=2)) == together


def test_a_response_in_bf16_does_not_depend_on_its_neighbours():
    actor = policy(dtype=torch.bfloat16)
    together = responses(rollout(actor))
    assert [responses(rollout(actor, [row], first=row))[0] for row in range(5)] == together


def test_another_seed_gives_other_tokens_and_the_same_seed_the_same():
    actor = policy()
    assert responses(rollout(actor)) == responses(rollout(actor))
    assert responses(rollout(actor, seed=4)) != responses(rollout(actor))


def test_samples_of_one_prompt_differ():
    found = responses(rollout(policy(), [0], samples=4))
    assert len({tuple(r) for r in found}) == 4


def test_logprobs_are_those_of_the_trainers_forward_pass():
    actor = policy()
    found = rollout(actor, temperature=0.7)
    with torch.no_grad():
        stats = actor(
            found.packed,
            lambda p, hidden: p.head(hidden, ops.linear_logprobs, found.packed.responses, temperature=0.7),
        )
    torch.testing.assert_close(found.logprobs, stats.logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "scale"), [("granite", {"logits_scaling": 0.4}), ("cohere2", {"logit_scale": 2.0})])
def test_what_samples_scales_its_logits_as_the_trainer_does(family, scale):
    actor = policy(family, num_key_value_heads=2, **scale)
    found = rollout(actor, temperature=0.7)
    with torch.no_grad():
        stats = actor(found.packed, partial(token_stats, found.packed.responses, 0.7))
    torch.testing.assert_close(found.logprobs, stats.logprobs, rtol=1e-4, atol=1e-4)
    greedy = tiny.causal(family, num_key_value_heads=2, **scale).generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert responses(rollout(actor, [0], temperature=1e-3))[0] == greedy[0, len(PROMPTS[0]) :].tolist()


def test_logprobs_under_top_k_are_those_of_the_distribution_drawn_from():
    found = rollout(policy(), top_k=1)
    assert found.logprobs.abs().max() == 0.0


def test_a_response_ends_with_the_first_stop_token():
    actor = policy()
    free = responses(rollout(actor, max_new_tokens=40))
    stops = sorted({free[0][5], free[3][2]})
    found = rollout(actor, stops=stops, max_new_tokens=40)
    for whole, cut, ended in zip(free, responses(found), found.ended.tolist(), strict=True):
        hits = [i for i, token in enumerate(whole) if token in stops]
        assert cut == (whole[: hits[0] + 1] if hits else whole)
        assert ended == bool(hits)
    assert len({len(r) for r in responses(found)}) > 1  # rows ended at different steps


def test_no_stop_token_before_the_minimum_length():
    actor = policy()
    stops = list(range(0, 257, 2))
    found = responses(rollout(actor, stops=stops, min_new_tokens=6))
    assert all(token not in stops for response in found for token in response[:6])
    assert any(len(response) == 7 for response in found)


def test_no_response_ends_where_the_minimum_length_is_the_longest():
    found = rollout(policy(), stops=list(range(0, 257, 2)), max_new_tokens=6, min_new_tokens=6)
    assert found.packed.response_lengths.tolist() == [6] * 5 and not found.ended.any()
    assert all(token % 2 for response in responses(found) for token in response)


def test_a_stop_token_may_be_the_only_token():
    found = rollout(policy(), stops=list(range(257)))
    assert found.packed.response_lengths.tolist() == [1] * 5 and found.ended.all()


def test_no_prompts_give_an_empty_rollout():
    found = rollout(policy(), [])
    assert len(found.packed) == 0 and found.ended.dtype == torch.bool


def test_stop_tokens_before_the_minimum_length_take_no_part_of_the_nucleus():
    actor = policy()
    stops = list(range(0, 257, 2))
    found = rollout(actor, stops=stops, max_new_tokens=6, min_new_tokens=6, top_p=0.5, top_k=9)
    assert all(token % 2 for response in responses(found) for token in response)
    assert (found.logprobs.exp() > 0.5 / 9).any() and found.logprobs.isfinite().all()


def test_stop_ids_are_all_of_the_models_and_the_configs():
    actor, tokenizer = policy(), tiny.tokenizer()
    actor.model.generation_config.eos_token_id = [3, 4]
    found = stop_ids(actor, tokenizer, SamplingConfig(stop_tokens=("!",)))
    assert found == sorted({0, 3, 4, tokenizer.get_vocab()["!"]})
    assert stop_ids(actor, tokenizer, SamplingConfig(ignore_eos=True)) == []


@pytest.mark.parametrize("kind", spellings.KINDS)
def test_a_stop_token_may_be_given_as_text(kind):
    """However the vocabulary spells it: behind a prompt it is that one token."""
    tokenizer = spellings.KINDS[kind]()
    vocabulary = tokenizer.get_vocab()
    spelled = {" the": ["\u0120the", "\u2581the"], "\n": ["\u010a", "<0x0A>", "\n"], ":": [":"], "</s>": ["</s>"]}
    if kind == "WordPiece":  # whose words say no spaces, and which has no line break
        spelled = {" film": ["film"], ":": [":"]}
    for text, names in spelled.items():
        wanted = {vocabulary[name] for name in names if name in vocabulary}
        assert set(named_stop_ids(tokenizer, SamplingConfig(stop_tokens=(text,)))) == wanted
        assert len(wanted) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" wonderful!", r"' wonderful!' is not one token of the actor's tokenizer, but 2: \[' wonderful', '!'\]"),
        ("</S>", r"'</S>' is not one .* or one of '</s>'"),
        ("<Assistant>", r"or one of '<assistant>'"),
        ("Wonderful", r"or one of '\u0120wonderful'"),
    ],
)
def test_a_stop_token_that_is_several_is_told_with_them_and_with_what_is_near(text, words):
    with pytest.raises(FastPPOError, match=words):
        named_stop_ids(spellings.KINDS["byte-level"](), SamplingConfig(stop_tokens=(text,)))


def test_a_stop_token_that_is_none_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"stop_tokens: '<nothing>'"):
        stop_ids(policy(), tiny.tokenizer(), SamplingConfig(stop_tokens=("<nothing>",)))
