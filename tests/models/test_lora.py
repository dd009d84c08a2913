"""LoRA: adapters train, nothing else does, and the actor with its adapters off is its own reference."""

import pytest
import tiny
import torch
from ppo_step import config_of, context_of, responses, roles_of, step
from test_load import load
from test_roles import PACKED, objective
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from fastppo.checkpoint.export import write_model
from fastppo.config import ActorLoraConfig, LoraConfig
from fastppo.data.batch import Moments
from fastppo.data.microbatches import plan_step
from fastppo.distributed.world import start_world
from fastppo.models.frozen_prefix import PrefixStates
from fastppo.models.loading.trained import set_trainable
from fastppo.models.lora import adapters_off, add_adapters, merged_state
from fastppo.models.roles import ModelError, Policy, fuse_head
from fastppo.ppo.experience import compute_experience
from fastppo.ppo.update import run_updates

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def world():
    return start_world(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.saved(tmp_path_factory.mktemp("model"), tiny.causal())


def adapted(family="llama", *, lora=None, train="all", learned=True, source="base", dtype=torch.float32, **settings):
    """A policy with adapters; `learned`: as after training, with B other than zero."""
    policy = Policy(fuse_head(tiny.causal(family, dtype=dtype, **settings)))
    set_trainable(policy, train)
    add_adapters(policy.model, "actor", lora or LoraConfig(rank=4, alpha=8.0), seed=3, source=source)
    if learned:
        torch.manual_seed(4)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return policy


def layers(policy):
    """Names of the linear layers that have an adapter."""
    return sorted({n.partition(".lora_")[0] for n, p in policy.model.named_parameters() if p.requires_grad})


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_all_linear_layers_get_adapters_and_head_and_embeddings_get_none(family):
    plain = fuse_head(tiny.causal(family))
    kinds = ("Linear", "Conv1D")
    expected = sorted(name for name, module in plain.named_modules() if type(module).__name__ in kinds)
    policy = adapted(family, learned=False)
    assert layers(policy) == expected and len(expected) % tiny.LAYERS == 0
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == {
        f"model.{name}.lora_{x}.default.weight" for name in expected for x in "AB"
    }


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_fresh_adapters_change_no_bit_and_learned_ones_can_be_turned_off(family):
    expected = Policy(fuse_head(tiny.causal(family)))(PACKED, objective)
    assert torch.equal(adapted(family, learned=False)(PACKED, objective), expected)
    policy = adapted(family)
    changed = policy(PACKED, objective)
    assert not torch.allclose(changed, expected, atol=1e-3)
    with adapters_off(policy.model):
        assert torch.equal(policy(PACKED, objective), expected)
    assert torch.equal(policy(PACKED, objective), changed)


SHARED_EXPERTS = {
    **{"family": "dots1", "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1},
    **{"topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32, "num_key_value_heads": 2},
}


def test_dense_layers_and_shared_experts_get_adapters_and_experts_none(tmp_path):
    """peft, told the type of the model, takes their names for those of the experts."""
    policy = adapted(**SHARED_EXPERTS)
    assert {name for name in layers(policy) if "experts" in name} == {
        f"model.layers.{i}.mlp.shared_experts.{name}_proj" for i in (1, 2) for name in ("down", "gate", "up")
    }
    assert "model.layers.0.mlp.gate_proj" in layers(policy) and policy.model.config.model_type == "dots1"
    again = AutoModelForCausalLM.from_pretrained(exported(policy, tmp_path, "merged"))
    torch.testing.assert_close(Policy(fuse_head(again))(PACKED, objective), policy(PACKED, objective))


@pytest.mark.parametrize(("targets", "read"), [("all-linear", False), ("gate_proj", False), ("q_proj,v_proj", True)])
def test_adapters_that_peft_would_load_onto_experts_are_not_exported_alone(targets, read):
    lora = ActorLoraConfig(rank=4, targets=targets, export="adapters")
    if read:
        assert len(layers(adapted(lora=lora, **SHARED_EXPERTS))) == 2 * tiny.LAYERS
        return
    words = "actor.lora.export is adapters, but peft would load adapters of Dots1ForCausalLM onto other weights"
    with pytest.raises(ModelError, match=words):
        adapted(lora=lora, **SHARED_EXPERTS)


def test_adapters_are_the_same_in_every_process_and_leave_other_random_numbers_alone():
    torch.manual_seed(1)
    one = adapted(learned=False)
    state = torch.get_rng_state()
    add_adapters(fuse_head(tiny.causal()), "actor", LoraConfig(rank=4), seed=3, source="base")
    torch.manual_seed(0)  # what tiny.causal leaves behind
    tiny.causal()
    assert torch.equal(torch.get_rng_state(), state)
    other = adapted(learned=False)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_adapters_have_the_models_dtype():
    assert {p.dtype for p in adapted(dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


# Which layers


@pytest.mark.parametrize(
    ("targets", "train", "names"),
    [
        ("q_proj,v_proj", "all", ["q_proj", "v_proj"] * 3),
        ("*.mlp.*", 1, ["down_proj", "gate_proj", "up_proj"]),
        ("all-linear", "*.layers.1.self_attn.*", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("model.layers.2.mlp.up_proj, o_proj", "*.layers.2.*", ["up_proj", "o_proj"]),
    ],
)
def test_targets_get_an_adapter_where_train_chooses_their_weights(targets, train, names):
    policy = adapted(lora=LoraConfig(rank=2, targets=targets), train=train)
    assert [name.rpartition(".")[2] for name in layers(policy)] == names
    if train == 1:
        assert all(".layers.2." in name for name in layers(policy))


@pytest.mark.parametrize(
    ("targets", "train", "words"),
    [
        ("q_proj,nothing", "all", "actor.lora.targets = q_proj,nothing: no linear layer of .* 'nothing'.*k_proj"),
        ("lm_head", "all", "'lm_head'.*vocabulary head"),
        ("q_proj", "*.mlp.*", "actor.lora.targets = q_proj names 3 .*actor.train makes none"),
    ],
)
def test_targets_that_leave_nothing_to_adapt_are_an_error(targets, train, words):
    with pytest.raises(ModelError, match=words):
        adapted(lora=LoraConfig(rank=2, targets=targets), train=train)


def test_layers_below_the_lowest_adapter_are_a_frozen_prefix(model):
    actor, _, reference = load(model, "--actor.lora.rank", "2", "--actor.train", "1")
    assert actor.prefix_depth == reference.prefix_depth == 2 and actor.prefix_owner == reference.prefix_owner
    whole, _, _ = load(model, "--actor.lora.rank", "2")
    assert whole.prefix_depth == 0


# Memory: whose weights are whose


def storages(*roles):
    return {p.data_ptr(): p.numel() for role in roles for p in role.parameters()}


def test_actor_and_reference_are_one_copy_of_the_weights(model):
    actor, _, reference = load(model, "--actor.lora.rank", "2", "--critic.kind", "shared")
    assert reference.model is actor.model and storages(reference).keys() <= storages(actor).keys()


def test_actor_reference_and_critic_with_adapters_are_one_copy_of_the_weights(model):
    actor, critic, reference = load(model, "--actor.lora.rank", "2", "--critic.lora.rank", "2")
    frozen = {p.data_ptr() for p in critic.parameters() if not p.requires_grad}
    assert frozen <= storages(actor).keys()
    whole = sum(p.numel() for p in tiny.causal().parameters())
    adapters = sum(p.numel() for role in (actor, critic) for p in role.parameters() if p.requires_grad)
    assert sum(storages(actor, critic, reference).values()) == whole + adapters
    assert not storages(actor).keys() & {p.data_ptr() for p in critic.parameters() if p.requires_grad}


def test_a_critic_with_adapters_beside_an_actor_without_has_weights_of_its_own(model):
    actor, critic, reference = load(model, "--critic.lora.rank", "2")
    assert not storages(actor, reference).keys() & storages(critic).keys()
    assert {n for n, p in critic.named_parameters() if p.requires_grad and "lora_" not in n} == {
        "value_head.weight",
        "value_head.bias",
    }


def test_a_reference_that_is_given_is_loaded_beside_the_adapters(model, tmp_path):
    other = tiny.saved(tmp_path, tiny.causal(seed=5))
    actor, _, reference = load(model, "--actor.lora.rank", "2", "--reference.model", other)
    assert not storages(actor).keys() & storages(reference).keys()


# Learning


def lora_settings(*more):
    return ["--actor.lora.rank", "4", "--actor.lr", "3e-2", *more]


def test_the_reference_stays_while_the_actor_learns(model, world):
    config = config_of(model, *lora_settings("--critic.lora.rank", "4", "--ppo.epochs", "2"))
    roles = roles_of(config, world)
    scored = responses(roles)
    plan = plan_step(scored.rollout.packed.lengths, config, 0, 1, roles.attention)
    context = context_of(config, roles, world)
    before = compute_experience(scored, Moments().add(scored.scores), plan[0], PrefixStates(), context)
    weights = {n: p.clone() for n, p in roles.policy.named_parameters()}
    updates = list(run_updates(before, plan, PrefixStates(), context))
    after = compute_experience(scored, Moments().add(scored.scores), plan[0], PrefixStates(), context)
    assert torch.equal(before.old_logprobs, before.ref_logprobs) and float(before.kl.abs().max()) == 0.0
    assert abs(updates[0].ratio_mean - 1) <= 1e-4 and updates[0].approx_kl <= 1e-6
    assert torch.equal(after.ref_logprobs, before.ref_logprobs)
    assert float((after.old_logprobs - before.old_logprobs).abs().max()) > 1e-3
    moved = {n for n, p in roles.policy.named_parameters() if not torch.equal(p, weights[n])}
    assert moved == {n for n in weights if "lora_" in n}
    assert float(after.values.abs().max()) > 0 and float(before.values.abs().max()) == 0


def test_a_shared_critics_value_head_learns_beside_the_adapters(model, world):
    settings = lora_settings("--critic.kind", "shared")
    learned = step(config_of(model, *settings), world).parameters
    still = step(config_of(model, *settings, "--actor.lr", "0", "--critic.lr", "0"), world).parameters
    moved = {n for n in learned if not torch.equal(learned[n], still[n])}
    # A's gradient is zero while B is
    assert moved == {n for n in learned if "lora_B" in n} | {"actor.value_head.weight", "actor.value_head.bias"}


@pytest.mark.parametrize("critic", [["--critic.lora.rank", "2"], ["--critic.kind", "shared"]], ids=["lora", "shared"])
def test_with_adapters_the_update_does_not_depend_on_the_microbatch_size(model, world, critic):
    settings = lora_settings(*critic, "--ppo.epochs", "2", "--ppo.kl_in", "loss", "--ppo.kl_kind", "exact")
    whole = step(config_of(model, *settings), world)
    small = ["--ppo.microbatch_tokens", "30", "--data.max_prompt_tokens", "15"]
    cut = step(config_of(model, *settings, *small), world)
    for name, parameter in whole.parameters.items():
        torch.testing.assert_close(cut.parameters[name], parameter, rtol=0, atol=5e-5)


def test_what_checkpointing_recomputes_has_the_adapters_on(model, world):
    """The reference's pass, adapters off, lies between forward and backward passes of the actor."""
    settings = lora_settings("--ppo.epochs", "3", "--ppo.kl_in", "loss", "--ppo.kl_kind", "exact", "--ppo.kl_coef", "5")
    kept = step(config_of(model, *settings), world)
    recomputed = step(config_of(model, *settings, "--optim.activation_checkpointing", "true"), world)
    assert abs(kept.updates[0].kl_loss) < 1e-12 and kept.updates[1].kl_loss > 1e-4
    for name, parameter in kept.parameters.items():
        torch.testing.assert_close(recomputed.parameters[name], parameter, rtol=0, atol=1e-6)


def test_an_update_is_the_one_of_whole_weights_that_move_along_the_adapters(world):
    """The gradient of B at B = 0 is scale * G A^T, G being that of the weight."""
    policy = adapted(learned=False)
    policy(PACKED, objective).sum().backward()
    plain = Policy(fuse_head(tiny.causal()))
    plain(PACKED, objective).sum().backward()
    q, a = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj.lora_A.default.weight"
    found = dict(policy.model.named_parameters())
    expected = 2.0 * dict(plain.model.named_parameters())[f"{q}.weight"].grad @ found[a].T
    torch.testing.assert_close(found[f"{q}.lora_B.default.weight"].grad, expected, rtol=1e-4, atol=1e-5)
    assert float(found[a].grad.abs().max()) == 0.0


def saved(roles, folder):
    def write(state, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)

    roles.actor.save(folder, "actor", write)
    return torch.load(folder / "actor/mp_rank_00_model_states.pt", weights_only=False)["module"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_holds_what_trains_and_fits_the_same_adapters_alone(world, tmp_path, tied):
    path = tiny.saved(tmp_path / "model", tiny.causal(tie_word_embeddings=tied))
    roles = roles_of(config_of(path, *lora_settings("--critic.kind", "shared")), world)
    trained = {n: p.clone() for n, p in roles.policy.named_parameters() if p.requires_grad}
    held = saved(roles, tmp_path)
    assert held.keys() - {"model.lm_head.weight"} == trained.keys()  # a tied weight is held by its second name
    assert ("model.lm_head.weight" in held) == tied
    with torch.no_grad():
        for name, parameter in roles.policy.named_parameters():
            if name in trained:
                parameter.add_(1)
    roles.actor.load(tmp_path, "actor")
    assert all(torch.equal(p, trained[n]) for n, p in roles.policy.named_parameters() if n in trained)
    fewer = ["--critic.kind", "shared", "--actor.lora.targets", "q_proj"]
    other = roles_of(config_of(path, *lora_settings(*fewer)), world)
    with pytest.raises(KeyError, match=r"weights that do not fit: .*lora_A"):
        other.actor.load(tmp_path, "actor")


# Export


def test_merged_weights_are_made_one_by_one_and_kept_on_the_host():
    """All of them beside the actor's own would be a second actor on the GPU, for which a run has no room at its end."""
    model = adapted().model
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = {name: torch.empty_like(x, device="cuda") for name, x in model.state_dict().items()}
        assert {x.device.type for x in state.values()} == {"cuda"}
        merged = merged_state(model, state)
    of_layers = {name: x.device.type for name, x in merged.items() if "_proj" in name}
    assert of_layers and set(of_layers.values()) == {"cpu"}


def exported(policy, folder, how):
    write_model(policy, tiny.tokenizer(), folder, ActorLoraConfig(rank=4, export=how))
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True}, {"family": "gpt2"}, {"family": "gemma2"}],
                         ids=["llama", "tied", "gpt2", "gemma2"])  # fmt: skip
@pytest.mark.parametrize("how", ["merged", "adapters"])
def test_what_is_exported_computes_what_the_actor_does(tmp_path, settings, how):
    import peft

    base = tiny.saved(tmp_path / "base", tiny.causal(**settings))
    policy = adapted(source=base, **settings)
    expected = policy(PACKED, objective)
    before = {n: p.clone() for n, p in policy.named_parameters()}
    folder = exported(policy, tmp_path / "out", how)
    if how == "merged":
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert not (folder / "adapter_config.json").exists()
        assert {n for n, _ in again.named_parameters()} == {n for n, _ in tiny.causal(**settings).named_parameters()}
    else:
        names = {p.name for p in folder.iterdir()}
        assert "model.safetensors" not in names and "tokenizer.json" in names
        again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).base_model.model
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder)  # it finds the base by itself
        assert torch.equal(logits(loaded), logits(again))
    found = Policy(fuse_head(again))(PACKED, objective)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(policy(PACKED, objective), expected)  # the actor could train on
    assert all(torch.equal(p, before[n]) for n, p in policy.named_parameters())
