"""What a run exports is what it trained: loaded again by transformers it says the same, whatever it was loaded from."""

import copy
import json
from pathlib import Path

import pytest
import quantized_models
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastppo import ops
from fastppo.checkpoint.export import write_model
from fastppo.config import ActorLoraConfig
from fastppo.config.command_line import REWARD, parse
from fastppo.data.packed import pack
from fastppo.models.loading.offline import load_reward_model
from fastppo.models.loading.policies import load_causal
from fastppo.models.loading.source import Source
from fastppo.models.loading.trained import choose_trained
from fastppo.models.loading.weights import load_config, load_model
from fastppo.models.roles import ModelError, Policy

CPU = torch.device("cpu")
SEQUENCES = ((5, 6, 7, 8, 9, 10, 11, 12), (9, 10), (11, 12, 13), (1, 2, 3))
PACKED = pack(SEQUENCES, [7, 1, 2, 2])

# name -> (how it is saved, the dtype of the run)
STARTS = {
    "plain": (lambda folder: tiny.saved(folder, tiny.causal()), "fp32"),
    "tied": (lambda folder: tiny.saved(folder, tiny.causal(tie_word_embeddings=True)), "fp32"),
    "gpt2": (lambda folder: tiny.saved(folder, tiny.causal("gpt2")), "fp32"),
    "experts": (lambda folder: tiny.saved(folder, tiny.causal("mixtral")), "fp32"),
    "FP8": (quantized_models.saved_fp8, "fp32"),
    "FP8 in bf16": (quantized_models.saved_fp8, "bf16"),
    "FP8, tied": (lambda folder: quantized_models.saved_fp8(folder, tie_word_embeddings=True), "fp32"),
    "FP8 experts": (lambda folder: quantized_models.saved_fp8(folder, "qwen3_moe"), "fp32"),
    "MXFP8": (quantized_models.saved_mxfp8, "fp32"),
    "GGUF": (quantized_models.saved_gguf, "fp32"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def loaded(start: str, folder: Path) -> Policy:
    save, dtype = STARTS[start]
    made = save(folder)
    file = made if start == "GGUF" else None
    return Policy(load_causal("actor.model", str(folder), file, None, DTYPES[dtype], CPU))


def trained(policy: Policy) -> Policy:
    """With other weights than it was loaded with: by a step in a random direction, not a small one."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    return policy


@torch.no_grad()
def logprobs(policy: Policy) -> torch.Tensor:
    return policy(PACKED, lambda p, hidden: p.head(hidden, ops.linear_logprobs, PACKED.responses).logprobs)


@torch.no_grad()
def own_logprobs(model) -> torch.Tensor:
    rows = []
    for sequence, count in zip(SEQUENCES, PACKED.response_lengths.tolist(), strict=True):
        tokens = torch.tensor([sequence])
        said = model(tokens, use_cache=False).logits[0, -count - 1 : -1].float().log_softmax(-1)
        rows.append(said.gather(1, tokens[0, -count:, None])[:, 0])
    return torch.cat(rows)


def assert_plain(folder: Path, dtype: torch.dtype) -> None:
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    found = load_file(folder / "model.safetensors")
    assert {x.dtype for x in found.values()} == {dtype}
    assert not [name for name in found if "scale" in name]


@pytest.mark.parametrize("start", STARTS)
def test_an_export_loaded_again_says_what_the_trained_model_says(start, tmp_path):
    policy = trained(loaded(start, tmp_path / "start"))
    expected = logprobs(policy)
    write_model(policy, tiny.tokenizer(), tmp_path / "out", ActorLoraConfig())
    dtype = DTYPES[STARTS[start][1]]
    assert_plain(tmp_path / "out", dtype)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype, attn_implementation="eager")
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(own_logprobs(again.eval()), expected.float(), rtol=0, atol=tolerance)
    ours = Policy(load_causal("actor.model", str(tmp_path / "out"), None, None, dtype, CPU))
    assert torch.equal(logprobs(ours), expected)  # so the next run starts from it, and not from something near


@pytest.mark.parametrize("start", ["plain", "tied", "FP8", "GGUF"])
@pytest.mark.parametrize("how", ["merged", "adapters"])
def test_adapters_exported_either_way_say_what_the_trained_model_says(start, how, tmp_path):
    import peft

    policy = loaded(start, tmp_path / "start")
    config = parse(
        ["--actor.model", str(tmp_path / "start"), "--rewards", '[{"function": "a:b"}]', "--data.path", "x",
         "--actor.lora.rank", "4", "--actor.lora.export", how]
    ).actor  # fmt: skip
    choose_trained(policy, "actor", config, config.model, None, 0)
    expected = logprobs(trained(policy))
    write_model(policy, tiny.tokenizer(), tmp_path / "out", config.lora)
    if how == "merged":
        assert_plain(tmp_path / "out", torch.float32)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    else:
        file = {"gguf_file": "tiny.gguf"} if start == "GGUF" else {}
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32, **file)
        again = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    torch.testing.assert_close(own_logprobs(again.eval()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", ["plain", "FP8", "GGUF"])
def test_a_reward_model_exported_scores_as_it_did(start, tmp_path):
    loaded(start, tmp_path / "start")
    arguments = ["--model.path", str(tmp_path / "start"), "--data.path", "x", "--optim.dtype", "fp32"]
    if start == "GGUF":
        arguments += ["--model.gguf_file", "tiny.gguf"]
    config = parse(arguments, REWARD)
    scorer = trained(load_reward_model(config.model, config.optim, 0, CPU))
    with torch.no_grad():
        expected = scorer(PACKED)
    write_model(scorer, tiny.tokenizer(), tmp_path / "out", config.model.lora)
    assert_plain(tmp_path / "out", torch.float32)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    again.config.pad_token_id = None
    with torch.no_grad():
        found = torch.stack([again(torch.tensor([s])).logits[0, 0] for s in SEQUENCES])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_fp8_weights_are_unpacked_by_their_scales(tmp_path):
    policy = loaded("FP8", tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    scales = files[f"{name}_scale_inv"].repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert torch.equal(policy.model.get_parameter(name), files[name].float() * scales)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_experts_in_mxfp4_are_plain_weights_in_the_runs_dtype_and_saved_so(dtype, tmp_path, monkeypatch):
    """Loaded alone: GPT-OSS's attention, with its sinks, is none that packed rows have."""
    path = quantized_models.saved_mxfp4(tmp_path / "start")
    monkeypatch.setattr(
        "fastppo.models.loading.weights.check_architecture", lambda *_: None
    )  # which refuses it for that
    model = load_model(AutoModelForCausalLM, Source("actor.model", path), dtype, CPU, None)
    assert {p.dtype for p in model.parameters()} == {dtype}
    model.save_pretrained(tmp_path / "out")
    assert_plain(tmp_path / "out", dtype)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    assert torch.equal(own_logprobs(again), own_logprobs(model))


def test_scales_that_the_config_does_not_tell_of_are_an_error(tmp_path):
    """Without them float8 weights are other weights: cast as they are, they would train on without a word."""
    quantized_models.saved_fp8(tmp_path)
    quantized_models.says(tmp_path, None)
    with pytest.raises(
        ModelError, match=r"actor.model = .*: its files contain .*proj.weight_scale_inv beside quantised"
    ):
        load_causal("actor.model", str(tmp_path), None, None, torch.float32, CPU)


def test_a_copy_is_exported_as_its_original(tmp_path):
    """The reference and a critic start as copies of the actor."""
    policy = loaded("FP8", tmp_path / "start")
    twin = Policy(copy.deepcopy(policy.model))
    write_model(twin, tiny.tokenizer(), tmp_path / "out", ActorLoraConfig())
    assert_plain(tmp_path / "out", torch.float32)


def test_the_config_of_a_checkpoint_that_is_unpacked_is_a_plain_one(tmp_path):
    quantized_models.saved_fp8(tmp_path)
    assert not hasattr(load_config(Source("actor.model", str(tmp_path))), "quantization_config")
