"""Every kind of engine against plain sums: ZeRO stage x dtype x offload x microbatches x ranks (`engine_ranks`)."""

import json
from pathlib import Path

import engine_ranks
import pytest
import torch

from fastppo.config import ZeroConfig
from fastppo.distributed.world import start_world

ROWS = engine_ranks.table()


@pytest.fixture(scope="module")
def walked(tmp_path_factory, forks):
    """What each rank found: of one walk through all rows alone, and of one by two ranks."""
    folder = tmp_path_factory.mktemp("walks")
    (folder / "small.json").write_text(json.dumps({"zero_optimization": engine_ranks.SMALL}))
    for ranks in (1, 2):
        call = f"import engine_ranks; engine_ranks.walk({str(folder)!r}); raise SystemExit(0)"
        run = forks.start([], ranks, before=call)
        assert forks.wait(run, seconds=300) == [0] * ranks, run.text()
    return {
        ranks: [json.loads((folder / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)] for ranks in (1, 2)
    }


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("row", ROWS)
def test_an_engine_has_the_norm_the_update_and_the_states_that_a_plain_sum_has(walked, row, ranks):
    mine = [found[row] for found in walked[ranks]]
    for found in mine:
        for i, (norm, expected) in enumerate(found["norms"]):
            assert norm == pytest.approx(expected, rel=1e-5), i
        assert found["finite"] == [False] * 6  # NaN and infinity in each of three microbatches of the last rank
        assert found["left alone"]
        assert found["apart"] < 4  # units of rounding, after 15 updates
        said, there, states = found["states"]
        assert said == there if row.endswith("none") else states <= said <= there
        assert found["norms"] == mine[0]["norms"] and found["weights"] == mine[0]["weights"]  # the ranks agree


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("row", ROWS)
def test_an_engine_that_goes_on_from_a_checkpoint_ends_where_the_one_that_never_stopped_does(walked, row, ranks):
    for found in walked[ranks]:
        assert all(found[row]["resumed"].values()), found[row]["resumed"]


def most_touched(row, ranks):
    """Numbers read and written for each number of a gradient of one microbatch among others."""
    stage, dtype, offload = row.split()
    once = 3  # the gradient is read, its sum is read and written
    if stage != "2":
        return once
    if (dtype, offload) == ("fp32", "cpu"):  # the sum is on the host, and comes to the device and goes back
        return 2 + once + 2 if ranks == 1 else 14
    return once if ranks == 1 else 2 + 2 + once / ranks  # into a bucket, reduced there, the rank's own part added


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("row", [row for row in ROWS if not row.startswith("3")])
def test_a_microbatch_passes_over_each_gradient_and_over_its_sum_once(walked, row, ranks):
    for found in walked[ranks]:  # beyond the passes: numbers of the loss, and a little for uneven partitions
        assert found[row]["reads"] == 0  # the host waits for nothing
        assert 3 <= found[row]["touched"] <= most_touched(row, ranks) + (0.2 if ranks == 1 else 0.5), row


# What fastppo told DeepSpeed at stage 1 in bf16 before it added up gradients where they arrive.
BEFORE = {"bf16": {"immediate_grad_update": False}, "communication_data_type": "bf16"}


@pytest.mark.slow
def test_a_checkpoint_from_before_gradients_were_added_where_they_arrive_goes_on_as_it_was(tmp_path):
    world, (old, new) = start_world(1), (tmp_path / "old.json", tmp_path / "new.json")
    old.write_text(json.dumps(BEFORE))
    new.write_text("{}")
    first, other = (engine_ranks.Bench(ZeroConfig(stage=1), "bf16", world, path) for path in (old, new))
    for microbatches in (1, 2):
        first.update(microbatches)

    def write(state, path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)

    first.engine.save(tmp_path, "actor", write)
    other.update(3)  # of which nothing may stay
    other.engine.load(tmp_path, "actor")

    def assert_same():
        for one, two in ((first.weights(), other.weights()), (first.engine.states(), other.engine.states())):
            assert len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))

    assert_same()
    for bench in (first, other):  # a single microbatch's gradient is a number of bf16, and rounding changes nothing
        bench.update(1)
    assert_same()
