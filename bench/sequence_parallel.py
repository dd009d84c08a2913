"""The activations of a rank with `parallel.sequence` 1, 2 and 4.

    python bench/sequence_parallel.py

Each group of ranks computes one packed row forward, with the layers of a Llama in fp32. `kept` is what that keeps for
the backward pass: every storage that autograd saves, but for the weights, counted once. `grown` is by how much the
process's anonymous resident memory (RssAnon of /proc/self/status) is larger then. Of the ranks of a group the one with
the most counts. Exits with 1 if `kept` is not 1 / ranks within 15%.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch

LENGTHS = (2000, 1200, 500, 300, 90, 5, 1)
SHAPES = {  # hidden size, feed-forward size, query heads, key heads
    "SmolLM2-135M": (576, 1536, 9, 3),
    "Llama-3.2-1B, half as wide": (1024, 4096, 16, 4),
}
WITHIN = 0.15
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}  # freed blocks go back to the kernel


def rank_of(shape: str, layers: int) -> None:
    """One rank: compute the row, and print the measurements as one line of JSON."""
    from memory import Anonymous
    from transformers import AutoConfig, AutoModelForCausalLM

    from fastppo.data import pack
    from fastppo.distributed.world import start_world, stop_world
    from fastppo.models.parallel.group import choose_group
    from fastppo.models.roles import Policy, fuse_head

    ranks = int(os.environ["WORLD_SIZE"])
    choose_group(start_world(1, sequence=ranks).sequence)
    width, feed_forward, heads, key_heads = SHAPES[shape]
    config = AutoConfig.for_model(
        "llama",
        hidden_size=width,
        intermediate_size=feed_forward,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        num_hidden_layers=layers,
        vocab_size=2048,
    )
    policy = Policy(fuse_head(AutoModelForCausalLM.from_config(config)))
    packed = pack([[7] * length for length in LENGTHS], [1] * len(LENGTHS))
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    kept: dict[int, int] = {}

    def count(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.no_grad():
        policy.hidden(pack([[7, 7]], [1]))  # what is made once, such as connections between ranks
    with Anonymous() as memory, torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        states = policy.hidden(packed)
    assert states.requires_grad
    print("RESULT " + json.dumps({"kept": sum(kept.values()), "grown": memory.end}), flush=True)
    stop_world()


def measure(shape: str, layers: int, ranks: int) -> dict[str, int]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    fixed = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    argv = [sys.executable, __file__, "--shape", shape, "--layers", str(layers)]
    processes = [
        subprocess.Popen(
            argv,
            env=os.environ | fixed | AT_ONCE | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    found = []
    for process in processes:
        out, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"a rank failed\n{errors}")
        found += [json.loads(line.removeprefix("RESULT ")) for line in out.splitlines() if line.startswith("RESULT ")]
    return {name: max(one[name] for one in found) for name in ("kept", "grown")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--shape", choices=[*SHAPES], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.shape is not None:
        rank_of(args.shape, args.layers)
        return
    print(f"{args.layers} layers, sequences of {', '.join(map(str, LENGTHS))} tokens in one row, fp32")
    off = False
    for shape in SHAPES:
        alone = None
        for ranks in args.ranks:
            found = measure(shape, args.layers, ranks)
            alone = alone or found
            shares = {name: found[name] / alone[name] for name in found}
            figures = "  ".join(f"{name} {found[name] / 1e6:7.1f} MB {shares[name]:.3f}" for name in found)
            print(f"{shape:28} {ranks} ranks  {figures}", flush=True)
            off = off or abs(shares["kept"] * ranks / args.ranks[0] - 1) > WITHIN
    sys.exit(off)


if __name__ == "__main__":
    main()
