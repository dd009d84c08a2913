"""Sources of reward, from reward models to reference answers and remote services, and the score of a response."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
