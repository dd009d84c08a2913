"""Serve a reward model over HTTP: `python -m fastppo.serve_reward --model DIR`, for `rewards.url`.

POST `{"prompts": [text, ...], "responses": [text, ...], "ended": [true, ...]}`, columns being ignored; the answer is
`{"scores": [...]}`, or `{"error": "..."}` with status 400 for a request that is wrong and 500 for a model that fails.
Without `ended` all responses are taken as cut, so that the model sees no EOS. `"messages": [[{"role": ..., "content":
...}, ...] or null, ...]` has the prompts that are chat, which a model with a chat template reads by that one. GET tells
which model it is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET, AF_INET6
from threading import Lock
from typing import Any, Literal, NamedTuple, TypeGuard

import torch
from jsonargparse import auto_cli
from transformers import PreTrainedTokenizerBase

from fastppo.config import OptimConfig, ZeroConfig
from fastppo.data import NO_ARGUMENTS, SURROGATE, Messages, are_messages, check_arguments
from fastppo.distributed import Frozen, World
from fastppo.errors import FastPPOError, exit_with_message
from fastppo.models import DTYPES, RewardModel, load_reward
from fastppo.rewards import BadChat, ModelSource, RewardError, TooLong

log = logging.getLogger("fastppo")

REQUEST = '{"prompts": [text, ...], "responses": [text, ...], "ended": [true, ...]}'
LARGEST = 64 << 20  # bytes of a request


class _Asked(NamedTuple):
    prompts: list[str]
    responses: list[str]
    ended: list[bool]
    messages: list[Messages | None]


class RewardServer(ThreadingHTTPServer):
    """One model, asked by one request at a time, on as many connections as come."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], name: str, source: ModelSource):
        self.address_family = AF_INET6 if ":" in address[0] else AF_INET
        super().__init__(address, _Handler)
        self.name, self.source, self.turn = name, source, Lock()

    def scores(self, asked: _Asked) -> list[float]:
        with self.turn:
            return self.source.scores(self.source.tokenised(*asked), asked.responses) if asked.responses else []


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError as error:
            log.debug("a client gave up: %s", error)

    def do_GET(self) -> None:
        self._answer(200, {"model": self.server.name})

    def do_POST(self) -> None:
        try:
            asked = _read(self.rfile.read(self._length()))
        except ValueError as error:
            self.close_connection = True  # of a request that is too long the rest was not read
            self._answer(400, {"error": str(error)})
        else:
            self._answer(*self._scored(asked))

    def _scored(self, asked: _Asked) -> tuple[int, dict[str, Any]]:
        """Status and answer."""
        try:
            return 200, {"scores": self.server.scores(asked)}
        except (TooLong, BadChat) as error:
            return 400, {"error": str(error)}
        except RewardError as error:  # a NaN, which may be none another time
            log.error("a request failed: %s", error)
            return 500, {"error": str(error)}
        except Exception as error:
            log.exception("a request failed")
            return 500, {"error": f"{type(error).__name__}: {error}"}

    def _length(self) -> int:
        said = self.headers.get("Content-Length") or "0"
        if not (said.isdecimal() and len(said) < 20 and 0 < int(said) <= LARGEST):
            raise ValueError(f"a request has a body of 1 to {LARGEST} bytes and says so; this one says {said[:20]!r}")
        return int(said)

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
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the request is not JSON: {error}") from None
    said = said if isinstance(said, dict) else {}
    prompts, responses = said.get("prompts"), said.get("responses")
    if not (_texts(prompts) and _texts(responses)):
        raise ValueError(f"a request is {REQUEST}")
    ended = said.get("ended", [False] * len(responses))
    if not (isinstance(ended, list) and all(isinstance(item, bool) for item in ended)):
        raise ValueError(f"a request is {REQUEST}")
    messages = said.get("messages", [None] * len(prompts))
    if not (isinstance(messages, list) and all(chat is None or are_messages(chat) for chat in messages)):
        raise ValueError("messages has a list of chat messages ({role, content}) for each prompt, or null")
    if not len(prompts) == len(responses) == len(ended) == len(messages):
        counts = f"{len(prompts)} prompts, {len(responses)} responses and {len(ended)} ended"
        raise ValueError(f"the request has {counts}" + f", and {len(messages)} messages" * ("messages" in said))
    contents = [message["content"] for chat in messages for message in chat or []]
    for name, texts in (("prompt", prompts), ("response", responses), ("message", contents)):
        for i, text in enumerate(texts):
            if half := SURROGATE.search(text):
                raise ValueError(f"{name} {i} has half a character at {half.start()}, the lone surrogate {half[0]!r}")
    return _Asked(prompts, responses, ended, messages)


def _texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8100,
    dtype: Literal["fp32", "bf16"] = "bf16",
    microbatch_tokens: int = 8192,
    template: dict[str, Any] | None = None,
) -> None:
    """Serve a reward model over HTTP.

    Args:
        model: An `AutoModelForSequenceClassification` with one label: hub name or directory.
        host: Address to listen on. Other machines reach 0.0.0.0, and so does anybody: there is no password.
        port: 0 to 65535; 0 takes a free one, which is printed.
        dtype: Type of weights and activations.
        microbatch_tokens: Tokens of one forward pass.
        template: Arguments of the model's chat template, as in '{"enable_thinking": false}'.
    """
    if not 0 <= port <= 65535:
        raise FastPPOError(f"--port is {port}; it must be 0 to 65535.")
    if microbatch_tokens < 1:
        raise FastPPOError(f"--microbatch_tokens is {microbatch_tokens}; it must be 1 or more.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded, tokenizer = load_reward(model, DTYPES[dtype], device, setting="--model")
    check_arguments("--template", template or {}, tokenizer)
    source = alone(loaded, tokenizer, microbatch_tokens, device, template or {})
    with RewardServer((host, port), model, source) as server:
        name = f"[{host}]" if ":" in host else host
        print(f"{model} answers on http://{name}:{server.server_port}", flush=True)
        server.serve_forever()


def alone(
    model: RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    budget: int,
    device: torch.device,
    template: Mapping[str, Any] = NO_ARGUMENTS,
) -> ModelSource:
    """The model as a source of reward of this process, which knows its tokens alone."""
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
        except OSError as error:  # the address
            raise FastPPOError(f"host and port cannot be listened on ({error.strerror}); give others") from error


if __name__ == "__main__":
    main()
