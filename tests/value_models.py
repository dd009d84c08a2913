"""Values of a trained critic, and of the folder that it was exported to, as transformers loads and computes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForTokenClassification, PreTrainedModel

from fastppo.data.packed import Packed
from fastppo.models.critics.read import check_value_model, load_value_model
from fastppo.models.loading.source import Source
from fastppo.models.roles import Critic, Policy


@torch.no_grad()
def trainer_values(role: Any, packed: Packed) -> Tensor:
    """V of every response token as the trainer reads it, (M,) fp32. role: of a critic, or its engine."""
    return role(packed, _values_of)


def _values_of(model: Critic | Policy, hidden: Tensor) -> Tensor:
    if isinstance(model, Policy):
        model.head(hidden)  # first, as in training: at ZeRO stage 3 DeepSpeed gathers it in any case
    return model.value_head(hidden)


@torch.no_grad()
def own_values(folder: Path, packed: Packed, dtype: torch.dtype = torch.float32, *, upcast: bool = False) -> Tensor:
    """The same, (M,), from one sequence at a time: the logit at the token before.

    upcast: compute the head in fp32, whatever the backbone is in.
    """
    rows = zip(packed.tokens.split(packed.lengths.tolist()), packed.response_lengths.tolist(), strict=True)
    model, head = loaded(folder, dtype)
    return torch.cat([_values(model, head, tokens, upcast)[-count - 1 : -1] for tokens, count in rows])


def loaded(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Tensor] | None]:
    """The model in the folder, and a value head if that lies beside it."""
    config = json.loads((folder / "config.json").read_text())
    auto, head = AutoModelForTokenClassification, None
    if "value_head" in config:
        auto, head = AutoModel, load_file(folder / config["value_head"])
    else:
        assert config["id2label"] == {"0": "value"}
    model, info = auto.from_pretrained(folder, dtype=dtype, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model, head


def _values(model: PreTrainedModel, head: dict[str, Tensor] | None, tokens: Tensor, upcast: bool) -> Tensor:
    if head is None and not upcast:
        return model(tokens[None], use_cache=False).logits[0, :, 0]
    hidden = model.base_model(tokens[None], use_cache=False).last_hidden_state[0]
    weight, bias = (head["weight"], head["bias"]) if head is not None else _linear(model)
    return torch.nn.functional.linear(hidden.float(), weight.float(), bias.float())[:, 0]


def _linear(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    linear: Any = getattr(model, "score", None) or model.classifier
    return linear.weight, linear.bias


def wrong_values(critic: Critic, folder: Path, packed: Packed, tolerance: float) -> list[str]:
    """What is wrong with an exported critic, a line each: as transformers computes it, and as another run begins."""
    values, source = trainer_values(critic, packed), Source("critic.model", str(folder))
    error = float((own_values(folder, packed) - values).abs().max())
    found = [] if error <= tolerance else [f"values of the exported critic are off by {error:.2g}"]
    check_value_model(source)
    again = trainer_values(Critic(*load_value_model(source, torch.float32, torch.device("cpu"), None)), packed)
    return found if torch.equal(again, values) else [*found, "a critic begins with other values than the exported one"]
