"""A checkpoint goes on with other ranks, ZeRO stages and offload: the same state, and then the same update."""

import json
import shutil
from pathlib import Path

import pytest
import reshard_ranks
import tiny
import torch

from fastppo.distributed.reshard.layout import LayoutError
from fastppo.distributed.reshard.shards import Piece, Saved, read_shards
from fastppo.distributed.reshard.shares import _Share, _write_states

OLD_RUNS = Path(__file__).parents[1] / "checkpoint/old_runs"

SPLIT = {"zero_optimization": {"stage3_param_persistence_threshold": 40}}  # some weights are split, some are whole
CHANGES = [(case, *leg) for case in reshard_ranks.CASES for leg in list(reshard_ranks.layouts(case))[1:]]


@pytest.fixture(scope="module")
def walked(tmp_path_factory, forks):
    """What each rank found, by case, ranks and layout."""
    folder, found = tmp_path_factory.mktemp("walks"), {}
    tiny.saved(folder / "model", tiny.causal(tie_word_embeddings=True))
    (folder / "split.json").write_text(json.dumps(SPLIT))
    for number, ranks in enumerate(reshard_ranks.RANKS):
        call = f"import reshard_ranks; reshard_ranks.walk({str(folder)!r}, {number}); raise SystemExit(0)"
        run = forks.start([], ranks, before=call)
        assert forks.wait(run, seconds=300) == [0] * ranks, run.text()
        for rank in range(ranks):
            for name, result in json.loads((folder / f"{number}-{rank}.json").read_text()).items():
                found.setdefault((number, name), []).append(result)
    return found


@pytest.mark.parametrize(("case", "number", "ranks", "place"), CHANGES)
def test_the_whole_state_is_that_of_the_other_layout_bit_for_bit(walked, case, number, ranks, place):
    """Weights, master weights, moments, the steps of each group, and the average."""
    assert [found["same"] for found in walked[number, f"{case}: {ranks} x {place}"]] == [True] * ranks


@pytest.mark.parametrize(("case", "number", "ranks", "place"), CHANGES)
def test_the_next_update_is_that_of_the_other_layout_within_rounding(walked, case, number, ranks, place):
    for found in walked[number, f"{case}: {ranks} x {place}"]:
        apart = found["apart"]
        assert apart.pop("step") == 0
        # in bf16 an element whose gradient is all rounding goes either way in Adam's first steps
        assert max(apart.values()) < (1e-5 if case.endswith("fp32") else 0.06), apart


def test_the_files_of_earlier_versions_say_where_each_weight_is():
    files = sorted(OLD_RUNS.glob("*/checkpoints/*/*/*zero_pp_rank_0*optim_states.pt"))
    assert len(files) > 2
    for folder in (file.parent for file in files):
        module = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)["module"]
        shards, squares = read_shards(folder, []), {}
        assert shards.weights and shards.weights.keys() <= module.keys()
        for weight, saved in shards.weights.items():
            master, squares[weight] = (torch.full(saved.shape, torch.nan) for _ in range(2))
            saved.copy("fp32", 0, master.view(-1))
            saved.copy("exp_avg_sq", 0, squares[weight].view(-1))
            assert master.to(module[weight].dtype).equal(module[weight]) and saved.step > 0
        assert all(bool((square >= 0).all()) for square in squares.values())
        assert any(bool((square > 0).any()) for square in squares.values())


def test_states_on_nvme_are_refused_with_the_way_out(tmp_path):
    old = OLD_RUNS / "ppo-fp32/checkpoints/step-00000002/actor"
    first = torch.load(old / "mp_rank_00_model_states.pt", weights_only=False)
    first["ds_config"]["zero_optimization"] |= {"stage": 3, "offload_optimizer": {"device": "nvme"}}
    torch.save(first, tmp_path / "mp_rank_00_model_states.pt")
    shutil.copy(old / "zero_pp_rank_0_mp_rank_00_optim_states.pt", tmp_path)
    with pytest.raises(
        LayoutError, match=r"written with stage 3 over 1 rank.s., optimizer on nvme: what is on NVMe .* Resume with the"
    ):
        read_shards(tmp_path, [])


def test_counts_of_stage_0_that_one_group_cannot_have_are_refused_with_the_way_out():
    def saved(step):
        return Saved((2,), step, [Piece({"fp32": torch.ones(2)}, 0, 2)])

    adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(6))])
    master, shares = adam.param_groups[0]["params"][0], [_Share(name, 0, 2 * i, 2) for i, name in enumerate("abc")]
    with pytest.raises(LayoutError, match=r"no gradient: b 1 times and a 3 times\. .* --zero.stage 0"):
        _write_states(adam, master, shares, {"a": saved(3.0), "b": saved(1.0), "c": saved(0.0)})
    _write_states(adam, master, shares, {"a": saved(3.0), "b": saved(3.0), "c": saved(0.0)})  # c never had one
    assert adam.state[master]["step"] == 3 and bool((master == 1).all())
