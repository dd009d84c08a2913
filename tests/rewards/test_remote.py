"""A service on the network as a source of reward: what it is asked, and what it can do wrong."""

import logging
import threading
from contextlib import suppress
from dataclasses import replace
from datetime import date

import pytest
import requests
from services import eventually, lengths, service

from fastppo.config import RewardConfig
from fastppo.data.packed import pack
from fastppo.rewards import Responses, RewardError
from fastppo.rewards import remote as remote_module
from fastppo.rewards.remote import remote_source

TEXTS = ["abc", "a", "ab", "abcd", "abcde"]
ENDED = [True, True, False, True, False]
COLUMNS = {"answer": [1, 2, 3, 4, 5]}
RESPONSES = Responses([f"p{i}" for i in range(5)], TEXTS, ENDED, COLUMNS, pack([[1]] * 5, [1] * 5))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(remote_module, "FIRST_WAIT", 0.0)


def ask(url, **settings):
    return remote_source(RewardConfig(url=url, **settings))(RESPONSES)


def test_responses_go_out_in_parts_and_scores_come_back_in_order():
    with service(lengths) as (url, asked):
        assert ask(url, request_size=2, concurrency=3) == [3, 1, 2, 4, 5]
    parts = sorted(asked, key=lambda body: body["prompts"])
    assert [body["responses"] for body in parts] == [["abc", "a"], ["ab", "abcd"], ["abcde"]]
    texts = {"prompts": ["p2", "p3"], "responses": ["ab", "abcd"]}
    assert parts[1] == texts | {"ended": [False, True], "columns": {"answer": [3, 4]}}


def test_requests_run_at_the_same_time():
    together = threading.Barrier(3, timeout=20)

    def answer(body):
        together.wait()  # breaks, and fails the request, unless three are here at once
        return lengths(body)

    with service(answer) as (url, _):
        assert ask(url, request_size=2, concurrency=3, retries=0) == [3, 1, 2, 4, 5]


@pytest.mark.parametrize("failure", [(503, b"busy"), (429, b""), None, (200, b"<html>starting</html>")])
def test_a_request_that_fails_is_tried_again(failure, caplog):
    answers = [failure, failure]
    caplog.set_level(logging.WARNING, "fastppo")
    with service(lambda body: answers.pop() if answers else lengths(body)) as (url, asked):
        assert ask(url, retries=2) == [3, 1, 2, 4, 5]
    assert len(asked) == 3 and [r.getMessage()[-6:] for r in caplog.records] == ["2 left", "1 left"]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ((200, b'{"scores": [1, 2]}'), "returned 2 numbers for 5 responses. Tried 2 times."),
        ((200, b'{"scores": [1, NaN, 2, 3, 4]}'), "returned nan for response 1: 'a'"),
        ((200, b'{"scores": [1, null, 2, 3, 4]}'), "returned None (NoneType), not a number, for response 1"),
        ((200, b"<html><body>Welcome</body></html>"), "not JSON: '<html><body>Welcome"),
        ((200, b"[" * 100_000), "not JSON: '[[[["),
        ((200, b'{"scores": [' + b"1" * 5000 + b"]}"), "not JSON: '{"),
        ((200, b"[1, 2, 3, 4, 5]"), 'must answer {"scores": [...]}, and answered \'[1, 2'),
        ((500, b'{"error": "out of memory"}'), "answered with status 500: out of memory. Tried 2 times."),
        ((404, b"<h1>nothing here</h1>"), "answered with status 404: '<h1>nothing here</h1>'. Tried 1 time."),
        (None, "cannot be reached or broke off (ConnectionError)"),
    ],
)
def test_a_service_that_stays_broken_is_named_with_what_it_did(said, words):
    with service(lambda body: said) as (url, _), pytest.raises(RewardError) as raised:
        ask(url, retries=1)
    assert f"rewards.url = {url}" in str(raised.value) and words in str(raised.value)


def test_a_slow_service_is_waited_for_no_longer_than_its_timeout():
    done = threading.Event()
    with service(lambda body: done.wait(30) and None) as (url, _):
        with pytest.raises(RewardError, match=r"did not answer within 0\.2 s \(rewards\.timeout\)"):
            ask(url, timeout=0.2, retries=0)
        done.set()


def test_a_service_that_sends_a_byte_now_and_then_is_waited_for_no_longer_than_its_timeout():
    done = threading.Event()

    def drip(handler):
        with suppress(ConnectionError):
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            while not done.wait(0.05):
                handler.wfile.write(b" ")

    with service(lambda body: drip) as (url, _):
        with pytest.raises(RewardError, match=r"did not answer within 0\.3 s"):
            ask(url, timeout=0.3, retries=0)
        done.set()


def test_a_hopeless_answer_ends_the_asking_though_other_requests_hang():
    hanging, done = threading.Event(), threading.Event()

    def answer(body):
        if body["prompts"] == ["p1"]:
            hanging.wait(60)
            return 404, b"gone"
        hanging.set()
        done.wait(60)

    with service(answer) as (url, asked):
        with pytest.raises(RewardError, match=r"answered with status 404: 'gone'. Tried 1 time\."):
            ask(url, request_size=1, concurrency=2, retries=5)
        assert sorted(body["prompts"][0] for body in asked) == ["p0", "p1"] and not done.is_set()
        done.set()


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_service_says_when_to_ask_again_within_limits(status, monkeypatch, caplog):
    monkeypatch.setattr(remote_module, "LONGEST_WAIT", 0.1)
    answers = [(status, b"", {"Retry-After": "7"})]
    with service(lambda body: answers.pop() if answers else lengths(body)) as (url, _):
        assert ask(url, retries=1) == [3, 1, 2, 4, 5]
    assert "trying again in 0.1 s" in caplog.text


def test_pauses_grow_twofold_up_to_the_longest_and_none_follows_the_last_try(monkeypatch, caplog):
    monkeypatch.setattr(remote_module, "FIRST_WAIT", 0.1)
    monkeypatch.setattr(remote_module, "LONGEST_WAIT", 0.3)
    with service(lambda body: (500, b"broken")) as (url, asked), pytest.raises(RewardError, match=r"Tried 5 times\."):
        ask(url, retries=4)
    logged = [record.getMessage() for record in caplog.records]
    assert len(asked) == 5 and all(f"rewards.url = {url} answered with status 500" in line for line in logged)
    assert [line.partition("trying again in ")[2] for line in logged] == [
        "0.1 s, 4 left",
        "0.2 s, 3 left",
        "0.3 s, 2 left",
        "0.3 s, 1 left",
    ]


def test_a_request_that_pauses_is_not_tried_again_once_another_has_failed_for_good(monkeypatch, caplog):
    monkeypatch.setattr(remote_module, "FIRST_WAIT", 20.0)

    def answer(body):
        if body["prompts"] == ["p0"]:
            return 503, b"busy"
        eventually(lambda: "trying again in 20.0 s" in caplog.text)
        return 404, b"gone"

    with service(answer) as (url, asked):
        before = set(threading.enumerate())
        with pytest.raises(RewardError, match=r"status 404: 'gone'. Tried 1 time\."):
            ask(url, request_size=1, concurrency=2, retries=1)
        for thread in set(threading.enumerate()) - before:
            thread.join(10)
            assert not thread.is_alive()
        assert sorted(body["prompts"][0] for body in asked) == ["p0", "p1"]


@pytest.mark.parametrize("status", [301, 302, 303])
def test_a_redirect_that_drops_the_request_is_named_with_the_address_to_give(status):
    with service(lambda body: (status, b"", {"Location": "/elsewhere"})) as (url, asked):
        with pytest.raises(RewardError) as raised:
            ask(url, retries=3)
        words = f"redirects with status {status} to {url}/elsewhere, which turns the request into one without a body"
        assert words in str(raised.value) and len(asked) == 1


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed (_ssl.c:1)",
            r"accepted \(self-signed\)",
        ),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1)", "does not speak TLS .*begins with http://"),
    ],
)
def test_what_is_wrong_with_https_is_named(said, words, monkeypatch):
    def refuse(*_, **__):
        raise requests.exceptions.SSLError(said)

    monkeypatch.setattr(requests.Session, "post", refuse)
    with pytest.raises(RewardError, match=words):
        ask("https://127.0.0.1:9", retries=0)


@pytest.mark.parametrize("value", [date(2020, 1, 2), b"bytes", float("nan"), [{"inner": float("inf")}]])
def test_a_column_that_json_cannot_say_is_named_and_nothing_is_asked(value):
    responses = replace(RESPONSES, columns={"answer": [1, 2, 3, 4, value]})
    with service(lengths) as (url, asked), pytest.raises(RewardError) as raised:
        remote_source(RewardConfig(url=url, request_size=2))(responses)
    assert f"cannot say {value!r} ({type(value).__name__}) of the column answer" in str(raised.value) and not asked


def test_the_number_of_a_response_is_that_in_the_batch_and_not_in_its_request():
    def answer(body):
        return (200, b'{"scores": [0, 1e999]}') if "ab" in body["responses"] else lengths(body)

    with service(answer) as (url, _), pytest.raises(RewardError) as raised:
        ask(url, request_size=2, concurrency=1, retries=0)
    assert "inf for response 3: 'abcd'" in str(raised.value)
