"""Process-wide state, which a user's function may change for itself alone.

A function that switches gradients off, or the default dtype to fp64, changes them for the whole process, and learning
goes on in it. What a module or its functions change is taken back when they return and is theirs again when they are
called. Random generators are left out: nothing of the run draws from them, and a function goes on in their row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, NamedTuple

import torch

from fastppo.distributed import stop


class _Setting(NamedTuple):
    read: Callable[[], Any]
    write: Callable[[Any], object]


def _autocast(device: str) -> _Setting:
    return _Setting(lambda: torch.is_autocast_enabled(device), lambda on: torch.set_autocast_enabled(device, on))


def _folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was deleted
        return None


def _enter_folder(path: str | None) -> None:
    with suppress(OSError):
        if path is not None:
            os.chdir(path)


def _gpu() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


SETTINGS = {
    "gradients": _Setting(torch.is_grad_enabled, lambda on: torch.set_grad_enabled(on)),
    "default dtype": _Setting(torch.get_default_dtype, torch.set_default_dtype),
    "default device": _Setting(
        torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)
    ),
    "threads": _Setting(torch.get_num_threads, torch.set_num_threads),
    "autocast": _autocast("cpu"),
    "autocast on CUDA": _autocast("cuda"),
    "precision of fp32 products": _Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "deterministic algorithms": _Setting(
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda said: torch.use_deterministic_algorithms(said[0], warn_only=said[1]),
    ),
    "detection of anomalies": _Setting(torch.is_anomaly_enabled, lambda on: torch.autograd.set_detect_anomaly(on)),
    "GPU": _Setting(_gpu, lambda gpu: None if gpu is None else torch.cuda.set_device(gpu)),
    "folder": _Setting(_folder, _enter_folder),
}


class Apart:
    """The state as one module of the user's has it."""

    def __init__(self) -> None:
        self._theirs: dict[str, Any] = {}  # what they changed, as they left it

    @contextmanager
    def __call__(self, *, importing: bool = False) -> Iterator[None]:
        """Within this context the state is theirs; then it is as it was, and the run hears signals as before.

        importing: the state begins as the run's, in whose folder the module is looked for, and what it sets is added.
        """
        with torch.inference_mode(False):  # its end takes back an inference mode that was left on, and their gradients
            before = {name: setting.read() for name, setting in SETTINGS.items()}
            kept = self._theirs if importing else {}
            _write({} if importing else self._theirs, before)
            try:
                yield
            finally:
                after = {name: setting.read() for name, setting in SETTINGS.items()}
                self._theirs = kept | {name: value for name, value in after.items() if value != before[name]}
                _write(before, after)
                stop.listen()


def _write(wanted: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if value != now[name]:
            SETTINGS[name].write(value)


@cache
def apart(module: str) -> Apart:
    """Of a module, by its name or by its file."""
    return Apart()
