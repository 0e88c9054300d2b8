"""offramp: a compiler and a runtime for early-exit neural networks.

Importing the package imports nothing else: `offramp --help` has no time for numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offramp.policy import Policy

    __version__: str

__all__ = ["Policy", "__version__"]


def __getattr__(name: str) -> object:
    if name == "Policy":
        from offramp.policy import Policy

        return Policy
    if name == "__version__":
        from importlib.metadata import version

        return version("offramp")
    raise AttributeError(f"module 'offramp' has no attribute {name!r}")
