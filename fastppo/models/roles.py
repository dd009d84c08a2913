"""The four roles (actor, critic, reference, reward model) as modules.

Every role runs its backbone on packed rows (`fastppo.models.attention`). The vocabulary head of a policy is a module
that owns its weight and calls an op on it: logits exist only inside the op, and DeepSpeed's hooks see the weight used.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo import ops
from fastppo.data import Packed, pack
from fastppo.errors import ModelError as ModelError
from fastppo.models.attention import attend_packed, without_mask_search
from fastppo.models.cache import Cache, SequenceLayout, head_width
from fastppo.models.frozen_prefix import layers_of, prefix_depth, skipping
from fastppo.models.layers.fuse import fuse_layers
from fastppo.models.logit_scale import logit_scale
from fastppo.models.lora import adapters_off
from fastppo.models.parallel.group import Split
from fastppo.models.parallel.rows import Rows, all_columns, all_rows, computing, own_rows
from fastppo.models.rotary import part_of, rotate_each_sequence
from fastppo.ops import TokenStats

log = logging.getLogger("fastppo")

T = TypeVar("T")

PER_ROW = ("ref_logprobs", "mask")  # arguments of ops that have a number for each row, by name


class FusedHead(nn.Module):
    """The vocabulary projection. `head(hidden)` returns logits, `head(hidden, op, ...)` the result of the op."""

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, softcap: float | None, logit_scale: float = 1.0
    ):
        super().__init__()
        self.weight = weight  # (V, H), the parameter of the embedding where the two are tied
        self.bias = bias  # (V,)
        self.softcap = softcap
        self.logit_scale = logit_scale  # factor of the logits, applied before the softcap

    def forward(self, hidden: Tensor, op: Callable[..., T] | None = None, *args: Any, **kwargs: Any) -> T | Tensor:
        """hidden (M, H) -> `op(hidden, weight, *args, bias=, softcap=, logit_scale=, **kwargs)`; logits (M, V) without
        an op.

        args: (M, ...) tensors. Where M rows are split over ranks, hidden has this rank's, as a reference's hidden
        states have, and args have all. `TokenStats` are then those of all rows; a loss is the sum over own rows.
        """
        if op is not None:
            weight, bias = cast(Tensor, self.weight), cast("Tensor | None", self.bias)
            if torch.is_autocast_enabled(hidden.device.type):  # the same casts as for a linear layer
                dtype = torch.get_autocast_dtype(hidden.device.type)
                hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
            kwargs |= {"bias": bias, "softcap": self.softcap, "logit_scale": self.logit_scale}
            kwargs |= {name: own_rows(kwargs[name]) for name in PER_ROW if kwargs.get(name) is not None}
            result = op(hidden, weight, *map(own_rows, args), **kwargs)
            return cast(T, TokenStats(*all_columns(result))) if isinstance(result, TokenStats) else result
        logits = F.linear(hidden, self.weight, self.bias)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def as_reference(self, hidden: Tensor) -> dict[str, Tensor | None]:
        """Keyword arguments of an op for which this head is the reference; hidden (M, H), without gradient.

        The op has one softcap and one logit scale, those of the policy: `check_same_scales` checks that both agree.
        """
        return {"ref_hidden": hidden, "ref_weight": self.weight, "ref_bias": self.bias}


class ValueHead(nn.Module):
    """V(s) of each hidden state, computed in fp32 because bf16 rounds values to three digits. Initialised to zero."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(1, dtype=dtype, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """(M, H) -> (M,) fp32; from this rank's rows to all rows where they are split over ranks"""
        return all_rows(F.linear(hidden.float(), self.weight.float(), self.bias.float()).squeeze(-1))


class ScoreHead(nn.Module):
    """The head of a sequence classifier with one label, computed in fp32; it keeps the name and the weight."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = linear.weight  # (1, H)
        self.bias = linear.bias  # (1,); None in most families

    def forward(self, hidden: Tensor) -> Tensor:
        """(R, H) -> (R,) fp32; from this rank's rows to all rows where they are split over ranks"""
        bias = None if self.bias is None else self.bias.float()
        return all_rows(F.linear(hidden.float(), self.weight.float(), bias).squeeze(-1))


class Backbone(nn.Module):
    """The base class of all roles: a transformers model that reads packed rows.

    A role is called with an objective, a function of the role and of the (M, H) hidden states that predict the
    response tokens. The heads then run inside the forward pass of the module, where DeepSpeed has gathered their
    weights, and each phase of a step defines its own objective.

    In a group of ranks (`fastppo.models.parallel`) all are called with the same packed row, and compute a part of its
    tokens each. An objective then gets the hidden states of this rank's rows, and from the heads what all rows have.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        attend_packed(self.model)
        rotate_each_sequence(self.model, self.model.config)
        fuse_layers(self.model)
        self.prefix_depth = 0  # number of lowest layers whose states may be cached, see `enable_prefix_states`
        self.prefix_owner = id(model)  # roles with the same owner have the same frozen prefix
        self.adapters = True  # False: the role runs another role's model with its LoRA adapters off

    def train(self, mode: bool = True) -> Backbone:
        """Set train mode only in modules with activation checkpointing, which needs it; all others stay in eval mode.

        This switches off everything random in training: dropout, jitter and sampling in routers, skipped layers. A
        policy with random outputs would be another policy at every call, and ratios would have no meaning.
        """
        super().train(mode)
        for module in self.model.modules():
            module.training = mode and bool(getattr(module, "gradient_checkpointing", False))
        return self

    @property
    def device(self) -> torch.device:
        return self.model.device

    def hidden(self, packed: Packed, prefix_states: Tensor | None = None) -> Tensor:
        """The last hidden state of every token, (N, H), or of this rank's if the row is split over ranks.

        prefix_states: what `prefix` returned, if it is known.
        """
        if prefix_states is None:
            return self._run(packed)
        with skipping(self.model, range(self.prefix_depth), prefix_states[None]):
            return self._run(packed)

    def prefix(self, packed: Packed) -> Tensor:
        """The output of the lowest `prefix_depth` layers, (N, H), or of `Split.computed` if the row is split."""
        upper_layers = range(self.prefix_depth, self.model.config.get_text_config().num_hidden_layers)
        with skipping(self.model, upper_layers) as first_upper_layer:
            self._run(packed)
        return cast(Tensor, first_upper_layer.received)[0]

    def _run(self, packed: Packed) -> Tensor:
        split = Split.of(len(packed.tokens))
        part = slice(None) if split is None else split.computed
        with contextlib.ExitStack() as stack:
            stack.enter_context(without_mask_search())
            if not self.adapters:
                stack.enter_context(adapters_off(self.model))
            if split is not None:
                stack.enter_context(part_of(packed.positions, part))
            output = self.model.base_model(
                input_ids=packed.tokens[None, part],
                position_ids=packed.positions[None, part],
                packed=SequenceLayout.of(packed.lengths_on_host, packed.tokens.device, split=split),
                use_cache=False,
            )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden if split is None else hidden[: split.counts[split.group.index]]

    def forward(self, packed: Packed, objective: Callable[[Any, Tensor], T], prefix_states: Tensor | None = None) -> T:
        hidden, tokens = self.hidden(packed, prefix_states), self._read(packed)
        split = Split.of(len(packed.tokens))
        if split is None:
            return objective(self, hidden[tokens])
        rows = Rows.of(packed.predictors_on_host if tokens is packed.predictors else tokens.cpu(), split)
        with computing(rows):
            return objective(self, hidden[tokens[rows.own] - split.own.start])

    def _read(self, packed: Packed) -> Tensor:
        """The tokens (R,), ascending, whose hidden states the head reads."""
        return packed.predictors


class Policy(Backbone):
    """A causal language model; with `value_head`, the shared critic too."""

    def __init__(self, model: PreTrainedModel, value_head: ValueHead | None = None):
        super().__init__(model)
        self.value_head = value_head

    @property
    def head(self) -> FusedHead:
        return cast(FusedHead, self.model.get_output_embeddings())

    def prefill(self, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Write packed prompts (N,) into the cache; returns their hidden states (N, H)."""
        return self._decode(tokens[None], positions[None], cache)[0]

    def step(self, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Decode one token (R,) for each active row of the cache; returns hidden states (R, H)."""
        return self._decode(tokens[:, None], positions[:, None], cache)[:, 0]

    def _decode(self, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        with without_mask_search():
            output = self.model.base_model(input_ids=tokens, position_ids=positions, cache=cache, use_cache=False)
        return cast(Tensor, output.last_hidden_state)


class Critic(Backbone):
    """A value model with its own backbone."""

    def __init__(self, model: PreTrainedModel, value_head: ValueHead):
        super().__init__(model)
        self.value_head = value_head


def scores(role: Any, hidden: Tensor) -> Tensor:
    """The objective of a reward model: scores (B,) fp32 from the hidden states (B, H) of the last tokens."""
    role_scores: Tensor = role.head(hidden)
    return role_scores


class RewardModel(Backbone):
    """One score for each sequence: the head of the classifier on the hidden state of the last token.

    The last token is the last one that is not the padding token of the config, at any position, as in transformers
    (`GenericForSequenceClassification`): models that pad with EOS were trained on the token before EOS. An objective
    gets the (B, H) hidden states of these tokens; the default objective is the scores.
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
        return super().forward(packed, objective, prefix_states)

    def _read(self, packed: Packed) -> Tensor:
        return packed.last_rows_without(self.model.config.get_text_config().pad_token_id)


def hidden_states(role: Any, hidden: Tensor) -> Tensor:
    """The objective that returns the hidden states (M, H), this rank's if they are split over ranks."""
    return hidden


def token_stats(
    targets: Tensor, temperature: float, policy: Policy, hidden: Tensor, **against: Tensor | None
) -> TokenStats:
    """`ops.linear_logprobs` of targets (M,) int64; an objective once its first two arguments are bound.

    against: `FusedHead.as_reference` of another head.
    """
    stats: TokenStats = policy.head(hidden, ops.linear_logprobs, targets, temperature=temperature, **against)
    return stats


def fuse_head(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the vocabulary projection of a causal model by a `FusedHead` on the same parameters."""
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise ModelError(f"{type(model).__name__} has no linear vocabulary head, so its logprobs cannot be fused")
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    bias = cast("nn.Parameter | None", linear.bias)
    scale = logit_scale(model, linear, softcap)
    model.set_output_embeddings(FusedHead(cast(nn.Parameter, linear.weight), bias, softcap, scale))
    return model


def width_of(model: PreTrainedModel) -> int:
    """H, the width of the hidden states that the model's head reads; in OPT-350M it differs from that of the layers."""
    head: Any = getattr(model, "score", None) or model.get_output_embeddings()
    return int(getattr(head.weight, "ds_shape", head.weight.shape)[-1])


def attention_ratio(model: PreTrainedModel) -> float:
    """n d / P: the work of attention to one earlier token, over a token's work in the weights, see `microbatches.work`.

    n layers with P weights in total, d = heads x width of a head. Reads shapes only, because with ZeRO-3 the weights
    are partitioned. For a model without a list of layers, all its weights count.
    """
    config = model.config.get_text_config()
    parent_and_name = layers_of(model)
    layers = model.base_model if parent_and_name is None else getattr(*parent_and_name)
    weights = sum(getattr(p, "ds_numel", p.numel()) for p in layers.parameters())
    return float(config.num_hidden_layers * config.num_attention_heads * head_width(config) / weights)


def copy_backbone(model: PreTrainedModel, *, same_weights: bool = False) -> PreTrainedModel:
    """A copy of a causal model's backbone, without its vocabulary head.

    same_weights: share the parameters with the model, for two roles that both leave them frozen.
    """
    backbone = cast(PreTrainedModel, model.base_model)
    return copy.deepcopy(backbone, {id(p): p for p in backbone.parameters()} if same_weights else None)


def enable_prefix_states(role: Backbone, reference: Backbone | None = None) -> None:
    """Compute the output of the role's frozen lower layers once a batch (`fastppo.models.frozen_prefix`).

    reference: a model with the same lower layers. If skipping the layers changes the outputs of one of the models, even
    in the last bit, the output is not cached and a line is logged.
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
            except (IndexError, RuntimeError, TypeError, ValueError):  # layers that return more than one tensor
                same = False
        if not same:
            role.prefix_depth = model.prefix_depth = 0
            log.info("%s: its %d frozen layers are computed in every pass", type(role.model).__name__, depth)
            return
