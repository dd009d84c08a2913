"""The seconds of a step as `python -m fastppo.plan --time` models them, and the constants that they come from."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import tiny
import torch
import yaml

from fastppo import plan
from fastppo.config.command_line import DPO, PPO, REST, REWARD, SFT, parse
from fastppo.data.microbatches import pack_even
from fastppo.planner.constants.nodes import NODES, constants_of
from fastppo.planner.constants.values import NAMES, Constant, Constants, ConstantsError, read_constants
from fastppo.planner.machine import Machine
from fastppo.planner.plan import make_plan
from fastppo.planner.time.phases import microbatches
from fastppo.planner.time.predict import lengths_of, predict

GPU = Machine(1, 1, 80 * 10**9, 10**12)
ROUND = {
    name: Constant(0.0 if unit == "s" or name == "hidden" else 1e12, "made up") for name, (unit, _) in NAMES.items()
}
CONSTANTS = Constants("a machine", False, ROUND)
PARTS = ("sampling", "feedback", "experience", "learning")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model, reward = tiny.saved(folder / "model", tiny.causal()), tiny.saved(folder / "reward", tiny.classifier())
    given = ["--actor.model", model, "--rewards", f'[{{"model": "{reward}"}}]', "--data.path", "x.jsonl"]
    sizes = {"ppo.batch_size": 16, "ppo.epochs": 2, "ppo.microbatch_tokens": 128, "sampling.rows": 16}
    sizes |= {"data.max_prompt_tokens": 16, "sampling.max_new_tokens": 16, "critic.kind": "shared"}
    sizes |= {"optim.activation_checkpointing": "false"}
    return [*given, *(part for name, value in sizes.items() for part in (f"--{name}", str(value)))]


@cache
def plan_of(argv, machine):
    return make_plan(parse(list(argv), PPO, ranks=machine.ranks), machine)


def step_of(settings, *changes, machine=GPU, constants=CONSTANTS, reward_seconds=0.0):
    found = plan_of((*settings, *changes), machine)
    return predict(found, constants, lengths_of(found.config, reward_seconds=reward_seconds))


def products_of(step):
    return {phase.name: phase.work.flops("products") for phase in step.phases}


def test_the_products_of_each_phase_are_those_counted_by_hand(settings):
    h, inner, v, layers = 32, 64, 257, 3
    layer = 2 * (h * 32 + 2 * h * 16 + 32 * h + 3 * h * inner)  # FLOP a token
    prompt = response = batch = 16
    length, head = prompt + response, 2 * h * v
    found = products_of(step_of(settings))
    steps = batch * (response - 1) * (layers * layer + head)
    assert found["sampling"] == pytest.approx(batch * (prompt * layers * layer + head) + steps)
    assert found["feedback"] == pytest.approx(batch * (length * layers * layer + 2 * h))
    # Actor and reference; the value head reads each response token.
    assert found["experience"] == pytest.approx(
        batch * (2 * (length * layers * layer + response * head) + response * 2 * h)
    )
    learnt = batch * (3 * length * layers * layer + 3 * response * head)
    assert found["learning"] == pytest.approx(2 * learnt, rel=0.001)  # and the value head


def test_with_nothing_but_products_to_do_a_step_takes_its_flop_over_their_speed(settings):
    endless = dict.fromkeys(("memory", "attention", "decode", "adam"), Constant(math.inf, "none"))
    free = Constants("a machine", False, {**ROUND, **endless})
    step = step_of(settings, constants=free)
    assert step.seconds == pytest.approx(step.work.flops("products") / 1e12)


def test_ranks_divide_the_work_of_a_batch_and_add_what_they_send(settings):
    alone, two = step_of(settings), step_of(settings, machine=replace(GPU, gpus=2))
    for name, flops in products_of(two).items():
        assert flops == pytest.approx(products_of(alone)[name] / 2), name
    assert alone.parts["collectives"] == 0 < two.parts["collectives"]


@pytest.mark.parametrize("name", ["memory", "products_bf16", "attention", "adam", "decode"])
def test_a_slower_machine_takes_longer(settings, name):
    slow = Constants("slow", False, {**ROUND, name: Constant(1e9, "made up")})
    assert step_of(settings, constants=slow).seconds > step_of(settings).seconds


def test_more_epochs_longer_responses_and_a_separate_critic_take_longer(settings):
    base = step_of(settings).seconds
    for change in (["--ppo.epochs", "3"], ["--sampling.max_new_tokens", "32"], ["--critic.kind", "separate"]):
        assert step_of(settings, *change).seconds > base


def test_without_a_critic_and_with_kept_lower_layers_it_takes_less(settings):
    base = step_of(settings).seconds
    assert step_of(settings, "--ppo.estimator", "reinforce++", "--critic.kind", "none").seconds < base
    assert step_of(settings, "--actor.train", "1").seconds < base


def test_functions_take_the_seconds_that_are_given(settings):
    plain, waiting = step_of(settings), step_of(settings, reward_seconds=2.0)
    assert waiting.seconds - plain.seconds == pytest.approx(2.0)
    assert waiting.slowest[0] == "waiting"


@pytest.mark.parametrize("share", [0.5, 3.0])
def test_a_step_ahead_functions_take_only_what_is_longer_than_the_phases_beside_them(settings, share):
    function = ("--rewards", '[{"function": "mine.py:reward"}]')
    plain = step_of(settings, *function)
    beside = sum(phase.seconds.total for phase in plain.phases if phase.name != "feedback")
    ahead = step_of(settings, *function, "--ppo.steps_ahead", "1", reward_seconds=share * beside)
    assert ahead.seconds == pytest.approx(plain.seconds + max(share - 1, 0) * beside)


@pytest.mark.parametrize(("sequences", "budget"), [(16, 128), (10, 128), (3, 1000), (7, 70), (9, 32)])
def test_microbatches_are_those_that_a_run_packs(sequences, budget):
    lengths = torch.full((sequences,), 32)
    packed = sorted((len(part) for part in pack_even(torch.arange(sequences), lengths, budget, 1)), reverse=True)
    assert [n for n, times in microbatches(sequences, 32, budget) for _ in range(times)] == packed


@pytest.mark.parametrize(("command", "kind"), [(SFT, "causal"), (REWARD, "causal"), (DPO, "causal")])
def test_offline_methods_have_an_update(tmp_path, command, kind):
    model = tiny.saved(tmp_path / "model", getattr(tiny, kind)())
    argv = ["--model.path", model, "--data.path", "x.jsonl", "--data.max_tokens", "32", "--batch_size", "8"]
    config = parse(argv, command, ranks=1)
    step = predict(make_plan(config, GPU), CONSTANTS, lengths_of(config))
    layer, tokens = 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64), 8 * config.sequences * 32
    assert step.work.flops("products") >= 3 * 3 * layer * tokens
    assert step.tokens == tokens and step.seconds > 0


def test_rest_grows_and_improves_on_the_share_that_its_thresholds_leave(settings):
    sizes = ["--data.max_prompt_tokens", "16", "--sampling.max_new_tokens", "16", "--sampling.rows", "16"]
    grown = ["--grow.prompts", "32", "--grow.batch_size", "16", "--improve.batch_size", "8"]
    found = {}
    for thresholds in ("[0.5, 0.75, 0.9]", "[0.5]"):
        config = parse([*settings[:6], *sizes, *grown, "--improve.thresholds", thresholds], REST, ranks=1)
        found[thresholds] = products_of(predict(make_plan(config, GPU), CONSTANTS, lengths_of(config)))
        assert all(found[thresholds][name] > 0 for name in PARTS)
    all_updates, first_updates = (x["learning"] for x in found.values())
    assert first_updates == pytest.approx(all_updates * 2 / (2 + 1 + 1))  # of 16, 8 and 4 responses, 8 to an update


def run(argv, capsys):
    code = 0
    try:
        plan.main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, " ".join(err.split())


def given(path, **changes):
    constants = {name: {"value": c.value, "source": c.source} for name, c in ROUND.items()}
    path.write_text(yaml.safe_dump({"machine": "a machine", "constants": constants | changes}))
    return ["--time", "--constants", str(path), "--gpus", "2", "--gpu-memory", "80GB", "--host-memory", "1TB"]


def test_the_table_shows_constants_phases_and_what_they_are_made_of(settings, tmp_path, capsys):
    file = given(tmp_path / "c.yaml", link={"value": 1e9, "efficiency": 0.5, "source": "a cable"})
    code, out, _ = run([*settings, *file, "--reward-seconds", "0.5"], capsys)
    said = " ".join(out.split())
    assert code == 0
    assert "constants of a machine:" in said and "link 1 GB/s x efficiency 0.5" in said and "a cable" in said
    for word in ("modelled seconds of a step", *PARTS, "products", "collectives", "optimizer", "waiting", "step"):
        assert word in said
    assert "prompts of 16 tokens and responses of 16" in said and "response tokens a second" in said
    assert "slowest: waiting, " in said and "not measured" in said


def test_datasheets_have_all_constants_with_a_source_each(settings, capsys):
    for name in NODES:
        found = constants_of(name)
        assert set(found.values) == set(NAMES) and all(c.source for c in found.values.values())
        assert all(0 < c.efficiency <= 1 for c in found.values.values())
    code, out, _ = run(
        [*settings, "--time", "--node", "h100", "--prompt-tokens", "8", "--response-tokens", "4"], capsys
    )
    assert code == 0
    assert "989 TFLOP/s" in out and "efficiency 0.73" in out and "prompts of 8 tokens and responses of 4" in out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"link": {"value": -1}}, "link is -1; it must be a number above 0"),
        ({"memory": {"value": "fast"}}, "memory is 'fast'"),
        ({"memory": {"value": float("nan")}}, "memory is nan"),
        ({"launch": {"value": -1e-6}}, "launch is -1e-06; it must be a number of 0 or more"),
        ({"memory": {"value": 1e12, "efficiency": 1.5}}, "efficiency of memory is 1.5"),
        ({"memory": {"value": 1e12, "speed": 2}}, "memory has speed; it takes value, efficiency and source"),
        ({"memry": {"value": 1e12}}, "a constant 'memry', which is unknown"),
        ({"hidden": {"value": 2}}, "hidden is 2; it is a share"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(settings, tmp_path, capsys, changes, said):
    code, _, err = run([*settings, *given(tmp_path / "c.yaml", **changes)], capsys)
    assert code == 1 and said in err and "c.yaml" in err


def test_a_constant_that_is_needed_and_missing_is_named_with_its_meaning(settings, tmp_path, capsys):
    argv = given(tmp_path / "c.yaml")
    content = yaml.safe_load((tmp_path / "c.yaml").read_text())
    del content["constants"]["link"]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    code, _, err = run([*settings, *argv], capsys)
    assert code == 1
    assert "has no constant link (B/s, that a rank sends to others of its node" in err and "--measure" in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--time", "--node", "h10"], "known are a100, h100, h200, b200. Did you mean h100?"),
        (["--time"], "--time needs the constants of a machine"),
        (["--constants", "x.yaml"], "--constants has no effect without --time"),
        (["--time", "--constants", "x.yaml", "--node", "h100"], "--constants and --node both give the constants"),
        (["--time", "--constants", "/absent/x.yaml"], "--constants /absent/x.yaml cannot be read"),
        (["--measure", "/absent/x.yaml"], "--measure /absent/x.yaml cannot be written (No such file or directory)"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_followed_are_explained(settings, capsys, argv, said):
    code, _, err = run([*settings, *argv], capsys)
    assert code == 1 and said in err


def test_constants_of_a_cpu_are_not_taken_for_those_of_gpus(settings, tmp_path, capsys):
    argv = given(tmp_path / "c.yaml")
    file = tmp_path / "c.yaml"
    file.write_text(file.read_text() + "\ncpu: true\n")
    code, _, err = run([*settings, *argv], capsys)
    assert code == 1 and "has constants of a CPU, and this plan is for GPUs" in err


def test_a_file_that_is_no_table_of_constants_is_refused(tmp_path):
    for content in ("[1, 2]", "constants: 3", "a: [", "constants: {}\nkernels: [1]"):
        (tmp_path / "c.yaml").write_text(content)
        with pytest.raises(ConstantsError, match=r"c\.yaml"):
            read_constants(tmp_path / "c.yaml")


def test_lengths_that_no_microbatch_holds_are_refused(settings, capsys):
    code, _, err = run([*settings, "--time", "--node", "h100", "--response-tokens", "1000"], capsys)
    assert code == 1 and "--response-tokens 1000 are 1016 tokens, more than a microbatch holds" in err


@pytest.mark.slow
def test_what_is_measured_can_be_read_again_and_has_the_kernels_of_the_run(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "stop_world", lambda: None)  # the tests after this one are in the same process
    file = tmp_path / "measured.yaml"
    code, out, err = run([*settings, "--threads", "1", "--measure", str(file)], capsys)
    assert code == 0, err
    assert f"written to {file}" in out and "kernels of this plan were measured one by one" in " ".join(out.split())
    found = read_constants(file)
    assert found.cpu == (not torch.cuda.is_available())
    assert all(found[name] > 0 for name in ("products_bf16", "products_fp32", "memory", "attention", "decode", "adam"))
    assert found.kernels and all(seconds >= 0 for seconds in found.kernels.values())
    code, out, err = run([*settings, "--threads", "1", "--time", "--constants", str(file)], capsys)
    assert code == 0, err
    assert "modelled seconds of a step" in out
