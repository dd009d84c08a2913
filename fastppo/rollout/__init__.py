"""Sampling: the actor writes a response to each prompt."""

from fastppo.rollout.inprocess import named_stop_ids, sample, stop_ids

__all__ = ["named_stop_ids", "sample", "stop_ids"]
