"""Settings of every test: no network, few threads, property tests that repeat."""

import os

# Before torch is imported. Workers of pytest-xdist share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Triton's kernels run on the CPU then. It is read when triton is first imported; nothing else here runs any.
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("fastppo", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("fastppo")
