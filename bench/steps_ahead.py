"""Time of a PPO step with `ppo.steps_ahead` 0 and 1, where the reward is a service that takes its time.

    python bench/steps_ahead.py --config quickstart
    python bench/steps_ahead.py --short

Runs with 0 and with 1 alternate, so that both see the same machine; each pair gives a ratio of medians. The service
answers each request after `--seconds` and computes nothing. The first step of a run, which samples twice with 1, and
the last, which samples nothing then, are not counted. With 0 a step takes as long as sampling, the service, experience
and learning together; with 1 the service's time counts only as far as it exceeds what else runs until it is needed:
experience, learning, and the sampling of the batch after. Without `--config` the models are the small ones of
bench/ranks.py.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ranks import PHASES, run, small


@contextmanager
def slow_service(seconds: float) -> Iterator[str]:
    """The address of a service that answers after so many seconds, with scores from the responses' letters."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            responses = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["responses"]
            time.sleep(seconds)
            answer = json.dumps({"scores": [sum(map(ord, text)) % 7 / 7 for text in responses]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of a PPO step, sampled on policy and a step ahead.")
    parser.add_argument("--config", help="a preset or a file of settings instead of the small models")
    parser.add_argument("--seconds", type=float, default=2.0, help="that the service takes for an answer")
    parser.add_argument("--steps", type=int, default=8, help="steps of a run, of which two are not counted")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs")
    parser.add_argument("--short", action="store_true", help="one pair of runs of three steps, with a fast service")
    options, more = parser.parse_known_args()
    if options.short:
        options.steps, options.rounds, options.seconds = 3, 1, 0.2
    if options.steps < 3:
        parser.error("--steps must be at least 3: the first and the last step are not counted")

    found: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    ratios = []
    with tempfile.TemporaryDirectory() as name, slow_service(options.seconds) as url:
        folder = Path(name)
        settings = ["--config", options.config] if options.config else small(folder, "bf16")
        source = json.dumps([{"url": url, "request_size": 1_000_000}])  # one request a step
        settings = [*settings, "--rewards", source, "--eval.prompts", "0", "--ppo.score_normalise", "true", *more]
        for number in range(options.rounds):
            medians = {}
            for ahead in (0, 1) if number % 2 == 0 else (1, 0):
                own = [*settings, "--ppo.steps_ahead", str(ahead)]
                steps = run(own, folder / f"run-{number}-{ahead}", 1, options.steps)[:-1]
                found[ahead] += steps
                medians[ahead] = statistics.median(step["time/step"] for step in steps)
            ratios.append(medians[1] / medians[0])

    result: dict[str, object] = {
        "config": options.config or "small",
        "service": options.seconds,
        "cores": len(os.sched_getaffinity(0)),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }
    print(f"{'steps_ahead':<12} {'step':>9} " + " ".join(f"{phase:>12}" for phase in PHASES))
    for ahead, steps in found.items():
        seconds = {phase: statistics.median(step[f"time/{phase}"] for step in steps) for phase in ("step", *PHASES)}
        print(f"{ahead:<12} {seconds['step']:7.2f} s " + " ".join(f"{seconds[phase]:10.2f} s" for phase in PHASES))
        result[f"steps_ahead_{ahead}"] = {phase: round(value, 3) for phase, value in seconds.items()}
    print(f"a step takes {result['ratio']} of the time (median of {options.rounds} pairs)")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
