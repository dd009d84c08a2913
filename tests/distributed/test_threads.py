"""How OpenMP's threads wait, which is decided before torch is imported, and how malloc keeps memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of this process's world
TUNED = ("OMP_NUM_THREADS", "GLIBC_TUNABLES", "PYTHONMALLOC", "THP_MEM_ALLOC_ENABLE")  # of this process, by `make test`
LOOK = f"import os, sys, fastppo; print('torch' in sys.modules, *(os.environ.get(name) for name in {NAMES}))"
# Short work of two threads, and pauses in which the second has nothing to do.
PAUSES = """
import time, fastppo, torch
torch.set_num_threads(2)
ones, out = torch.ones(1 << 18), torch.empty(1 << 18)
torch.add(ones, ones, out=out)
start = time.process_time()
for _ in range(300):
    torch.add(ones, ones, out=out)
    time.sleep(2e-3)
print(time.process_time() - start)
"""
# Page faults of tensors that were allocated and freed before, three times: until then the heap may still grow.
AGAIN = """
import resource, torch
from fastppo.distributed.world import start_world, stop_world

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def allocate():
    tensors = [torch.ones(1 << 22) for _ in range(20)]  # 16 MiB each

start_world(1)
for _ in range(3):
    allocate()
before = faults()
allocate()
print(faults() - before)
"""
# Page faults of tensors that are too small for torch to ask for large pages.
TOUCHED = """
import resource, torch
from fastppo.distributed.world import start_world, stop_world

start_world(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
tensors = [torch.ones(1 << 18) for _ in range(200)]  # 1 MiB each
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ON_CPU = pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="with a GPU the library's own bound stays")


def seen(code: str, **environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if name not in (*NAMES, *LAUNCHED, *TUNED)}
    run = subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@ON_CPU
def test_the_bound_is_there_before_torch_is():
    import fastppo

    assert seen(LOOK) == ["False", fastppo.SPINS, "None"]


@pytest.mark.parametrize(
    ("environment", "words"),
    [({"GOMP_SPINCOUNT": "7"}, ["7", "None"]), ({"OMP_WAIT_POLICY": "passive"}, ["None", "passive"])],
)
def test_what_the_user_has_set_stays(environment, words):
    assert seen(LOOK, **environment)[1:] == words


@ON_CPU
@pytest.mark.parametrize(("environment", "word"), [({}, "1"), ({"THP_MEM_ALLOC_ENABLE": "0"}, "0")])
def test_torch_asks_for_large_pages_unless_the_user_says_otherwise(environment, word):
    assert seen("import os, fastppo; print(os.environ['THP_MEM_ALLOC_ENABLE'])", **environment) == [word]


@pytest.mark.slow
@ON_CPU
def test_threads_that_wait_take_little_time_from_others():
    """In seconds of the processor, which other work beside it does not stretch."""
    bounded, as_ever = (float(seen(PAUSES, **environment)[0]) for environment in ({}, {"GOMP_SPINCOUNT": "300000"}))
    assert bounded < as_ever / 2


@ON_CPU
def test_memory_that_was_freed_is_kept_for_the_next_microbatch():
    kept, as_set_by_the_user = (int(seen(AGAIN, **x)[-1]) for x in ({}, {"MALLOC_MMAP_THRESHOLD_": "65536"}))
    assert kept < as_set_by_the_user / 2


@ON_CPU
@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[madvise]" not in LARGE_PAGES.read_text(), reason="the system gives none on request"
)
def test_the_memory_of_small_tensors_comes_in_large_pages():
    large, as_set_by_the_user = (int(seen(TOUCHED, **x)[-1]) for x in ({}, {"MALLOC_MMAP_THRESHOLD_": "65536"}))
    assert large < as_set_by_the_user / 20


@ON_CPU
def test_freed_memory_is_kept_where_the_user_asks_for_large_pages_alone():
    kept, tuned = (
        int(seen(AGAIN, GLIBC_TUNABLES=f"glibc.malloc.{x}")[-1]) for x in ("hugetlb=1", "mmap_threshold=65536")
    )
    assert kept < tuned / 2
