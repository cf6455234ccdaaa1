"""Who trains, who validates, who is tested.

An *identity* is one person, whatever folders or names their takes came under: (dataset, subject)
labels that share a clip are the same identity. Splits are made by identity, so nobody is on two
sides, and no clip is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pmm import BadInput
from pmm.store.clip import Take
from pmm.store.digest import digest

PROTOCOLS = ("cross-subject",)
PARTS = ("train", "validation", "test")

Part = Mapping[str, tuple[Take, ...]]
"""Identities, each with its takes, in a fixed order."""

Label = tuple[str, str]  # (dataset, subject)


@dataclass(frozen=True)
class Split:
    """Three parts that share no identity."""

    train: Part
    validation: Part
    test: Part

    def __getitem__(self, part: str) -> Part:
        if part not in PARTS:
            raise BadInput(f"part {part!r} is none of {', '.join(PARTS)}")
        return {"train": self.train, "validation": self.validation, "test": self.test}[part]

    def to_json(self) -> dict[str, dict[str, list[str]]]:
        """Identities and take ids by part."""
        return {
            part: {who: [take.id for take in takes] for who, takes in self[part].items()} for part in PARTS
        }


def identities(takes: Sequence[Take]) -> dict[str, tuple[Take, ...]]:
    """Takes by identity, in the order of their names; a clip with one face track counts once.

    An identity goes by the subject that most of its takes name, or dataset/subject where two would
    be alike.
    """
    count = Counter((take.dataset, take.subject) for take in takes)
    groups = {min(labels, key=lambda label: (-count[label], label)): labels for labels in _connected(takes)}
    subjects = Counter(subject for _, subject in groups)
    named: dict[str, tuple[Take, ...]] = {}
    for label, labels in groups.items():
        name = label[1] if subjects[label[1]] == 1 else "/".join(label)
        own = sorted((t for t in takes if (t.dataset, t.subject) in labels), key=lambda take: take.id)
        named[name] = tuple({(take.clip.id, take.target): take for take in reversed(own)}.values())[::-1]
    return dict(sorted(named.items()))


def _connected(takes: Sequence[Take]) -> list[set[Label]]:
    """Groups of labels linked by a common clip (union-find over labels)."""
    parent: dict[Label, Label] = {}

    def root(label: Label) -> Label:
        while parent.setdefault(label, label) != label:
            parent[label] = label = parent[parent[label]]
        return label

    first: dict[str, Label] = {}
    for take in takes:
        label = (take.dataset, take.subject)
        parent[root(label)] = root(first.setdefault(take.clip.id, label))
    groups: dict[Label, set[Label]] = {}
    for label in parent:
        groups.setdefault(root(label), set()).add(label)
    return list(groups.values())


def cross_subject(takes: Sequence[Take], seed: int) -> Split:
    """60 / 20 / 20 % of the identities to train, validate and test, at random by ``seed``.

    Validation and test hold at least one identity each. Takes without a face track are left out.
    Raises BadInput with fewer than three identities.
    """
    everyone = identities(takes)
    people = {name: with_face for name in everyone if (with_face := _with_face(everyone[name]))}
    if len(people) < 3:
        raise BadInput(
            f"{len(people)} subjects with a face track were found ({', '.join(people) or 'none'}); the "
            "cross-subject protocol needs at least 3, one each to train, validate and test: precompute more"
        )
    order = sorted(people, key=lambda name: digest("split", {"seed": seed, "identity": name}))
    held = max(1, (2 * len(order) + 5) // 10)
    parts = order[2 * held :], order[:held], order[held : 2 * held]
    return Split(*({name: people[name] for name in sorted(part)} for part in parts))


def _with_face(takes: tuple[Take, ...]) -> tuple[Take, ...]:
    return tuple(take for take in takes if take.target is not None)


def split(protocol: str, takes: Sequence[Take], seed: int) -> Split:
    """The split of a protocol by name. Raises BadInput for an unknown name."""
    if protocol == "cross-subject":
        return cross_subject(takes, seed)
    raise BadInput(f"protocol {protocol!r} is none of {', '.join(PROTOCOLS)}")
