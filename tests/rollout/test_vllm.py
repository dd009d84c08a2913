"""vLLM itself, on the CPU, beside the trainer: `make vllm` runs these in an environment that has it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import vllm_ranks
from ppo_step import config_of, roles_of
from transformers import AutoConfig
from vllm_ranks import PROMPTS, SMALL

from fastppo.data.batch import Prompts, Rollout
from fastppo.distributed.world import start_world
from fastppo.models import Roles
from fastppo.ops.eager import restrict
from fastppo.rollout import SamplerError, check_sampled_model, find_engine, make_sampler
from fastppo.rollout.sampler import ActorSampler

pytest.importorskip("vllm", reason="vLLM is not installed here; `make vllm` makes an environment with it")

CASES = {
    f"stage {stage}, {'LoRA' if rank else 'full'}, {dtype}": [
        *("--zero.stage", str(stage), "--actor.lora.rank", str(rank), "--optim.dtype", dtype)
    ]
    for stage, rank, dtype in ((0, 0, "fp32"), (0, 4, "fp32"), (3, 0, "fp32"), (3, 4, "fp32"), (3, 0, "bf16"))
}


# Its logprobs are the trainer's


@pytest.fixture(scope="module")
def walks(forks, tmp_path_factory):
    """What each rank found: (ranks, tensor_parallel_size) -> case -> of each rank."""
    folder = tmp_path_factory.mktemp("vllm")
    model, known = vllm_ranks.saved(folder / "model"), {}

    def walks(ranks: int, size: int) -> dict[str, list[dict[str, Any]]]:
        if (ranks, size) not in known:
            out = folder / f"{ranks}-{size}"
            forks.run([model, str(out), str(size), json.dumps([*CASES.values()])], ranks, module="vllm_ranks")
            of_ranks = [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(ranks)]
            known[ranks, size] = dict(zip(CASES, zip(*of_ranks, strict=True), strict=True))
        return known[ranks, size]

    return walks


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("ranks", "size"), [(1, 1), (2, 1), (2, 2)])
def test_after_each_update_its_logprobs_are_the_trainers_and_without_a_sync_they_are_not(walks, ranks, size, case):
    """Two ranks that hold one copy together have prompts on the first alone."""
    of_ranks = walks(ranks, size)[case]
    assert sum(found["responses"] for found in of_ranks) == (len(PROMPTS) if size == 1 else len(PROMPTS) // 2)
    for found in (found for found in of_ranks if found["responses"]):
        assert len(found["fresh"]) == 3 and len(found["stale"]) == 2
        if "fp32" in case:
            assert max(largest for largest, _ in found["fresh"]) < 1e-5
        else:
            assert max(mean for _, mean in found["fresh"]) < 0.05
        assert min(mean for _, mean in found["stale"]) > 0.1


def test_the_same_seed_draws_the_same_tokens_and_another_others_on_ranks_as_on_one(walks):
    for ranks, size in ((1, 1), (2, 1), (2, 2)):
        for of_ranks in walks(ranks, size).values():
            assert all(found["again"] for found in of_ranks)
            assert any(found["other seed"] and found["samples differ"] for found in of_ranks)


# Settings mean what they mean in process


@pytest.fixture(scope="module")
def world():
    return start_world(1)


def sampler_of(world, model: str, *settings: str) -> tuple[Roles, ActorSampler]:
    config = config_of(model, *SMALL, *settings)
    find_engine(config)
    roles = roles_of(config, world)
    return roles, make_sampler(config, roles, world)


def drawn(sampler: ActorSampler, **settings: Any) -> Rollout:
    sampler.sync()
    return sampler.sample(PROMPTS, **settings)


def restricted(roles: Roles, rollout: Rollout, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Logprobs of the response tokens under the distribution that the in-process engine would draw them from."""
    packed = rollout.packed
    with torch.no_grad():
        logits = roles.policy(packed, lambda policy, hidden: policy.head(hidden))
    kept = restrict(logits, temperature, top_k, top_p) / temperature
    return kept.log_softmax(-1).gather(1, packed.responses[:, None])[:, 0]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 3, 1.0), (1.3, 0, 0.6), (1.0, 20, 0.8)]
)
def test_logprobs_are_those_of_the_distribution_that_tokens_are_drawn_from(world, tmp_path, temperature, top_k, top_p):
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    model = vllm_ranks.saved(tmp_path)
    roles, sampler = sampler_of(world, model, *[x for k, v in settings.items() for x in (f"--sampling.{k}", str(v))])
    rollout = drawn(sampler)
    torch.testing.assert_close(rollout.logprobs, restricted(roles, rollout, **settings), atol=1e-5, rtol=0)
    assert len(rollout.packed.responses) > 50


def test_a_stop_token_ends_a_response_and_is_part_of_it_and_comes_not_too_early(world, tmp_path):
    """Half of the vocabulary stops; in the data's own EOS, 0, there is nothing special."""
    stops = [tiny.tokenizer().convert_ids_to_tokens(i) for i in range(1, 257, 2)]
    few = ["--sampling.stop_tokens", json.dumps(stops), "--sampling.min_new_tokens", "3"]
    _, sampler = sampler_of(world, vllm_ranks.saved(tmp_path), *few)
    rollout, stop_ids = drawn(sampler), set(sampler.stop_ids)
    assert len(stop_ids) == 129
    responses = rollout.packed.responses.split(rollout.packed.response_lengths.tolist())
    for response, ended in zip((x.tolist() for x in responses), rollout.ended.tolist(), strict=True):
        assert not stop_ids & {*response[:3]} and not stop_ids & {*response[3:-1]}
        assert (response[-1] in stop_ids) == ended and len(response) >= 4
    assert rollout.ended.any()


def test_without_stop_tokens_every_response_has_all_its_tokens(world, tmp_path):
    _, sampler = sampler_of(world, vllm_ranks.saved(tmp_path), "--sampling.ignore_eos", "true")
    rollout = drawn(sampler, temperature=0.5, seed=4)
    assert rollout.packed.response_lengths.tolist() == [10] * len(PROMPTS) and not rollout.ended.any()


def test_a_response_is_as_likely_whatever_is_asked_with_it(world, tmp_path):
    """Its random numbers are those of seed and stream: among others it only rounds otherwise."""
    _, sampler = sampler_of(world, vllm_ranks.saved(tmp_path))
    together = drawn(sampler)
    alone = [sampler.sample(PROMPTS.select([i])) for i in range(len(PROMPTS))]
    assert torch.cat([one.packed.tokens for one in alone]).equal(together.packed.tokens)
    torch.testing.assert_close(torch.cat([one.logprobs for one in alone]), together.logprobs, atol=1e-5, rtol=0)


# Conversations


@pytest.mark.parametrize(("ranks", "size"), [(1, 1), (2, 2)])
def test_conversations_have_the_trainers_logprobs_and_the_environments_observations(forks, tmp_path, ranks, size):
    """Two ranks that hold one copy together talk to the environment each for its own prompts."""
    model, case = vllm_ranks.saved(tmp_path / "model"), vllm_ranks.talking(tmp_path)
    forks.run([model, str(tmp_path / "out"), str(size), json.dumps([case])], ranks, module="vllm_ranks")
    of_ranks = [json.loads((tmp_path / f"out-{rank}.json").read_text())[0] for rank in range(ranks)]
    assert sum(len(found["turns"]) for found in of_ranks) == len(PROMPTS)
    assert max(turns for found in of_ranks for turns in found["turns"]) > 2
    decode = tiny.tokenizer().decode
    for found in of_ranks:
        assert max(largest for largest, _ in found["fresh"]) < 1e-5 and max(found["behind"]) <= 30
        for tokens, written, behind, reward, said in zip(
            *(found[name] for name in ("tokens", "written", "behind", "rewards", "said")), strict=True
        ):
            pairs = list(zip(tokens, written, strict=True))[-behind:]
            observed = [message["content"] for message in said[1:] if message["role"] == "user"]
            assert decode([token for token, wrote in pairs if not wrote]) == "".join(observed)
            of_turns = [text.count("o") / 4 for text in observed]
            assert 0 <= reward - sum(of_turns) <= 5 / 4  # the last turn may have one too, whose observation is dropped


def test_the_prefix_cache_holds_a_conversation_up_to_its_newest_turn(world, tmp_path, monkeypatch):
    """In blocks of 32 tokens here; an observation has 6 at most, and no keys are kept of a turn's last token."""
    model, case = vllm_ranks.saved(tmp_path / "model"), vllm_ranks.talking(tmp_path)
    arguments = ["--rollout.vllm.arguments", "{kv_cache_memory_bytes: 33554432, block_size: 32}"]
    long = ["--data.max_prompt_tokens", "64", "--sampling.max_new_tokens", "60", "--rollout.turn_tokens", "20"]
    _, sampler = sampler_of(world, model, *case, *arguments, *long)
    engine: Any = sampler._engine
    llm_engine, cached = engine._llm.llm_engine, []
    step = llm_engine.step

    def noted() -> Any:
        outputs = step()
        cached.extend((len(o.prompt_token_ids), o.num_cached_tokens) for o in outputs if o.finished)
        return outputs

    monkeypatch.setattr(llm_engine, "step", noted)
    sampler.sync()
    rollout = sampler.sample(Prompts.of([range(40, 80)], [0] * 8))
    later = [(length, held) for length, held in cached if length > 40]
    assert len(later) == int((rollout.packed.turn_counts - 1).sum()) > 4
    assert all(held >= (length - 1 - 6) // 32 * 32 for length, held in later)
    assert any(held > 32 for _, held in later)


# Models


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 32, "sliding_window": 8},
    "gpt2": {"n_head": 2},
    "opt": {"word_embed_proj_dim": 64},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_every_form_arrive(world, tmp_path, family):
    """Tied ones, those that vLLM joins, and biases."""
    roles, sampler = sampler_of(world, vllm_ranks.saved(tmp_path, family=family, **FAMILIES[family]))
    for _ in range(2):
        largest, _ = vllm_ranks.difference(roles, drawn(sampler))
        assert largest < 1e-5, family
        vllm_ranks.update(roles)


def test_experts_that_a_checkpoint_has_one_by_one_arrive(forks, tmp_path):
    """In a process of its own: vLLM makes groups of ranks for experts with its first engine or not at all."""
    model = vllm_ranks.saved(tmp_path / "model", family="mixtral")
    forks.run([model, str(tmp_path / "out"), "1", json.dumps([["--zero.stage", "3"]])], module="vllm_ranks")
    found = json.loads((tmp_path / "out-0.json").read_text())[0]
    assert max(largest for largest, _ in found["fresh"]) < 1e-5 and min(mean for _, mean in found["stale"]) > 0.05


# What cannot be


def test_weights_that_vllm_has_no_place_for_or_misses_are_an_error(world, tmp_path):
    roles, sampler = sampler_of(world, vllm_ranks.saved(tmp_path))
    engine: Any = sampler._engine
    stream = roles.sampling_weights.stream

    def sent(change) -> str:
        engine._weights = SimpleNamespace(stream=lambda: (x for x in map(change, stream()) if x is not None))
        with pytest.raises(SamplerError, match=r"Set rollout.engine to inprocess") as error:
            engine.sync()
        return str(error.value)

    assert "model.norm.weight" in sent(lambda entry: None if entry[0] == "model.norm.weight" else entry)
    assert "does not take the actor's weights" in sent(lambda entry: (f"{entry[0]}s", entry[1]))
    assert "does not take the actor's weights" in sent(
        lambda entry: (entry[0], entry[1][:-1] if "norm" not in entry[0] else entry[1])
    )


def test_a_model_that_vllm_does_not_have_is_an_error_before_its_weights_load():
    config = config_of("none", *SMALL)
    with pytest.raises(SamplerError, match="has no XGLMForCausalLM"):
        check_sampled_model(config, AutoConfig.for_model("xglm"))
    with pytest.raises(SamplerError, match="no class of its own for GPTNeoXForCausalLM"):
        check_sampled_model(config, tiny.causal("gpt_neox").config)
    check_sampled_model(config, tiny.causal().config)


def test_memory_that_is_not_there_is_an_error_that_names_the_setting(world, tmp_path):
    config = config_of(
        vllm_ranks.saved(tmp_path), "--rollout.engine", "vllm", "--rollout.vllm.gpu_memory_utilization", "1.0"
    )
    with pytest.raises(SamplerError, match=r"gpu_memory_utilization = 1.0.*Lower it"):
        make_sampler(config, roles_of(config, world), world)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("max_num_seq: 4", "Did you mean max_num_seqs"),
        ("seed: 4", "which fastppo sets"),
        ("max_num_seqs: no", "did not"),
    ],
)
def test_arguments_that_are_none_are_errors(world, tmp_path, argument, words):
    config = config_of(
        vllm_ranks.saved(tmp_path), "--rollout.engine", "vllm", "--rollout.vllm.arguments", f"{{{argument}}}"
    )
    roles = roles_of(config, world)
    with pytest.raises(SamplerError, match=rf"rollout.vllm.arguments.*{words}|{words}.*rollout.vllm.arguments"):
        make_sampler(config, roles, world)


def test_making_an_engine_leaves_the_process_as_it_was(world, tmp_path):
    import os
    import random

    config = config_of(vllm_ranks.saved(tmp_path), *SMALL)
    roles = roles_of(config, world)

    def state() -> list[Any]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
        return [random.getstate(), torch.get_rng_state().tolist(), torch.get_num_threads(), environment]

    before = state()
    make_sampler(config, roles, world)
    assert state() == before
