"""Learning from data that is given: SFT, reward modelling and what comes to them, each an objective of one loop."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
