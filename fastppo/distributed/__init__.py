"""The processes of a run: ranks, DeepSpeed engines, the parts in GPU memory in each phase, and signals to stop."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
