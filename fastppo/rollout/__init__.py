"""Sampling: the actor writes a response to each prompt."""

from fastppo.rollout.inprocess import sample, stop_ids

__all__ = ["sample", "stop_ids"]
