"""Monitoring a run: health figures and alarms, metrics, samples, and the files of its folder.

Code that only reads a run's files can import this package without torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
