import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastppo import ops
from fastppo.data.packed import pack
from fastppo.errors import FastPPOError
from fastppo.models.loading.model_check import check_model
from fastppo.models.loading.trained import recompute_layers, set_trainable
from fastppo.models.logit_scale import logit_scale
from fastppo.models.roles import Critic, ModelError, Policy, ValueHead, copy_backbone, fuse_head
from fastppo.ops import eager

SEQUENCES = [(5, 6, 7, 8, 9, 10, 11, 12), (9, 10), (11, 12, 13), (1, 2, 3)]
PACKED = pack(SEQUENCES, [3, 1, 2, 1])


def objective(policy, hidden):
    return policy.head(hidden, ops.linear_logprobs, PACKED.responses).logprobs


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_packed_logprobs_are_those_of_one_sequence_at_a_time(family):
    model = tiny.causal(family)
    expected = []
    with torch.no_grad():
        for sequence, responses in zip(SEQUENCES, PACKED.response_lengths.tolist(), strict=True):
            tokens = torch.tensor([sequence])
            logprobs = model(tokens, use_cache=False).logits[0].log_softmax(-1)
            rows = range(len(sequence) - responses - 1, len(sequence) - 1)
            expected += [logprobs[row, sequence[row + 1]] for row in rows]
        found = Policy(fuse_head(model))(PACKED, objective)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_check_at_load_accepts_what_packing_computes_rightly(family):
    check_model(tiny.causal(family, **({"dropout": 0.0} if family == "opt" else {})))


def test_a_model_with_other_attention_is_refused_by_name():
    config = AutoConfig.for_model("bloom", hidden_size=32, n_head=4, n_layer=2, vocab_size=101)
    with pytest.raises(ModelError, match=r"BloomForCausalLM .* AttentionInterface"):
        check_model(AutoModelForCausalLM.from_config(config))


# Each by its own name in the config, of which one divides here and multiplies there.
SCALED = {
    "granite": ({"logits_scaling": 3.0}, 1 / 3),
    "hyperclovax": ({"logits_scaling": 3.0}, 3.0),
    "cohere": ({"logit_scale": 0.0625}, 0.0625),
    "cohere2": ({"logit_scale": 0.25, "sliding_window": 6}, 0.25),
    "gemma2": ({}, 1.0),  # a softcap is no scale
}


def scaled(family):
    settings = {"num_key_value_heads": 2} | SCALED[family][0]
    return tiny.causal(family, **settings)


@pytest.mark.parametrize("family", SCALED)
def test_logits_are_scaled_as_the_models_own_forward_pass_scales_them(family):
    own, model = scaled(family), scaled(family)
    check_model(model)
    policy = Policy(model)
    assert policy.head.logit_scale == pytest.approx(SCALED[family][1], rel=1e-12)
    rows = [own(torch.tensor([s]), use_cache=False).logits[0] for s in SEQUENCES]
    logits = torch.cat(rows)[PACKED.predictors]
    torch.testing.assert_close(policy.head(policy.hidden(PACKED)[PACKED.predictors]), logits, rtol=1e-4, atol=1e-4)
    stats = eager.token_logprobs(logits, PACKED.responses, temperature=0.7)
    random = torch.Generator().manual_seed(0)
    old = stats.logprobs.detach() + 0.05 * torch.randn(len(logits), generator=random)
    advantages = torch.randn(len(logits), generator=random)
    options = {"clip_low": 0.2, "clip_high": 0.2, "normalizer": 4.0, "entropy_coef": 0.1}
    expected, _ = eager.policy_loss(stats.logprobs, old, advantages, entropy=stats.entropy, **options)
    found = policy(
        PACKED,
        lambda p, hidden: p.head(
            hidden, ops.linear_policy_loss, PACKED.responses, old, advantages, temperature=0.7, **options
        ),
    )[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    expected.backward()
    found.backward()
    theirs = dict(own.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-4, msg=name)


def test_a_scale_is_found_without_weights():
    with torch.device("meta"):
        model = scaled("granite")
        assert fuse_head(model).get_output_embeddings().logit_scale == pytest.approx(1 / 3, rel=1e-12)


def test_a_forward_pass_is_as_it_was_once_it_has_been_asked():
    model, tokens = scaled("granite"), torch.tensor([[1, 2, 3]])
    before = model(tokens).logits
    assert logit_scale(model, model.lm_head, None) == pytest.approx(1 / 3)
    assert torch.equal(model(tokens).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_unknown_keyword_of_attention_is_refused_by_name():
    model = tiny.causal("llama")
    policy = Policy(fuse_head(model))
    with pytest.raises(FastPPOError, match="s_aux"):
        policy.model.base_model(input_ids=PACKED.tokens[None], packed=None, s_aux=torch.ones(4), use_cache=False)


def test_dropout_is_off_in_every_config(tmp_path):
    from fastppo.models.loading.policies import load_causal

    path = tiny.saved(tmp_path / "opt", tiny.causal("opt"))
    model = load_causal("actor.model", path, None, None, torch.float32, torch.device("cpu"))
    assert model.config.dropout == 0.0
    policy = Policy(model).train()
    assert torch.equal(policy(PACKED, objective), policy(PACKED, objective))


def test_tied_embeddings_stay_one_parameter():
    model = fuse_head(tiny.causal("llama", tie_word_embeddings=True))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    policy = Policy(model)
    policy(PACKED, objective).sum().backward()
    untied = fuse_head(tiny.causal("llama"))
    assert "lm_head.weight" in dict(untied.named_parameters())
    assert model.get_input_embeddings().weight.grad is not None


def test_a_fresh_value_head_says_zero_and_learns():
    policy = Policy(fuse_head(tiny.causal()), ValueHead(tiny.WIDTH, torch.float32, torch.device("cpu")))
    values = policy(PACKED, lambda p, hidden: p.value_head(hidden))
    assert values.tolist() == [0.0] * 7
    values.sum().backward()
    assert float(policy.value_head.weight.grad.abs().sum()) > 0


def test_a_separate_critic_shares_no_parameter_with_the_actor():
    model = fuse_head(tiny.causal())
    critic = Critic(copy_backbone(model), ValueHead(tiny.WIDTH, torch.float32, torch.device("cpu")))
    assert not {id(p) for p in critic.parameters()} & {id(p) for p in model.parameters()}


def trained(train):
    policy = Policy(fuse_head(tiny.causal()))
    set_trainable(policy, train)
    return {name for name, p in policy.model.named_parameters() if p.requires_grad}


def test_all_parameters_train_by_default():
    assert len(trained("all")) == len(list(tiny.causal().parameters()))


def test_the_upper_layers_train_with_the_final_norm_and_without_the_head():
    names = trained(2)
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"1", "2"}
    assert "model.norm.weight" in names and "lm_head.weight" not in names


def test_name_patterns_choose_parameters():
    assert {name.rsplit(".", 2)[-2] for name in trained("*.q_proj.weight, *.v_proj.weight")} == {"q_proj", "v_proj"}


@pytest.mark.parametrize(("train", "words"), [("*.nothing", "matches .*nothing"), (9, "has 3 layers")])
def test_a_choice_of_nothing_is_an_error(train, words):
    with pytest.raises(ModelError, match=words):
        trained(train)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recomputed_activations_give_the_same_gradients_bit_for_bit(family, dtype):
    """However many layers recompute, so that a run may be resumed where there is room for others."""

    def gradients(count):
        policy = Policy(fuse_head(tiny.causal(family, num_hidden_layers=3)).to(dtype))
        set_trainable(policy, "all")
        recompute_layers(policy.model, count)
        policy.train()(PACKED, objective).sum().backward()
        return [p.grad for p in policy.model.parameters()]

    plain = gradients(0)
    assert all(gradient is not None for gradient in plain)
    for count in (1, 2, 3):
        for kept, recomputed in zip(plain, gradients(count), strict=True):
            assert torch.equal(kept, recomputed)


@pytest.mark.parametrize(
    ("train", "count", "recomputing"), [("all", 2, {0, 1}), (2, 1, {0, 1}), (2, 2, {0, 1, 2}), ("all", 9, {0, 1, 2})]
)
def test_the_lowest_layers_that_the_backward_pass_goes_through_recompute(train, count, recomputing):
    """Frozen ones below may too: they keep nothing."""
    policy = Policy(fuse_head(tiny.causal(num_hidden_layers=3)))
    set_trainable(policy, train)
    recompute_layers(policy.model, count)
    layers = policy.train().model.model.layers
    assert {i for i, layer in enumerate(layers) if layer.gradient_checkpointing and layer.training} == recomputing
    hidden = policy.model.get_input_embeddings()(torch.tensor([1]))
    assert hidden.requires_grad == (train == "all")  # else frozen layers would be part of the graph
