"""Every rule about the settings of ReST refuses what it should, with the reason."""

import dataclasses

import pytest
from test_offline_validation import changed
from test_validation import numbers

from fastppo.config import ActorConfig, AlarmConfig, DataConfig, RestConfig, RewardConfig
from fastppo.config.command_line import REST, parse
from fastppo.config.validation.ranges import ONLINE_RANGES
from fastppo.config.validation.rest import RANGES, validate_rest
from fastppo.errors import ConfigError

RIGHT = RestConfig(
    actor=ActorConfig(model="m"), data=DataConfig(path="d.jsonl"), rewards=(RewardConfig(function="m:f"),)
)


def test_the_defaults_with_what_is_required_are_right():
    validate_rest(RIGHT)
    assert RIGHT.improve.levels == (0.5, 0.75, 0.9)


def test_every_number_has_a_range():
    ranged = [name for _, _, names in (*ONLINE_RANGES, *RANGES) for name in names.split()]
    assert sorted(ranged) == sorted(set(numbers(RestConfig)) - {"zero.stage"})


@pytest.mark.parametrize("name", sorted(set(numbers(RestConfig)) - {"zero.stage"}))
def test_a_number_out_of_its_range_is_named_with_its_value(name):
    for value in (-1, float("nan")):
        with pytest.raises(ConfigError, match=rf"{name} is {value}; it must be "):
            validate_rest(changed(RIGHT, **{name.replace(".", "__"): value}))


BEST = {"improve__keep": "best", "sampling__samples_per_prompt": 4}
GIVEN = {"mixture__share": 0.5, "mixture__path": "d.jsonl"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"actor__model": ""}, "actor.model is not set"),
        ({"rewards": ()}, "rewards is empty"),
        ({"data__path": ""}, "data.path is not set"),
        ({"grow__batch_size": 30, "sampling__samples_per_prompt": 4}, "Set batch_size to 32"),
        ({"improve__keep": "best"}, "best of one response is any response"),
        ({**BEST, "improve__thresholds": (0.5,)}, "learns from each prompt's best response whatever its score"),
        ({"improve__keep": "value"}, "give a threshold for each Improve"),
        ({"improve__thresholds": ()}, "give a threshold for each Improve"),
        ({"improve__thresholds": (0.5, 1.0)}, "each quantile must be at least 0 and below 1"),
        ({"improve__keep": "value", "improve__thresholds": (0.5, float("inf"))}, "each must be a finite number"),
        ({"improve__thresholds": (0.5, 0.5)}, "the threshold must rise"),
        ({"improve__keep": "value", "improve__thresholds": (1.0, -1.0)}, "the threshold must rise"),
        ({"mixture__path": "d.jsonl"}, "its demonstrations would have no effect"),
        ({"mixture__share": 0.5}, "mixture.path is not set"),
        ({**GIVEN, "improve__batch_size": 1}, "both kinds need one"),
        ({**GIVEN, "mixture__share": 0.999}, "64 of 64 responses in an update would be demonstrations"),
        ({**GIVEN, "mixture__max_tokens": 9000}, "improve.microbatch_tokens is 8192, but one demonstration"),
        ({"sampling__max_new_tokens": 9000}, "improve.microbatch_tokens is 8192, but one sequence"),
        ({"health__alarms": (AlarmConfig("entropy", 0.5, "roll_back"),)}, "ReST has no KL penalty to raise"),
        ({"health__alarms": (AlarmConfig("entropy", 0.5, "raise_kl"),)}, "ReST has no KL penalty to raise"),
        ({"health__alarms": (AlarmConfig("approx_kl", 0.5, "warn"),)}, "which ReST does not compute"),
        ({"health__alarms": (AlarmConfig("kl_exact", 0.5, "stop"),)}, "which ReST does not compute"),
        (
            {"rollout__engine": "vllm", "sampling__temperature": 3.0},
            "sampling.temperature is 3.0 and rollout.engine vllm",
        ),
        ({"reference__gguf_file": "x.gguf"}, "reference.gguf_file is x.gguf but reference.model is not set"),
    ],
)
def test_what_cannot_work_is_refused_with_its_reason(changes, said):
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        validate_rest(changed(RIGHT, **changes))


def test_an_update_is_shared_by_the_ranks():
    with pytest.raises(ConfigError, match=r"improve\.batch_size is 64 and there are 3 ranks"):
        validate_rest(RIGHT, ranks=3)
    with pytest.raises(ConfigError, match=r"rollout\.vllm\.tensor_parallel_size is 2, and the run has 1 rank"):
        validate_rest(changed(RIGHT, rollout__engine="vllm", rollout__vllm__tensor_parallel_size=2))


def test_the_settings_of_ppo_are_not_there(capsys):
    with pytest.raises(SystemExit):
        parse(["--ppo.kl_coef", "0.1"], REST)
    assert "unknown setting ppo.kl_coef" in capsys.readouterr().err
    assert not {"critic", "ppo", "ptx"} & {field.name for field in dataclasses.fields(RestConfig)}
