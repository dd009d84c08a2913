"""Runs that an older fastppo began go on, from its checkpoints and its config.yaml."""

from __future__ import annotations

import json
import shutil

import old_runs
import pytest

from fastppo.config.command_line import REWARD, SFT, parse

PARSERS = {"ppo": (), "ppo-fp32": (), "sft": (SFT,), "reward": (REWARD,)}

# A prompt is computed by itself now, which in fp32 rounds the sampler's logprobs otherwise. No token is another for
# that, and with ppo.importance none, as all runs were, nothing is learned from them.
ROUNDED = {"ppo-fp32": ("sampler_error", "health/sampler_error")}


@pytest.mark.parametrize("name", old_runs.MODULES)
def test_an_old_checkpoint_resumes_to_the_end_that_it_had_then(forks, tmp_path, name):
    """Bit for bit on the kind of machine that wrote it; elsewhere to what other instructions make of the last bits."""
    folder = shutil.copytree(old_runs.DATA, tmp_path / "runs")
    (checkpoint,) = (folder / name / "checkpoints").iterdir()
    # fused layers round otherwise, which no run did then
    argv = [*json.loads((folder / name / "argv.json").read_text()), "--model.fused", "false"]
    run = forks.start(argv, before=f"import os; os.chdir({str(folder)!r})", module=old_runs.MODULES[name])
    assert forks.wait(run) == [0], run.text()
    assert f"continuing from checkpoints/{checkpoint.name}" in run.text().replace(f"{name}/", "")

    then, now = old_runs.expected(), old_runs.left(folder / name)
    known = [before.keys() for before in then[name]["metrics"]]  # there are more metrics since
    now["metrics"] = [{k: x for k, x in m.items() if k in ks} for m, ks in zip(now["metrics"], known, strict=True)]
    for mine, theirs in zip(now["metrics"], then[name]["metrics"], strict=True):
        rounded = {k: (mine.pop(k), theirs.pop(k)) for k in ROUNDED.get(name, ()) if k in mine}
        assert all(0 < x < 1e-6 and 0 < y < 1e-6 for x, y in rounded.values())
    if then["machine"] == old_runs.machine():
        assert now == then[name]
    else:
        assert (
            len(now["metrics"]) == len(then[name]["metrics"]) and now["weights"].keys() == then[name]["weights"].keys()
        )
        for mine, theirs in zip(now["metrics"], then[name]["metrics"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-2, abs=1e-3, nan_ok=True)
        for file, (_, magnitude) in now["weights"].items():
            assert magnitude == pytest.approx(then[name]["weights"][file][1], rel=1e-4)


@pytest.mark.parametrize("name", old_runs.MODULES)
def test_the_settings_that_an_old_run_wrote_are_read_as_they_were_meant(monkeypatch, name):
    monkeypatch.chdir(old_runs.DATA)
    argv = json.loads((old_runs.DATA / name / "argv.json").read_text())
    assert parse(["--config", f"{name}/config.yaml"], *PARSERS[name]) == parse(argv, *PARSERS[name])
