"""An exported critic has the values that the trainer had, as transformers reads it and as the next critic starts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import quantized_models
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForTokenClassification, GPT2ForTokenClassification
from value_models import own_values, trainer_values

from fastppo.checkpoint.export import export_critic, write_critic
from fastppo.config.command_line import parse
from fastppo.data.packed import pack
from fastppo.distributed.world import start_world
from fastppo.models.critics import write
from fastppo.models.loading.policies import check_models, load_actor_tokenizer, load_policies, load_reward
from fastppo.models.roles import Critic, ModelError, Policy
from fastppo.online.progress import Progress
from fastppo.planner.machine import Machine
from fastppo.planner.plan import make_plan

CPU = torch.device("cpu")
SEQUENCES = ((5, 6, 7, 8, 9, 10, 11, 12), (9, 10), (11, 12, 13), (1, 2, 3))
PACKED = pack(SEQUENCES, [7, 1, 2, 2])
LORA = ("--actor.lora.rank", "4")
BOTH = (*LORA, "--critic.lora.rank", "2")
STARTS = {
    "llama": lambda folder: tiny.saved(folder, tiny.causal()),
    "tied": lambda folder: tiny.saved(folder, tiny.causal(tie_word_embeddings=True)),
    "qwen2": lambda folder: tiny.saved(folder, tiny.causal("qwen2")),
    "gpt2": lambda folder: tiny.saved(folder, tiny.causal("gpt2")),
    "experts": lambda folder: tiny.saved(folder, tiny.causal("mixtral")),
    "opt": lambda folder: tiny.saved(folder, tiny.causal("opt")),
    "FP8": lambda folder: quantized_models.saved_fp8(folder) and str(folder),
}


def load(path: str, *more: str, dtype: str = "fp32") -> Critic | Policy:
    """The role with the value head, as a run begins with it, after the checks of a run."""
    rewards = '[{"function": "a:b"}]'
    argv = ["--actor.model", path, "--optim.dtype", dtype, "--rewards", rewards, "--data.path", "x", *more]
    argv += ["--data.max_prompt_tokens", "40", "--sampling.max_new_tokens", "20"]
    config = parse(argv)
    check_models(config, load_actor_tokenizer(config))
    policy, critic, _ = load_policies(config, CPU)
    return policy if critic is None else critic


def trained(role: Critic | Policy) -> Critic | Policy:
    """With other weights than it began with, and a value head that is not zero."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in role.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
        role.value_head.bias.fill_(0.7)
    return role


def export(role: Critic | Policy, folder: Path) -> torch.Tensor:
    """The trainer's values; the critic is in `folder` then."""
    values = trainer_values(role, PACKED)
    write_critic(role, tiny.tokenizer(), folder, Progress(step=3))
    assert values.dtype == torch.float32 and len(values.unique()) > 6
    return values


@pytest.mark.parametrize(
    ("start", "more"),
    [
        *((start, ()) for start in STARTS),
        *((start, ("--critic.kind", "shared")) for start in ("llama", "qwen2", "gpt2", "experts", "opt")),
        *((start, BOTH) for start in ("llama", "gpt2", "opt")),
        *((start, (*LORA, "--critic.kind", "shared")) for start in ("llama", "gpt2", "opt")),
        ("qwen2", ("--critic.train", "1")),
    ],
    ids=str,
)
def test_an_exported_critic_has_the_values_of_the_trainer_and_the_next_one_starts_with_them(start, more, tmp_path):
    path = STARTS[start](tmp_path / "start")
    expected = export(trained(load(path, *more)), tmp_path / "critic")
    torch.testing.assert_close(own_values(tmp_path / "critic", PACKED), expected, rtol=1e-5, atol=1e-5)
    again = load(path, "--critic.model", str(tmp_path / "critic"))
    values = trainer_values(again, PACKED)
    if "lora" in " ".join(more):  # merged weights round otherwise than weights with adapters beside them
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(values, expected)
    export(again, tmp_path / "third")  # and it is a critic as any other: what is read is written again, bit for bit
    for file in (tmp_path / "critic").glob("*.safetensors"):
        one, other = (load_file(folder / file.name) for folder in (file.parent, tmp_path / "third"))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_in_bf16_a_head_that_is_computed_in_fp32_has_the_values_and_one_in_bf16_rounds_its_sums(tmp_path):
    path = tiny.saved(tmp_path / "start", tiny.causal())
    role = trained(load(path, dtype="bf16"))
    expected = export(role, tmp_path / "critic")
    assert {x.dtype for x in load_file(tmp_path / "critic/model.safetensors").values()} == {torch.bfloat16}
    # the states themselves are rounded otherwise by another attention: as much for both
    own = own_values(tmp_path / "critic", PACKED, torch.bfloat16, upcast=True)
    rounded = own_values(tmp_path / "critic", PACKED, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    # bf16 has 8 bits, and the sums on the way to a value are of about 1: the bias is 0.7
    torch.testing.assert_close(rounded.float(), own, rtol=2**-7, atol=2**-8)
    torch.testing.assert_close(own, expected, rtol=0, atol=0.02)
    again = load(path, "--critic.model", str(tmp_path / "critic"), dtype="bf16")
    assert torch.equal(trainer_values(again, PACKED), expected)


def test_a_folder_says_which_step_it_is_of_and_has_the_tokenizer(tmp_path):
    export(trained(load(tiny.saved(tmp_path / "start", tiny.causal()))), tmp_path / "critic")
    names = {path.name for path in (tmp_path / "critic").iterdir()}
    assert {"about.json", "config.json", "model.safetensors", "tokenizer.json"} <= names
    assert '"step": 3' in (tmp_path / "critic/about.json").read_text()


def test_a_family_without_a_token_classifier_is_told_of_and_its_head_keeps_the_bias(tmp_path, caplog):
    caplog.set_level("INFO", "fastppo")
    role = trained(load(tiny.saved(tmp_path / "start", tiny.causal("opt"))))
    form = write_critic(role, tiny.tokenizer(), tmp_path / "critic", Progress())
    assert "no token classifier for opt" in form and "AutoModel" in form and "value_head.safetensors" in form
    head = load_file(tmp_path / "critic/value_head.safetensors")
    assert torch.equal(head["weight"], role.value_head.weight) and torch.equal(head["bias"], role.value_head.bias)


def test_a_classifier_whose_head_has_no_bias_is_not_taken(tmp_path):
    path = tiny.saved(tmp_path / "start", tiny.causal(token_classification_bias=False))
    expected = export(trained(load(path)), tmp_path / "critic")
    assert (tmp_path / "critic/value_head.safetensors").exists()
    torch.testing.assert_close(own_values(tmp_path / "critic", PACKED), expected, rtol=1e-5, atol=1e-5)


def test_a_classifier_that_computes_more_than_its_head_is_not_taken(tmp_path, monkeypatch):
    """Found by computing one, since its modules do not show it."""
    path = tiny.saved(tmp_path / "start", tiny.causal("gpt2"))
    forward = GPT2ForTokenClassification.forward

    def squashed(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits.tanh()
        return output

    export(trained(load(path)), tmp_path / "plain")
    assert not (tmp_path / "plain/value_head.safetensors").exists()
    monkeypatch.setattr(GPT2ForTokenClassification, "forward", squashed)
    expected = export(trained(load(path)), tmp_path / "critic")
    assert (tmp_path / "critic/value_head.safetensors").exists()
    torch.testing.assert_close(own_values(tmp_path / "critic", PACKED), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match=r"critic.model = .*plain \(GPT2ForTokenClassification\) has no head that is"):
        load(path, "--critic.model", str(tmp_path / "plain"))


def test_a_critic_that_nothing_could_load_is_not_exported_and_ends_no_run(tmp_path, monkeypatch, caplog):
    role = load(tiny.saved(tmp_path / "start", tiny.causal("opt")))
    backbone = write._backbone

    def deeper(config, dtype):
        other = copy.deepcopy(config)
        other.num_hidden_layers += 1
        return backbone(other, dtype)

    monkeypatch.setattr(write, "_backbone", deeper)
    exported = export_critic(role, tiny.tokenizer(), tmp_path / "critic", Progress(), start_world(1))
    assert (
        exported.problem is None and "the trained critic is not exported: transformers would load a OPTM" in caplog.text
    )
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


def token_classifier(folder: Path, labels: int) -> str:
    config = tiny.causal().config
    config.num_labels = labels
    model = AutoModelForTokenClassification.from_config(config)
    model.score.bias.data.fill_(0.3)
    return tiny.saved(folder, model)


def test_a_token_classifier_with_more_labels_is_refused_before_its_weights_are_read(tmp_path):
    path = token_classifier(tmp_path / "critic", labels=3)
    (tmp_path / "critic/model.safetensors").unlink()
    actor = tiny.saved(tmp_path / "start", tiny.causal())
    words = r"critic.model = .* has 3 labels; a critic has one, the value. Start from a language model, or from a clas"
    with pytest.raises(ModelError, match=words):
        load(actor, "--critic.model", path)


def test_any_token_classifier_with_one_label_can_be_a_critic(tmp_path):
    path = token_classifier(tmp_path / "critic", labels=1)
    role = load(tiny.saved(tmp_path / "start", tiny.causal()), "--critic.model", path)
    linear = AutoModelForTokenClassification.from_pretrained(path).score
    assert torch.equal(role.value_head.weight, linear.weight) and torch.equal(role.value_head.bias, linear.bias)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda file: file.unlink(), r"its config names the value head value_head.safetensors, and this file could no"),
        (lambda file: file.write_bytes(b"no"), r"this file could not be read"),
        (lambda file: save_file({"bias": torch.zeros(1)}, file), r"no `weight` of shape \(1, width\)"),
    ],
)
def test_a_value_head_that_is_not_there_is_an_error(tmp_path, spoil, words):
    path = tiny.saved(tmp_path / "start", tiny.causal("opt"))
    export(trained(load(path)), tmp_path / "critic")
    spoil(tmp_path / "critic/value_head.safetensors")
    with pytest.raises(ModelError, match=rf"critic.model = {tmp_path}/critic: .*{words}"):
        load(path, "--critic.model", str(tmp_path / "critic"))


@pytest.mark.parametrize("start", ["tied", "opt"])
def test_a_critic_is_no_language_model_and_no_reward_model(start, tmp_path):
    """Its files have all weights of a language model where the vocabulary head is the embeddings."""
    path = STARTS[start](tmp_path / "start")
    export(trained(load(path)), tmp_path / "critic")
    for setting in ("actor", "reference"):
        words = rf"{setting}.model = {tmp_path}/critic is a \w+ and no language model.*actor/"
        with pytest.raises(ModelError, match=words):
            load(path, f"--{setting}.model", str(tmp_path / "critic"))
    with pytest.raises(ModelError, match=r"rewards.model = .*critic gives a number to each token.* is no reward model"):
        load_reward(str(tmp_path / "critic"), torch.float32, CPU)


@pytest.mark.parametrize("start", ["qwen2", "opt"])
def test_a_run_that_starts_from_an_exported_critic_is_planned_as_one_that_starts_from_its_actor(start, tmp_path):
    path = STARTS[start](tmp_path / "start")
    export(trained(load(path)), tmp_path / "critic")
    found = []
    for more in ([], ["--critic.model", str(tmp_path / "critic")]):
        argv = ["--actor.model", path, "--rewards", '[{"function": "a:b"}]', "--data.path", "x", *more]
        plan = make_plan(parse(argv), Machine(1, 1, None, 1 << 40))
        found.append([(share.role, share.phase, share.places) for share in plan.shares])
    assert found[0] == found[1] and "critic" in {role for role, _, _ in found[0]}
