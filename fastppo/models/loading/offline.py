"""The one model of SFT or reward modelling: its weights, its head, and what of it trains."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastppo.config import ModelConfig, OfflineConfig, OptimConfig
from fastppo.errors import ModelError
from fastppo.models.frozen_prefix import prefix_depth
from fastppo.models.loading.policies import load_causal
from fastppo.models.loading.source import Source
from fastppo.models.loading.trained import choose_trained
from fastppo.models.loading.weights import (
    DTYPES,
    Partitions,
    check_one_label,
    is_classifier,
    load_config,
    load_model,
    outline,
)
from fastppo.models.roles import Policy, RewardModel, fuse_head, keep_prefix, width_of

log = logging.getLogger("fastppo")


def load_policy(
    config: ModelConfig, optim: OptimConfig, seed: int, device: torch.device, partitions: Partitions = None
) -> Policy:
    """A language model to be trained. seed: of its adapters, with LoRA."""
    dtype = DTYPES[optim.dtype]
    model = load_causal("model.path", config.path, config.gguf_file, config.revision, dtype, device, partitions)
    policy = Policy(model)
    choose_trained(policy, "model", config, config.path, config.revision, seed)
    _prepare(policy, optim, partitions)
    return policy


def load_reward_model(
    config: ModelConfig, optim: OptimConfig, seed: int, device: torch.device, partitions: Partitions = None
) -> RewardModel:
    """A reward model to be trained: a language model with a new score head, or a reward model as it is.

    seed: of a new head, and of adapters.
    """
    source, dtype = model_source(config), DTYPES[optim.dtype]
    if is_reward_model(source):
        model = load_model(AutoModelForSequenceClassification, source, dtype, device, partitions)
    else:
        causal = load_causal("model.path", config.path, config.gguf_file, config.revision, dtype, device, partitions)
        model = _with_score_head(causal, initial_head(width_of(causal), seed).to(device, dtype))
    reward_model = _reward_model(model, config, seed)
    _prepare(reward_model, optim, partitions)
    return reward_model


def model_source(config: ModelConfig) -> Source:
    return Source("model.path", config.path, config.gguf_file, config.revision)


def is_reward_model(source: Source) -> bool:
    """Whether a reward model starts from a reward model, else a language model. Raises ModelError for a classifier."""
    config = load_config(source)
    if is_classifier(config):
        check_one_label(source, config, "Start from a language model, or from a classifier with num_labels=1.")
    return is_classifier(config)


def outline_trained(config: OfflineConfig) -> Policy | RewardModel:
    """The model that an offline method trains, on the meta device: every module and shape, and what of it trains."""
    source, dtype, model = model_source(config.model), DTYPES[config.optim.dtype], config.model
    if config.role == "policy":
        policy = Policy(fuse_head(outline(AutoModelForCausalLM, source, dtype)))
        choose_trained(policy, "model", model, model.path, model.revision, config.seed)
        return policy
    if is_reward_model(source):
        classifier = outline(AutoModelForSequenceClassification, source, dtype)
    else:
        causal = outline(AutoModelForCausalLM, source, dtype)
        classifier = _with_score_head(causal, torch.empty(1, width_of(causal), dtype=dtype, device="meta"))
    return _reward_model(classifier, model, config.seed)


def _reward_model(model: PreTrainedModel, config: ModelConfig, seed: int) -> RewardModel:
    """The role, with what of it trains chosen; its head always does."""
    reward_model = RewardModel(model)
    chosen = replace(config, train="score.*") if config.train == "head" else config
    choose_trained(reward_model, "model", chosen, config.path, config.revision, seed)
    reward_model.head.requires_grad_(True)
    return reward_model


def _with_score_head(causal: PreTrainedModel, weight: torch.Tensor) -> PreTrainedModel:
    """The sequence classifier of a causal model's family, on the same backbone, with these head weights (1, H)."""
    config = copy.deepcopy(causal.config)
    config.num_labels = 1
    none = f"{type(causal).__name__} has no sequence classifier with a `score` head in transformers"
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(f"{none}. Train a reward model from a family that has one: Llama, Qwen, Mistral, Gemma, ...")
    with torch.device("meta"):  # only the shell is wanted
        model = AutoModelForSequenceClassification.from_config(config)
    if not hasattr(model, "score"):
        raise ModelError(f"{none}. Train a reward model from a family that has one: Llama, Qwen, Mistral, Gemma, ...")
    setattr(model, model.base_model_prefix, causal.base_model)
    head = nn.Linear(weight.shape[1], 1, bias=False, device="meta")
    head.weight = nn.Parameter(weight)
    model.score = head
    return cast(PreTrainedModel, model.eval())


def set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, keep: bool = False) -> None:
    """Name another token than EOS for padding, one that the model has an embedding of.

    keep: of a reward model that trains further the padding stays, EOS or not: it tells at which token its head scores.

    Transformers takes a padded sequence's score at its last token that is no padding. Answers end with EOS, which many
    tokenizers pad with too; the score would come from the token before it. And it loads no model whose padding lies
    beyond its embedding, as a token does that was added to the tokenizer alone.
    """
    own = model.config.get_text_config().pad_token_id if keep else None
    if own is not None:
        tokenizer.pad_token, tokenizer.padding_side = tokenizer.convert_ids_to_tokens(own), "right"
        return
    names = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token)
    rows, ids = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings, tokenizer.get_vocab()
    usable = (name for name in names if name is not None and name != tokenizer.eos_token and ids.get(name, rows) < rows)
    padding = next(usable, None)
    if padding is None:
        log.warning(
            "the tokenizer has no token to pad with but EOS and what the model has no embedding of: give the exported"
            " reward model one text at a time"
        )
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = None
        return
    tokenizer.pad_token = padding
    tokenizer.padding_side = "right"  # before a text it would shift absolute positions, as GPT-2 has them
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = ids[padding]


def _prepare(role: Policy | RewardModel, optim: OptimConfig, partitions: Partitions) -> None:
    if partitions is None:
        keep_prefix(role)
    elif prefix_depth(role.model):
        log.info("zero.stage is 3: frozen layers are computed in every pass")
    if optim.activation_checkpointing:
        role.model.gradient_checkpointing_enable({"use_reentrant": False})


def initial_head(width: int, seed: int) -> Tensor:
    """A new score head's weights, (1, width) fp32, of deviation 1 / sqrt(width + 1) (Stiennon et al., 2020)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, width, generator=generator) / math.sqrt(width + 1)
