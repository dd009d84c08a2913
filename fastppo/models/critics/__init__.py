"""The value function as a model on disk: as transformers loads it, written after a run and read before another one."""
