"""Process-wide state, such as torch's default dtype, kept separately for each module of the user.

A function that turns gradients off, or sets the default dtype to fp64, changes that for the whole process, in which
learning continues. What a module or its functions change is therefore restored when they return, and applied again when
they are called the next time. Random generators are not part of this: the trainer does not use the global ones, and a
function continues their sequence.

A thread beside the trainer's cannot have what all threads share for itself: a module that changes it there is an error.
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
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    "detection of anomalies": _Setting(torch.is_anomaly_enabled, lambda on: torch.autograd.set_detect_anomaly(on)),
    "GPU": _Setting(_gpu, lambda gpu: None if gpu is None else torch.cuda.set_device(gpu)),
    "folder": _Setting(_folder, _enter_folder),
}
# Those of which each thread has its own; the others are the same in all threads.
OF_THREADS = ("gradients", "default device", "threads", "autocast", "autocast on CUDA", "GPU")


class SharedSettings(Exception):
    """In a thread beside the trainer's a module changes what all threads share; the text names it."""


class ModuleState:
    """The process-wide state of one module of the user."""

    def __init__(self) -> None:
        self._changed: dict[str, Any] = {}  # setting -> its value at the module's last return, if it differs

    @contextmanager
    def __call__(self, *, importing: bool = False) -> Iterator[None]:
        """Apply the module's state inside this context; then restore the trainer's state and its signal handlers.

        importing: start from the trainer's state instead, since the module is searched in the trainer's working
        directory, and add what the import changes to the module's state.
        """
        with torch.inference_mode(False):  # its exit also ends an inference mode that the module has left on
            before = {name: setting.read() for name, setting in SETTINGS.items()}
            previous = self._changed if importing else {}
            _apply({} if importing else self._changed, before)
            try:
                yield
            finally:
                self._changed = previous | restore(before)
                stop.listen()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """As calling it, in a thread that runs beside the trainer's: what the module changes of its thread is applied
        and restored. Raises SharedSettings if the module has changed, or changes here, what all threads share."""
        if shared := [name for name in self._changed if name not in OF_THREADS]:
            raise SharedSettings(", ".join(shared))
        with torch.inference_mode(False):
            before = {name: SETTINGS[name].read() for name in OF_THREADS}
            others = shared_settings()
            _apply(self._changed, before)
            try:
                yield
            finally:
                self._changed = restore(before)
                changed = restore(others)
        if changed:
            raise SharedSettings(", ".join(changed))


def shared_settings() -> dict[str, Any]:
    """The present value of each setting that all threads share."""
    return {name: setting.read() for name, setting in SETTINGS.items() if name not in OF_THREADS}


def restore(before: dict[str, Any]) -> dict[str, Any]:
    """Set settings back to the values that they had before; returns those that they have had instead."""
    after = {name: SETTINGS[name].read() for name in before}
    _apply(before, after)
    return {name: value for name, value in after.items() if value != before[name]}


def _apply(values: dict[str, Any], current: dict[str, Any]) -> None:
    """Set each setting whose value differs from the current one."""
    for name, value in values.items():
        if value != current[name]:
            SETTINGS[name].write(value)


@cache
def module_state(module: str) -> ModuleState:
    """The state of a module, given by its name or its file; the same object for the same module."""
    return ModuleState()
