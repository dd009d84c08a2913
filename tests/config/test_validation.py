"""Every rule between settings refuses what it should, and says which settings, their values and the way out."""

import dataclasses
import math
from operator import attrgetter
from typing import Any, get_args, get_type_hints

import pytest

from fastppo.config import ActorConfig, AlarmConfig, Config, DataConfig, RewardConfig, VllmConfig
from fastppo.config.command_line import parse
from fastppo.config.validation import RANGES, validate
from fastppo.config.validation.ranges import ONLINE_RANGES
from fastppo.errors import ConfigError

GOOD = Config(
    actor=ActorConfig(model="a"), data=DataConfig(path="d.jsonl"), rewards=(RewardConfig(function="module:function"),)
)

ROLL_BACK = AlarmConfig("distinct_2", 0.6, "roll_back")


AHEAD = {"ppo__steps_ahead": 1, "rewards": (RewardConfig(pattern="a"),)}


def changed(**settings: Any) -> Config:
    """GOOD with settings given as ppo__batch_size=8."""
    config = GOOD
    for name, value in settings.items():
        config = replaced(config, name.split("__"), value)
    return config


def replaced(group: Any, path: list[str], value: Any) -> Any:
    inner = replaced(getattr(group, path[0]), path[1:], value) if path[1:] else value
    return dataclasses.replace(group, **{path[0]: inner})


def test_the_defaults_and_the_quickstart_are_allowed():
    validate(GOOD)
    for ranks in (1, 2, 16):
        for settings in ((), ("--steps", "2"), ("--steps", "0")):
            validate(parse(["--config", "quickstart", *settings], ranks=ranks), ranks)
        validate(parse(["--config", "quickstart-hacked"], ranks=ranks), ranks)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(output=""), ["output", "empty"]),
        (dict(actor__model=""), ["actor.model", "--config quickstart"]),
        (dict(actor__train=0), ["actor.train is 0", "1 or more"]),
        (dict(actor__train=""), ["actor.train is ''"]),
        (dict(attention="flash", optim__dtype="fp32"), ["attention is flash", "optim.dtype fp32", "bf16", "sdpa"]),
        (dict(attention="varlen", optim__dtype="fp32"), ["attention is varlen", "optim.dtype fp32", "bf16", "sdpa"]),
        (dict(critic__train=-1), ["critic.train is -1"]),
        (dict(critic__kind="shared", critic__model="m"), ["critic.model is m", "shared", "separate"]),
        (dict(critic__kind="shared", critic__gguf_file="g"), ["critic.gguf_file is g", "shared"]),
        (dict(critic__kind="shared", critic__train=4), ["critic.train is 4", "shared"]),
        (dict(critic__kind="shared", critic__lora__rank=4), ["critic.lora.rank is 4", "shared"]),
        (dict(actor__lora__targets=""), ["actor.lora.targets is ''", "all-linear"]),
        (dict(critic__lora__targets="q_proj,,v_proj"), ["critic.lora.targets is 'q_proj,,v_proj'", "empty"]),
        (dict(actor__lora__export="adapters"), ["actor.lora.export is adapters", "actor.lora.rank is 0"]),
        (dict(critic__gguf_file="g"), ["critic.gguf_file is g", "critic.model is not set"]),
        (dict(reference__gguf_file="g"), ["reference.gguf_file is g", "reference.model is not set"]),
        (dict(rewards=()), ["rewards is empty", "--rewards", "rollout.environment"]),
        (dict(rewards=(RewardConfig(),)), ["rewards[0]", "exactly one of function, model", "none is set"]),
        (dict(rewards=(RewardConfig(function="a:b", model="m"),)), ["exactly one", "a:b", "m"]),
        (dict(rewards=(RewardConfig(model="m"), RewardConfig(function="ab"))), ["rewards[1].function is ab", "module"]),
        (dict(rewards=(RewardConfig(function="a:"),)), ["a:", "module:function"]),
        (dict(rewards=(RewardConfig(model="m", weight=float("inf")),)), ["rewards[0].weight is inf"]),
        (dict(rewards=(RewardConfig(model="m", weight=4e38),)), ["rewards[0].weight is 4e+38", "fp32"]),
        (dict(rewards=(RewardConfig(model="m", weight=0.0),)), ["rewards all have weight 0"]),
        (dict(rewards=(RewardConfig(model="m", combine="min"),)), ["combine is min", "belongs to ensemble"]),
        (dict(rewards=(RewardConfig(ensemble=("m",)),)), ["rewards[0].ensemble has one model, m"]),
        (dict(rewards=(RewardConfig(pattern="("),)), ["rewards[0].pattern is (", "not a regular expression"]),
        (dict(rewards=(RewardConfig(math="a", pattern="b"),)), ["exactly one of", "pattern is b and math is a"]),
        (dict(rewards=(RewardConfig(math="a", time_limit=0.0),)), ["rewards[0].time_limit is 0.0", "0.1 to 3600"]),
        (dict(rewards=(RewardConfig(model="m", time_limit=9.0),)), ["time_limit is 9.0", "belongs to math"]),
        (dict(rewards=(RewardConfig(math="a", timeout=9.0),)), ["rewards[0].timeout is 9.0", "belongs to url"]),
        (dict(rewards=(RewardConfig(url="host:80"),)), ["rewards[0].url is host:80", "http://"]),
        (dict(rewards=(RewardConfig(url="http://:80"),)), ["rewards[0].url is http://:80", "contain a host name"]),
        (
            dict(rewards=(RewardConfig(url="http://a:99999"),)),
            ["url is http://a:99999", "Port out of range"],
        ),
        (dict(rewards=(RewardConfig(url="http://[::1"),)), ["rewards[0].url is http://[::1", "Invalid IPv6"]),
        (dict(rewards=(RewardConfig(url="http://a", retries=-1),)), ["rewards[0].retries is -1", "0 to 1000"]),
        (dict(rewards=(RewardConfig(url="http://a", timeout=86401.0),)), ["timeout is 86401.0", "0.001 to 86400"]),
        (dict(rewards=(RewardConfig(model="m", timeout=5.0),)), ["rewards[0].timeout is 5.0", "belongs to url"]),
        (
            dict(ppo__importance_low=0.4),
            [
                "ppo.importance_low is 0.4 and ppo.importance auto, which is none with these settings",
                "no effect",
                "icepop",
            ],
        ),
        (
            dict(ppo__importance_low=0.4, sampling__top_p=0.9),
            ["ppo.importance auto, which is token with sampling.top_p 0.9", "Set ppo.importance to sequence or icepop"],
        ),
        (
            dict(ppo__importance_high=3.0, ppo__importance="none", sampling__top_k=5),
            ["ppo.importance_high is 3.0 and ppo.importance none: it", "token, sequence or icepop", "leave out"],
        ),
        (dict(ppo__length_penalty=0.1), ["length_penalty is 0.1", "length_limit, beyond which it applies, is not set"]),
        (dict(ppo__length_limit=99), ["length_limit is 99", "length_penalty 0.0"]),
        (dict(ppo__length_limit=128, ppo__length_penalty=0.1), ["length_limit is 128", "max_new_tokens 128"]),
        (dict(resume=""), ["resume is empty", "auto"]),
        (dict(track__wandb=""), ["track.wandb is empty", "null"]),
        (dict(track__responses=-1), ["track.responses is -1", "0 or more"]),
        (dict(track__responses_every=0), ["track.responses_every is 0", "1 or more"]),
        (dict(checkpoint__keep_best=1, checkpoint__every=0), ["keep_best is 1", "checkpoint.every 0"]),
        (dict(checkpoint__keep_best=2), ["keep_best is 2", "eval.every 0", "no score"]),
        (dict(checkpoint__keep_best=1, checkpoint__every=5, eval__every=2), ["checkpoint.every is 5", "eval.every 2"]),
        (dict(checkpoint__keep_last=0), ["checkpoint.keep_last is 0", "1 or more"]),
        (dict(health__judge=(RewardConfig(),)), ["health.judge[0]", "exactly one", "none is set"]),
        (dict(health__alarms=(AlarmConfig("entropy", None, "stop"),)), ["alarms[0].level is null", "stop"]),
        (dict(health__alarms=(AlarmConfig("entropy", 1.5),)), ["level is 1.5 for entropy", "between 0 and 1"]),
        (dict(health__alarms=(AlarmConfig("perplexity", 0.5),)), ["level is 0.5 for perplexity", "above 1"]),
        (dict(health__alarms=(AlarmConfig("self_bleu", 0.0),)), ["level is 0.0 for self_bleu", "above 0"]),
        (dict(health__alarms=(AlarmConfig("kl_token", float("nan")),)), ["level is nan for kl_token"]),
        (dict(health__alarms=(AlarmConfig("entropy", 0.5, "stop_epoch"),)), ["entropy", "stop_epoch", "approx_kl"]),
        (dict(health__alarms=(AlarmConfig("approx_kl", 0.5, "stop"),)), ["approx_kl", "action stop", "each update"]),
        (dict(health__alarms=(AlarmConfig("judge_gap", 2.0),)), ["judge_gap", "health.judge is empty"]),
        (dict(health__alarms=(AlarmConfig("kl_exact", 2.0),)), ["kl_exact", "kl_kind is k1", "kl_token"]),
        (dict(health__alarms=(ROLL_BACK,), ppo__kl_coef=0.0), ["action is roll_back", "kl_coef is 0"]),
        (dict(health__alarms=(ROLL_BACK,), checkpoint__every=0), ["roll_back", "checkpoint.every 0"]),
        (dict(health__alarms=(ROLL_BACK,), checkpoint__every=100), ["checkpoint.every 100", "100 steps", "1 up to 99"]),
        (dict(health__alarms=(AlarmConfig("duplicates", 3.0),)), ["level is 3.0 for duplicates", "below 1"]),
        (dict(health__alarms=(AlarmConfig("effective_samples", 1.0),)), ["1.0 for effective_samples", "below 1"]),
        (dict(health__alarms=(AlarmConfig("length_correlation", 1.0),)), ["level is 1.0", "below 1"]),
        (dict(timeout=0.0), ["timeout is 0.0", "greater than 0"]),
        (dict(ppo__bootstrap_truncated=True), ["V = score + V", "fixed point", "truncation_penalty"]),
        (dict(data__path=""), ["data.path is not set"]),
        (dict(data__template={"a": 1}, data__chat="never"), ["data.template is {'a': 1} and data.chat is never"]),
        (dict(data__first_tokens=9, data__chat="always"), ["first_tokens is 9", "data.chat is always", "template"]),
        (dict(data__first_tokens=513), ["first_tokens is 513", "max_prompt_tokens 512"]),
        (dict(data__first_tokens=9, data__suffix=" Why?"), ["first_tokens is 9 and data.suffix ' Why?'", "Leave out"]),
        (dict(eval__prompts=0, eval__every=5), ["eval.every is 5", "eval.prompts is 0"]),
        (dict(eval__prompts=0, data__eval_path="e"), ["data.eval_path is e", "eval.prompts is 0"]),
        (dict(data__eval_split="test"), ["data.eval_split is test", "data.eval_path to d.jsonl"]),
        (dict(data__limit=64), ["data.limit is 64", "eval.prompts 64"]),
        (dict(sampling__min_new_tokens=129), ["min_new_tokens is 129", "max_new_tokens 128"]),
        (dict(sampling__rows=0), ["sampling.rows is 0", "1 or more"]),
        (dict(sampling__stop_tokens=("",)), ["stop_tokens", "empty"]),
        (dict(sampling__stop_tokens=("x",), sampling__ignore_eos=True), ["stop_tokens is ['x']", "ignore_eos"]),
        (dict(ppo__microbatch_tokens=639), ["microbatch_tokens is 639", "640", "512", "128"]),
        (dict(sampling__samples_per_prompt=3), ["batch_size is 512", "samples_per_prompt 3", "510 or 513"]),
        (
            dict(sampling__until_informative=4),
            ["until_informative is 4", "samples_per_prompt 1", "one response differs from none", "to 2 or more"],
        ),
        (dict(sampling__samples_per_prompt=8, sampling__until_informative=1), ["informative is 1", "2 or more"]),
        (
            dict(rollout__engine="vlm"),
            ["engine is vlm", "inprocess or vllm, or a class of yours", "Did you mean vllm?"],
        ),
        (dict(rollout__engine="in_process"), ["engine is in_process", "Did you mean inprocess?"]),
        (dict(rollout__engine=""), ["rollout.engine is empty", "inprocess or vllm"]),
        (dict(rollout__partial_tokens=0), ["partial_tokens is 0", "1 or more"]),
        (dict(rollout__partial_tokens=128), ["partial_tokens is 128", "max_new_tokens 128", "below max_new_tokens"]),
        (
            dict(rollout__partial_tokens=9, rollout__engine="vllm"),
            ["partial_tokens is 9", "engine vllm", "inprocess", "leave out"],
        ),
        (
            dict(**AHEAD, sampling__samples_per_prompt=8, sampling__until_informative=2),
            ["ppo.steps_ahead is 1 and sampling.until_informative 2", "depends on the scores", "steps_ahead to 0"],
        ),
        (
            dict(ppo__steps_ahead=1, rewards=(RewardConfig(model="m"), RewardConfig(ensemble=("a", "b")))),
            [
                "ppo.steps_ahead is 1, and neither rewards nor health.judge has a function",
                "to 0",
                "fastppo serve-reward",
            ],
        ),
        (dict(ppo__batch_size=33, ppo__minibatches=2), ["batch_size is 33", "minibatches 2", "32 or 34"]),
        (dict(ppo__kl_in="loss"), ["kl_kind is k1", "kl_in is loss", "expectation", "exact"]),
        (dict(ppo__kl_target=0.1, ppo__kl_coef=0.0), ["kl_target is 0.1", "kl_coef 0", "stay 0"]),
        (dict(ppo__kl_target=0.1, ppo__kl_horizon=102.4), ["kl_horizon is 102.4", "batch_size 512", "positive"]),
        (dict(ptx__coef=0.1), ["ptx.coef is 0.1", "ptx.path is not set", "ptx.coef to 0"]),
        (dict(ptx__path="t.jsonl"), ["ptx.path is t.jsonl", "ptx.coef is 0", "leave out ptx.path"]),
        (
            dict(ptx__coef=0.1, ptx__path="t", ptx__max_tokens=8193),
            ["microbatch_tokens is 8192", "8193", "ptx.max_tokens"],
        ),
        (dict(critic__warmup_steps=100), ["critic.warmup_steps is 100", "steps 100"]),
        (dict(optim__warmup_steps=401), ["optim.warmup_steps is 401", "400 updates"]),
        (dict(optim__warmup_steps=361, critic__warmup_steps=10), ["optim.warmup_steps is 361", "360 updates"]),
        (dict(track__profile_steps=(1, 101)), ["profile_steps", "101", "1 to 100"]),
        (dict(track__profile_steps=(0,)), ["profile_steps", "step 0"]),
        (dict(zero__stage=0), ["zero.stage is 0", "bf16", "zero.stage to 1", "fp32"]),
        (
            dict(zero__stage=0, optim__dtype="fp32", zero__offload="cpu"),
            ["zero.offload is cpu and zero.stage 0", "stage 1"],
        ),
        (dict(zero__stage=2, zero__offload="nvme"), ["zero.offload is nvme and zero.stage 2", "stage to 3", "cpu"]),
        (dict(zero__offload_optimizer="nvme"), ["zero.offload_optimizer is nvme and zero.stage 1"]),
        (dict(zero__stage=2, zero__offload_parameters="cpu"), ["zero.offload_parameters is cpu and zero.stage 2"]),
        (dict(zero__offload_frozen="cpu"), ["zero.offload_frozen is cpu and zero.stage 1", "Set zero.stage to 3"]),
        (dict(zero__stage=3, zero__offload="nvme"), ["zero.offload_frozen is nvme", "zero.nvme_path is not set"]),
        (dict(zero__stage=3, zero__offload_frozen="nvme"), ["zero.offload_frozen", "zero.nvme_path is not set"]),
        (dict(optim__betas=(0.9, 1.0)), ["optim.betas is [0.9, 1.0]", "less than 1"]),
    ],
)
def test_settings_that_cannot_work_are_refused_with_a_reason(settings, words):
    with pytest.raises(ConfigError) as error:
        validate(changed(**settings))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        dict(ppo__kl_in="loss", ppo__kl_kind="exact", ppo__kl_target=6.0),
        dict(ppo__kl_target=0.1, ppo__kl_horizon=103.0),
        dict(sampling__samples_per_prompt=8, ppo__minibatches=4),
        dict(sampling__samples_per_prompt=2, sampling__until_informative=2, ppo__estimator="grpo"),
        dict(sampling__samples_per_prompt=2, sampling__until_informative=2, ppo__estimator="mine.py:f"),
        dict(rollout__partial_tokens=127, ppo__importance="none"),
        dict(AHEAD, rollout__partial_tokens=3, ppo__importance_high=3.0),
        dict(ppo__steps_ahead=1, rewards=(RewardConfig(model="m"),), health__judge=(RewardConfig(function="f:f"),)),
        dict(rollout__partial_tokens=1, ppo__importance_high=3.0),
        dict(ppo__microbatch_tokens=640),
        dict(data__limit=65),
        dict(data__limit=64, data__eval_path="e"),
        dict(data__eval_split="test", data__eval_path="e"),
        dict(eval__prompts=0),
        dict(critic__kind="shared", critic__lr=1e-3, critic__warmup_steps=99),
        dict(steps=0, critic__warmup_steps=5),
        dict(critic__gguf_file="g", critic__model="m"),
        dict(actor__train="*.mlp.*,*.norm.*"),
        dict(rewards=(RewardConfig(model="m", weight=0.0), RewardConfig(pattern="a", weight=1e-9))),
        dict(rewards=(RewardConfig(math="answer", time_limit=0.1),)),
        dict(rewards=(RewardConfig(model="m", weight=-0.5), RewardConfig(function="dir/file.py:f"))),
        dict(ppo__value_clip=None, ppo__dual_clip=3.0, ppo__score_clip=5.0),
        dict(ppo__importance_high=3.0, sampling__top_k=5),
        dict(ppo__importance="icepop", ppo__importance_low=0.1, ppo__importance_high=9.0),
        dict(track__profile_steps=(1, 100)),
        dict(optim__warmup_steps=400),
        dict(ptx__coef=0.1, ptx__path="t.jsonl", ptx__max_tokens=8192, ptx__batch_size=1),
        dict(zero__stage=0, optim__dtype="fp32"),
        dict(zero__stage=1, zero__offload="cpu", zero__offload_parameters="none"),
        dict(zero__stage=3, zero__offload="cpu", zero__offload_frozen="none"),
        dict(zero__stage=3, zero__offload="nvme", zero__nvme_path="/nvme"),
        dict(sampling__ignore_eos=True),
        dict(sampling__rows="auto"),
        dict(steps=0),
        dict(actor__lora__rank=8, actor__lora__export="adapters", actor__train=8, critic__lora__rank=4),
        dict(critic__kind="shared", actor__lora__rank=8),
        dict(health__alarms=(ROLL_BACK,)),
        dict(health__alarms=(ROLL_BACK,), checkpoint__every=1, checkpoint__keep_last=4),
        dict(health__alarms=(AlarmConfig("entropy"), AlarmConfig("approx_kl", 0.1, "stop_epoch"))),
        dict(health__alarms=(AlarmConfig("judge_gap", 1.0, "stop"),), health__judge=(RewardConfig(model="m"),)),
        dict(health__alarms=(AlarmConfig("entropy", 0.5, "stop"),), checkpoint__every=0),
    ],
)
def test_settings_at_the_edge_of_a_rule_are_allowed(settings):
    validate(changed(**settings))


@pytest.mark.parametrize(
    ("settings", "importance"),
    [
        ({}, ("none", 0.5, 5.0)),
        (dict(sampling__min_new_tokens=8), ("none", 0.5, 5.0)),
        (dict(sampling__top_p=0.99), ("token", 0.0, 2.0)),
        (dict(sampling__top_k=1000), ("token", 0.0, 2.0)),
        (dict(rollout__engine="mine.py:Mine"), ("token", 0.0, 2.0)),
        (dict(rollout__engine="vllm"), ("token", 0.0, 2.0)),
        (AHEAD, ("token", 0.0, 2.0)),
        (dict(sampling__top_k=5, ppo__importance="none"), ("none", 0.5, 5.0)),
        (dict(sampling__top_k=5, ppo__importance_high=4.0), ("token", 0.0, 4.0)),
        (dict(ppo__importance="icepop", ppo__importance_low=0.1), ("icepop", 0.1, 5.0)),
        (dict(ppo__importance="sequence", ppo__importance_high=1.5), ("sequence", 0.8, 1.5)),
    ],
)
def test_tokens_are_weighted_by_default_where_the_sampler_is_not_the_trainer(settings, importance):
    assert changed(**settings).importance == importance


VLLM = dict(rollout__engine="vllm")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(rollout__vllm=VllmConfig(gpu_memory_utilization=0.4)), ["gpu_memory_utilization is 0.4", "inprocess"]),
        (dict(rollout__vllm=VllmConfig(2)), ["vllm.tensor_parallel_size is 2", "engine inprocess", "to vllm"]),
        (dict(rollout__vllm=VllmConfig(arguments={"a": 1})), ["rollout.vllm.arguments is {'a': 1}", "no effect"]),
        (
            VLLM | dict(rollout__vllm=VllmConfig(3)),
            ["tensor_parallel_size is 3", "4 rank(s)", "1 or 2 or 4", "multiple of 3"],
        ),
        (
            VLLM | dict(rollout__vllm=VllmConfig(8)),
            ["tensor_parallel_size is 8", "4 rank(s)", "1 or 2 or 4", "multiple of 8 ranks", "--gpus"],
        ),
        (VLLM | dict(rollout__vllm=VllmConfig(0)), ["tensor_parallel_size is 0"]),
        (VLLM | dict(rollout__vllm=VllmConfig(gpu_memory_utilization=0.0)), ["utilization is 0.0", "at most 1"]),
        (VLLM | dict(rollout__vllm=VllmConfig(gpu_memory_utilization=1.1)), ["utilization is 1.1", "at most 1"]),
        (VLLM | dict(rollout__vllm=VllmConfig(gpu_memory_utilization=math.nan)), ["utilization is nan"]),
        (VLLM | dict(sampling__temperature=0.005), ["sampling.temperature is 0.005", "0.01 to 2", "inprocess"]),
        (VLLM | dict(eval__temperature=2.5), ["eval.temperature is 2.5", "0.01 to 2", "inprocess"]),
    ],
)
def test_what_vllm_cannot_have_is_refused_with_the_way_out(settings, words):
    config = changed(**settings)
    with pytest.raises(ConfigError) as error:
        validate(config, ranks=4)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_groups_of_ranks_for_vllm_make_up_all_of_them(size):
    validate(changed(**VLLM, rollout__vllm=VllmConfig(size, 1.0, {"max_num_seqs": 4})), ranks=4)


TALK = dict(rollout__environment="talk.py:talk", sampling__min_new_tokens=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(rollout__max_turns=9), ["rollout.max_turns is 9", "rollout.environment is not set", "no effect"]),
        (dict(rollout__turn_tokens=9), ["rollout.turn_tokens is 9", "no effect", "leave out"]),
        (dict(rollout__time_limit=9.0), ["rollout.time_limit is 9.0", "no effect"]),
        (dict(rollout__concurrency=9), ["rollout.concurrency is 9", "no effect"]),
        (TALK | dict(rollout__engine="mine.py:Mine"), ["is talk.py:talk", "mine.py:Mine", "inprocess or vllm"]),
        (
            TALK | dict(rollout__turn_tokens=9, sampling__max_new_tokens=8),
            ["rollout.turn_tokens is 9", "sampling.max_new_tokens 8", "Raise max_new_tokens"],
        ),
        (TALK | dict(sampling__min_new_tokens=2), ["sampling.min_new_tokens is 2", "several turns", "to 0"]),
        (TALK | dict(sampling__ignore_eos=True), ["sampling.ignore_eos is true", "Set rollout.turn_tokens"]),
        (TALK | dict(rollout__turn_tokens=0), ["rollout.turn_tokens is 0", "1 or more"]),
        (TALK | dict(rollout__concurrency=1001), ["rollout.concurrency is 1001", "1 to 1000"]),
        (
            TALK | dict(rollout__max_turns=30, rollout__time_limit=60.0, timeout=1800.0),
            ["max_turns is 30", "time_limit 60", "1800 s", "timeout = 1800 s"],
        ),
    ],
)
def test_what_conversations_cannot_have_is_refused_with_the_way_out(settings, words):
    with pytest.raises(ConfigError) as error:
        validate(changed(**settings), ranks=2)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        dict(rollout__turn_tokens=8, sampling__max_new_tokens=8, rollout__max_turns=1, rollout__concurrency=1000),
        dict(rollout__turn_tokens=8, sampling__ignore_eos=True),
        dict(rollout__engine="vllm", rollout__time_limit=0.1),
        dict(rollout__max_turns=29, timeout=1741.0),
    ],
)
def test_settings_of_conversations_at_the_edge_of_a_rule_are_allowed(settings):
    validate(changed(**TALK, **settings), ranks=2)


def test_each_minibatch_needs_a_response_for_each_rank():
    config = changed(ppo__batch_size=8, ppo__minibatches=2)
    validate(config, ranks=4)
    with pytest.raises(
        ConfigError,
        match=r"minibatch of 4 responses cannot be divided equally among 5 ranks.* multiple of 10.* start 4 rank\(s\)",
    ):
        validate(config, ranks=5)


def test_the_tries_of_a_request_take_no_longer_than_other_ranks_wait():
    judge = (RewardConfig(url="http://a", timeout=9.0, retries=2),)  # 3 tries, and pauses of 0.5 and 1 s
    config = changed(health__judge=judge, timeout=28.5)
    validate(config)
    validate(changed(health__judge=judge, timeout=29.0), ranks=2)
    with pytest.raises(ConfigError, match=r"health.judge\[0\].timeout is 9 .*retries 2: .* 28.5 s .* timeout = 28.5"):
        validate(config, ranks=2)


def test_a_batch_of_answers_that_all_take_their_limit_takes_no_longer_than_other_ranks_wait():
    source = (RewardConfig(math="answer", time_limit=10.0),)  # 512 responses: 64 for each of 4 processes of 2 ranks
    for settings, ranks in ((dict(timeout=640.0), 1), (dict(timeout=641.0), 2), (dict(timeout=1281.0, threads=2), 2)):
        validate(changed(rewards=source, **settings), ranks)
    for settings in (dict(timeout=640.0), dict(timeout=1280.0, threads=2), dict(timeout=2560.0, threads=1)):
        with pytest.raises(
            ConfigError, match=r"rewards\[0\].time_limit is 10: .* wait only timeout = .* lower time_limit"
        ):
            validate(changed(rewards=source, **settings), ranks=2)


def test_each_rank_takes_as_many_texts():
    config = changed(ptx__coef=0.1, ptx__path="t.jsonl", ptx__batch_size=6, ppo__batch_size=12)
    validate(config, ranks=3)
    with pytest.raises(
        ConfigError, match=r"ptx.batch_size is 6 and there are 4 ranks.* multiple of 4, or start 3 rank\(s\)"
    ):
        validate(config, ranks=4)


def numbers(kind: Any, prefix: str = "") -> list[str]:
    """Dotted names of all settings that are a number, of one dataclass and those in it."""
    names, hints = [], get_type_hints(kind)
    for name, hint in ((field.name, hints[field.name]) for field in dataclasses.fields(kind)):
        if dataclasses.is_dataclass(hint):
            names += numbers(hint, f"{prefix}{name}.")
        elif {int, float} & {hint, *get_args(hint)} and str not in get_args(hint) and "tuple" not in str(hint):
            names.append(prefix + name)
    return names


def test_every_number_has_a_range():
    ranged = [name for _, _, names in (*ONLINE_RANGES, *RANGES) for name in names.split()]
    chosen_from_a_list = ["zero.stage"]
    assert len(numbers(Config)) > 40
    assert sorted(ranged + chosen_from_a_list) == sorted({*numbers(Config), *chosen_from_a_list})


@pytest.mark.parametrize("name", numbers(Config))
def test_a_number_out_of_its_range_is_named_with_its_value(name):
    for value in (float("nan"),) if name == "ppo.nll_above" else (-1, float("nan")):
        with pytest.raises(ConfigError, match=rf"{name} is {value}; it must be "):
            validate(changed(**{name.replace(".", "__"): value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sampling.temperature", 0.0),
        ("sampling.temperature", float("inf")),
        ("sampling.top_p", 0.0),
        ("sampling.top_p", 1.01),
        ("ppo.gamma", 1.01),
        ("ppo.lam", 1.01),
        ("ppo.lam_critic", -0.1),
        ("ppo.lam_alpha", 0.0),
        ("ppo.clip_low", 0.0),
        ("ppo.clip_low", 1.0),
        ("ppo.clip_high", 0.0),
        ("ppo.dual_clip", 1.0),
        ("ppo.importance_low", 0.0),
        ("ppo.importance_low", 1.0),
        ("ppo.importance_high", 1.0),
        ("ppo.importance_high", float("inf")),
        ("ppo.kl_target", 0.0),
        ("ppo.batch_size", 0),
        ("actor.lr", float("inf")),
    ],
)
def test_the_ends_of_a_range_are_where_they_should_be(name, value):
    assert attrgetter(name)(GOOD) != value
    with pytest.raises(ConfigError, match=rf"{name} is {value}; it must be "):
        validate(changed(**{name.replace(".", "__"): value}))


def test_weights_and_biases_without_its_package_is_refused(monkeypatch):
    asked = changed(track__wandb="films")
    monkeypatch.setattr("fastppo.config.validation.run.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"track\.wandb is films, .*`pip install wandb`"):
        validate(asked)
    monkeypatch.setattr("fastppo.config.validation.run.find_spec", lambda name: name)
    validate(asked)


def test_an_environment_may_be_the_only_source_of_reward():
    validate(changed(rewards=(), rollout__environment="m:f"))
