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
if not Path("/dev/nvidiactl").exists() and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)

__version__ = "0.1.0"
