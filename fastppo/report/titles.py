"""The title of each metric, what it measures and in which unit, and its range."""

from __future__ import annotations

import math
import re
from typing import NamedTuple


class Quantity(NamedTuple):
    """The quantity that a chart shows."""

    title: str
    note: str = ""  # what is measured, and its unit
    low: float = -math.inf
    high: float = math.inf


def _share(title: str, note: str) -> Quantity:
    return Quantity(title, note, 0.0, 1.0)


def _size(title: str, note: str = "") -> Quantity:
    """A quantity that cannot be negative."""
    return Quantity(title, note, 0.0)


HEALTH = {
    "entropy": _size("Entropy", "nats per token"),
    "distinct_1": _share("Distinct-1", "distinct tokens / all tokens"),
    "distinct_2": _share("Distinct-2", "distinct pairs of tokens / all pairs"),
    "distinct_3": _share("Distinct-3", "distinct triples of tokens / all triples"),
    "self_bleu": _share("Self-BLEU", "similarity of responses to each other"),
    "repetition": _share("Repetition", "share of repeated 4-grams in a response"),
    "duplicates": _share("Duplicates", "share of responses that are copies"),
    "length_spread": _size("Length spread", "standard deviation of lengths / mean length"),
    "kl_token": Quantity("KL to the reference", "sampled, nats per token"),
    "kl_sequence": Quantity("KL to the reference", "sampled, nats per response"),
    "kl_exact": _size("Exact KL to the reference", "nats per token"),
    "kl_exact_sequence": _size("Exact KL to the reference", "nats per response"),
    "perplexity": _size("Perplexity", "of responses, under the reference"),
    "judge": Quantity("Judge", "mean over responses, not used for training"),
    "judge_gap": Quantity("Judge gap", "rise of the score minus rise of the judge, standard deviations"),
    "judge_turn": _size("Judge turn", "trend statistic z of a falling judge while the score rises"),
    "length_correlation": Quantity("Length correlation", "rank correlation of score and length", -1.0, 1.0),
    "rewarded_phrase": _share("Rewarded phrase", "share of responses that contain it"),
    "approx_kl": _size("Approximate KL", "of the updates, nats per token"),
    "sampler_error": _size("Sampler error", "mean difference from the trainer's logprobs, nats per token"),
    "sampler_kl": _size("KL of the sampler to the trainer", "distance off policy, nats per token"),
    "effective_samples": _share("Effective samples", "share of tokens that count, from trainer / sampler probability"),
}
LEARNING = {
    "score": Quantity("Score", "mean over responses"),
    "score_std": _size("Spread of scores", "standard deviation"),
    "reward": Quantity("Reward", "score minus KL penalty, per response"),
    "kl": Quantity("KL to the reference", "nats per response"),
    "kl_token": Quantity("KL to the reference", "nats per token"),
    "response_length": _size("Response length", "tokens"),
    "turns": _size("Turns", "of the policy, mean over conversations"),
    "observed_tokens": _size("Observed tokens", "which the environment wrote, mean over conversations"),
    "turn_reward": Quantity("Rewards of turns", "their sum, mean over conversations"),
    "ended": _share("Ended", "share of responses that are not truncated"),
    "value": Quantity("Value", "of the critic, mean over tokens"),
    "explained_variance": Quantity("Explained variance", "of the returns, by the critic", high=1.0),
    **{
        f"explained_variance/{quarter}": Quantity("Explained variance", f"of the returns, quarter {quarter}", high=1.0)
        for quarter in range(1, 5)
    },
    **{
        f"value_bias/{quarter}": Quantity("Value less return", f"mean over tokens of quarter {quarter} of a response")
        for quarter in range(1, 5)
    },
    "advantage_share": _size("Variance of advantages", "over that of the returns, before whitening"),
    "nll_loss": _size("NLL of good responses", "nats per token"),
    "skipped_updates": _size("Skipped updates", "per step, loss or gradient not finite"),
    "sampler_error_max": _size("Largest sampler error", "difference from the trainer's logprob, nats"),
    "importance_outside": _share("Outside the bounds", "share of tokens, of trainer / sampler probability"),
    "batches_drawn": _size("Batches drawn", "of prompts, in a step"),
    "groups_drawn": _size("Groups drawn", "prompts with all their responses"),
    "groups_dropped_uninformative": _size("Uninformative groups dropped", "all their responses have the same score"),
    "groups_dropped_surplus": _size("Surplus groups dropped", "their scores differ, and the batch was full"),
    "groups_kept_uninformative": _size("Uninformative groups learned from", "too few others were drawn"),
    "tokens_drawn": _size("Tokens drawn", "of all responses of a step, dropped ones too"),
    "sampling_rounds": _size("Rounds of sampling", "in which responses are extended, in a step"),
    "in_flight": _size("Responses in flight", "that the next step goes on with"),
    "tokens_sampled": _size("Tokens sampled", "in a step, those of responses in flight too"),
    "earlier_tokens": _share("Earlier tokens", "share of the tokens learned from that earlier policies wrote"),
    "response_age": _size("Age of responses", "steps since the prompts were drawn, mean"),
    "score_drawn": Quantity("Score of all drawn", "mean over responses, dropped ones too"),
    "policy_loss": Quantity("Policy loss", "mean over updates"),
    "kl_loss": Quantity("KL loss", "mean over updates"),
    "clip_fraction": _share("Clipped", "share of tokens"),
    "dual_clip_fraction": _share("Dual clip", "share of tokens"),
    "ratio_mean": _size("Mean ratio", "new / old probability"),
    "ratio_max": _size("Largest ratio", "new / old probability"),
    "value_loss": _size("Value loss", "mean over updates"),
    "value_clip_fraction": _share("Clipped values", "share of tokens"),
    "ptx_loss": _size("PPO-ptx loss", "of the text, nats per token"),
    "actor_grad_norm": _size("Gradient norm", "actor"),
    "critic_grad_norm": _size("Gradient norm", "critic"),
    "actor_lr": _size("Learning rate", "actor"),
    "critic_lr": _size("Learning rate", "critic"),
    "kl_coef": _size("KL coefficient", "beta"),
    "imbalance": _size("Imbalance", "of the work of the ranks"),
    "ref_perplexity": _size("Perplexity", "of held-out responses, under the reference"),
    "loss": _size("Loss", "nats"),
    "kept": _size("Responses learned from", "of a Grow"),
    "prompts": _size("Prompts learned from", "that have at least one of these responses"),
    "threshold": Quantity("Threshold", "the score that responses reach"),
    "updates": _size("Updates"),
    "equal_prompts": _size("Prompts that teach nothing", "all their responses have the same score"),
    "tokens_generated": _size("Generated tokens", "of the Grow's responses"),
    "tokens_trained": _size("Trained tokens", "of responses, each pass counted"),
    "accuracy": _share("Accuracy", "share of correctly ordered pairs"),
    "calibration_error": _share("Calibration error", "difference of predicted and observed probability"),
    "score_chosen": Quantity("Score of chosen answers", "mean"),
    "score_rejected": Quantity("Score of rejected answers", "mean"),
    "reward_chosen": Quantity("Implicit reward of chosen answers", "beta times the log ratio to the reference"),
    "reward_rejected": Quantity("Implicit reward of rejected answers", "beta times the log ratio to the reference"),
    "margin": Quantity("Margin", "implicit reward of chosen minus rejected"),
    "logprob_chosen": Quantity("Logprob of chosen answers", "nats per token", high=0.0),
    "logprob_chosen_change": Quantity("Change of the chosen answers' logprob", "from the reference, nats per token"),
    "grad_norm": _size("Gradient norm", "before clipping"),
    "lr": _size("Learning rate", "of each update"),
    "perplexity": _size("Perplexity", "of held-out responses"),
    "tokens": _size("Held-out tokens", "of responses"),
}
TIME = {
    "tokens_per_second": _size("Tokens per second", "sampled tokens, over the whole step"),
    "time/step": _size("Step", "seconds"),
}


def quantity(name: str) -> Quantity:
    """The quantity of a metric by its name in metrics.jsonl; the title of an unknown metric is its name."""
    if name.startswith("health/"):
        figure = name.removeprefix("health/")
        return HEALTH.get(figure, Quantity(_in_words(figure)))
    name = name.removeprefix("eval/")
    if known := TIME.get(name) or LEARNING.get(name) or HEALTH.get(name):
        return known
    first, _, rest = name.partition("/")
    if first == "average":
        return _with(quantity(rest), "averaged weights")
    if part := re.fullmatch(r"(epoch|improve)(\d+)", first):
        return _with(quantity(rest), f"{'epoch' if part[1] == 'epoch' else 'Improve'} {part[2]}")
    if turn := re.fullmatch(r"turn(\d+)", first):
        return Quantity(
            f"{_in_words(rest)} of turn {turn[1]}", "of the environment, mean over conversations that have it"
        )
    if first == "time":
        return _size(_in_words(rest), "seconds per step")
    if first == "tokens_per_second" and rest:
        return _size(f"Tokens per second, {rest}", "processed tokens" if rest != "sampling" else "sampled tokens")
    if first == "score" and rest.isdigit():
        return Quantity(f"Score of source {rest}", f"rewards[{rest}], mean over responses")
    return Quantity(_in_words(name))


def _with(quantity: Quantity, suffix: str) -> Quantity:
    return quantity._replace(title=f"{quantity.title}, {suffix}")


def _in_words(name: str) -> str:
    return name.replace("_", " ").capitalize()
