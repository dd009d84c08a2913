"""Rules about the settings of SFT, reward modelling and DPO."""

from __future__ import annotations

import math

from fastppo.config.commands.offline import DPOConfig, OfflineConfig, PairsConfig, RewardTrainingConfig, SFTConfig
from fastppo.config.validation.data import check_heldout, check_template
from fastppo.config.validation.learning import among, check_parallel, check_zero, other_ranks
from fastppo.config.validation.models import check_attention, check_gguf_file, check_targets
from fastppo.config.validation.ranges import Ranges, check_betas, check_ranges, check_train
from fastppo.config.validation.run import check_checkpoints, check_tracking
from fastppo.errors import ConfigError

RANGES: Ranges = (
    (
        "0 or more",
        lambda x: 0 <= x < math.inf,
        "seed steps model.lr model.lora.rank data.split_seed optim.warmup_steps optim.weight_decay optim.max_grad_norm"
        " optim.max_skipped optim.activation_checkpointing eval.every eval.examples checkpoint.every checkpoint.keep_best"
        " keep_trunk_gb"
        " track.responses",
    ),
    (
        "1 or more",
        lambda x: x >= 1,
        "threads epochs batch_size microbatch_tokens patience data.limit data.last_tokens checkpoint.keep_last"
        " track.responses_every",
    ),
    ("2 or more", lambda x: x >= 2, "data.max_tokens"),
    ("greater than 0", lambda x: 0 < x < math.inf, "optim.eps timeout model.lora.alpha"),
)
REWARD_RANGES: Ranges = (("0 or more", lambda x: 0 <= x < math.inf, "margin centre_coef"),)
DPO_RANGES: Ranges = (
    ("greater than 0", lambda x: 0 < x < math.inf, "beta chosen_fall"),
    ("0 or more", lambda x: 0 <= x < math.inf, "nll_coef"),
    ("0 or more and less than 0.5", lambda x: 0 <= x < 0.5, "label_smoothing"),
)


def validate_offline(config: OfflineConfig, ranks: int = 1, own: Ranges = ()) -> None:
    """Check the rules of every offline method. own: the ranges of the method's additional numbers.

    Raises `ConfigError` for the first rule that the settings violate. ranks: the number of processes of the run.
    """
    check_ranges(config, (*RANGES, *own))
    data, heldout, what, answers = config.data, config.eval.examples, config.unit, config.sequences
    check_betas(config.optim)
    check_train("model.train", config.model.train)
    if config.model.train == "head" and config.role != "reward model":
        raise ConfigError("model.train is head, which is for reward models. Give all, a number of layers or patterns.")
    check_targets("model.lora", config.model.lora)
    check_attention(config.attention, config.optim.dtype)
    if not config.output:
        raise ConfigError(f"output is empty; name a folder for the run, as in --output {type(config).output}.")
    if not config.model.path:
        raise ConfigError("model.path is not set: there is nothing to train. Give a hub name or a directory.")
    if not data.path:
        raise ConfigError(f"data.path is not set: give a dataset on the hub, a directory or a file with {what}.")
    check_template(data)
    if answers * data.max_tokens > config.microbatch_tokens:
        example = "the two answers of a pair" if answers == 2 else "one example"
        raise ConfigError(
            f"microbatch_tokens is {config.microbatch_tokens}, but {example} can have"
            f" {answers * data.max_tokens} tokens (data.max_tokens {data.max_tokens}) and must fit into one microbatch."
            " Raise microbatch_tokens, or lower data.max_tokens."
        )
    if config.batch_size % (groups := check_parallel(config, ranks)):
        raise ConfigError(
            f"batch_size is {config.batch_size} and there are {among(config, groups)}, among which the {what} are"
            f" divided equally. Set it to a multiple of {groups}, or"
            f" {other_ranks(config.batch_size, groups, config)}."
        )
    if heldout == 0 and data.eval_path is not None:
        raise ConfigError(
            f"data.eval_path is {data.eval_path} but eval.examples is 0, which turns evaluation off. Set eval.examples"
            " above 0."
        )
    check_heldout(data, "eval.examples", heldout, what)
    if config.steps is not None and 0 < config.steps < config.optim.warmup_steps:
        raise ConfigError(
            f"optim.warmup_steps is {config.optim.warmup_steps}, but steps {config.steps}: the learning rate would"
            " never reach its peak. Lower warmup_steps or raise steps."
        )
    check_zero(config)
    check_checkpoints(config)
    check_tracking(config)


def validate_reward(config: RewardTrainingConfig, ranks: int = 1) -> None:
    """Raises `ConfigError` for the first rule that the settings break on this many ranks (processes)."""
    validate_offline(config, ranks, REWARD_RANGES)
    check_pairs(config.data)


def validate_sft(config: SFTConfig, ranks: int = 1) -> None:
    """Raises `ConfigError` for the first rule that the settings break on this many ranks (processes)."""
    validate_offline(config, ranks)
    data = config.data
    if data.messages is not None and data.chat == "never" and data.last_tokens is not None:
        raise ConfigError(
            f"data.messages is {data.messages} and data.last_tokens {data.last_tokens}: a turn of a conversation is learned"
            " as a whole, since the next message answers all of it. Leave out data.last_tokens."
        )


def validate_dpo(config: DPOConfig, ranks: int = 1) -> None:
    """Raises `ConfigError` for the first rule that the settings break on this many ranks (processes)."""
    validate_offline(config, ranks, DPO_RANGES)
    check_pairs(config.data)
    check_gguf_file("reference", config.reference, "the model as training starts")
    if config.loss == "ipo" and config.label_smoothing:
        raise ConfigError(
            f"label_smoothing is {config.label_smoothing} and loss ipo, whose margins are bounded without it. Set"
            " label_smoothing to 0, or loss to dpo."
        )
    if config.data.margin is not None:
        raise ConfigError(
            f"data.margin is {config.data.margin}, but margins of pairs are for reward models: DPO's loss has none."
            " Leave data.margin out."
        )


def check_pairs(data: PairsConfig) -> None:
    if data.rating is not None and data.margin is not None:
        raise ConfigError(
            f"data.rating is {data.rating} and data.margin {data.margin}: a margin belongs to a pair, and with a rating"
            " the rows are single answers. Leave out one of the two."
        )
    if data.rating is None and data.chosen == data.rejected:
        raise ConfigError(f"data.chosen and data.rejected are both {data.chosen}; name the two columns of a pair.")
