"""Where a model is asked for and is none that can be trained: told before anything loads, whichever role wants it."""

import json

import pytest
import quantized_models
import tiny
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from fastppo.config import Config
from fastppo.config.command_line import REWARD, SFT, parse
from fastppo.errors import FastPPOError
from fastppo.models.loading.offline import model_source
from fastppo.models.loading.policies import actor_context, check_models, load_actor_tokenizer
from fastppo.models.loading.quantized import UNPACKED
from fastppo.models.loading.source import Source
from fastppo.models.loading.weights import load_config, load_tokenizer
from fastppo.planner.machine import Machine
from fastppo.planner.plan import make_plan

HERE = Machine(1, 1, None, 1 << 40)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tiny.saved(tmp_path_factory.mktemp("good"), tiny.causal())


def ppo(actor, *settings, rewards='[{"function": "a:b"}]'):
    sizes = ["--data.max_prompt_tokens", "16", "--sampling.max_new_tokens", "16", "--data.path", "x"]
    return parse(["--actor.model", actor, "--rewards", rewards, *sizes, *settings])


# role -> the config of a run in which a model at this path has it, the model of the others being good
ROLES = {
    "actor": lambda path, good: ppo(path),
    "critic": lambda path, good: ppo(good, "--critic.model", path),
    "reference": lambda path, good: ppo(good, "--reference.model", path),
    "rewards": lambda path, good: ppo(good, rewards=json.dumps([{"model": path}])),
    "ensemble": lambda path, good: ppo(good, rewards=json.dumps([{"ensemble": [path, path]}])),
    "judge": lambda path, good: ppo(good, "--health.judge", json.dumps([{"model": path}])),
    "train_sft": lambda path, good: parse(["--model.path", path, "--data.path", "x"], SFT),
    "train_reward": lambda path, good: parse(["--model.path", path, "--data.path", "x"], REWARD),
}


def refusal(role, path, good, *, checked=True):
    """What a run says whose model of this role is at `path`: by its planner, and where that is off by its checks."""
    config = ROLES[role](path, good)
    with pytest.raises(FastPPOError) as told:
        make_plan(config, HERE)
    if not checked:
        return str(told.value)
    with pytest.raises(FastPPOError) as again:
        checks_without_a_plan(config)
    assert str(again.value) == str(told.value)
    return str(told.value)


def checks_without_a_plan(config):
    """What a run with `--plan off` looks at before its prompts and weights, in `run.set_up` and `loop.set_up`."""
    if isinstance(config, Config):
        tokenizer, _ = load_actor_tokenizer(config), actor_context(config)
        check_models(config, tokenizer)
    else:
        load_tokenizer("model.path", config.model.path)
        load_config(model_source(config.model))


def quantized(folder, model, quantization):
    path = tiny.saved(folder, model)
    (folder / "model.safetensors").unlink()  # nothing is read
    quantized_models.says(folder, quantization)
    return path


@pytest.mark.parametrize("role", ROLES)
def test_quantised_weights_that_cannot_be_unpacked_are_refused_by_name_in_every_role(role, good, tmp_path):
    model = tiny.classifier() if role in ("rewards", "ensemble", "judge") else tiny.causal()
    text = refusal(role, quantized(tmp_path, model, {"quant_method": "gptq", "bits": 4}), good)
    assert "is quantised (gptq), and weights of this form cannot be trained. Give the checkpoint" in text


@pytest.mark.slow
@pytest.mark.parametrize("method", AUTO_QUANTIZATION_CONFIG_MAPPING)
def test_every_form_that_transformers_has_is_unpacked_or_refused(method, good, tmp_path):
    said = {"quant_method": method, "weight_block_size": [16, 16]}
    if method.startswith("bitsandbytes"):
        said = {"quant_method": "bitsandbytes", f"load_in_{method[-4]}bit": True}
    path = quantized(tmp_path, tiny.causal(), said)
    if method in UNPACKED:
        assert make_plan(ROLES["actor"](path, good), HERE).shares
        return
    assert f"actor.model = {path} is quantised ({method})" in refusal("actor", path, good)


def test_the_package_that_dequantises_is_named_where_it_is_missing(good, tmp_path, monkeypatch):
    path = quantized(tmp_path, tiny.causal(), {"quant_method": "bitsandbytes", "load_in_4bit": True})
    missing, there = "which is not installed (pip install bitsandbytes): Auto", "dequantise it first: AutoModel"
    for module, words in ((None, missing), ("yes", there)):
        monkeypatch.setattr("fastppo.models.loading.quantized.find_spec", lambda name, module=module: module)
        assert words in refusal("actor", path, good)


@pytest.mark.parametrize("said", [{"quant_method": "made-up"}, {}])
def test_a_form_that_nobody_knows_is_refused_too(said, good, tmp_path):
    path = quantized(tmp_path, tiny.causal(), {"bits": 3} | said)
    assert f"is quantised ({said.get('quant_method', 'an unknown form')})" in refusal("actor", path, good)


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("role", ROLES)
def test_an_adapter_is_no_model_and_the_message_says_how_to_merge_it(role, with_config, good, tmp_path):
    """With a config.json beside it transformers would load the model that the adapter names, and put it on."""
    tiny.tokenizer().save_pretrained(tmp_path)
    if with_config:
        tiny.saved(tmp_path, tiny.causal())
    said = {"base_model_name_or_path": "some/base", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    text = refusal(role, str(tmp_path), good)
    assert "contains an adapter (adapter_config.json) for some/base and no model. Merge it: peft.Auto" in text


@pytest.mark.parametrize("role", ROLES)
def test_code_that_comes_with_weights_is_not_run_and_the_message_says_so(role, good, tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path)
    said = {"model_type": "their-own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(said))
    (tmp_path / "configuration_own.py").write_text("raise SystemExit('run')\n")
    text = refusal(role, str(tmp_path), good)
    assert (
        "contains Python code (auto_map in its config), and fastppo does not run code that comes with weights. Use"
        in text
    )


def test_a_model_that_transformers_has_is_taken_though_it_brings_code_too(good, tmp_path):
    path = tiny.saved(tmp_path, tiny.causal())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "configuration_own.Own"}}))
    assert make_plan(ROLES["actor"](path, good), HERE).shares


def test_a_repository_with_a_config_and_an_adapter_holds_an_adapter(monkeypatch, tmp_path):
    """Of which transformers would load the model that the adapter names, and put the adapter on it."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    asked = []

    def cached(name, file, **_):
        asked.append((name, file))
        return str(tmp_path / file)

    monkeypatch.setattr("fastppo.models.loading.source.cached_file", cached)
    monkeypatch.setattr(
        "fastppo.models.loading.weights.AutoConfig.from_pretrained", lambda *_, **__: tiny.causal().config
    )
    with pytest.raises(
        FastPPOError, match=r"actor.model = owner/both contains an adapter .* for some/base and no model"
    ):
        load_config(Source("actor.model", "owner/both"))
    assert asked == [("owner/both", "adapter_config.json")]


def test_a_family_without_a_classifier_trains_no_reward_model(good, tmp_path):
    import families

    families.save("ernie4_5", tmp_path)
    assert "Ernie4_5ForCausalLM has no sequence classifier with a `score` head in transformers. Train a" in refusal(
        "train_reward", str(tmp_path), good, checked=False
    )
