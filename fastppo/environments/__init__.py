"""Conversations of the actor with an environment of the user: its calls, its observations as tokens, and tool calls."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
