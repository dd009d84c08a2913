"""`dtype: auto` is bf16 where products are computed in it, fp32 elsewhere, and settled before other code reads it."""

import logging

import pytest

from fastppo import plan, rank
from fastppo.config import COMMANDS, GENERATE, PPO, SFT, parse

MODELS = {"train": "quickstart", "sft": "quickstart-sft", "reward": "quickstart-reward", "dpo": "quickstart-dpo"}
MODELS |= {"rest": "quickstart-rest", "generate": "quickstart-generate"}


@pytest.fixture(params=[True, False], ids=["bf16", "no bf16"])
def instructions(request, monkeypatch):
    """Whether this machine computes products in bf16."""
    monkeypatch.setattr("fastppo.config.dtype.computes_bf16", lambda: request.param)
    monkeypatch.setattr(rank, "computes_bf16", lambda: request.param)
    return request.param


@pytest.mark.parametrize("name", COMMANDS)
def test_the_quickstarts_compute_in_bf16_where_the_machine_can(name, instructions):
    config = parse(["--config", MODELS[name]], COMMANDS[name])
    assert config.optim.dtype == ("bf16" if instructions else "fp32")


@pytest.mark.parametrize(("command", "setting"), [(PPO, "optim.dtype"), (GENERATE, "dtype")])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_dtype_that_is_named_stays(command, setting, dtype, instructions):
    config = parse(["--config", MODELS[command.name], f"--{setting}", dtype], command)
    assert config.optim.dtype == dtype


def test_a_plan_for_gpus_is_one_in_bf16(instructions):
    assert parse(["--config", "quickstart"], PPO, ranks=8, gpu=True).optim.dtype == "bf16"


def test_a_plan_for_this_machine_has_the_dtype_of_its_run(instructions, monkeypatch):
    class Planned(Exception):
        """Carries the settings that were planned."""

    def stop(config, machine):
        raise Planned(config)

    monkeypatch.setattr(plan, "make_plan", stop)
    monkeypatch.setattr(plan.torch.cuda, "is_available", lambda: False)
    with pytest.raises(Planned) as planned:
        plan.main(["--config", "quickstart"])
    assert planned.value.args[0].optim.dtype == ("bf16" if instructions else "fp32")


def test_rules_between_settings_hold_for_the_dtype_that_auto_stands_for(instructions, capsys):
    argv = ["--config", "quickstart-sft", "--zero.stage", "0"]
    if not instructions:
        assert parse(argv, SFT).zero.stage == 0
        return
    with pytest.raises(SystemExit):
        parse(argv, SFT)
    assert "zero.stage is 0 and optim.dtype bf16" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_log_says_what_a_machine_without_bf16_does_to_a_run(dtype, instructions, caplog):
    with caplog.at_level(logging.INFO, "fastppo"):
        rank._log_software_bf16(dtype)
    if instructions:
        assert not caplog.records
    elif dtype == "bf16":
        assert "Set optim.dtype (of generate: dtype) to auto or fp32" in caplog.text
    else:
        assert "this machine has no instructions for bf16" in caplog.text
