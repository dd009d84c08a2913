"""flash-attn's call sites, with a stand-in of its signatures: what it is given, and that nothing changes by it."""

import inspect
import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import tiny
import torch
from flash_stand_in import FlashStandIn
from transformers import AutoModelForCausalLM

from fastppo import ops
from fastppo.config import SamplingConfig
from fastppo.data.batch import Prompts, pack
from fastppo.errors import FastPPOError
from fastppo.models.attention import choose_attention, compute_with
from fastppo.models.flash import FlashAttention, choose_flash
from fastppo.models.loading.model_check import check_architecture
from fastppo.models.roles import Policy, fuse_head
from fastppo.rollout.inprocess import sample

SEQUENCES = [(5, 6, 7, 8, 9, 10, 11, 12), (9, 10), (11, 12, 13), (1, 2, 3), (4,), tuple(range(20, 37))]
PACKED = pack(SEQUENCES, [3, 1, 2, 1, 1, 9])
PROMPTS = [(5, 6, 7), (8, 9, 10, 11, 12, 13, 14, 15, 16), (17,), (18, 19, 20, 21, 22), (23, 24, 25)]
FAMILIES = ["llama", "mistral", "gemma2", "gpt2"]  # grouped heads, a sliding window, a soft cap, one key a head
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def flash():
    """Attention by the stand-in during the test."""
    stand_in = FlashStandIn()
    compute_with(FlashAttention(stand_in.flash_attn_varlen_func, stand_in.flash_attn_with_kvcache))
    yield stand_in
    compute_with(None)


def forward_and_backward(family):
    """Hidden states and the gradients of a weighted sum of them, of a model in fp16."""
    model = tiny.causal(family, dtype=torch.float16)
    hidden = Policy(model).hidden(PACKED)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden.float() * weights).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_through_flash_attn_give_the_outputs_and_gradients_of_sdpa(family, flash):
    found, gradients = forward_and_backward(family)
    assert flash.varlen_calls == tiny.LAYERS
    compute_with(None)
    expected, expected_gradients = forward_and_backward(family)
    assert flash.varlen_calls == tiny.LAYERS
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        error = (gradient - expected_gradients[name]).float().norm() / expected_gradients[name].float().norm()
        assert error < 1e-2, name


def test_the_starts_of_sequences_are_made_once_for_all_layers(flash):
    with torch.no_grad():
        Policy(tiny.causal(dtype=torch.bfloat16)).hidden(PACKED)
    assert len(flash.cu_seqlens) == tiny.LAYERS and len({id(x) for x in flash.cu_seqlens}) == 1
    assert flash.cu_seqlens[0].tolist() == PACKED.cu_seqlens.tolist()


def responses(actor, **settings):
    prompts = Prompts.of(PROMPTS, range(len(PROMPTS)))
    config = SamplingConfig(max_new_tokens=12, **settings)
    return sample(actor, prompts, config, stop_ids=range(0, 257, 6), seed=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_through_flash_attn_writes_the_same_greedy_tokens(family, monkeypatch, flash):
    """In fp32, since in bf16 the rounding of either decides between near ties."""
    monkeypatch.setattr("fastppo.models.flash.DTYPES", (torch.float32,))
    flash.dtypes = (torch.float32,)
    actor = Policy(fuse_head(tiny.causal(family)))
    found = responses(actor, top_k=1).packed
    assert flash.varlen_calls == tiny.LAYERS and flash.cache_calls > tiny.LAYERS
    compute_with(None)
    expected = responses(actor, top_k=1).packed
    assert flash.varlen_calls == tiny.LAYERS
    assert found.cu_seqlens.tolist() == expected.cu_seqlens.tolist()
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert len(set(found.response_lengths.tolist())) > 1  # rows left the batch, the others stayed in their places


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16_sampler_and_trainer_are_as_close_through_flash_attn_as_through_sdpa(family, flash):
    actor = Policy(fuse_head(tiny.causal(family, dtype=torch.bfloat16)))

    def difference():
        found = responses(actor, ignore_eos=True)
        with torch.no_grad():
            stats = actor(found.packed, lambda p, h: p.head(h, ops.linear_logprobs, found.packed.responses))
        return float((found.logprobs - stats.logprobs).abs().mean())

    through_flash = difference()
    assert flash.varlen_calls == 2 * tiny.LAYERS and flash.cache_calls > tiny.LAYERS
    compute_with(None)
    assert through_flash < 1.5 * difference()


def test_heads_too_wide_for_flash_attn_take_sdpa_and_the_log_says_so(flash, caplog):
    model = tiny.causal(head_dim=264, dtype=torch.bfloat16)
    with caplog.at_level(logging.INFO, logger="fastppo"), torch.no_grad():
        Policy(model).hidden(PACKED)
    assert flash.varlen_calls == 0
    (line,) = [r.message for r in caplog.records if "SDPA" in r.message]
    assert "width 264" in line and "256" in line


def test_heads_too_wide_are_an_error_where_flash_attn_is_asked_for(flash):
    compute_with(FlashAttention(flash.flash_attn_varlen_func, flash.flash_attn_with_kvcache, required=True))
    with pytest.raises(FastPPOError, match=r"attention is flash.*width 264.*auto or sdpa"):
        Policy(tiny.causal(head_dim=264, dtype=torch.bfloat16)).hidden(PACKED)


@pytest.mark.parametrize("required", [False, True])
def test_the_check_at_load_is_in_fp32_by_sdpa_and_then_in_the_runs_dtype_by_flash_attn(required, flash, caplog):
    compute_with(FlashAttention(flash.flash_attn_varlen_func, flash.flash_attn_with_kvcache, required=required))
    config = tiny.causal("gemma2", sliding_window=6 + required).config
    check_architecture(AutoModelForCausalLM, config, CPU, torch.float32)
    assert flash.varlen_calls == flash.cache_calls == 0
    check_architecture(AutoModelForCausalLM, config, CPU, torch.bfloat16)
    assert flash.varlen_calls > 0 and flash.cache_calls > 0
    assert not [r for r in caplog.records if "SDPA" in r.message]


def install(monkeypatch, version="2.8.3"):
    """The stand-in as the installed flash_attn, and a GPU to run on."""
    module, stand_in = ModuleType("flash_attn"), FlashStandIn()
    module.__spec__, module.__version__ = ModuleSpec("flash_attn", None), version
    module.flash_attn_varlen_func = stand_in.flash_attn_varlen_func
    module.flash_attn_with_kvcache = stand_in.flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize("setting", ["auto", "flash"])
def test_flash_attn_is_taken_on_cuda_where_it_is_installed(setting, monkeypatch, caplog):
    install(monkeypatch)
    with caplog.at_level(logging.INFO, logger="fastppo"):
        flash = choose_flash(setting, torch.bfloat16, CUDA)
    assert flash is not None and flash.required == (setting == "flash")
    assert flash.varlen.__name__ == "flash_attn_varlen_func"
    assert flash.with_kvcache.__name__ == "flash_attn_with_kvcache"
    assert [r.message for r in caplog.records] == ["attention on cuda:0: flash-attn 2.8.3"]


def test_sdpa_is_taken_where_it_is_asked_for(monkeypatch, caplog):
    install(monkeypatch)
    with caplog.at_level(logging.INFO, logger="fastppo"):
        assert choose_flash("sdpa", torch.bfloat16, CUDA) is None
    assert [r.message for r in caplog.records] == ["attention on cuda:0: PyTorch's SDPA, because attention is sdpa"]


def absent(monkeypatch):
    install(monkeypatch)
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def built_for_another_torch(monkeypatch):
    install(monkeypatch)

    def fail(name):
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr("importlib.import_module", fail)


OBSTACLES = {
    "absent": (absent, torch.bfloat16, CUDA, "pip install flash-attn --no-build-isolation"),
    "another torch": (built_for_another_torch, torch.bfloat16, CUDA, "undefined symbol.*pip install flash-attn"),
    "old": (lambda m: install(m, "2.5.9"), torch.bfloat16, CUDA, "flash-attn is 2.5.9.*2.6.*--upgrade"),
    "fp32": (install, torch.float32, CUDA, "optim.dtype is fp32"),
    "CPU": (install, torch.bfloat16, CPU, "runs on CUDA and this run uses cpu"),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_what_stands_in_its_way_is_an_error_if_flash_is_asked_for_and_one_line_if_not(case, monkeypatch, caplog):
    arrange, dtype, device, words = OBSTACLES[case]
    arrange(monkeypatch)
    with pytest.raises(FastPPOError, match=f"attention is flash, but .*{words}.*auto or sdpa"):
        choose_flash("flash", dtype, device)
    with caplog.at_level(logging.INFO, logger="fastppo"):
        assert choose_flash("auto", dtype, device) is None
    (record,) = caplog.records
    assert record.message.startswith(f"attention on {device}: PyTorch's SDPA, because ")


def test_on_this_cpu_a_run_that_asks_for_flash_is_refused():
    with pytest.raises(FastPPOError, match=r"attention is flash.*pip install flash-attn --no-build-isolation"):
        choose_attention("flash", torch.bfloat16, CPU)


@pytest.mark.gpu
def test_the_stand_in_has_flash_attns_own_signatures():
    flash_attn = pytest.importorskip("flash_attn")
    for name in ("flash_attn_varlen_func", "flash_attn_with_kvcache"):
        theirs, ours = (inspect.signature(getattr(x, name)).parameters for x in (flash_attn, FlashStandIn()))
        assert list(theirs) == list(ours)
        assert [p.default for p in theirs.values()] == [p.default for p in ours.values()]
