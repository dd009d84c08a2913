"""`parallel.sequence` in SFT, reward modelling and DPO: a run of two ranks that split rows is that of one rank."""

import pytest
import stage_runs
from safetensors.torch import load_file

from fastppo.config.command_line import DPO, REWARD, SFT, parse
from fastppo.distributed.world import start_world
from fastppo.train_dpo import train as train_dpo
from fastppo.train_reward import train as train_reward
from fastppo.train_sft import train as train_sft

pytestmark = pytest.mark.slow

KINDS = {  # with settings of both runs
    "answers": (SFT, train_sft, "fastppo.train_sft", "model", {}),
    "pairs": (REWARD, train_reward, "fastppo.train_reward", "reward_model", {}),
    "dpo": (DPO, train_dpo, "fastppo.train_dpo", "model", {"nll_coef": 0.1, "model__train": 2}),
}
STAGES = {"answers": 1, "pairs": 3, "dpo": 2}  # of the run on two ranks
SHORT = {"steps": 3, "eval__every": 2, "eval__examples": 10, "model__lr": 3e-4, "batch_size": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stage_runs.prepare(tmp_path_factory.mktemp("offline"))


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_that_split_rows_learn_and_evaluate_what_one_rank_does(kind, folder, forks):
    command, train, module, exported, settings = KINDS[kind]
    settings = SHORT | settings
    one, two = folder / f"{kind}-1", folder / f"{kind}-2"
    train(parse(stage_runs.settings(folder, kind, output=one, **settings), command), start_world(1))
    split = {"parallel__sequence": 2, "zero__stage": STAGES[kind]}
    argv = stage_runs.settings(folder, kind, output=two, **settings | split)
    forks.run(argv, ranks=2, module=module)
    for alone, together in zip(stage_runs.records(one), stage_runs.records(two), strict=True):
        assert together == pytest.approx(alone, rel=1e-3, abs=1e-5, nan_ok=True)
    expected, found = (load_file(output / exported / "model.safetensors") for output in (one, two))
    assert expected.keys() == found.keys()
    assert max(float((expected[name] - found[name]).abs().max()) for name in expected) < 5e-5
