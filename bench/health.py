"""The cost of the health figures: the time of each figure on a batch, and the share of a step for all of them.

    python bench/health.py

The batches have words with the frequencies of a natural language. One is as large as the quickstart's (32 responses of
20 tokens), where a step takes 3 s on two cores. One is larger (512 of 128), where a step is assumed to take
at most 5 s, as on a fast GPU. Exits with 1 if a share is 2% or more. Times are processor times of one thread.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import made_up_batches
import tiny

from fastppo.config import Config, HealthConfig, RewardConfig
from fastppo.monitor import health_metrics
from fastppo.monitor.health import Health, judge_gap, judge_turn, watch

BATCHES = {(32, 20): 3.0, (512, 128): 5.0}  # responses, tokens in each: seconds of a step


def batch(responses: int, length: int) -> Any:
    chance = np.random.default_rng(0)
    frequencies = 1 / np.arange(1, 50_000)
    words = chance.choice(len(frequencies), (responses, length), p=frequencies / frequencies.sum())
    return made_up_batches.batch(words.tolist(), chance.normal(size=responses), chance.normal(size=responses))


def milliseconds(work: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return 1000 * median(times)


def parts(experience: Any) -> dict[str, Callable[[], object]]:
    packed = experience.packed
    tokens, lengths = packed.responses.numpy(), packed.response_lengths.numpy()
    grams = health_metrics.ngrams(tokens, lengths, 4)
    scores = experience.scores.double().numpy()
    return {
        "n-grams, n = 1 to 4": lambda: health_metrics.ngrams(tokens, lengths, 4),
        "distinct-1, -2, -3": lambda: [health_metrics.distinct(g) for g in grams[:3]],
        "self-BLEU": lambda: health_metrics.self_bleu(tokens, lengths),
        "repetition": lambda: health_metrics.repetition(grams[3], len(lengths)),
        "duplicates": lambda: health_metrics.duplicates(tokens, lengths),
        "length correlation": lambda: health_metrics.rank_correlation(scores, lengths.astype(np.float64)),
        "rewarded phrases": lambda: health_metrics.rewarded_phrases(experience),
        "length spread": lambda: lengths.std() / lengths.mean(),
        "entropy, KL and perplexity": lambda: drift(experience),
        "all figures of a batch": lambda: health_metrics.figures(experience, exact_kl=True),
    }


def drift(experience: Any) -> list[float]:
    ratios = (experience.old_logprobs - experience.ref_logprobs).double()
    per_token = (experience.entropy.double(), ratios, experience.kl.double(), experience.ref_logprobs.double())
    return [float(x.mean()) for x in per_token]


def late(experience: Any) -> dict[str, Callable[[], object]]:
    """The figures whose cost grows with the number of steps; `watch` is everything, including alarms."""
    config = Config(health=HealthConfig(judge=(RewardConfig(function="none:none"),)))
    kept, updates = Health(), [made_up_batches.update()]
    tokenizer, window = tiny.tokenizer(), config.health.window
    watch(experience, updates, kept, config, tokenizer)
    for values in kept.history.values():
        values *= 1000
    kept.history |= {"score": [0.01 * i for i in range(1000)], "judge": [-0.1 * i for i in range(1000)]}
    responses = len(experience.packed)
    return {
        "judge gap, step 1,000": lambda: judge_gap(kept, window),
        "judge turn, step 1,000": lambda: judge_turn(kept, responses=responses, window=window),
        "watch, step 1,000": lambda: watch(experience, updates, kept, config, tokenizer),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of the health figures.")
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    experiences = [batch(*shape) for shape in BATCHES]
    columns = [parts(experience) | late(experience) for experience in experiences]
    print("| ms | " + " | ".join(f"{b} x {length}" for b, length in BATCHES) + " |\n|---|" + "---|" * len(BATCHES))
    total = []
    for name in columns[0]:
        total = [milliseconds(column[name], rounds) for column in columns]
        print(f"| {name} | " + " | ".join(f"{ms:.2f}" for ms in total) + " |", flush=True)
    shares = [ms / 1000 / seconds for ms, seconds in zip(total, BATCHES.values(), strict=True)]
    limits = " | ".join(f"{share:.3%} of {seconds} s" for share, seconds in zip(shares, BATCHES.values(), strict=True))
    print(f"| share of a step | {limits} |")
    sys.exit(0 if max(shares) < 0.02 else 1)


if __name__ == "__main__":
    main()
