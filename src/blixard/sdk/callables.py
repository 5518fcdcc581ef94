"""From what a program calls to a function that a worker can find by its name, and its arguments."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping

from blixard.errors import InvalidRequest


def unwrap(
    function: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> tuple[Callable[..., object], tuple[object, ...], dict[str, object]]:
    """Return the named function behind partials and bound methods, with the arguments that they hold put first.

    Raises ``InvalidRequest`` for what is no function, and for one that its name does not lead to.
    """
    merged = dict(kwargs)
    while isinstance(function, functools.partial):
        args, merged = (*function.args, *args), {**function.keywords, **merged}
        function = function.func
    if inspect.ismethod(function) and not isinstance(function.__self__, type):
        args, function = (function.__self__, *args), function.__func__
    if not callable(function):
        raise InvalidRequest(
            f"{function!r} cannot be called", field="function", hint="pass a function, then its arguments"
        )
    _check_found_by_name(function)
    return function, args, merged


def _check_found_by_name(function: Callable[..., object]) -> None:
    """Refuse what a worker would not find, or find another thing in the place of. The bundler words the usual mistakes."""
    module, path = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(path, str) or "<" in path:
        return
    found: object = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    found = getattr(found, "__blixard_function__", found)
    # Equal, not the same: a method of a class is made anew each time it is looked up.
    if found != function:
        raise InvalidRequest(
            f"{module}:{path} is not the function that was passed, so a worker would not find it",
            field="function",
            hint="pass a function by the name that it has at the top level of its file",
        )
