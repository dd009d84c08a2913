"""fastppo: PPO for language models on one node."""

__version__ = "0.1.0"
