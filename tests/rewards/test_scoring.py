"""Sources of reward, and what is said of those that fail."""

import json
import random
import textwrap
from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch

from fastppo.config import Config, DataConfig, HealthConfig, PPOConfig, RewardConfig
from fastppo.data.batch import Moments, Rollout
from fastppo.data.packed import pack
from fastppo.data.prompts import PromptSet
from fastppo.distributed.residency import Residency
from fastppo.distributed.world import World, start_world
from fastppo.errors import FastPPOError
from fastppo.models.roles import ModelError
from fastppo.rewards import (
    Responses,
    RewardError,
    ask,
    load_judge,
    load_sources,
    response_texts,
    responses_of_rank,
    score,
    shape,
)
from fastppo.rewards.model import Ensemble
from fastppo.rewards.sources import shared_sources

TOKENIZER = tiny.tokenizer()
CPU = torch.device("cpu")
PROMPTS = PromptSet(
    tokens=tuple(tuple(TOKENIZER(t)["input_ids"]) for t in ("one", "three", "two")),
    texts=("one", "three", "two"),
    columns={"answer": ["1", "3", "2"], "prompt": ["one", "three", "two"]},
)


def sources(config, load=load_sources):
    return load(config, TOKENIZER, World(0, 1, CPU), Residency(CPU))


def rollout(responses=("a", "bcd", "ef"), ended=(True, True, False)):
    tokens = [TOKENIZER(r)["input_ids"] for r in responses]
    packed = pack([(*p, *r) for p, r in zip(PROMPTS.tokens, tokens, strict=True)], [len(r) for r in tokens])
    return Rollout(packed, torch.zeros(len(packed.responses)), torch.tensor(ended), torch.arange(3))


def scores(tmp_path, monkeypatch, body, ppo=None, weight=1.0):
    source = "def reward(prompts, responses, **columns):\n" + textwrap.indent(textwrap.dedent(body), "    ")
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    config = Config(rewards=(RewardConfig(function="mine.py:reward", weight=weight),))
    return shaped(config, ppo).tolist()


def scored(config):
    asked, judge = sources(config), sources(config, load_judge)
    return score(rollout(), PROMPTS, asked, TOKENIZER, start_world(1), judge)


NO_SCORES = Moments()


def shaped(config, ppo=None, earlier=NO_SCORES):
    found = scored(config)
    return shape(found, earlier.add(found.scores), ppo or PPOConfig())


def test_a_function_sees_prompts_responses_and_columns_in_order(tmp_path, monkeypatch):
    body = """
        assert prompts == ["one", "three", "two"] and responses == ["a", "bcd", "ef"]
        return [float(a) + len(r) for a, r in zip(columns["answer"], responses)]"""
    assert scores(tmp_path, monkeypatch, body) == [2, 6, 4]


def test_weights_clip_and_the_penalty_for_a_cut_response(tmp_path, monkeypatch):
    ppo = PPOConfig(score_clip=5.0, truncation_penalty=0.5)
    assert scores(tmp_path, monkeypatch, "return [len(r) for r in responses]", ppo, weight=2.0) == [2, 5, 3.5]


def test_a_tensor_is_as_good_as_a_list(tmp_path, monkeypatch):
    assert scores(tmp_path, monkeypatch, "import torch; return torch.arange(3)") == [0, 1, 2]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return [1, 2]", "returned 2 numbers for 3 responses"),
        ("return [1, float('nan'), 2]", r"returned nan for response 1: 'bcd'"),
        ("return [1, 2, float('inf')]", r"returned inf for response 2: 'ef'"),
        ("return [1, 'high', 2]", r"returned 'high' \(str\), not a number, for response 1"),
        ("return 3.0", "returned float, not one number for each response"),
        ("return None", "returned NoneType"),
        ("return '123'", "returned str, not one number for each response"),
        ("return b'123'", "returned bytes, not one number for each response"),
        ("return dict.fromkeys(responses, 1.0)", "returned dict, not one number for each response"),
        ("return {1.0, 2.0, 3.0}", "returned set, not one number for each response"),
        ("return [1, 1e39, 2]", r"returned 1e\+39, outside the range of fp32, for response 1: 'bcd'"),
        ("return [1, -(10**400), 2]", "returned -1000.*, outside the range of fp32, for response 1"),
        ("return [1, 10**5000, 2]", "returned a value that cannot be shown as text, outside the range of fp32"),
        ("import decimal; return [decimal.Decimal('sNaN')] * 3", r"'sNaN'\) \(Decimal\), not a number, for response 0"),
        ("raise KeyError('label')", r"raised KeyError: 'label' \(mine.py:2\)"),
    ],
)
def test_a_function_that_fails_is_named_with_what_it_did(tmp_path, monkeypatch, body, words):
    with pytest.raises(RewardError, match=words) as raised:
        scores(tmp_path, monkeypatch, body)
    assert "mine.py:reward" in str(raised.value)


def test_the_largest_number_of_fp32_is_a_score_and_so_is_a_bool(tmp_path, monkeypatch):
    largest = torch.finfo(torch.float32).max
    assert scores(tmp_path, monkeypatch, f"return [{largest!r}, True, False]") == [largest, 1, 0]


def test_a_weighted_sum_beyond_fp32_is_an_error_with_what_each_source_said(tmp_path, monkeypatch):
    with pytest.raises(RewardError, match=r"rewards: .*response 1 of the batch is 3e\+38 \* 2 = 6e\+38, outside"):
        scores(tmp_path, monkeypatch, "return [1, 2, 0]", weight=3e38)


def test_a_reward_model_scores_the_last_token_of_each_sequence(tmp_path):
    model = tiny.classifier()
    path = tiny.saved(tmp_path / "reward", model)
    config = Config(rewards=(RewardConfig(model=path),), data=DataConfig())
    config = _with_dtype(config)
    found = scored(config).scores
    with torch.no_grad():
        expected = [float(model(torch.tensor([s])).logits) for s in _sequences()]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_reward_model_with_another_tokenizer_reads_the_text_anew(tmp_path):
    path = tiny.saved(tmp_path / "reward", tiny.classifier(vocabulary=258), extra=("<more>",))
    config = _with_dtype(Config(rewards=(RewardConfig(model=path),)))
    found = scored(config).scores
    model, other = tiny.classifier(vocabulary=258), tiny.tokenizer(("<more>",))
    texts = [p + r for p, r in zip(PROMPTS.texts, ("a<eos>", "bcd<eos>", "ef"), strict=True)]  # the last was cut
    with torch.no_grad():
        expected = [float(model(torch.tensor([other(t)["input_ids"]])).logits) for t in texts]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_rank_without_responses_has_no_scores(tmp_path):
    same = tiny.saved(tmp_path / "same", tiny.classifier())
    other = tiny.saved(tmp_path / "other", tiny.classifier(vocabulary=258), extra=("<more>",))
    functions = (RewardConfig(function="math:fsum"),)
    config = _with_dtype(Config(rewards=(RewardConfig(model=same), RewardConfig(model=other), *functions)))
    nothing = Rollout(pack([], []), torch.zeros(0), torch.zeros(0, dtype=torch.bool), torch.arange(0))
    assert response_texts(nothing.packed, TOKENIZER) == []
    seen = Responses([], [], [], {}, nothing.packed)
    assert [list(source(seen)) for source, _ in sources(config)] == [[], [], []]


def test_a_reward_model_with_two_labels_is_an_error_that_names_its_setting(tmp_path):
    path = tiny.saved(tmp_path / "reward", tiny.classifier(labels=2))
    with pytest.raises(ModelError, match=r"^rewards.model = .* has 2 labels"):
        sources(Config(rewards=(RewardConfig(model=path),)))
    with pytest.raises(ModelError, match=r"^rewards.ensemble = .* has 2 labels"):
        sources(Config(rewards=(RewardConfig(ensemble=(path, path)),)))


def test_a_language_model_is_no_reward_model_also_where_its_config_does_not_tell(tmp_path):
    """Transformers would give it a score head of random numbers."""
    path = tiny.saved(tmp_path / "causal", tiny.causal(num_labels=1))
    with pytest.raises(
        ModelError, match=r"rewards.model = .* is a LlamaForCausalLM and no reward .*train_reward.py --model.path"
    ):
        sources(Config(rewards=(RewardConfig(model=path),)))
    settings = json.loads((tmp_path / "causal/config.json").read_text())
    del settings["architectures"]
    (tmp_path / "causal/config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"1 weights of LlamaForSequenceClassification are not .* \(score.weight\)"):
        sources(Config(rewards=(RewardConfig(model=path),)))


def test_an_ensemble_says_the_mean_or_the_least_of_its_members(tmp_path):
    paths = tuple(tiny.saved(tmp_path / str(i), tiny.classifier(seed=i)) for i in range(3))
    alone = torch.stack([scored(_with_dtype(Config(rewards=(RewardConfig(model=p),)))).scores for p in paths])
    for combine, expected in (("mean", alone.mean(0)), ("min", alone.amin(0))):
        config = _with_dtype(Config(rewards=(RewardConfig(ensemble=paths, combine=combine),)))
        assert torch.allclose(scored(config).scores, expected, atol=1e-6)


def test_an_ensemble_asks_all_members_before_it_fails():
    """Each of them gathers something from all ranks, on which others may not have failed."""
    asked = []

    def member(name):
        asked.append(name)
        raise RewardError(name)

    with pytest.raises(RewardError, match="first"):
        Ensemble([partial(lambda name, _: member(name), name) for name in ("first", "second")], "mean")(None)
    assert asked == ["first", "second"]


THREE = """
import random
asked = []

def first(responses):
    asked.append("first")
    return [len(r) + random.random() for r in responses]

async def second(responses):
    asked.append("second")
    return [random.random() for r in responses]

def third(responses):
    asked.append("third")
    if responses[0] == "a" and responses[1] == "fails":
        raise ValueError("so it does")
    return [random.random() for r in responses]

def judge(responses):
    asked.append("judge")
    return [random.random() for r in responses]
"""


def test_what_is_asked_beforehand_scores_as_what_is_asked_at_once(tmp_path):
    """In the same order, as random numbers show; a model is not asked until the scores are put together."""
    (tmp_path / "three.py").write_text(THREE)
    functions = [RewardConfig(function=f"{tmp_path}/three.py:{name}", weight=0.5) for name in ("first", "second")]
    model = RewardConfig(model=tiny.saved(tmp_path / "model", tiny.classifier()))
    judge = HealthConfig(judge=(RewardConfig(function=f"{tmp_path}/three.py:judge"),))
    config = _with_dtype(Config(rewards=(functions[0], model, functions[1]), health=judge))
    own, judges, found = sources(config), sources(config, load_judge), []
    for beforehand in (False, True):
        random.seed(3)
        asked = ask(responses_of_rank(rollout(), PROMPTS, TOKENIZER), own, judges) if beforehand else None
        assert asked is None or (len(asked.answers) == 3 and own[1][0] not in asked.answers)
        found.append(score(rollout(), PROMPTS, own, TOKENIZER, start_world(1), judges, asked=asked))
    for name in ("by_source", "scores", "judged"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name))


def test_what_is_after_an_error_is_not_asked_and_the_error_is_the_same(tmp_path):
    (tmp_path / "three.py").write_text(THREE)
    names = ("third", "first", "second")
    functions = [RewardConfig(function=f"{tmp_path}/three.py:{name}") for name in names]
    judge = HealthConfig(judge=(RewardConfig(function=f"{tmp_path}/three.py:judge"),))
    config = Config(rewards=tuple(functions), health=judge)
    own, judges = sources(config), sources(config, load_judge)
    fails, called = rollout(("a", "fails", "ef")), own[0][0]._function.__globals__["asked"]
    asked = ask(responses_of_rank(fails, PROMPTS, TOKENIZER), own, judges)
    assert called == ["second", "third"]  # coroutine functions are asked first, all at once
    with pytest.raises(RewardError) as at_once:
        score(fails, PROMPTS, own, TOKENIZER, start_world(1), judges)
    with pytest.raises(RewardError) as later:
        score(fails, PROMPTS, own, TOKENIZER, start_world(1), judges, asked=asked)
    assert str(later.value) == str(at_once.value) and "third raised ValueError: so it does" in str(later.value)
    assert called == ["second", "third"] * 2


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("b", [0, 1, 0]),
        ("^.{2,3}$", [0, 1, 1]),
        ("(?i)BC", [0, 1, 0]),
        ("^{last}$", [1, 0, 1]),
        (r"\{last}|a", [1, 0, 0]),
        (r"\\{last}|a", [1, 0, 0]),
        ("[{last}]", [1, 0, 0]),
        ("^{twice}{2}$", [0, 0, 1]),
        ("{none}|.", [0, 0, 1]),
    ],
)
def test_a_pattern_is_looked_for_in_each_response_with_its_own_columns(pattern, expected):
    columns = {"last": ["a", ".", "ef"], "twice": ["aa", "bc", "e|f"], "none": [None, "", "ef"]}
    prompts = replace(PROMPTS, columns=columns)
    asked = sources(Config(rewards=(RewardConfig(pattern=pattern),)))
    responses = ("a", "bcd", "e|fe|f" if "twice" in pattern else "ef")
    found = score(rollout(responses), prompts, asked, TOKENIZER, start_world(1))
    assert found.scores.tolist() == expected


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (
            "{nothing}",
            r"names the column nothing, which the data does not have; it has: .*answer.* write \\\{nothing\} for",
        ),
        (
            "(?<={prompt}|a)b",
            "is not a regular expression after its columns are filled in, .*look-behind requires fixed-width",
        ),
    ],
)
def test_a_pattern_that_cannot_be_filled_is_an_error(pattern, words):
    with pytest.raises(RewardError, match=words):
        scored(Config(rewards=(RewardConfig(pattern=pattern),)))


def test_sources_are_added_by_weight_and_kept_apart():
    found = scored(Config(rewards=(RewardConfig(pattern="b"), RewardConfig(pattern="e|b", weight=2.0))))
    assert found.by_source.tolist() == [[0, 0], [1, 1], [0, 1]]
    assert found.scores.tolist() == [0, 3, 2]


def test_running_normalisation_has_all_scores_of_the_run_and_comes_before_the_clip():
    earlier = Moments().add(torch.tensor([5.0, -3.0, 0.0, 8.0]))
    config = Config(rewards=(RewardConfig(pattern="b"),))
    found = shaped(config, PPOConfig(score_normalise=True, score_clip=0.3), earlier)
    everything = torch.tensor([5.0, -3.0, 0.0, 8.0, 0.0, 1.0, 0.0])
    expected = (torch.tensor([0.0, 1.0, 0.0]) - everything.mean()) / everything.std(correction=0)
    assert found.tolist() == pytest.approx(expected.clamp(-0.3, 0.3).tolist())


def test_equal_scores_normalise_to_zero():
    found = shaped(Config(rewards=(RewardConfig(pattern="."),)), PPOConfig(score_normalise=True))
    assert found.tolist() == [0, 0, 0]


def test_tokens_beyond_the_soft_limit_cost_their_penalty():
    found = shaped(Config(rewards=(RewardConfig(pattern="."),)), PPOConfig(length_limit=1, length_penalty=0.25))
    assert found.tolist() == [1, 0.5, 0.75]


def test_a_judge_scores_the_same_responses_and_changes_no_score(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def one(prompts, responses, **c):\n    return [1.0 for r in responses]\n"
        "def long(prompts, responses, **c):\n    return [len(r) for r in responses]\n"
    )
    monkeypatch.chdir(tmp_path)
    judges = (RewardConfig(function="mine.py:long", weight=2.0), RewardConfig(function="mine.py:one"))
    config = Config(rewards=(RewardConfig(function="mine.py:one"),), health=HealthConfig(judge=judges))
    found = scored(config)
    assert found.scores.tolist() == [1] * 3 and found.by_source.shape == (3, 1)
    assert shaped(config, PPOConfig(score_clip=0.5)).tolist() == [0.5] * 3
    assert found.judged.tolist() == [2 * len(r) + 1 for r in ("a", "bcd", "ef")]
    assert scored(Config(rewards=config.rewards)).judged.isnan().all()


def test_a_judge_that_is_the_reward_is_warned_of_and_another_is_not(tmp_path, monkeypatch, caplog):
    tiny.saved(tmp_path / "one", tiny.classifier())
    monkeypatch.chdir(tmp_path)
    rewards = (RewardConfig(model="one"), RewardConfig(pattern="b"))
    for judge, warned in (
        (RewardConfig(ensemble=("./one", "two")), [str(tmp_path / "one")]),
        (RewardConfig(pattern="b"), ["b"]),
        (RewardConfig(pattern="c"), []),
    ):
        assert shared_sources(Config(rewards=rewards, health=HealthConfig(judge=(judge,)))) == warned
    scored(Config(rewards=rewards[1:], health=HealthConfig(judge=rewards[1:])))
    assert "health.judge and rewards both have b: a judge that is also the reward" in caplog.text


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("function", r"health.judge.function = mine.py:\w+ returned nan"),
        ("pattern", r"health.judge.pattern = \{nothing\} names the column nothing"),
        ("url", r"health.judge.url = http://127.0.0.1:9 cannot be reached"),
        ("model", r"health.judge.model = .* has 2 labels"),
    ],
)
def test_a_judge_that_fails_is_named_as_the_judge(kind, words, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def bad(responses, **c):\n    return [float('nan') for r in responses]\n")
    monkeypatch.chdir(tmp_path)
    judge = {
        "function": RewardConfig(function="mine.py:bad"),
        "pattern": RewardConfig(pattern="{nothing}"),
        "url": RewardConfig(url="http://127.0.0.1:9", retries=0),  # the port that discards; nothing listens there
        "model": RewardConfig(model=tiny.saved(tmp_path / "two", tiny.classifier(labels=2))),
    }[kind]
    with pytest.raises(FastPPOError, match=words):
        scored(Config(rewards=(RewardConfig(pattern="b"),), health=HealthConfig(judge=(judge,))))


def _with_dtype(config):
    return replace(config, optim=replace(config.optim, dtype="fp32"))


def _sequences():
    packed = rollout().packed
    return [part.tolist() for part in packed.tokens.split(packed.lengths.tolist())]
