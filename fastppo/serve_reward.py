"""Serve a reward model over HTTP: `python -m fastppo.serve_reward --model DIR`, for `rewards.url`.

POST `{"prompts": [text, ...], "responses": [text, ...], "ended": [true, ...]}`, columns being ignored; the answer is
`{"scores": [...]}`, or `{"error": "..."}` with status 400 for a request that is wrong and 500 for a model that fails.
Without `ended` all responses are taken as cut, so that the model sees no EOS. GET tells which model it is.
"""

from __future__ import annotations

import json
import logging
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any, Literal, NamedTuple, TypeGuard, TypeVar

import torch
from jsonargparse import auto_cli
from transformers import PreTrainedTokenizerBase

from fastppo.config import OptimConfig, ZeroConfig
from fastppo.engine import Frozen
from fastppo.errors import FastPPOError, exit_with_message
from fastppo.feedback.model import ModelSource
from fastppo.load import load_reward
from fastppo.models import RewardModel
from fastppo.weights import DTYPES
from fastppo.world import World

T = TypeVar("T")

log = logging.getLogger("fastppo")

LARGEST = 64 << 20  # bytes of a request


class _Asked(NamedTuple):
    prompts: list[str]
    responses: list[str]
    ended: list[bool]


class RewardServer(ThreadingHTTPServer):
    """One model, asked by one request at a time, on as many connections as come."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], name: str, source: ModelSource):
        super().__init__(address, _Handler)
        self.name, self.source, self.turn = name, source, Lock()

    def scores(self, asked: _Asked) -> list[float]:
        with self.turn:
            return self.source.scores(self.source.tokenised(*asked), asked.responses) if asked.responses else []


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(200, {"model": self.server.name})

    def do_POST(self) -> None:
        try:
            asked = _read(self.rfile.read(self._length()))
            self._answer(200, {"scores": self.server.scores(asked)})
        except ValueError as error:  # RewardError is one
            self.close_connection = True  # of a request that is too long the rest was not read
            self._answer(400, {"error": str(error)})
        except Exception as error:
            log.exception("a request failed")
            self._answer(500, {"error": f"{type(error).__name__}: {error}"})

    def _length(self) -> int:
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 < length <= LARGEST:
            raise ValueError(f"a request has a body of 1 to {LARGEST} bytes and says so; this one has {length}")
        return length

    def _answer(self, status: int, said: dict[str, Any]) -> None:
        body = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


def _read(body: bytes) -> _Asked:
    """What a request asks. Raises ValueError for anything else than what the protocol says."""
    try:
        said = json.loads(body)
    except ValueError as error:
        raise ValueError(f"the request is not JSON: {error}") from None
    prompts, responses, ended = (
        said.get(name) if isinstance(said, dict) else None for name in ("prompts", "responses", "ended")
    )
    if not (_list_of(str, prompts) and _list_of(str, responses) and (ended is None or _list_of(bool, ended))):
        raise ValueError('a request is {"prompts": [text, ...], "responses": [text, ...], "ended": [true, ...]}')
    ended = [False] * len(responses) if ended is None else ended
    if not len(prompts) == len(responses) == len(ended):
        raise ValueError(f"the request has {len(prompts)} prompts, {len(responses)} responses and {len(ended)} ended")
    return _Asked(prompts, responses, ended)


def _list_of(kind: type[T], value: object) -> TypeGuard[list[T]]:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8100,
    dtype: Literal["fp32", "bf16"] = "bf16",
    microbatch_tokens: int = 8192,
) -> None:
    """Serve a reward model over HTTP.

    Args:
        model: An `AutoModelForSequenceClassification` with one label: hub name or directory.
        host: Address to listen on. Other machines reach 0.0.0.0, and so does anybody: there is no password.
        port: 0 takes a free one, which is printed.
        dtype: Type of weights and activations.
        microbatch_tokens: Tokens of one forward pass.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded, tokenizer = load_reward(model, DTYPES[dtype], device)
    with RewardServer((host, port), model, alone(loaded, tokenizer, microbatch_tokens, device)) as server:
        print(f"{model} answers on http://{host}:{server.server_port}", flush=True)
        server.serve_forever()


def alone(model: RewardModel, tokenizer: PreTrainedTokenizerBase, budget: int, device: torch.device) -> ModelSource:
    """The model as a source of reward of this process, which knows its tokens alone."""
    zero = ZeroConfig(stage=0)
    frozen, world = Frozen(model, OptimConfig(), zero), World(0, 1, device)
    return ModelSource(frozen, tokenizer, None, budget=budget, zero=zero, world=world)


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO)
    with exit_with_message(rank=0):
        try:
            auto_cli(serve, as_positional=False, args=argv)
        except KeyboardInterrupt:
            return
        except OSError as error:  # the address
            raise FastPPOError(f"host and port cannot be listened on ({error.strerror}); give others") from error


if __name__ == "__main__":
    main()
