"""A reward model as a service: what the command and its server answer, and what they refuse."""

import json
import logging
import math
import os
import socket
import struct
import subprocess
import sys
import threading
from urllib.request import urlopen

import pytest
import requests
import tiny
import torch
from services import serving

from fastppo import serve_reward
from fastppo.batch import pack
from fastppo.config import RewardConfig
from fastppo.feedback import Responses
from fastppo.feedback.remote import remote_source
from fastppo.load import load_reward
from fastppo.serve_reward import LARGEST, RewardServer, alone

TEXTS = ["abc", "a", "ab", "abcd", "abcde"]
ENDED = [True, True, False, True, False]
RESPONSES = Responses([f"p{i}" for i in range(5)], TEXTS, ENDED, {}, pack([[1]] * 5, [1] * 5))


def ask(url, **settings):
    return remote_source(RewardConfig(url=url, **settings))(RESPONSES)


@pytest.fixture(scope="module")
def reward_server(tmp_path_factory):
    path = tiny.saved(tmp_path_factory.mktemp("reward") / "model", tiny.classifier())
    model, tokenizer = load_reward(path, torch.float32, torch.device("cpu"))
    source = alone(model, tokenizer, 100, torch.device("cpu"))
    with serving(RewardServer(("127.0.0.1", 0), "tiny", source)) as url:
        yield url, source


def test_our_server_says_what_its_model_says(reward_server):
    url, source = reward_server
    packed = source.tokenised(RESPONSES.prompts, TEXTS, ENDED)
    assert ask(url, request_size=2) == pytest.approx(source.scores(packed, TEXTS), abs=1e-5)
    assert json.load(urlopen(url)) == {"model": "tiny"}


def loopback():
    """IPv6's where there is one."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return "::1"
    except OSError:
        return "127.0.0.1"


@pytest.mark.slow
def test_the_command_serves_a_model_and_says_where_and_why_not(tmp_path):
    host, command = loopback(), [sys.executable, "-m", "fastppo.serve_reward", "--dtype", "fp32", "--model"]
    one = tiny.saved(tmp_path / "one", tiny.classifier())
    two = tiny.saved(tmp_path / "two", tiny.classifier(labels=2))

    def refused(*arguments):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        return done.stderr

    with subprocess.Popen([*command, one, "--port", "0", "--host", host], stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().split()[-1]
            assert url.startswith("http://[::1]:" if host == "::1" else "http://127.0.0.1:")
            assert len(ask(url)) == len(TEXTS)
            assert "cannot be listened on (Address already in use)" in refused(
                one, "--host", host, "--port", url.rpartition(":")[2]
            )
        finally:
            server.terminate()
    assert f"--model = {two} has 2 labels" in refused(two)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--port=70000", "--port is 70000; it must be 0 to 65535"),
        ("--microbatch_tokens=0", "is 0; it must be 1 or more"),
    ],
)
def test_arguments_are_looked_at_before_the_model(argument, words, capfd, monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit):
        serve_reward.main(["--model", "/nowhere", argument])
    assert words in capfd.readouterr().err


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"prompts", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompts": ["a"]}', "a request is"),
        (b'{"prompts": ["a"], "responses": ["b\\ud83d"]}', r"response 0 has half a character at 1, the lone surrogate"),
        (b'{"prompts": ["a"], "responses": [1]}', "a request is"),
        (b'{"prompts": ["a"], "responses": []}', "1 prompts, 0 responses and 0 ended"),
        (b'{"prompts": ["a"], "responses": ["b"], "ended": [1]}', '"ended": [true, ...]'),
        (b'{"prompts": ["a"], "responses": ["b"], "ended": []}', "1 responses and 0 ended"),
        (b'{"prompts": ["a"], "responses": ["b"], "messages": []}', "1 responses and 1 ended, and 0 messages"),
        (b'{"prompts": ["a"], "responses": ["b"], "messages": ["a"]}', "messages has a list of chat messages"),
        (
            b'{"prompts": ["a"], "responses": ["b"], "messages": [[{"role": "user", "content": "\\ud83d"}]]}',
            "message 0 has half a character at 0",
        ),
        (b"", f"1 to {LARGEST} bytes"),
        (json.dumps({"prompts": ["a" * 200], "responses": ["b"]}).encode(), "201 tokens do not fit"),
    ],
)
def test_our_server_refuses_a_wrong_request_with_the_reason_and_goes_on(reward_server, body, words):
    answer = requests.post(reward_server[0], data=body, timeout=20)
    assert answer.status_code == 400 and words in answer.json()["error"]
    assert ask(reward_server[0])


def test_our_server_refuses_a_length_that_is_no_number(reward_server):
    answer = requests.post(reward_server[0], headers={"Content-Length": "ten"}, timeout=20)
    assert answer.status_code == 400 and "this one says 'ten'" in answer.json()["error"]


def test_a_model_that_says_nan_may_be_asked_again(reward_server, monkeypatch):
    """It may be another's memory, or a prompt's that is sampled anew."""
    url, source = reward_server
    right, calls = source.model, []

    def once_nan(packed):
        calls.append(packed)
        return right(packed) * (math.nan if len(calls) == 1 else 1.0)

    monkeypatch.setattr(source, "model", once_nan)
    answer = requests.post(url, json={"prompts": ["a"], "responses": ["b"]}, timeout=20)
    assert answer.status_code == 500 and "returned nan for response 0" in answer.json()["error"]
    assert ask(url, retries=0)


@pytest.mark.parametrize("moment", ["before it has asked", "before it is answered"])
def test_a_client_that_gives_up_makes_no_noise(reward_server, moment, monkeypatch, capfd, caplog):
    url, source = reward_server
    caplog.set_level(logging.DEBUG, "fastppo")
    scores, gone = source.scores, threading.Event()
    monkeypatch.setattr(source, "scores", lambda *asked: gone.wait(20) and scores(*asked))
    body = json.dumps({"prompts": ["a"], "responses": ["b"]}).encode()
    request = b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
        client.sendall(request + body if moment == "before it is answered" else request[:20])
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close resets the connection
    gone.set()
    assert ask(url)
    assert "Traceback" not in capfd.readouterr().err + caplog.text
