"""The call sites of flash-attn and of torch's varlen_attn, with stand-ins of their signatures: what they are given, and
that nothing changes by them."""

import inspect
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tiny
import torch
from flash_stand_in import FlashStandIn
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from varlen_stand_in import VarlenStandIn

from fastppo import ops
from fastppo.config import SamplingConfig
from fastppo.data.batch import Prompts
from fastppo.data.packed import pack
from fastppo.errors import FastPPOError, log_once
from fastppo.models.attention import compute_with
from fastppo.models.backends.backend import AttentionBackend
from fastppo.models.backends.choice import choose_backend
from fastppo.models.cache import Cache, as_tokens
from fastppo.models.loading.model_check import check_architecture
from fastppo.models.roles import ModelError, Policy, fuse_head
from fastppo.rollout.inprocess import sample

SEQUENCES = [(5, 6, 7, 8, 9, 10, 11, 12), (9, 10), (11, 12, 13), (1, 2, 3), (4,), tuple(range(20, 37))]
PACKED = pack(SEQUENCES, [3, 1, 2, 1, 1, 9])
PROMPTS = [(5, 6, 7), (8, 9, 10, 11, 12, 13, 14, 15, 16), (17,), (18, 19, 20, 21, 22), (23, 24, 25)]
STAND_INS = {"flash": FlashStandIn, "varlen": VarlenStandIn}
NO_CAP = {"attn_logit_softcapping": None}
# Grouped heads, their biases, one key a head, a sliding window, windows in every second layer, and a soft cap.
MODELS = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "gpt2": ("gpt2", {}),
    "mistral": ("mistral", {}),
    "gemma": ("gemma2", NO_CAP),
    "gemma2": ("gemma2", {}),
}
CASES = [(backend, model) for backend in STAND_INS for model in MODELS if (backend, model) != ("varlen", "gemma2")]
CPU = torch.device("cpu")


@pytest.fixture
def stand_in(request):
    """Attention by the stand-in of this name during the test."""
    kernels = STAND_INS[request.param]()
    compute_with(kernels.backend())
    log_once.cache_clear()
    yield kernels
    compute_with(None)


each_backend = pytest.mark.parametrize("stand_in", STAND_INS, indirect=True)
each_case = pytest.mark.parametrize(("stand_in", "model"), CASES, indirect=["stand_in"])


def made(model: str, dtype: torch.dtype) -> PreTrainedModel:
    family, settings = MODELS[model]
    return tiny.causal(family, dtype=dtype, **settings)


def forward_and_backward(model: str):
    """Hidden states and the gradients of a weighted sum of them, of a model in fp16."""
    model = made(model, torch.float16)
    hidden = Policy(model).hidden(PACKED)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden.float() * weights).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@each_case
def test_packed_rows_give_the_outputs_and_gradients_of_sdpa(stand_in, model):
    found, gradients = forward_and_backward(model)
    assert stand_in.packed_calls == tiny.LAYERS
    compute_with(None)
    expected, expected_gradients = forward_and_backward(model)
    assert stand_in.packed_calls == tiny.LAYERS
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        error = (gradient - expected_gradients[name]).float().norm() / expected_gradients[name].float().norm()
        assert error < 1e-2, name


@each_backend
def test_the_starts_of_sequences_are_made_once_for_all_layers(stand_in):
    with torch.no_grad():
        Policy(tiny.causal(dtype=torch.bfloat16)).hidden(PACKED)
    assert len(stand_in.cu_seqlens) == tiny.LAYERS and len({id(x) for x in stand_in.cu_seqlens}) == 1
    assert stand_in.cu_seqlens[0].tolist() == PACKED.cu_seqlens.tolist()


# Calls of a policy's first sampling alone: a pass that shows which projections read the same states.
OBSERVED = tiny.LAYERS


def responses(actor, **settings):
    prompts = Prompts.of(PROMPTS, range(len(PROMPTS)))
    config = SamplingConfig(max_new_tokens=12, **settings)
    return sample(actor, prompts, config, stop_ids=range(0, 257, 6), seed=3)


@each_case
def test_sampling_writes_the_same_greedy_tokens_as_through_sdpa(stand_in, model, monkeypatch):
    """In fp32, since in bf16 the rounding of either decides between near ties."""
    for module in ("flash", "varlen"):
        monkeypatch.setattr(f"fastppo.models.backends.{module}.DTYPES", (torch.float32,))
    stand_in.dtypes = (torch.float32,)
    actor = Policy(fuse_head(made(model, torch.float32)))
    found = responses(actor, top_k=1).packed
    assert stand_in.packed_calls == OBSERVED + tiny.LAYERS and stand_in.cached_calls > tiny.LAYERS
    compute_with(None)
    expected = responses(actor, top_k=1).packed
    assert stand_in.packed_calls == OBSERVED + tiny.LAYERS
    assert found.cu_seqlens.tolist() == expected.cu_seqlens.tolist()
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert len(set(found.response_lengths.tolist())) > 1  # rows left the batch, the others stayed in their places


@each_case
def test_in_bf16_sampler_and_trainer_are_as_close_as_through_sdpa(stand_in, model):
    actor = Policy(fuse_head(made(model, torch.bfloat16)))

    def difference():
        found = responses(actor, ignore_eos=True)
        with torch.no_grad():
            stats = actor(found.packed, lambda p, h: p.head(h, ops.linear_logprobs, found.packed.responses))
        return float((found.logprobs - stats.logprobs).abs().mean())

    through_backend = difference()
    assert stand_in.packed_calls == OBSERVED + 2 * tiny.LAYERS and stand_in.cached_calls > tiny.LAYERS
    compute_with(None)
    assert through_backend < 1.5 * difference()


# What a backend cannot compute: the backend, the model, and words of the reason.
LACKING = {
    "flash: wide heads": ("flash", ("llama", {"head_dim": 264}), "heads of width 264 in bfloat16.*up to 256"),
    "varlen: wide heads": ("varlen", ("llama", {"head_dim": 264}), "heads of width 264 in bfloat16.*up to 256"),
    "varlen: heads of 12": ("varlen", ("llama", {"head_dim": 12}), "heads of width 12 in bfloat16.*multiples of 8"),
    "varlen: soft cap": ("varlen", ("gemma2", {}), "Gemma2Attention has a soft cap of 2 .*varlen_attn has none"),
}


@pytest.mark.parametrize(("stand_in", "family", "reason"), LACKING.values(), ids=LACKING, indirect=["stand_in"])
def test_what_a_backend_lacks_takes_sdpa_and_one_line_of_the_log_says_so(stand_in, family, reason, caplog):
    actor = Policy(fuse_head(tiny.causal(family[0], dtype=torch.bfloat16, **family[1])))
    with caplog.at_level(logging.INFO, logger="fastppo"), torch.no_grad():
        actor.hidden(PACKED)
        responses(actor)
    assert stand_in.packed_calls == stand_in.cached_calls == 0
    (line,) = [r for r in caplog.records if "SDPA" in r.message]
    assert re.search(reason, line.message)


@pytest.mark.parametrize(("stand_in", "family", "reason"), LACKING.values(), ids=LACKING, indirect=["stand_in"])
def test_what_a_backend_lacks_is_an_error_where_it_is_asked_for(stand_in, family, reason):
    backend = stand_in.backend(required=True)
    compute_with(backend)
    with pytest.raises(FastPPOError, match=f"attention is {backend.setting}, but .*{reason}.*auto or sdpa"):
        Policy(tiny.causal(family[0], dtype=torch.bfloat16, **family[1])).hidden(PACKED)


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize(("stand_in", "model"), [("flash", "gemma2"), ("varlen", "gemma")], indirect=["stand_in"])
def test_the_check_at_load_is_in_fp32_by_sdpa_and_then_in_the_runs_dtype(stand_in, model, required, caplog):
    compute_with(stand_in.backend(required=required))
    family, settings = MODELS[model]
    config = tiny.causal(family, **settings, sliding_window=6 + required).config
    check_architecture(AutoModelForCausalLM, config, CPU, torch.float32)
    assert stand_in.packed_calls == stand_in.cached_calls == 0
    check_architecture(AutoModelForCausalLM, config, CPU, torch.bfloat16)
    assert stand_in.packed_calls > 0 and stand_in.cached_calls > 0
    assert not [r for r in caplog.records if "SDPA" in r.message]


@pytest.mark.parametrize("stand_in", ["varlen"], indirect=True)
def test_a_model_that_the_required_backend_cannot_compute_is_refused_before_its_weights_are_read(stand_in):
    compute_with(stand_in.backend(required=True))
    config = tiny.causal("gemma2", sliding_window=9).config
    with pytest.raises(ModelError, match=r"attention is varlen, but Gemma2Attention has a soft cap of 2 "):
        check_architecture(AutoModelForCausalLM, config, CPU, torch.bfloat16)


# varlen_attn alone


@pytest.mark.parametrize("stand_in", ["varlen"], indirect=True)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("before", ["default", "warn", "error"])
def test_its_backward_sums_in_a_fixed_order_and_leaves_the_processs_settings_as_they_were(
    stand_in, checkpointing, before
):
    model = tiny.causal("mistral", dtype=torch.bfloat16)
    role = Policy(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        role.train()
    torch.set_deterministic_debug_mode(before)
    try:
        role.hidden(PACKED).float().sum().backward()
        after = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.set_deterministic_debug_mode("default")
    assert stand_in.modes == [(True, False)] * tiny.LAYERS
    assert after == ({"default": 0, "warn": 1, "error": 2}[before], True)
    assert stand_in.packed_calls == tiny.LAYERS * (1 + checkpointing)


def test_the_cache_as_tokens_is_the_cache_itself_row_by_row():
    cache = Cache(tiny.causal().config, rows=5, length=7, dtype=torch.float32, device=CPU)
    cache.keys.copy_(torch.arange(cache.keys.numel()).view_as(cache.keys))
    cache.lengths.copy_(torch.tensor([3, 0, 6, 1, 2]))
    cache.begin_step(torch.tensor([0, 2, 4]))
    active, keys = cache.active, cache.keys[1]
    tokens = as_tokens(keys)
    assert tokens.data_ptr() == keys.data_ptr()
    for row, start in zip([0, 2, 4], active.starts[:-1].tolist(), strict=True):
        assert torch.equal(tokens[start : start + 7], keys[row].transpose(0, 1))
    assert int(active.starts[-1]) == len(tokens) == int(active.starts[-2]) + 7
    assert active.lengths_after.tolist() == [4, 7, 3] and active.queries.tolist() == [0, 1, 2, 3]


# Against the oracle: the stand-ins on the CPU, which rehearse the test, and on a GPU the libraries


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device(request.param)


def backend_on(device: torch.device, setting: str) -> AttentionBackend:
    if device.type == "cpu":
        return STAND_INS[setting]().backend()
    try:
        backend = choose_backend(setting, torch.bfloat16, torch.device("cuda", torch.cuda.current_device()))
    except FastPPOError as error:
        pytest.skip(str(error))
    assert backend is not None
    return backend


def numbers(device: torch.device, seed: int, *shape: int) -> Tensor:
    """fp64 numbers that bf16 represents."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().double().to(device)


def oracle(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """(heads, queries, width) in fp64, the last query at the last key; scores are scaled by 0.1."""
    k, v = (x.repeat_interleave(len(q) // len(k), dim=0) for x in (k, v))
    behind = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
    hidden = (behind < 0) | (behind >= (window or k.shape[1]))
    scores = (q @ k.transpose(1, 2) * 0.1).masked_fill(hidden.to(q.device), float("-inf"))
    return scores.softmax(-1) @ v


each_shape = pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 64), (8, 2, 128), (6, 1, 256)])
each_window = pytest.mark.parametrize("window", [0, 1, 6, 1000])


@pytest.mark.parametrize("setting", STAND_INS)
@each_window
@each_shape
def test_packed_rows_are_the_oracles_and_the_backward_is_the_same_each_time(
    setting, window, heads, kv_heads, width, device
):
    backend, lengths = backend_on(device, setting), [1, 130, 17, 200, 5]
    many, few = (1, heads, sum(lengths), width), (1, kv_heads, sum(lengths), width)
    exact = [numbers(device, i, *shape).requires_grad_() for i, shape in enumerate((many, few, few))]
    gradient = numbers(device, 3, *many)
    starts = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    inputs = [x.detach().bfloat16().requires_grad_() for x in exact]

    def run():
        out = backend.packed(*inputs, starts, max(lengths), scale=0.1, window=window, softcap=0.0)
        return out, torch.autograd.grad(out, inputs, gradient.transpose(1, 2).bfloat16())

    (out, gradients), (again, same) = run(), run()
    assert torch.equal(out, again) and all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    parts = zip(*(x[0].split(lengths, dim=1) for x in exact), strict=True)
    expected = torch.cat([oracle(*part, window) for part in parts], dim=1)
    torch.testing.assert_close(out[0].transpose(0, 1).double(), expected, rtol=2e-2, atol=2e-2)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, exact, gradient[0]), strict=True):
        # A window of 1 leaves queries and keys no gradient.
        assert float((found - wanted).norm()) < 2e-2 * float(wanted.norm()) + 1e-4 * float(gradient.norm())


@pytest.mark.parametrize("setting", STAND_INS)
@each_window
@each_shape
def test_a_decode_step_is_the_oracles_and_reads_nothing_on_the_host_whatever_the_other_rows(
    setting, window, heads, kv_heads, width, device
):
    backend, held = backend_on(device, setting), [0, 200, 33, 300, 64, 127]
    size = {"hidden_size": heads * width, "head_dim": width, "num_hidden_layers": 2}
    config = LlamaConfig(num_attention_heads=heads, num_key_value_heads=kv_heads, **size)
    q, k, v = (numbers(device, i, len(held), n, 1, width) for i, n in enumerate((heads, kv_heads, kv_heads)))
    full = Cache(config, len(held), max(held) + 1, torch.bfloat16, device)
    keys, values = (numbers(device, i, *full.keys.shape) for i in (3, 4))

    def step(rows):
        cache = Cache(config, len(held), max(held) + 1, torch.bfloat16, device)
        cache.keys.copy_(keys)
        cache.values.copy_(values)
        cache.lengths.copy_(torch.tensor(held))
        new = [x[rows].bfloat16() for x in (q, k, v)]
        cache.begin_step(torch.tensor(rows, device=device))
        with without_sync(device):
            out = backend.cached(
                *new, cache.keys[1], cache.values[1], cache.active, scale=0.1, window=window, softcap=0.0
            )
        return out, cache

    rows = [0, 2, 3, 5]
    out, cache = step(rows)
    for i, row in enumerate(rows):
        n = held[row]
        there = [torch.cat([x[1, row, :, :n], new[row]], dim=1) for x, new in ((keys, k), (values, v))]
        assert torch.equal(cache.keys[1, row, :, : n + 1].double(), there[0])
        assert torch.equal(cache.values[1, row, :, : n + 1].double(), there[1])
        found = out[i].transpose(0, 1).double()
        torch.testing.assert_close(found, oracle(q[row], *there, window), rtol=2e-2, atol=2e-2)
    untouched = cache.keys[1].double() == keys[1]
    assert int((~untouched).any(-1).any(1).sum()) == len(rows)  # one position in each row
    assert torch.equal(out[2], step([3])[0][0]) and torch.equal(out, step(list(range(6)))[0][rows])


@contextmanager
def without_sync(device: torch.device) -> Iterator[None]:
    """On a GPU a host that waits for it raises RuntimeError."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if on_gpu:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_stand_in_has_flash_attns_own_signatures():
    flash_attn = pytest.importorskip("flash_attn")
    for name in ("flash_attn_varlen_func", "flash_attn_with_kvcache"):
        theirs, ours = (inspect.signature(getattr(x, name)).parameters for x in (flash_attn, FlashStandIn()))
        assert list(theirs) == list(ours)
        assert [p.default for p in theirs.values()] == [p.default for p in ours.values()]


def test_the_stand_in_has_varlen_attns_own_signature():
    from torch.nn.attention.varlen import varlen_attn

    theirs, ours = (inspect.signature(x).parameters.values() for x in (varlen_attn, VarlenStandIn().varlen_attn))
    assert [(p.name, p.kind, p.default) for p in theirs] == [(p.name, p.kind, p.default) for p in ours]
