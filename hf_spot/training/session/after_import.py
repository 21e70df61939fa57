"""Calls a function as soon as a module has been imported."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function as soon as a module has been imported.

    Args:
        name: of the module.
        act: called once.
    """

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self._name = name
        self._act = act

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec that the standard finder finds, with a loader that also calls the function."""
        if name != self._name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            exec_module = loader.exec_module

            def exec_and_act(module: ModuleType) -> None:
                if self in sys.meta_path:  # not before: whoever only looks whether there is such a module asks for its spec
                    sys.meta_path.remove(self)
                exec_module(module)
                self._act()

            loader.exec_module = exec_and_act
        return spec
