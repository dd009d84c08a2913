"""Where scores come from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before a service is asked again: at first, and at most
# How a service is asked, which makes no difference to what it says: each setting with its least and largest value.
OF_URL = {"timeout": (0.001, 86400), "retries": (0, 1000), "request_size": (1, math.inf), "concurrency": (1, 1000)}


@dataclass(frozen=True)
class RewardConfig:
    """One source of reward. Exactly one of function, model, ensemble, pattern and url is set."""

    function: str | None = None
    """`module:function` or `file.py:function`, which may import modules beside it; called with prompts, responses and
    all columns of the data but those of these two names, or the ones among them that it names; returns one number
    (true and false are 1 and 0) for each response. A coroutine function is awaited; a parameter `completions` gets the
    responses."""
    model: str | None = None
    """An `AutoModelForSequenceClassification` with one label: hub name or directory. It reads chat by its own template,
    if it has one. Else with another tokenizer than the actor's it reads the text, chat prompts as the actor's template
    writes them, and its own EOS behind a response that ended."""
    ensemble: tuple[str, ...] = ()
    """Several such models, two or more; `combine` says what they say together."""
    combine: Literal["mean", "min"] = "mean"
    """`mean` of an ensemble, or its minimum: what pleases one member alone is no gain then."""
    pattern: str | None = None
    """A regular expression: 1 for a response in which it is found, else 0. `{column}` in it stands for that column of
    the data, taken literally; where the column is null or empty, the response gets 0. `\\{column}` is braces."""
    url: str | None = None
    """A service that is sent prompts, responses, whether they ended, columns and chats as JSON and answers with scores;
    `python -m fastppo.serve_reward` is one."""
    timeout: float = 60.0
    """Seconds from a request to the end of its answer."""
    retries: int = 4
    """How often a request that failed is tried again, after 0.5 seconds and then twice as long each time, up to 30; or
    after what a status 429 or 503 says in Retry-After, if that is longer."""
    request_size: int = 16
    """Responses in one request."""
    concurrency: int = 4
    """Requests of one rank at a time."""
    weight: float = 1.0
    """Factor of this source in the weighted sum of all sources."""
