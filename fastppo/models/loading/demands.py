"""What a model must have to be read packed, as far as its modules and its config tell: before a weight is read."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError

from fastppo.errors import ModelError

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")  # by transformers' common names
WIDTHS = ("head_dim", "num_key_value_heads", "num_attention_heads")  # of the cache, one for all layers


WORKS = (
    "Use a model with plain causal, sliding-window or soft-capped attention in all layers: Llama, Qwen,"
    " Mistral, Gemma, Phi-3, Mixtral, GPT-2, OPT, GPT-NeoX and others."
)


def check_interface(kind: type[PreTrainedModel]) -> None:
    """Raises ModelError for a class of models that packed rows cannot be handed to."""
    if not kind._supports_attention_backend:
        raise ModelError(
            f"{kind.__name__} does not take all its attention from transformers' AttentionInterface, so it cannot read"
            f" packed rows. {WORKS}"
        )


def check_demands(model: PreTrainedModel) -> None:
    """Raises ModelError for an architecture that cannot be read packed. model: may be on the meta device."""
    name, config = type(model).__name__, model.config.get_text_config()
    check_interface(type(model))
    try:
        for width in WIDTHS:
            getattr(config, width, None)
    except AmbiguousGlobalPerLayerAttributeError:
        raise ModelError(
            f"{name}: {width} differs from layer to layer, and the cache to sample from has one for all layers. Use a"
            " model whose layers have heads of one width."
        ) from None
    missing = [size for size in SIZES if not isinstance(getattr(config, size, None), int)]
    if missing:
        raise ModelError(
            f"{name}: its config tells no {', '.join(missing)}, as one of an attention transformer does. Use a model"
            " of attention layers."
        )
    if model.base_model is model and model.get_output_embeddings() is not None:
        raise ModelError(
            f"{name} has no backbone that could be called without its vocabulary head, so every token would cost its"
            " logits. Use a model that transformers splits into the two, as it does nearly all."
        )
