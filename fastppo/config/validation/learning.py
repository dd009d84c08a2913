"""Rules about the settings of the algorithm, the optimizer and ZeRO."""

from __future__ import annotations

from fastppo.config import deepspeed_config
from fastppo.config.commands.ppo import AnyConfig, Config, TrainingConfig
from fastppo.errors import ConfigError

SEQUENCE_RANKS = (1, 2, 4, 8)  # of `parallel.sequence`


def other_ranks(divided: int, groups: int, config: TrainingConfig) -> str:
    """The way out where so many groups of ranks (`check_parallel`) do not divide a number; a run may be resumed on
    another number of them."""
    fewer = config.parallel.sequence * max(n for n in range(1, groups) if divided % n == 0)
    return f"start {fewer} rank(s) (--num_accelerators {fewer}), also where a run is resumed"


def check_parallel(config: TrainingConfig, ranks: int) -> int:
    """Return among how many groups of ranks an update is divided. Raise `ConfigError` if they are not of one size."""
    together = config.parallel.sequence
    if ranks % together:
        fewer = max(size for size in SEQUENCE_RANKS if ranks % size == 0 and size < together)
        raise ConfigError(
            f"parallel.sequence is {together} and there {'is 1 rank' if ranks == 1 else f'are {ranks} ranks'}: each"
            f" group of {together} ranks reads sequences together, and {ranks} is not a multiple of {together}. Set"
            f" parallel.sequence to {fewer}, or start {ranks + together - ranks % together} ranks."
        )
    return ranks // together


def among(config: TrainingConfig, groups: int) -> str:
    """Who shares the work of an update, for messages: ranks, or groups of them."""
    together = config.parallel.sequence
    return f"{groups} ranks" if together == 1 else f"{groups} groups of {together} ranks (parallel.sequence)"


def check_batch(config: Config, groups: int) -> None:
    """groups: as `check_parallel` returns it."""
    size, samples, minibatches = config.ppo.batch_size, config.sampling.samples_per_prompt, config.ppo.minibatches
    for name, parts in (("sampling.samples_per_prompt", samples), ("ppo.minibatches", minibatches)):
        if size % parts:
            near = " or ".join(str(n) for n in (size - size % parts, size - size % parts + parts) if n)
            reason = "each prompt has as many responses" if parts is samples else "all updates of an epoch are equal"
            raise ConfigError(
                f"ppo.batch_size is {size} and {name} {parts}: {reason}, and {size} is not a multiple of {parts}. Set"
                f" batch_size to {near}, or choose another {name.split('.')[1]}."
            )
    if size // minibatches % groups:
        raise ConfigError(
            f"ppo.batch_size is {size} and ppo.minibatches {minibatches}: a minibatch of {size // minibatches}"
            f" responses cannot be divided equally among {among(config, groups)}. Set batch_size to a multiple of"
            f" {groups * minibatches}, or use fewer minibatches, or"
            f" {other_ranks(size // minibatches, groups, config)}."
        )


def check_ptx(config: Config, groups: int) -> None:
    """groups: as `check_parallel` returns it."""
    ptx, budget = config.ptx, config.ppo.microbatch_tokens
    if ptx.coef == 0:
        if ptx.path:
            raise ConfigError(
                f"ptx.path is {ptx.path} but ptx.coef is 0, so that its text would have no effect. Set ptx.coef above 0,"
                " or leave out ptx.path."
            )
        return
    if not ptx.path:
        raise ConfigError(
            f"ptx.coef is {ptx.coef} but ptx.path is not set: give a dataset on the hub, a directory or a file with"
            " text, or set ptx.coef to 0."
        )
    if ptx.batch_size % groups:
        raise ConfigError(
            f"ptx.batch_size is {ptx.batch_size} and there are {among(config, groups)}, among which the texts are"
            f" divided equally. Set it to a multiple of {groups}, or {other_ranks(ptx.batch_size, groups, config)}."
        )
    if ptx.max_tokens > budget:
        raise ConfigError(
            f"ppo.microbatch_tokens is {budget}, but one text can have {ptx.max_tokens} tokens (ptx.max_tokens) and"
            " must fit into one microbatch. Raise ppo.microbatch_tokens, or lower ptx.max_tokens."
        )


def check_zero(config: AnyConfig) -> None:
    zero = config.zero
    if zero.stage == 0 and config.optim.dtype == "bf16":
        raise ConfigError(
            "zero.stage is 0 and optim.dtype bf16: at stage 0 DeepSpeed would accumulate gradients in bf16, which loses"
            " small ones by rounding. Set zero.stage to 1 (on one rank it costs nothing), or optim.dtype to fp32."
        )
    optimizer = "zero.offload" if zero.offload_optimizer is None else "zero.offload_optimizer"
    if zero.stage == 0 and zero.optimizer_on != "none":
        raise ConfigError(
            f"{optimizer} is {zero.optimizer_on} and zero.stage 0: DeepSpeed offloads the optimizer only at stage 1 and"
            f" higher. Set zero.stage to 1 or more, or {optimizer} to none."
        )
    if zero.stage < 3:
        if zero.optimizer_on == "nvme":
            raise ConfigError(
                f"{optimizer} is nvme and zero.stage {zero.stage}: DeepSpeed reads and writes NVMe only at stage 3."
                f" Set zero.stage to 3, or {optimizer} to cpu."
            )
        for name in ("offload_parameters", "offload_frozen"):
            if (place := getattr(zero, name)) not in (None, "none"):
                raise ConfigError(
                    f"zero.{name} is {place} and zero.stage {zero.stage}: parameters are partitioned over the ranks and"
                    f" fetched layer by layer only at stage 3. Set zero.stage to 3, or leave out zero.{name}."
                )
    if "nvme" in (zero.optimizer_on, zero.parameters_on, zero.frozen_on) and not zero.nvme_path:
        raise ConfigError(
            "zero.offload, zero.offload_optimizer, zero.offload_parameters or zero.offload_frozen is nvme, but"
            " zero.nvme_path is not set. Set it to a folder on a local NVMe drive, or offload to cpu."
        )
    deepspeed_config.check(config)


def check_kl(config: Config) -> None:
    ppo = config.ppo
    if ppo.kl_in == "loss" and ppo.kl_kind == "k1":
        raise ConfigError(
            "ppo.kl_kind is k1 and ppo.kl_in is loss: the gradient of k1 as a term of the loss is zero in expectation,"
            " so that it adds noise and no penalty. Set kl_kind to exact, k2 or k3, or kl_in to reward."
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
            f" coefficient by {1 - 0.2 * ppo.batch_size / ppo.kl_horizon:.3g}, but it must stay positive. Raise"
            f" kl_horizon above {0.2 * ppo.batch_size:g}; 10 or more batches are usual."
        )


def check_importance(config: Config) -> None:
    """Refuse a bound that the weights do not have."""
    ppo, kind = config.ppo, config.importance.kind
    has = {"none": (), "token": ("importance_high",)}.get(kind, ("importance_low", "importance_high"))
    for name in ("importance_low", "importance_high"):
        if (value := getattr(ppo, name)) is None or name in has:
            continue
        owners = "sequence or icepop" if name == "importance_low" else "token, sequence or icepop"
        auto = ""
        if ppo.importance == "auto":
            auto = f", which is {kind} " + (f"with {', '.join(config.other_sampler)}" if has else "with these settings")
        raise ConfigError(
            f"ppo.{name} is {value} and ppo.importance {ppo.importance}{auto}: it would have no effect. Set"
            f" ppo.importance to {owners}, or leave out ppo.{name}."
        )


def check_schedule(config: Config) -> None:
    steps, critic_steps, warmup = config.steps, config.critic_steps, config.optim.warmup_steps
    # updates of the actor; 0 in a run that only evaluates
    updates = (steps - critic_steps) * config.ppo.epochs * config.ppo.minibatches
    if 0 < steps <= critic_steps:
        raise ConfigError(
            f"critic.warmup_steps is {critic_steps} and steps {steps}: the actor would not be trained in the whole run."
            " Lower critic.warmup_steps or raise steps."
        )
    if 0 < updates < warmup:
        raise ConfigError(
            f"optim.warmup_steps is {warmup}, but the actor has {updates} updates ((steps {steps} - critic.warmup_steps"
            f" {critic_steps}) x ppo.epochs {config.ppo.epochs} x ppo.minibatches {config.ppo.minibatches}): its"
            " learning rate would never reach its peak. Lower optim.warmup_steps or raise steps."
        )
    for step in config.track.profile_steps:
        if not 1 <= step <= steps:
            raise ConfigError(
                f"track.profile_steps contains step {step}, but the run has steps 1 to {steps}. Choose steps among them."
            )
