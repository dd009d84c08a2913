"""The check that a model computes the same if ranks split the tokens of a packed row."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from fastppo.data import pack
from fastppo.errors import ModelError
from fastppo.models.attention import without_backend
from fastppo.models.loading.miniature import WINDOW, miniature
from fastppo.models.parallel.group import Split, computing_alone, sequence_group
from fastppo.models.parallel.heads import deal_heads
from fastppo.models.parallel.rows import Rows
from fastppo.models.roles import Backbone

TOLERANCE = 1e-3  # mean difference over the standard deviation, in fp32: as in `model_check`
LENGTHS = (3 * WINDOW, 1, 5, WINDOW + 2)  # the first is longer than any part of the row

_passed: set[tuple[str, str, int]] = set()


def check_split(auto: Any, config: PreTrainedConfig, device: torch.device) -> None:
    """Check a small model of this config, with the group in use; all its ranks call it. Raises ModelError.

    A model has too few heads for the group, or its layers read other tokens than by attention and would lack those of
    other ranks. auto: AutoModelForCausalLM or another such class; config: one for which `miniature` makes a model.
    """
    size = sequence_group().size
    key = (getattr(auto, "__name__", str(auto)), config.to_json_string(), size)
    if size == 1 or key in _passed:
        return
    heads = config.get_text_config().num_attention_heads
    deal_heads(heads, heads, size)
    with torch.random.fork_rng(), torch.no_grad(), without_backend():  # no backend computes fp32
        model = miniature(auto, config, torch.float32, device)
        role, name = Backbone(model), type(model).__name__
        draws = torch.Generator().manual_seed(0)
        vocabulary: Any = model.get_input_embeddings().num_embeddings
        tokens = [torch.randint(vocabulary, (length,), generator=draws).tolist() for length in LENGTHS]
        packed = pack(tokens, [1] * len(tokens)).to(device)
        split = Split.of(len(packed.tokens))
        assert split is not None
        with computing_alone():
            whole = role.hidden(packed).float()
        found = Rows(split.group, tuple(split.counts)).all(role.hidden(packed)).float()
    difference = float((found - whole).abs().mean() / whole.std())
    if not difference <= TOLERANCE:  # NaN differs
        raise ModelError(
            f"{name} cannot be trained with parallel.sequence {size}: its layers read other tokens of a row elsewhere"
            f" than in attention (outputs off by {difference:.2g} of their standard deviation). Set parallel.sequence"
            " to 1."
        )
    _passed.add(key)
