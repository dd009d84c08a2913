"""Responses that are cut and go on later: what comes out is the response that was not cut.

The oracle is the same sampler with the same policy, which completes each response at once.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from test_turns import STOPS, TOKENIZER, actor, folder, parts, prompts_of, settings_of  # noqa: F401 - fixtures

from fastppo.data.batch import Begun, Prompts, Rollout, responses_of
from fastppo.environments import load_environment
from fastppo.models.cache import Cache
from fastppo.rollout.answers import SamplerError, check_rollout
from fastppo.rollout.inprocess import sample


def draw(actor, folder, prompts: Prompts, *, talks: bool, **changes) -> Rollout:  # noqa: F811
    config = settings_of(folder, **changes)
    environment = load_environment(config, TOKENIZER) if talks else None
    rollout = sample(actor, prompts, config.sampling, stop_ids=STOPS, seed=3, environment=environment)
    check_rollout(rollout, prompts, "inprocess", longest=config.sampling.max_new_tokens, vocabulary=257)
    return rollout


def in_rounds(actor, folder, prompts: Prompts, by: int, **options) -> tuple[Rollout, list[Rollout]]:  # noqa: F811
    """The completed responses, and what each round has left."""
    begun: list[Begun | None] = [None] * len(prompts)
    ended, open_, rounds = torch.zeros(len(prompts), dtype=torch.bool), list(range(len(prompts))), []
    while open_:
        asked = replace(prompts, begun=tuple(begun), extend_by=by).select(open_)
        rollout = draw(actor, folder, asked, **options)
        for i, one in zip(open_, rollout.begun(), strict=True):
            begun[i] = one
        ended[open_] = rollout.ended
        open_ = [i for i, complete in zip(open_, rollout.complete.tolist(), strict=True) if not complete]
        rounds.append(rollout)
    return responses_of(replace(prompts, begun=tuple(begun)), ended), rounds


@pytest.mark.parametrize("by", [2, 7])
@pytest.mark.parametrize("talks", [False, True])
def test_a_response_in_rounds_is_the_one_that_was_not_cut(actor, folder, talks, by):  # noqa: F811
    prompts = prompts_of(samples=2)
    whole = draw(actor, folder, prompts, talks=talks)
    assert whole.complete is None
    joined, rounds = in_rounds(actor, folder, prompts, by, talks=talks)
    assert len(rounds) > 2
    for name in ("tokens", "cu_seqlens", "response_cu_seqlens", "predictors"):
        assert torch.equal(getattr(whole.packed, name), getattr(joined.packed, name)), name
    assert (whole.packed.mask is None) == (joined.packed.mask is None)
    assert torch.equal(whole.ended, joined.ended) and torch.equal(whole.sources, joined.sources)
    torch.testing.assert_close(whole.logprobs, joined.logprobs, rtol=0, atol=2e-5)  # a prefill rounds otherwise
    assert whole.conversations == joined.conversations
    if talks:
        assert torch.equal(whole.turn_rewards, joined.turn_rewards) and whole.turn_rewards.any()


@pytest.mark.parametrize("talks", [False, True])
def test_a_round_writes_so_many_tokens_on_what_it_does_not_complete_and_keeps_the_earlier_ones(
    actor,  # noqa: F811
    folder,  # noqa: F811
    talks,
):
    _, rounds = in_rounds(actor, folder, prompts_of(), 3, talks=talks)
    for number, rollout in enumerate(rounds):
        written = rollout.packed.response_lengths
        assert (written[~rollout.complete] == 3 * (number + 1)).all()
        assert ((written > 3 * number) & (written <= 3 * (number + 1))).all()
        assert not rollout.ended[~rollout.complete].any()
    for before, after in pairwise(rounds):
        going_on = [one for one, done in zip(before.begun(), before.complete.tolist(), strict=True) if not done]
        for old, new in zip(going_on, after.begun(), strict=True):
            assert torch.equal(new.tokens[: len(old.tokens)], old.tokens)
            assert torch.equal(new.logprobs[: len(old.logprobs)], old.logprobs)


def test_conversations_are_cut_within_turns_and_between_them(actor, folder):  # noqa: F811
    _, rounds = in_rounds(actor, folder, prompts_of(), 3, talks=True)
    cut = [
        (one, rollout.packed.turn_counts[i])
        for rollout in rounds
        for i, one in enumerate(rollout.begun())
        if not rollout.complete[i]
    ]
    within, between = ([pair for pair in cut if (pair[0].unfinished > 0) == kind] for kind in (True, False))
    assert within and between
    for one, turns in within:
        assert one.written[-one.unfinished :].all() and one.conversation[-1]["role"] == "user"
        assert sum(message["role"] == "assistant" for message in one.conversation) == turns - 1
    for one, turns in between:  # the environment has answered
        assert not one.written[-1] and one.conversation[-1]["role"] == "user"
        assert sum(message["role"] == "assistant" for message in one.conversation) == turns


def test_what_has_begun_is_computed_in_passes_no_larger_than_those_of_prompts(actor, folder, monkeypatch):  # noqa: F811
    prompts = prompts_of()
    _, rounds = in_rounds(actor, folder, prompts, 20, talks=False, sampling__max_new_tokens=60)
    going_on = [i for i, done in enumerate(rounds[0].complete.tolist()) if not done]
    asked = replace(prompts, begun=tuple(rounds[0].begun()), extend_by=40).select(going_on)
    passes, prefill = [], Cache.begin_prefill

    def counted(self, lengths, rows):
        passes.append(list(lengths[: len(rows)]))
        prefill(self, lengths, rows)

    monkeypatch.setattr(Cache, "begin_prefill", counted)
    draw(actor, folder, asked, talks=False, sampling__max_new_tokens=60, sampling__rows=4)
    longest = max(map(len, asked.tokens))
    assert sorted(x for each in passes for x in each) == sorted(map(len, asked.tokens_so_far))
    assert all(sum(lengths) <= 4 * longest or len(lengths) == 1 for lengths in passes)
    assert any(len(lengths) > 1 for lengths in passes)


def test_a_rollout_that_does_not_go_on_behind_what_was_written_is_refused(actor, folder):  # noqa: F811
    prompts = prompts_of(3)
    rollout = draw(actor, folder, replace(prompts, extend_by=2), talks=False)
    other = replace(rollout.begun()[1], tokens=rollout.begun()[1].tokens + 1)
    longest = {"longest": 30, "vocabulary": 257}
    asked = replace(prompts, begun=(None, other, None), extend_by=4)
    with pytest.raises(SamplerError, match="a response 1 that does not go on behind its earlier tokens"):
        check_rollout(rollout, asked, "mine", **longest)
    with pytest.raises(SamplerError, match="complete of the type NoneType"):
        check_rollout(replace(rollout, complete=None), replace(prompts, extend_by=2), "mine", **longest)


def test_a_begun_response_knows_the_turn_that_has_not_ended():
    def unfinished(*written: bool) -> int:
        count = torch.tensor(written)
        return Begun(torch.arange(len(written)), count, torch.zeros(int(count.sum()))).unfinished

    assert unfinished(True, True) == 2 and unfinished(True, False) == 0
    assert unfinished(True, False, False, True) == 1 and unfinished(True, False, True, False, True, True) == 2
