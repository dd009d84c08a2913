"""The exchange around attention, and that of rows, by ranks that are threads of this process, against one rank."""

import threading
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from fastppo.distributed.neighbours import Neighbours
from fastppo.errors import ModelError
from fastppo.models.attention import Window, attend
from fastppo.models.cache import SequenceLayout
from fastppo.models.parallel.group import Split
from fastppo.models.parallel.heads import deal_heads, pieces, to_heads, to_tokens
from fastppo.models.parallel.rows import Rows, all_columns, all_rows, computing, own_rows

CPU, WIDTH = torch.device("cpu"), 4


@dataclass
class Meeting:
    """Where the threads of a group leave what they send."""

    size: int
    parts: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self):
        self.barrier = threading.Barrier(self.size, timeout=30)


@dataclass(frozen=True)
class Threads(Neighbours):
    meeting: Meeting | None = None

    def exchange(self, parts, sent, received):
        assert parts.is_contiguous() and parts.numel() == sum(sent)
        self.meeting.parts[self.index] = list(parts.split(list(sent)))
        self.meeting.barrier.wait()
        found = [self.meeting.parts[rank][self.index].clone() for rank in range(self.size)]
        self.meeting.barrier.wait()
        assert [x.numel() for x in found] == list(received)
        return torch.cat(found)


def on_ranks(size, call):
    """What `call(group)` returns on each rank of a group."""
    meeting, found, errors = Meeting(size), [None] * size, []

    def run(rank):
        try:
            found[rank] = call(Threads(rank, size, meeting=meeting))
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    return found


def test_heads_are_dealt_in_runs_with_the_keys_that_they_read():
    assert deal_heads(9, 3, 2) == ((slice(0, 4), slice(4, 9)), (slice(0, 2), slice(1, 3)))
    assert deal_heads(4, 1, 4).keys == (slice(0, 1),) * 4
    deal = deal_heads(32, 8, 4)
    assert [deal.heads(rank) for rank in range(4)] == [(8, 2)] * 4


def test_heads_are_attended_in_pieces_whose_keys_have_as_many_readers_each():
    assert pieces(9, 3, 2, 0) == [(slice(0, 3), slice(0, 1)), (slice(3, 4), slice(1, 2))]
    assert pieces(9, 3, 2, 1) == [(slice(0, 2), slice(0, 1)), (slice(2, 5), slice(1, 2))]
    assert pieces(32, 8, 4, 3) == [(slice(0, 8), slice(0, 2))]
    assert pieces(24, 6, 4, 1) == [(slice(0, 2), slice(0, 1)), (slice(2, 6), slice(1, 2))]


def test_a_group_of_more_ranks_than_heads_is_refused_with_the_numbers():
    with pytest.raises(ModelError, match=r"parallel\.sequence is 8, .* has 6 heads.* parallel\.sequence to 4 or less"):
        deal_heads(6, 2, 8)


def test_parts_of_a_row_differ_by_one_token_at_most_and_may_be_empty():
    assert [Split.of(10, Neighbours(rank, 4)).own for rank in range(4)] == [
        *(slice(0, 3), slice(3, 6), slice(6, 8), slice(8, 10)),
    ]
    assert Split.of(2, Neighbours(3, 4)).counts == [1, 1, 0, 0]
    assert Split.of(2, Neighbours(3, 4)).own == slice(2, 2)
    assert Split.of(2, Neighbours(3, 4)).computed == slice(0, 1)
    assert Split.of(10, Neighbours(0, 1)) is None


SHAPES = [(9, 3, 2), (9, 3, 4), (4, 1, 4), (4, 2, 4), (8, 8, 8), (6, 2, 4)]  # query heads, key heads, ranks


@pytest.mark.parametrize("lengths", [(13, 1, 1, 5), (1, 1)], ids=str)
@pytest.mark.parametrize(("heads", "key_heads", "ranks"), SHAPES)
@pytest.mark.parametrize("kind", ["plain", "window", "softcap"])
def test_attention_and_its_gradient_are_those_of_one_rank(heads, key_heads, ranks, lengths, kind):
    total, random = sum(lengths), torch.Generator().manual_seed(3)
    shapes = (heads, key_heads, key_heads)
    inputs = [torch.randn(1, n, total, WIDTH, dtype=torch.float64, generator=random) for n in shapes]
    upstream = torch.randn(1, total, heads, WIDTH, dtype=torch.float64, generator=random)
    mask, softcap = (Window(3) if kind == "window" else None), (2.0 if kind == "softcap" else None)

    def passes(group):
        split = Split.of(total, group)
        part = slice(None) if split is None else split.computed
        layout = SequenceLayout.of(lengths, CPU, split=split)
        leaves = [x[:, :, part].clone().requires_grad_() for x in inputs]
        out, _ = attend(nn.Identity(), *leaves, mask, packed=layout, softcap=softcap)
        own = slice(0, total) if split is None else split.own
        kept = out[:, : own.stop - own.start]
        kept.backward(upstream[:, own])
        return kept.detach(), *(x.grad[:, :, : own.stop - own.start] for x in leaves)

    expected = passes(Neighbours(0, 1))
    parts = on_ranks(ranks, passes)
    for i, (whole, dim) in enumerate(zip(expected, (1, 2, 2, 2), strict=True)):
        torch.testing.assert_close(torch.cat([part[i] for part in parts], dim=dim), whole, rtol=1e-10, atol=1e-12)


def test_an_exchange_there_and_back_changes_nothing():
    query, key = torch.randn(1, 6, 11, WIDTH), torch.randn(1, 2, 11, WIDTH)

    def there_and_back(group):
        split = Split.of(11, group)
        own = [x[:, :, split.own] for x in (query, key, key)]
        return to_tokens(to_heads(*own, split)[0].transpose(1, 2), split, 6)

    assert torch.cat(on_ranks(4, there_and_back), dim=1).transpose(1, 2).equal(query)


def test_each_rank_has_the_numbers_of_all_rows_and_the_gradient_of_its_own():
    tokens, numbers = torch.tensor([0, 1, 5, 6, 7]), torch.arange(10.0).view(5, 2)

    def passes(group):
        rows = Rows.of(tokens, Split.of(9, group))  # of parts of 3, 2, 2, 2 tokens
        own = numbers[rows.own].clone().requires_grad_()
        whole = rows.all(own)
        whole.square().sum().backward()
        return rows.counts, whole.detach(), own.grad

    found = on_ranks(4, passes)
    assert {counts for counts, _, _ in found} == {(2, 0, 2, 1)}
    assert all(whole.equal(numbers) for _, whole, _ in found)
    assert torch.cat([gradient for _, _, gradient in found]).equal(2 * numbers)


class Next(Neighbours):
    """The first of two ranks, which sends back that what it got plus 10 comes from the second."""

    def exchange(self, parts, sent, received):
        own, _ = parts.split(list(sent))
        return torch.cat([own, own + 10])[: sum(received)]


def test_within_an_objective_heads_have_own_rows_and_give_all():
    numbers = torch.arange(4.0)
    own = numbers[:2].clone().requires_grad_()
    with computing(Rows(Next(0, 2), (2, 2))):
        assert own_rows(numbers).equal(numbers[:2])
        assert all_rows(own).equal(torch.tensor([0.0, 1.0, 10.0, 11.0]))
        one, none, two = all_columns([own, None, own.detach() + 1])
    assert none is None and one.requires_grad and not two.requires_grad
    assert two.equal(torch.tensor([1.0, 2.0, 11.0, 12.0]))
    assert all_rows(numbers) is numbers and own_rows(numbers) is numbers  # each rank has all rows
