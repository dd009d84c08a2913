"""The presets of published recipes: what they say, and a short run of each on small models and data of its form."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import whole_runs
from architectures import RECIPES
from safetensors.torch import load_file

from fastppo.config.command_line import PPO, parse
from fastppo.config.command_line import __file__ as command_line

PRESETS = Path(command_line).parent.parent / "presets"
PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
INSTRUCTION = ' Let\'s think step by step and output the final answer after "####".'


# What they say


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_where_it_is_from_what_was_published_and_that_it_has_not_run(name):
    header = (PRESETS / f"{name}.yaml").read_text().partition("\noutput: ")[0]
    said = " ".join(line.removeprefix("#").strip() for line in header.splitlines())
    assert re.search(r"Source: .*https://.*Published: .*fastppo has not run this", said)
    assert f"fastppo/train.py --config {name}" in said and name in PPO.presets
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{name}` |"))
    published = said.partition("Published: ")[2].partition("fastppo has not run")[0]
    figures = [number for number in re.findall(r"\d+\.\d+", row.split("|")[3])]
    assert figures and all(number in published for number in figures), (figures, published)


def test_the_recipes_of_one_task_ask_the_same_and_score_the_same():
    configs = [parse(["--config", name]) for name in RECIPES if name.startswith("gsm8k")]
    for config in configs:
        data, first = config.data, configs[0].data
        assert (data.path, data.name, data.column, data.suffix) == ("openai/gsm8k", "main", "question", INSTRUCTION)
        assert (data.eval_path, data.eval_split, data.max_prompt_tokens) == (
            "openai/gsm8k",
            "test",
            first.max_prompt_tokens,
        )
        assert config.rewards == configs[0].rewards and config.rewards[0].math == "answer"


# What they do, at a size at which they can


def tldr(folder: Path) -> dict[str, Any]:
    """GPT-NeoX models, and posts in the columns and splits of trl-lib/tldr."""
    rows = [
        {
            "prompt": f"SUBREDDIT: r/advice\n\nTITLE: My {n}\n\nPOST: It broke.\n\nTL;DR:",
            "completion": f" My {n} broke.",
        }
        for n in ("car", "mug", "bike", "door", "lamp", "oven", "boat", "shoe", "desk", "fork", "vase", "hat")
    ]
    splits = {"train": rows, "validation": [rows[0] | {"prompt": rows[0]["prompt"].replace("car", "cat")}] * 2}
    actor = tiny.saved(folder / "actor", tiny.causal("gpt_neox", max_position_embeddings=256))
    reward = tiny.saved(folder / "reward", tiny.classifier(family="gpt_neox", max_position_embeddings=256))
    return {
        **{"actor__model": actor, "critic__model": reward, "rewards": json.dumps([{"model": reward}])},
        **{"data__path": hub_like(folder, splits), "data__max_prompt_tokens": 80, "ppo__batch_size": 16},
        "ppo__microbatch_tokens": 600,
    }


def gsm8k(folder: Path, responses: int) -> dict[str, Any]:
    """A Qwen2, and problems in the columns and splits of openai/gsm8k (main)."""
    rows = [
        {
            "question": f"{name} has {n} apples and buys {12 - n}. How many apples does {name} have?",
            "answer": f"{name} has {n}+{12 - n}=<<{n}+{12 - n}=12>>12 apples.\n#### 12",
        }
        for n, name in enumerate(("Ann", "Ben", "Cy", "Dee", "Eve", "Flo", "Gus", "Hal"), start=1)
    ]
    splits = {"train": rows[:-2], "test": rows[-2:]}
    return {
        "actor__model": tiny.saved(folder / "actor", tiny.causal("qwen2", max_position_embeddings=256)),
        **{"data__path": hub_like(folder, splits), "data__max_prompt_tokens": 180, "sampling__max_new_tokens": 24},
        **{"ppo__batch_size": responses, "ppo__microbatch_tokens": 600},
    }


def hub_like(folder: Path, splits: dict[str, list[dict[str, str]]]) -> str:
    """A dataset with these splits, which a run reads by the same settings as one on the hub."""
    tables = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(tables).save_to_disk(folder / "data")
    return str(folder / "data")


# A model that has learned nothing solves no problem: about half of its responses get a right answer at their end.
ANSWERING = """
from fastppo.rewards import scoring

texts = scoring.response_texts

def answering(packed, tokenizer):
    return [f"{text}\\n#### {12 + sum(map(ord, text)) % 2}" for text in texts(packed, tokenizer)]

scoring.response_texts = answering
"""


def trained(name: str, folder: Path, forks: Any, **changes: Any) -> list[dict[str, Any]]:
    """The metrics of the steps of a short run of the preset; only models, data and sizes are others."""
    small = {
        **{"output": folder / "run", "steps": 2, "threads": 1, "plan": "off", "sampling__rows": 16},
        **{"eval__prompts": 2, "track__tensorboard": "false", "data__eval_path": changes["data__path"]} | changes,
    }
    argv = [part for key, value in small.items() for part in (f"--{key.replace('__', '.')}", str(value))]
    forks.run(["--config", name, *argv], before=ANSWERING if "gsm8k" in name else "")
    return [line for line in whole_runs.records(folder / "run") if "score" in line]


def changed(folder: Path) -> set[str]:
    """The weights of the actor that the run exports as others than it began with."""
    before, after = (load_file(folder / part / "model.safetensors") for part in ("actor", "run/actor"))
    return {name for name in before if not before[name].to(after[name].dtype).equal(after[name])}


def penalised(step: dict[str, Any], kl_coef: float, truncation: float = 0.0) -> float:
    """What is left of the score when the KL to the reference and missing ends are paid for."""
    return float(step["score"] - kl_coef * step["kl"] - truncation * (1 - step["ended"]))


def test_the_summaries_of_tldr_1b_are_scored_by_the_reward_model_and_must_end(tmp_path, forks):
    steps = trained("tldr-1b", tmp_path, forks, **tldr(tmp_path))
    assert len(steps) == 2 and changed(tmp_path)
    for step in steps:
        assert 0 < step["ended"] < 1 and step["reward"] == pytest.approx(penalised(step, 0.05, 1.0), abs=1e-4)
        assert "epoch4/ratio_mean" in step and "epoch5/ratio_mean" not in step
    assert abs(steps[0]["value"]) > 1e-3  # the critic starts as the reward model; a head of its own would start at zero


def test_gsm8k_ppo_learns_from_right_answers_with_a_critic(tmp_path, forks):
    steps = trained("gsm8k-ppo", tmp_path, forks, **gsm8k(tmp_path, 16))
    assert len(steps) == 2 and changed(tmp_path)
    for step in steps:
        assert 0 < step["score"] < 1 and step["reward"] == pytest.approx(penalised(step, 0.001), abs=1e-5)
        assert "explained_variance" in step and "nll_loss" not in step and "epoch2/ratio_mean" not in step
    assert steps[0]["value"] == 0 != steps[1]["value"]  # the head of a new critic starts at zero
    assert steps[0]["advantage_share"] == pytest.approx(1, abs=1e-4)  # with lambda 1 advantages are then the returns
    sample = json.loads((tmp_path / "run/samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].endswith(f"{INSTRUCTION}<assistant>")


def test_gsm8k_grpo_trains_adapters_without_a_critic(tmp_path, forks):
    steps = trained("gsm8k-grpo", tmp_path, forks, **gsm8k(tmp_path, 20))
    assert len(steps) == 2 and changed(tmp_path)
    assert all("_proj." in name for name in changed(tmp_path))  # of linear layers alone
    for step in steps:
        assert 0 < step["score"] < 1 and step["reward"] == pytest.approx(step["score"], abs=1e-6)
        assert not [name for name in step if "value" in name or "critic" in name]
    assert steps[0]["kl_loss"] == pytest.approx(0, abs=1e-9) and steps[1]["kl_loss"] > 0


def test_gsm8k_vapo_trains_the_critic_first_and_then_also_on_right_answers(tmp_path, forks):
    changes = gsm8k(tmp_path, 32) | {"critic__warmup_steps": 1, "optim__warmup_steps": 4}
    first, second = trained("gsm8k-vapo", tmp_path, forks, **changes)
    for step in (first, second):
        assert 0 < step["score"] < 1 and step["reward"] == pytest.approx(step["score"], abs=1e-6)
    assert first["value"] == 0 != second["value"] and first["critic_grad_norm"] > 0
    assert first["actor_grad_norm"] is None and second["kl"] == 0  # what step 2 sampled from had not been trained
    assert (
        first["advantage_share"] < 0.2
    )  # by lambda, at most 1 - 20 / 24 here: where values are zero it is 1 with lambda 1
    assert "nll_loss" not in first and second["nll_loss"] > 0
    assert second["actor_grad_norm"] > 0 and changed(tmp_path)
