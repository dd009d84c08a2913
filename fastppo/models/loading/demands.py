"""Requirements on a model for packed rows that can be checked from its modules and its config, without weights."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError

from fastppo.errors import ModelError

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")  # transformers' common names
CACHE_SIZES = ("head_dim", "num_key_value_heads", "num_attention_heads")  # must be the same in all layers


WORKS = (
    "Use a model with plain causal, sliding-window or soft-capped attention in all layers: Llama, Qwen,"
    " Mistral, Gemma, Phi-3, Mixtral, GPT-2, OPT, GPT-NeoX and others."
)


def check_interface(kind: type[PreTrainedModel]) -> None:
    """Raises ModelError for a class of models that cannot read packed rows."""
    if not kind._supports_attention_backend:
        raise ModelError(
            f"{kind.__name__} does not take all its attention from transformers' AttentionInterface, so it cannot read"
            f" packed rows. {WORKS}"
        )


def check_demands(model: PreTrainedModel) -> None:
    """Raises ModelError for a model that cannot read packed rows. model: may be on the meta device."""
    name, config = type(model).__name__, model.config.get_text_config()
    check_interface(type(model))
    try:
        for size in CACHE_SIZES:
            getattr(config, size, None)
    except AmbiguousGlobalPerLayerAttributeError:
        raise ModelError(
            f"{name}: {size} differs from layer to layer, and the sampling cache has one value for all layers. Use a"
            " model whose layers have heads of one width."
        ) from None
    missing = [size for size in SIZES if not isinstance(getattr(config, size, None), int)]
    if missing:
        raise ModelError(
            f"{name}: its config has no {', '.join(missing)}, which an attention transformer has. Use a model of"
            " attention layers."
        )
    if model.base_model is model and model.get_output_embeddings() is not None:
        raise ModelError(
            f"{name} has no backbone that can be called without its vocabulary head, so logits would be computed for"
            " every token. Use a model that transformers splits into backbone and head, as nearly all are."
        )
