"""Modules that are imported when they are first used, so that the command line answers before PyTorch is there."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from inspect import getsource
from types import ModuleType
from typing import Any


def lazily(package: str) -> None:
    """Make a package import what its `if TYPE_CHECKING:` block names when it is first asked for (PEP 562).

    That block is the only list: type checkers read it as the imports that it holds, and so does this function.

    Args:
        package: Its `__name__`; called by its `__init__.py`.
    """
    module = sys.modules[package]
    homes: dict[str, tuple[str, str | None]] = {}
    for block in ast.parse(getsource(module)).body:
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING":
            for line in block.body:
                assert isinstance(line, ast.ImportFrom) and line.level == 1, "relative imports alone can be put off"
                for alias in line.names:
                    if line.module:
                        homes.setdefault(line.module, (line.module, None))
                    homes[alias.name] = (line.module, alias.name) if line.module else (alias.name, None)
    module.__dict__["_homes"] = homes
    module.__class__ = _Lazy


class _Lazy(ModuleType):
    """A package that knows where its names are made: by name the module, and the name there (`None`: the module)."""

    _homes: dict[str, tuple[str, str | None]]

    def __getattr__(self, name: str) -> Any:
        if name not in self._homes:
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        home, inner = self._homes[name]
        found = import_module(f".{home}", self.__name__)
        value = found if inner is None else getattr(found, inner)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Python sets a module that is imported on its package, also where a function has the module's name.
        if not isinstance(value, ModuleType) or self._homes.get(name, (name, None))[1] is None:
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._homes})


def when_imported(name: str, act: Callable[[], Any]) -> None:
    """Act once a module is imported: at once if it is, else right after its import, whoever makes it.

    Args:
        name: A top-level module.
        act: Called without arguments; what it raises leaves the import.
    """
    if name in sys.modules:
        act()
    else:
        sys.meta_path.insert(0, _Notice(name, act))


class _Notice:
    """A finder that leaves finding and loading to the others, and acts when the module has been loaded."""

    def __init__(self, name: str, act: Callable[[], Any]) -> None:
        self.name, self.act = name, act

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        others = (finder for finder in sys.meta_path if not hasattr(finder, "act"))  # two would ask each other forever
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_act(module: ModuleType) -> None:
                load(module)
                notices: list[Any] = [one for one in sys.meta_path if hasattr(one, "act")]
                for notice in (one for one in notices if one.name == name):
                    sys.meta_path.remove(notice)
                    notice.act()

            spec.loader.exec_module = load_and_act  # type: ignore[method-assign]
        return spec
