"""A module's class with other functions: everything else of the module stays as it is.

Names of parameters, children, hooks, the name of the class and `isinstance` do not change, so neither do exports, LoRA
adapters, ZeRO-3 and activation checkpointing. The functions belong to a class and not to the module, so a module can
be copied and pickled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn

Functions = Callable[[Any], Mapping[str, Callable[..., Any]]]  # a module's own class -> functions by name


def replace_functions(module: nn.Module, functions: Functions) -> None:
    """Give the module a subclass of its class with these functions. functions: a function of a module, for pickling."""
    own: Any = type(module)
    module.__class__ = with_functions(own, functions)


def is_changed(module: nn.Module) -> bool:
    """Whether `replace_functions` has changed the module's class."""
    return hasattr(module, "own_class")


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, or the one that it had before `replace_functions`."""
    own: type[nn.Module] = getattr(module, "own_class", type(module))
    return own


@cache
def with_functions(own: Any, functions: Functions) -> Any:
    """The subclass of `own` with these functions, under its name; `own_class` is `own`."""
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    members = {"own_class": own, "made_by": staticmethod(functions), "__reduce__": _reduce}
    return type(own.__name__, (own,), names | members | dict(functions(own)))


def _reduce(module: Any) -> tuple[Any, ...]:
    """For copy and pickle: the subclass has the name of its base, so it is made again and not looked up by name."""
    return _restored, (module.own_class, module.made_by), module.__dict__


def _restored(own: Any, functions: Functions) -> Any:
    kind = with_functions(own, functions)
    return kind.__new__(kind)


def shell(module: nn.Module, children: Mapping[str, nn.Module], weights: Iterable[tuple[str, Tensor]] = ()) -> Any:
    """A copy of the module alone, with other children and parameters, and without its hooks."""
    other = copy.copy(module)
    vars(other).update(
        _modules=dict(vars(module)["_modules"]) | dict(children),
        _parameters={name: nn.Parameter(weight) for name, weight in weights},
        _forward_hooks={},
        _forward_pre_hooks={},
    )
    return other


def weighted_children(module: nn.Module) -> list[str]:
    """Names of the children with parameters; the others are activations and the like."""
    return [name for name, child in module.named_children() if any(True for _ in child.parameters())]


def is_plain(module: nn.Module) -> bool:
    """Whether the module has no parameters and buffers beside those of its children, and no child that is random."""
    own = any(True for part in (module.parameters, module.buffers) for _ in part(recurse=False))
    return not own and not any(isinstance(child, nn.Dropout) and child.p > 0 for child in module.children())
