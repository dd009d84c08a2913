"""The memory that resuming with another layout adds to each rank, beside what its own shares take.

    python bench/reshard_memory.py --megabytes 200 --ranks 2

One rank trains a Llama of this size, in bf16 at ZeRO stage 1, for one update and saves it; then `--ranks` ranks load
that, at stage 1 and at stage 3. Measured is the anonymous resident memory (RssAnon of /proc/self/status) above that of
the new engine before it loads, sampled every 2 ms: the maximum while loading, and the value at the end. The engine has
its weights and master weights by then, so that a rank's share of both moments is what must come. Exits with 1 if a rank
held more than that and twice the largest tensor.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch


def engine_of(path: str, stage: int):
    from fastppo.config import OptimConfig, ZeroConfig
    from fastppo.distributed import Engine, start_world
    from fastppo.models.loading.policies import load_causal
    from fastppo.models.loading.streams import partition_config

    world, optim, zero = start_world(1), OptimConfig(dtype="bf16"), ZeroConfig(stage=stage)
    partition = partition_config("bf16") if stage == 3 else None
    model = load_causal("actor.model", path, None, None, torch.bfloat16, world.device, partition)
    return world, Engine(model, [list(model.parameters())], optim, zero)


def save(path: str, folder: str) -> None:
    _, engine = engine_of(path, 1)
    engine.backward(sum(p.float().square().sum() for p in engine.module.parameters()), last=True)
    engine.step([1e-3])

    def write(state, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, file)

    engine.save(Path(folder), "actor", write)


def load(path: str, folder: str, stage: int) -> None:
    from memory import Anonymous

    world, engine = engine_of(path, stage)
    with Anonymous() as memory:
        engine.load(Path(folder), "actor")
    numbers = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    largest = max(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    record = {"rank": world.rank, "peak": memory.peak, "end": memory.end, "state": 12 * numbers, "tensor": 4 * largest}
    print("RESULT " + json.dumps(record | {"moments": 8 * numbers / world.ranks}), flush=True)


def run(ranks: int, *arguments: str) -> list[dict[str, float]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    fixed = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments],
            # blocks that were freed are not kept, so that what is measured is held
            env=os.environ | fixed | {"RANK": str(rank), "LOCAL_RANK": str(rank), "MALLOC_TRIM_THRESHOLD_": "65536"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    lines = [line for process in processes for line in process.communicate()[0].splitlines()]
    if any(process.returncode for process in processes):
        raise RuntimeError("a rank failed")
    results = [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]
    return sorted(results, key=lambda result: result["rank"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory that resuming with another layout adds to each rank.")
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        kind, path, folder, stage = options.work
        save(path, folder) if kind == "save" else load(path, folder, int(stage))
        return
    from memory import MB, saved_llama

    failed = False
    with tempfile.TemporaryDirectory() as folder:
        path = saved_llama(Path(folder) / "model", options.megabytes)
        run(1, "--work", "save", path, folder, "1")
        print(
            "| to | rank | whole state, MB | its moments | largest tensor | peak | end |\n|---|---|---|---|---|---|---|"
        )
        for stage in (1, 3):
            for r in run(options.ranks, "--work", "load", path, folder, str(stage)):
                named = [r[name] / MB for name in ("state", "moments", "tensor", "peak", "end")]
                values = " | ".join(f"{value:.0f}" for value in named)
                print(f"| {options.ranks} ranks, stage {stage} | {r['rank']} | {values} |", flush=True)
                failed |= r["peak"] > r["moments"] + 2 * r["tensor"] + 8 * MB
    sys.exit(failed)


if __name__ == "__main__":
    main()
