"""The quickstart: its runs fit together, its hacked twin differs in the penalty alone, and its judge tells praise."""

import dataclasses
import sys

import pytest

from fastppo.config import HealthConfig, RewardConfig
from fastppo.config.command_line import DPO, GENERATE, REST, REWARD, SFT, parse
from fastppo.models.loading.source import EXPORTED_BY
from fastppo.quickstart.judge import _analyzer, favourable

JUDGE = RewardConfig(function="fastppo.quickstart:favourable")


def test_each_stage_takes_what_the_ones_before_leave():
    sft, reward = parse(["--config", "quickstart-sft"], SFT), parse(["--config", "quickstart-reward"], REWARD)
    ppo = parse(["--config", "quickstart"])
    left = [f"{sft.output}/model", f"{reward.output}/reward_model"]
    assert [ppo.actor.model, *(source.model for source in ppo.rewards)] == left == list(EXPORTED_BY)
    assert all(preset in command.presets for command, preset in EXPORTED_BY.values())
    assert (sft.model.path, sft.model.gguf_file) == (reward.model.path, reward.model.gguf_file)
    assert ppo.actor.train == sft.model.train  # so that the layers below are still those of the reward model
    assert {ppo.data.path, sft.data.path, reward.data.path} == {ppo.data.path}
    assert ppo.health.judge == (JUDGE,)


def test_dpo_learns_from_the_model_and_the_reviews_of_the_others():
    sft, reward = parse(["--config", "quickstart-sft"], SFT), parse(["--config", "quickstart-reward"], REWARD)
    dpo = parse(["--config", "quickstart-dpo"], DPO)
    assert dpo.model.path == f"{sft.output}/model"
    assert dataclasses.replace(dpo.data, limit=reward.data.limit) == reward.data
    assert dpo.data.limit == 450 + dpo.eval.examples


def test_rest_draws_as_many_responses_to_the_same_prompts_for_the_same_reward():
    ppo, rest = parse(["--config", "quickstart"]), parse(["--config", "quickstart-rest"], REST)
    drawn = rest.steps * rest.grow.prompts * rest.sampling.samples_per_prompt
    assert drawn == ppo.steps * ppo.ppo.batch_size
    for group in ("rewards", "data", "health", "eval"):
        assert getattr(rest, group) == getattr(ppo, group), group
    assert dataclasses.replace(rest.actor, lr=ppo.actor.lr) == ppo.actor
    others = dataclasses.asdict(rest.sampling) | {"samples_per_prompt": 1, "rows": ppo.sampling.rows}
    assert others.items() <= dataclasses.asdict(ppo.sampling).items()


def test_generate_answers_the_prompts_that_the_others_hold_out():
    ppo, drawn = parse(["--config", "quickstart"]), parse(["--config", "quickstart-generate"], GENERATE)
    assert (drawn.model.path, drawn.rewards, drawn.judge) == (ppo.actor.model, ppo.rewards, ppo.health.judge)
    for name in ("path", "column", "first_tokens", "split_seed"):
        assert getattr(drawn.data, name) == getattr(ppo.data, name), name
    assert drawn.data.limit == ppo.eval.prompts


def test_what_the_reward_model_has_read_is_as_long_as_prompt_and_response():
    reward, ppo = parse(["--config", "quickstart-reward"], REWARD), parse(["--config", "quickstart"])
    assert ppo.sampling.min_new_tokens == ppo.sampling.max_new_tokens and not reward.data.eos
    assert ppo.data.first_tokens is not None
    length = ppo.data.first_tokens + ppo.sampling.max_new_tokens
    assert length == reward.data.last_tokens == reward.data.max_tokens
    assert length == parse(["--config", "quickstart-sft"], SFT).data.max_tokens


def test_the_hacked_quickstart_has_less_penalty_more_steps_and_levels_that_end_it():
    plain, hacked = parse(["--config", "quickstart"]), parse(["--config", "quickstart-hacked"])
    assert hacked.ppo.kl_coef < plain.ppo.kl_coef / 100 and hacked.steps > plain.steps
    assert not plain.health.alarms and hacked.health.alarms
    assert {alarm.action for alarm in hacked.health.alarms} == {"stop"}
    same = dataclasses.replace(
        hacked,
        output=plain.output,
        steps=plain.steps,
        ppo=dataclasses.replace(hacked.ppo, kl_coef=plain.ppo.kl_coef),
        health=HealthConfig(judge=hacked.health.judge),
        eval=dataclasses.replace(hacked.eval, every=plain.eval.every),  # the best checkpoint is chosen among several
        checkpoint=plain.checkpoint,
    )
    assert same == plain


def test_favourable_texts_score_higher_than_unfavourable_ones():
    responses = ["a wonderful, moving film. I loved it!", "a table and a chair", "boring, awful and stupid.", ""]
    scores = favourable(["This is"] * 4, responses, label=["1"] * 4)
    assert all(type(score) is float and -1 <= score <= 1 for score in scores)
    assert scores[0] > 0.5 > scores[1] == scores[3] == 0 > -0.5 > scores[2]


def test_a_missing_vader_is_told_how_to_install(monkeypatch):
    _analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ImportError, match="pip install vaderSentiment"):
        favourable(["a"], ["b"])
