"""Objects named on the command line as ``module.path:callable``. Calling one runs the user's code: trusted input."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from quiesce.errors import QuiesceError, nearest_name

DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@contextmanager
def working_folder_importable() -> Iterator[None]:
    """Let modules in the working folder be imported, as ``python -m`` does."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):  # the user's code may have removed it
            sys.path.remove(folder)


def call_dotted(spec: str, error_class: type[QuiesceError], **offered: Any) -> object:
    """Import ``module.path:callable`` (the working folder counts) and return what calling it gives.

    Of the ``offered`` arguments it gets those that it has parameters for, by name; others it must do without.

    Raises:
        QuiesceError: of class ``error_class``: no such module or name, or the code raised.
    """
    module_name, name = spec.split(":")
    with working_folder_importable():
        try:
            importlib.invalidate_caches()
            module = importlib.import_module(module_name)
        except Exception as error:
            raise error_class(f"module {module_name!r} of {spec!r} can't be imported ({_short(error)}).") from error
        if not hasattr(module, name):
            public = [n for n in vars(module) if not n.startswith("_")]
            raise error_class(f"module {module_name!r} has no {name!r}.{nearest_name(name, public)}")
        called = getattr(module, name)
        given = {key: value for key, value in offered.items() if key in _parameters(called)}
        try:
            return called(**given)
        except Exception as error:
            shown = ", ".join(f"{key}={value!r}" for key, value in given.items())
            shown = f"with {shown}" if given else "without arguments"
            raise error_class(f"calling {spec!r} {shown} raised {_short(error)}.") from error


def _parameters(called: Any) -> frozenset[str]:
    """Return the names of the parameters that can be given by keyword; of what does not tell them, none."""
    try:
        parameters = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):
        return frozenset()
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
