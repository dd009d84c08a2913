"""The seconds of a plan's step, whatever kind of run it is."""

from __future__ import annotations

from fastppo.config import AnyConfig, OfflineConfig, OnlineConfig
from fastppo.errors import FastPPOError
from fastppo.planner.constants.values import NAMES, Constant, Constants
from fastppo.planner.plan import Plan
from fastppo.planner.time.offline import offline_step
from fastppo.planner.time.online import OnlineTimes
from fastppo.planner.time.phases import Lengths, Step
from fastppo.planner.time.work import Work


def lengths_of(
    config: AnyConfig, prompt: int | None = None, response: int | None = None, reward_seconds: float = 0.0
) -> Lengths:
    """Where they are not given, prompts and responses are as long as they may be, and all tokens of an example but one
    are of its response. Raises FastPPOError for what cannot be."""
    if isinstance(config, OnlineConfig):
        longest = config.data.first_tokens or config.data.max_prompt_tokens
        found = Lengths(prompt or longest, response or config.sampling.max_new_tokens, reward_seconds)
        most, setting = config.microbatch_tokens, config.names.microbatch
    elif isinstance(config, OfflineConfig):
        longest = config.data.max_tokens
        given = response or max(longest - (prompt or 1), 1)
        found = Lengths(prompt or max(longest - given, 1), given, reward_seconds)
        most, setting = config.microbatch_tokens // config.sequences, "microbatch_tokens"
    else:
        raise FastPPOError("--time knows the commands that train, and not generate.")
    if found.whole > most:
        raise FastPPOError(
            f"--prompt-tokens {found.prompt} and --response-tokens {found.response} are {found.whole} tokens, more than"
            f" a microbatch holds ({setting})."
        )
    return found


def predict(plan: Plan, constants: Constants, lengths: Lengths) -> Step:
    """Raises FastPPOError where a constant is missing, or the kind of run is not known."""
    if isinstance(plan.config, OfflineConfig):
        return offline_step(plan, constants, lengths)
    return OnlineTimes(plan, constants, lengths).step()


def kernels_of(plan: Plan, lengths: Lengths) -> Work:
    """The kernels of a step, on a machine of which nothing is known yet."""
    unknown = {name: Constant(1.0, "unknown") for name in NAMES}
    return predict(plan, Constants("", plan.machine.gpu is None, unknown), lengths).work
