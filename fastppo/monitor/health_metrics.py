"""Health figures of a batch, which show collapse of the policy, drift from the reference, and reward hacking.

All functions are pure. They take a `Measured` batch, which is global, so that every rank computes the same values.
The n-grams of all responses are counted together by sorting, without a Python loop over tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fastppo.data import Measured, Packed
from fastppo.ops import eager

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

BLEU_SAMPLE = 64  # the number of responses that self-BLEU compares with each other; bounds its cost
NO_MATCH = 0.1  # the count used in place of 0 matches (Chen and Cherry, 2014, smoothing 1)
# A rank correlation needs this many pairs: with 8, 6 batches in 100 correlate beyond 0.7 by chance, and with 4, 34.
MIN_RANK_PAIRS = 8
# Number of tokens of a phrase -> the least surprise (log ratio) that counts. Single tokens that are twice as likely are
# common under a policy that improves, as a reward prefers some words; one that is twenty times as likely in half of the
# responses is a sign of reward hacking.
MIN_SURPRISE = {1: math.log(20), 3: math.log(2)}
MOST_TURNS = 8  # of which the rewards are told apart
MIN_HOLDERS = 3  # a phrase counts only if at least this many responses contain it


class Grams(NamedTuple):
    """All G n-grams of B responses for one n; none crosses the boundary between two responses, or two turns of one."""

    ids: Ints  # (G,) equal for equal n-grams; contiguous from 0
    starts: Ints  # (G,) index of the first token in the packed responses
    rows: Ints  # (G,) index of the response


class Phrase(NamedTuple):
    """An n-gram that several responses contain and that is less likely under the reference."""

    tokens: tuple[int, ...]
    share: float  # the share of responses that contain it
    gain: float  # their mean score minus that of the batch, in standard deviations of the batch's scores
    surprise: float  # the mean of log p - log p_ref over its occurrences, in nats; p_ref is the reference's


def figures(batch: Measured, *, exact_kl: bool) -> dict[str, float]:
    """All figures of a batch by name; NaN if a figure is undefined, such as a correlation of constant values.

    exact_kl: whether the batch has the KL over the whole vocabulary.
    """
    packed = batch.packed
    tokens, lengths = packed.responses.numpy(), packed.response_lengths.numpy()
    turns = turns_of(packed)
    log_ratios = (batch.old_logprobs - batch.ref_logprobs).double()
    grams = ngrams(tokens, lengths, 4, turns)
    scores, judge_scores = batch.scores.double().numpy(), batch.judged.double().numpy()
    values = {
        "entropy": float(batch.entropy.double().mean()),
        **{f"distinct_{n}": distinct(grams[n - 1]) for n in (1, 2, 3)},
        "self_bleu": self_bleu(tokens, lengths, turns),
        "repetition": repetition(grams[3], len(lengths)),
        "duplicates": duplicates(tokens, lengths),
        "length_spread": float(lengths.std() / lengths.mean()),
        "kl_token": float(log_ratios.mean()),
        "kl_sequence": float(log_ratios.sum()) / len(lengths),
        "perplexity": float(
            (-batch.ref_logprobs.double().mean()).exp()
        ),  # math.exp would raise an error instead of inf
        "score": float(scores.mean()),
        "score_std": float(scores.std()),
        "judge": float(judge_scores.mean()),
        "judge_std": float(judge_scores.std()),
        "length_correlation": rank_correlation(scores, lengths.astype(np.float64)),
        "sampler_error": sampler_error(batch),
        "sampler_kl": sampler_kl(batch),
        "effective_samples": effective_samples(batch),
        "rewarded_phrase": max((phrase.share for phrase in _phrases(batch, grams, 1)), default=0.0),
    }
    if exact_kl:
        kl = batch.kl.double()
        values |= {"kl_exact": float(kl.mean()), "kl_exact_sequence": float(kl.sum()) / len(lengths)}
    return values


def turn_metrics(packed: Packed, turn_rewards: Tensor | None) -> dict[str, float]:
    """Means over the conversations of a batch; nothing without an environment.

    `turns` of the policy; `observed_tokens`, which the environment wrote; `turn_reward`, the sum of a conversation's
    rewards for turns; `turnK/reward`, that for turn K, counted from 1, over the conversations that have it, up to
    `MOST_TURNS`. turn_rewards: (M,) fp32, as in `Rollout`.
    """
    if turn_rewards is None:
        return {}
    count, rewards = len(packed), turn_rewards.double()
    observed = len(packed.tokens) - len(packed.predictors) - int(packed.prompt_lengths.sum())
    metrics = {
        "turns": float(packed.turn_counts.double().mean()),
        "observed_tokens": observed / count,
        "turn_reward": float(rewards.sum()) / count,
    }
    for turn in range(min(int(packed.turn_counts.max()), MOST_TURNS)):
        have_it = int((packed.turn_counts > turn).sum())
        metrics[f"turn{turn + 1}/reward"] = float(rewards[packed.turns == turn].sum()) / have_it
    return metrics


def sampler_error(batch: Measured) -> float:
    """The mean absolute difference of the sampler's and the trainer's log probabilities, in nats per token.

    They differ by rounding, and in their distributions if `sampling` excludes tokens (top_p, top_k).
    """
    return float((batch.sampler_logprobs - batch.old_logprobs).double().abs().mean())


def sampler_kl(batch: Measured) -> float:
    """The KL of the distribution that tokens were drawn from to the trainer's, by the estimator k3 of its tokens
    (Schulman, 2020), in nats per token: the mean of rho - 1 - log rho, with rho the trainer's probability over the
    sampler's; 0 or more. The distance off policy, where the sampler is a policy from before an update."""
    return float(eager.exp_less_tangent(batch.old_logprobs.double() - batch.sampler_logprobs.double()).mean())


def effective_samples(batch: Measured) -> float:
    """The effective sample size of the batch as a share of its M tokens (Kish, 1965): (sum rho)^2 / (M sum rho^2), with
    rho the trainer's probability of a token over the sampler's; in (0, 1], 1 if all are equal."""
    log_rho = (batch.old_logprobs.double() - batch.sampler_logprobs.double()).numpy()
    rho = np.exp(log_rho - log_rho.max())  # the share does not depend on the scale, and e^x overflows
    return float(rho.sum() ** 2 / (len(rho) * np.square(rho).sum()))


def turns_of(packed: Packed) -> Ints | None:
    """(M,) the turn that each token of a response is in, from 0; None where each response is one turn."""
    return None if packed.mask is None else packed.turns.numpy()


def ngrams(tokens: Ints, lengths: Ints, largest: int, turns: Ints | None = None) -> list[Grams]:
    """The n-grams for n = 1 to `largest`. tokens: (M,), all responses concatenated; lengths: (B,); turns: (M,), the
    turn that each token is in, None where each response is one: what stands between two turns was not written.

    The id of an n-gram is computed from the pair of the id of its first n-1 tokens and its last token.
    """
    rows = np.repeat(np.arange(len(lengths)), lengths)
    ends = np.cumsum(lengths)[rows]  # (M,) where the text that each token is in ends
    if turns is not None and len(turns):
        last = np.append((np.diff(rows) != 0) | (np.diff(turns) != 0), True)
        ends = np.repeat(np.flatnonzero(last) + 1, np.diff(np.flatnonzero(last), prepend=-1))
    remaining = ends - np.arange(len(tokens))  # (M,) tokens from here to the end
    token_ids = _dense_ids(tokens)
    prefix_ids, all_grams = token_ids, [Grams(token_ids, np.arange(len(tokens)), rows)]
    for n in range(2, largest + 1):
        starts = np.flatnonzero(remaining >= n)
        ids = _dense_ids(prefix_ids[starts] * len(tokens) + token_ids[starts + n - 1])
        prefix_ids = np.zeros_like(token_ids)
        prefix_ids[starts] = ids
        all_grams.append(Grams(ids, starts, rows[starts]))
    return all_grams


def _dense_ids(keys: Ints) -> Ints:
    """The rank of each key among the distinct keys, from 0."""
    order = np.argsort(keys)
    numbers = np.empty_like(keys)
    numbers[order] = np.cumsum(np.diff(keys[order], prepend=-1) != 0) - 1
    return numbers


def _sorted_unique(keys: Ints) -> Ints:
    """The distinct keys, each at least 0, sorted. numpy.unique hashes them, which takes 25 times as long here."""
    ordered: Ints = np.sort(keys)
    unique: Ints = ordered[np.diff(ordered, prepend=-1) != 0]
    return unique


def distinct(grams: Grams) -> float:
    """The number of distinct n-grams divided by that of all n-grams of the batch (Li et al., 2016, distinct-n), in
    (0, 1]."""
    return (int(grams.ids.max()) + 1) / len(grams.ids) if len(grams.ids) else math.nan


def distinct_pairs(packed: Packed) -> float:
    """distinct-2 of the responses of a batch."""
    return distinct(ngrams(packed.responses.numpy(), packed.response_lengths.numpy(), 2, turns_of(packed))[1])


def repetition(grams: Grams, responses: int) -> float:
    """The share of repeated n-grams within a response, averaged over the responses that have n-grams, in [0, 1).

    1 - distinct / all within each response (Welleck et al., 2020, seq-rep-n). responses: their number, B.
    """
    counts = np.bincount(grams.rows, minlength=responses)
    distinct_counts = np.bincount(_sorted_unique(grams.ids * responses + grams.rows) % responses, minlength=responses)
    nonempty = counts > 0
    return float((1 - distinct_counts[nonempty] / counts[nonempty]).mean()) if nonempty.any() else math.nan


def duplicates(tokens: Ints, lengths: Ints) -> float:
    """The share of responses that are copies of another one in the batch, in [0, 1). tokens: (M,); lengths: (B,)."""
    return 1 - len({response.tobytes() for response in _split(tokens, lengths)}) / len(lengths)


def _split(tokens: Ints, lengths: Ints) -> list[Ints]:
    return np.split(tokens, np.cumsum(lengths)[:-1])


def _selected(values: Ints, lengths: Ints, responses: Ints) -> Ints:
    parts = _split(values, lengths)
    return np.concatenate([parts[i] for i in responses])


def self_bleu(tokens: Ints, lengths: Ints, turns: Ints | None = None, sample: int = BLEU_SAMPLE) -> float:
    """The mean BLEU-4 of each response with all others as references (Zhu et al., 2018); 1 if all are equal.

    tokens, turns: (M,); lengths: (B,); as in `ngrams`. If there are more than `sample` responses, that many are drawn,
    with the same indices in every batch. n-gram orders longer than each turn of a response are left out for it. NaN for
    a single response.
    """
    if len(lengths) > sample:
        chosen = np.sort(np.random.default_rng(0).choice(len(lengths), sample, replace=False))
        tokens, turns = (
            _selected(tokens, lengths, chosen),
            turns if turns is None else _selected(turns, lengths, chosen),
        )
        lengths = lengths[chosen]
    count = len(lengths)
    if count < 2:
        return math.nan
    log_precision, orders = np.zeros(count), np.zeros(count)
    for grams in ngrams(tokens, lengths, 4, turns):
        gram_counts = np.bincount(grams.rows, minlength=count)
        nonempty = gram_counts > 0
        matches = np.maximum(_clipped_matches(grams, count), NO_MATCH)
        log_precision[nonempty] += np.log(matches[nonempty] / gram_counts[nonempty])
        orders += nonempty
    return float(np.exp(log_precision / orders + _log_brevity_penalty(lengths)).mean())


def _clipped_matches(grams: Grams, count: int) -> Floats:
    """(B,) BLEU's clipped matches: per distinct n-gram of a response, the smaller of its count there and its highest
    count in any other response. count: the number of responses, B."""
    pairs, times = np.unique(grams.ids * count + grams.rows, return_counts=True)
    if not len(pairs):
        return np.zeros(count)
    ids, rows = pairs // count, pairs % count  # sorted by n-gram
    first = np.flatnonzero(np.diff(ids, prepend=-1))
    highest = np.maximum.reduceat(times, first)[ids]
    has_highest = times == highest
    is_only_one = np.add.reduceat(has_highest.astype(np.int64), first)[ids] == 1
    second = np.maximum.reduceat(np.where(has_highest, 0, times), first)[ids]
    elsewhere = np.where(has_highest & is_only_one, second, highest)  # the highest count in any other response
    matches = np.minimum(times, elsewhere).astype(np.float64)
    return np.bincount(rows, matches, minlength=count).astype(np.float64)


def _log_brevity_penalty(lengths: Ints) -> Floats:
    """(B,) the log of BLEU's brevity penalty; the reference is the response with the closest length, of two equally
    close ones the shorter."""
    # one integer key: the difference of the lengths first, then the length of the reference
    distance = np.abs(lengths[:, None] - lengths[None, :]) * (2 * int(lengths.max()) + 1) + lengths[None, :]
    np.fill_diagonal(distance, np.iinfo(np.int64).max)
    closest = lengths[distance.argmin(1)]
    logs: Floats = np.minimum(1 - closest / lengths, 0)
    return logs


def rank_correlation(x: Floats, y: Floats) -> float:
    """Spearman's rank correlation of x and y, both (B,), with mean ranks for ties, in [-1, 1].

    NaN if x or y is constant, and for fewer than `MIN_RANK_PAIRS` pairs, which often correlate by chance.
    """
    if len(x) < MIN_RANK_PAIRS:
        return math.nan
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm > 0 else math.nan


def _ranks(x: Floats) -> Floats:
    """(B,) the ranks of x, from 1, with mean ranks for ties."""
    _, index, times = np.unique(x, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(times) - (times - 1) / 2)[index]
    return ranks


def rewarded_phrases(batch: Measured, limit: int = 3) -> list[Phrase]:
    """Up to `limit` phrases that the policy repeats, the reward does not punish and the reference makes less likely,
    sorted by the share of responses that contain them, the highest first.

    A phrase of three tokens counts if at least three responses contain it, their mean score is at least that of the
    batch, and the phrase is at least twice as likely under the policy as under the reference; a single token, if it is
    at least twenty times as likely.
    """
    packed = batch.packed
    grams = ngrams(packed.responses.numpy(), packed.response_lengths.numpy(), max(MIN_SURPRISE), turns_of(packed))
    return _phrases(batch, grams, limit)


def _phrases(batch: Measured, grams: Sequence[Grams], limit: int) -> list[Phrase]:
    """`rewarded_phrases` from given n-grams. grams: for n = 1, 2, ..."""
    phrases = [phrase for n in MIN_SURPRISE for phrase in _phrases_of_length(n, batch, grams[n - 1], limit)]
    return sorted(phrases, key=lambda phrase: (-phrase.share, -phrase.gain))[:limit]


def _phrases_of_length(n: int, batch: Measured, grams: Grams, limit: int) -> list[Phrase]:
    count = len(batch.packed)
    pairs = _sorted_unique(grams.ids * count + grams.rows)
    if not len(pairs):
        return []
    ids, rows = pairs // count, pairs % count
    scores = batch.scores.double().numpy()
    holders = np.bincount(ids)
    gains = np.bincount(ids, scores[rows] - scores.mean()) / holders
    gains = gains / scores.std() if scores.std() > 0 else np.zeros_like(gains)
    surprise = np.bincount(grams.ids, _log_ratios(n, batch, grams)) / np.bincount(grams.ids)
    is_phrase = (holders >= MIN_HOLDERS) & (gains > -1e-6) & (surprise >= MIN_SURPRISE[n])
    order = sorted(np.flatnonzero(is_phrase), key=lambda i: (-holders[i], -gains[i], i))[:limit]
    starts = np.zeros(len(holders), np.int64)
    starts[grams.ids] = grams.starts
    tokens = batch.packed.responses
    return [
        Phrase(
            tuple(tokens[starts[i] : starts[i] + n].tolist()),
            float(holders[i]) / count,
            float(gains[i]),
            float(surprise[i]),
        )
        for i in order
    ]


def _log_ratios(n: int, batch: Measured, grams: Grams) -> Any:
    """(G,) log p - log p_ref of each n-gram, in nats."""
    ratios = (batch.old_logprobs - batch.ref_logprobs).double().numpy()
    return sum(ratios[grams.starts + i] for i in range(n))
