"""Philox4x32-10: random numbers that depend on (seed, stream, offset) only.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Unlike a generator with a state, it gives a
row the same number in any batch, on any rank and in any order of calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Ten rounds of Philox4x32.

    counter: (4, R) int64, each word in [0, 2^32); key: two 32-bit words. Returns (4, R) int64, words in [0, 2^32).
    """
    multipliers = torch.tensor(MULTIPLIERS, device=counter.device)[:, None]
    keys = [[k + i * step & MASK for k, step in zip(key, KEY_STEPS, strict=True)] for i in range(10)]
    even, odd = counter[0::2], counter[1::2]  # words (0, 2), the factors of the products, and (1, 3)
    for round_key in torch.tensor(keys, device=counter.device)[:, :, None]:
        low = even * multipliers & MASK  # overflow wraps modulo 2^64, and the low word is correct
        high = multipliers * (even >> 16) + (multipliers * (even & 0xFFFF) >> 16) >> 16  # all terms are below 2^63
        even, odd = high.flip(0) ^ odd ^ round_key, low.flip(0)
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def uniform(seed: int, stream: Tensor, offset: Tensor) -> Tensor:
    """One number in (0, 1) for each row.

    seed: the key, taken modulo 2^64; stream, offset: (R,) int64, the high and the low half of the counter:
    counter = (offset low, offset high, stream low, stream high). Returns (R,) fp64, u = (floor(x0 / 2^9) + 1/2) / 2^23
    with x0 the first output word: 23 bits, because with 24 bits the largest number would round up to u = 1 in fp32.
    """
    counter = torch.stack((offset & MASK, offset >> 32 & MASK, stream & MASK, stream >> 32 & MASK))
    words = philox(counter, (seed & MASK, seed >> 32 & MASK))
    return ((words[0] >> 9).double() + 0.5) * 2.0**-23
