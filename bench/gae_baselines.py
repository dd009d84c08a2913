"""Other implementations of GAE to compare with, over the same packed tokens."""

import ctypes
import subprocess
import tempfile
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

LOOP = """
#include <cstdint>
extern "C" void gae(const float* r, const float* v, const int64_t* starts, int64_t sequences, float gamma, float lam,
                    float* advantages, float* returns) {
  for (int64_t s = 0; s < sequences; ++s) {
    float next_value = 0.0f, advantage = 0.0f;
    for (int64_t t = starts[s + 1] - 1; t >= starts[s]; --t) {
      const float delta = r[t] + gamma * next_value - v[t];
      advantage = delta + gamma * lam * advantage;
      next_value = v[t];
      advantages[t] = advantage;
      returns[t] = advantage + v[t];
    }
  }
}
"""


def packed(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards and values, (M,) fp32, and cu_seqlens, (B+1,) int64."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    rewards, values = torch.randn(2, int(starts[-1])).unbind()
    return rewards, values.clone(), starts


def padded(rows: Tensor, starts: Tensor) -> Tensor:
    """Packed tokens as (B, T), padded with zeros at the end of each row."""
    return torch.nn.utils.rnn.pad_sequence([rows[a:b] for a, b in pairwise(starts.tolist())], batch_first=True)


def padded_loop(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(B, T) -> (B, T) twice: the loop of TRL's PPOTrainer, and of OpenRLHF's experience maker."""
    length, last = rewards.shape[1], 0
    backwards = []
    for t in reversed(range(length)):
        next_values = values[:, t + 1] if t < length - 1 else 0.0
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        last = delta + gamma * lam * last
        backwards.append(last)
    advantages = torch.stack(backwards[::-1], dim=1)
    return advantages, advantages + values


def step(reward: Tensor, value: Tensor, next_value: Tensor, last: Tensor, gamma: float, lam: float) -> Tensor:
    return reward + gamma * next_value - value + gamma * lam * last


@cache
def compiled_step():
    return torch.compile(step, dynamic=False)


def compiled_loop(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(T, B) -> (T, B) twice: time is the first dimension, so a step reads contiguous memory; each step is compiled.

    The whole loop would be one graph of 5 T nodes, which takes minutes to compile at T = 2,000.
    """
    run = compiled_step()
    zero = torch.zeros_like(rewards[0])
    advantages = torch.empty_like(rewards)
    last, next_value = zero, zero
    for t in reversed(range(len(rewards))):
        last = run(rewards[t], values[t], next_value, last, gamma, lam)
        next_value = values[t]
        advantages[t] = last
    return advantages, advantages + values


def associative_scan(
    rewards: Tensor, values: Tensor, starts: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(M,) -> (M,) twice: the maps A -> a A + b of all tokens, composed at distances 1, 2, 4, ... (Blelloch 1990)."""
    ends = starts[1:][starts[1:] > starts[:-1]] - 1
    next_values = torch.cat([values[1:], values.new_zeros(1)])
    next_values[ends] = 0.0
    a = torch.full_like(rewards, gamma * lam)
    a[ends] = 0.0
    b = rewards + gamma * next_values - values
    distance, longest = 1, int((starts[1:] - starts[:-1]).max())
    while distance < longest:
        b = torch.cat([b[:-distance] + a[:-distance] * b[distance:], b[-distance:]])
        a = torch.cat([a[:-distance] * a[distance:], a[-distance:]])
        distance *= 2
    return b, b + values


@cache
def plain_loop():
    """One loop in C++ at -O3: gae(rewards, values, starts, gamma, lam, advantages, returns)."""
    folder = Path(tempfile.mkdtemp())
    (folder / "loop.cpp").write_text(LOOP)
    subprocess.run(["g++", "-O3", "-shared", "-fPIC", "loop.cpp", "-o", "loop.so"], cwd=folder, check=True)
    run = ctypes.CDLL(str(folder / "loop.so")).gae

    def gae(rewards, values, starts, gamma, lam, advantages, returns):
        at = [ctypes.c_void_p(x.data_ptr()) for x in (rewards, values, starts, advantages, returns)]
        numbers = (ctypes.c_int64(len(starts) - 1), ctypes.c_float(gamma), ctypes.c_float(lam))
        run(*at[:3], *numbers, *at[3:])

    return gae
