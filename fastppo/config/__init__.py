"""The settings of a run, as frozen dataclasses; their validation, the command line, and what DeepSpeed is told.

Each field is documented by the string below it, which `--help` shows. A field that holds a quantity names its unit.
Importing this needs no torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
