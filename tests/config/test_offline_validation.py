"""Every rule about the settings of SFT and reward modelling refuses what it should, with the reason."""

import dataclasses
from typing import Any

import pytest
from test_validation import numbers

from fastppo.config import (
    AnswersConfig,
    DPOConfig,
    LoraConfig,
    ModelConfig,
    PairsConfig,
    RewardTrainingConfig,
    SFTConfig,
)
from fastppo.config.command_line import DPO, REWARD, SFT, parse
from fastppo.config.validation.offline import (
    DPO_RANGES,
    RANGES,
    REWARD_RANGES,
    validate_dpo,
    validate_reward,
    validate_sft,
)
from fastppo.errors import ConfigError

PAIRS = RewardTrainingConfig(model=ModelConfig(path="m"), data=PairsConfig(path="d.jsonl"))
PREFERRED = DPOConfig(model=ModelConfig(path="m"), data=PairsConfig(path="d.jsonl"))
ANSWERS = SFTConfig(model=ModelConfig(path="m"), data=AnswersConfig(path="d.jsonl"))


def changed(config: Any, **settings: Any) -> Any:
    """The config with settings given as data__limit=8 or model__lora__rank=4."""
    for name, value in settings.items():
        group, _, rest = name.partition("__")
        part = changed(getattr(config, group), **{rest: value}) if rest else value
        config = dataclasses.replace(config, **{group: part})
    return config


def test_the_defaults_and_the_presets_are_allowed():
    validate_reward(PAIRS)
    validate_sft(ANSWERS)
    validate_dpo(PREFERRED)
    for ranks in (1, 2, 16):
        validate_reward(parse(["--config", "quickstart-reward"], REWARD, ranks), ranks)
        validate_sft(parse(["--config", "quickstart-sft", "--steps", "2"], SFT, ranks), ranks)
        validate_dpo(parse(["--config", "quickstart-dpo"], DPO, ranks), ranks)
    validate_dpo(parse(["--config", "8b-dpo"], DPO, 8), 8)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(output=""), ["output is empty"]),
        (dict(model__path=""), ["model.path is not set"]),
        (dict(model__train=0), ["model.train is 0", "1 or more"]),
        (dict(data__path=""), ["data.path is not set"]),
        (dict(data__template={"a": 1}, data__chat="never"), ["data.template is {'a': 1} and data.chat is never"]),
        (dict(optim__betas=(1.0, 0.9)), ["optim.betas"]),
        (dict(batch_size=33), ["batch_size is 33", "2 ranks"]),
        (dict(eval__examples=0, data__eval_path="e"), ["data.eval_path is e", "eval.examples is 0"]),
        (dict(data__eval_split="test"), ["data.eval_split is test", "data.eval_path to d.jsonl"]),
        (dict(data__limit=256), ["data.limit is 256", "eval.examples 256"]),
        (dict(steps=3, optim__warmup_steps=4), ["optim.warmup_steps is 4", "steps 3"]),
        (dict(zero__stage=0), ["zero.stage is 0", "bf16"]),
        (dict(checkpoint__keep_best=1, checkpoint__every=0), ["keep_best is 1", "checkpoint.every 0"]),
        (dict(resume=""), ["resume is empty"]),
        (dict(model__lora=LoraConfig(targets="q_proj,")), ["model.lora.targets is 'q_proj,'"]),
        (dict(attention="flash", optim__dtype="fp32"), ["attention is flash", "fp32"]),
        (dict(attention="varlen", optim__dtype="fp32"), ["attention is varlen", "fp32"]),
    ],
)
def test_settings_of_both_that_cannot_work_are_refused(settings, words):
    for config, validate in ((PAIRS, validate_reward), (ANSWERS, validate_sft), (PREFERRED, validate_dpo)):
        with pytest.raises(ConfigError) as error:
            validate(changed(config, **settings), 2)  # type: ignore[operator]
        for word in words:
            assert word in str(error.value)


@pytest.mark.parametrize(
    ("raw", "setting"),
    [
        ('{"train_batch_size": 32}', "batch_size"),
        ('{"train_micro_batch_size_per_gpu": 4}', "microbatch_tokens"),
        ('{"optimizer": {"params": {"lr": 0.1}}}', "model.lr"),
    ],
)
def test_what_a_raw_deepspeed_file_may_not_say_is_named_as_the_command_names_it(tmp_path, raw, setting):
    (tmp_path / "raw.json").write_text(raw)
    for config, validate in ((PAIRS, validate_reward), (ANSWERS, validate_sft)):
        with pytest.raises(ConfigError, match=rf"follows from {setting}\. Set {setting}, and take"):
            validate(changed(config, zero__deepspeed=str(tmp_path / "raw.json")))  # type: ignore[operator]


def test_both_answers_of_a_pair_must_fit_one_microbatch():
    validate_reward(changed(PAIRS, microbatch_tokens=2048))
    with pytest.raises(ConfigError, match=r"microbatch_tokens is 2047, but the two answers of a pair can have 2048"):
        validate_reward(changed(PAIRS, microbatch_tokens=2047))
    validate_sft(changed(ANSWERS, microbatch_tokens=1024))
    with pytest.raises(ConfigError, match=r"one example can have 1024 tokens"):
        validate_sft(changed(ANSWERS, microbatch_tokens=1023))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(data__rating="r", data__margin="m"), "data.rating is r and data.margin m"),
        (dict(data__rejected="chosen"), "data.chosen and data.rejected are both chosen"),
    ],
)
def test_settings_of_pairs_that_cannot_work_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        validate_reward(changed(PAIRS, **settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(model__train="head"), "model.train is head, which is for reward models"),
        (
            dict(data__messages="m", data__chat="never", data__last_tokens=3),
            "data.messages is m and data.last_tokens 3: a turn .* is learned as a whole",
        ),
    ],
)
def test_settings_of_responses_that_cannot_work_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        validate_sft(changed(ANSWERS, **settings))


@pytest.mark.parametrize(
    ("kind", "ranges"),
    [
        (RewardTrainingConfig, (*RANGES, *REWARD_RANGES)),
        (SFTConfig, RANGES),
        (DPOConfig, (*RANGES, *DPO_RANGES)),
    ],
)
def test_every_number_has_a_range(kind, ranges):
    ranged = [name for _, _, names in ranges for name in names.split()]
    assert sorted([*ranged, "zero.stage"]) == sorted({*numbers(kind), "zero.stage"})


@pytest.mark.parametrize(
    ("config", "check", "name"),
    [
        (config, check, name)
        for config, check in ((PAIRS, validate_reward), (PREFERRED, validate_dpo))
        for name in numbers(type(config))
    ],
)
def test_a_number_out_of_its_range_is_named_with_its_value(config, check, name):
    for value in (-1, float("nan")):
        with pytest.raises(ConfigError, match=rf"{name} is {value}; it must be "):
            check(changed(config, **{name.replace(".", "__"): value}))
