"""Which estimators, critics and losses go together: what is implied, and what is refused with its reason."""

import re

import pytest

from fastppo.checkpoint.resume import settings
from fastppo.config import Config, validate
from fastppo.config.command_line import parse
from fastppo.config.learning import ESTIMATOR_RULES
from fastppo.config.validation.estimators import BUILT_IN_LOSSES
from fastppo.ppo.advantages import ESTIMATORS
from fastppo.ppo.losses import LOSSES

NEEDED = ["--actor.model", "m", "--data.path", "p", "--rewards", '[{"function": "m:f"}]']


def made(*arguments):
    return parse([*NEEDED, *arguments])


def test_the_names_that_settings_know_are_those_of_the_tables():
    assert list(ESTIMATOR_RULES) == list(ESTIMATORS)
    assert list(BUILT_IN_LOSSES) == list(LOSSES)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_critic_is_there_if_the_estimator_reads_values(name):
    config = made("--ppo.estimator", name, "--sampling.samples_per_prompt", "8")
    assert (config.value_function is not None) == (name == "gae") == ("critic" in config.trained)
    assert settings(config)["critic.kind"] == ("separate" if name == "gae" else "none")


def test_a_function_of_the_users_has_a_critic_unless_it_is_told_otherwise():
    own = ("--ppo.estimator", "mine.py:f")
    assert made(*own).value_function.kind == "separate"
    assert made(*own, "--critic.kind", "shared").value_function.kind == "shared"
    assert made(*own, "--critic.kind", "none").value_function is None


SAMPLES = ("--sampling.samples_per_prompt", "4")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--ppo.estimator", "GRPO"),
            "ppo.estimator is GRPO, .* no such estimator; did you mean grpo\\? Use one of gae, g",
        ),
        (
            ("--ppo.estimator", "gspo"),
            "ppo.estimator is gspo, .* no such estimator; gspo is a ppo.loss. Use one of gae",
        ),
        (
            ("--ppo.loss", "grpo"),
            "ppo.loss is grpo, .*; grpo is a ppo.estimator. Use one of clip, gspo, cispo, or your",
        ),
        (("--ppo.loss", "mine.py"), "ppo.loss is mine.py, and there is no such loss. .* as module:function or file.py"),
        (("--ppo.lam_alpha", "0.1"), "ppo.lam_alpha is 0.1 and ppo.lam 0.95, .* no effect. Set ppo.lam to adaptive"),
        (("--ppo.estimator", "reinforce++", "--ppo.lam_alpha", "0.1"), "ppo.lam_alpha is 0.1 .* which has no lambda"),
        (("--ppo.estimator", "grpo"), "samples_per_prompt 1: grpo compares the responses.*Set samples_per_prompt to 2"),
        (("--ppo.estimator", "dr_grpo"), "one response has nothing to be compared with"),
        (("--ppo.estimator", "rloo"), "one response has nothing to be compared with"),
        (("--ppo.estimator", "reinforce++_baseline"), "one response has nothing to be compared with"),
        (
            ("--ppo.estimator", "grpo", *SAMPLES, "--critic.kind", "shared"),
            "critic.kind is shared and ppo.estimator grpo, which reads no values.*Set critic.kind to none",
        ),
        (("--ppo.estimator", "reinforce++", "--critic.kind", "separate"), "the critic would be trained for nothing"),
        (("--critic.kind", "none"), "critic.kind is none and ppo.estimator gae.*one without a critic: grpo, dr_grpo"),
        (
            ("--ppo.estimator", "rloo", *SAMPLES, "--critic.warmup_steps", "3"),
            "critic.warmup_steps is 3 but ppo.estimator rloo needs no critic",
        ),
        (
            ("--ppo.estimator", "mine.py:f", "--critic.kind", "none", "--critic.model", "m"),
            "critic.model is m but critic.kind is none",
        ),
        (("--ppo.estimator", "rloo", *SAMPLES, "--ppo.gamma", "0.9"), "nothing would be discounted. Set gamma to 1"),
        (("--ppo.estimator", "reinforce++", "--ppo.lam_critic", "1"), "ppo.lam_critic is 1.0 .* which has no lambda"),
        (("--ppo.estimator", "reinforce++", "--ppo.lam", "adaptive"), "ppo.lam is adaptive .* which has no lambda"),
        (("--ppo.loss", "cispo", "--ppo.dual_clip", "3"), "ppo.dual_clip is 3.0 and ppo.loss cispo.*clip or gspo"),
        (("--ppo.loss", "gspo", "--ppo.clip_high", "0.3"), "the clip of gspo is ppo.gspo_clip_high"),
        (("--ppo.gspo_clip_low", "0.1"), "ppo.gspo_clip_low is 0.1 and ppo.loss clip"),
        (("--ppo.nll_above", "1"), "ppo.nll_above is 1.0 and ppo.nll_coef 0"),
    ],
)
def test_what_cannot_work_or_would_have_no_effect_is_refused_with_the_reason(capsys, arguments, words):
    with pytest.raises(SystemExit):
        made(*arguments)
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--ppo.estimator", "reinforce++", "--ppo.gamma", "0.9"),
        ("--ppo.estimator", "grpo", *SAMPLES, "--ppo.loss", "gspo", "--ppo.gspo_clip_high", "1e-3"),
        ("--ppo.loss", "cispo", "--ppo.clip_high", "4"),
        ("--ppo.estimator", "mine.py:f", "--ppo.lam", "adaptive", "--ppo.gamma", "0.9"),
        ("--ppo.estimator", "mine.py:f", "--ppo.lam_alpha", "0.1"),
        ("--ppo.lam", "adaptive", "--ppo.lam_alpha", "0.1"),
        ("--config", "quickstart", "--ppo.estimator", "reinforce++", "--critic.kind", "none"),
    ],
)
def test_what_goes_together_passes(arguments):
    config = made(*arguments)
    validate(config)
    assert isinstance(config, Config)


def test_what_runs_recorded_before_is_what_auto_stands_for():
    """Checkpoints of runs from before these settings resume."""
    found = settings(Config())
    assert found["critic.kind"] == "separate" and found["ppo.whiten_advantages"] is True
    assert found["ppo.aggregate"] == "token"
