"""Serve a reward model over HTTP: `python -m fastppo.serve_reward --model DIR`, for `rewards.url`.

POST / accepts prompts and responses as `fastppo.rewards.protocol` defines them. It answers with scores or with an
error: status 400 if the request is wrong, 503 while the model loads, 500 if the model fails. GET / returns the model's
name, `/health` whether it is ready, `/openapi.json` the schema. Requests that arrive while a forward pass runs share
the next one.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import torch
from jsonargparse import auto_cli
from transformers import PreTrainedTokenizerBase

from fastppo import __version__
from fastppo.config import LONGEST_WAIT, Dtype, OptimConfig, ZeroConfig, settled_dtype
from fastppo.data import NO_ARGUMENTS, Packed, check_arguments, end_to_end
from fastppo.distributed import Frozen, World
from fastppo.errors import FastPPOError, exit_with_message
from fastppo.models import DTYPES, RewardModel, load_reward
from fastppo.monitor import error_summary
from fastppo.rewards import (
    Asked,
    BadChat,
    ErrorAnswer,
    Health,
    ModelSource,
    RewardError,
    ScoreAnswer,
    ScoreRequest,
    TooLong,
    read_request,
)

MISSING: str | None = None  # the package of the extra `serve` that is not installed
try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ModuleNotFoundError as error:
    MISSING = error.name

log = logging.getLogger("fastppo")

LARGEST = 64 << 20  # bytes of a request
KEEP_ALIVE = 2 * int(LONGEST_WAIT)  # seconds: a client that pauses between two tries can reuse its connection
LAST_ANSWERS = 20  # seconds after SIGTERM in which requests are still answered
LOADING = 10  # seconds after which a client should try again


class _Waiting(NamedTuple):
    packed: Packed
    responses: list[str]
    answer: Future[list[float]]


class Scorer:
    """Scores requests with one model, in the order of arrival. `run` loads the model and is called in its own thread.

    Requests that wait while a forward pass runs share the next one, up to the model's token budget. A request that
    cannot be scored does not affect the others.
    """

    def __init__(self, name: str, load: Callable[[], ModelSource], loaded: Callable[[], None] = lambda: None):
        """name: the model's name, for messages; loaded: called when the model is ready."""
        self.name, self._load, self._loaded = name, load, loaded
        self.source: ModelSource | None = None  # None until the model is loaded
        self.requests = self.responses = self.batches = self.failed = 0
        self._arrived = SimpleQueue[tuple[Asked, Future[list[float]]] | None]()
        self._waiting = deque[_Waiting]()

    def ask(self, asked: Asked) -> Future[list[float]]:
        """A future of the scores, or of the error. If it is cancelled before its forward pass, it is not computed."""
        answer = Future[list[float]]()
        self._arrived.put((asked, answer))
        return answer

    def health(self) -> Health:
        return Health(
            ready=self.source is not None,
            model=self.name,
            waiting=self._arrived.qsize() + len(self._waiting),
            requests=self.requests,
            responses=self.responses,
            batches=self.batches,
            failed=self.failed,
        )

    def run(self) -> None:
        """Load the model, then score requests until `stop`. Raises the errors of loading."""
        self.source = self._load()
        self._loaded()
        while self._tokenise():
            if group := self._group(self.source.budget):
                self._score(group)

    def stop(self) -> None:
        self._arrived.put(None)

    def _tokenise(self) -> bool:
        """Wait until there is a request, then tokenise all that have arrived. Returns False after `stop`."""
        assert self.source is not None
        while not self._waiting or not self._arrived.empty():
            arrived = self._arrived.get()
            if arrived is None:
                return False
            asked, answer = arrived
            try:
                packed = self.source.tokenised(*asked[:4], conversations=asked.conversations)
                self.source.check(packed)
            except Exception as error:
                if answer.set_running_or_notify_cancel():
                    self._fail(answer, error)
            else:
                self._waiting.append(_Waiting(packed, asked.responses, answer))
        return True

    def _group(self, budget: int) -> list[_Waiting]:
        """The first waiting requests that fit into one forward pass together, at least one; skips cancelled ones."""
        group: list[_Waiting] = []
        while self._waiting and (not group or len(self._waiting[0].packed.tokens) <= budget):
            first = self._waiting.popleft()
            if first.answer.set_running_or_notify_cancel():
                group.append(first)
                budget -= len(first.packed.tokens)
        return group

    def _score(self, group: list[_Waiting]) -> None:
        assert self.source is not None
        texts = [text for one in group for text in one.responses]
        try:
            scores = self.source.scores(end_to_end([one.packed for one in group]), texts)
        except Exception as error:
            if len(group) == 1:
                self._fail(group[0].answer, error)
                return
            log.warning("%d requests failed together (%s), so each is scored alone", len(group), error_summary(error))
        else:
            self.batches, self.requests = self.batches + 1, self.requests + len(group)
            self.responses += len(texts)
            rest = iter(scores)
            for one in group:
                one.answer.set_result([next(rest) for _ in one.responses])
            return
        for one in group:  # outside the except block: the exception keeps the failed pass's tensors in memory
            self._score([one])

    def _fail(self, answer: Future[list[float]], error: Exception) -> None:
        self.failed += 1
        answer.set_exception(error)


def make_app(scorer: Scorer) -> FastAPI:
    """The routes of the service."""
    app = FastAPI(title="fastppo reward model", version=__version__, description=f"The reward model {scorer.name}.")
    errors: dict[int | str, dict[str, Any]] = {
        400: {"model": ErrorAnswer, "description": "The request is wrong; do not repeat it."},
        500: {"model": ErrorAnswer, "description": "The model failed."},
        503: {"model": ErrorAnswer, "description": "The model is still loading; try again after Retry-After seconds."},
    }
    body = {"required": True, "content": {"application/json": {"schema": ScoreRequest.model_json_schema()}}}

    # The body is read here and not by FastAPI, to check its size first, and to accept it without a Content-Type.
    @app.post("/", response_model=ScoreAnswer, responses=errors, openapi_extra={"requestBody": body})
    async def scores(request: Request) -> JSONResponse:
        """One score per response."""
        said = request.headers.get("transfer-encoding") or request.headers.get("content-length") or "0"
        if not (said.isdecimal() and len(said) < 20 and 0 < int(said) <= LARGEST):
            problem = f"a request has a body of 1 to {LARGEST} bytes and says so; this one says {said[:20]!r}"
            return _problem(400, problem, {"Connection": "close"})  # the body was not read
        try:
            asked = read_request(await request.body())
        except ClientDisconnect:
            return _problem(499, "the client has gone")
        except ValueError as error:
            return _problem(400, str(error))
        if scorer.source is None:
            return _problem(503, f"{scorer.name} is still being loaded", {"Retry-After": str(LOADING)})
        return await _answer(scorer, asked, request)

    @app.get("/")
    async def model() -> dict[str, str]:
        """The name of the model."""
        return {"model": scorer.name}

    @app.get("/health", response_model=Health, responses={503: {"model": Health, "description": "It is not ready."}})
    async def health() -> JSONResponse:
        """Whether the model is ready, and how many requests it has scored."""
        now = scorer.health()
        return JSONResponse(now.model_dump(), 200 if now.ready else 503)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        ways = "POST / scores, GET /health tells of the model, and GET /docs has the rest"
        problem = f"{request.method} {request.url.path}: {error.detail}; {ways}"
        return _problem(error.status_code, problem, error.headers)

    return app


async def _answer(scorer: Scorer, asked: Asked, request: Request) -> JSONResponse:
    """The answer to a request: scores or an error. Cancels the request if its client disconnects."""
    if not asked.responses:
        return JSONResponse({"scores": []})
    answer = asyncio.wrap_future(scorer.ask(asked))
    gone: asyncio.Future[Any] = asyncio.ensure_future(request.receive())  # the next message is the disconnect
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            return _problem(499, "the client has gone")
        return JSONResponse({"scores": answer.result()})
    except (TooLong, BadChat) as error:
        return _problem(400, str(error))
    except RewardError as error:  # a NaN, which a second try might not give
        log.error("a request failed: %s", error)
        return _problem(500, str(error))
    except Exception as error:
        log.exception("a request failed")
        return _problem(500, f"{type(error).__name__}: {error}")
    finally:
        answer.cancel()
        gone.cancel()


def _problem(status: int, error: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": error}, status, headers)


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8100,
    dtype: Dtype = "auto",
    microbatch_tokens: int = 8192,
    template: dict[str, Any] | None = None,
) -> None:
    """Serve a reward model over HTTP.

    Args:
        model: An `AutoModelForSequenceClassification` with one label: hub name or directory.
        host: Address to listen on. Use 0.0.0.0 for requests from other machines; there is no password, so anyone who
            can reach the port can send requests.
        port: 0 to 65535; with 0 the system chooses a free port, which is printed.
        dtype: Data type of weights and activations; `auto`: bf16 where this machine computes in it, else fp32.
        microbatch_tokens: Maximum number of tokens in one forward pass.
        template: Arguments for the model's chat template, as in '{"enable_thinking": false}'.
    """
    if MISSING is not None:
        raise FastPPOError(
            f"{MISSING} is not installed, which serving a reward model needs: run `pip install 'fastppo[serve]'`, or"
            " `pip install fastapi uvicorn`."
        )
    if not 0 <= port <= 65535:
        raise FastPPOError(f"--port is {port}; it must be 0 to 65535.")
    if microbatch_tokens < 1:
        raise FastPPOError(f"--microbatch_tokens is {microbatch_tokens}; it must be 1 or more.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    computed = DTYPES[settled_dtype() if dtype == "auto" else dtype]

    def load() -> ModelSource:
        loaded, tokenizer = load_reward(model, computed, device, setting="--model")
        check_arguments("--template", template or {}, tokenizer)
        return alone(loaded, tokenizer, microbatch_tokens, device, template or {})

    with _listening(host, port) as listening:
        name, bound = f"[{host}]" if ":" in host else host, listening.getsockname()[1]
        run(Scorer(model, load, lambda: print(f"{model} answers on http://{name}:{bound}", flush=True)), listening)


def run(scorer: Scorer, listening: socket.socket) -> None:
    """Load the model and answer requests until SIGTERM, Ctrl-C or `scorer.stop`. Raises the errors of loading."""
    quiet: dict[str, Any] = {"log_config": None, "log_level": logging.WARNING, "access_log": False}
    times: dict[str, Any] = {"timeout_keep_alive": KEEP_ALIVE, "timeout_graceful_shutdown": LAST_ANSWERS}
    config = uvicorn.Config(make_app(scorer), http="h11", ws="none", lifespan="off", **quiet, **times)
    server = uvicorn.Server(config)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            scorer.run()
        except BaseException as error:
            failed.append(error)
        finally:
            server.should_exit = True

    Thread(target=work, daemon=True).start()
    server.run(sockets=[listening])
    if failed:
        raise failed[0]


def _listening(host: str, port: int) -> socket.socket:
    """The listening socket. Opened before the model loads, so that an address in use is reported at once."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen()
    except (OSError, UnicodeError) as error:
        listening.close()
        problem = f"--host {host} and --port {port} cannot be listened on ({error_summary(error)}); give others."
        raise FastPPOError(problem) from error
    return listening


def alone(
    model: RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    budget: int,
    device: torch.device,
    template: Mapping[str, Any] = NO_ARGUMENTS,
) -> ModelSource:
    """The model as a reward source in one process, without the tokens of an actor: it tokenises all texts itself."""
    zero = ZeroConfig(stage=0)
    frozen, world = Frozen(model, OptimConfig(), zero), World(0, 1, device)
    return ModelSource(frozen, tokenizer, None, budget=budget, zero=zero, world=world, template=template)


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO)
    with exit_with_message(rank=0):
        try:
            auto_cli(serve, as_positional=False, args=argv)
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
