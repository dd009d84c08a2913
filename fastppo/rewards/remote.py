"""An HTTP service as a reward source.

A request is a POST of `{"prompts": [...], "responses": [...], "ended": [...], "columns": {name: [...]}}`. The answer is
`{"scores": [...]}`, one finite number per response. `ended` is false for a response that was cut at its maximum length.
If prompts are chat, `"messages": [...]` has one entry per prompt: its messages, or null. With an environment,
`"conversations": [...]` has one entry per response: the messages of prompt, turns and observations. An error has a
status other than 200 and may have a message in `{"error": "..."}`. `fastppo.serve_reward` is such a service for a
reward model.
"""

from __future__ import annotations

import json
import logging
import re
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, NamedTuple, TypeVar

import requests
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, stop_any, stop_when_event_set
from tenacity.wait import wait_exponential

from fastppo.config import FIRST_WAIT, LONGEST_WAIT, RewardConfig
from fastppo.rewards.responses import Responses, RewardError, Source, checked, shown

log = logging.getLogger("fastppo")

T = TypeVar("T")

HOPELESS = range(400, 500)  # the request is wrong; repeating it cannot help
BUSY = (408, 425, 429)  # the exceptions: temporary states of the service
SAYS_WHEN = (429, 503)  # may have a Retry-After, in seconds
CERTIFICATE = re.compile(r"certificate verify failed: (.*?) \(")


def remote_source(config: RewardConfig, where: str = "rewards") -> Source:
    """A source that sends requests of `request_size` responses, `concurrency` at a time.

    A failed request is repeated up to `retries` times. where: the name of the source's setting, for errors. Raises
    RewardError for the first request that fails in every try, or for whose error repeating cannot help. After that no
    request is started, repeated or waited for.
    """

    def source(responses: Responses) -> list[float]:
        starts = range(0, len(responses.texts), config.request_size)
        asked = [_request(responses, start, config, where) for start in starts]
        with requests.Session() as session:
            session.mount("http", requests.adapters.HTTPAdapter(pool_maxsize=config.concurrency))
            return [number for scores in _Asking(session, config, where).all(asked) for number in scores]

    return source


class _Request(NamedTuple):
    first: int  # index of its first response among all responses of the batch
    texts: list[str]
    body: bytes


def _request(responses: Responses, start: int, config: RewardConfig, where: str) -> _Request:
    rows = slice(start, start + config.request_size)
    columns = {name: column[rows] for name, column in responses.columns.items()}
    said: dict[str, Any] = {
        "prompts": responses.prompts[rows],
        "responses": responses.texts[rows],
        "ended": responses.ended[rows],
        "columns": columns,
    }
    if responses.messages is not None and any(chat is not None for chat in responses.messages[rows]):
        said["messages"] = list(responses.messages[rows])
    if responses.conversations is not None:
        said["conversations"] = list(responses.conversations[rows])
    try:
        return _Request(start, responses.texts[rows], _json(said))
    except (TypeError, ValueError, RecursionError) as error:
        for name, column in columns.items():
            for value in column:
                if not _is_json(value):
                    raise RewardError(
                        f"{where}.url = {config.url} is sent JSON, which cannot say {shown(value)}"
                        f" ({type(value).__name__}) of the column {name}. Write that column as text, or leave it out of"
                        " the data."
                    ) from error
        for i, conversation in enumerate(said.get("conversations", ()), start=start):
            if not _is_json(conversation):
                raise RewardError(
                    f"{where}.url = {config.url} is sent JSON, which cannot say the conversation of response {i}"
                    f" ({error}). Let rollout.environment answer with messages of texts and numbers."
                ) from error
        raise


def _json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False).encode()


def _is_json(value: Any) -> bool:
    try:
        return bool(_json(value))
    except (TypeError, ValueError, RecursionError):
        return False


class _Asking:
    """The requests of one batch. After a failure the other threads are not waited for; they end by themselves."""

    def __init__(self, session: requests.Session, config: RewardConfig, where: str):
        self.session, self.config, self.where = session, config, where
        self.name = f"{where}.url = {config.url}"
        self.over = Event()  # set when one request has failed finally

    def all(self, asked: list[_Request]) -> list[list[float]]:
        """The scores of each request. Raises the first final failure immediately."""
        scores: dict[int, list[float]] = {}
        todo, done = deque(enumerate(asked)), SimpleQueue[tuple[int, list[float] | Exception]]()

        def work() -> None:
            while not self.over.is_set():
                try:
                    i, request = todo.popleft()
                except IndexError:  # no request is left
                    return
                try:
                    done.put((i, self._scores(request)))
                except Exception as error:
                    done.put((i, error))  # before `over` is set, so that this error is the first in the queue
                    self.over.set()

        for _ in range(min(self.config.concurrency, len(asked))):
            Thread(target=work, daemon=True).start()
        try:
            while len(scores) < len(asked):
                i, answer = done.get()
                if isinstance(answer, Exception):
                    raise answer
                scores[i] = answer
        finally:
            self.over.set()
        return [scores[i] for i in range(len(asked))]

    def _scores(self, request: _Request) -> list[float]:
        """The scores of one request, with retries. Raises the last error if all tries fail."""
        retrying = Retrying(
            retry=retry_if_exception(lambda error: isinstance(error, RewardError) and not isinstance(error, _Hopeless)),
            stop=stop_any(stop_after_attempt(self.config.retries + 1), stop_when_event_set(self.over)),
            wait=_pause,
            before_sleep=self._tell,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            return retrying(self._try, request)
        except RewardError as error:
            tries = retrying.statistics["attempt_number"]
            raise RewardError(f"{error}. Tried {tries} time{'s' * (tries > 1)}.") from error

    def _try(self, request: _Request) -> list[float]:
        return checked(self.name, self._answer(request.body), request.texts, request.first)

    def _tell(self, state: RetryCallState) -> None:
        assert state.outcome is not None
        left = self.config.retries + 1 - state.attempt_number
        log.warning("%s; trying again in %.1f s, %d left", state.outcome.exception(), state.upcoming_sleep, left)

    def _sleep(self, seconds: float) -> None:
        if self.over.wait(seconds):  # after this sleep tenacity would try again
            raise RewardError(f"{self.name}: another request has failed")

    def _answer(self, body: bytes) -> Any:
        """The service's answer to one try. Waits at most `timeout` seconds."""
        assert self.config.url is not None
        post = partial(
            self.session.post,
            self.config.url,
            data=body,
            headers={"Content-Type": "application/json"},
            timeout=self.config.timeout,
        )
        try:
            return _said(self.name, _within(self.config.timeout, post))
        except (TimeoutError, requests.RequestException) as error:
            raise RewardError(self._unreachable(error)) from error

    def _unreachable(self, error: Exception) -> str:
        if isinstance(error, TimeoutError | requests.Timeout):
            return f"{self.name} did not answer within {self.config.timeout:g} s ({self.where}.timeout)"
        if isinstance(error, requests.exceptions.SSLError):
            refused = CERTIFICATE.search(str(error))
            if refused is None:
                return f"{self.name} does not speak TLS ({error}), so see whether its address begins with http://"
            return (
                f"{self.name} has a certificate that is not accepted ({refused[1]}). Give the address that it was made"
                " for, or name a file with its authority's in the environment's REQUESTS_CA_BUNDLE"
            )
        if isinstance(error, requests.ConnectionError):
            kind = type(error).__name__
            return f"{self.name} cannot be reached or broke off ({kind}), so see whether the service runs there"
        return f"{self.name} could not be asked ({error})"


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What a call returns or raises; TimeoutError if it takes longer.

    The timeout of the package requests applies to each read: a service that sends a byte from time to time would never
    exceed it.
    """
    said: Future[T] = Future()

    def run() -> None:
        try:
            said.set_result(call())
        except Exception as error:
            said.set_exception(error)

    Thread(target=run, daemon=True).start()
    return said.result(seconds)


class _Hopeless(RewardError):
    """An error after which repeating the request cannot help."""


class _Busy(RewardError):
    """A temporary error, with the number of seconds after which to try again."""

    seconds = 0.0


def _pause(state: RetryCallState) -> float:
    """Seconds before the next try: doubled each time, or what the service asks for if that is longer."""
    assert state.outcome is not None
    error, seconds = state.outcome.exception(), wait_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT)(state)
    return max(seconds, error.seconds) if isinstance(error, _Busy) else seconds


def _said(name: str, answer: requests.Response) -> Any:
    """The `scores` of an answer. Raises RewardError if the status is not 200 or the JSON is not of this form."""
    if answer.request.method != "POST":
        raise _Hopeless(
            f"{name} redirects with status {answer.history[0].status_code} to {answer.url}, which turns the request"
            " into one without a body. Give that address instead"
        )
    try:
        said = answer.json()
    except (ValueError, RecursionError):  # also Python's limits: digits of an integer, depth of arrays
        said = None
    if answer.status_code != 200:
        detail = said["error"] if isinstance(said, dict) and "error" in said else _beginning(answer.text)
        raise _refused(answer, f"{name} answered with status {answer.status_code}: {detail}")
    if said is None:
        raise RewardError(f"{name} answered with something that is not JSON: {_beginning(answer.text)}")
    if not isinstance(said, dict) or not isinstance(said.get("scores"), list):
        raise RewardError(f'{name} must answer {{"scores": [...]}}, and answered {_beginning(answer.text)}')
    return said["scores"]


def _refused(answer: requests.Response, problem: str) -> RewardError:
    status, seconds = answer.status_code, answer.headers.get("Retry-After", "")
    if status in HOPELESS and status not in BUSY:
        return _Hopeless(problem)
    error = _Busy(problem)
    if status in SAYS_WHEN and seconds.isdecimal():
        error.seconds = min(float(seconds), LONGEST_WAIT)
    return error


def _beginning(text: str) -> str:
    return repr(" ".join(text.split())[:120])
