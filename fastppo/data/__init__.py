"""The data of a run: packed batch types, microbatches, tables, prompts, examples, conversations."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
