"""Best-of-n: what drawing n responses to a prompt and keeping the best scored gives, estimated from N ≥ n of them.

Everything is fp64 NumPy, and pure; intervals come from a bootstrap over prompts, with a seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEVEL = 0.95  # of all intervals, and of the test for a turn
# With fewer prompts no turn is tested: a flat judge would then seem to fall in more than the 5% that `LEVEL` allows.
MIN_PROMPTS_FOR_TURN = 20
ROUNDING = 1e-9  # differences below this share of the largest value may be rounding errors


@dataclass(frozen=True)
class Band:
    """A mean over prompts for n = 1..n_max, each (n_max,), and its interval (None with one prompt)."""

    mean: Array
    low: Array | None
    high: Array | None


@dataclass(frozen=True)
class Turn:
    """The n with the highest judge, from which the judge falls while the proxy rises."""

    n: int
    interval: tuple[int, int]  # of n
    fall: float  # the judge at n minus the judge at n_max
    fall_interval: tuple[float, float]


@dataclass(frozen=True)
class BestOfN:
    """The estimate for n = 1..n_max; n_max is the smallest N of a prompt."""

    score: Band  # the proxy of the response that the proxy chooses
    judge: Band | None  # the judge of the same response
    turn: Turn | None  # None also where no judge is, or too few prompts to tell

    @property
    def n_max(self) -> int:
        return len(self.score.mean)


def kl_bound(n: int) -> float:
    """ln n − (n − 1)/n in nats: an upper bound on the KL of best-of-n to the policy that draws the responses.

    Stiennon et al. (2020) give it as the KL itself; it is only an upper bound (Beirami et al., 2024), which is reached
    if no two responses have the same score and each is unlikely.
    """
    return math.log(n) - (n - 1) / n


def weights(samples: int, n_max: int) -> Array:  # (n_max, samples)
    """C(i−1, n−1)/C(N, n) for n = 1..n_max and i = 1..N: the share of all subsets of n whose best is the i-th lowest.

    Nakano et al. (2021), appendix on best-of-n. Computed from n/N at i = N downwards, with factors (i−n)/(i−1) ≤ 1:
    nothing overflows for any N.
    """
    n = np.arange(1, n_max + 1, dtype=np.float64)[:, None]
    i = np.arange(samples, 1, -1, dtype=np.float64)
    factors = np.concatenate([n / samples, np.maximum(i - n, 0.0) / (i - 1)], axis=1)
    return np.cumprod(factors, axis=1)[:, ::-1]


def ordered(scores: Sequence[float], judges: Sequence[float] | None) -> tuple[Array, Array | None]:
    """Scores in ascending order, and the judges in the order of the scores, (N,) each.

    Responses that tie in the score get the mean of their judges, which is the same as sharing the mean of their
    weights: which of them is chosen is left to chance.
    """
    score = np.asarray(scores, np.float64)
    if judges is None:
        return np.sort(score), None
    judge = np.asarray(judges, np.float64)
    order = np.lexsort((judge, score))  # by the judge within ties, so that sums do not depend on the order given
    _, group, counts = np.unique(score[order], return_inverse=True, return_counts=True)
    return score[order], (np.bincount(group, judge[order]) / counts)[group]


def estimate(
    scores: Sequence[Sequence[float]],
    judges: Sequence[Sequence[float]] | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> BestOfN:
    """Unbiased means over P prompts, each of the same weight, whatever its N.

    scores, judges: P prompts of N finite values each; N may differ, and n ends at the smallest. resamples: of the
    bootstrap over prompts, ≥ 1.
    """
    n_max = min(map(len, scores))
    by_samples = {samples: weights(samples, n_max) for samples in set(map(len, scores))}
    proxy, judged = [], []
    for i, values in enumerate(scores):
        score, judge = ordered(values, None if judges is None else judges[i])
        proxy.append(by_samples[len(values)] @ score)
        if judge is not None:
            judged.append(by_samples[len(values)] @ judge)
    draws = _resample(len(scores), resamples, seed)
    proxies = np.stack(proxy)  # (P, n_max)
    if judges is None:
        return BestOfN(_band(proxies, draws), None, None)
    chosen = np.stack(judged)
    return BestOfN(_band(proxies, draws), _band(chosen, draws), _turn(proxies.mean(0), chosen, draws))


def _resample(prompts: int, resamples: int, seed: int) -> Array | None:  # (resamples, P), each row sums to 1
    if prompts == 1:
        return None
    uniform = np.full(prompts, 1 / prompts)
    return np.random.default_rng(seed).multinomial(prompts, uniform, size=resamples) / prompts


def _band(values: Array, draws: Array | None) -> Band:
    if draws is None:
        return Band(values.mean(0), None, None)
    low, high = _interval(draws @ values)
    return Band(values.mean(0), low, high)


def _interval(values: Array, method: str = "linear") -> Array:  # (2, ...)
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    return np.quantile(values, ends, axis=0, method=method)  # type: ignore[call-overload, no-any-return]


def _turn(proxy: Array, judges: Array, draws: Array | None) -> Turn | None:
    """The n at which the mean judge is highest, if its fall from there to n_max is more than noise.

    The highest of many noisy values always falls. So the fall, in standard errors, is compared with the largest over
    all n of a bootstrap whose mean is moved to no fall at all (sup-t): of judges that do not fall at any n, at most
    about 1 − `LEVEL` are said to turn.
    """
    mean = judges.mean(0)
    top = int(mean.argmax())
    rises = proxy[-1] - proxy[top] > ROUNDING * np.abs(proxy).max()
    if draws is None or len(judges) < MIN_PROMPTS_FOR_TURN or not rises:
        return None
    falls = judges[:, :-1] - judges[:, -1:]  # (P, n_max - 1)
    fall, drawn = falls.mean(0), draws @ falls
    error = drawn.std(0)
    noise = np.divide(drawn - fall, error, out=np.zeros_like(drawn), where=error > 0).max(1)  # (resamples,)
    if fall[top] <= max(np.quantile(noise, LEVEL) * error[top], ROUNDING * np.abs(judges).max()):
        return None
    first, last = _interval((draws @ judges).argmax(1) + 1.0, "nearest")
    low, high = _interval(drawn[:, top])
    return Turn(top + 1, (int(first), int(last)), float(fall[top]), (float(low), float(high)))
