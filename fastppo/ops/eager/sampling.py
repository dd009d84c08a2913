"""The oracle of `sample_tokens`: what top_k and top_p keep, and the draw."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.ops.philox import uniform


def sample_tokens(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int,
    stream: Tensor,
    offset: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sample one token a row by the inverse distribution function, in fp64 (Devroye 1986, ch. III.2).

    The token is the first v with p_0 + ... + p_v > u, u from `philox.uniform`, p the probabilities of what `restrict`
    keeps. A token with p_v = 0 adds nothing to the sum, so it is never sampled.
    """
    log_p = (restrict(logits, temperature, top_k, top_p).double() / temperature).log_softmax(-1)
    cumulative = log_p.exp().cumsum(-1)
    threshold = uniform(seed, stream, offset) * cumulative[:, -1]  # the sum is 1 up to rounding
    tokens = torch.searchsorted(cumulative, threshold[:, None], right=True)[:, 0]
    return tokens, log_p.gather(-1, tokens[:, None])[:, 0].float()


def restrict(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """logits (R, V) with -inf outside the k most likely tokens and outside the nucleus (Holtzman et al., 2020).

    The nucleus is the smallest set of most likely tokens whose probability, at this temperature and after top_k,
    reaches `top_p`; the most likely token is always in it. Of equally likely tokens the first come first, and top_k
    keeps all that are as likely as the k-th. Probabilities and their sums are fp64: in fp32 the sums of 150,000 are off
    by hundreds of tokens' worth. top_k 0 and top_p 1 are off.
    """
    if top_k and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.double().div_(temperature).softmax(-1)
        outside = probabilities.cumsum(-1).sub_(probabilities) >= top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), float("-inf"))
    return logits
