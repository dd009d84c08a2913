"""Feedback: one score for each whole response, from reward models, Python functions, patterns and remote services."""

from fastppo.rewards.responses import Responses, RewardError, Source
from fastppo.rewards.scoring import response_texts, score
from fastppo.rewards.sources import check_chats, load_functions, load_judge, load_sources

__all__ = [
    "Responses",
    "RewardError",
    "Source",
    "check_chats",
    "load_functions",
    "load_judge",
    "load_sources",
    "response_texts",
    "score",
]
