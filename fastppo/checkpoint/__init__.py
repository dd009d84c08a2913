"""Checkpoints that resume bit for bit, and the export of the trained model as a Hugging Face directory."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
