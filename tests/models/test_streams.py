"""Weights from safetensors into the parts of ZeRO-3, on several ranks (`stream_ranks`)."""

import json

import memory
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from fastppo.models.loading.policies import load_causal, load_reward
from fastppo.models.loading.streams import partition_config
from fastppo.models.roles import ModelError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def on_ranks(forks):
    def run(name, *arguments, ranks=2):
        call = f"{name}({', '.join(repr(str(a)) for a in arguments)})"
        forks.run([], ranks, before=f"import stream_ranks; stream_ranks.{call}; raise SystemExit(0)")

    return run


def change(folder, edit):
    """Edit the tensors of a folder's model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def moe():
    """A mixture of experts, whose files hold each expert by itself."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", vocab_size=257, **shape, **experts))


def load(path):
    return load_causal("actor.model", str(path), None, None, torch.float32, CPU, partition_config("fp32"))


def test_every_family_is_what_transformers_loads_in_parts_that_do_not_divide_evenly(tmp_path, on_ranks):
    for family in tiny.FAMILIES:
        tiny.saved(tmp_path / family, tiny.causal(family))
    on_ranks("families", tmp_path, ranks=3)


def test_names_layouts_and_ties_are_those_that_transformers_knows(tmp_path, on_ranks):
    tiny.saved(tmp_path / "tied", tiny.causal(tie_word_embeddings=True))
    tiny.saved(tmp_path / "tied_in_the_config_alone", tiny.causal())
    config = tmp_path / "tied_in_the_config_alone" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    tiny.saved(tmp_path / "tied_and_twice", tiny.causal(tie_word_embeddings=True))
    change(tmp_path / "tied_and_twice", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    tiny.saved(tmp_path / "tied_by_the_head", tiny.causal(tie_word_embeddings=True))
    change(tmp_path / "tied_by_the_head", lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    tiny.saved(tmp_path / "without_prefix", tiny.causal(tie_word_embeddings=True).base_model)
    tiny.saved(tmp_path / "classifier", tiny.classifier())
    many = tiny.causal("llama")
    many.save_pretrained(tmp_path / "several_files", max_shard_size="50KB")
    tiny.saved(tmp_path / "experts_one_by_one", moe())
    assert any(".experts.3.gate_proj" in key for key in load_file(tmp_path / "experts_one_by_one/model.safetensors"))
    on_ranks("layouts", tmp_path)


def test_without_safetensors_the_ordinary_loader_is_taken_and_the_log_says_so(tmp_path, on_ranks):
    model = tiny.causal()
    tiny.saved(tmp_path, model)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    on_ranks("no_safetensors", tmp_path)


def test_the_roles_of_stage_3_are_those_of_stage_1(tmp_path, on_ranks):
    model = tiny.saved(tmp_path / "model", tiny.causal(tie_word_embeddings=True))
    on_ranks("roles", model, tiny.saved(tmp_path / "reward", tiny.classifier()))


def test_an_update_at_stage_3_is_that_of_stage_0(tmp_path, on_ranks):
    tiny.saved(tmp_path / "tied", tiny.causal(tie_word_embeddings=True))
    tiny.saved(tmp_path / "gemma2", tiny.causal("gemma2"))
    on_ranks("updates", tmp_path)


def test_loading_adds_at_most_seven_tenths_of_the_model_to_a_rank(tmp_path, on_ranks):
    path = memory.saved_llama(tmp_path / "model", megabytes=200)
    on_ranks("memory", path, "bf16", tmp_path)
    shares = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for peak, end in shares:
        assert 0.5 <= end <= peak <= 0.7, shares


def test_a_parameter_that_no_file_has_is_named(tmp_path):
    tiny.saved(tmp_path, tiny.causal())
    change(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"actor.model = .*1 parameters of Llama.*: model.layers.1.mlp.up_proj.weight"):
        load(tmp_path)


def test_a_language_model_is_no_reward_model(tmp_path):
    tiny.saved(tmp_path, tiny.causal())
    with pytest.raises(ModelError, match=r"rewards.model = .* is a LlamaForCausalLM and no reward model"):
        load_reward(str(tmp_path), torch.float32, CPU, partition_config("fp32"))


def test_a_tensor_of_another_shape_is_named(tmp_path):
    tiny.saved(tmp_path, tiny.causal())
    change(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(ModelError, match=r"model.norm.weight has \(31,\), not \(32,\)"):
        load(tmp_path)


def test_an_expert_that_no_file_has_is_an_error(tmp_path, on_ranks):
    tiny.saved(tmp_path, moe())
    change(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.experts.2.down_proj.weight"))
    on_ranks("refused", tmp_path, r"actor.model = .*layers.1.mlp.experts.down_proj.* has the shape \(3,", ranks=1)


def test_a_damaged_file_is_an_error_of_one_line(tmp_path):
    tiny.saved(tmp_path, tiny.causal())
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"actor.model = .* could not be loaded"):
        load(tmp_path)


def test_a_missing_file_of_several_is_an_error(tmp_path):
    tiny.causal().save_pretrained(tmp_path, max_shard_size="50KB")
    next(tmp_path.glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(ModelError, match=r"actor.model = "):
        load(tmp_path)
