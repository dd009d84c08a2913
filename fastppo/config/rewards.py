"""Settings of the sources of reward."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before a failed request is retried: the first time, and at most
# Settings of a service that do not affect its scores, each with its least and largest value.
SERVICE_SETTINGS = {
    "timeout": (0.001, 86400),
    "retries": (0, 1000),
    "request_size": (1, inf),
    "concurrency": (1, 1000),
}
TIME_LIMIT = (0.1, 3600)  # seconds, the least and the largest value of `time_limit`
MOST_VERIFIERS = 4  # processes of a rank that compare answers for `math`


@dataclass(frozen=True)
class RewardConfig:
    """One source of reward. Exactly one of function, model, ensemble, pattern, math and url is set."""

    function: str | None = None
    """`module:function` or `file.py:function`; a file may import modules from its folder. The function is called with
    `prompts`, `responses` (or `completions`) and the other columns of the data as keyword arguments, only with those
    that it has as parameters unless it takes `**kwargs`. It returns one number per response; true and false count as 1
    and 0. A coroutine function is awaited."""
    model: str | None = None
    """Reward model, an `AutoModelForSequenceClassification` with one label: hub name or directory. If it has a chat
    template, that is applied to chats. Otherwise, if its tokenizer differs from the actor's, it gets the text, with chat
    prompts as written by the actor's template, and its EOS after a response that is not truncated."""
    ensemble: tuple[str, ...] = ()
    """Two or more reward models; `combine` determines the common score."""
    combine: Literal["mean", "min"] = "mean"
    """Score of an ensemble: the `mean` of its models, or their minimum (`min`), which does not rise if only one model's
    score rises."""
    pattern: str | None = None
    """Regular expression: a response that contains a match gets 1, otherwise 0. `{column}` stands for the literal text
    of that column of the data; if it is null or empty, the response gets 0. `\\{column}` stands for literal braces."""
    math: str | None = None
    """Column of the data with the reference answers: a response whose final answer equals its reference gets 1,
    otherwise 0. The final answer is in the last `\\boxed{...}`, else behind the last `####` or "the answer is", else
    the last expression. A reference is a number, an expression in LaTeX, or a solution with its answer behind `####` or
    in `\\boxed{...}`. Needs `pip install 'fastppo[math]'`."""
    time_limit: float = 5.0
    """Seconds of processor time in which `math` compares one answer; a response for which that is not enough gets 0."""
    url: str | None = None
    """URL of a service. It receives prompts, responses, whether they are complete, columns and chats as JSON, and
    returns scores; `python -m fastppo.serve_reward` is such a service."""
    timeout: float = 60.0
    """Seconds from the start of a request to the end of its response."""
    retries: int = 4
    """Number of retries of a failed request. The first pause is 0.5 seconds and each further one is twice as long, up to
    30; a longer Retry-After of a status 429 or 503 takes precedence."""
    request_size: int = 16
    """Number of responses per request."""
    concurrency: int = 4
    """Number of simultaneous requests per rank."""
    weight: float = 1.0
    """Factor of this source in the weighted sum of all sources."""
