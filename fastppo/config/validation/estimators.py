"""Rules about the estimator of advantages, the critic that it needs or not, the policy loss, and what a step draws."""

from __future__ import annotations

import difflib

from fastppo.config.commands.ppo import Config
from fastppo.config.learning import ESTIMATOR_RULES, PPOConfig
from fastppo.config.models import CriticConfig
from fastppo.errors import ConfigError

WITHOUT_CRITIC = ", ".join(name for name, rule in ESTIMATOR_RULES.items() if not rule.critic)
BUILT_IN_LOSSES = ("clip", "gspo", "cispo")  # others are the user's, and may read any setting


def check_names(ppo: PPOConfig) -> None:
    """Refuse an estimator or a loss that is neither one of fastppo's nor written as a function of the user's."""
    tables = {"estimator": tuple(ESTIMATOR_RULES), "loss": BUILT_IN_LOSSES}
    for setting, other in (("estimator", "loss"), ("loss", "estimator")):
        name, known = getattr(ppo, setting), tables[setting]
        if name in known or ":" in name:
            continue
        near = difflib.get_close_matches(name.lower(), known, n=1)
        if name.lower() in tables[other]:
            hint = f"; {name.lower()} is a ppo.{other}."
        else:
            hint = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(
            f"ppo.{setting} is {name}, and there is no such {setting}{hint} Use one of {', '.join(known)}, or your own"
            " function as module:function or file.py:function."
        )


def check_estimator(config: Config) -> None:
    """Refuse an estimator without what it compares responses by, and settings that would have no effect with it."""
    ppo, samples = config.ppo, config.sampling.samples_per_prompt
    name, rule = ppo.estimator, ppo.rule
    if name not in ESTIMATOR_RULES:
        return
    if rule.critic and ppo.lam != "adaptive" and ppo.lam_alpha != PPOConfig().lam_alpha:
        raise ConfigError(
            f"ppo.lam_alpha is {ppo.lam_alpha} and ppo.lam {ppo.lam}, which does not depend on the length of a response:"
            " it would have no effect. Set ppo.lam to adaptive, or leave out ppo.lam_alpha."
        )
    if rule.group and samples < 2:
        raise ConfigError(
            f"ppo.estimator is {name} and sampling.samples_per_prompt {samples}: {name} compares the responses to one"
            " prompt with each other, and one response has nothing to be compared with. Set samples_per_prompt to 2 or"
            " more, usually 8 or 16, or ppo.estimator to gae or reinforce++."
        )
    if rule.outcome and ppo.gamma != 1.0:
        raise ConfigError(
            f"ppo.gamma is {ppo.gamma} and ppo.estimator {name}, which sees the sum of a response's rewards, so that"
            " nothing would be discounted. Set gamma to 1, or ppo.estimator to gae or reinforce++."
        )
    lambdas = {
        "lam": ("adaptive", ppo.lam == "adaptive"),
        "lam_alpha": (ppo.lam_alpha, ppo.lam_alpha != PPOConfig().lam_alpha),
        "lam_critic": (ppo.lam_critic, ppo.lam_critic is not None),
    }
    for setting, (value, is_set) in lambdas.items():
        if is_set and not rule.critic:
            raise ConfigError(
                f"ppo.{setting} is {value} and ppo.estimator {name}, which has no lambda: it would have no effect. Leave"
                f" out ppo.{setting}, or set ppo.estimator to gae."
            )


def check_until_informative(config: Config) -> None:
    """Refuse dynamic sampling where there are no groups."""
    most = config.sampling.until_informative
    if most is None:
        return
    if config.sampling.samples_per_prompt == 1:
        raise ConfigError(
            f"sampling.until_informative is {most} and sampling.samples_per_prompt 1: a step draws on until the responses"
            " to each prompt differ in score, and one response differs from none. Set samples_per_prompt to 2 or more, or"
            " leave out until_informative."
        )


def check_partial(config: Config) -> None:
    """Refuse partial rollouts where they cannot be, or would have no effect."""
    partial, engine, longest = config.rollout.partial_tokens, config.rollout.engine, config.sampling.max_new_tokens
    if partial is None:
        return
    if engine != "inprocess":
        raise ConfigError(
            f"rollout.partial_tokens is {partial} and rollout.engine {engine}: only the engine in process goes on with a"
            " response where it was. Set rollout.engine to inprocess, or leave out rollout.partial_tokens."
        )
    if partial >= longest:
        raise ConfigError(
            f"rollout.partial_tokens is {partial} and sampling.max_new_tokens {longest}: each response would be complete"
            " at once, so that it would have no effect. Set partial_tokens below max_new_tokens, or leave it out."
        )


def check_steps_ahead(config: Config) -> None:
    """Refuse to sample ahead where nothing is gained by it, or what is sampled depends on scores."""
    ahead, most = config.ppo.steps_ahead, config.sampling.until_informative
    if ahead == 0:
        return
    if most is not None:
        raise ConfigError(
            f"ppo.steps_ahead is {ahead} and sampling.until_informative {most}: whether a step draws on depends on the"
            " scores of what it has drawn, which a step ahead are not there yet. Set steps_ahead to 0, or leave out"
            " until_informative."
        )
    sources = (*config.rewards, *config.judge)
    if all(source.model is not None or source.ensemble for source in sources):
        raise ConfigError(
            f"ppo.steps_ahead is {ahead}, and neither rewards nor {config.judge_setting} has a function, pattern, math or"
            " url, which score beside the learner. Models of this run score where it computes, so responses would be a"
            " step old for nothing. Set steps_ahead to 0, or let a service score with the model (fastppo serve-reward)."
        )


def check_critic_kind(critic: CriticConfig, ppo: PPOConfig) -> None:
    """Refuse a critic that nothing reads, an estimator without the critic that it reads, and settings of no critic."""
    name = ppo.estimator
    if name in ESTIMATOR_RULES and not ppo.rule.critic and critic.kind not in ("auto", "none"):
        raise ConfigError(
            f"critic.kind is {critic.kind} and ppo.estimator {name}, which reads no values: the critic would be trained"
            " for nothing. Set critic.kind to none, or ppo.estimator to gae."
        )
    if critic.kind == "none" and name in ESTIMATOR_RULES and ppo.rule.critic:
        raise ConfigError(
            f"critic.kind is none and ppo.estimator {name}, which is computed from a critic's values. Set critic.kind to"
            f" separate or shared, or ppo.estimator to one without a critic: {WITHOUT_CRITIC}."
        )
    if critic.kind == "none" or (critic.kind == "auto" and not ppo.rule.critic):
        given = {
            "model": (critic.model, None),
            "gguf_file": (critic.gguf_file, None),
            "train": (critic.train, "all"),
            "lora.rank": (critic.lora.rank, 0),
            "warmup_steps": (critic.warmup_steps, 0),
        }
        why = "critic.kind is none" if critic.kind == "none" else f"ppo.estimator {name} needs no critic"
        for field, (value, default) in given.items():
            if value != default:
                raise ConfigError(
                    f"critic.{field} is {value} but {why}: it would have no effect. Leave out critic.{field}, or set"
                    " ppo.estimator to gae and critic.kind to separate or shared."
                )


def check_loss(ppo: PPOConfig) -> None:
    """Refuse settings that have no effect with the loss."""
    if ppo.loss not in BUILT_IN_LOSSES:
        return
    others = {
        "dual_clip": ("clip", "gspo"),
        "clip_low": ("clip", "cispo"),
        "clip_high": ("clip", "cispo"),
        "gspo_clip_low": ("gspo",),
        "gspo_clip_high": ("gspo",),
    }
    default = PPOConfig()
    for name, losses in others.items():
        value = getattr(ppo, name)
        if value == getattr(default, name) or ppo.loss in losses:
            continue
        instead = f"; the clip of gspo is ppo.gspo_{name}" if name in ("clip_low", "clip_high") else ""
        raise ConfigError(
            f"ppo.{name} is {value} and ppo.loss {ppo.loss}: it would have no effect{instead}. Leave out ppo.{name}, or"
            f" set ppo.loss to {' or '.join(losses)}."
        )
    if ppo.nll_above != default.nll_above and ppo.nll_coef == 0:
        raise ConfigError(
            f"ppo.nll_above is {ppo.nll_above} and ppo.nll_coef 0: it would have no effect. Set ppo.nll_coef above 0, or"
            " leave out ppo.nll_above."
        )
