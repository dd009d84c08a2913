"""Exceptions of model code in transformers, reported in one sentence: the model, the exception and its place.

Users may give any of hundreds of architectures with any config. An exception of the model's code is reported to the
user; an exception of fastppo's code is a bug and is raised unchanged.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers

import fastppo
from fastppo.errors import FastPPOError, ModelError

FASTPPO, TRANSFORMERS = Path(fastppo.__file__).parent, Path(transformers.__file__).parent


class ModelCodeError(ModelError):
    """The code of a model failed. The message names the model, the operation and the exception."""


@contextmanager
def model_code(name: str, doing: str, way: str) -> Iterator[None]:
    """Within this context, turn exceptions of a model's code into ModelCodeError.

    name: of the model; doing: the part of the message after "cannot be"; way: the way out, its end.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, FastPPOError) or not raised_by_a_model(error):
            raise
        raised = f"{summary_of(error)}{place_of(error)}"
        raise ModelCodeError(f"{name} cannot be {doing}: its code raises {raised}. {way}") from error


def raised_by_a_model(error: Exception) -> bool:
    """Whether, of the frames in fastppo and transformers, the innermost is in transformers.

    Frames of fastppo's `__torch_...__` methods are ignored, because torch calls them.
    """
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.name.startswith("__torch_")]
    files = [Path(frame.filename) for frame in frames]
    known = [file for file in files if FASTPPO in file.parents or TRANSFORMERS in file.parents]
    return bool(known) and TRANSFORMERS in known[-1].parents


def place_of(error: Exception) -> str:
    """File and line in transformers that raised an error, as " in FILE, line N"; empty if none of its frames did."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if TRANSFORMERS in Path(f.filename).parents]
    return "" if not frames else f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}"


def summary_of(error: BaseException) -> str:
    """The type of an error and the first line of its message, on one line."""
    first = next(iter(str(error).strip().splitlines()), "").rstrip(". ")
    return f"{type(error).__name__} ({first})" if first else type(error).__name__
