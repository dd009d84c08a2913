"""A service on the network as a source of reward.

It is sent `{"prompts": [...], "responses": [...], "ended": [...], "columns": {name: [...]}}` by POST and answers
`{"scores": [...]}`, one finite number for each response. `ended` is false for a response that was cut at its maximum
length. An error has another status than 200 and may say more in `{"error": "..."}`. `fastppo.serve_reward` serves a
reward model that way.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests

from fastppo.config import RewardConfig
from fastppo.feedback.responses import Responses, RewardError, Source, checked

log = logging.getLogger("fastppo")

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before the first retry and before any; each doubles the one before
HOPELESS = range(400, 500)  # the request itself is wrong, and would be again
BUSY = (408, 425, 429)  # among those, the ones that pass


def remote_source(config: RewardConfig, where: str = "rewards") -> Source:
    """Requests of `request_size` responses, `concurrency` at a time, each tried `retries` times more if it fails.

    where: the setting it belongs to, for errors. Raises RewardError for the first request that failed every time.
    """
    size = config.request_size

    def source(responses: Responses) -> list[float]:
        starts = range(0, len(responses.texts), size)
        with requests.Session() as session, ThreadPoolExecutor(config.concurrency) as pool:
            session.mount("http", requests.adapters.HTTPAdapter(pool_maxsize=config.concurrency))
            waiting = [pool.submit(_ask, session, where, config, _part(responses, i, size), i) for i in starts]
            try:
                return [number for request in waiting for number in request.result()]
            finally:
                for request in waiting:  # once one has failed, those not begun are not wanted
                    request.cancel()

    return source


def _part(responses: Responses, start: int, size: int) -> dict[str, Any]:
    rows = slice(start, start + size)
    return {
        "prompts": responses.prompts[rows],
        "responses": responses.texts[rows],
        "ended": responses.ended[rows],
        "columns": {name: column[rows] for name, column in responses.columns.items()},
    }


def _ask(session: requests.Session, where: str, config: RewardConfig, body: dict[str, Any], first: int) -> list[float]:
    """The scores of one request, after as many tries as it takes or is given."""
    assert config.url is not None
    name, wait = f"{where}.url = {config.url}", FIRST_WAIT
    for left in reversed(range(config.retries + 1)):
        try:
            answer = session.post(config.url, json=body, timeout=config.timeout)
            return checked(name, _scores(name, answer), body["responses"], first)
        except (requests.RequestException, RewardError) as error:
            problem = error if isinstance(error, RewardError) else RewardError(_unreachable(where, config, error))
            if left == 0 or isinstance(error, _Hopeless):
                tries = config.retries + 1 - left
                raise RewardError(f"{problem}. Tried {tries} time{'s' * (tries > 1)}.") from error
            log.warning("%s; trying again in %.1f s, %d left", problem, wait, left)
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT)
    raise AssertionError("unreachable")


class _Hopeless(RewardError):
    """An answer that trying again would not change."""


def _scores(name: str, answer: requests.Response) -> Any:
    """The `scores` of an answer. Raises RewardError for anything else than status 200 and the JSON agreed on."""
    try:
        said = answer.json()
    except requests.JSONDecodeError:
        said = None
    if answer.status_code != 200:
        kind = _Hopeless if answer.status_code in HOPELESS and answer.status_code not in BUSY else RewardError
        detail = said["error"] if isinstance(said, dict) and "error" in said else _beginning(answer.text)
        raise kind(f"{name} answered with status {answer.status_code}: {detail}")
    if said is None:
        raise RewardError(f"{name} answered with something that is not JSON: {_beginning(answer.text)}")
    if not isinstance(said, dict) or not isinstance(said.get("scores"), list):
        raise RewardError(f'{name} must answer {{"scores": [...]}}, and answered {_beginning(answer.text)}')
    return said["scores"]


def _beginning(text: str) -> str:
    return repr(" ".join(text.split())[:120])


def _unreachable(where: str, config: RewardConfig, error: requests.RequestException) -> str:
    name = f"{where}.url = {config.url}"
    if isinstance(error, requests.Timeout):
        return f"{name} did not answer within {config.timeout:g} s ({where}.timeout)"
    if isinstance(error, requests.ConnectionError):
        return f"{name} cannot be reached or broke off ({type(error).__name__}), so see whether the service runs there"
    return f"{name} could not be asked ({error})"
