"""The ops are strict about their arguments, and name the wrong one."""

import math
from typing import Any

import pytest
import torch

from fastppo import ops

TOKENS = torch.zeros(4)
HIDDEN, WEIGHT, TARGETS = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64)
ONE = torch.tensor(1.0)
GOOD: dict[str, dict[str, Any]] = {
    "gae": {"rewards": TOKENS, "values": TOKENS, "cu_seqlens": torch.tensor([0, 1, 4]), "gamma": 1.0, "lam": 0.9},
    "token_logprobs": {"logits": torch.zeros(4, 5), "targets": TARGETS},
    "linear_logprobs": {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS},
    "policy_loss": {"logprobs": TOKENS, "old_logprobs": TOKENS, "advantages": TOKENS}
    | {"clip_low": 0.2, "clip_high": 0.2, "normalizer": ONE},
    "linear_policy_loss": {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, "old_logprobs": TOKENS}
    | {"advantages": TOKENS, "temperature": 1.0, "clip_low": 0.2, "clip_high": 0.2, "normalizer": ONE},
    "value_loss": {"values": TOKENS, "old_values": TOKENS, "returns": TOKENS, "normalizer": ONE},
    "sample_tokens": {"logits": torch.zeros(4, 5), "seed": 1, "stream": TARGETS, "offset": TARGETS},
    "rms_norm": {"x": HIDDEN, "weight": torch.ones(3), "eps": 1e-6},
}
WRONG_TARGETS = [
    ("targets", TARGETS + 5, ValueError, r"targets, shape \(4,\), are in \[5, 5\]; a vocabulary of 5"),
    ("targets", TARGETS - 1, ValueError, r"targets, shape \(4,\), are in \[-1, -1\]"),
    ("targets", TARGETS[1:], ValueError, r"targets has shape \(3,\); expected \(4,\)"),
    ("targets", TARGETS.int(), TypeError, "targets has dtype torch.int32"),
    ("targets", TARGETS.to("meta"), ValueError, "targets is on meta"),
    ("temperature", 0.0, ValueError, "temperature is 0.0"),
    ("temperature", math.nan, ValueError, "temperature is nan"),
    ("softcap", -1.0, ValueError, "softcap is -1.0"),
]
WRONG_SCALE = [
    ("logit_scale", 0.0, ValueError, "logit_scale is 0.0"),
    ("logit_scale", 1e-21, ValueError, "logit_scale is 1e-21"),
]
WRONG_HEAD = [
    ("hidden", torch.zeros(4, 2), ValueError, r"weight has shape \(5, 3\); expected \(5, 2\)"),
    ("hidden", torch.zeros(4), ValueError, r"hidden has shape \(4,\); expected two dimensions"),
    ("weight", torch.zeros(0, 3), ValueError, r"weight has shape \(0, 3\)"),
    ("weight", WEIGHT.bfloat16(), TypeError, "weight has dtype torch.bfloat16 and hidden torch.float32"),
    ("weight", WEIGHT.to("meta"), ValueError, "weight is on meta and hidden on cpu"),
    ("bias", torch.zeros(4), ValueError, r"bias has shape \(4,\); expected \(5,\)"),
    ("ref_hidden", HIDDEN, ValueError, "ref_weight is None"),
    ("ref_weight", WEIGHT, ValueError, "ref_hidden is None"),
]
WRONG_LOSS = [
    ("advantages", TOKENS.long(), TypeError, "advantages has dtype torch.int64"),
    ("advantages", TOKENS[1:], ValueError, r"advantages has shape \(3,\)"),
    ("old_logprobs", TOKENS[:, None], ValueError, r"old_logprobs has shape \(4, 1\); expected one dimension"),
    ("mask", TOKENS, TypeError, "mask has dtype torch.float32; expected torch.bool"),
    ("mask", TOKENS[1:].bool(), ValueError, r"mask has shape \(3,\)"),
    ("normalizer", "4", TypeError, "normalizer is str"),
    ("normalizer", True, TypeError, "normalizer is bool"),
    ("normalizer", 0, ValueError, "normalizer is 0"),
    ("normalizer", 1e39, ValueError, r"normalizer is 1e\+39; it must be in \[1e-36, 1e36\]"),
    ("normalizer", torch.tensor(1e-46, dtype=torch.float64), ValueError, "normalizer is 1e-46"),
    ("normalizer", torch.tensor(4), TypeError, "normalizer is torch.int64"),
    ("normalizer", torch.ones(1), ValueError, r"normalizer has shape \(1,\)"),
    ("normalizer", torch.tensor(0.0), ValueError, "normalizer is 0.0"),
    ("clip_low", 1.5, ValueError, r"clip_low is 1.5; it must be in \[0, 1\]"),
    ("clip_high", -0.1, ValueError, "clip_high is -0.1"),
    ("dual_clip", 1.0, ValueError, "dual_clip is 1.0"),
    ("entropy_coef", math.inf, ValueError, "entropy_coef is inf"),
]
WRONG_COEFFICIENT = [
    ("temperature", torch.ones(1), ValueError, r"temperature has shape \(1,\); expected \(\): a number, or a tensor"),
    ("temperature", torch.tensor(1), TypeError, "temperature has dtype torch.int64"),
    ("temperature", torch.tensor(0.0), ValueError, "temperature is 0.0"),
    ("temperature", torch.tensor(1.0, device="meta"), ValueError, "temperature is on meta"),
    ("temperature", torch.tensor(1.0, requires_grad=True), ValueError, r"give temperature.detach\(\)"),
]
WRONG_LOSS += [
    ("clip_low", torch.tensor(1.5), ValueError, "clip_low is 1.5"),
    ("dual_clip", torch.tensor(1.0), ValueError, "dual_clip is 1.0"),
    ("kl_coef", torch.tensor(math.nan), ValueError, "kl_coef is nan"),
    ("normalizer", torch.tensor(1.0, requires_grad=True), ValueError, "normalizer requires a gradient"),
]
WRONG: dict[str, list[tuple[str, Any, type[Exception], str]]] = {
    "gae": [
        ("rewards", TOKENS[:, None], ValueError, r"rewards has shape \(4, 1\)"),
        ("values", TOKENS[1:], ValueError, r"values has shape \(3,\)"),
        ("values", TOKENS.long(), TypeError, "values has dtype torch.int64"),
        ("cu_seqlens", torch.tensor([1, 4]), ValueError, "cu_seqlens runs from 1 to 4; expected 0 to 4"),
        ("cu_seqlens", torch.tensor([0, 3]), ValueError, "cu_seqlens runs from 0 to 3"),
        ("cu_seqlens", torch.tensor([0, 3, 2, 4]), ValueError, "cu_seqlens falls from 3 to 2 at index 2"),
        ("cu_seqlens", torch.tensor([0.0, 4.0]), TypeError, "cu_seqlens has dtype torch.float32"),
        ("cu_seqlens", torch.empty(0).long(), ValueError, r"cu_seqlens has shape \(0,\)"),
        ("cu_seqlens", torch.tensor([0, 4], device="meta"), ValueError, "cu_seqlens is on meta"),
        ("gamma", 1.1, ValueError, "gamma is 1.1"),
        ("gamma", torch.tensor(1.1), ValueError, "gamma is 1.1"),
        ("lam", torch.tensor(1.0, requires_grad=True), ValueError, "lam requires a gradient"),
        ("lam", -0.1, ValueError, "lam is -0.1"),
        ("lam", math.nan, ValueError, "lam is nan"),
        ("bootstrap", TOKENS, ValueError, r"bootstrap has shape \(4,\); expected \(2,\)"),
        ("mask", TOKENS, TypeError, "mask has dtype"),
    ],
    "token_logprobs": [
        *WRONG_TARGETS,
        *WRONG_COEFFICIENT,
        ("softcap", torch.tensor(5.0), TypeError, "softcap is a tensor; it is a constant of the model"),
        ("logits", torch.zeros(4, 0), ValueError, r"logits has shape \(4, 0\)"),
        ("logits", torch.zeros(4, 5).long(), TypeError, "logits has dtype torch.int64"),
        ("ref_logits", torch.zeros(4, 6), ValueError, r"ref_logits has shape \(4, 6\)"),
    ],
    "linear_logprobs": WRONG_TARGETS + WRONG_HEAD + WRONG_SCALE + WRONG_COEFFICIENT,
    "policy_loss": [
        *WRONG_LOSS,
        ("entropy", TOKENS[1:], ValueError, r"entropy has shape \(3,\)"),
        ("entropy_coef", 0.1, ValueError, "entropy_coef is 0.1 and entropy is None"),
        ("kl_coef", 0.1, ValueError, "kl_coef is 0.1 and kl is None"),
        ("kl_coef", torch.tensor(0.0), ValueError, "set kl_coef to the number 0"),
    ],
    "linear_policy_loss": [
        *WRONG_TARGETS,
        *WRONG_HEAD,
        *WRONG_SCALE,
        *WRONG_LOSS,
        *WRONG_COEFFICIENT,
        ("ref_logprobs", TOKENS[1:], ValueError, r"ref_logprobs has shape \(3,\)"),
        ("kl_coef", 0.1, ValueError, "kl_coef is 0.1 and kl_kind 'exact', which needs ref_hidden and ref_weight"),
        ("kl_kind", "k1", ValueError, "kl_kind is 'k1', whose expected gradient is zero"),
        ("kl_kind", "k4", ValueError, "kl_kind is 'k4'; it must be"),
    ],
    "value_loss": [
        ("returns", TOKENS[1:], ValueError, r"returns has shape \(3,\)"),
        ("clip", 0.0, ValueError, "clip is 0.0"),
        ("clip", torch.tensor(0.0), ValueError, "clip is 0.0"),
        ("normalizer", torch.tensor(1.0, requires_grad=True), ValueError, "normalizer requires a gradient"),
        ("normalizer", torch.tensor(math.nan), ValueError, "normalizer is nan"),
        ("mask", TOKENS, TypeError, "mask has dtype"),
    ],
    "sample_tokens": [
        ("logits", torch.zeros(5), ValueError, r"logits has shape \(5,\)"),
        ("temperature", -1.0, ValueError, "temperature is -1.0"),
        *WRONG_COEFFICIENT,
        ("top_k", -1, ValueError, "top_k is -1; it must be a number of tokens, or 0 for all"),
        ("top_k", 2.0, TypeError, "top_k is 2.0; it must be a whole number"),
        ("top_k", torch.tensor(2), TypeError, "top_k is a tensor; it is a setting and must be a number"),
        ("top_p", 0.0, ValueError, "top_p is 0.0; it must be above 0, and at most 1"),
        ("top_p", 1.01, ValueError, "top_p is 1.01"),
        ("top_p", math.nan, ValueError, "top_p is nan"),
        ("top_p", ONE, TypeError, "top_p is a tensor"),
        ("stream", TARGETS.int(), TypeError, "stream has dtype torch.int32"),
        ("stream", TARGETS[1:], ValueError, r"stream has shape \(3,\)"),
        ("offset", TARGETS[1:], ValueError, r"offset has shape \(3,\)"),
    ],
    "rms_norm": [
        ("x", ONE, ValueError, r"x has shape \(\); expected \(..., H\) with H >= 1"),
        ("x", torch.zeros(4, 0), ValueError, r"x has shape \(4, 0\)"),
        ("weight", torch.ones(4), ValueError, r"weight has shape \(4,\); expected \(3,\)"),
        ("weight", torch.ones(3, device="meta"), ValueError, "weight is on meta and x on cpu"),
        ("residual", HIDDEN[1:], ValueError, r"residual has shape \(3, 3\); expected \(4, 3\): the shape of x"),
        ("residual", HIDDEN.bfloat16(), TypeError, "residual has dtype torch.bfloat16 and x torch.float32"),
        ("residual", HIDDEN.to("meta"), ValueError, "residual is on meta"),
        ("eps", -1e-6, ValueError, "eps is -1e-06"),
        ("eps", math.nan, ValueError, "eps is nan"),
        ("eps", ONE, TypeError, "eps is a tensor; it is a constant of the model"),
        ("offset", math.inf, ValueError, "offset is inf"),
        ("offset", ONE, TypeError, "offset is a tensor"),
    ],
}


@pytest.mark.parametrize("op", GOOD)
def test_good_arguments_are_taken(op):
    getattr(ops, op)(**GOOD[op])


@pytest.mark.parametrize(
    ("op", "name", "value", "error", "message"), [(op, *case) for op, cases in WRONG.items() for case in cases]
)
def test_a_wrong_argument_is_named(op, name, value, error, message):
    with pytest.raises(error, match=message):
        getattr(ops, op)(**(GOOD[op] | {name: value}))


def test_a_sampled_kl_needs_the_reference_s_log_probabilities():
    with pytest.raises(ValueError, match="kl_kind 'k3', which needs ref_logprobs"):
        ops.linear_policy_loss(**GOOD["linear_policy_loss"], kl_coef=0.1, kl_kind="k3")


# What is refused alike wherever it is given: every floating tensor of every op, and every number that must be positive.
WHOLE: dict[str, dict[str, Any]] = {
    "gae": {**GOOD["gae"], "bootstrap": torch.zeros(2)},
    "token_logprobs": {**GOOD["token_logprobs"], "temperature": 1.0, "softcap": 3.0, "ref_logits": torch.zeros(4, 5)},
    "linear_logprobs": {**GOOD["linear_logprobs"], "temperature": 1.0, "softcap": 3.0, "bias": torch.zeros(5)}
    | {"ref_hidden": HIDDEN, "ref_weight": WEIGHT, "ref_bias": torch.zeros(5)},
    "policy_loss": {**GOOD["policy_loss"], "entropy": TOKENS, "kl": TOKENS, "dual_clip": 2.0},
    "linear_policy_loss": {**GOOD["linear_policy_loss"], "softcap": 3.0, "bias": torch.zeros(5), "dual_clip": 2.0}
    | {"ref_hidden": HIDDEN, "ref_weight": WEIGHT, "ref_bias": torch.zeros(5), "ref_logprobs": TOKENS},
    "value_loss": {**GOOD["value_loss"], "clip": 0.2},
    "sample_tokens": {**GOOD["sample_tokens"], "temperature": 1.0, "top_k": 2, "top_p": 0.9},
    "attend_cached": {"query": torch.zeros(2, 2, 4), "key": torch.zeros(2, 1, 4), "value": torch.zeros(2, 1, 4)}
    | {"key_cache": torch.zeros(3, 1, 5, 4), "value_cache": torch.zeros(3, 1, 5, 4), "lengths": TARGETS[:3]}
    | {"rows": torch.arange(2), "scale": 1.0, "softcap": 3.0},
    "rms_norm": {**GOOD["rms_norm"], "residual": HIDDEN},
    "swiglu": {"gate": HIDDEN, "up": HIDDEN},
    "geglu": {"gate": HIDDEN, "up": HIDDEN},
    "rotary": {"q": torch.zeros(1, 2, 4, 6), "k": torch.zeros(1, 1, 4, 6)}
    | {"cos": torch.zeros(1, 4, 6), "sin": torch.zeros(1, 4, 6)},
}
FLOATING = [
    (op, name)
    for op, arguments in WHOLE.items()
    for name, x in arguments.items()
    if isinstance(x, torch.Tensor) and x.is_floating_point() and name != "normalizer"  # a count: fp32 or fp64
]
NUMBERS = {"temperature", "softcap", "clip", "dual_clip", "normalizer"}


@pytest.mark.parametrize("op", WHOLE)
def test_all_arguments_are_taken(op):
    getattr(ops, op)(**WHOLE[op])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.complex64], ids=str)
@pytest.mark.parametrize(("op", "name"), FLOATING)
def test_a_dtype_that_no_kernel_takes_is_a_type_error_that_names_the_tensor(op, name, dtype):
    with pytest.raises(TypeError, match=f"{name} has dtype {dtype}"):
        getattr(ops, op)(**(WHOLE[op] | {name: WHOLE[op][name].to(dtype)}))


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in FLOATING if op != "sample_tokens"])
def test_fp64_beside_fp32_is_a_type_error_that_names_both(op, name):
    wide = {n: x.double() if (op, n) in FLOATING else x for n, x in WHOLE[op].items()}
    if op != "attend_cached":  # which takes no fp64
        getattr(ops, op)(**wide)
        with pytest.raises(
            TypeError, match=r"has dtype torch.float(32|64) and|hidden torch.float64; they must be the same"
        ):
            getattr(ops, op)(**(wide | {name: WHOLE[op][name]}))
    with pytest.raises(
        TypeError, match=f"{name} has dtype torch.float64|has dtype torch.float32 and {name} torch.float64"
    ):
        getattr(ops, op)(**(WHOLE[op] | {name: wide[name]}))


@pytest.mark.parametrize(
    ("op", "name", "value"),
    [
        (op, name, value)
        for op, arguments in WHOLE.items()
        for name in sorted(NUMBERS & arguments.keys())
        for value in (1e-46, 1e39, math.inf, math.nan, 0.0, -1.0)
        if (op, value) != ("attend_cached", 0.0)  # its softcap of 0 is none
    ],
)
def test_a_number_that_fp32_cannot_hold_is_a_value_error_that_names_it(op, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}".replace("+", r"\+")):
        getattr(ops, op)(**(WHOLE[op] | {name: value}))


@pytest.mark.parametrize("name", ["clip_high", "entropy_coef", "kl_coef"])
def test_a_coefficient_that_fp32_cannot_hold_is_a_value_error_that_names_it(name):
    for op in ("policy_loss", "linear_policy_loss"):
        for value in (1e39, math.nan):
            with pytest.raises(ValueError, match=f"{name} is {value}".replace("+", r"\+")):
                getattr(ops, op)(**(WHOLE[op] | {name: value}))


@pytest.mark.parametrize("op", ["policy_loss", "linear_policy_loss", "value_loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_normalizer_may_be_a_number(op, dtype):
    arguments = {n: x.to(dtype) if (op, n) in FLOATING else x for n, x in WHOLE[op].items()}
    losses = [
        getattr(ops, op)(
            **(arguments | {"advantages" if "advantages" in arguments else "returns": x, "normalizer": n})
        )[0]
        for x in [torch.arange(4, dtype=dtype)]
        for n in (3, 3.0, torch.tensor(3.0), torch.tensor(3.0, dtype=torch.float64))
    ]
    assert losses[0] != 0 and losses[0].dtype == dtype
    assert all(torch.equal(loss, losses[0]) for loss in losses)
