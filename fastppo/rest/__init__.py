"""ReST: the actor grows responses and is fine-tuned on those that score well."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
