"""The trainable parameters of a role: all, the upper layers, those that match name patterns, or LoRA adapters."""

from __future__ import annotations

from fnmatch import fnmatch

from transformers import PreTrainedModel

from fastppo.config import ActorConfig, CriticConfig, ModelConfig
from fastppo.data import locate
from fastppo.errors import ModelError
from fastppo.models.frozen_prefix import after_layers, layers_of, prefix_depth
from fastppo.models.lora import add_adapters
from fastppo.models.roles import Backbone


def choose_trained(
    role: Backbone,
    name: str,
    config: ActorConfig | CriticConfig | ModelConfig,
    source: str,
    revision: str | None,
    seed: int,
) -> None:
    """Freeze the parameters that do not train; with LoRA only the adapters train. A value head always trains."""
    set_trainable(role, config.train)
    if config.lora.rank:
        add_adapters(role.model, name, config.lora, seed=seed, source=str(locate(source)), revision=revision)


def set_trainable(role: Backbone, train: str | int) -> None:
    """Set `requires_grad` of all parameters of the model.

    train: the trainable ones: `all`, the number of upper layers, or comma-separated name patterns.
    """
    named = dict(role.model.named_parameters())
    if train == "all":
        chosen = set(named)
    elif isinstance(train, int):
        chosen = _upper_layers(role.model, train)
    else:
        patterns = [p.strip() for p in train.split(",")]
        chosen = {name for name in named if any(fnmatch(name, p) for p in patterns)}
        unmatched = [p for p in patterns if not any(fnmatch(name, p) for name in named)]
        if unmatched:
            raise ModelError(
                f"train: no parameter of {type(role.model).__name__} matches {', '.join(unmatched)};"
                f" its names look like {', '.join(list(named)[1:4])}"
            )
    for name, parameter in named.items():
        parameter.requires_grad_(name in chosen)


def recompute_layers(model: PreTrainedModel, count: int) -> None:
    """Let the backward pass recompute the activations of the `count` lowest of the layers that it goes through.

    The layers below these, where they are frozen, keep nothing. All layers recompute where the model has no list of
    layers. Backward, the layers above have been passed and what they kept is free before the first one is recomputed:
    recomputing the lower ones and not the upper ones needs the least memory.

    Layers draw no random numbers (all noise is off), so the state of the generators is neither kept nor set back: a
    reward function in another thread may be using them (`ppo.steps_ahead`).
    """
    if count == 0:
        return
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    # It lets the embeddings' output have a gradient, which the other way to recompute needs: frozen layers would keep
    # activations.
    model.disable_input_require_grads()
    parent_and_name = layers_of(model)
    if parent_and_name is None:
        return
    parent, name = parent_and_name
    for layer in list(getattr(parent, name))[prefix_depth(model) + count :]:
        for module in layer.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False


def _upper_layers(model: PreTrainedModel, count: int) -> set[str]:
    """Names of the parameters of the upper `count` layers and of the modules after them, for example a final norm.

    The vocabulary head stays frozen: where it is tied to the embedding, training it would also train the embedding.
    """
    depth = model.config.get_text_config().num_hidden_layers
    if not 0 < count <= depth:
        raise ModelError(f"train = {count}: {type(model).__name__} has {depth} layers; choose 1 to {depth}, or `all`")
    parent_and_name = layers_of(model)
    if parent_and_name is None:
        raise ModelError(f"train = {count}: {type(model).__name__} has no list of {depth} layers; use name patterns")
    parent, name = parent_and_name
    upper = list(getattr(parent, name))[depth - count :]
    chosen = {id(p) for module in [*upper, *after_layers(parent)] for p in module.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in chosen}
