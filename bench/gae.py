"""Compare GAE on the CPU with its targets: `python bench/gae.py [ROUNDS]`. Medians of paired rounds.

512 sequences of 1 to 2,000 tokens, and one sequence of 4,000,000 tokens compared with 4,000 of 1,000. The ceiling is
memory: 16 bytes per token at the bandwidth of torch.add(a, b, out=c). The last line is JSON.

With `--gpu`: the bandwidth on the GPU over 64,000,000 tokens, compared with torch.add.
"""

import functools
import json
import os
import resource
import statistics
import sys
import time

os.environ.setdefault("OMP_PROC_BIND", "true")  # else two threads might share a core

import gae_baselines as baselines
import torch
from ceilings import median_seconds

from fastppo import ops

GAMMA, LAM = 0.99, 0.95
# Title, the two cases whose times are divided, and the ratio that is the target.
TARGETS = [
    ("padded PyTorch loop / fastppo, 2 threads", "padded loop", "fastppo, 2 threads", 25.0),
    ("plain -O3 loop / fastppo, 1 thread", "plain loop", "fastppo, 1 thread", 3.0),
    ("bandwidth / torch.add's, 2 threads", "torch.add, 2 threads", "fastppo, 2 threads", 0.6),
    ("4,000 sequences / one, of 4,000,000 tokens", "4,000 sequences", "one sequence", 1 / 1.5),
]


def cases():
    """name -> (threads, repetitions in a round, call)"""
    torch.manual_seed(0)
    lengths = torch.randint(1, 2001, (512,)).tolist()
    rewards, values, starts = baselines.packed(lengths)
    tokens = len(rewards)
    wide = [baselines.padded(x, starts) for x in (rewards, values)]
    outputs = torch.empty(tokens), torch.empty(tokens)
    a, b, c = (torch.randn(tokens * 16 // 12) for _ in range(3))
    long_rewards, long_values, many = baselines.packed([1000] * 4000)
    one = torch.tensor([0, len(long_rewards)])
    plain = baselines.plain_loop()

    def gae(*packed):
        return lambda: ops.gae(*packed, gamma=GAMMA, lam=LAM)

    return tokens, {
        "fastppo, 2 threads": (2, 20, gae(rewards, values, starts)),
        "torch.add, 2 threads": (2, 20, lambda: torch.add(a, b, out=c)),
        "padded loop": (2, 1, lambda: baselines.padded_loop(*wide, GAMMA, LAM)),
        "fastppo, 1 thread": (1, 20, gae(rewards, values, starts)),
        "plain loop": (1, 5, lambda: plain(rewards, values, starts, GAMMA, LAM, *outputs)),
        "one sequence": (2, 3, gae(long_rewards, long_values, one)),
        "4,000 sequences": (2, 3, gae(long_rewards, long_values, many)),
    }


def interruptions():
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def seconds(threads, repetitions, call):
    """The median over several calls, without those during which another program used a core."""
    torch.set_num_threads(threads)
    call()
    quiet, others = [], []
    while len(quiet) < repetitions and len(others) < 3 * repetitions:
        before, start = interruptions(), time.perf_counter()
        call()
        taken = time.perf_counter() - start
        (quiet if interruptions() == before else others).append(taken)
    return statistics.median(quiet or others)


def on_gpu() -> None:
    """Bytes that must be moved, divided by the time between CUDA events. Median of 20 calls."""
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}; fp32 unless said")
    a, b, c = (torch.randn(1 << 27, device=device) for _ in range(3))
    add = 12 * len(a) / median_seconds(lambda: torch.add(a, b, out=c), device, 20)
    print(f"{'torch.add':44} {add / 1e9:8,.0f} GB/s")
    result = {"torch.add": add / 1e9}
    for name, length in (("sequences of 1,000", 1_000), ("sequences of 8,000", 8_000), ("one sequence", 64_000_000)):
        rewards, values, starts = (x.to(device) for x in baselines.packed([length] * (64_000_000 // length)))
        mask = torch.rand(len(rewards), device=device) < 0.9
        for kind, options in {"": {}, ", mask": {"mask": mask}, ", bf16": {}}.items():
            packed = (rewards.bfloat16(), values.bfloat16()) if kind == ", bf16" else (rewards, values)
            moved = len(rewards) * (2 * packed[0].element_size() + 8 + len(options))
            call = functools.partial(ops.gae, *packed, starts, gamma=GAMMA, lam=LAM, **options)
            speed = moved / median_seconds(call, device, 20)
            result[name + kind] = speed / 1e9
            print(f"{name + kind:44} {speed / 1e9:8,.0f} GB/s, {speed / add:.2f} of torch.add's", flush=True)
    print(json.dumps(result))


def main(rounds: int) -> None:
    tokens, measured = cases()
    times = {name: [] for name in measured}
    for _ in range(rounds):
        for name, case in measured.items():
            times[name].append(seconds(*case))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, median in medians.items():
        print(f"{name:24} {1e3 * median:9.3f} ms")
    ratios = {}
    for title, base, ours, target in TARGETS:
        ratios[title] = statistics.median(x / y for x, y in zip(times[base], times[ours], strict=True))
        print(f"{title:46} {ratios[title]:8.2f}  (target {target:.2f})")
    bandwidth = 16 * tokens / medians["fastppo, 2 threads"] / 1e9
    print(json.dumps({"tokens": tokens, "GB/s": bandwidth, "seconds": medians, "ratios": ratios}))


if __name__ == "__main__":
    if "--gpu" in sys.argv:
        on_gpu()
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
