"""Fused layers: which models take them, that these compute what they did, and that nothing else of them changes."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import tiny
import torch
from families import tiny_config
from ppo_step import config_of, step
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

from fastppo.checkpoint.export import write_model
from fastppo.config import COMMANDS, ActorLoraConfig, LoraConfig
from fastppo.data.packed import pack
from fastppo.distributed.world import start_world
from fastppo.errors import log_once
from fastppo.models.layers import gated, norms, rotations
from fastppo.models.layers.classes import is_changed
from fastppo.models.layers.fuse import PARTS, fuse_layers, layers_as
from fastppo.models.layers.gated import gated_form
from fastppo.models.layers.norms import norm_form
from fastppo.models.layers.residuals import fuse_residual
from fastppo.models.layers.rotations import rotating
from fastppo.models.loading import model_check
from fastppo.models.loading.model_check import check_architecture, check_model
from fastppo.models.loading.policies import load_causal
from fastppo.models.loading.trained import set_trainable
from fastppo.models.lora import add_adapters
from fastppo.models.roles import ModelError, Policy, enable_prefix_states, fuse_head

CPU = torch.device("cpu")
PACKED = pack(((5, 6, 7, 8, 9, 10, 11, 12), (9, 10), (11, 12, 13), (1, 2, 3)), [7, 1, 2, 2])
TOKENS = torch.arange(1, 13)[None]

# family -> the parts of `PARTS` that it computes. A sum that comes after its norm is no sum before one (OLMo-2).
ALL = tuple(PARTS)
PARTS_OF: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "granite"), ALL),
    **dict.fromkeys(("smollm3", "mixtral", "qwen3_moe", "glm4"), ALL),
    "olmo2": ("RMSNorm", "gated activations", "rotary positions"),
    "gpt_neox": ("rotary positions",),
    "cohere": ("gated activations", "rotary positions"),  # norms with a mean, rotations of neighbours
    "gpt2": (),
    "opt": (),
}
FUSED = [family for family, parts in PARTS_OF.items() if len(parts) > 1]


def made(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """A random model, its norms' weights too, in which an error would be seen."""
    config = tiny_config(family)
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4.0) if parameter.dim() > 1 and "norm" not in name else parameter.add_(
                0.3 * torch.randn_like(parameter)
            )
    return model.to(dtype)


def fused(model: PreTrainedModel) -> PreTrainedModel:
    other = copy.deepcopy(model)
    fuse_layers(other)
    return other


def passed(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of a loss on them."""
    logits = model(TOKENS, use_cache=False).logits.float()
    logits.log_softmax(-1)[0, :-1].gather(-1, TOKENS[0, 1:, None]).mean().backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach(), gradients


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp_min(1e-9))


@pytest.mark.parametrize("family", PARTS_OF)
def test_a_model_takes_the_layers_that_it_computes_and_says_which(family, caplog):
    log_once.cache_clear()
    model = made(family)
    with caplog.at_level(logging.INFO, logger="fastppo"):
        fuse_layers(model)
    lines = [record.getMessage() for record in caplog.records if "fused" in record.getMessage()]
    named = PARTS_OF[family]
    others = ", ".join(part for part in PARTS if part not in named)
    expected = f"fused layers: {', '.join(named)}" + (f"; not fused, where it has them: {others}" if others else "")
    assert lines == [
        f"{family}: {expected if named else 'no fused layers: it computes none of their parts in a known form'}"
    ]
    kinds = {"gated_form": 0, "gated_activation": 0, "rms_norm_form": 0, "layer_form": 0}
    for module in model.modules():
        kinds |= {name: kinds[name] + hasattr(module, name) for name in kinds}
    layers = model.config.num_hidden_layers
    assert (kinds["layer_form"] == layers) == ("residual sums with RMSNorm" in named)
    assert (kinds["gated_form"] + kinds["gated_activation"] >= layers) == ("gated activations" in named)
    norms_of = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    assert kinds["rms_norm_form"] == len(norms_of) * ("RMSNorm" in named)
    attentions = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    assert all(is_changed(m) == ("rotary positions" in named) for m in attentions)


@pytest.mark.parametrize("family", FUSED)
def test_in_fp32_outputs_and_gradients_are_those_of_the_models_own_layers(family):
    own = made(family)
    (logits, gradients), (fused_logits, fused_gradients) = passed(own), passed(fused(own))
    assert distance(fused_logits, logits) < 1e-5
    assert gradients.keys() == fused_gradients.keys()
    assert max(distance(fused_gradients[name], g) for name, g in gradients.items() if g.norm() > 1e-6) < 1e-4


@pytest.mark.parametrize("family", [family for family in FUSED if "moe" not in family and family != "mixtral"])
def test_in_bf16_outputs_are_as_close_to_the_truth_as_the_models_own(family):
    """Not with experts: where a router chooses another one, the error says nothing of rounding."""
    own = made(family, torch.bfloat16)
    truth = copy.deepcopy(own).double()
    (logits, gradients), (fused_logits, fused_gradients) = passed(own), passed(fused(own))
    true_logits, true_gradients = passed(truth)
    assert distance(fused_logits, true_logits) <= 1.3 * distance(logits, true_logits)

    def error(found: dict[str, Tensor]) -> float:
        return sum(distance(found[name], g) for name, g in true_gradients.items() if g.norm() > 1e-6)

    assert error(fused_gradients) <= 1.3 * error(gradients)


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_train_mode_and_decode_agree_with_the_models_own_forward_pass(family, dtype):
    model = made(family, dtype)
    check_model(model)
    assert any(is_changed(module) for module in model.modules())


@pytest.fixture(scope="module")
def world():
    return start_world(1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "olmo2", "qwen3_moe"])
def test_on_the_first_update_the_ratio_is_one(family, dtype, world, tmp_path):
    path = tiny.saved(tmp_path, made(family, vocab_size=257, eos_token_id=0, pad_token_id=None))
    (first,) = step(config_of(path, "--optim.dtype", dtype, "--critic.kind", "shared"), world).updates
    bound = {"fp32": 1e-4, "bf16": 1e-3}[dtype]
    assert abs(first.ratio_mean - 1) <= bound and first.ratio_max - 1 <= bound and first.approx_kl <= 1e-6


@pytest.mark.parametrize("family", FUSED)
def test_names_classes_and_transformers_itself_stay_as_they_are(family):
    own = made(family)
    forwards = {type(module): type(module).forward for module in own.modules()}
    model = fused(own)
    assert list(model.state_dict()) == list(own.state_dict())
    for (name, one), (other_name, other) in zip(own.named_modules(), model.named_modules(), strict=True):
        assert name == other_name and isinstance(other, type(one)) and type(other).__name__ == type(one).__name__
    assert all(kind.forward is forward for kind, forward in forwards.items())
    assert torch.equal(passed(own)[0], passed(copy.deepcopy(own))[0]) and not any(map(is_changed, own.modules()))


@pytest.mark.parametrize("family", FUSED)
def test_a_copy_and_a_pickle_compute_the_same(family):
    model = fused(made(family))
    logits = model(TOKENS, use_cache=False).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(other(TOKENS, use_cache=False).logits, logits)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}


@pytest.mark.parametrize("family", ["gemma2", "phi3", "mixtral"])
def test_an_export_has_the_models_own_layers_and_names(family, tmp_path):
    path = tiny.saved(tmp_path / "model", made(family, vocab_size=257))
    policy = Policy(load_causal("actor.model", path, None, None, torch.float32, CPU))
    assert any(map(is_changed, policy.modules()))
    write_model(policy, tiny.tokenizer(), tmp_path / "export", ActorLoraConfig())
    start, export = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("model", "export"))
    assert export.config.architectures == start.config.architectures and not any(map(is_changed, export.modules()))
    assert all(torch.equal(p, export.state_dict()[name]) for name, p in start.state_dict().items())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", ["llama", "phi3", "olmo2"])
def test_lora_adapters_work_under_fused_layers(family, when):
    own = fuse_head(made(family))

    def adapted(model: PreTrainedModel) -> PreTrainedModel:
        with layers_as(fused=False):
            policy = Policy(model)
        set_trainable(policy, "all")
        add_adapters(model, "actor", LoraConfig(rank=4, alpha=8.0), seed=3, source="base")
        torch.manual_seed(4)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
        return policy

    model = copy.deepcopy(own)
    if when == "before":
        fuse_layers(model)
    plain, policy = adapted(own), adapted(model)
    if when == "after":
        fuse_layers(model)
    assert any(map(is_changed, model.modules()))
    results = []
    for role in (plain, policy):
        hidden = role.hidden(PACKED)
        hidden.square().mean().backward()
        results.append((hidden.detach(), {n: p.grad for n, p in role.named_parameters() if p.grad is not None}))
    (hidden, gradients), (fused_hidden, fused_gradients) = results
    assert distance(fused_hidden, hidden) < 1e-5 and gradients.keys() == fused_gradients.keys() and gradients
    assert all(distance(fused_gradients[n], g) < 1e-4 for n, g in gradients.items() if g.norm() > 1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_recomputed_activations_give_the_same_gradients_bit_for_bit(family):
    found = []
    for checkpointing in (False, True):
        policy = Policy(fuse_head(made(family)))
        if checkpointing:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()
        policy.hidden(PACKED).square().mean().backward()
        found.append([p.grad for p in policy.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_frozen_lower_layers_are_computed_once(family):
    policy = Policy(fuse_head(made(family, num_hidden_layers=3, layer_types=None)))
    set_trainable(policy, 1)
    enable_prefix_states(policy)
    assert policy.prefix_depth == 2
    assert torch.equal(policy.hidden(PACKED, policy.prefix(PACKED)), policy.hidden(PACKED))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_a_layer_can_be_compiled_whole(family):
    policy = Policy(fuse_head(made(family)))
    layer, given, seen = policy.model.base_model.layers[0], {}, []

    def keep(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given.update(keywords, states=args[0])

    with layer.register_forward_pre_hook(keep, with_kwargs=True):
        policy.hidden(PACKED)

    def backend(graph: Any, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    states = given.pop("states").detach()
    out = []
    for call in (layer, torch.compile(layer, backend=backend, fullgraph=True)):
        x = states.clone().requires_grad_()
        y = call(x, **given)
        y.square().mean().backward()
        out.append((y.detach(), x.grad))
    assert torch.equal(out[0][0], out[1][0]) and torch.allclose(out[0][1], out[1][1], atol=1e-6)
    gated = "geglu" if family.startswith("gemma") else "swiglu"
    assert {f"fastppo.{op}.default" for op in ("rms_norm", gated, "rotary")} <= {*seen}


def test_without_the_setting_a_model_stays_as_it_is(caplog):
    model = made("llama")
    with layers_as(fused=False), caplog.at_level(logging.INFO, logger="fastppo"):
        Policy(model)
    assert not any(map(is_changed, model.modules())) and not caplog.records


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_setting_and_knows_that_runs_had_none(name):
    config = COMMANDS[name].root()
    assert config.model.fused is True and config.done_before["model.fused"] == (False, True)


class Norm(nn.Module):
    """RMSNorm, but for what `change` does."""

    def __init__(self, change: str):
        super().__init__()
        self.weight, self.eps, self.change = nn.Parameter(torch.ones(8)), 1e-3, change
        if change == "bias":
            self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() - (x.float().mean(-1, keepdim=True) if self.change == "centred" else 0)
        squares = wide.square().mean(-1, keepdim=True) + self.eps * (2 if self.change == "eps" else 1)
        weight = self.weight.float() + {"offset": 2.0, "Gemma": 1.0}.get(self.change, 0.0)
        return (wide * squares.rsqrt() * weight).to(x.dtype if self.change != "dtype" else torch.float32)


@pytest.mark.parametrize("change", ["none", "Gemma", "bias", "centred", "eps", "offset", "dtype"])
def test_a_norm_that_computes_something_else_is_left_alone(change):
    expected = {"none": norms.NormForm(1e-3, 0.0, False), "Gemma": norms.NormForm(1e-3, 1.0, False)}
    assert norm_form(Norm(change)) == expected.get(change)


class FeedForward(nn.Module):
    """A gated layer, but for what `change` does."""

    def __init__(self, change: str):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        gate = self.two(2 * x if self.change == "input" else x)
        up = self.one(x)
        if self.change == "clamped":
            gate = gate.clamp(max=2.0)
        product = (torch.relu(gate) if self.change == "relu" else nn.functional.silu(gate)) * up
        out = self.three(product)
        return x + out if self.change == "residual" else out


@pytest.mark.parametrize("change", ["none", "input", "clamped", "relu", "residual"])
def test_a_feed_forward_layer_that_computes_something_else_is_left_alone(change):
    known = gated.GatedForm(("two", "one"), (0, 1), "three", "silu")
    assert gated_form(FeedForward(change)) == (known if change == "none" else None)


@pytest.mark.parametrize("change", ["none", "added twice", "scaled", "parallel"])
def test_a_decoder_layer_that_computes_something_else_is_left_alone(change):
    class Layer(modeling_llama.LlamaDecoderLayer):
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            out, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            total = hidden_states + out * (2 if change == "added twice" else 1)
            y = self.mlp(self.post_attention_layernorm(hidden_states if change == "parallel" else total))
            return total + y * (0.5 if change == "scaled" else 1)

    config = AutoConfig.for_model("llama", hidden_size=32, intermediate_size=64, num_attention_heads=4)
    layer = Layer(config, 0)
    for name in ("input_layernorm", "post_attention_layernorm"):
        assert norms.fuse_norm(getattr(layer, name))
    assert fuse_residual(layer) == (change == "none")


def test_a_rotation_of_other_pairs_is_left_alone():
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return q * cos[:, None], k * sin[:, None]

    code = compile("def forward(q, k, cos, sin): return apply_rotary_pos_emb(q, k, cos, sin)", "file", "exec")
    for function, known in ((apply_rotary_pos_emb, False), (modeling_llama.apply_rotary_pos_emb, True)):
        scope: dict[str, Any] = {"apply_rotary_pos_emb": function}
        exec(code, scope)
        assert bool(rotating(scope["forward"])) == known


def test_a_rotation_that_is_called_in_another_way_is_the_models_own():
    """Qwen-4 rotates queries alone by the same function, and positions before heads."""

    def apply_rotary_pos_emb(q: Tensor, k: Any = None, cos: Any = None, sin: Any = None, unsqueeze_dim: int = 1) -> Any:
        return "own" if k is None or unsqueeze_dim != 1 else modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)

    rotate = rotations._fused(apply_rotary_pos_emb, rotations._form(apply_rotary_pos_emb))
    q, cos = torch.randn(2, 4, 5, 16), torch.randn(2, 5, 16)
    assert rotate(q, cos=cos, sin=cos) == "own" and rotate(q, q, cos, cos, unsqueeze_dim=2) == "own"
    expected = modeling_llama.apply_rotary_pos_emb(q, q, cos, cos)
    torch.testing.assert_close(rotate(q, q, cos, cos), expected)


def test_a_model_that_fused_layers_would_change_is_refused_with_the_way_out(monkeypatch):
    """The last guard, should a form be taken for another: the check that every loaded model passes."""
    monkeypatch.setattr(
        norms,
        "norm_form",
        lambda module: norms.NormForm(1e-2, 0.0, True) if module.__class__.__name__.endswith("RMSNorm") else None,
    )
    monkeypatch.setattr(model_check, "_passed", set())
    config = tiny_config("llama")
    with pytest.raises(ModelError, match=r"cannot be trained here.*with model\.fused false it can be trained"):
        check_architecture(AutoModelForCausalLM, config, CPU)
    with layers_as(fused=False):
        check_architecture(AutoModelForCausalLM, config, CPU)
