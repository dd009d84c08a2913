"""The engine `vllm` with a stand-in for vLLM: what it asks, sends and refuses. `test_vllm.py` is with vLLM itself."""

from __future__ import annotations

import gc
import json
import os
import random
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import generated
import pytest
import tiny
import torch
import vllm_stand_in
import whole_runs
from ppo_step import config_of, roles_of
from transformers import AutoConfig

from fastppo import generate
from fastppo.config.command_line import GENERATE, parse
from fastppo.data.batch import Prompts
from fastppo.distributed import Neighbours, Stopped, stop
from fastppo.distributed.world import start_world
from fastppo.models import token_stats
from fastppo.rollout import SamplerError, check_sampled_model, find_engine, make_sampler
from fastppo.rollout.sampler import ActorSampler
from fastppo.rollout.vllm.drawing import STEPS, Request, request_seed
from fastppo.train import train

PROMPTS = Prompts.of([(5, 6, 7, 8), (9, 10, 11), (20,)], [0, 1, 2], samples=2, first=7)
VLLM = ["--rollout.engine", "vllm"]


@pytest.fixture
def world():
    return start_world(1)


@pytest.fixture
def vllm(monkeypatch, tmp_path):
    threads = torch.set_num_threads
    monkeypatch.setattr("fastppo.rollout.vllm.start.leave_without_cleanup", lambda: None)
    yield vllm_stand_in.install(monkeypatch, tmp_path / "cache")
    assert torch.set_num_threads is threads


@pytest.fixture
def made(world, tmp_path):
    """Roles and their sampler, with further settings."""

    def made(*settings: str, **shape: Any) -> tuple[Any, ActorSampler]:
        config = config_of(tiny.saved(tmp_path / "model", tiny.causal(**shape)), *VLLM, *settings)
        find_engine(config)
        roles = roles_of(config, world)
        return roles, make_sampler(config, roles, world)

    return made


def requests(vllm: Any) -> list[Any]:
    return [event for event in vllm.events if event[0] == "request"]


# What is drawn


def update(roles: Any) -> None:
    with torch.no_grad():
        for parameter in roles.policy.parameters():
            parameter.mul_(1.1)
    roles.actor.version += 1


@pytest.mark.parametrize("lora", ["0", "4"])
def test_logprobs_are_the_trainers_after_each_sync_and_not_without(vllm, made, lora):
    roles, sampler = made("--actor.lora.rank", lora)

    def difference(rollout: Any) -> float:
        with torch.no_grad():
            stats = roles.policy(rollout.packed, partial(token_stats, rollout.packed.responses, 1.0))
        return float((stats.logprobs - rollout.logprobs).abs().max())

    for _ in range(2):
        sampler.sync()
        rollout = sampler.sample(PROMPTS)
        assert difference(rollout) < 1e-5
        update(roles)
        assert difference(rollout) > 1e-2


def test_a_request_has_a_seed_of_seed_and_stream_alone_and_what_was_computed_before_is_forgotten(vllm, made):
    _, sampler = made("--seed", "3")
    sampler.sync()
    sampler.sample(PROMPTS)
    sampler.sample(PROMPTS.select([5, 0]), temperature=0.5, seed=77)
    seeds = [params.seed for _, _, params in requests(vllm)]
    assert seeds == [request_seed(3, stream) for stream in range(14, 20)] + [request_seed(77, i) for i in (19, 14)]
    assert [params.temperature for _, _, params in requests(vllm)] == [1.0] * 6 + [0.5] * 2
    assert [event for event in vllm.events if event in ("load", "reset")] == ["load", "reset", "reset"]


def test_seeds_fit_and_differ():
    seeds = {request_seed(seed, stream) for seed in range(40) for stream in range(1000)}
    assert len(seeds) == 40_000 and all(0 <= seed < 2**63 for seed in seeds) and max(seeds) > 2**62


def test_the_settings_of_sampling_are_those_of_each_request(vllm, made):
    settings = {"top_k": 5, "top_p": 0.9, "max_new_tokens": 7, "min_new_tokens": 2, "stop_tokens": '["a", "b"]'}
    _, sampler = made(*[x for k, v in settings.items() for x in (f"--sampling.{k}", str(v))])
    sampler.sync()
    rollout = sampler.sample(PROMPTS)
    params = requests(vllm)[0][2]
    ids = sorted({0, *tiny.tokenizer().convert_tokens_to_ids(["a", "b"])})
    assert (params.top_k, params.top_p, params.max_tokens, params.min_tokens) == (5, 0.9, 7, 2)
    assert params.stop_token_ids == ids and params.ignore_eos and params.logprobs == 0 and not params.detokenize
    lengths = rollout.packed.response_lengths
    assert (
        rollout.ended.tolist()
        == torch.isin(rollout.packed.responses[lengths.cumsum(0) - 1], torch.tensor(ids)).tolist()
    )


def test_a_stop_token_at_the_last_place_has_ended_the_response(vllm, made):
    """Half of the vocabulary stops, after one token that may not: some do at the second place, which is the last."""
    stops = [tiny.tokenizer().convert_ids_to_tokens(i) for i in range(1, 257, 2)]
    short = {"max_new_tokens": 2, "min_new_tokens": 1, "stop_tokens": json.dumps(stops)}
    _, sampler = made(*[x for k, v in short.items() for x in (f"--sampling.{k}", str(v))])
    sampler.sync()
    rollout = sampler.sample(PROMPTS)
    first, last = rollout.packed.responses.view(-1, 2).T
    assert rollout.ended.tolist() == [int(x) in sampler.stop_ids for x in last] and rollout.ended.any()
    assert not {*first.tolist()} & {*sampler.stop_ids} and not rollout.ended.all()


# Ranks that sample together


class Beside(Neighbours):
    """Two ranks in one: what the other asks for is given."""

    def __init__(self, index: int, other: Any):
        super().__init__(index, 2)
        object.__setattr__(self, "other", other)

    def gather(self, part: Any) -> list[Any]:
        return [part, self.other] if self.index == 0 else [self.other, part]

    def any(self, flag: bool) -> bool:
        return flag


def asked(prompts: Prompts) -> list[Any]:
    return [
        Request(tokens, stream, 10) for tokens, stream in zip(prompts.tokens, prompts.streams.tolist(), strict=True)
    ]


@pytest.mark.parametrize("split", [0, 2, 6])
def test_ranks_that_hold_one_copy_ask_the_same_and_keep_their_own(vllm, made, split):
    """Also one without prompts, which takes part all the same."""
    _, sampler = made()
    sampler.sync()
    whole = sampler.sample(PROMPTS)
    parts = [PROMPTS.select(range(split)), PROMPTS.select(range(split, 6))]
    drawn, heard = [], []
    for index in (0, 1):
        vllm.events.clear()
        sampler._engine._together = Beside(index, asked(parts[1 - index]))
        drawn.append(sampler.sample(parts[index]))
        heard.append(requests(vllm))
    assert heard[0] == heard[1] and len(heard[0]) == 6
    assert torch.cat([part.packed.tokens for part in drawn]).equal(whole.packed.tokens)
    assert torch.cat([part.logprobs for part in drawn]).equal(whole.logprobs)


def test_neighbours_gather_and_agree_among_themselves(forks, tmp_path):
    forks.run([str(tmp_path / "out"), "2"], ranks=4, module="neighbour_ranks")
    found = [json.loads((tmp_path / f"out-{rank}.json").read_text()) for rank in range(4)]
    assert [f["index"] for f in found] == [0, 1, 0, 1]
    assert [f["gathered"] for f in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [f["any of rank 3"] for f in found] == [False, False, True, True]


# Stopping


def test_a_rank_that_samples_alone_stops_between_two_tokens(vllm, made, monkeypatch):
    _, sampler = made("--sampling.ignore_eos", "true")
    sampler.sync()
    calls = iter(range(100))

    def check() -> None:
        if next(calls) == 4:
            raise Stopped

    monkeypatch.setattr(stop, "check_alone", check)
    with pytest.raises(Stopped):
        sampler.sample(PROMPTS)
    assert vllm.events[-1] == ("abort", 6) and not sampler._engine._llm.llm_engine.running


def test_ranks_that_sample_together_agree_to_stop_every_few_tokens(vllm, made, monkeypatch):
    _, sampler = made("--sampling.ignore_eos", "true", "--sampling.max_new_tokens", "20")
    sampler.sync()
    engine = sampler._engine._llm.llm_engine
    at = []
    sampler._engine._together = Beside(0, [])
    monkeypatch.setattr(stop, "check_alone", lambda: pytest.fail("one of them alone"))
    monkeypatch.setattr(stop, "check_among", lambda _: at.append(len(engine.running["0"].drawn)))
    sampler.sample(PROMPTS)
    assert at[0] == 0 and all(b - a == STEPS for a, b in pairwise(at)) and len(at) == 3


# The engine, and the process that it is in


def test_it_is_made_from_the_config_alone_and_found_again_by_it(vllm, made, tmp_path):
    made("--rollout.vllm.arguments", "{max_num_seqs: 3}", "--rollout.vllm.gpu_memory_utilization", "0.25")
    given = dict(vllm.arguments)
    folder = Path(given.pop("model"))
    assert [path.name for path in folder.iterdir()] == ["config.json"] and folder.parent == tmp_path / "cache/fastppo"
    assert given == {
        "tensor_parallel_size": 1,
        "enforce_eager": True,  # on the CPU
        "max_num_seqs": 3,
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "model_impl": "vllm",
        "dtype": "float32",
        "max_model_len": 16 + 10,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "gpu_memory_utilization": 0.25,
        "distributed_executor_backend": "external_launcher",
        "enable_sleep_mode": False,
    }
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 257
    made()
    assert Path(vllm.arguments["model"]) == folder
    made(num_hidden_layers=2)
    assert Path(vllm.arguments["model"]) != folder


def test_its_config_asks_for_no_code_and_no_quantisation(vllm, world, tmp_path):
    """Weights that were unpacked as they were loaded arrive plain."""
    config = config_of(tiny.saved(tmp_path / "model", tiny.causal()), *VLLM)
    roles = roles_of(config, world)
    own = roles.policy.model.config
    own.auto_map, own.architectures = {"AutoConfig": "code.Config"}, ["OfTheCheckpoint"]
    own.quantization_config = {"quant_method": "fp8"}
    make_sampler(config, roles, world)
    written = json.loads((Path(vllm.arguments["model"]) / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"] and written["hidden_size"] == tiny.WIDTH
    assert "auto_map" not in written and "quantization_config" not in written


def test_the_ranks_of_a_machine_share_its_memory(vllm, made, monkeypatch):
    monkeypatch.setenv("LOCAL_SIZE", "4")
    made()
    assert vllm.arguments["gpu_memory_utilization"] == 0.125


@pytest.mark.parametrize("fails", [False, True])
def test_its_process_is_as_it_was(vllm, made, fails):
    def state() -> list[Any]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
        return [random.getstate(), torch.get_num_threads(), environment]

    vllm.refuses = ValueError("no") if fails else None
    before, drawn = state(), []
    for make in (lambda: None, lambda: made() and None):
        torch.manual_seed(5)
        random.seed(5)
        if fails and drawn:
            with pytest.raises(SamplerError):
                make()
        elif drawn:
            make()
        drawn.append((random.random(), state()[1:]))
    assert drawn[0] == drawn[1] and state()[1:] == before[1:]


def test_an_engine_that_is_collected_leaves_the_groups_of_the_run_alone(vllm, made):
    made()
    gc.collect()
    assert vllm.events == []


def test_an_engine_sleeps_from_the_start_and_takes_its_cache_when_it_has_weights(vllm, world, tmp_path, monkeypatch):
    whole_runs.move_on_the_cpu_too(monkeypatch)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: vllm.events.append("memory given back"))
    folder = whole_runs.prepare(tmp_path)
    settings = {"rollout__engine": "vllm", "optim__dtype": "fp32", "checkpoint__every": 0, "eval__every": 1}
    train(parse(whole_runs.settings(folder, folder / "out", **settings, steps=2)), world)
    told = [event for event in vllm.events if event[0] != "request"]
    once = ["memory given back", ("wake", "weights"), "load", ("wake", "kv_cache"), "reset", ("sleep", 2)]
    assert told == ["memory given back", ("sleep", 2), *once * 5]
    errors = [r["sampler_error_max"] for r in whole_runs.records(folder / "out") if "sampler_error_max" in r]
    assert len(errors) == 2 and max(errors) < 1e-5


# What cannot be


def test_without_vllm_the_error_comes_first_and_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SamplerError, match=r"rollout.engine is vllm, and .*pip install 'fastppo\[vllm\]'.*inprocess"):
        find_engine(config_of("none", *VLLM))


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0.0", "0.320.0"])
def test_another_version_than_those_that_were_tried_is_refused(monkeypatch, tmp_path, version):
    vllm_stand_in.install(monkeypatch, tmp_path, version=version)
    with pytest.raises(SamplerError, match=rf"vllm {version} is installed; fastppo was tested with 0.32"):
        find_engine(config_of("none", *VLLM))


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("max_num_seq", r"has max_num_seq, which vllm.LLM 0.32.1 does not. Did you mean max_num_seqs\?"),
        ("zzz", r"has zzz, which vllm.LLM 0.32.1 does not. Leave it out"),
        ("dtype", "has dtype, which fastppo sets: that of the weights. Leave it out"),
        (
            "tensor_parallel_size",
            "has tensor_parallel_size, which fastppo sets: rollout.vllm.tensor_parallel_size decides",
        ),
        ("model_impl", "has model_impl, which fastppo sets: vLLM's own"),
    ],
)
def test_arguments_that_vllm_or_the_user_does_not_have_are_refused(vllm, argument, words):
    with pytest.raises(SamplerError, match=f"rollout.vllm.arguments {words}"):
        find_engine(config_of("none", *VLLM, "--rollout.vllm.arguments", f"{{{argument}: 1}}"))


def test_a_model_that_vllm_does_not_have_or_would_run_with_the_trainers_classes_is_refused(vllm):
    config = config_of("none", *VLLM)
    check_sampled_model(config, AutoConfig.for_model("llama"))
    with pytest.raises(SamplerError, match="has no XGLMForCausalLM, the architecture of the model"):
        check_sampled_model(config, AutoConfig.for_model("xglm"))
    with pytest.raises(SamplerError, match="has no class of its own for GPTNeoXForCausalLM"):
        check_sampled_model(config, AutoConfig.for_model("gpt_neox"))
    check_sampled_model(config_of("none"), AutoConfig.for_model("xglm"))


@pytest.mark.parametrize("command", ["train", "generate"])
def test_it_is_refused_before_weights_are_read(vllm, world, tmp_path, monkeypatch, command):
    monkeypatch.setattr("fastppo.models.loading.weights._load_whole", lambda *_: pytest.fail("weights are read"))
    folder = generated.prepare(whole_runs.prepare(tmp_path))
    tiny.saved(folder / "model", tiny.causal("gpt_neox"))
    change = {"rollout__engine": "vllm"}
    if command == "train":
        run = partial(train, parse(whole_runs.settings(folder, folder / "out", **change)))
    else:
        run = partial(generate.generate, parse(generated.settings(folder, folder / "out", **change), GENERATE))
    with pytest.raises(SamplerError, match="GPTNeoXForCausalLM"):
        run(world)


REFUSALS = {
    "lower": (
        ValueError("Free memory on device (3/80 GiB) on startup is less than desired GPU memory utilization (0.9)"),
        r"could not take its memory \(rollout.vllm.gpu_memory_utilization = 0.9\): Free memory .* Lower it",
    ),
    "out of memory": (
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        "utilization = 0.9.*out of memory.*Lower it",
    ),
    "raise": (ValueError("No available memory for the cache blocks."), "utilization = 0.9.*Raise it"),
    "other": (ValueError("max_num_seqs must be\n a number"), "arguments .*ValueError: max_num_seqs must be a number"),
}


@pytest.mark.parametrize(("error", "words"), REFUSALS.values(), ids=REFUSALS)
def test_what_vllm_refuses_is_an_error_that_names_the_setting(vllm, made, error, words):
    vllm.refuses = error
    with pytest.raises(SamplerError, match=words):
        made("--rollout.vllm.gpu_memory_utilization", "0.9", "--rollout.vllm.arguments", "{max_num_seqs: 2}")


def test_the_end_of_another_rank_is_not_taken_for_a_fault_of_vllms(vllm, made):
    vllm.refuses = RuntimeError("Connection closed by peer [127.0.0.1]:1")
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        made()


def test_a_cache_that_cannot_be_written_is_an_error_that_names_it(vllm, made, tmp_path):
    (tmp_path / "file").touch()
    vllm.envs.VLLM_CACHE_ROOT = str(tmp_path / "file")
    with pytest.raises(SamplerError, match=r"nothing can be written to its cache .*VLLM_CACHE_ROOT"):
        made()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda name, x: None if "norm.weight" in name else (name, x), "has weights .*: model.layers.* and 4 more"),
        (lambda name, x: (f"{name}s", x), "does not take the actor's weights: ValueError: There is no module"),
        (
            lambda name, x: (name, x[:-1]),
            "does not take the actor's weights: AssertionError: lm_head.weight of .256, 32.",
        ),
    ],
)
def test_weights_that_do_not_match_are_an_error(vllm, made, change, words):
    roles, sampler = made()
    sent = [change(name, x) for name, x in roles.sampling_weights.stream()]
    sampler._engine._weights = SimpleNamespace(stream=lambda: iter([x for x in sent if x is not None]))
    with pytest.raises(SamplerError, match=f"vLLM 0.32.1 {words}.*inprocess"):
        sampler.sync()


def test_what_vllm_cannot_compute_shows_at_the_first_response_and_is_an_error(vllm, made, monkeypatch):
    _, sampler = made()
    sampler.sync()

    def step() -> None:
        raise NotImplementedError("Head size 8 is not supported by CPU_ATTN")

    monkeypatch.setattr(sampler._engine._llm.llm_engine, "step", step)
    words = r"vLLM 0.32.1 cannot compute this model's responses: NotImplementedError: Head size 8.*inprocess"
    with pytest.raises(SamplerError, match=words):
        sampler.sample(Prompts.of([(5, 6)], [0]))
