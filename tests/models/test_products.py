"""fp32 products of linear modules by oneDNN: the same numbers, in every setting, where a processor asks for it."""

import copy
import logging
import pickle

import pytest
import tiny
import torch
import torch.nn.functional as F
from ppo_step import config_of, step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastppo.config import LoraConfig
from fastppo.distributed.world import start_world
from fastppo.errors import log_once
from fastppo.models.layers import products
from fastppo.models.layers.classes import is_changed, own_class
from fastppo.models.layers.fuse import fuse_layers, layers_as
from fastppo.models.layers.products import SMALLEST, choose_products, linear
from fastppo.models.lora import add_adapters
from fastppo.models.roles import Policy, fuse_head

HIDDEN, WIDE = 200, 400  # a weight of 80,000
ONEDNN = torch.ops.mkldnn._linear_pointwise.default


@pytest.fixture
def faster(monkeypatch):
    """As if oneDNN were faster on this machine."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)


@pytest.fixture
def every_size(faster, monkeypatch):
    """Products of tiny models, too."""
    monkeypatch.setattr(products, "SMALLEST", 0)


class Calls(TorchDispatchMode):
    """Counts the products by oneDNN."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is ONEDNN
        return func(*args, **(kwargs or {}))


def inputs(*shape, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, HIDDEN, dtype=dtype), torch.randn(WIDE, HIDDEN, dtype=dtype)
    return [t.requires_grad_() for t in (x, weight, *([torch.randn(WIDE, dtype=dtype)] if bias else []))]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (7,), (1, 33), (2, 3, 5)])
def test_output_and_gradients_are_as_close_to_fp64_as_those_of_torch(faster, shape, bias):
    def results(function, given):
        output = function(*given)
        upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        return [output.detach(), *torch.autograd.grad(output, given, upstream)]

    given = inputs(*shape, bias=bias)
    truth = results(F.linear, [t.detach().double().requires_grad_() for t in given])
    torchs = results(F.linear, given)
    with Calls() as calls:
        found = results(linear, given)
    assert calls.count == 3
    for ours, theirs, true in zip(found, torchs, truth, strict=True):
        assert ours.shape == true.shape and ours.dtype == torch.float32
        assert (ours - true).norm() <= 2 * (theirs - true).norm() + 1e-7 * true.norm()


@pytest.mark.parametrize(("out", "width"), [(WIDE, HIDDEN), (HIDDEN, WIDE)])
def test_gradients_by_weights_of_either_shape_have_its_shape(faster, out, width):
    x, weight = torch.randn(9, width), torch.randn(out, width, requires_grad=True)
    linear(x, weight).square().sum().backward()
    torch.testing.assert_close(weight.grad, 2 * (x @ weight.detach().t()).t() @ x, rtol=1e-4, atol=1e-2)


def test_only_gradients_that_are_wanted_are_computed(faster):
    x, weight, _ = inputs(7)
    for frozen, products_of_both_passes in ((x, 2), (weight, 2)):
        frozen.requires_grad_(False)
        with Calls() as calls:
            linear(x, weight).sum().backward()
        assert calls.count == products_of_both_passes
        frozen.requires_grad_(True)
    with torch.no_grad(), Calls() as calls:
        assert linear(x, weight).grad_fn is None
    assert calls.count == 1


def test_a_row_does_not_depend_on_the_number_of_rows(faster):
    x, weight, bias = (t.detach() for t in inputs(300))
    whole = linear(x, weight, bias)
    assert all(torch.equal(linear(x[:n], weight, bias), whole[:n]) for n in (2, 3, 8, 17, 64, 100, 299))


@pytest.mark.parametrize("case", ["bf16", "fp64", "meta", "small weight", "no rows", "one vector", "slower here"])
def test_all_else_is_computed_by_torch(faster, monkeypatch, case):
    x, weight, bias = (t.detach() for t in inputs(6))
    if case in ("bf16", "fp64"):
        x, weight, bias = (t.to(torch.bfloat16 if case == "bf16" else torch.float64) for t in (x, weight, bias))
    elif case == "meta":
        x, weight, bias = (t.to("meta") for t in (x, weight, bias))
    elif case == "small weight":
        weight, bias = weight[: SMALLEST // HIDDEN], bias[: SMALLEST // HIDDEN]
        assert weight.numel() < SMALLEST
    elif case in ("no rows", "one vector"):
        x = x[:0] if case == "no rows" else x[0]
    else:
        monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    with Calls() as calls:
        output = linear(x, weight, bias)
    assert calls.count == 0 and output.shape == (*x.shape[:-1], len(weight))
    assert case == "meta" or torch.equal(output, F.linear(x, weight, bias))


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("GenuineIntel", "AVX512", False),
        ("AuthenticAMD", "AVX2", False),
        ("", "AVX512", False),
    ],
)
def test_the_processor_decides(monkeypatch, tmp_path, vendor, capability, expected):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\n" + f"vendor_id\t: {vendor}\n" * bool(vendor) + "cpu family\t: 26\n")
    monkeypatch.setattr(products, "CPUINFO", info)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products.onednn_is_faster.__wrapped__() == expected  # without its cache


def test_plain_linear_modules_take_it_and_keep_all_else(faster, caplog):
    class Own(nn.Linear):
        pass

    module, other = nn.Linear(HIDDEN, WIDE), Own(HIDDEN, WIDE)
    state = copy.deepcopy(module.state_dict())
    assert choose_products(module) and not choose_products(other)
    assert type(module).__name__ == "Linear" and isinstance(module, nn.Linear) and own_class(module) is nn.Linear
    x = torch.randn(4, HIDDEN)
    for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert one.state_dict().keys() == state.keys()
        with torch.no_grad(), Calls() as calls:
            torch.testing.assert_close(one(x), F.linear(x, *state.values()))
        assert calls.count == 1


@pytest.mark.parametrize(("fused", "dtype"), [(True, torch.float32), (True, torch.bfloat16), (False, torch.float32)])
def test_a_model_in_fp32_takes_it_with_fused_layers_and_says_so_once(faster, caplog, fused, dtype):
    log_once.cache_clear()
    with layers_as(fused=fused), caplog.at_level(logging.INFO, logger="fastppo"):
        for _ in range(2):
            model = tiny.causal("llama").to(dtype)
            fuse_layers(model)
    expected = fused and dtype == torch.float32
    lines = [record.getMessage() for record in caplog.records if "oneDNN" in record.getMessage()]
    assert len(lines) == expected and all("AVX-512" in line for line in lines)
    assert all(is_changed(m) == expected for m in model.modules() if type(m).__name__ == "Linear")


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_adapts_modules_that_have_it(every_size, when):
    model = fuse_head(tiny.causal("llama"))
    if when == "before":
        fuse_layers(model)
    with layers_as(fused=when == "after"):
        policy = Policy(model)
    add_adapters(model, "actor", LoraConfig(rank=4, alpha=8.0), seed=3, source="base")
    adapted = [name for name, _ in policy.named_parameters() if "lora_A" in name]
    assert len(adapted) == 7 * tiny.LAYERS
    layers = [module.base_layer for module in policy.modules() if hasattr(module, "base_layer")]
    assert all(own_class(layer) is nn.Linear and is_changed(layer) for layer in layers)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.saved(tmp_path_factory.mktemp("products") / "model", tiny.causal("qwen2"))  # with biases


@pytest.mark.parametrize(
    "settings",
    [
        ["--zero.stage", "0", "--zero.offload", "none"],
        ["--zero.stage", "3", "--zero.offload", "none"],
        ["--zero.stage", "3", "--zero.offload", "cpu"],
        ["--zero.stage", "1", "--zero.offload", "none", "--optim.activation_checkpointing", "true"],
        ["--zero.stage", "0", "--zero.offload", "none", "--actor.lora.rank", "4"],
        ["--zero.stage", "0", "--zero.offload", "none", "--critic.kind", "shared"],
    ],
    ids=lambda settings: " ".join(settings[1::2]),
)
def test_an_update_is_the_one_with_torchs_products(every_size, monkeypatch, model, settings):
    config, world = config_of(model, *settings), start_world(1)
    with Calls() as calls:
        found = step(config, world)
    assert calls.count > 0
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    expected = step(config, world)
    assert found.updates[0].ratio_mean == pytest.approx(1, abs=1e-6) and found.updates[0].approx_kl < 1e-9
    assert found.experience.packed.tokens.equal(expected.experience.packed.tokens)
    torch.testing.assert_close(found.experience.old_logprobs, expected.experience.old_logprobs, rtol=1e-5, atol=1e-5)
    assert found.parameters.keys() == expected.parameters.keys()
    for name, parameter in expected.parameters.items():
        torch.testing.assert_close(found.parameters[name], parameter, rtol=1e-3, atol=2e-4, msg=name)


def test_a_layer_can_be_compiled(every_size):
    module = nn.Linear(HIDDEN, WIDE)
    choose_products(module)
    x = torch.randn(5, HIDDEN)
    found = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(found, module(x))
    found.square().mean().backward()
    assert module.weight.grad is not None
