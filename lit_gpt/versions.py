"""The versions that a result depends on besides its settings, for provenance records."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("lit-grow", "torch", "lightning-fabric", "numpy", "sentencepiece")


def versions(*more: str) -> dict[str, str]:
    """Of Python and of the packages that take part; `more` are others that did."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
