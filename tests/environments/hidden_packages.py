"""Imports a module in a process that finds no packages but some: `MODULE PACKAGE ...`."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import re
import sys
from types import ModuleType
from typing import Any

PACKAGES = importlib.metadata.packages_distributions()


class Finder(importlib.machinery.PathFinder):
    """Finds modules of no package (of Python, of this repository) and of the packages that are left."""

    left: frozenset[str] = frozenset()

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        packages = {re.sub("[-_.]+", "-", package).lower() for package in PACKAGES.get(name.split(".")[0], ())}
        return None if packages and not packages & cls.left else super().find_spec(name, path, target)


if __name__ == "__main__":
    module, *left = sys.argv[1:]
    Finder.left = frozenset(left)
    sys.meta_path[:] = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
    importlib.import_module(module)
