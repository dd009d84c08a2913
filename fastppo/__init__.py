"""fastppo: PPO for language models on one node."""

import os
from pathlib import Path

# When a rank ends, torch's C++ prints a page of stack frames on each of the others, above the message that says why.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# Read by GNU OpenMP when torch is imported. Threads that wait for the slowest of them spin, and where other work has
# the cores they take them from the very thread that they wait for. So many turns are enough for threads that run side
# by side; then they sleep (bench/loaded.py measures both). What is computed does not depend on it. A machine with a
# GPU computes there, and keeps the library's own bound.
SPINS = "1000"

if not Path("/dev/nvidiactl").exists():
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    # Read by torch at its first large tensor: pages of 2 MB instead of 4 KB. Each tensor of a step is memory new to the
    # process, and in a virtual machine the first touch of a page of either size can take 5 to 30 microseconds: half of
    # a step of the quickstart's SFT (4.8 s, and 2.5 s with it).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
