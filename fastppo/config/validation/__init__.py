"""All rules about settings that can be checked before a model is loaded.

`fastppo.config.command_line.parse` calls the check of its command: `validate` for PPO, those in `offline` for SFT and
reward modelling. Each message names the settings, their values, the reason and the way out.
"""

from __future__ import annotations

import math

from fastppo.config.commands.ppo import Config
from fastppo.config.validation.data import check_data, check_rollout, check_sampling
from fastppo.config.validation.estimators import (
    check_critic_kind,
    check_estimator,
    check_loss,
    check_names,
    check_partial,
    check_steps_ahead,
    check_until_informative,
)
from fastppo.config.validation.health import check_health, check_kl_alarms
from fastppo.config.validation.learning import (
    check_batch,
    check_importance,
    check_kl,
    check_parallel,
    check_ptx,
    check_schedule,
    check_zero,
)
from fastppo.config.validation.models import check_critic, check_models
from fastppo.config.validation.ranges import ONLINE_RANGES, Ranges, check_betas, check_ranges, check_train
from fastppo.config.validation.rewards import check_rewards, check_shaping, check_waiting
from fastppo.config.validation.run import check_checkpoints, check_tracking

RANGES: Ranges = (
    (
        "0 or more",
        lambda x: 0 <= x < math.inf,
        "critic.lr critic.lora.rank critic.warmup_steps ptx.coef ppo.entropy_coef ppo.value_coef ppo.kl_coef"
        " ppo.nll_coef ppo.truncation_penalty ppo.length_penalty",
    ),
    (
        "1 or more",
        lambda x: x >= 1,
        "ppo.length_limit ppo.batch_size ppo.epochs ppo.minibatches ppo.microbatch_tokens ptx.batch_size ptx.limit"
        " rollout.partial_tokens",
    ),
    ("2 or more", lambda x: x >= 2, "ptx.max_tokens sampling.until_informative"),
    (
        "greater than 0",
        lambda x: 0 < x < math.inf,
        "ppo.clip_high ppo.gspo_clip_high ppo.value_clip ppo.kl_target ppo.kl_horizon ppo.score_clip ppo.lam_alpha"
        " critic.lora.alpha",
    ),
    ("greater than 1", lambda x: 1 < x < math.inf, "ppo.dual_clip ppo.importance_high"),
    ("a number", math.isfinite, "ppo.nll_above"),
    ("between 0 and 1", lambda x: 0 <= x <= 1, "ppo.gamma ppo.lam ppo.lam_critic"),
    ("greater than 0 and less than 1", lambda x: 0 < x < 1, "ppo.clip_low ppo.gspo_clip_low ppo.importance_low"),
)


def validate(config: Config, ranks: int = 1) -> None:
    """Raise `ConfigError` for the first rule that the settings violate. ranks: the number of processes of the run."""
    check_ranges(config, (*ONLINE_RANGES, *RANGES))
    check_betas(config.optim)
    check_train("actor.train", config.actor.train)
    check_train("critic.train", config.critic.train)
    check_models(config)
    check_names(config.ppo)
    check_critic_kind(config.critic, config.ppo)
    check_critic(config.critic)
    check_rewards(config)
    check_shaping(config)
    check_data(config)
    check_sampling(config)
    check_rollout(config, ranks)
    groups = check_parallel(config, ranks)
    check_batch(config, groups)
    check_ptx(config, groups)
    check_zero(config)
    check_kl(config)
    check_importance(config)
    check_estimator(config)
    check_until_informative(config)
    check_partial(config)
    check_steps_ahead(config)
    check_loss(config.ppo)
    check_schedule(config)
    check_checkpoints(config)
    check_tracking(config)
    check_health(config)
    check_kl_alarms(config)
    check_waiting(config, ranks)
