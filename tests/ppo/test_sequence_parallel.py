"""`parallel.sequence`: experience, updates and scores are those of one rank."""

import json

import pytest
import split_ranks
import tiny
import torch
import whole_runs

from fastppo.distributed.world import start_world
from fastppo.models.parallel.group import choose_group, sequence_group

LONG, SHORT = [2, 3, 2000, 40, 17, 5, 9, 130], [2, 3, 2, 40, 17, 5, 9, 30]
ONE_UPDATE = ["--ppo.microbatch_tokens", "2100", "--critic.kind", "shared"]
SEVERAL = ["--ppo.minibatches", "2", "--ppo.epochs", "2", "--ppo.microbatch_tokens", "60"]
ONE_SEQUENCE = ["--ppo.microbatch_tokens", "2", "--data.max_prompt_tokens", "1", "--sampling.max_new_tokens", "1"]
GSPO = ["--ppo.estimator", "grpo", "--ppo.loss", "gspo", "--sampling.samples_per_prompt", "4"]
STAGE_3 = ["--zero.stage", "3", "--zero.deepspeed", "SPLIT", "--optim.activation_checkpointing", "true"]

# How many ranks split a row, the model, lengths and settings.
ON_EIGHT_RANKS = {"eight ranks, nine heads": (8, "nine", SHORT, [*SEVERAL, *STAGE_3])}
ON_FOUR_RANKS = {
    "llama": (4, "llama", LONG, ONE_UPDATE),
    "qwen2, two groups": (2, "qwen2", LONG, ONE_UPDATE),
    "one key head, gspo, stage 3, recomputed": (4, "one_key", SHORT, [*SEVERAL, *GSPO, *STAGE_3]),
    "fewer tokens than ranks": (4, "one_key", [2] * 8, ONE_SEQUENCE),
}
ON_TWO_RANKS = {
    "gpt2": (2, "gpt2", LONG, ONE_UPDATE),
    "gemma2, windows and soft caps": (2, "gemma2", LONG, ONE_UPDATE),
    "nine heads, frozen layers, separate critic": (2, "nine", SHORT, [*SEVERAL, "--actor.train", "1"]),
}
CASES = ON_EIGHT_RANKS | ON_FOUR_RANKS | ON_TWO_RANKS
MODELS = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "gpt2": ("gpt2", {"n_positions": 2048}),
    "gemma2": ("gemma2", {}),
    "one_key": ("llama", {"num_key_value_heads": 1}),
    "nine": ("llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}),
}


@pytest.fixture(scope="module")
def world():
    return start_world(1)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    for name, (family, settings) in MODELS.items():
        model = tiny.causal(family, num_hidden_layers=2, max_position_embeddings=2048, **settings)
        tiny.saved(folder / name, model)
    (folder / "split.json").write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    file = {"SPLIT": str(folder / "split.json")}
    return {
        case: [sequence, str(folder / model), lengths, [file.get(word, word) for word in settings]]
        for case, (sequence, model, lengths, settings) in CASES.items()
    }


@pytest.fixture(scope="module")
def split(cases, tmp_path_factory, forks):
    """What came of all cases, those on as many ranks in one set of processes, and the scores of every rank."""
    found = {}
    for ranks, names in ((8, ON_EIGHT_RANKS), (4, ON_FOUR_RANKS), (2, ON_TWO_RANKS)):
        out = tmp_path_factory.mktemp("split") / "out.pt"
        arguments = str(out), json.dumps([cases[name] for name in names])
        call = f"import split_ranks; split_ranks.main(*{arguments!r}); raise SystemExit(0)"
        run = forks.start([], ranks, before=call)
        assert forks.wait(run, seconds=900) == [0] * ranks, run.text()
        found |= dict(zip([*names, f"scores on {ranks}"], torch.load(out), strict=True))
    return found


def difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_experience_and_updates_are_those_of_one_rank(case, cases, world, split):
    _, model, lengths, settings = cases[case]
    at_stage_0 = ["--zero.stage", "0", "--zero.deepspeed", "null"]
    alone, found = split_ranks.outcome(1, model, lengths, [*settings, *at_stage_0], world), split[case]
    assert difference(alone["experience"], found["experience"]) < 1e-5
    assert difference(alone["parameters"], found["parameters"]) < 5e-5
    for one, other in zip(alone["updates"], found["updates"], strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5, nan_ok=True)
    first = found["updates"][0]
    assert (first["ratio_mean"], first["ratio_max"], first["approx_kl"]) == (1, 1, 0)


@pytest.mark.slow
def test_a_reward_model_gives_each_rank_the_scores_of_its_own_responses(world, split):
    assert sequence_group().size == 1
    alone = split_ranks.scores(world, range(4))
    by_rank = split["scores on 4"]
    assert [len(own) for own in by_rank] == [*split_ranks.SCORED]
    assert [score for own in by_rank for score in own] == pytest.approx(alone, abs=1e-5)


def test_a_model_with_too_few_heads_is_refused_before_its_weights_load(cases, monkeypatch):
    from fastppo.distributed.neighbours import Neighbours
    from fastppo.errors import ModelError
    from fastppo.models.loading.policies import load_causal

    monkeypatch.setattr("fastppo.models.parallel.group._group", sequence_group())
    choose_group(Neighbours(0, 8))
    with pytest.raises(ModelError, match=r"parallel\.sequence is 8, .* 4 heads"):
        load_causal("actor.model", cases["llama"][1], None, None, torch.float32, torch.device("cpu"), None)


@pytest.mark.slow
def test_a_run_that_splits_rows_stops_and_goes_on_bit_for_bit_with_the_metrics_of_one_rank(tmp_path, forks):
    folder = whole_runs.prepare(tmp_path)
    short = {"steps": 2, "optim__dtype": "fp32", "actor__lr": 1e-4, "critic__lr": 1e-4}
    alone, whole, cut = (folder / name for name in ("alone", "whole", "cut"))
    forks.run(whole_runs.settings(folder, alone, **short), ranks=1)
    short |= {"parallel__sequence": 2}
    forks.run(whole_runs.settings(folder, whole, **short), ranks=2)
    stopped = whole_runs.settings(folder, cut, **short)
    forks.run(stopped, ranks=2, before=whole_runs.STOP_AT.format(kind="check", n=9))
    assert len(whole_runs.records(cut)) < len(whole_runs.records(whole))
    forks.run([*stopped, "--resume", "auto"], ranks=2)
    whole_runs.assert_same_run(whole, cut)
    one, two = (whole_runs.records(output)[1] for output in (alone, whole))  # the first step
    same = ("kl", "entropy", "response_length", "imbalance")  # rewards are random numbers of each rank's own
    assert {name: two[name] for name in same} == pytest.approx({name: one[name] for name in same}, rel=1e-3, abs=1e-5)
