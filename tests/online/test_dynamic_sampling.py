"""Which groups a step learns from where it draws until its batch is full of informative ones, and what is counted."""

from __future__ import annotations

from functools import cache

import made_up_batches
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from ppo_step import config_of

from fastppo.config import Config
from fastppo.data import Prompts, Rollout, Scored, pack
from fastppo.online.dynamic_sampling import Drawn, Draws, informative
from fastppo.ppo.progress import PPOProgress

GROUPS, SAMPLES = 4, 2  # of a batch, of a group
EQUAL, DIFFER = (1.0, 1.0), (0.0, 1.0)


@cache
def config(most: int | None = None) -> Config:
    samples = ["--ppo.estimator", "rloo", "--sampling.samples_per_prompt", str(SAMPLES)]
    return config_of("none", *samples, *([] if most is None else ["--sampling.until_informative", str(most)]))


def scored(groups: list[tuple[float, float]], round_: int = 0) -> Scored:
    """Responses with these scores, of which no two have the same tokens, and rows that say which response it is."""
    scores = torch.tensor(groups).flatten()
    number = torch.arange(len(scores)) + 100 * round_
    lengths = [1 + n % 3 for n in number.tolist()]
    sequences = [(9, *[n] * length) for n, length in zip(number.tolist(), lengths, strict=True)]
    packed = pack(sequences, lengths)
    rollout = Rollout(packed, -packed.responses.float(), number % 2 == 0, number)
    return Scored(rollout, torch.stack([scores, 2 * scores], 1), scores, number.float())


def step(rounds: list[list[tuple[float, float]]], most: int | None) -> Draws:
    """What a step does: it draws while it is not done."""
    draws, coming = Draws(config(most)), iter(enumerate(rounds))
    while not draws.done:
        number, groups = next(coming)
        draws.add(scored(groups, number))
    return draws


def numbers(batch: Scored) -> list[int]:
    """Which responses these are, by the first one of each group; every part of them is theirs."""
    each = batch.rollout.sources.tolist()
    lengths = batch.rollout.packed.response_lengths.tolist()
    assert lengths == [1 + n % 3 for n in each]
    tokens = [n for n, length in zip(each, lengths, strict=True) for _ in range(length)]
    assert batch.rollout.packed.responses.tolist() == tokens and batch.rollout.logprobs.tolist() == [-n for n in tokens]
    assert batch.rollout.ended.tolist() == [n % 2 == 0 for n in each] and batch.judged.tolist() == each
    assert batch.by_source.tolist() == [[x, 2 * x] for x in batch.scores.tolist()]
    assert all(each[i + 1] == each[i] + 1 for i in range(0, len(each), SAMPLES))
    return each[::SAMPLES]


def test_a_batch_of_informative_groups_is_drawn_once_and_learned_from_as_it_is():
    draws = step([[DIFFER] * GROUPS], most=5)
    batch, drawn = draws.batch()
    assert numbers(batch) == [0, 2, 4, 6] and draws.batches == 1
    assert drawn is not None and (drawn.groups, drawn.uninformative, drawn.surplus, drawn.filled) == (GROUPS, 0, 0, 0)


def test_a_step_draws_until_its_batch_is_full_and_drops_the_rest_in_order():
    rounds = [
        [EQUAL, DIFFER, EQUAL, DIFFER],  # responses 0 to 7
        [EQUAL, EQUAL, DIFFER, EQUAL],  # 100 to 107
        [DIFFER, EQUAL, DIFFER, DIFFER],  # 200 to 207
        [DIFFER] * GROUPS,
    ]
    draws = step(rounds, most=9)
    batch, drawn = draws.batch()
    assert numbers(batch) == [2, 6, 104, 200]
    lengths = [1 + n % 3 for start in (0, 100, 200) for n in range(start, start + 8)]
    read = sum(lengths) + 24
    assert drawn == Drawn(3, 12, 6, 2, 0, written=sum(lengths), read=read, score=pytest.approx(18 / 24))
    assert draws.end_scores.tolist() == [x for groups in rounds[:3] for group in groups for x in group]


def test_at_the_bound_the_first_of_the_others_fill_the_batch_in_the_order_drawn():
    draws = step([[EQUAL, EQUAL, DIFFER, EQUAL], [EQUAL, EQUAL, EQUAL, DIFFER], [DIFFER] * GROUPS], most=2)
    batch, drawn = draws.batch()
    assert numbers(batch) == [0, 2, 4, 106]
    assert drawn is not None and (drawn.batches, drawn.groups) == (2, 8)
    assert (drawn.uninformative, drawn.surplus, drawn.filled) == (4, 0, 2)


def test_without_the_setting_the_first_batch_is_it_whatever_its_scores():
    draws = step([[EQUAL] * GROUPS, [DIFFER] * GROUPS], most=None)
    batch, drawn = draws.batch()
    assert drawn is None and draws.batches == 1 and numbers(batch) == [0, 2, 4, 6]


def test_scores_are_equal_only_to_the_last_bit():
    near = torch.nextafter(torch.tensor(0.3), torch.tensor(1.0))
    scores = torch.tensor([0.3, 0.3, 0.3, 0.3, 0.3, float(near), -0.0, 0.0, 0.0])
    assert informative(scores, 3).tolist() == [False, True, False]


SCORE = st.sampled_from([0.0, 0.5, 1.0])
ROUND = st.lists(st.tuples(SCORE, SCORE), min_size=GROUPS, max_size=GROUPS)


@given(st.integers(2, 5).flatmap(lambda most: st.lists(ROUND, min_size=most, max_size=most)))
@example([[EQUAL] * GROUPS] * 5)
def test_any_step_is_as_the_rule_has_it(rounds):
    drawn_groups: list[tuple[int, bool]] = []
    for number, groups in enumerate(rounds):
        drawn_groups += [(100 * number + SAMPLES * i, a != b) for i, (a, b) in enumerate(groups)]
        if sum(differs for _, differs in drawn_groups) >= GROUPS:
            break
    kept = [n for n, differs in drawn_groups if differs][:GROUPS]
    others = [n for n, differs in drawn_groups if not differs]
    filled = others[: GROUPS - len(kept)]

    draws = step(rounds, most=len(rounds))
    batch, drawn = draws.batch()
    assert numbers(batch) == sorted(kept + filled) and drawn is not None
    assert drawn.batches == draws.batches == number + 1 and drawn.filled == len(filled)
    assert drawn.groups == len(drawn_groups) == GROUPS + drawn.uninformative + drawn.surplus
    assert drawn.uninformative == len(others) - len(filled)
    assert len(draws.end_scores) == SAMPLES * len(drawn_groups)


def test_speeds_include_what_was_dropped():
    drawn = Drawn(2, 8, 4, 0, 0, written=100, read=300, score=0.5)
    metrics = drawn.metrics({"time/sampling": 2.0, "time/feedback": 1.0, "time/learning": 7.0})
    assert metrics["tokens_per_second/sampling"] == 50 and metrics["tokens_per_second/feedback"] == 300
    assert metrics["tokens_per_second"] == 10 and metrics["tokens_drawn"] == 100 and metrics["score_drawn"] == 0.5


@pytest.mark.parametrize("within", [False, True])
def test_a_checkpoint_from_before_drew_one_batch_a_step(within):
    run = PPOProgress(step=7, experience=made_up_batches.batch([[1, 2], [3]]) if within else None)
    state = run.state()
    del state["batches"], state["drawn"]
    run.restore(state, run.random)
    assert run.batches == 7 + within and run.drawn is None


def test_what_was_drawn_is_saved_with_what_is_learned_from():
    run, drawn = PPOProgress(step=2, batches=5), Drawn(3, 12, 6, 2, 0, 48, 72, 0.5)
    run.drawn, run.batches = drawn, 8
    other = PPOProgress()
    other.restore(run.state(), run.random)
    assert (other.batches, other.drawn) == (8, drawn)


def test_prompts_of_a_batch_have_the_random_numbers_of_their_place():
    """What the counts of `batches` rest on: batch k has indices that no other batch has."""
    streams = [Prompts.of([(1,), (2,)], [0, 1], first=2 * k, samples=3).streams.tolist() for k in range(4)]
    assert [s for part in streams for s in part] == list(range(24))
