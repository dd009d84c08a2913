"""Whole runs at ZeRO stage 3 on two ranks."""

import json

import pytest
import tiny
import whole_runs
from forks import Forks
from ppo_step import config_of
from transformers import AutoModelForCausalLM

from fastppo.distributed import engine

pytestmark = pytest.mark.slow

SPLIT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run at stage 1 and, with everything split and offloaded, at stage 3.

    It has a reward model, and a single held-out prompt: the second rank has no response to score, and still takes part
    in every forward pass.
    """
    folder = whole_runs.prepare(tmp_path_factory.mktemp("runs"))
    reward = tiny.saved(folder / "reward", tiny.classifier())
    (folder / "split.json").write_text(json.dumps(SPLIT_ALL))
    fixed = {
        "steps": 1,
        "optim__dtype": "fp32",
        "rewards": json.dumps([{"model": reward}]),
        "eval__prompts": 1,
        "eval__every": 1,
        "checkpoint__every": 0,
    }
    split = {"zero__stage": 3, "zero__offload": "cpu", "zero__deepspeed": folder / "split.json"}
    with Forks(folder) as forks:
        for name, changes in (("whole", {}), ("split", split)):
            forks.run(whole_runs.settings(folder, folder / name, **fixed, **changes), 2)
    return folder


def test_nvme_without_libaio_is_an_error_that_names_the_package(monkeypatch):
    config = config_of("none", "--zero.stage", "3", "--zero.offload", "nvme", "--zero.nvme_path", "/nvme")
    monkeypatch.setattr(engine.AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    with pytest.raises(engine.EngineError, match="libaio-dev"):
        engine.check_nvme(config.zero)


def test_a_run_at_stage_3_is_the_run_at_stage_1_within_rounding(runs):
    one, other = (whole_runs.records(runs / name) for name in ("whole", "split"))
    assert [r["step"] for r in one] == [0, 1, 1]
    for a, b in zip(one, other, strict=True):
        unknown = {name for name, value in a.items() if value is None}  # such as a correlation of equal numbers
        assert unknown == {name for name, value in b.items() if value is None}
        known = [{name: value for name, value in r.items() if name not in unknown} for r in (a, b)]
        assert known[1] == pytest.approx(known[0], rel=1e-3, abs=1e-4)


def test_what_is_exported_at_stage_3_is_the_trained_actor(runs):
    one, other = (AutoModelForCausalLM.from_pretrained(runs / name / "actor") for name in ("whole", "split"))
    start = AutoModelForCausalLM.from_pretrained(runs / "model")
    moved = [float((p - q).detach().abs().max()) for p, q in zip(one.parameters(), start.parameters(), strict=True)]
    apart = [float((p - q).detach().abs().max()) for p, q in zip(one.parameters(), other.parameters(), strict=True)]
    assert max(moved) > 1e-3 and max(apart) < 5e-5
