"""What model code of others raises, said in one sentence: whose it is, what it says, and where.

Hundreds of architectures run here that nobody has tried, on configs that nobody has seen: what theirs raises is for the
user to read, and what ours raises is a fault of ours and goes on as it is.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers

import fastppo
from fastppo.errors import FastPPOError, ModelError

OURS, THEIRS = Path(fastppo.__file__).parent, Path(transformers.__file__).parent


class ModelCodeError(ModelError):
    """The code of a model failed. The message names the model, what it was doing and what it raised."""


@contextmanager
def model_code(name: str, doing: str, way: str) -> Iterator[None]:
    """Within this context a model's code runs; what it raises becomes a ModelCodeError.

    name: of the model; doing, way: the message's middle, after "cannot be", and its end.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, FastPPOError) or not raised_by_a_model(error):
            raise
        raise ModelCodeError(f"{name} cannot be {doing}: its code raises {said(error)}{where(error)}. {way}") from error


def raised_by_a_model(error: Exception) -> bool:
    """Whether the innermost frame that is ours or transformers' is theirs. What torch's hooks call is torch's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.name.startswith("__torch_")]
    places = [Path(frame.filename) for frame in frames]
    known = [place for place in places if OURS in place.parents or THEIRS in place.parents]
    return bool(known) and THEIRS in known[-1].parents


def where(error: Exception) -> str:
    """The place in transformers that raised an error, behind a blank; empty if it was no model's code."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if THEIRS in Path(f.filename).parents]
    return "" if not frames else f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}"


def said(error: BaseException) -> str:
    """The type of an error and the first line of what it says, on one line."""
    first = next(iter(str(error).strip().splitlines()), "").rstrip(". ")
    return f"{type(error).__name__} ({first})" if first else type(error).__name__
