"""Every rule between settings that can be checked before a model loads.

`validate` is called once, by `fastppo.cli.parse`. Each message names the settings, their values, the reason and
the way out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import attrgetter

from fastppo.config import Config, ConfigError

# What a number must be, the test for it, and the settings it holds for. A setting that is null is off.
# NaN fails every comparison, and so every test.
RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "0 or more",
        lambda x: 0 <= x < math.inf,
        "seed steps actor.lr critic.lr critic.warmup_steps data.split_seed sampling.top_k sampling.min_new_tokens"
        " ppo.entropy_coef ppo.value_coef ppo.kl_coef ppo.truncation_penalty optim.warmup_steps optim.weight_decay"
        " optim.max_grad_norm optim.max_skipped eval.every eval.prompts eval.seed eval.show checkpoint.every"
        " checkpoint.keep_best",
    ),
    (
        "1 or more",
        lambda x: x >= 1,
        "threads data.first_tokens data.max_prompt_tokens data.limit sampling.max_new_tokens"
        " sampling.samples_per_prompt sampling.rows ppo.batch_size ppo.epochs ppo.minibatches ppo.microbatch_tokens"
        " checkpoint.keep_last",
    ),
    (
        "greater than 0",
        lambda x: 0 < x < math.inf,
        "sampling.temperature eval.temperature ppo.clip_high ppo.value_clip ppo.kl_target ppo.kl_horizon"
        " ppo.score_clip optim.eps timeout",
    ),
    ("greater than 1", lambda x: 1 < x < math.inf, "ppo.dual_clip"),
    ("between 0 and 1", lambda x: 0 <= x <= 1, "ppo.gamma ppo.lam"),
    ("greater than 0 and less than 1", lambda x: 0 < x < 1, "ppo.clip_low"),
    ("greater than 0 and at most 1", lambda x: 0 < x <= 1, "sampling.top_p"),
)


def validate(config: Config, ranks: int = 1) -> None:
    """Raises `ConfigError` for the first rule that the settings break on this many ranks (processes)."""
    _check_ranges(config)
    _check_models(config)
    _check_rewards(config)
    _check_data(config)
    _check_sampling(config)
    _check_batch(config, ranks)
    _check_kl(config)
    _check_schedule(config)
    _check_checkpoints(config)


def _check_ranges(config: Config) -> None:
    for meaning, holds, names in RANGES:
        for name in names.split():
            value = attrgetter(name)(config)
            if value is not None and not holds(value):
                raise ConfigError(f"{name} is {value}; it must be {meaning}.")
    for beta in config.optim.betas:
        if not 0 <= beta < 1:
            raise ConfigError(f"optim.betas is {list(config.optim.betas)}; each must be at least 0 and less than 1.")
    for name in ("actor.train", "critic.train"):
        train = attrgetter(name)(config)
        if train == "" or (isinstance(train, int) and train < 1):
            raise ConfigError(f"{name} is {train!r}; give all, a number of upper layers (1 or more) or name patterns.")


def _check_models(config: Config) -> None:
    actor, critic, reference = config.actor, config.critic, config.reference
    if not config.output:
        raise ConfigError("output is empty; name a folder for the run, as in --output runs/ppo.")
    if not actor.model:
        raise ConfigError(
            "actor.model is not set: there is nothing to train. Give a hub name or a directory,"
            " or start from a preset with --config quickstart."
        )
    if critic.kind == "shared":
        for field, value, default in (
            ("model", critic.model, None),
            ("gguf_file", critic.gguf_file, None),
            ("train", critic.train, "all"),
        ):
            if value != default:
                raise ConfigError(
                    f"critic.{field} is {value} but critic.kind is shared: a shared critic is a value head on the"
                    f" actor's backbone and has no weights of its own. Leave out critic.{field}, or set"
                    " critic.kind to separate."
                )
    for name, role in (("critic", critic), ("reference", reference)):
        if role.gguf_file is not None and role.model is None:
            raise ConfigError(
                f"{name}.gguf_file is {role.gguf_file} but {name}.model is not set: the file is looked for inside"
                f" {name}.model. Set {name}.model too, or neither (the actor's weights are used then)."
            )


def _check_rewards(config: Config) -> None:
    if not config.rewards:
        raise ConfigError(
            "rewards is empty: PPO needs at least one source of reward. Give one, as in"
            """ --rewards '[{"function": "my_module:my_function"}]'."""
        )
    for i, reward in enumerate(config.rewards):
        if (reward.function is None) == (reward.model is None):
            both = "neither is" if reward.function is None else f"function is {reward.function}, model {reward.model}"
            raise ConfigError(f"rewards[{i}] needs exactly one of function and model; {both} set.")
        if reward.function is not None and not all(reward.function.rpartition(":")[::2]):
            raise ConfigError(f"rewards[{i}].function is {reward.function}; write module:function or file.py:function.")
        if not math.isfinite(reward.weight):
            raise ConfigError(f"rewards[{i}].weight is {reward.weight}; it must be a finite number.")
    if config.ppo.bootstrap_truncated:
        raise ConfigError(
            "ppo.bootstrap_truncated is true, but each of the rewards scores the whole response on its last token."
            " For a response that was cut this asks the value of its last state to be V = score + V, which has no"
            " fixed point at gamma = 1: V grows without end. Set it to false; ppo.truncation_penalty is the way to"
            " treat such responses differently."
        )


def _check_data(config: Config) -> None:
    data, prompts = config.data, config.eval.prompts
    if not data.path:
        raise ConfigError("data.path is not set: give a dataset on the hub, a directory or a file with prompts.")
    if data.first_tokens is not None:
        if data.chat == "always":
            raise ConfigError(
                f"data.first_tokens is {data.first_tokens} and data.chat is always: first_tokens cuts plain text, and"
                " a chat prompt cut in the middle has lost the end of its template. Set data.chat to auto or never,"
                " or leave out data.first_tokens."
            )
        if data.first_tokens > data.max_prompt_tokens:
            raise ConfigError(
                f"data.first_tokens is {data.first_tokens} and data.max_prompt_tokens {data.max_prompt_tokens}:"
                " every prompt would be too long. Raise max_prompt_tokens or lower first_tokens."
            )
    if prompts == 0 and (config.eval.every or data.eval_path is not None):
        setting = f"eval.every is {config.eval.every}" if config.eval.every else f"data.eval_path is {data.eval_path}"
        raise ConfigError(f"{setting} but eval.prompts is 0, which turns evaluation off. Set eval.prompts above 0.")
    if data.eval_path is None and data.eval_split != "train":
        raise ConfigError(
            f"data.eval_split is {data.eval_split} but data.eval_path is not set, and held-out prompts come from"
            f" data.path. Set data.eval_path to {data.path} to evaluate on another split of it."
        )
    if data.eval_path is None and data.limit is not None and data.limit <= prompts:
        raise ConfigError(
            f"data.limit is {data.limit} and eval.prompts {prompts}: holding those out leaves no prompt to train on."
            " Raise data.limit, lower eval.prompts, or give data.eval_path."
        )


def _check_sampling(config: Config) -> None:
    sampling, ppo, longest = config.sampling, config.ppo, config.data.max_prompt_tokens
    if sampling.min_new_tokens > sampling.max_new_tokens:
        raise ConfigError(
            f"sampling.min_new_tokens is {sampling.min_new_tokens} and sampling.max_new_tokens"
            f" {sampling.max_new_tokens}: the shortest response may not be longer than the longest."
        )
    if "" in sampling.stop_tokens:
        raise ConfigError("sampling.stop_tokens holds an empty text; each must be a token of the tokenizer.")
    if sampling.ignore_eos and sampling.stop_tokens:
        raise ConfigError(
            f"sampling.stop_tokens is {list(sampling.stop_tokens)} and sampling.ignore_eos is true: with ignore_eos"
            " nothing ends a response before max_new_tokens. Leave out one of the two."
        )
    if longest + sampling.max_new_tokens > ppo.microbatch_tokens:
        raise ConfigError(
            f"ppo.microbatch_tokens is {ppo.microbatch_tokens}, but one sequence can have"
            f" {longest + sampling.max_new_tokens} tokens (data.max_prompt_tokens {longest} +"
            f" sampling.max_new_tokens {sampling.max_new_tokens}) and must fit into one microbatch. Raise"
            " microbatch_tokens, or lower one of the other two."
        )


def _check_batch(config: Config, ranks: int) -> None:
    size, samples, minibatches = config.ppo.batch_size, config.sampling.samples_per_prompt, config.ppo.minibatches
    for name, parts in (("sampling.samples_per_prompt", samples), ("ppo.minibatches", minibatches)):
        if size % parts:
            near = " or ".join(str(n) for n in (size - size % parts, size - size % parts + parts) if n)
            reason = "each prompt is answered" if parts is samples else "each update of an epoch takes"
            unit = "that many times" if parts is samples else "an equal part of the batch"
            raise ConfigError(
                f"ppo.batch_size is {size} and {name} {parts}: {reason} {unit}, and {size} is not a multiple of"
                f" {parts}. Take a batch_size of {near}, or another {name.split('.')[1]}."
            )
    if size // minibatches % ranks:
        raise ConfigError(
            f"ppo.batch_size is {size} and ppo.minibatches {minibatches}: a minibatch of {size // minibatches}"
            f" responses cannot be spread over {ranks} ranks, as each takes as many. Make batch_size a multiple of"
            f" {ranks * minibatches}, or use fewer minibatches or ranks."
        )
    if config.zero.stage == 0 and config.optim.dtype == "bf16":
        raise ConfigError(
            "zero.stage is 0 and optim.dtype bf16: at stage 0 DeepSpeed would add up gradients in bf16, which rounds"
            " small ones away. Set zero.stage to 1 (on one rank it costs nothing), or optim.dtype to fp32."
        )


def _check_kl(config: Config) -> None:
    ppo = config.ppo
    if ppo.kl_in == "loss" and ppo.kl_kind == "k1":
        raise ConfigError(
            "ppo.kl_kind is k1 and ppo.kl_in is loss: as a term of the loss, the gradient of k1 is zero in"
            " expectation, so it adds noise and no penalty. Set kl_kind to exact, k2 or k3, or kl_in to reward."
        )
    if ppo.kl_target is None:
        return
    if ppo.kl_coef == 0:
        raise ConfigError(
            f"ppo.kl_target is {ppo.kl_target} and ppo.kl_coef 0: the adaptive coefficient is multiplied at every"
            " step and would stay 0. Give kl_coef a positive starting value, or leave out kl_target."
        )
    # beta *= 1 + clip(error, -0.2, 0.2) * batch / horizon must stay positive
    if ppo.kl_horizon <= 0.2 * ppo.batch_size:
        raise ConfigError(
            f"ppo.kl_horizon is {ppo.kl_horizon} and ppo.batch_size {ppo.batch_size}: one step could multiply the KL"
            f" coefficient by {1 - 0.2 * ppo.batch_size / ppo.kl_horizon:.3g}, and it must stay positive. Raise"
            f" kl_horizon above {0.2 * ppo.batch_size:g}; 10 or more batches are usual."
        )


def _check_schedule(config: Config) -> None:
    steps, critic_steps, warmup = config.steps, config.critic.warmup_steps, config.optim.warmup_steps
    updates = steps * config.ppo.epochs * config.ppo.minibatches
    if critic_steps > steps:
        raise ConfigError(
            f"critic.warmup_steps is {critic_steps} and steps {steps}: the critic alone would train in the whole run."
            " Lower critic.warmup_steps or raise steps."
        )
    if 0 < updates < warmup:  # a run of no steps only evaluates
        raise ConfigError(
            f"optim.warmup_steps is {warmup}, but the run has {updates} updates (steps {steps} x ppo.epochs"
            f" {config.ppo.epochs} x ppo.minibatches {config.ppo.minibatches}): the learning rate would never reach"
            " its peak. Lower warmup_steps or raise steps."
        )
    for step in config.track.profile_steps:
        if not 1 <= step <= steps:
            raise ConfigError(
                f"track.profile_steps names step {step}, but the run has steps 1 to {steps}. Name steps among them."
            )


def _check_checkpoints(config: Config) -> None:
    checkpoint, evaluated = config.checkpoint, config.eval.every
    if config.resume == "":
        raise ConfigError("resume is empty; give auto, the path of a checkpoint, or null to begin anew.")
    if checkpoint.keep_best == 0:
        return
    if checkpoint.every == 0:
        raise ConfigError(
            f"checkpoint.keep_best is {checkpoint.keep_best} and checkpoint.every 0: no checkpoint is written that"
            " could be the best. Set checkpoint.every above 0, or keep_best to 0."
        )
    if evaluated == 0 or checkpoint.every % evaluated:
        raise ConfigError(
            f"checkpoint.keep_best is {checkpoint.keep_best}, which compares held-out scores, but checkpoint.every is"
            f" {checkpoint.every} and eval.every {evaluated}: a checkpoint without an evaluation at its own step has no"
            f" score. Set checkpoint.every to a multiple of eval.every (both {checkpoint.every}, for example), or"
            " keep_best to 0."
        )
