"""Compare a run on two ranks that is killed at random moments with an uninterrupted one. Takes minutes.

    python bench/kill_resume.py --kills 20

Both runs use the `deepspeed` command. One is killed with SIGKILL, launcher and ranks together, at twenty random
moments: while models load, in any phase, while a checkpoint is written. Each time `--resume auto` continues it. At the
end weights, optimizer states, random states and metrics must be equal bit for bit. Exits with 1 if they are not.
"""

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import whole_runs


def command(folder: Path, output: Path, steps: int, settings: list[str]) -> list[str]:
    changes = {"steps": steps, "optim__dtype": "bf16", "zero__stage": 2, "resume": "auto"}
    fixed = whole_runs.settings(folder, output, **changes)
    with socket.socket() as s:  # a free port: another run may use DeepSpeed's default
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    return ["deepspeed", "--num_accelerators", "2", "--master_port", port, "fastppo/train.py", *fixed, *settings]


def start(argv: list[str], log: Path) -> subprocess.Popen[bytes]:
    with open(log, "ab") as file:
        return subprocess.Popen(argv, stdout=file, stderr=file, start_new_session=True)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kill the whole session by /proc: `deepspeed`, its `launch` and the ranks are several process groups in it."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == process.pid:
                    os.kill(int(entry.name), signal.SIGKILL)
            except ProcessLookupError:
                pass
    process.wait()


def progress(output: Path) -> int:
    metrics = output / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill and resume a run at random moments.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/kill_resume"))
    options, settings = parser.parse_known_args()
    options.output.mkdir(parents=True)
    folder, moments = whole_runs.prepare(options.output.resolve()), random.Random(options.seed)
    steps = max(2 * options.kills, 4)
    straight, killed, log = folder / "straight", folder / "killed", folder / "log"
    began = time.monotonic()
    subprocess.run(command(folder, straight, steps, settings), check=True, stdout=sys.stderr)
    whole = time.monotonic() - began
    for kill in range(options.kills):
        process, before = start(command(folder, killed, steps, settings), log), progress(killed)
        if kill % 5:  # every fifth kill comes during start-up, at any point of it
            while process.poll() is None and progress(killed) in (0, before):
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 1.5))
        else:
            time.sleep(moments.uniform(0, 20))
        ended = process.poll()
        kill_all(process)
        names = whole_runs.checkpoints(killed) if (killed / "checkpoints").exists() else []
        print(f"kill {kill + 1}: {progress(killed)} lines, {', '.join(names) or 'no checkpoint'}", flush=True)
        if ended is not None:
            sys.exit(f"the run ended by itself with {ended} before it was killed; see {log}")
    subprocess.run(command(folder, killed, steps, settings), check=True, stdout=sys.stderr)
    equal = whole_runs.records(straight) == whole_runs.records(killed) and whole_runs.same(
        whole_runs.state(straight), whole_runs.state(killed)
    )
    print(
        f"{steps} steps, {options.kills} kills: {'equal bit for bit' if equal else 'NOT equal'}; {whole:.0f} s unkilled"
    )
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
