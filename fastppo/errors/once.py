"""Log lines that a process writes once, however often their reason occurs."""

import logging
from functools import cache

log = logging.getLogger("fastppo")


@cache
def log_once(message: str, level: int = logging.INFO) -> None:
    """Log the message at its first call in this process; later calls with the same message do nothing."""
    log.log(level, message)
