"""The model of an offline method: its weights, its head, its trainable parameters; and a model that is only sampled."""

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

from fastppo.config import (
    DPOConfig,
    GenerateConfig,
    ModelConfig,
    OfflineConfig,
    OptimConfig,
    ReferenceConfig,
    SampledConfig,
)
from fastppo.errors import ModelError
from fastppo.models.frozen_prefix import depth_of, prefix_depth
from fastppo.models.loading.policies import Texts, check_reader, check_reward_models, check_switch, load_causal
from fastppo.models.loading.source import Source
from fastppo.models.loading.trained import choose_trained, recompute_layers
from fastppo.models.loading.weights import (
    DTYPES,
    Partitions,
    check_one_label,
    is_classifier,
    load_config,
    load_model,
    load_tokenizer,
    outline,
)
from fastppo.models.roles import Policy, RewardModel, enable_prefix_states, fuse_head, width_of

log = logging.getLogger("fastppo")


def load_policy(
    config: ModelConfig, optim: OptimConfig, seed: int, device: torch.device, partitions: Partitions = None
) -> Policy:
    """Load the language model that SFT trains. seed: of its LoRA adapters."""
    dtype = DTYPES[optim.dtype]
    model = load_causal("model.path", config.path, config.gguf_file, config.revision, dtype, device, partitions)
    policy = Policy(model)
    choose_trained(policy, "model", config, config.path, config.revision, seed)
    _prepare(policy, optim, partitions)
    return policy


def load_reward_model(
    config: ModelConfig, optim: OptimConfig, seed: int, device: torch.device, partitions: Partitions = None
) -> RewardModel:
    """Load the reward model that is trained: a language model with a new score head, or an existing reward model.

    seed: of a new head and of LoRA adapters.
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


def reference_source(reference: ReferenceConfig) -> Source:
    """reference: of a model of its own."""
    assert reference.model is not None
    return Source("reference.model", reference.model, reference.gguf_file)


def check_reference(config: DPOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check, without reading weights, that DPO's reference can read the pairs, if it is a model of its own.

    tokenizer: of the model that trains. Raises ModelError.
    """
    if config.reference.model is None:
        return
    longest = config.data.max_tokens
    texts = Texts(
        model_source(config.model),
        tokenizer,
        "model.path has those of",
        longest,
        f"data.max_tokens is {longest}",
        "Lower data.max_tokens",
    )
    reason = "the log ratio of policy and reference has no meaning"
    way = "Use a reference with the tokenizer of model.path, or leave out reference.model: it is then the model itself."
    check_reader(reference_source(config.reference), texts, reason, way)


def load_reference(config: DPOConfig, device: torch.device, partitions: Partitions = None) -> Policy:
    """Load DPO's reference where it is a model of its own, frozen."""
    source, dtype = reference_source(config.reference), DTYPES[config.optim.dtype]
    model = load_causal(source.setting, source.name, source.gguf_file, None, dtype, device, partitions)
    return Policy(model).requires_grad_(False).eval()


def is_reward_model(source: Source) -> bool:
    """Whether the source is a reward model, and not a language model. Raises ModelError for any other classifier."""
    config = load_config(source)
    if is_classifier(config):
        check_one_label(source, config, "Start from a language model, or from a classifier with num_labels=1.")
    return is_classifier(config)


def outline_trained(config: OfflineConfig) -> Policy | RewardModel:
    """The model that an offline method trains, on the meta device: modules, shapes and trainable parameters."""
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
    """The role, with its trainable parameters set; its head is always trainable."""
    reward_model = RewardModel(model)
    chosen = replace(config, train="score.*") if config.train == "head" else config
    choose_trained(reward_model, "model", chosen, config.path, config.revision, seed)
    reward_model.head.requires_grad_(True)
    return reward_model


def _with_score_head(causal: PreTrainedModel, weight: torch.Tensor) -> PreTrainedModel:
    """The sequence classifier of a causal model's family on the same backbone; weight: of its head, (1, H)."""
    config = copy.deepcopy(causal.config)
    config.num_labels = 1
    no_classifier = (
        f"{type(causal).__name__} has no sequence classifier with a `score` head in transformers. Train a reward model"
        " from a family that has one: Llama, Qwen, Mistral, Gemma, ..."
    )
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(no_classifier)
    with torch.device("meta"):  # only its modules around the backbone are used
        model = AutoModelForSequenceClassification.from_config(config)
    if not hasattr(model, "score"):
        raise ModelError(no_classifier)
    setattr(model, model.base_model_prefix, causal.base_model)
    head = nn.Linear(weight.shape[1], 1, bias=False, device="meta")
    head.weight = nn.Parameter(weight)
    model.score = head
    return cast(PreTrainedModel, model.eval())


def set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, keep: bool = False) -> None:
    """Set a padding token that is not EOS and that the model has an embedding of.

    keep: keep the padding token of a reward model that trains further, even if it is EOS: it determines the token whose
    hidden state the head scores.

    transformers takes the score of a padded sequence at its last token that is not padding. Answers end with EOS, and
    many tokenizers also pad with EOS; the score would then come from the token before EOS. transformers also loads no
    model whose padding token has no embedding, for example a token that was added to the tokenizer only.
    """
    model_padding = model.config.get_text_config().pad_token_id if keep else None
    if model_padding is not None:
        tokenizer.pad_token, tokenizer.padding_side = tokenizer.convert_ids_to_tokens(model_padding), "right"
        return
    candidates = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token)
    rows, ids = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings, tokenizer.get_vocab()
    usable = (
        name for name in candidates if name is not None and name != tokenizer.eos_token and ids.get(name, rows) < rows
    )
    padding = next(usable, None)
    if padding is None:
        log.warning(
            "the tokenizer has no padding token other than EOS that the model has an embedding of: give the exported"
            " reward model one text at a time"
        )
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = None
        return
    tokenizer.pad_token = padding
    tokenizer.padding_side = "right"  # padding on the left would shift absolute positions (GPT-2)
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = ids[padding]


def _prepare(role: Policy | RewardModel, optim: OptimConfig, partitions: Partitions) -> None:
    if partitions is None:
        enable_prefix_states(role)
    elif prefix_depth(role.model):
        log.info("zero.stage is 3: frozen layers are computed in every pass")
    recompute_layers(role.model, optim.recomputed_layers(depth_of(role.model)))


def initial_head(width: int, seed: int) -> Tensor:
    """Initial weights of a score head, (1, width) fp32, deviation 1 / sqrt(width + 1) (Stiennon et al., 2020)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, width, generator=generator) / math.sqrt(width + 1)


def sampled_source(model: SampledConfig) -> Source:
    return Source("model.path", model.path, model.gguf_file, model.revision)


def check_sampled(config: GenerateConfig) -> PreTrainedTokenizerBase:
    """Check, without reading weights, that the models of a run exist; returns the tokenizer of the one to sample from.

    Raises ModelError.
    """
    source = sampled_source(config.model)
    load_config(source)
    tokenizer = load_tokenizer(source.setting, source.name, source.gguf_file, source.revision)
    check_switch(source, config)
    check_reward_models(config)
    return tokenizer


def load_sampled(config: GenerateConfig, device: torch.device) -> Policy:
    """The whole model, frozen, in evaluation mode."""
    model, dtype = config.model, DTYPES[config.optim.dtype]
    loaded = load_causal("model.path", model.path, model.gguf_file, model.revision, dtype, device)
    return Policy(loaded).requires_grad_(False).eval()
