"""What vLLM raises for what it cannot do, as errors that say what the user can do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastppo.errors import ANOTHER_RANK_ENDED, FastPPOError
from fastppo.rollout.answers import SamplerError

# What vLLM raises for settings and models that it cannot work with; errors of pydantic are ValueErrors.
REFUSALS = (ValueError, RuntimeError, AssertionError, NotImplementedError, KeyError, TypeError, ImportError, OSError)
WAY = "Set rollout.engine to inprocess for this model."


@contextmanager
def explained(version: str, refusal: str) -> Iterator[None]:
    """Within this context vLLM computes; what it raises becomes a SamplerError that says what it refused to do."""
    try:
        yield
    except (FastPPOError, torch.OutOfMemoryError):  # the end of a run explains the latter
        raise
    except REFUSALS as error:
        if is_of_another_rank(error):
            raise
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
        raise SamplerError(f"vLLM {version} {refusal}: {said}. {WAY}") from error


def is_of_another_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank has ended, which has said why."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ANOTHER_RANK_ENDED)
