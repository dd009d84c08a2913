"""Errors that a user can correct, faults in the user's own code, and lines that are logged once."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
