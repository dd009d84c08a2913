"""Services of reward that answer as a test says."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


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
    """A server that answers each request's JSON with `answer(body)`: (status, bytes), or None to break off."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            said = answer(asked[-1])
            if said is not None:
                self.send_response(said[0])
                self.end_headers()
                self.wfile.write(said[1])

        def log_message(self, *args):
            pass

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url, asked


def lengths(body):
    return 200, json.dumps({"scores": [len(r) for r in body["responses"]]}).encode()
