"""Services of reward that answer as a test says."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from fastppo.serve_reward import Scorer, run


@contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def service(answer):
    """A server that answers each request's JSON with `answer(body)`: (status, bytes) or (status, bytes, headers).

    None breaks off; a function gets the handler and writes what it likes.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            said = answer(asked[-1])
            if callable(said):
                said(self)
            elif said is not None:
                status, text, headers = (*said, {})[:3]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text)

        def log_message(self, *args):
            pass

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url, asked


def lengths(body):
    return 200, json.dumps({"scores": [len(r) for r in body["responses"]]}).encode()


@contextmanager
def reward_service(load, name="tiny"):
    """fastppo's own server of the model that `load` returns; yields its address and its Scorer."""
    scorer = Scorer(name, load)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=run, args=(scorer, listening), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", scorer
        finally:
            scorer.stop()
            thread.join(20)
            assert not thread.is_alive()


def eventually(condition):
    """Wait until `condition()` holds."""
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)
