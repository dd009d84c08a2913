"""The memory that loading a model at ZeRO stage 3 adds to each rank, as a share of the model's size.

    python bench/load_memory.py --megabytes 600 --ranks 2

Measured is the anonymous resident memory (RssAnon of /proc/self/status) above its value after imports and after the
start of the process group: the maximum while loading, sampled every 2 ms, and the value at the end. fastppo's loader is
compared with Hugging Face's, `from_pretrained` with `HfDeepSpeedConfig`. Exits with 1 if fastppo's adds more than 0.7.
"""

import argparse
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch

LIMIT = 0.7
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def rank_of(loader: str, path: str, name: str) -> None:
    """One rank: load, and print the measurements as one line of JSON."""
    from memory import Anonymous

    from fastppo.distributed.world import start_world, stop_world
    from fastppo.models.loading.policies import load_causal
    from fastppo.models.loading.streams import partition_config

    importlib.import_module("transformers.models.llama.modeling_llama")
    world, dtype = start_world(1), DTYPES[name]
    with Anonymous() as memory:
        if loader == "fastppo":
            model = load_causal("actor.model", path, None, None, dtype, world.device, partition_config(name))
        else:
            from transformers import AutoModelForCausalLM
            from transformers.integrations import HfDeepSpeedConfig

            kept = HfDeepSpeedConfig(partition_config(name))
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
            del kept
    size = sum(p.ds_numel for p in model.parameters()) * dtype.itemsize
    largest = max(p.ds_numel for p in model.parameters()) * dtype.itemsize
    record = {"rank": world.rank, "peak": memory.peak / size, "end": memory.end / size, "size": size}
    print("RESULT " + json.dumps(record | {"largest": largest / size}), flush=True)
    stop_world()


def measure(loader: str, path: str, name: str, ranks: int) -> list[dict[str, float]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    fixed = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    argv = [sys.executable, __file__, "--loader", loader, "--path", path, "--dtype", name]
    processes = [
        subprocess.Popen(
            argv,
            env=os.environ | fixed | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    results = []
    for process in processes:
        out, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{loader}: a rank failed\n{errors}")
        results += [json.loads(line.removeprefix("RESULT ")) for line in out.splitlines() if line.startswith("RESULT ")]
    return sorted(results, key=lambda result: result["rank"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory that loading at ZeRO stage 3 adds to each rank.")
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--loader", choices=["fastppo", "transformers"], help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.path:
        rank_of(options.loader, options.path, options.dtype)
        return
    from memory import saved_llama

    failed = False
    with tempfile.TemporaryDirectory() as folder:
        path = saved_llama(Path(folder) / "model", options.megabytes, DTYPES[options.dtype])
        print(f"{len(list(Path(path).glob('*.safetensors')))} files, {options.ranks} ranks, {options.dtype}")
        print("| loader | rank | peak / size | end / size |\n|---|---|---|---|")
        for loader in ("fastppo", "transformers"):
            for result in measure(loader, path, options.dtype, options.ranks):
                print(f"| {loader} | {result['rank']:.0f} | {result['peak']:.3f} | {result['end']:.3f} |", flush=True)
                failed |= loader == "fastppo" and max(result["peak"], result["end"]) > LIMIT
        print(f"size {result['size'] / 1e6:.0f} MB, largest tensor {result['largest']:.1%} of it")
    sys.exit(failed)


if __name__ == "__main__":
    main()
