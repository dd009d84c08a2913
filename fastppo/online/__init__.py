"""What methods share whose actor learns from responses of its own: their set-up, evaluation, progress and alarms."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
