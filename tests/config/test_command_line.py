"""The command line: where settings come from, and what a mistake is told."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastppo.config import Config, RewardConfig
from fastppo.config.command_line import DPO, GENERATE, PPO, REST, REWARD, SFT, dump, parse

QUICKSTART = ["--config", "quickstart"]


def message(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one message on stderr that the arguments are refused with."""
    with pytest.raises(SystemExit) as exit:
        parse(list(arguments))
    printed = capsys.readouterr()
    assert exit.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("fastppo: ") and printed.err.count("\n") == 1
    return printed.err.strip()


def test_what_comes_later_wins(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("steps: 7\nppo:\n  kl_coef: 0.2\n  epochs: 3\n")
    config = parse([*QUICKSTART, "--config", str(file), "--ppo.kl_coef", "0.1"])
    assert (config.steps, config.ppo.kl_coef, config.ppo.epochs, config.ppo.batch_size) == (7, 0.1, 3, 32)
    assert parse([*QUICKSTART, "--steps", "2", "--config", str(file)]).steps == 7


def test_every_kind_of_value_comes_from_the_command_line():
    rewards = '[{"function": "a:b"}, {"model": "m", "weight": 0.5}]'
    given = ["--rewards", rewards, "--ppo.value_clip=null", "--track.profile_steps", "[1, 2]", "--zero.stage", "1"]
    given += ["--data.template", '{"enable_thinking": false, "date": "1 May"}']
    given += ["--sampling.stop_tokens", '["###"]', "--data.shuffle", "false", "--actor.lr", "1e-6"]
    given += ["--actor.train", "all", "--optim.betas", "[0.8, 0.9]", "--threads", "2"]
    config = parse([*QUICKSTART, *given])
    assert config.rewards == (RewardConfig(function="a:b"), RewardConfig(model="m", weight=0.5))
    assert config.ppo.value_clip is None
    assert config.track.profile_steps == (1, 2)
    assert config.sampling.stop_tokens == ("###",)
    assert config.data.template == {"enable_thinking": False, "date": "1 May"}
    assert config.data.shuffle is False
    assert (config.actor.lr, config.actor.train) == (1e-6, "all")
    assert config.optim.betas == (0.8, 0.9)
    assert (config.zero.stage, config.threads) == (1, 2)
    assert parse([*QUICKSTART, "--actor.train", "4"]).actor.train == 4


def test_a_dumped_config_reads_back_as_itself(tmp_path):
    rewards = '[{"function": "a:b"}, {"model": "naïve", "weight": 0.5}]'
    config = parse([*QUICKSTART, "--rewards", rewards, "--sampling.stop_tokens", '["1", "null"]', "--actor.lr=1e-7"])
    (tmp_path / "config.yaml").write_text(dump(config), encoding="utf-8")
    assert parse(["--config", str(tmp_path / "config.yaml")]) == config


def test_the_launchers_local_rank_is_ignored():
    assert parse(["--local_rank=1", *QUICKSTART]) == parse(QUICKSTART)


def test_the_rules_are_checked_for_the_number_of_ranks(capsys, monkeypatch):
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "17", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert "17 ranks" in message(capsys, *QUICKSTART)


def test_one_rank_speaks_for_all(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        parse([])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ppo.kl_coeff", "1"], ["unknown setting ppo.kl_coeff; did you mean ppo.kl_coef?"]),
        (["--ppo.kl_coeff=1"], ["unknown setting ppo.kl_coeff; did you mean ppo.kl_coef?"]),
        (["--ppo.kl_c", "1"], ["unknown setting ppo.kl_c; did you mean ppo.kl_coef?"]),
        (["--kl_coef", "1"], ["unknown setting kl_coef; did you mean ppo.kl_coef?"]),
        (["--lr", "1"], ["unknown setting lr; did you mean actor.lr or critic.lr?"]),
        (["--qqqq", "1"], ["unknown setting qqqq", "--help"]),
        (["--rewards", '[{"functon": "a:b"}]'], ["unknown setting rewards.functon; did you mean rewards.function?"]),
        (["--rewards.function", "a:b"], ["rewards is a list", '--rewards \'[{"function"']),
        (["--ppo", "{kl_coef: 1}"], ["--ppo is a group", "--ppo.batch_size"]),
        (["--ppo.kl_kind", "k8"], ["ppo.kl_kind is k8; it must be k1 or k2 or k3 or exact."]),
        (["--zero.stage", "4"], ["zero.stage is 4; it must be 0 or 1 or 2 or 3."]),
        (["--steps", "x"], ["steps is x; it must be a whole number."]),
        (["--steps", "1e3"], ["steps is 1000.0; it must be a whole number."]),
        (["--steps", "null"], ["steps is null; it must be a whole number."]),
        (["--steps="], ["steps is empty; it must be a whole number."]),
        (["--steps"], ["--steps", "expected one argument"]),
        (["--seed", "true"], ["seed is true; it must be a whole number."]),
        (["--ppo.value_clip", "x"], ["ppo.value_clip is x; it must be a number or null."]),
        (["--data.shuffle", "3"], ["data.shuffle is 3; it must be true or false."]),
        (["--data.template", "x"], ["data.template is x; it must be a mapping from names to values, as in"]),
        (["--data.template.a", "1"], ["unknown setting data.template.a; did you mean data.template?"]),
        (["--track.profile_steps", "[1, b]"], ["track.profile_steps is b; it must be a list of whole numbers."]),
        (["--optim.betas", "[1]"], ["optim.betas is [1]; it must be a list of 2 numbers."]),
        (["--rewards", "a:b"], ["rewards is a:b; it must be a list of mappings with function, model, "]),
        (["--health.alarms", '[{"level": 1}]'], ["an item of health.alarms lacks figure, which has no default."]),
        (["--health.alarms", '[{"figure": "bleu"}]'], ["health.alarms.figure is bleu; it must be entropy or"]),
        (["--rewards", '[{"weight": "w"}]'], ["rewards.weight is w; it must be a number."]),
        (["quickstart"], ["unrecognized arguments: quickstart"]),
        (["--config", "nope"], ["--config nope", "no such file", "The presets: 1.3b, ", "quickstart"]),
        (["--config", "."], ["--config .", "cannot be read"]),
        (["--ppo.batch_size", "33"], ["ppo.batch_size is 33", "ppo.minibatches 2"]),
    ],
)
def test_a_mistake_on_the_command_line_gets_one_clear_message(capsys, arguments, words):
    said = message(capsys, *QUICKSTART, *arguments)
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("command", "setting", "words"),
    [
        (REST, "ppo.importance", "unknown setting ppo.importance, which belongs to fastppo train; --help lists"),
        (DPO, "ppo.importance", "unknown setting ppo.importance, which belongs to fastppo train; --help lists"),
        (GENERATE, "ppo.importance", "unknown setting ppo.importance, which belongs to fastppo train; --help lists"),
        (REST, "ppo.epochs", "which belongs to fastppo train; did you mean improve.epochs?"),
        (REST, "sampling.until_informative", "sampling.until_informative, which belongs to fastppo train;"),
        (GENERATE, "sampling.until_informative", "sampling.until_informative, which belongs to fastppo train;"),
        (REST, "rollout.partial_tokens", "rollout.partial_tokens, which belongs to fastppo train;"),
        (GENERATE, "rollout.partial_tokens", "rollout.partial_tokens, which belongs to fastppo train;"),
        (SFT, "sampling.top_p", "which belongs to fastppo train, fastppo rest, fastppo generate; --help lists"),
        (PPO, "grow.prompts", "which belongs to fastppo rest;"),
    ],
)
def test_a_setting_of_another_command_is_named_with_its_command(capsys, command, setting, words):
    with pytest.raises(SystemExit, match="2"):
        parse([f"--{setting}", "1"], command)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("steps: 3\nppo:\n  kl_coeff: 1\n", 3, "unknown setting ppo.kl_coeff; did you mean ppo.kl_coef?"),
        ("steps: 3\nkl_coef: 1\n", 2, "unknown setting kl_coef; did you mean ppo.kl_coef?"),
        ("rewards:\n- function: a:b\n- wieght: 1\n", 3, "unknown setting rewards.wieght; did you mean rewards.weight?"),
        ("local_rank: 1\n", 1, "unknown setting local_rank"),
        ("steps: 3\n  seed: [\n", 2, "not YAML"),
        ('steps: "3\n', 2, "not YAML"),
        ("steps: 3\nsteps: 4\n", 2, "steps is set twice"),
        ("ppo: 3\n", 1, "ppo is a group of settings"),
        ("ppo: other.yaml\n", 1, "ppo is a group of settings"),
        ("- steps\n", 1, "mapping"),
        ("", 1, "mapping"),
    ],
)
def test_a_broken_file_is_named_with_its_line(capsys, tmp_path, text, line, words):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    said = message(capsys, *QUICKSTART, "--config", str(file))
    assert f"{file}, line {line}: " in said and words in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps:\nseed: 3\n", "steps is null; it must be a whole number."),
        ("ppo:\n  kl_kind: k8\n", "ppo.kl_kind is k8; it must be k1 or k2 or k3 or exact."),
        ("rewards:\n- weight: heavy\n", "rewards.weight is heavy; it must be a number."),
        ("actor:\n  train: 0.5\n", "actor.train is 0.5; it must be a whole number or a text."),
    ],
)
def test_a_wrong_value_in_a_file_is_told_what_is_allowed(capsys, tmp_path, text, words):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert words in message(capsys, *QUICKSTART, "--config", str(file))


@pytest.mark.parametrize("command", [PPO, REWARD, SFT, DPO], ids=lambda command: command.script)
def test_help_explains_every_setting(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit:
        parse(["--help"], command)
    assert exit.value.code == 0
    text = capsys.readouterr().out
    options = dict(part.split(None, 1) for part in text.split("\n  --")[1:])
    shown = [name for name in command.settings if name.rpartition(".")[0] not in command.lists]
    for name in shown:
        explanation = " ".join(options[name].split())
        assert "default: " in explanation, name
        assert len(explanation.partition("(type:")[0].split()) > 3, name  # more than a placeholder for the value
    assert set(options) == {*shown, "config", "print_config", *(f"{name}.help" for name in command.lists)}
    assert "local_rank" not in text and f"usage: deepspeed {command.script} --config" in text


def test_settings_and_groups_are_those_of_the_config():
    def groups(config: Any, prefix: str = "") -> set[str]:
        inner = {f"{prefix}{name}": part for name, part in vars(config).items() if dataclasses.is_dataclass(part)}
        return set(inner).union(*(groups(part, f"{name}.") for name, part in inner.items()))

    assert groups(Config()) == PPO.groups
    assert {"steps", "ppo.kl_coef", "rewards", "rewards.function"} <= set(PPO.settings)
    assert {"data.rating", "data.eval_path", "model.path"} <= set(REWARD.settings)


def test_each_command_names_its_own_presets(capsys):
    assert "quickstart" in PPO.presets and "quickstart-reward" not in PPO.presets
    assert "quickstart-reward" in REWARD.presets and "quickstart-sft" in SFT.presets
    said = message(capsys, "--config", "quickstart-reward")
    assert (
        "this preset is for deepspeed fastppo/train_reward.py. The presets of deepspeed fastppo/train.py: 1.3b, "
        in said
    )


def test_a_command_is_called_by_its_script_in_a_clone_and_by_its_name_elsewhere(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(Path(__file__).parent.parent.parent)
    assert [command.call for command in (PPO, SFT)] == [
        "deepspeed fastppo/train.py",
        "deepspeed fastppo/train_sft.py",
    ]
    for begun in ("/usr/bin/fastppo", "/usr/lib/fastppo/__main__.py"):
        monkeypatch.setattr(sys, "argv", [begun])
        assert PPO.call == "fastppo train"
    monkeypatch.setattr(sys, "argv", ["/usr/lib/fastppo/train.py"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        parse(["--help"], REWARD)
    assert capsys.readouterr().out.startswith("usage: fastppo reward --config PRESET|FILE.yaml")
    said = message(capsys, "--config", "quickstart-sft")
    assert "this preset is for fastppo sft. The presets of fastppo train: " in said


def test_the_command_line_loads_no_model_library_to_read_a_named_dtype():
    code = "import sys; from fastppo.config.command_line import parse"
    code += "; parse(['--config', 'quickstart', '--optim.dtype', 'bf16'])"
    code += "; print(*{'torch', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("\n", "")
