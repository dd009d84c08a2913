"""Rules about the settings of the roles."""

from __future__ import annotations

from fastppo.config.commands.online import OnlineConfig
from fastppo.config.models import AttentionSetting, CriticConfig, LoraConfig, ReferenceConfig
from fastppo.errors import ConfigError


def check_models(config: OnlineConfig) -> None:
    actor, reference = config.actor, config.reference
    if not config.output:
        raise ConfigError(f"output is empty; name a folder for the run, as in --output {type(config).output}.")
    if not actor.model:
        raise ConfigError(
            "actor.model is not set: there is nothing to train. Give a hub name or a directory,"
            " or start from a preset with --config quickstart."
        )
    check_attention(config.attention, config.optim.dtype)
    check_targets("actor.lora", actor.lora)
    if actor.lora.export == "adapters" and not actor.lora.rank:
        raise ConfigError(
            "actor.lora.export is adapters but actor.lora.rank is 0: without LoRA there are no adapters to export. Set"
            " actor.lora.rank, or leave out actor.lora.export."
        )
    check_gguf_file("reference", reference, "the actor's weights")


def check_critic(critic: CriticConfig) -> None:
    if critic.kind == "shared":
        for field, value, default in (
            ("model", critic.model, None),
            ("gguf_file", critic.gguf_file, None),
            ("train", critic.train, "all"),
            ("lora.rank", critic.lora.rank, 0),
        ):
            if value != default:
                raise ConfigError(
                    f"critic.{field} is {value} but critic.kind is shared: a shared critic is a value head on the"
                    f" actor's backbone and has no separate weights. Leave out critic.{field}, or set critic.kind to"
                    " separate."
                )
    check_targets("critic.lora", critic.lora)
    check_gguf_file("critic", critic, "the actor's weights")


def check_gguf_file(name: str, role: CriticConfig | ReferenceConfig, default: str) -> None:
    """default: what is used where neither of the two is set, for the message."""
    if role.gguf_file is not None and role.model is None:
        raise ConfigError(
            f"{name}.gguf_file is {role.gguf_file} but {name}.model is not set, in which the file is searched. Set"
            f" {name}.model too, or neither of them to use {default}."
        )


def check_attention(attention: AttentionSetting, dtype: str, setting: str = "optim.dtype") -> None:
    """setting: as messages name the one that gives the run's dtype."""
    library = {"flash": "flash-attn", "varlen": "torch's varlen_attn"}.get(attention)
    if library is not None and dtype == "fp32":
        raise ConfigError(
            f"attention is {attention} and {setting} fp32: {library} computes in bf16 or fp16. Set {setting} to bf16,"
            " or attention to auto or sdpa."
        )


def check_targets(name: str, lora: LoraConfig) -> None:
    if not all(target.strip() for target in lora.targets.split(",")):
        raise ConfigError(
            f"{name}.targets is {lora.targets!r}, which contains an empty name; give all-linear, or names or patterns"
            " of linear layers, as in q_proj,v_proj."
        )
