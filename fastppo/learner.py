"""The one model of a stage before PPO: loaded, and with an engine under it."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastppo.attention import choose_attention
from fastppo.batch import Packed
from fastppo.config import ModelConfig, OptimConfig, RewardTrainingConfig, SFTConfig
from fastppo.engine import Engine, check_nvme
from fastppo.examples import Examples
from fastppo.load import choose_trained, load_causal, trained_partitions, width_of
from fastppo.microbatch import IDLE
from fastppo.models import Backbone, ModelError, Policy, RewardModel, check_packing, fuse_head, keep_trunk
from fastppo.preference import initial_head
from fastppo.trunk import TrunkStates, trunk_depth
from fastppo.weights import (
    DTYPES,
    Partitions,
    Source,
    check_one_label,
    is_classifier,
    load_config,
    load_model,
    outline,
)
from fastppo.world import World

log = logging.getLogger("fastppo")


@dataclass(frozen=True)
class Learner:
    """The one model of a stage before PPO."""

    engine: Engine  # of a RewardModel or a Policy
    tokenizer: PreTrainedTokenizerBase

    @property
    def model(self) -> Backbone:
        model: Backbone = self.engine.module
        return model

    @property
    def bytes_of_state(self) -> int:
        """Of one token's hidden state."""
        return int(self.model.model.config.get_text_config().hidden_size) * self.model.model.dtype.itemsize

    def select(self, examples: Examples, part: Tensor, trunk: TrunkStates) -> tuple[Packed, Tensor | None]:
        """The sequences of these examples on the device, and what the trunk hands up for them.

        Of no examples it is a sequence whose outputs are to be left out (`engine.even_passes`).
        """
        if not len(part):
            return IDLE.to(self.model.device), None
        sequences = examples.sequences(part)
        packed = examples.packed.select(sequences).to(self.model.device)
        return packed, trunk(self.model, packed, sequences)


def assemble_scorer(config: RewardTrainingConfig, world: World, tokenizer: PreTrainedTokenizerBase) -> Learner:
    """Load a reward model that is to be trained and put an engine under it. tokenizer: its own, set to pad with."""
    check_nvme(config.zero)
    choose_attention(config.attention, DTYPES[config.optim.dtype], world.device)
    partitions = trained_partitions(config)
    model = load_scorer(config.model, config.optim, config.seed, world.device, partitions)
    set_padding(model.model, tokenizer, keep=_starts_as_scorer(model_source(config.model)))
    head = {id(parameter) for parameter in model.head.parameters()}
    backbone = [parameter for parameter in model.parameters() if id(parameter) not in head]
    return Learner(Engine(model, [backbone, list(model.head.parameters())], config.optim, config.zero), tokenizer)


def assemble_learner(config: SFTConfig, world: World, tokenizer: PreTrainedTokenizerBase) -> Learner:
    """Load a language model that is to be trained and put an engine under it. tokenizer: its own."""
    check_nvme(config.zero)
    choose_attention(config.attention, DTYPES[config.optim.dtype], world.device)
    partitions = trained_partitions(config)
    model = load_learner(config.model, config.optim, config.seed, world.device, partitions)
    return Learner(Engine(model, [list(model.parameters())], config.optim, config.zero), tokenizer)


def load_learner(
    config: ModelConfig, optim: OptimConfig, seed: int, device: torch.device, partitions: Partitions = None
) -> Policy:
    """The language model of a supervised start. seed: of its adapters, with LoRA."""
    dtype = DTYPES[optim.dtype]
    model = load_causal("model.path", config.path, config.gguf_file, config.revision, dtype, device, partitions)
    policy = Policy(model)
    choose_trained(policy, "model", config, config.path, config.revision, seed)
    _prepare(policy, optim, partitions)
    return policy


def load_scorer(
    config: ModelConfig, optim: OptimConfig, seed: int, device: torch.device, partitions: Partitions = None
) -> RewardModel:
    """A reward model to be trained: a language model with a new score head, or a reward model as it is.

    seed: of a new head, and of adapters.
    """
    source, dtype = model_source(config), DTYPES[optim.dtype]
    if _starts_as_scorer(source):
        model = load_model(AutoModelForSequenceClassification, source, dtype, device, partitions)
        if partitions is None:
            check_packing(model)
    else:
        causal = load_causal("model.path", config.path, config.gguf_file, config.revision, dtype, device, partitions)
        model = _with_score_head(causal, initial_head(width_of(causal), seed).to(device, dtype))
    scorer = _scorer(model, config, seed)
    _prepare(scorer, optim, partitions)
    return scorer


def model_source(config: ModelConfig) -> Source:
    return Source("model.path", config.path, config.gguf_file, config.revision)


def _starts_as_scorer(source: Source) -> bool:
    """Whether a reward model starts from a reward model, else a language model. Raises ModelError for a classifier."""
    config = load_config(source)
    if is_classifier(config):
        check_one_label(source, config, "Start from a language model, or from a classifier with num_labels=1.")
    return is_classifier(config)


def outline_learner(config: SFTConfig) -> Policy:
    """The model of `load_learner` on the meta device: every module and shape, and what of it trains, no weights."""
    model, dtype = config.model, DTYPES[config.optim.dtype]
    policy = Policy(fuse_head(outline(AutoModelForCausalLM, model_source(model), dtype)))
    choose_trained(policy, "model", model, model.path, model.revision, config.seed)
    return policy


def outline_scorer(config: RewardTrainingConfig) -> RewardModel:
    """The model of `load_scorer` on the meta device."""
    source, dtype = model_source(config.model), DTYPES[config.optim.dtype]
    if _starts_as_scorer(source):
        model = outline(AutoModelForSequenceClassification, source, dtype)
    else:
        causal = outline(AutoModelForCausalLM, source, dtype)
        model = _with_score_head(causal, torch.empty(1, width_of(causal), dtype=dtype, device="meta"))
    return _scorer(model, config.model, config.seed)


def _scorer(model: PreTrainedModel, config: ModelConfig, seed: int) -> RewardModel:
    """The role, with what of it trains chosen; its head always does."""
    scorer = RewardModel(model)
    chosen = replace(config, train="score.*") if config.train == "head" else config
    choose_trained(scorer, "model", chosen, config.path, config.revision, seed)
    scorer.head.requires_grad_(True)
    return scorer


def _with_score_head(causal: PreTrainedModel, weight: torch.Tensor) -> PreTrainedModel:
    """The sequence classifier of a causal model's family, on the same backbone, with these head weights (1, H)."""
    config = copy.deepcopy(causal.config)
    config.num_labels = 1
    with torch.device("meta"):  # only the shell is wanted
        model = AutoModelForSequenceClassification.from_config(config)
    if not hasattr(model, "score"):
        raise ModelError(f"{type(causal).__name__} has no sequence classifier with a `score` head in transformers")
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
        keep_trunk(role)
    elif trunk_depth(role.model):
        log.info("zero.stage is 3: frozen layers are computed in every pass")
    if optim.activation_checkpointing:
        role.model.gradient_checkpointing_enable({"use_reentrant": False})
