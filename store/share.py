"""Fragments and lists from one store to another: whole, checked on the way, each once."""

from __future__ import annotations

from collections.abc import Callable

from pmm import StoreCorrupt
from pmm.store import fragment as fragments
from pmm.store.catalog import Store
from pmm.store.fragment import Fragment


def copy_fragment(
    source: Store, fragment: Fragment, target: Store, passed: Callable[[int], None] = lambda size: None
) -> Fragment:
    """The live copy of ``fragment`` in ``target``, made at a fresh location if there is none.

    Every byte is checked against the record while it is copied; ``passed`` hears of each block's size.
    Raises StoreCorrupt or NotFound, with nothing added, if the source is not as its record says. A
    broken copy in ``target`` counts until it is marked as damaged.
    """
    for held in target.fragments():
        if held.id == fragment.id:
            return held
    return _copy(source, fragment, target, passed)


def _copy(source: Store, fragment: Fragment, target: Store, passed: Callable[[int], None]) -> Fragment:
    spec = source.specs.get(fragment.spec_id) or target.specs.get(fragment.spec_id)
    if spec is None:
        raise StoreCorrupt(f"specs/{fragment.spec_id}.json is missing or damaged; run `pmm store verify`")
    return target.announce(spec, lambda: fragments.copy(source.medium, fragment, target.medium, passed))
