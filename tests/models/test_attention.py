"""Attention over packed rows in plain PyTorch: what one sequence's states may depend on."""

import pytest
import torch
import torch.nn.functional as F

from fastppo.models.attention import PLAIN_ATTENTION_MAX, attend
from fastppo.models.cache import SequenceLayout

# Some are adjacent equals, some begin at no multiple of 64 bytes.
LENGTHS = (5, 5, 5, 5, 11, 16, 1, 1, 3, 61, 61, 2, PLAIN_ATTENTION_MAX, 133, 133, 23, 5, 11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 4}, {"softcap": 2.0}], ids=["plain", "window", "softcap"])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 8), (9, 3, 64), (4, 4, 16), (1, 1, 24)])
def test_a_sequence_that_is_computed_apart_does_not_depend_on_its_neighbours(heads, kv_heads, width, options, dtype):
    torch.manual_seed(0)
    states = [torch.randn(1, sum(LENGTHS), n, width).to(dtype) for n in (heads, kv_heads, kv_heads)]

    def attended(start: int, lengths: tuple[int, ...]) -> torch.Tensor:
        layout = SequenceLayout.of(lengths, torch.device("cpu"), apart=True)
        rows = (x[:, start : start + sum(lengths)].clone().transpose(1, 2) for x in states)
        return attend(torch.nn.Identity(), *rows, None, packed=layout, **options)[0]

    together, start = attended(0, LENGTHS), 0
    for length in LENGTHS:
        assert torch.equal(attended(start, (length,)), together[:, start : start + length])
        start += length
    usual = SequenceLayout.of(LENGTHS, torch.device("cpu"))
    shared = attend(torch.nn.Identity(), *(x.transpose(1, 2) for x in states), None, packed=usual, **options)[0]
    torch.testing.assert_close(together, shared, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


def attended_by_mask(query, key, value, lengths, window):
    """The same with one mask for all sequences, from PyTorch."""
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    position = torch.cat([torch.arange(length) for length in lengths])
    distance = position[:, None] - position
    mask = (sequence[:, None] == sequence) & (distance >= 0) & (distance < (window or len(position)))
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize(
    "lengths", [(4, 4, 4), (1, 6, 6, 2), (5, PLAIN_ATTENTION_MAX + 1, 5)], ids=["one", "runs", "long"]
)
def test_outputs_and_gradients_are_those_of_attention_with_one_mask(lengths, window):
    torch.manual_seed(0)
    joined = torch.randn(
        1, sum(lengths), 8, 4, dtype=torch.float64, requires_grad=True
    )  # 4 heads, 2 of keys, 2 of values
    gradient = torch.randn(1, sum(lengths), 4, 4, dtype=torch.float64)
    query, key, value = joined.transpose(1, 2).split((4, 2, 2), dim=1)
    layout = SequenceLayout.of(lengths, torch.device("cpu"))
    out = attend(torch.nn.Identity(), query, key, value, None, packed=layout, sliding_window=window or None)[0]
    expected = attended_by_mask(query, key, value, lengths, window)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(x, joined, gradient, retain_graph=True)[0] for x in (out, expected))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
