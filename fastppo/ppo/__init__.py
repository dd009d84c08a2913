"""PPO: experience from scored responses, clipped updates, schedules, evaluation, and what is done about alarms."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
