"""The packages of the `report` extra: asked for when something is drawn, never before."""

from __future__ import annotations

from importlib import import_module


def require(what: str, *packages: str) -> None:
    """Import the packages that `what` needs.

    Raises:
        ValueError: one is not installed.
    """
    for package in packages:
        try:
            import_module(package)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{what} needs {error.name}, which is not installed; install the `report` extra: "
                f"pip install 'lit-grow[report]'"
            ) from error
