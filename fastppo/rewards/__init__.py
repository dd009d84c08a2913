"""One score for each whole response, from reward models, Python functions, patterns and remote services."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
