"""Anonymous resident memory of this process, and a model to measure its loading by."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from types import TracebackType

import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

MB = 10**6


def anonymous() -> int:
    """Bytes of this process that belong to no file: what a rank holds, where mapped files are the page cache's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon; this needs Linux 4.5 or later")


class Anonymous:
    """Within this context a thread samples `anonymous`; afterwards `peak` and `end` are bytes over the beginning."""

    def __enter__(self) -> Anonymous:
        gc.collect()
        self._before = self._most = anonymous()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        gc.collect()
        self.end = anonymous() - self._before
        self.peak = max(self._most - self._before, self.end)

    def _sample(self) -> None:
        while not self._over.wait(0.002):
            self._most = max(self._most, anonymous())


def saved_llama(folder: Path, megabytes: int, dtype: torch.dtype = torch.bfloat16) -> str:
    """A random Llama of about this size in several files, none of whose tensors is above 5% of it; returns its path."""
    width = 512 if megabytes >= 200 else 256
    layer = (4 * width**2 + 3 * width * 3 * width + 2 * width) * dtype.itemsize
    config = AutoConfig.for_model(
        "llama",
        hidden_size=width,
        intermediate_size=3 * width,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        num_hidden_layers=max(16, round(megabytes * MB / layer)),
        vocab_size=512,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    total = model.num_parameters()
    assert max(p.numel() for p in model.parameters()) <= 0.05 * total
    model.save_pretrained(folder, max_shard_size=megabytes * MB // 4)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)
