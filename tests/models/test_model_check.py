"""What a model must compute to be trained: packed, in train mode and in decode what its own forward pass does."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from kinds import KINDS, SHAPE, SWITCH, config_of
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from fastppo.config import Config, LoraConfig
from fastppo.config.command_line import PPO, parse
from fastppo.data.packed import pack
from fastppo.models import attention
from fastppo.models.loading import model_check
from fastppo.models.loading.model_check import check_architecture, check_model
from fastppo.models.loading.policies import check_models, load_causal, load_reward
from fastppo.models.loading.trained import set_trainable
from fastppo.models.loading.weights import without_dropout
from fastppo.models.lora import add_adapters
from fastppo.models.roles import Backbone, ModelError, Policy, RewardModel, fuse_head
from fastppo.planner.footprint import Footprint

CPU = torch.device("cpu")
LENGTHS = (20, 5, 3, 11, 15)  # beyond the window and the rotary switch, and below
REFUSED = {
    "convolution": r"Lfm2ForCausalLM cannot be trained here: layer 1 \(conv\) mixes positions across packed sequences",
    "linear attention": r"layer 1 \(linear_attention\) mixes positions across packed sequences",
    "sinks": r"GptOssAttention asks its attention for s_aux, which packed attention does not implement",
    "ALiBi": r"BloomForCausalLM does not take all its attention from transformers' AttentionInterface",
    "latent attention": "DeepseekV3Attention has values of width 12 and queries of width 16",
}
TRAINED = [name for name in KINDS if name not in REFUSED]


def made(config: PreTrainedConfig, auto: Any = AutoModelForCausalLM) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                parameter.mul_(4.0)
    return model


def drawn(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(101, (n,), generator=generator).tolist() for n in lengths]


def packed_logits(policy: Policy, sequences: list[list[int]]) -> Tensor:
    hidden = policy.hidden(pack(sequences, [1] * len(sequences)))
    return policy.head(hidden)  # type: ignore[return-value]


@pytest.mark.parametrize("name", TRAINED)
def test_packed_logits_are_the_models_own_beyond_its_window_and_its_rotary_switch(name):
    model, sequences = made(config_of(name)), sorted(drawn(), key=len)
    with torch.no_grad():
        own = torch.cat([model(torch.tensor([s]), use_cache=False).logits[0] for s in sequences])
        found = packed_logits(Policy(fuse_head(model)), sequences)
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TRAINED)
def test_the_check_passes_what_is_trained_right(name):
    check_architecture(AutoModelForCausalLM, without_dropout(config_of(name)), CPU)
    check_model(made(without_dropout(config_of(name))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", REFUSED)
def test_the_check_refuses_in_every_dtype_of_a_run_with_the_true_reason(name, dtype):
    with pytest.raises(ModelError, match=REFUSED[name]) as refused:
        check_architecture(AutoModelForCausalLM, config_of(name), CPU, dtype)
    assert "\n" not in str(refused.value)


def test_a_model_is_refused_before_its_weights_are_loaded(tmp_path):
    config_of("convolution").save_pretrained(tmp_path)  # and no weights
    with pytest.raises(ModelError, match=r"layer 1 \(conv\) mixes positions"):
        load_causal("actor.model", str(tmp_path), None, None, torch.bfloat16, CPU)


def test_windows_and_switches_at_published_sizes_are_crossed_by_short_sequences(
    monkeypatch,
):
    longrope = {**KINDS["phi3"][1]["rope_parameters"], "original_max_position_embeddings": 4096}
    longrope |= {"short_factor": [1.0] * 48, "long_factor": [9.0] * 48}
    config = AutoConfig.for_model("phi3", rope_parameters=longrope, max_position_embeddings=131072, sliding_window=2047)
    check_architecture(AutoModelForCausalLM, config, CPU)
    monkeypatch.setattr(model_check, "_passed", set())
    monkeypatch.setattr("fastppo.models.roles.rotate_each_sequence", lambda *args: None)
    with pytest.raises(ModelError, match="layer 0 mixes positions across packed sequences"):
        check_architecture(AutoModelForCausalLM, config, CPU)


@pytest.mark.parametrize("name", ["mistral", "phimoe"])
def test_a_window_that_is_left_out_is_noticed(name, monkeypatch):
    def without(*args: Any, sliding_window: Any = None, **kwargs: Any) -> Any:
        return attention.attend(*args[:4], None, **kwargs)

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.ATTENTION, without)
    with pytest.raises(ModelError, match=r"layer 0 .*computes something else with fastppo's causal attention"):
        check_model(made(config_of(name)))


class PreviousToken(nn.Module):
    """Adds to each state that of the token before in its sequence, which no cache of keys and values holds."""

    def __init__(self, own: nn.Module):
        super().__init__()
        self.own = own
        self.positions = torch.zeros(1, 1)

    def forward(self, states: Tensor) -> Tensor:
        before = states.roll(1, dims=1) * (self.positions > 0).to(states.dtype)[..., None]
        return self.own(states + before)  # type: ignore[no-any-return]


def test_a_model_that_is_right_when_packed_and_wrong_in_decode_is_refused():
    model = made(config_of("mistral"))
    for layer in model.model.layers[1:]:
        layer.mlp = PreviousToken(layer.mlp)
        hook = lambda module, args, kwargs: setattr(module.mlp, "positions", kwargs["position_ids"])  # noqa: E731
        layer.register_forward_pre_hook(hook, with_kwargs=True)
    with pytest.raises(ModelError, match=r"decoding token by token differs from the whole pass, from layer 1 on"):
        check_model(model)


class Noisy(nn.Module):
    def __init__(self, own: nn.Module):
        super().__init__()
        self.own = own
        self.gradient_checkpointing = False  # modules that recompute activations stay in train mode

    def forward(self, states: Tensor) -> Tensor:
        return self.own(nn.functional.dropout(states, 0.01, self.training))  # type: ignore[no-any-return]


def test_noise_that_no_config_switches_off_is_refused():
    model = made(config_of("mistral"))
    model.model.layers[1].mlp = Noisy(model.model.layers[1].mlp).eval()
    with pytest.raises(ModelError, match="two passes in train mode differ, by something random"):
        check_model(model)


NOISE: dict[str, dict[str, Any]] = {
    "mixtral": {"router_jitter_noise": 0.3, "attention_dropout": 0.2},
    "phimoe": {"input_jitter_noise": 0.3, "router_jitter_noise": 0.01},
    "gemma3": {"attention_dropout": 0.2},
    "opt": {"attention_dropout": 0.2},
}


def role_of(kind: str, config: PreTrainedConfig) -> Backbone:
    if kind == "reward":
        config.num_labels = 1
        return RewardModel(made(config, AutoModelForSequenceClassification))
    policy = Policy(fuse_head(made(config)))
    if kind == "lora":
        set_trainable(policy, "all")
        add_adapters(policy.model, "actor", LoraConfig(rank=2), seed=1, source="made")
    return policy


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, kind) for name in NOISE for kind in ("policy", "lora")), ("mixtral", "reward"), ("phimoe", "reward")],
)
def test_nothing_is_random_in_train_mode(name, kind, checkpointing):
    config = config_of(name, **NOISE[name])
    role = role_of(kind, without_dropout(config) if checkpointing else config)
    if checkpointing:
        role.model.gradient_checkpointing_enable({"use_reentrant": False})
    packed = pack(drawn(), [1] * len(LENGTHS))
    asked = role.eval().hidden(packed)
    learned = [role.train().hidden(packed) for _ in range(2)]
    assert role.training and all(torch.equal(each, asked) for each in learned)


def test_checkpointed_layers_recompute_as_in_the_first_pass():
    def gradients(checkpointing: bool) -> list[Tensor]:
        role = role_of("policy", without_dropout(config_of("phimoe", input_jitter_noise=0.3)))
        if checkpointing:
            role.model.gradient_checkpointing_enable({"use_reentrant": False})
        role.train().hidden(pack(drawn(), [1] * len(LENGTHS))).square().sum().backward()
        return [p.grad for p in role.parameters() if p.grad is not None]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_a_response_that_could_cross_the_rotary_switch_is_refused_before_loading(tmp_path):
    path = tiny.saved(tmp_path / "actor", made(config_of("phi3", vocab_size=257)))
    tokenizer = tiny.tokenizer()

    def run(response: int) -> Config:
        fixed = {"actor.model": path, "data.path": "x.jsonl", "rewards": '[{"function": "f.py:f"}]', "output": "o"}
        sizes = {"data.max_prompt_tokens": 8, "sampling.max_new_tokens": response}
        return parse([part for k, v in {**fixed, **sizes}.items() for part in (f"--{k}", str(v))], PPO)

    check_models(run(SWITCH - 8), tokenizer)
    with pytest.raises(
        ModelError, match=r"8 \+ sampling.max_new_tokens 5 = 13 tokens.*original_max_position_embeddings"
    ):
        check_models(run(SWITCH - 7), tokenizer)


def test_decoding_beyond_the_rotary_switch_raises():
    policy = Policy(fuse_head(made(config_of("phi3"))))
    with pytest.raises(attention.FastPPOError, match="cannot be decoded beyond original_max_position_embeddings = 12"):
        policy.model.base_model.rotary_emb(torch.zeros(1), torch.full((4, 1), SWITCH))


def test_the_plan_measures_a_model_with_longrope():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of("phi3"))
    size = Footprint(Policy(fuse_head(model)), torch.float32, cpu=True)
    assert size.passes(2, 8, gradient=True).kept > 0


def test_sequences_of_one_chunk_are_the_longest_that_attention_by_chunks_takes():
    spans = attention.SequenceLayout.of([3, 9], CPU)
    states = torch.randn(1, 2, 12, 8)
    chunked = attention.attend(nn.Module(), states, states, states, attention.Chunks(9), packed=spans)[0]
    plain = attention.attend(nn.Module(), states, states, states, None, packed=spans)[0]
    assert torch.equal(chunked, plain)
    with pytest.raises(attention.FastPPOError, match=r"up to 9 tokens.*attention_chunk_size = 8"):
        attention.attend(nn.Module(), states, states, states, attention.Chunks(8), packed=spans)


def test_a_mask_of_the_models_own_making_is_not_left_out():
    states = torch.randn(1, 2, 12, 8)
    with pytest.raises(attention.FastPPOError, match="a mask that it computed itself"):
        attention.attend(
            nn.Module(), states, states, states, torch.ones(12, 12), packed=attention.SequenceLayout.of([12], CPU)
        )


def test_the_check_leaves_the_runs_random_numbers_and_the_config_alone():
    config = without_dropout(config_of("mixtral", router_jitter_noise=0.3, vocab_size=103))
    before, state = config.to_dict(), torch.get_rng_state()
    check_architecture(AutoModelForCausalLM, config, CPU)
    assert config.to_dict() == before and torch.equal(torch.get_rng_state(), state)


def test_a_reward_model_is_checked_too(tmp_path):
    config = AutoConfig.for_model("bloom", **{**SHAPE, "n_layer": 2, "n_head": 4}, num_labels=1)
    path = tiny.saved(tmp_path / "reward", made(config, AutoModelForSequenceClassification))
    with pytest.raises(ModelError, match="BloomForSequenceClassification does not take all its attention"):
        load_reward(path, torch.bfloat16, CPU)
