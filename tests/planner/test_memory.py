"""The plan's arithmetic against DeepSpeed's estimators and against tensors that are really there."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from architectures import ACTORS, LLAMA_8B, directory
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fastppo import ops
from fastppo.config import (
    Config,
    DataConfig,
    EvalConfig,
    LoraConfig,
    OptimConfig,
    PPOConfig,
    PtxConfig,
    SamplingConfig,
    ZeroConfig,
)
from fastppo.data.batch import Prompts
from fastppo.data.microbatches import pack_even
from fastppo.data.packed import pack
from fastppo.distributed.engine import Engine
from fastppo.distributed.world import start_world
from fastppo.models.cache import Cache, SequenceLayout
from fastppo.models.layers.fuse import layers_as
from fastppo.models.loading.policies import load_causal
from fastppo.models.loading.source import Source
from fastppo.models.loading.trained import recompute_layers, set_trainable
from fastppo.models.loading.weights import DTYPES, outline
from fastppo.models.lora import add_adapters
from fastppo.models.roles import Policy, fuse_head
from fastppo.ops import GPU_WORKSPACE_BYTES
from fastppo.planner.batch import Batch
from fastppo.planner.footprint import Footprint, _Live
from fastppo.planner.memory import (
    Bytes,
    Places,
    Role,
    buffers,
    head_workspace,
    model_states,
    reducing,
    sampling_needs,
)
from fastppo.planner.methods.online import PHASES, shares
from fastppo.rollout.inprocess import sample

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory):
    folder = directory(tmp_path_factory.mktemp("7b"), *ACTORS["7b"])
    size = Footprint(Policy(_outline(folder)), torch.bfloat16, cpu=False)
    return Role("actor", size, trains=True, weights=size.parameters)


def _outline(folder: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    return fuse_head(outline(AutoModelForCausalLM, Source("actor.model", folder), dtype))


@pytest.mark.parametrize(("gpus", "nodes"), [(1, 1), (8, 1), (8, 2)])
@pytest.mark.parametrize("offload", ["none", "optimizer", "both"])
def test_model_states_are_those_of_deepspeeds_estimator_at_stage_3(seven_billion, gpus, nodes, offload):
    zero = {
        "none": ZeroConfig(stage=3),
        "optimizer": ZeroConfig(stage=3, offload_optimizer="cpu"),
        "both": ZeroConfig(stage=3, offload="cpu"),
    }[offload]
    found = model_states(seven_billion, Config(zero=zero), gpus * nodes)
    host, gpu, _ = estimate_zero3_model_states_mem_needs(
        seven_billion.size.parameters,
        seven_billion.size.largest,
        num_gpus_per_node=gpus,
        num_nodes=nodes,
        cpu_offload=offload != "none",
        cpu_offload_params=offload == "both",
        additional_buffer_factor=1.0,
    )
    assert found.gpu.states == pytest.approx(gpu, rel=0.01)
    if offload != "none":  # else what the estimator counts is the host's part in loading
        assert gpus * found.host.states == pytest.approx(host, rel=0.01)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_model_states_are_those_of_deepspeeds_estimator_at_stage_2(seven_billion, ranks, offload):
    config = Config(zero=ZeroConfig(stage=2, offload_optimizer=offload))  # type: ignore[arg-type]
    found = model_states(seven_billion, config, ranks)
    host, gpu = estimate_zero2_model_states_mem_needs(
        seven_billion.size.parameters, ranks, 1, cpu_offload=offload == "cpu", additional_buffer_factor=1.0
    )
    assert found.gpu.states == pytest.approx(gpu, rel=0.01)
    if offload == "cpu":
        assert ranks * found.host.states == pytest.approx(host, rel=0.01)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")])
def test_model_states_are_those_that_an_engine_holds(tmp_path, stage, dtype):
    """Gradients while microbatches are added up. At stage 2 they are DeepSpeed's estimate, a bf16 copy more."""
    (tmp_path / "small.json").write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 64}}))
    zero = ZeroConfig(stage=stage, deepspeed=str(tmp_path / "small.json") if stage else None)  # type: ignore[arg-type]
    config, world = Config(optim=OptimConfig(dtype=dtype), zero=zero), start_world(1)
    policy = Policy(load_causal("actor.model", tiny.saved(tmp_path, tiny.causal()), None, None, DTYPES[dtype], CPU))
    size = Footprint(policy, DTYPES[dtype], cpu=True)
    planned = model_states(Role("actor", size, trains=True, weights=size.parameters), config, world.ranks).gpu
    engine = Engine(policy, [list(policy.parameters())], config.optim, config.zero)
    packed = pack([(5, 6, 7, 8)], [2])

    def loss(role: Policy, hidden: Tensor) -> Tensor:
        return role.head(hidden, ops.linear_logprobs, packed.responses).logprobs.sum()

    for _ in range(2):
        engine.backward(engine(packed, loss), last=False)
    if stage != 2:
        own = [p.grad for p in engine.module.parameters() if p.grad is not None]
        live = size.largest * size.bytes if stage == 3 else 0
        held = sum(x.nbytes for x in [*own, *engine.buffers()])
        assert held == pytest.approx(planned.gradients - live, rel=0.01)
    engine.backward(engine(packed, loss), last=True)
    engine.step([1e-3])
    assert sum(x.nbytes for x in engine.states()) == pytest.approx(planned.optimizer, rel=0.01)


def test_gradients_at_stage_1_stay_on_the_gpu_where_the_optimizer_does_not(seven_billion):
    config = Config(zero=ZeroConfig(stage=1, offload_optimizer="cpu"))
    found, trained = model_states(seven_billion, config, 8), seven_billion.size.trained
    assert found.gpu.gradients == 4 * trained and found.host.states == 16 * trained // 8


def test_what_deepspeed_accumulates_counts_beside_what_its_offloaded_optimizer_is_handed(seven_billion):
    part, member = 4 * (seven_billion.size.trained // 8), seven_billion

    def beside(stage: Any, offload: Any) -> Places:
        config = Config(zero=ZeroConfig(stage=stage, offload_optimizer=offload, nvme_path="/x"))
        return buffers(member, config, 8) + reducing(member, config, 8)

    assert beside(2, "cpu").gpu.gradients - beside(2, "none").gpu.gradients == part
    assert beside(3, "cpu").host.total - beside(3, "none").host.total == part
    assert beside(3, "nvme").host.total > part  # DeepSpeed adds up there, whatever the optimizer's states are on


def test_nvme_takes_the_states_that_the_host_would(seven_billion):
    on_host = model_states(seven_billion, Config(zero=ZeroConfig(stage=3, offload="cpu")), 8)
    on_nvme = model_states(seven_billion, Config(zero=ZeroConfig(stage=3, offload="nvme", nvme_path="/x")), 8)
    assert on_nvme.nvme == on_host.host and on_nvme.host.total == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_of_a_real_pass(tmp_path, family, checkpointing):
    """Five layers and three sequences, extrapolated from at most two of each."""
    folder = tiny.saved(tmp_path, tiny.causal(family, num_hidden_layers=5))
    model = load_causal("actor.model", folder, None, None, torch.float32, CPU)
    role = Policy(model)
    set_trainable(role, 5 if checkpointing else 4)
    if checkpointing:
        recompute_layers(model, 5)
        model.train()
    live = _Live(*model.parameters(), *model.buffers())
    tokens, positions = torch.zeros(1, 60, dtype=torch.int64), torch.arange(20).repeat(3)[None]
    with live:
        states = model.base_model(
            input_ids=tokens, position_ids=positions, packed=SequenceLayout.of([20] * 3, CPU), use_cache=False
        ).last_hidden_state
        kept = live.now
        states.backward(torch.zeros_like(states))
    planned = Policy(_outline(folder, torch.float32))
    set_trainable(planned, 5 if checkpointing else 4)
    recomputed = 5 if checkpointing else 0
    flow = Footprint(planned, torch.float32, cpu=True).passes(3, 20, gradient=True, recomputed=recomputed)
    grads = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert flow.kept == pytest.approx(kept, rel=0.02)
    assert flow.peak <= live.peak <= flow.peak + grads


def test_activations_are_fewer_where_layers_are_fused(tmp_path):
    """Of a token in a layer, in numbers of 2 bytes: states, queries, keys, values, gate and up, and nothing twice."""
    folder = directory(tmp_path, "llama", LLAMA_8B)
    kept = {}
    for fused in (False, True):
        with layers_as(fused=fused):
            role = Policy(_outline(folder))
        size = Footprint(role, torch.bfloat16, cpu=False)
        kept[fused] = size.passes(8, 512, gradient=True).kept / (8 * 512 * size.layers * 2 * size.width)
    hidden, feed_forward, key_value = 1.0, LLAMA_8B["intermediate_size"] / LLAMA_8B["hidden_size"], 2 / 4
    products = 4 * hidden + 3 * feed_forward + key_value + hidden  # inputs of the products, and attention's
    assert products < kept[True] < products + 2.5 * hidden and kept[False] > kept[True] + 7 * hidden


def test_parameters_tied_to_each_other_are_counted_once(tmp_path):
    tied = tiny.causal(tie_word_embeddings=True)
    size = Footprint(Policy(_outline(tiny.saved(tmp_path, tied))), torch.bfloat16, cpu=True)
    assert size.parameters == sum(p.numel() for p in tied.parameters())


def test_with_adapters_only_they_have_gradients_and_states(tmp_path):
    model = _outline(tiny.saved(tmp_path, tiny.causal()))
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    expected = sum(4 * (m.in_features + m.out_features) for m in linear.values())
    whole = Footprint(Policy(model), torch.bfloat16, cpu=True)
    add_adapters(model, "actor", LoraConfig(rank=4), seed=0, source="")
    adapted = Footprint(Policy(model), torch.bfloat16, cpu=True)
    assert adapted.trained == expected
    assert adapted.parameters == whole.parameters + expected
    member = Role("actor", adapted, trains=True, weights=adapted.parameters)
    states = model_states(member, Config(zero=ZeroConfig(stage=1)), ranks=2)
    assert states.gpu.optimizer == 12 * expected // 2 and states.gpu.gradients == 4 * expected
    assert adapted.passes(2, 8, gradient=True).kept > 0


def test_a_microbatch_is_as_large_as_packing_makes_it():
    config = Config()
    batch = Batch.of(replace(config, ppo=replace(config.ppo, batch_size=96, microbatch_tokens=9000)), ranks=2)
    lengths = torch.full((96,), batch.length)
    packed = pack_even(torch.arange(96), lengths, 9000, ranks=2)
    assert batch.sequences == max(map(len, packed))


def test_microbatches_of_text_count_where_they_are_larger_than_those_of_ppo(seven_billion):
    """They have a response token for each token, and 64 texts on 8 ranks fill microbatches that 16 responses do not."""
    config = Config(ppo=PPOConfig(batch_size=16, microbatch_tokens=4096), data=DataConfig(max_prompt_tokens=128))
    texts = replace(config, ptx=PtxConfig(coef=0.1, path="t", max_tokens=512))
    with_texts = Batch.of(texts, 8).with_texts(*texts.mixed_in, texts, 8)
    packed = pack_even(torch.arange(64), torch.full((64,), 512), 4096, ranks=8)
    assert (with_texts.sequences, with_texts.responses) == (max(map(len, packed)), 4096)

    def learning(config: Config) -> Bytes:
        return next(s.places.gpu for s in shares([seven_billion], config, 8) if s.phase == "learning")

    assert learning(texts).activations > 5 * learning(config).activations
    assert learning(replace(texts, ptx=replace(texts.ptx, batch_size=8, max_tokens=64))) == learning(config)


def test_the_heads_workspace_does_not_grow_with_the_batch(seven_billion):
    for tokens in (5_000, 50_000, 100_000):
        logits, _ = head_workspace(seven_billion.size, tokens, reference=True, gradient=False)
        assert GPU_WORKSPACE_BYTES / 8 < logits <= GPU_WORKSPACE_BYTES


def test_what_a_stage_does_not_use_has_left_the_gpu(seven_billion):
    frozen = Role("reference", seven_billion.size, trains=False, weights=seven_billion.weights)
    config = Config(optim=OptimConfig(activation_checkpointing=True))
    found = {(s.role, s.phase): s.places for s in shares([seven_billion, frozen], config, ranks=8)}
    assert found["reference", "learning"].gpu.total == 0
    assert found["reference", "learning"].host.weights == found["reference", "experience"].gpu.weights > 0
    assert found["actor", "sampling"].gpu.optimizer == 0
    assert found["actor", "sampling"].host.optimizer == found["actor", "learning"].gpu.optimizer > 0
    for role, kind in (("reference", "weights"), ("actor", "optimizer")):  # the copy on the host stays
        assert len({getattr(found[role, phase].host, kind) for phase in PHASES}) == 1


def test_top_k_and_top_p_need_no_memory(seven_billion):
    def sampled(**settings: Any) -> Any:
        found = shares([seven_billion], Config(sampling=SamplingConfig(**settings)), ranks=8)
        return next(s.places for s in found if s.phase == "sampling")

    assert sampled(top_k=50, top_p=0.9) == sampled(top_k=50) == sampled(top_p=0.9) == sampled()


@pytest.mark.parametrize(("samples", "heldout"), [(1, 0), (4, 0), (3, 5), (4, 24), (8, 3)])
def test_the_sampler_computes_as_many_prompts_at_once_as_are_counted(samples, heldout, monkeypatch):
    """All responses are of one length, so that all rows are filled at once; one prompt more is counted where ranks
    begin amid the samples of one."""
    actor, length = Policy(fuse_head(tiny.causal())), 20
    config = Config(
        ppo=PPOConfig(batch_size=48, minibatches=1),
        data=DataConfig(first_tokens=length),
        sampling=SamplingConfig(rows=16, samples_per_prompt=samples, max_new_tokens=2),
        eval=EvalConfig(prompts=heldout),
    )
    computed, prefill = [], actor.prefill
    monkeypatch.setattr(
        actor, "prefill", lambda tokens, *rest: computed.append(len(tokens) // length) or prefill(tokens, *rest)
    )
    tokens = torch.randint(1, 257, (48, length)).tolist()
    drawn = Prompts.of(tokens, range(48 // samples), samples=samples), Prompts.of(tokens, range(heldout))
    for ranks in (1, 2, 5):
        computed.clear()
        for prompts in drawn:
            for rank in range(ranks):
                sample(actor, prompts.of_rank(rank, ranks), config.sampling, stop_ids=(), seed=0)
        assert 0 <= Batch.of(config, ranks).prefilled - max(computed) <= (samples > 1)


@pytest.mark.parametrize(
    ("rows", "samples", "heldout", "more"),
    [
        (16, 1, 0, {}),
        (16, 4, 24, {}),
        (5, 3, 3, {}),  # a bucket of 8
        (100, 8, 4, {}),  # more than there are responses
        (16, 4, 0, {"top_p": 0.9}),
        (16, 4, 0, {"top_k": 9, "min_new_tokens": 2}),
    ],
)
def test_the_sampler_allocates_the_cache_that_is_counted_and_no_more_beside_it(
    tmp_path, monkeypatch, rows, samples, heldout, more
):
    """Every byte that a rank allocates while it draws, with prompts as long as they may be and rows that are filled
    anew."""
    model, length = tiny.causal(vocab_size=1500), 20
    outline = Policy(_outline(tiny.saved(tmp_path, model), torch.float32))
    size, actor = Footprint(outline, torch.float32, cpu=True), Policy(fuse_head(model))
    config = Config(
        ppo=PPOConfig(batch_size=48, minibatches=1),
        data=DataConfig(first_tokens=length),
        sampling=SamplingConfig(rows=rows, samples_per_prompt=samples, max_new_tokens=9, **more),
        eval=EvalConfig(prompts=heldout),
    )
    made, caches = Cache.__init__, []

    def init(cache: Cache, *given: Any) -> None:
        made(cache, *given)
        caches.append(cache.keys.nbytes + cache.values.nbytes)

    monkeypatch.setattr(Cache, "__init__", init)
    tokens = torch.randint(1, 257, (48, length)).tolist()
    drawn = Prompts.of(tokens, range(48 // samples), samples=samples), Prompts.of(tokens, range(heldout))
    for ranks in (1, 2, 5):
        caches.clear()
        peak = 0
        for prompts in drawn:
            for rank in range(ranks):
                live = _Live(*model.parameters(), *model.buffers())
                with live:
                    sample(actor, prompts.of_rank(rank, ranks), config.sampling, stop_ids=range(0, 1500, 9), seed=0)
                peak = max(peak, live.peak)
        planned = sampling_needs(size, config, Batch.of(config, ranks))
        assert max(caches) == planned.cache
        assert 0.4 * planned.total < peak <= planned.total
