"""Triton's interpreter without half of its work: for every function that a kernel calls, it replaces the functions of
`triton.language` again, though they are replaced since the kernel was launched."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter

replace_language = interpreter._patch_lang
replaced: set[str] = set()  # modules of the language whose functions are replaced until the launch that runs ends


def replace_once(function: Any) -> Any:
    """What `triton.runtime.interpreter._patch_lang` does, for modules that the launch has not come across."""
    modules = {x.__name__ for x in function.__globals__.values() if x is tl or x is tl.core}
    if modules and modules <= replaced:
        return interpreter._LangPatchScope()  # with nothing to restore
    scope = replace_language(function)
    if not replaced:  # the kernel's own, the only one that is restored
        restore = scope.restore

        def restore_all() -> None:
            replaced.clear()
            restore()

        scope.restore = restore_all
    replaced.update(modules)
    return scope


def replace_the_language_once_a_launch() -> None:
    """Serves all launches of this process from now on. What a kernel computes is the same."""
    interpreter._patch_lang = replace_once
