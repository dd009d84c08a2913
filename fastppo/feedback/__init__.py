"""Feedback: one score for each whole response, from reward models, Python functions, patterns and remote services."""

from fastppo.feedback.responses import Responses, RewardError, Source
from fastppo.feedback.score import response_texts, score
from fastppo.feedback.sources import check_chats, load_functions, load_judge, load_sources

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
