"""The settings of a run as frozen dataclasses, their validation, the command line, and the configuration of DeepSpeed.

Each field is documented by the string below it, which `--help` shows. The documentation of a quantity names its unit.
This package can be imported without torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
