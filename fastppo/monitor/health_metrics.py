"""How a policy is doing, in figures of the batch at hand: is it collapsing, drifting, or exploiting its reward?

Everything here is a pure function of an `Experience`, which is global, so every rank gets the same numbers.
n-grams of all responses are counted together by sorting: no loop runs over tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastppo.data import Experience

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

BLEU_SAMPLE = 64  # responses compared with each other; the cost of self-BLEU is bounded by it
NO_MATCH = 0.1  # what counts as the number of matches where there is none (Chen and Cherry, 2014, smoothing 1)
RANKED = 8  # pairs: 6 batches in 100 of this size correlate beyond 0.7 by chance, and 34 of half of it
# Tokens of a phrase: from how surprising on it counts. Under a policy that does well many a single token is twice as
# likely, for a reward likes some words; one that is twenty times as likely in half of the responses has been bought.
SURPRISING = {1: math.log(20), 3: math.log(2)}
SPREAD = 3  # responses that must hold a phrase before it counts as one that the policy repeats


class Grams(NamedTuple):
    """All n-grams of B responses for one n, G of them; none reaches from one response into the next."""

    ids: Ints  # (G,) equal for equal n-grams, from 0 without gaps
    starts: Ints  # (G,) where each begins in the packed responses
    rows: Ints  # (G,) the response that it is in


class Phrase(NamedTuple):
    """An n-gram that several responses share and the reference would write less often."""

    tokens: tuple[int, ...]
    share: float  # of the responses that hold it
    gain: float  # mean score of those, less that of the batch, in standard deviations of the batch's scores
    surprise: float  # log of how many times likelier it is under the policy than under the reference, the mean in nats


def figures(experience: Experience, *, exact_kl: bool) -> dict[str, float]:
    """Every figure of a batch by its name; NaN where it has no meaning, such as a correlation of equal numbers.

    exact_kl: whether the experience's KL is that over the whole vocabulary.
    """
    packed = experience.packed
    tokens, lengths = packed.responses.numpy(), packed.response_lengths.numpy()
    log_ratios = (experience.old_logprobs - experience.ref_logprobs).double()
    grams = ngrams(tokens, lengths, 4)
    scores, judged = experience.scores.double().numpy(), experience.judged.double().numpy()
    found = {
        "entropy": float(experience.entropy.double().mean()),
        **{f"distinct_{n}": distinct(grams[n - 1]) for n in (1, 2, 3)},
        "self_bleu": self_bleu(tokens, lengths),
        "repetition": repetition(grams[3], len(lengths)),
        "duplicates": duplicates(tokens, lengths),
        "length_spread": float(lengths.std() / lengths.mean()),
        "kl_token": float(log_ratios.mean()),
        "kl_sequence": float(log_ratios.sum()) / len(lengths),
        "perplexity": float((-experience.ref_logprobs.double().mean()).exp()),  # inf where math.exp would raise
        "score": float(scores.mean()),
        "score_std": float(scores.std()),
        "judge": float(judged.mean()),
        "judge_std": float(judged.std()),
        "length_correlation": rank_correlation(scores, lengths.astype(np.float64)),
        "sampler_error": sampler_error(experience),
        "rewarded_phrase": max((phrase.share for phrase in _phrases(experience, grams, 1)), default=0.0),
    }
    if exact_kl:
        kl = experience.kl.double()
        found |= {"kl_exact": float(kl.mean()), "kl_exact_sequence": float(kl.sum()) / len(lengths)}
    return found


def sampler_error(experience: Experience) -> float:
    """How far the sampler's log probabilities are from the trainer's, in nats a token, the mean of the distances.

    The two see other roundings, and other distributions where `sampling` leaves tokens out of the draw.
    """
    return float((experience.sampler_logprobs - experience.old_logprobs).double().abs().mean())


def ngrams(tokens: Ints, lengths: Ints, largest: int) -> list[Grams]:
    """The n-grams for n = 1 to `largest`. tokens (M,) of all responses end to end, lengths (B,).

    An n-gram is the pair of its first n-1 tokens, which have an id already, and its last.
    """
    rows = np.repeat(np.arange(len(lengths)), lengths)
    left = np.cumsum(lengths)[rows] - np.arange(len(tokens))  # (M,) tokens from here to the response's end
    single = _renumbered(tokens)
    all_ids, found = single, [Grams(single, np.arange(len(tokens)), rows)]
    for n in range(2, largest + 1):
        starts = np.flatnonzero(left >= n)
        ids = _renumbered(all_ids[starts] * len(tokens) + single[starts + n - 1])
        all_ids = np.zeros_like(single)
        all_ids[starts] = ids
        found.append(Grams(ids, starts, rows[starts]))
    return found


def _renumbered(keys: Ints) -> Ints:
    """Each key's place among the different ones."""
    order = np.argsort(keys)
    numbers = np.empty_like(keys)
    numbers[order] = np.cumsum(np.diff(keys[order], prepend=-1) != 0) - 1
    return numbers


def _different(keys: Ints) -> Ints:
    """The different keys, 0 or more, sorted. numpy.unique would hash them, which takes 25 times as long here."""
    ordered: Ints = np.sort(keys)
    different: Ints = ordered[np.diff(ordered, prepend=-1) != 0]
    return different


def distinct(grams: Grams) -> float:
    """Different n-grams over all n-grams of the batch (Li et al., 2016, distinct-n), in (0, 1]."""
    return (int(grams.ids.max()) + 1) / len(grams.ids) if len(grams.ids) else math.nan


def repetition(grams: Grams, responses: int) -> float:
    """The share of a response's n-grams that it has written before, the mean over responses that have n-grams.

    1 - different / all within each response (Welleck et al., 2020, seq-rep-n), in [0, 1).
    """
    written = np.bincount(grams.rows, minlength=responses)
    different = np.bincount(_different(grams.ids * responses + grams.rows) % responses, minlength=responses)
    some = written > 0
    return float((1 - different[some] / written[some]).mean()) if some.any() else math.nan


def duplicates(tokens: Ints, lengths: Ints) -> float:
    """The share of responses that are copies of another one in the batch, in [0, 1)."""
    return 1 - len({part.tobytes() for part in _responses(tokens, lengths)}) / len(lengths)


def _responses(tokens: Ints, lengths: Ints) -> list[Ints]:
    return np.split(tokens, np.cumsum(lengths)[:-1])


def self_bleu(tokens: Ints, lengths: Ints, sample: int = BLEU_SAMPLE) -> float:
    """BLEU-4 of each response with the others as references, the mean (Zhu et al., 2018); 1 if all are equal.

    Of more than `sample` responses as many are drawn, the same places in every batch. Orders that a response is too
    short for are left out. NaN for a single response.
    """
    if len(lengths) > sample:
        chosen = np.sort(np.random.default_rng(0).choice(len(lengths), sample, replace=False))
        parts = _responses(tokens, lengths)
        tokens, lengths = np.concatenate([parts[i] for i in chosen]), lengths[chosen]
    count = len(lengths)
    if count < 2:
        return math.nan
    log_precision, orders = np.zeros(count), np.zeros(count)
    for n, grams in enumerate(ngrams(tokens, lengths, 4), start=1):
        written = lengths - n + 1
        some = written > 0
        matches = np.maximum(_matches(grams, count), NO_MATCH)
        log_precision[some] += np.log(matches[some] / written[some])
        orders += some
    return float(np.exp(log_precision / orders + _brevity(lengths)).mean())


def _matches(grams: Grams, count: int) -> Floats:
    """(B,) how many of a response's n-grams are found in another one, none more often than it is there."""
    pairs, times = np.unique(grams.ids * count + grams.rows, return_counts=True)
    if not len(pairs):
        return np.zeros(count)
    ids, rows = pairs // count, pairs % count  # sorted by n-gram
    first = np.flatnonzero(np.diff(ids, prepend=-1))
    most = np.maximum.reduceat(times, first)[ids]
    leads = times == most
    alone = np.add.reduceat(leads.astype(np.int64), first)[ids] == 1
    second = np.maximum.reduceat(np.where(leads, 0, times), first)[ids]
    elsewhere = np.where(leads & alone, second, most)  # the most that any other response has of it
    matches = np.minimum(times, elsewhere).astype(np.float64)
    return np.bincount(rows, matches, minlength=count).astype(np.float64)


def _brevity(lengths: Ints) -> Floats:
    """(B,) the log of BLEU's brevity penalty against the reference of the closest length, the shorter of two."""
    apart = np.abs(lengths[:, None] - lengths[None, :]) * (2 * int(lengths.max()) + 1) + lengths[None, :]
    np.fill_diagonal(apart, np.iinfo(np.int64).max)
    closest = lengths[apart.argmin(1)]
    logs: Floats = np.minimum(1 - closest / lengths, 0)
    return logs


def rank_correlation(x: Floats, y: Floats) -> float:
    """Spearman's correlation of x and y (B,), ties at their mean rank, in [-1, 1].

    NaN if either is constant, and for fewer than `RANKED` pairs, which are often in order by chance.
    """
    if len(x) < RANKED:
        return math.nan
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size > 0 else math.nan


def _ranks(x: Floats) -> Floats:
    _, which, times = np.unique(x, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(times) - (times - 1) / 2)[which]
    return ranks


def rewarded_phrases(experience: Experience, most: int = 3) -> list[Phrase]:
    """The phrases that policy and reward like and the reference does not, the most shared first.

    A phrase of three tokens counts if three responses or more hold it, they score at least as well as the batch, and it
    is at least twice as likely under the policy as under the reference; a single token if it is twenty times as likely.
    """
    packed = experience.packed
    grams = ngrams(packed.responses.numpy(), packed.response_lengths.numpy(), max(SURPRISING))
    return _phrases(experience, grams, most)


def _phrases(experience: Experience, grams: Sequence[Grams], most: int) -> list[Phrase]:
    """grams: for n = 1, 2, ..."""
    found = [phrase for n in SURPRISING for phrase in _of_tokens(n, experience, grams[n - 1], most)]
    return sorted(found, key=lambda phrase: (-phrase.share, -phrase.gain))[:most]


def _of_tokens(n: int, experience: Experience, grams: Grams, most: int) -> list[Phrase]:
    count = len(experience.packed)
    pairs = _different(grams.ids * count + grams.rows)
    if not len(pairs):
        return []
    ids, rows = pairs // count, pairs % count
    scores = experience.scores.double().numpy()
    holders = np.bincount(ids)
    gains = np.bincount(ids, scores[rows] - scores.mean()) / holders
    gains = gains / scores.std() if scores.std() > 0 else np.zeros_like(gains)
    surprise = np.bincount(grams.ids, _log_ratio_of(n, experience, grams)) / np.bincount(grams.ids)
    liked = (holders >= SPREAD) & (gains > -1e-6) & (surprise >= SURPRISING[n])
    order = sorted(np.flatnonzero(liked), key=lambda i: (-holders[i], -gains[i], i))[:most]
    starts = np.zeros(len(holders), np.int64)
    starts[grams.ids] = grams.starts
    tokens = experience.packed.responses
    return [
        Phrase(
            tuple(tokens[starts[i] : starts[i] + n].tolist()),
            float(holders[i]) / count,
            float(gains[i]),
            float(surprise[i]),
        )
        for i in order
    ]


def _log_ratio_of(n: int, experience: Experience, grams: Grams) -> Any:
    """(G,) log p - log p_ref of each phrase of n tokens."""
    ratios = (experience.old_logprobs - experience.ref_logprobs).double().numpy()
    return sum(ratios[grams.starts + i] for i in range(n))
