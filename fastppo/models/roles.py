"""The four roles: how each is loaded, checked and called.

Every role runs its backbone on packed rows (`fastppo.models.attention`). A policy's vocabulary head is a module that
owns its weight and runs an op on it, so that logits exist only inside the op and DeepSpeed's hooks see the weight used.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo import ops
from fastppo.data import Packed, pack
from fastppo.errors import ModelError as ModelError
from fastppo.models.attention import Cache, Spans, attend_packed
from fastppo.models.frozen_prefix import layers_of, passing, prefix_depth
from fastppo.models.logit_scale import logit_scale
from fastppo.models.rotary import turn_each_sequence
from fastppo.ops import TokenStats

log = logging.getLogger("fastppo")

T = TypeVar("T")


class FusedHead(nn.Module):
    """The vocabulary projection. `head(hidden)` gives logits, `head(hidden, op, ...)` what the op makes of them."""

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, softcap: float | None, logit_scale: float = 1.0
    ):
        super().__init__()
        self.weight = weight  # (V, H), the embedding's own parameter where the two are tied
        self.bias = bias  # (V,)
        self.softcap = softcap
        self.logit_scale = logit_scale  # what logits are multiplied by, before the softcap

    def forward(self, hidden: Tensor, op: Callable[..., T] | None = None, *args: Any, **kwargs: Any) -> T | Tensor:
        """hidden (M, H) -> `op(hidden, weight, *args, bias=, softcap=, logit_scale=, **kwargs)`; logits (M, V) without
        an op."""
        if op is not None:
            weight, bias = cast(Tensor, self.weight), cast("Tensor | None", self.bias)
            if torch.is_autocast_enabled(hidden.device.type):  # as it does for a linear layer
                dtype = torch.get_autocast_dtype(hidden.device.type)
                hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
            scales = {"softcap": self.softcap, "logit_scale": self.logit_scale}
            return op(hidden, weight, *args, bias=bias, **scales, **kwargs)
        logits = F.linear(hidden, self.weight, self.bias)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def as_reference(self, hidden: Tensor) -> dict[str, Tensor | None]:
        """The keywords by which an op takes this head as the reference; hidden (M, H), without gradient.

        The op has one softcap and one logit scale, the policy's: `load.check_same_scales` sees to that.
        """
        return {"ref_hidden": hidden, "ref_weight": self.weight, "ref_bias": self.bias}


class ValueHead(nn.Module):
    """V(s) of each hidden state, computed in fp32 since bf16 would round values to three digits. Starts at zero."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(1, dtype=dtype, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """(M, H) -> (M,) fp32"""
        return F.linear(hidden.float(), self.weight.float(), self.bias.float()).squeeze(-1)


class ScoreHead(nn.Module):
    """A sequence classifier's head with one label, under its own name and on its own weight, computed in fp32."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = linear.weight  # (1, H)
        self.bias = linear.bias  # (1,), or None as in most families

    def forward(self, hidden: Tensor) -> Tensor:
        """(R, H) -> (R,) fp32"""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(hidden.float(), self.weight.float(), bias).squeeze(-1)


class Backbone(nn.Module):
    """What all roles have in common: a transformers model that reads packed rows.

    A role is called with an objective, a function of the role and of the (M, H) hidden states that predict each
    response token. So the heads run inside the module's own forward pass, where DeepSpeed has their weights at hand,
    and what is made of them is written in the stage that wants it.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        attend_packed(self.model)
        turn_each_sequence(self.model, self.model.config)
        self.prefix_depth = 0  # lowest layers whose states may be kept, see `keep_prefix`
        self.prefix_owner = id(model)  # roles of one owner have the same prefix
        self.adapters = True  # False: a view of another role's model as it is without its LoRA adapters

    def train(self, mode: bool = True) -> Backbone:
        """Train mode for nothing but what recomputes its activations, which asks for it; all else stays as in eval().

        So whatever a model does at random while it trains is off: dropout, jitter and sampling in routers, layers that
        are skipped. A policy that changes at random is another policy at every call, and ratios mean nothing.
        """
        super().train(mode)
        for module in self.model.modules():
            module.training = mode and bool(getattr(module, "gradient_checkpointing", False))
        return self

    @property
    def device(self) -> torch.device:
        return self.model.device

    def hidden(self, packed: Packed, prefix_states: Tensor | None = None) -> Tensor:
        """The last hidden state of every token, (N, H); prefix_states: what the frozen prefix handed up, if kept."""
        if prefix_states is None:
            return self._run(packed)
        with passing(self.model, range(self.prefix_depth), prefix_states[None]):
            return self._run(packed)

    def prefix(self, packed: Packed) -> Tensor:
        """What the lowest `prefix_depth` layers hand up, (N, H)."""
        with passing(
            self.model, range(self.prefix_depth, self.model.config.get_text_config().num_hidden_layers)
        ) as top:
            self._run(packed)
        return cast(Tensor, top.got)[0]

    def _run(self, packed: Packed) -> Tensor:
        with contextlib.nullcontext() if self.adapters else adapters_off(self.model):
            output = self.model.base_model(
                input_ids=packed.tokens[None],
                position_ids=packed.positions[None],
                packed=Spans.of(packed.lengths.tolist(), packed.tokens.device),
                use_cache=False,
            )
        return cast(Tensor, output.last_hidden_state[0])

    def forward(self, packed: Packed, objective: Callable[[Any, Tensor], T], prefix_states: Tensor | None = None) -> T:
        return objective(self, self.hidden(packed, prefix_states)[packed.predictors])


class Policy(Backbone):
    """A causal language model; with `value_head`, the shared critic too."""

    def __init__(self, model: PreTrainedModel, value_head: ValueHead | None = None):
        super().__init__(model)
        self.value_head = value_head

    @property
    def head(self) -> FusedHead:
        return cast(FusedHead, self.model.get_output_embeddings())

    def prefill(self, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Packed prompts (N,) into the cache; returns their hidden states (N, H)."""
        return self._decode(tokens[None], positions[None], cache)[0]

    def step(self, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """One token (R,) for each active row of the cache; returns hidden states (R, H)."""
        return self._decode(tokens[:, None], positions[:, None], cache)[:, 0]

    def _decode(self, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        output = self.model.base_model(input_ids=tokens, position_ids=positions, cache=cache, use_cache=False)
        return cast(Tensor, output.last_hidden_state)


class Critic(Backbone):
    """A separate value model."""

    def __init__(self, model: PreTrainedModel, value_head: ValueHead):
        super().__init__(model)
        self.value_head = value_head


def scores(role: Any, hidden: Tensor) -> Tensor:
    """The objective that is a reward model's scores (B,) fp32 of the last tokens' hidden states (B, H)."""
    found: Tensor = role.head(hidden)
    return found


class RewardModel(Backbone):
    """One score for each sequence: the classifier's own head on the last token's hidden state.

    It is the last token that is not the config's padding, wherever padding stands, as transformers has it
    (`GenericForSequenceClassification`): models that pad with their EOS were trained on the token before it. An
    objective gets the (B, H) hidden states of these tokens; that of the call without one is the scores.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        model.score = ScoreHead(cast(nn.Linear, model.score))

    @property
    def head(self) -> ScoreHead:
        return cast(ScoreHead, self.model.score)

    def forward(
        self,
        packed: Packed,
        objective: Callable[[Any, Tensor], T] = scores,  # type: ignore[assignment]
        prefix_states: Tensor | None = None,
    ) -> T:
        padding = self.model.config.get_text_config().pad_token_id
        return objective(self, self.hidden(packed, prefix_states)[packed.last_rows_but(padding)])


def hidden_states(role: Any, hidden: Tensor) -> Tensor:
    """The objective that is the hidden states (M, H) themselves."""
    return hidden


def token_stats(
    targets: Tensor, temperature: float, policy: Policy, hidden: Tensor, **against: Tensor | None
) -> TokenStats:
    """With its first two arguments given, the objective that is `ops.linear_logprobs` of targets (M,) int64.

    against: another head's `FusedHead.as_reference`.
    """
    stats: TokenStats = policy.head(hidden, ops.linear_logprobs, targets, temperature=temperature, **against)
    return stats


def fuse_head(model: PreTrainedModel) -> PreTrainedModel:
    """Put a `FusedHead` in the place of a causal model's vocabulary projection, on the same parameters."""
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise ModelError(f"{type(model).__name__} has no linear vocabulary head, so its logprobs cannot be fused")
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    bias = cast("nn.Parameter | None", linear.bias)
    scale = logit_scale(model, linear, softcap)
    model.set_output_embeddings(FusedHead(cast(nn.Parameter, linear.weight), bias, softcap, scale))
    return model


def width_of(model: PreTrainedModel) -> int:
    """H, the width of the hidden states that a model's head reads. OPT's 350M projects its layers' to another one."""
    head: Any = getattr(model, "score", None) or model.get_output_embeddings()
    return int(getattr(head.weight, "ds_shape", head.weight.shape)[-1])


def attention_ratio(model: PreTrainedModel) -> float:
    """n d / P: by how much of a token's work in the weights each token before it adds in attention (`microbatch.work`).

    n layers with P weights in all, d = heads x width of a head. Computed without their weights at hand, as ZeRO-3 has
    them elsewhere. A model whose layers cannot be told apart counts all its weights.
    """
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = layers_of(model)
    layers = model.base_model if found is None else getattr(*found)
    weights = sum(getattr(p, "ds_numel", p.numel()) for p in layers.parameters())
    return float(config.num_hidden_layers * config.num_attention_heads * width / weights)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within this context a model with LoRA adapters (`fastppo.models.lora`) computes what it does without them.

    For passes without gradient: what activation checkpointing recomputes later is recomputed with adapters. peft's own
    switch turns `requires_grad` off too, and DeepSpeed should not find a parameter of its optimizer so.
    """
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def copy_backbone(model: PreTrainedModel, *, same_weights: bool = False) -> PreTrainedModel:
    """A second copy of a causal model's backbone, without its vocabulary head.

    same_weights: on the very parameters of the model, for two roles that both leave them frozen.
    """
    backbone = cast(PreTrainedModel, model.base_model)
    return copy.deepcopy(backbone, {id(p): p for p in backbone.parameters()} if same_weights else None)


def keep_prefix(role: Backbone, reference: Backbone | None = None) -> None:
    """Let what the role's frozen lower layers hand up be computed once a batch (`fastppo.models.frozen_prefix`).

    reference: a model whose lower layers are the same. Where passing layers over would change a model's outputs, in
    the last bit even, its prefix is not kept, and the log says so.
    """
    depth = prefix_depth(role.model)
    packed = pack([(1, 2, 3, 4, 5), (3, 1, 2)], [1, 1]).to(role.device)
    for model in (role,) if reference is None else (role, reference):
        if not depth:
            return
        model.prefix_depth, model.prefix_owner = depth, role.prefix_owner
        with torch.no_grad():
            try:
                same = torch.equal(model.hidden(packed, role.prefix(packed)), model.hidden(packed))
            except (IndexError, RuntimeError, TypeError, ValueError):  # layers that hand up more than one tensor
                same = False
        if not same:
            role.prefix_depth = model.prefix_depth = 0
            log.info("%s: its %d frozen layers are computed in every pass", type(role.model).__name__, depth)
            return
