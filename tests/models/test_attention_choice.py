"""The setting `attention`: which backend computes a run's attention, the one line that says so, and refusals."""

import logging
import re
import sys
from importlib.machinery import ModuleSpec
from itertools import product
from types import ModuleType

import pytest
import torch
from flash_stand_in import FlashStandIn

from fastppo.errors import FastPPOError
from fastppo.models.attention import choose_attention
from fastppo.models.backends.choice import choose_backend
from fastppo.models.backends.flash import FlashAttention
from fastppo.models.backends.varlen import VarlenAttention

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch):
    """Makes a machine: flash-attn in this version or none, a GPU of this compute capability, a build of torch."""

    def make(version="2.8.3", capability=(9, 0), built=True, hip=None):
        module, stand_in = ModuleType("flash_attn"), FlashStandIn()
        module.__spec__, module.__version__ = ModuleSpec("flash_attn", None), version
        module.flash_attn_varlen_func = stand_in.flash_attn_varlen_func
        module.flash_attn_with_kvcache = stand_in.flash_attn_with_kvcache
        if version is None:
            monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
            monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        else:
            monkeypatch.setitem(sys.modules, "flash_attn", module)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
        monkeypatch.setattr(torch.version, "hip", hip)

    return make


def chosen_by_the_table(setting: str, flash: bool, varlen: bool, dtype: torch.dtype, device: torch.device, old: bool):
    """The value of the setting that names what is used; None: an error. Written apart from the code, as a table."""
    possible = device == CUDA and dtype != torch.float32 and not old
    if setting == "sdpa":
        return "sdpa"
    if setting == "auto":
        return "flash" if possible and flash else "varlen" if possible and varlen else "sdpa"
    return setting if possible and {"flash": flash, "varlen": varlen}[setting] else None


TABLE = list(
    product(
        ["auto", "flash", "varlen", "sdpa"],
        [True, False],
        [True, False],
        [torch.bfloat16, torch.float16, torch.float32],
        [CPU, CUDA],
        [(7, 5), (8, 0), (12, 0)],
    )
)


@pytest.mark.parametrize("setting", ["auto", "flash", "varlen", "sdpa"])
def test_every_setting_on_every_machine_takes_what_the_table_says_in_one_line_or_is_refused(setting, machine, caplog):
    for _, installed, built, dtype, device, capability in [case for case in TABLE if case[0] == setting]:
        machine(version="2.8.3" if installed else None, capability=capability, built=built)
        expected = chosen_by_the_table(setting, installed, built, dtype, device, capability < (8, 0))
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="fastppo"):
            if expected is None:
                with pytest.raises(FastPPOError, match=f"attention is {setting}, but .*Set attention to auto or sdpa"):
                    choose_backend(setting, dtype, device)
                assert not caplog.records
                continue
            backend = choose_backend(setting, dtype, device)
        assert (backend.setting if backend is not None else "sdpa") == expected
        assert backend is None or backend.required == (setting != "auto")
        (record,) = caplog.records
        name = {"flash": "flash-attn 2.8.3", "varlen": "torch's varlen_attn 2.", "sdpa": "PyTorch's SDPA, because "}
        assert record.message.startswith(f"attention on {device}: {name[expected]}")


def test_what_is_taken_calls_the_librarys_own_functions(machine):
    from torch.nn.attention.varlen import varlen_attn

    machine()
    flash, varlen = (choose_backend(setting, torch.bfloat16, CUDA) for setting in ("flash", "varlen"))
    assert isinstance(flash, FlashAttention) and isinstance(varlen, VarlenAttention)
    assert flash.varlen.__name__ == "flash_attn_varlen_func"
    assert flash.with_kvcache.__name__ == "flash_attn_with_kvcache"
    assert varlen.function is varlen_attn


def broken(monkeypatch):
    """Imports of flash-attn fail, as one does that was built for another torch."""
    import importlib

    load = importlib.import_module

    def fail(name):
        if name == "flash_attn":
            raise ImportError("undefined symbol: _ZN3c10")
        return load(name)

    monkeypatch.setattr("importlib.import_module", fail)


# What stands in a backend's way: the machine, the run's dtype and device, and words of the reason.
OBSTACLES = {
    "flash: absent": ("flash", {"version": None}, torch.bfloat16, CUDA, "pip install flash-attn --no-build-isolation"),
    "flash: another torch": ("flash", {}, torch.bfloat16, CUDA, "undefined symbol.*pip install flash-attn"),
    "flash: old": ("flash", {"version": "2.5.9"}, torch.bfloat16, CUDA, "flash-attn is 2.5.9.*2.6.*--upgrade"),
    "flash: old GPU": ("flash", {"capability": (7, 5)}, torch.bfloat16, CUDA, "capability 8.0.* this GPU has 7.5"),
    "flash: fp32": ("flash", {}, torch.float32, CUDA, "computes? in bf16 or fp16 and optim.dtype is fp32"),
    "flash: CPU": ("flash", {}, torch.bfloat16, CPU, "runs? on CUDA and this run uses cpu"),
    "varlen: build": ("varlen", {"built": False}, torch.bfloat16, CUDA, "this torch is built without FlashAttention"),
    "varlen: ROCm": ("varlen", {"hip": "7.0"}, torch.bfloat16, CUDA, "this torch is built for ROCm"),
    "varlen: old GPU": ("varlen", {"capability": (7, 5)}, torch.bfloat16, CUDA, "capability 8.0.*this GPU has 7.5"),
    "varlen: fp32": ("varlen", {}, torch.float32, CUDA, "computes? in bf16 or fp16 and optim.dtype is fp32"),
    "varlen: CPU": ("varlen", {}, torch.bfloat16, CPU, "runs? on CUDA and this run uses cpu"),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_what_stands_in_its_way_is_an_error_if_it_is_asked_for_and_part_of_the_one_line_if_not(
    case, machine, monkeypatch, caplog
):
    setting, settings, dtype, device, words = OBSTACLES[case]
    machine(**{"version": None} | settings if setting == "varlen" else settings)
    if "another torch" in case:
        broken(monkeypatch)
    with pytest.raises(FastPPOError, match=f"attention is {setting}, but .*{words}.*auto or sdpa"):
        choose_backend(setting, dtype, device)
    with caplog.at_level(logging.INFO, logger="fastppo"):
        backend = choose_backend("auto", dtype, device)
    (record,) = caplog.records
    assert re.search(words, record.message)
    common = device == CPU or dtype == torch.float32 or "old GPU" in case
    assert (backend is None) == (common or setting == "varlen")


@pytest.mark.parametrize("setting", ["flash", "varlen"])
def test_on_this_cpu_a_run_that_asks_for_a_backend_is_refused(setting):
    with pytest.raises(FastPPOError, match=f"attention is {setting}.* It needs a GPU from Ampere on, bf16"):
        choose_attention(setting, torch.bfloat16, CPU)
