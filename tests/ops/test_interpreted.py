"""What tests spare Triton's interpreter changes no bit, and leaves the language as it was."""

import interpreted
import torch
import triton.language as tl
from conftest import COMPILED
from triton.runtime import interpreter

from fastppo.kernels.vocabulary_forward import vocabulary_forward


@COMPILED
def test_the_language_is_replaced_once_a_launch_and_the_numbers_are_the_same(monkeypatch):
    replaced, load = [], tl.load
    real = interpreted.replace_language
    logits = torch.randn(3, 600, generator=torch.Generator().manual_seed(0))

    def counted(function: object) -> object:
        replaced.append(function)
        return real(function)

    def run(replace: object) -> torch.Tensor:
        replaced.clear()
        monkeypatch.setattr(interpreter, "_patch_lang", replace)
        made = vocabulary_forward(logits, torch.tensor([0, 5, 599]), 0.7, 5.0, logits.flip(0))
        assert tl.load is load
        return made

    monkeypatch.setattr(interpreted, "replace_language", counted)
    made = run(interpreted.replace_once)
    assert 1 <= len(replaced) <= 2  # tl, and triton.language.core that tl.sum and others use
    assert torch.equal(made, run(counted))
    assert len(replaced) > 20  # or it is no longer needed
