"""Where functions of the user run, what they are given, and what keeps them from changing the process they run in."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
