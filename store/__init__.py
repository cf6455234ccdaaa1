"""The cache a team shares: identities, immutable Zarr fragments, and what is known of them.

``Store`` and its companions are fetched on first use, so that ``pmm.store.clock`` and its like cost
nothing to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pmm.store.catalog import Failure, Store

__all__ = ["Failure", "Store"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from pmm.store import catalog

        return getattr(catalog, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
