"""The least time that a card needs for the phases of a PPO step: its products at its speed, its bytes at its bandwidth.

Counted are the products of layers, heads and attention, in decode steps one read of the weights and of the cache, and
in an update one pass over weights, gradients and optimizer states. All else could be hidden or fused away.
"""

from __future__ import annotations

from typing import NamedTuple

from ceilings import Ceilings
from end_to_end import Size

BF16, FP32 = 2, 4
# A trained parameter in an update: gradient, and master weight and two moments in and out, in fp32; the weight in bf16.
UPDATE_BYTES = FP32 + 2 * 3 * FP32 + BF16


class Work(NamedTuple):
    flops: float = 0.0
    moved: float = 0.0  # bytes

    def __add__(self, other: object) -> Work:
        assert isinstance(other, Work)
        return Work(self.flops + other.flops, self.moved + other.moved)

    def __mul__(self, times: object) -> Work:
        assert isinstance(times, int)
        return Work(self.flops * times, self.moved * times)

    def seconds(self, most: Ceilings) -> float:
        """If products and traffic overlap."""
        return max(self.flops / most.flops, self.moved / most.bandwidth)


def layer_weights(size: Size) -> int:
    """Parameters of the matrices of all layers."""
    width = size.hidden // size.heads
    attention = 2 * size.hidden * size.heads * width + 2 * size.hidden * size.kv_heads * width
    return size.layers * (attention + 3 * size.hidden * size.intermediate)


def head_weights(size: Size) -> int:
    return size.vocabulary * size.hidden


def forward(size: Size, sequences: int, length: int) -> Work:
    """The layers over whole sequences; causal attention computes half of its square."""
    attention = 2 * size.layers * length**2 * size.hidden
    flops = 2.0 * layer_weights(size) * sequences * length + attention * sequences
    return Work(flops, float(layer_weights(size) * BF16))


def head(size: Size, tokens: int) -> Work:
    return Work(2.0 * head_weights(size) * tokens, float(head_weights(size) * BF16))


def decode_step(size: Size, rows: int, positions: int) -> Work:
    """One token more for each of `rows` responses, whose rows of the cache hold `positions` on average."""
    weights = layer_weights(size) + head_weights(size)
    width = size.hidden // size.heads
    cache = rows * positions * 2 * size.layers * size.kv_heads * width * BF16
    attention = 4.0 * size.layers * positions * size.hidden * rows
    return Work(2.0 * weights * rows + attention, float(weights * BF16 + cache))


def update(size: Size) -> Work:
    """Adam on actor and critic: layers, embeddings, and the actor's head."""
    trained = 2 * layer_weights(size) + 3 * head_weights(size)
    return Work(0.0, float(trained * UPDATE_BYTES))


def least_seconds(size: Size, most: Ceilings) -> dict[str, float]:
    """Of each phase of a step as `end_to_end.arguments` has it: one minibatch an epoch, all rows at once."""
    length = size.prompt_tokens + size.response_tokens
    whole, heads = forward(size, size.prompts, length), head(size, size.prompts * size.response_tokens)
    sampling = forward(size, size.prompts, size.prompt_tokens).seconds(most)
    for drawn in range(size.response_tokens):
        sampling += decode_step(size, size.prompts, size.prompt_tokens + drawn).seconds(most)
    passes = whole * 2 + heads  # of actor and critic; backward twice as much
    learning = size.epochs * ((passes * 3).seconds(most) + update(size).seconds(most))
    return {
        "sampling": sampling,
        "feedback": whole.seconds(most),
        "experience": (whole * 3 + heads * 2).seconds(most),  # actor, reference and critic
        "learning": learning,
    }
