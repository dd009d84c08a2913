"""Sources of reward, and what is said of those that fail."""

import textwrap

import pytest
import tiny
import torch

from fastppo.batch import Rollout, pack
from fastppo.config import Config, DataConfig, HealthConfig, PPOConfig, RewardConfig
from fastppo.data import PromptSet
from fastppo.feedback import RewardError, load_functions, load_judge, load_sources, score

TOKENIZER = tiny.tokenizer()
CPU = torch.device("cpu")
PROMPTS = PromptSet(
    tokens=tuple(tuple(TOKENIZER(t)["input_ids"]) for t in ("one", "three", "two")),
    texts=("one", "three", "two"),
    columns={"answer": ["1", "3", "2"], "prompt": ["one", "three", "two"]},
)


def rollout(responses=("a", "bcd", "ef"), ended=(True, True, False)):
    tokens = [TOKENIZER(r)["input_ids"] for r in responses]
    packed = pack([(*p, *r) for p, r in zip(PROMPTS.tokens, tokens, strict=True)], [len(r) for r in tokens])
    return Rollout(packed, torch.zeros(len(packed.responses)), torch.tensor(ended), torch.arange(3))


def scores(tmp_path, monkeypatch, body, ppo=None, weight=1.0):
    source = "def reward(prompts, responses, **columns):\n" + textwrap.indent(textwrap.dedent(body), "    ")
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    config = Config(rewards=(RewardConfig(function="mine.py:reward", weight=weight),))
    return score(
        rollout(), PROMPTS, load_sources(config, TOKENIZER, CPU), TOKENIZER, ppo or PPOConfig()
    ).scores.tolist()


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
        ("raise KeyError('label')", r"raised KeyError: 'label' \(mine.py:2\)"),
    ],
)
def test_a_function_that_fails_is_named_with_what_it_did(tmp_path, monkeypatch, body, words):
    with pytest.raises(RewardError, match=words) as raised:
        scores(tmp_path, monkeypatch, body)
    assert "mine.py:reward" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere:reward", "could not be imported"),
        ("nowhere.py:reward", "no file nowhere.py"),
        ("textwrap:nothing", "has no function nothing; it has: .*indent"),
        ("textwrap", "module:function"),
    ],
)
def test_a_function_that_is_not_there_is_an_error_before_anything_loads(name, words):
    with pytest.raises(RewardError, match=words):
        load_functions([RewardConfig(function=name)])


def test_a_function_is_found_in_the_folder_of_the_run(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_here.py").write_text("def reward(**_): return []")
    monkeypatch.chdir(tmp_path)
    assert load_functions([RewardConfig(function="my_rewards_here:reward")])


def test_a_reward_model_scores_the_last_token_of_each_sequence(tmp_path):
    model = tiny.classifier()
    path = tiny.saved(tmp_path / "reward", model)
    config = Config(rewards=(RewardConfig(model=path),), data=DataConfig())
    config = _with_dtype(config)
    found = score(rollout(), PROMPTS, load_sources(config, TOKENIZER, CPU), TOKENIZER, PPOConfig()).scores
    with torch.no_grad():
        expected = [float(model(torch.tensor([s])).logits) for s in _sequences()]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_reward_model_with_another_tokenizer_reads_the_text_anew(tmp_path):
    path = tiny.saved(tmp_path / "reward", tiny.classifier(vocabulary=258), extra=("<more>",))
    config = _with_dtype(Config(rewards=(RewardConfig(model=path),)))
    found = score(rollout(), PROMPTS, load_sources(config, TOKENIZER, CPU), TOKENIZER, PPOConfig()).scores
    model, other = tiny.classifier(vocabulary=258), tiny.tokenizer(("<more>",))
    texts = [p + r for p, r in zip(PROMPTS.texts, ("a", "bcd", "ef"), strict=True)]
    with torch.no_grad():
        expected = [float(model(torch.tensor([other(t)["input_ids"]])).logits) for t in texts]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_reward_model_with_two_labels_is_an_error(tmp_path):
    path = tiny.saved(tmp_path / "reward", tiny.classifier(labels=2))
    with pytest.raises(ValueError, match="has 2 labels"):
        load_sources(Config(rewards=(RewardConfig(model=path),)), TOKENIZER, CPU)


def test_a_judge_scores_the_same_responses_and_changes_no_score(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def one(prompts, responses, **c):\n    return [1.0 for r in responses]\n"
        "def long(prompts, responses, **c):\n    return [len(r) for r in responses]\n"
    )
    monkeypatch.chdir(tmp_path)
    judges = (RewardConfig(function="mine.py:long", weight=2.0), RewardConfig(function="mine.py:one"))
    config = Config(rewards=(RewardConfig(function="mine.py:one"),), health=HealthConfig(judge=judges))
    sources, judge = (load(config, TOKENIZER, CPU) for load in (load_sources, load_judge))
    found = score(rollout(), PROMPTS, sources, TOKENIZER, PPOConfig(score_clip=0.5), judge)
    assert found.scores.tolist() == [0.5] * 3 and found.judged.tolist() == [2 * len(r) + 1 for r in ("a", "bcd", "ef")]
    assert load_judge(Config(rewards=config.rewards), TOKENIZER, CPU) == []
    assert score(rollout(), PROMPTS, sources, TOKENIZER, PPOConfig()).judged.isnan().all()


def _with_dtype(config):
    from dataclasses import replace

    return replace(config, optim=replace(config.optim, dtype="fp32"))


def _sequences():
    packed = rollout().packed
    return [part.tolist() for part in packed.tokens.split(packed.lengths.tolist())]
