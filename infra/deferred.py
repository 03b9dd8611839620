"""Commands whose work is imported when they are called: listing and explaining them, and refusing an option that is
mistyped, takes no torch, Ray or MLflow."""

import importlib
from collections.abc import Callable
from typing import Any

from infra.ending import ending


def deferred(target: str) -> Callable[..., Any]:
    """What calls `module:function` with the options it is given, and imports the module first. Whatever is raised
    meanwhile ends the process in a line and an exit status (`infra.ending`), but for exits and errors of click."""
    module, _, function = target.partition(":")

    def call(**options: Any) -> Any:
        with ending():
            return getattr(importlib.import_module(module), function)(**options)

    return call
