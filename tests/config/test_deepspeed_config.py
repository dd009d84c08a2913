"""What DeepSpeed is told, and a raw configuration merged into it."""

import dataclasses
import json

import pytest
from ppo_step import config_of

from fastppo.config import deepspeed_config
from fastppo.config.validation import validate
from fastppo.errors import ConfigError


def with_raw(path, *settings):
    config = config_of("none", *settings)
    return dataclasses.replace(config, zero=dataclasses.replace(config.zero, deepspeed=str(path)))


@pytest.fixture
def merged(tmp_path):
    """The configurations of a trained and of a frozen role, for a raw one and other settings."""

    def make(raw, *settings):
        (tmp_path / "raw.json").write_text(json.dumps(raw))
        config = with_raw(tmp_path / "raw.json", *settings)
        made = [deepspeed_config.trained, deepspeed_config.frozen]
        return [make(config.optim, config.zero) for make in made]

    return make


def test_each_role_rests_where_its_setting_says():
    settings = ["--zero.stage", "3", "--zero.offload", "nvme", "--zero.nvme_path", "/nvme"]
    config = config_of("none", *settings, "--zero.offload_parameters", "cpu", "--zero.offload_frozen", "none")
    trained = deepspeed_config.trained(config.optim, config.zero)["zero_optimization"]
    assert trained["offload_optimizer"] == {"device": "nvme", "nvme_path": "/nvme"}
    assert trained["offload_param"] == {"device": "cpu"}
    assert deepspeed_config.frozen(config.optim, config.zero)["zero_optimization"] == {"stage": 3}


@pytest.mark.parametrize("stage", [1, 2])
def test_offload_below_stage_3_is_that_of_the_optimizer(stage):
    zero = config_of("none", "--zero.stage", str(stage), "--zero.offload", "cpu").zero
    assert (zero.optimizer_on, zero.parameters_on, zero.frozen_on) == ("cpu", "none", "none")


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_at_stage_1_in_bf16_each_gradient_is_added_where_it_arrives_and_the_sums_travel_unrounded(stage, dtype):
    config = config_of("none", "--zero.stage", str(stage), "--optim.dtype", dtype)
    trained = deepspeed_config.trained(config.optim, config.zero)
    first = stage == 1 and dtype == "bf16"
    assert trained["bf16"].get("immediate_grad_update", False) == first
    assert trained.get("communication_data_type") == ("fp32" if first else None)


def test_sums_may_travel_in_bf16_where_the_network_is_slow(merged):
    raw = {"communication_data_type": "bf16"}
    trained, _ = merged(raw, "--zero.stage", "1", "--optim.dtype", "bf16")
    assert trained["communication_data_type"] == "bf16" and trained["bf16"]["immediate_grad_update"]


def test_what_has_no_setting_is_taken_over(merged):
    raw = {
        "zero_optimization": {"reduce_bucket_size": 1000, "offload_optimizer": {"pin_memory": False}},
        "aio": {"x": 1},
    }
    trained, frozen = merged(raw, "--zero.stage", "3", "--zero.offload", "cpu")
    assert trained["zero_optimization"]["reduce_bucket_size"] == 1000 and trained["aio"] == {"x": 1}
    assert trained["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert frozen["zero_optimization"]["reduce_bucket_size"] == 1000
    assert "offload_optimizer" not in frozen["zero_optimization"]


def test_auto_and_the_value_that_follows_are_taken_as_ours(merged):
    """The file that Hugging Face's documentation gives, which people have."""
    raw = {
        "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": 1e-5, "weight_decay": "auto"}},
        "scheduler": {"type": "auto", "params": {"warmup_num_steps": "auto"}},
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "sub_group_size": 1e9},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 1.0,
        "train_batch_size": "auto",
    }
    settings = ["--zero.stage", "3", "--zero.offload", "cpu"]
    trained, _ = merged(raw, *settings)
    plain = config_of("none", *settings)
    expected = deepspeed_config.trained(plain.optim, plain.zero)
    expected["zero_optimization"]["sub_group_size"] = 1e9
    expected["fp16"] = {"loss_scale": 0, "initial_scale_power": 16}
    assert trained == expected


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"zero_optimization": {"stage": 2}}, ["zero_optimization.stage there is 2", "zero.stage, which makes it 3"]),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, ["zero.offload_parameters", 'makes it "none"']),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, ["zero.offload_optimizer"]),
        ({"zero_optimization": {"offload_optimizer": {"nvme_path": "/x"}}}, ["zero.nvme_path"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled there is true", "optim.dtype, which makes it false"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled", "optim.dtype"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping there is 0.5", "optim.max_grad_norm, which makes it 1.0"]),
        ({"train_batch_size": 32}, ["train_batch_size there is 32", "ppo.batch_size"]),
        ({"train_micro_batch_size_per_gpu": 4}, ["ppo.microbatch_tokens"]),
        ({"optimizer": {"type": "Lamb"}}, ["optimizer.type", "Lamb"]),
        ({"optimizer": {"params": {"lr": 1e-3}}}, ["optimizer.params.lr", "actor.lr and critic.lr"]),
        ({"optimizer": {"params": {"betas": [0.9, 0.99]}}}, ["optim.betas, which makes it [0.9, 0.95]"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler.type", "optim.schedule"]),
        ({"zero_optimization": 3}, ["zero_optimization there is 3, not a JSON object"]),
    ],
)
def test_what_contradicts_a_setting_is_refused_with_both_named(merged, raw, words):
    with pytest.raises(ConfigError) as error:
        merged(raw, "--zero.stage", "3")
    for word in (*words, "raw.json"):
        assert word in str(error.value)


@pytest.mark.parametrize(("content", "words"), [("{", "cannot be read as JSON"), ("[1]", "holds list"), (None, "read")])
def test_a_file_that_is_no_configuration_is_an_error_before_anything_loads(tmp_path, content, words):
    path = tmp_path / "raw.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=words) as error:
        validate(with_raw(path))
    assert f"zero.deepspeed is {path}" in str(error.value)
