"""What each metric is called and what it measures, in words and in its unit, and between which numbers it lies."""

from __future__ import annotations

import math
import re
from typing import NamedTuple


class Quantity(NamedTuple):
    """What a chart shows."""

    title: str
    note: str = ""  # what is measured, and its unit
    low: float = -math.inf
    high: float = math.inf


def _share(title: str, note: str) -> Quantity:
    return Quantity(title, note, 0.0, 1.0)


def _size(title: str, note: str = "") -> Quantity:
    """What cannot be negative."""
    return Quantity(title, note, 0.0)


HEALTH = {
    "entropy": _size("Entropy", "nats a token"),
    "distinct_1": _share("Distinct-1", "different tokens of all tokens"),
    "distinct_2": _share("Distinct-2", "different pairs of tokens of all pairs"),
    "distinct_3": _share("Distinct-3", "different triples of tokens of all triples"),
    "self_bleu": _share("Self-BLEU", "likeness of responses to each other"),
    "repetition": _share("Repetition", "share of a response's 4-grams that it repeats"),
    "duplicates": _share("Duplicates", "share of responses that are copies"),
    "length_spread": _size("Length spread", "deviation of lengths over their mean"),
    "kl_token": Quantity("KL to the reference", "sampled, nats a token"),
    "kl_sequence": Quantity("KL to the reference", "sampled, nats a response"),
    "kl_exact": _size("Exact KL to the reference", "nats a token"),
    "kl_exact_sequence": _size("Exact KL to the reference", "nats a response"),
    "perplexity": _size("Perplexity", "of responses, under the reference"),
    "judge": Quantity("Judge", "mean of the responses, never trained on"),
    "judge_gap": Quantity("Judge gap", "rise of the score less that of the judge, deviations"),
    "judge_turn": _size("Judge turn", "how surely the judge falls as the score rises, z"),
    "length_correlation": Quantity("Length correlation", "rank correlation of score and length", -1.0, 1.0),
    "rewarded_phrase": _share("Rewarded phrase", "share of responses that hold it"),
    "approx_kl": _size("Approximate KL", "of the updates, nats a token"),
    "sampler_error": _size("Sampler error", "its logprobs' mean distance from the trainer's, nats a token"),
}
LEARNING = {
    "score": Quantity("Score", "mean of the responses"),
    "score_std": _size("Spread of scores", "standard deviation"),
    "reward": Quantity("Reward", "score less KL penalty, a response"),
    "kl": Quantity("KL to the reference", "nats a response"),
    "kl_token": Quantity("KL to the reference", "nats a token"),
    "response_length": _size("Response length", "tokens"),
    "ended": _share("Ended", "share of responses"),
    "value": Quantity("Value", "the critic's, mean of the tokens"),
    "explained_variance": Quantity("Explained variance", "of the returns, by the critic", high=1.0),
    "skipped_updates": _size("Skipped updates", "of a step, as they were not finite"),
    "policy_loss": Quantity("Policy loss", "mean of the updates"),
    "kl_loss": Quantity("KL loss", "mean of the updates"),
    "clip_fraction": _share("Clipped", "share of tokens"),
    "dual_clip_fraction": _share("Clipped from below", "share of tokens"),
    "ratio_mean": _size("Mean ratio", "of new and old probability"),
    "ratio_max": _size("Largest ratio", "of new and old probability"),
    "value_loss": _size("Value loss", "mean of the updates"),
    "value_clip_fraction": _share("Clipped values", "share of tokens"),
    "ptx_loss": _size("Loss of the text", "PPO-ptx, nats a token"),
    "actor_grad_norm": _size("Gradient norm", "actor"),
    "critic_grad_norm": _size("Gradient norm", "critic"),
    "actor_lr": _size("Learning rate", "actor"),
    "critic_lr": _size("Learning rate", "critic"),
    "kl_coef": _size("KL coefficient", "beta"),
    "imbalance": _size("Imbalance", "of the ranks' work"),
    "ref_perplexity": _size("Perplexity", "of held-out responses, under the reference"),
    "loss": _size("Loss", "nats"),
    "accuracy": _share("Accuracy", "share of pairs in the right order"),
    "calibration_error": _share("Calibration error", "between predicted and observed"),
    "score_chosen": Quantity("Score of chosen answers", "mean"),
    "score_rejected": Quantity("Score of rejected answers", "mean"),
    "grad_norm": _size("Gradient norm", "before clipping"),
    "lr": _size("Learning rate", "of the update"),
    "perplexity": _size("Perplexity", "of held-out responses"),
    "tokens": _size("Held-out tokens", "of responses"),
}
TIME = {
    "tokens_per_second": _size("Tokens a second", "written, over the whole step"),
    "time/step": _size("Step", "seconds"),
}


def quantity(name: str) -> Quantity:
    """Of a metric by its name in metrics.jsonl; one that is not known goes by its name."""
    if name.startswith("health/"):
        figure = name.removeprefix("health/")
        return HEALTH.get(figure, Quantity(_in_words(figure)))
    name = name.removeprefix("eval/")
    if found := TIME.get(name) or LEARNING.get(name) or HEALTH.get(name):
        return found
    first, _, rest = name.partition("/")
    if first == "average":
        return _with(quantity(rest), "averaged weights")
    if epoch := re.fullmatch(r"epoch(\d+)", first):
        return _with(quantity(rest), f"epoch {epoch[1]}")
    if first == "time":
        return _size(_in_words(rest), "seconds a step")
    if first == "tokens_per_second" and rest:
        return _size(f"Tokens a second, {rest}", "read" if rest != "sampling" else "written")
    if first == "score" and rest.isdigit():
        return Quantity(f"Score of source {rest}", f"rewards[{rest}], mean of the responses")
    return Quantity(_in_words(name))


def _with(found: Quantity, what: str) -> Quantity:
    return found._replace(title=f"{found.title}, {what}")


def _in_words(name: str) -> str:
    return name.replace("_", " ").capitalize()
