"""fastppo: PPO for language models on one node."""

import os

# When a rank ends, torch's C++ prints a page of stack frames on each of the others, above the message that says why.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

__version__ = "0.1.0"
