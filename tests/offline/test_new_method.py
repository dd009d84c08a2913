"""An offline method that is one file of docs/examples: it is a command like those that fastppo has."""

import ast
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import stage_runs
import torch
import whole_runs
from architectures import ACTORS, directory
from safetensors.torch import load_file
from stage_runs import evaluations, records
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastppo.__main__ as console
from fastppo import plan
from fastppo.checkpoint.resume import CheckpointError
from fastppo.config import COMMANDS, command_of
from fastppo.config.command_line import parse
from fastppo.distributed.world import start_world
from fastppo.models.frozen_prefix import PrefixStates
from fastppo.offline import heldout
from fastppo.offline.loop import count_examples
from fastppo.offline.model import assemble
from fastppo.planner.machine import Machine
from fastppo.planner.plan import make_plan

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parent.parent.parent / "docs" / "examples" / "simpo.py"
PACKAGE = Path(console.__file__).parent


@pytest.fixture(scope="module")
def method():
    spec = importlib.util.spec_from_file_location("simpo", EXAMPLE)
    assert spec is not None and spec.loader is not None
    before = dict(COMMANDS)
    module = sys.modules["simpo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    COMMANDS.clear()
    COMMANDS.update(before)
    del sys.modules["simpo"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stage_runs.prepare(tmp_path_factory.mktemp("simpo"))


def settings(folder: Path, output: Path, **changes: Any) -> list[str]:
    fixed = {"steps": 6, "eval__every": 3, "checkpoint__every": 3, "batch_size": 8, "eval__examples": 16}
    return stage_runs.settings(folder, "pairs", output=output, **fixed | changes)


@pytest.fixture(scope="module")
def trained(method, folder):
    method.train(parse(settings(folder, folder / "straight"), method.SIMPO), start_world(1))
    return folder / "straight"


def test_it_learns_from_each_batch_and_is_evaluated_by_its_own_objective(trained):
    steps = [record for record in records(trained) if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    before, middle, after = evaluations(trained)
    assert after["eval/loss"] < middle["eval/loss"] < before["eval/loss"]
    assert after["eval/accuracy"] >= before["eval/accuracy"]


def test_its_loss_is_that_of_transformers_logprobs(method, folder, trained):
    """On held-out pairs, before training and of the model that it left."""
    config = parse(settings(folder, trained), method.SIMPO)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    _, pairs = method.load_pairs(config.data, tokenizer, heldout=16, context=None)
    for path, found in ((folder / "model", evaluations(trained)[0]), (trained / "model", evaluations(trained)[-1])):
        model, means = AutoModelForCausalLM.from_pretrained(path), []
        for tokens, length in zip(pairs.tokens, pairs.packed.response_lengths.tolist(), strict=True):
            labels = [-100] * (len(tokens) - length) + tokens[-length:]
            with torch.no_grad():
                means.append(-float(model(torch.tensor([tokens]), labels=torch.tensor([labels])).loss))
        preferred, other = torch.tensor(means, dtype=torch.float64).view(-1, 2).unbind(1)
        expected = torch.nn.functional.softplus(config.lead - config.beta * (preferred - other)).mean()
        assert found["eval/loss"] == pytest.approx(float(expected), rel=1e-4)


def test_a_pass_that_only_keeps_in_step_with_other_ranks_counts_for_nothing(method, folder, monkeypatch):
    """As at ZeRO stage 3, where every pass is a collective and ranks may have fewer microbatches than others."""
    config, world = parse(settings(folder, folder / "x"), method.SIMPO), start_world(1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    _, pairs = method.load_pairs(config.data, tokenizer, heldout=16, context=None)
    trained = assemble(config, world, tokenizer)
    evaluate = heldout.evaluation_of(method.simpo(config), ("loss", "accuracy"), count_examples)
    expected = evaluate(trained, pairs, PrefixStates(keep=False), config, world).metrics()
    real = heldout.heldout_microbatches
    monkeypatch.setattr(
        heldout, "heldout_microbatches", lambda *args: [*real(*args), torch.empty(0, dtype=torch.int64)]
    )
    assert evaluate(trained, pairs, PrefixStates(keep=False), config, world).metrics() == expected


def test_it_resumes_bit_for_bit(method, folder, trained):
    broken = shutil.copytree(trained, folder / "broken")
    shutil.rmtree(broken / "model")
    shutil.rmtree(broken / "checkpoints" / "step-00000006")
    argv = settings(folder, broken, resume="auto")
    method.train(parse(argv, method.SIMPO), start_world(1))
    assert records(broken) == records(trained)
    exports = [load_file(output / "model" / "model.safetensors") for output in (trained, broken)]
    assert whole_runs.same(*exports) and whole_runs.same(*map(whole_runs.state, (trained, broken)))
    with pytest.raises(CheckpointError, match=r"beta is 3.0, but .* was made with 2.0"):
        method.train(parse([*argv, "--beta", "3"], method.SIMPO), start_world(1))


def test_its_memory_is_planned_and_what_needs_less_is_named_in_its_settings(method, tmp_path, capsys):
    argv = ["--model.path", directory(tmp_path, *ACTORS["1.3b"]), "--data.path", "x.jsonl"]
    machine = ["--gpus", "1", "--host-memory", "128GB", "--gpu-memory"]
    plan.main(["--command", "simpo", *machine, "80GB", *argv])
    assert "learning" in (shown := capsys.readouterr().out) and "evaluation" in shown and "fits" in shown
    with pytest.raises(SystemExit) as stop:
        plan.main(["--command", "simpo", *machine, "24GB", *argv])
    change = capsys.readouterr().err.partition("The smallest change that fits: ")[2].split()
    small = Machine(1, 1, 24 * 10**9, 128 * 10**9)
    assert stop.value.code == 1 and change and make_plan(parse([*argv, *change], method.SIMPO), small).fits
    policy, reward = (make_plan(parse(argv, command), small) for command in (method.SIMPO, COMMANDS["reward"]))
    assert policy.needs["GPU"][0] > reward.needs["GPU"][0]  # by its logits


def test_it_is_on_the_command_line_with_its_settings_and_their_rules(method, folder, capsys):
    console.main(["--help"])
    assert "simpo         SimPO, from preference pairs" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        console.main(["simpo", "--help"])
    assert "What mean logprobs are multiplied by." in " ".join(capsys.readouterr().out.split())
    for mistake, words in (
        (["--betta", "1"], "unknown setting betta; did you mean beta?"),
        (["--beta", "-1"], "beta is -1.0; it must be 0 or more."),
        (["--batch_size", "0"], "batch_size is 0; it must be 1 or more."),
        (["--data.rejected", "chosen"], "data.chosen and data.rejected are both chosen"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parse([*settings(folder, folder / "x"), *mistake], method.SIMPO)
        assert words in capsys.readouterr().err
    assert command_of(method.SimPOConfig()) is method.SIMPO


def test_no_module_asks_of_which_command_its_settings_are():
    """What differs is said by the config classes and by the table in `fastppo/planner/plan.py`."""
    settings, asking = {command.root.__name__ for command in COMMANDS.values()} | {"OfflineConfig"}, []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                kinds = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
                asking += [f"{path}:{node.lineno}"] if kinds & settings else []
    assert asking == []
