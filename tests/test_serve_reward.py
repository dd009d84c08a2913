"""A reward model as a service: what the command and its server answer, and what they refuse."""

import json
import logging
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from urllib.request import urlopen

import pytest
import requests
import tiny
import torch
from services import eventually, lengths, reward_service, service

from fastppo import serve_reward
from fastppo.config import RewardConfig
from fastppo.data.packed import pack
from fastppo.models.loading.policies import load_reward
from fastppo.rewards import Responses
from fastppo.rewards.remote import remote_source
from fastppo.serve_reward import LARGEST, Scorer, alone, run

TEXTS = ["abc", "a", "ab", "abcd", "abcde"]
ENDED = [True, True, False, True, False]
RESPONSES = Responses([f"p{i}" for i in range(5)], TEXTS, ENDED, {}, pack([[1]] * 5, [1] * 5))


def ask(url, **settings):
    return remote_source(RewardConfig(url=url, **settings))(RESPONSES)


def post(url, prompts, responses, **more):
    return requests.post(url, json={"prompts": prompts, "responses": responses, **more}, timeout=20)


def health(url):
    return requests.get(f"{url}/health", timeout=20).json()


@contextmanager
def held(source):
    """Within, a forward pass does not end before `release` is set; `going` is once one has begun; texts: of each."""
    right, going, release, texts = source.scores, threading.Event(), threading.Event(), []

    def scores(packed, responses):
        texts.append(list(responses))
        going.set()
        assert release.wait(20)
        return right(packed, responses)

    source.scores = scores
    try:
        yield going, release, texts
    finally:
        release.set()
        source.scores = right


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tiny.saved(tmp_path_factory.mktemp("reward") / "model", tiny.classifier())
    model, tokenizer = load_reward(path, torch.float32, torch.device("cpu"))
    return alone(model, tokenizer, 100, torch.device("cpu"))


@pytest.fixture(scope="module")
def reward_server(source):
    with reward_service(lambda: source) as (url, _):
        eventually(lambda: health(url)["ready"])
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

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, one, "--port", "0", "--host", host], **pipes) as server:
        try:
            url = server.stdout.readline().split()[-1]
            assert url.startswith("http://[::1]:" if host == "::1" else "http://127.0.0.1:")
            assert len(ask(url)) == len(TEXTS)
            assert "cannot be listened on (Address already in use)" in refused(
                one, "--host", host, "--port", url.rpartition(":")[2]
            )
        finally:
            server.terminate()
        assert server.wait(20) == -signal.SIGTERM and "Traceback" not in server.stderr.read()
    assert f"--model = {two} has 2 labels" in refused(two, "--port", "0")


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
    for said in ("ten", "-1", "0x10"):
        answer = requests.post(reward_server[0], headers={"Content-Length": said}, timeout=20)
        assert answer.status_code == 400 and answer.text == "Invalid HTTP request received."  # uvicorn's own
    assert ask(reward_server[0])


@pytest.mark.parametrize(
    ("header", "said"),
    [(f"Content-Length: {LARGEST + 1}", f"{LARGEST + 1}"), ("Transfer-Encoding: chunked", "chunked")],
)
def test_our_server_reads_no_body_of_another_length_than_it_takes(reward_server, header, said):
    url, _ = reward_server
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 20) as client:
        client.sendall(f"POST / HTTP/1.1\r\nHost: here\r\n{header}\r\n\r\n".encode())
        with client.makefile("rb") as answered:
            answer = answered.read()  # until the server closes
    assert (
        answer.startswith(b"HTTP/1.1 400 ")
        and f"1 to {LARGEST} bytes and says so; this one says '{said}'"
        in (json.loads(answer.partition(b"\r\n\r\n")[2])["error"])
    )


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


def together(url, source, asked):
    """The answers to requests that wait while another one's forward pass runs; also the texts of each later pass."""
    before = health(url)["waiting"]
    with ThreadPoolExecutor(len(asked) + 1) as pool, held(source) as (going, release, texts):
        first = pool.submit(post, url, ["first"], ["one"])
        assert going.wait(20)
        answers = []
        for i, request in enumerate(asked):  # one behind the other, so that their order is known
            answers.append(pool.submit(post, url, **request))
            eventually(lambda n=i + 1: health(url)["waiting"] == before + n)
        release.set()
        assert first.result().status_code == 200
        return [answer.result() for answer in answers], texts[1:]


def test_requests_that_wait_share_a_forward_pass_and_get_the_scores_that_each_gets_alone(reward_server):
    url, source = reward_server
    asked = [{"prompts": [f"p{i}"] * (i + 1), "responses": [f"r{i}{j}" for j in range(i + 1)]} for i in range(4)]
    before = health(url)
    answers, passes = together(url, source, asked)
    after = health(url)
    assert passes == [[text for request in asked for text in request["responses"]]]
    for request, answer in zip(asked, answers, strict=True):
        assert answer.json()["scores"] == pytest.approx(post(url, **request).json()["scores"], abs=1e-5)
    assert {name: after[name] - before[name] for name in ("requests", "responses", "batches", "failed")} == {
        "requests": 5,
        "responses": 11,
        "batches": 2,
        "failed": 0,
    }


def test_a_forward_pass_takes_no_more_tokens_than_its_budget(reward_server):
    url, source = reward_server
    assert source.budget == 100
    asked = [
        {"prompts": ["a" * (size - 1)], "responses": [name]} for name, size in zip("bcde", (60, 40, 1, 99), strict=True)
    ]
    answers, passes = together(url, source, asked)
    assert passes == [["b", "c"], ["d", "e"]] and all(answer.status_code == 200 for answer in answers)


def test_a_request_that_fails_fails_alone(reward_server, monkeypatch, caplog):
    url, source = reward_server
    right, nan = source.model, source.tokenizer("!")["input_ids"][0]

    def nan_where_it_is_shouted(packed):
        shouted = [bool((row == nan).any()) for row in packed.tokens.split(packed.lengths.tolist())]
        return right(packed).where(~torch.tensor(shouted), math.nan)

    monkeypatch.setattr(source, "model", nan_where_it_is_shouted)
    good = [{"prompts": ["p"] * n, "responses": ["r"] * n} for n in (1, 2)]
    too_long = {"prompts": ["a", "a" * 200], "responses": ["b", "b"]}
    shouted = {"prompts": ["a", "a"], "responses": ["b", "b!"]}
    before = health(url)
    answers, passes = together(url, source, [good[0], too_long, shouted, good[1]])
    assert [answer.status_code for answer in answers] == [200, 400, 500, 200]
    for request, i in zip(good, (0, 3), strict=True):
        assert answers[i].json()["scores"] == pytest.approx(post(url, **request).json()["scores"], abs=1e-5)
    assert "201 tokens do not fit" in answers[1].json()["error"]
    assert "returned nan for response 1: 'b!'" in answers[2].json()["error"]  # as it counts its own
    assert passes == [["r", "b", "b!", "r", "r"], ["r"], ["b", "b!"], ["r", "r"]]
    assert "3 requests failed together" in caplog.text and health(url)["failed"] == before["failed"] + 2


def test_nothing_is_scored_for_a_client_that_has_gone_while_it_waited(reward_server):
    url, source = reward_server
    body = json.dumps({"prompts": ["a"], "responses": ["gone"]}).encode()
    with ThreadPoolExecutor(2) as pool, held(source) as (going, release, texts):
        first = pool.submit(post, url, ["first"], ["one"])
        assert going.wait(20)
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            eventually(lambda: health(url)["waiting"] == 1)
        stays = pool.submit(post, url, ["second"], ["two"])
        eventually(lambda: health(url)["waiting"] == 2)
        release.set()
        assert first.result().status_code == stays.result().status_code == 200
        assert texts == [["one"], ["two"]]


def test_health_tells_whether_the_model_is_there_and_what_it_has_done(source):
    loading = threading.Event()
    nothing = {"model": "tiny", "waiting": 0, "requests": 0, "responses": 0, "batches": 0, "failed": 0}
    with reward_service(lambda: loading.wait(20) and source) as (url, _):
        before = requests.get(f"{url}/health", timeout=20)
        assert before.status_code == 503 and before.json() == {"ready": False} | nothing
        early = post(url, ["a"], ["b"])
        assert early.status_code == 503 and int(early.headers["Retry-After"]) > 0
        assert early.json() == {"error": "tiny is still being loaded"}
        loading.set()
        eventually(lambda: health(url)["ready"])
        assert post(url, ["a", "b"], ["c", "d"]).status_code == 200
        assert post(url, ["a" * 200], ["b"]).status_code == 400
        after = requests.get(f"{url}/health", timeout=20)
        done = {"ready": True, "requests": 1, "responses": 2, "batches": 1, "failed": 1}
        assert after.status_code == 200 and after.json() == nothing | done


def test_a_model_that_cannot_be_loaded_ends_the_service_with_the_reason():
    def load():
        raise ValueError("no such model")

    with socket.create_server(("127.0.0.1", 0)) as listening, pytest.raises(ValueError, match="no such model"):
        run(Scorer("none", load), listening)


def fits(value, schema, root):
    """Whether a JSON value is what an OpenAPI schema says, by those of its words that are used here."""
    if "$ref" in schema:
        return fits(value, root["components"]["schemas"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema:
        return any(fits(value, each, root) for each in schema["anyOf"])
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "integer": int,
        "number": int | float,
        "null": type(None),
    }
    known = {
        "type",
        "properties",
        "required",
        "items",
        "minItems",
        "additionalProperties",
        "title",
        "description",
        "default",
        "examples",
    }
    assert set(schema) <= known and schema["type"] in kinds, schema
    if not isinstance(value, kinds[schema["type"]]):
        return False
    if isinstance(value, dict):
        properties = schema.get("properties")
        return set(schema.get("required", ())) <= set(value) and all(
            fits(value[name], properties[name], root) if name in properties else "additionalProperties" in schema
            for name in value
            if properties
        )
    if isinstance(value, list):
        return len(value) >= schema.get("minItems", 0) and all(fits(each, schema["items"], root) for each in value)
    return True


def test_the_schema_is_what_the_client_sends_and_the_server_answers(reward_server):
    url, _ = reward_server
    schema = requests.get(f"{url}/openapi.json", timeout=20).json()
    score, tell = schema["paths"]["/"]["post"], schema["paths"]["/health"]["get"]

    def of(holder):
        return holder["content"]["application/json"]["schema"]

    asked, answered = of(score["requestBody"]), {int(k): of(v) for k, v in score["responses"].items()}
    chats = [None, [{"role": "user", "content": "Why?", "name": "me"}], None, None, None]
    with service(lengths) as (other, sent):
        ask(other, request_size=2)
        remote_source(RewardConfig(url=other))(
            replace(RESPONSES, messages=chats, columns={"answer": [1, None, "a", [], 2.5]})
        )
        call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
        talk = [{"role": "user", "content": "?"}, call, {"role": "tool", "content": "1"}]
        remote_source(RewardConfig(url=other))(replace(RESPONSES, messages=chats, conversations=[talk] * 5))
    assert len(sent) == 5 and all(fits(body, asked, schema) for body in sent)
    assert any("messages" in body for body in sent) and "conversations" in sent[-1]
    (example,) = asked["examples"]
    assert fits(example, asked, schema)
    for body, status in ((example, 200), (sent[-1], 200), (example | {"ended": [1]}, 400), ({"prompts": []}, 400)):
        assert fits(body, asked, schema) == (status == 200)
        answer = requests.post(url, json=body, timeout=20)
        assert answer.status_code == status and fits(answer.json(), answered[status], schema)
    assert fits(health(url), of(tell["responses"]["200"]), schema)
    parts = [schema["components"]["schemas"]["Health"], asked]
    assert all(each.get("description") for part in parts for each in part["properties"].values())


@pytest.mark.parametrize(
    ("method", "path", "status"), [("POST", "/score", 404), ("GET", "/healthz", 404), ("PUT", "/", 405)]
)
def test_a_wrong_address_is_answered_with_the_right_ones(reward_server, method, path, status):
    answer = requests.request(method, reward_server[0] + path, timeout=20)
    assert answer.status_code == status
    assert f"{method} {path}" in answer.json()["error"] and "GET /health" in answer.json()["error"]


def test_what_is_asked_is_answered_before_sigterm_ends_the_service(source, monkeypatch):
    ended = []
    before = signal.signal(signal.SIGTERM, lambda *_: ended.append(True))  # the server hands it on at the end
    try:
        with (
            ThreadPoolExecutor(2) as pool,
            held(source) as (going, release, _),
            socket.create_server(("127.0.0.1", 0)) as listening,
        ):
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            scorer = Scorer("tiny", lambda: source, lambda: answers.append(pool.submit(post, url, ["a"], ["b"])))
            answers = []

            def end():
                assert going.wait(20)
                os.kill(os.getpid(), signal.SIGTERM)
                eventually(lambda: listening.fileno() == -1)  # the server takes no more
                assert not ended
                time.sleep(0.3)  # longer than what a server takes that waits for nobody
                release.set()

            ending = pool.submit(end)
            run(scorer, listening)
            ending.result()
            assert answers[0].result().status_code == 200 and ended
            scorer.stop()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_without_its_extra_the_command_says_what_to_install():
    code = "import sys; sys.modules['fastapi'] = None; from fastppo import serve_reward; serve_reward.main()"
    command = [sys.executable, "-c", code, "--model", "any"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == (
        "fastppo: fastapi is not installed, which serving a reward model needs: run `pip install 'fastppo[serve]'`,"
        " or `pip install fastapi uvicorn`.\n"
    )


@pytest.mark.parametrize("moment", ["before it has asked", "while it asks", "before it is answered"])
def test_a_client_that_gives_up_makes_no_noise(reward_server, moment, monkeypatch, capfd, caplog):
    url, source = reward_server
    caplog.set_level(logging.DEBUG, "fastppo")
    scores, gone = source.scores, threading.Event()
    monkeypatch.setattr(source, "scores", lambda *asked: gone.wait(20) and scores(*asked))
    body = json.dumps({"prompts": ["a"], "responses": ["b"]}).encode()
    request = b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
        sent = {"before it has asked": request[:20], "while it asks": request + body[:5]}.get(moment, request + body)
        client.sendall(sent)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close resets the connection
    gone.set()
    assert ask(url)
    assert "Traceback" not in capfd.readouterr().err + caplog.text
