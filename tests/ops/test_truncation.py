"""top_k and top_p: what is kept is the oracle's and transformers', and what is drawn is drawn from that."""

import math
from typing import Any

import pytest
import torch
from conftest import COMPILED
from csrc_calls import DTYPES, assert_repeats, assert_rows_stand_alone, kernels, names
from op_calls import Call, make
from test_ops_compile import SIZES
from test_ops_layouts import LAYOUTS, walk
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fastppo import ops
from fastppo.ops.eager import restrict

# NaN and infinities are among what is tested, and NumPy, which interprets, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
QWEN = 151_936  # tokens in its vocabulary
BOTH = {"top_k": 9, "top_p": 0.8}


def kept(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """(R, V) bool, by the kernel in use."""
    least, last = (x[:, None] for x in kernels.truncation(logits, temperature, top_k, top_p))
    x = logits.float()
    return (x > least) | ((x == least) & (torch.arange(logits.shape[1]) <= last))


def by_oracle(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    return restrict(logits, temperature, top_k, top_p) > -math.inf


IMPLEMENTATIONS = {"oracle": by_oracle, "kernel": kept}


def random_logits(rows: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    logits = (1.5 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary))).to(dtype)
    if vocabulary > 5:
        logits[1, ::3] = -math.inf  # as stop tokens before the minimum length are
    return logits


# No share of equally likely tokens is a whole number of them: there, rounding would decide.
SETTINGS = [(0, 0.4321), (0, 0.99913), (0, 1e-9), (7, 1.0), (1, 1.0), (50, 0.951), (10**6, 0.3123), (1, 0.5)]


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_what_is_kept_is_the_oracle_s(dtype, backend):
    interpreted = backend == "Triton"  # which is slow
    for vocabulary in (1, 7, 300) if interpreted else (1, 2, 7, 300, 1027, 5000):
        logits = random_logits(2, vocabulary, dtype)
        for top_k, top_p in (*SETTINGS[:2], *SETTINGS[2::2]) if interpreted else SETTINGS:
            hot_and_cold = top_p < 1 and (not interpreted or (vocabulary == 7 and dtype == torch.float32))
            for temperature in (0.8, 1e-20, 1e20) if hot_and_cold else (0.8,):
                options = (logits, temperature, top_k, top_p)
                expected = by_oracle(*options) if vocabulary > 1 else torch.ones(2, 1, dtype=torch.bool)
                assert torch.equal(kept(*options) & (logits > -math.inf), expected), options[1:]


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.5), (0, 0.9), (0, 0.999), (0, 1 - 1e-9), (95_000, 0.99), (50, 1.0)])
def test_in_a_large_vocabulary_it_is_that_of_transformers_in_fp64(top_k, top_p, dtype, level):
    """The same number of tokens, as likely ones; in bf16 many are ties, of which theirs need not be the first."""
    logits = random_logits(2, QWEN, dtype)
    expected = TemperatureLogitsWarper(0.8)(None, logits.double())
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = kept(logits, 0.8, top_k, top_p)
    assert torch.equal(found, by_oracle(logits, 0.8, top_k, top_p))
    for row in range(2):
        theirs = logits[row][expected[row].isfinite()]
        assert torch.equal(logits[row][found[row]].sort().values, theirs.sort().values)
    if dtype == torch.float32:
        assert torch.equal(found, expected.isfinite())


@pytest.mark.slow
@COMPILED
@pytest.mark.parametrize("top_p", [0.7, 0.95])
def test_a_large_vocabulary_in_triton(top_p, triton_on_cpu):
    logits = random_logits(2, 20_011, torch.bfloat16)[:1]  # of 40 tiles
    assert torch.equal(kept(logits, 0.8, 0, top_p), by_oracle(logits, 0.8, 0, top_p))


@pytest.mark.parametrize("find", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_top_k_keeps_the_k_most_likely_and_what_is_as_likely(find, backend):
    assert find(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), top_k=2).tolist() == [[False, True, True, False]]
    logits = torch.zeros(1, 10)
    logits[0, 7] = 1.0
    assert find(logits, top_k=2).all() and find(logits, top_k=2, top_p=0.999).all()
    assert find(logits, top_k=1, top_p=0.999)[0].nonzero()[:, 0].tolist() == [7]


@pytest.mark.parametrize("find", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_top_p_keeps_the_smallest_set_that_reaches_it_at_the_temperature(find, backend):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, count in ((0.4, 1), (0.49999, 1), (0.51, 2), (0.8001, 3), (0.96, 4)):
        assert int(find(logits, top_p=top_p).sum()) == count
    logits = torch.tensor([[0.6, 0.4]]).log()
    assert int(find(logits, 0.1, top_p=0.9).sum()) == 1 and int(find(logits, 1.0, top_p=0.9).sum()) == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("find", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_of_equally_likely_tokens_the_first_are_in_the_nucleus(find, dtype, backend):
    assert find(torch.zeros(1, 10, dtype=dtype), top_p=0.35)[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3]
    for vocabulary, top_p in ((600, 0.001), (600, 0.6), (1500, 0.9), (128, 0.999)):  # within a part and across
        found = find(torch.zeros(1, vocabulary, dtype=dtype), top_p=top_p)[0]
        assert torch.equal(found, torch.arange(vocabulary) < math.ceil(vocabulary * top_p))
    logits = torch.full((1, 900), -1.0, dtype=dtype)
    logits[0, [3, 850]] = 1.0
    logits[0, ::2] = 0.0
    logits[0, ::4] = -0.0  # equal to 0
    found = find(logits, top_p=0.5)[0]
    ties = found & (logits[0] == 0)
    assert found[3] and not (found & (logits[0] < 0)).any()
    assert torch.equal(ties.nonzero(), (logits[0] == 0).nonzero()[: int(ties.sum())])
    assert ties.sum() == 307  # of 450: half of e + 450 + 449 / e, without the e of the likeliest


@pytest.mark.parametrize("find", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_the_only_token_that_may_be_drawn_is_in_the_nucleus(find, backend):
    logits = torch.full((1, 3000), -math.inf)
    logits[0, 1234] = -7.0
    for top_k, top_p in ((0, 1e-9), (1, 0.5)):
        assert find(logits, 0.7, top_k, top_p)[0].nonzero()[:, 0].tolist() == [1234]
    assert find(logits, 0.7, 3, 0.999)[0].nonzero()[:, 0].tolist() == [1234]


@pytest.mark.parametrize("number", [torch.float32, torch.float64], ids=names)
def test_a_temperature_in_a_tensor_is_read_as_it_is(number, backend):
    logits, temperature = random_logits(2, 700, torch.float32), torch.tensor(0.8, dtype=number)
    made = kernels.truncation.tensors(logits, temperature, 0, 0.97)
    expected = kernels.truncation(logits, float(temperature), 0, 0.97)
    assert all(torch.equal(x, y) for x, y in zip(made, expected, strict=True))


# The draw


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_the_draw_is_that_of_logits_without_what_is_left_out_bit_for_bit(dtype, backend):
    for vocabulary in (300,) if backend == "Triton" else (1, 255, 4096, 4099, 20_000):
        logits, rows = random_logits(2, vocabulary, dtype), torch.arange(2)
        for top_k, top_p in ((0, 0.9), (20, 1.0), (250, 0.5)):
            options: dict[str, Any] = {"temperature": 0.9, "stream": rows, "offset": 3}
            for seed in range(1 if backend == "Triton" else 3):
                drawn = ops.sample_tokens(logits, **options, top_k=top_k, top_p=top_p, seed=seed)
                limited = restrict(logits, 0.9, top_k, top_p)
                expected = ops.sample_tokens(limited, **options, seed=seed)
                assert all(torch.equal(x, y) for x, y in zip(drawn, expected, strict=True))


def test_ties_of_which_some_are_left_out_are_drawn_like_the_oracle_s(level):
    logits = torch.zeros(40, 9000)
    rows = torch.arange(40)
    tokens, logprobs = ops.sample_tokens(logits, top_p=0.5, seed=1, stream=rows, offset=rows)
    assert int(tokens.max()) < 4500 and int(tokens.max()) > 4000
    torch.testing.assert_close(logprobs, torch.full((40,), -math.log(4500)))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=names)
def test_logprobs_are_those_of_what_is_kept(dtype, backend):
    logits = random_logits(3, 700, dtype)
    tokens, logprobs = ops.sample_tokens(
        logits, temperature=0.7, top_k=60, top_p=0.9, seed=5, stream=torch.arange(3), offset=1
    )
    truth = (restrict(logits, 0.7, 60, 0.9).double() / 0.7).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), truth, atol=1e-5, rtol=1e-5)
    assert 1 < by_oracle(logits, 0.7, 60, 0.9)[0].sum() < 60


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (1, 1.0), (5, 0.5)])
def test_a_row_that_cannot_be_drawn_from_is_still_found(top_k, top_p, backend):
    logits = torch.randn(6, 130, generator=torch.Generator().manual_seed(0))
    logits[1:4, 120] = torch.tensor([math.nan, -math.nan, math.inf])
    logits[4] = -math.inf
    rows = torch.arange(6)
    limits = kernels.truncation(logits, 1.0, top_k, top_p)
    tokens, logprobs = kernels.sample_tokens(logits, rows, rows, 1.0, 0, *limits)
    assert logprobs.isnan().tolist() == [False, True, True, True, True, False]
    assert all(0 <= token < 130 for token in tokens.tolist())
    for bad in range(1, 5):
        with pytest.raises(ValueError, match="row 0 of logits"):
            ops.sample_tokens(logits[bad][None], top_k=top_k, top_p=top_p, seed=0, stream=rows[:1], offset=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_a_row_stands_alone_for_any_number_of_threads(dtype, level):
    logits = random_logits(6, 30_011, dtype)
    for options in ((0.8, 0, 0.95), (0.8, 400, 0.9)):
        assert_repeats(lambda options=options: list(kernels.truncation(logits, *options)))
        assert_rows_stand_alone(lambda rows, options=options: list(kernels.truncation(logits[rows], *options)), 6)
    assert [x.shape for x in kernels.truncation(logits[:0], 1.0, 0, 0.5)] == [(0,), (0,)]


# How it is called


class Called(TorchDispatchMode):
    """A context that notes the operators that run."""

    def __enter__(self) -> "Called":
        self.names: list[str] = []
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_nothing_is_sorted_and_only_the_check_of_the_cpu_is_read():
    logits, rows = random_logits(4, 500, torch.bfloat16), torch.arange(4)
    with Called() as called:
        ops.sample_tokens(logits, **BOTH, seed=1, stream=rows, offset=rows)
    assert not {"sort", "topk", "cumsum", "softmax", "_softmax", "nonzero"} & set(called.names)
    assert called.names.count("truncation") == called.names.count("sample_tokens") == 1
    assert called.names.count("_local_scalar_dense") + called.names.count("is_nonzero") <= 1


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=names)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, dtype):
    call = make("sample_tokens", 6, vocabulary=19, dtype=dtype)
    walk(Call(call.op, call.arguments, call.coefficients | BOTH), layout, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=names)
def test_one_compilation_serves_all_sizes_and_temperatures(dtype):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(
        lambda **given: ops.sample_tokens(**given, top_k=9, top_p=0.8), fullgraph=True, backend=counter, dynamic=True
    )
    for step, tokens in enumerate(SIZES):
        call = make("sample_tokens", tokens, vocabulary=33 + 2 * step, dtype=dtype)
        given = call.plain() | {"temperature": 0.5 + step / 10}
        torch.testing.assert_close(run(**given), ops.sample_tokens(**given, **BOTH))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_the_c_kernels_name_a_bad_argument():
    logits, rows = torch.zeros(2, 5), torch.arange(2)
    for arguments, message in (
        ((logits.double(), 1.0, 0, 0.5), "logits has dtype float64"),
        ((logits, 0.0, 0, 0.5), "temperature is 0"),
        ((logits, 1.0, -1, 0.5), "top_k is -1"),
        ((logits, 1.0, 0, 1.5), "top_p is 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.truncation(*arguments)
    for limits, message in (
        ((torch.zeros(2), None), "last is None"),
        ((None, rows), "least is None"),
        ((torch.zeros(3), rows), r"least has shape \(3,\), expected \(2,\)"),
        ((torch.zeros(2), rows.int()), "last has dtype int32"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.sample_tokens(logits, rows, rows, 1.0, 0, *limits)
