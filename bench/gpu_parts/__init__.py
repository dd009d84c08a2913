"""The parts of `bench/gpu.py`, a module each with a function `run(report)` that writes what it finds as it finds it."""
