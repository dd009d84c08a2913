"""The memory of a run, computed before anything loads."""
