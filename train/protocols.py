"""Who trains, who validates, who is tested.

An *identity* is one person, whatever folders or names their takes came under: (dataset, subject)
labels that share a clip are the same identity. Splits are made by identity, so nobody is on two
sides, and no clip is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pmm import BadInput
from pmm.store.clip import Take
from pmm.store.digest import digest

PROTOCOLS = ("cross-subject",)
PARTS = ("train", "validation", "test")

Part = Mapping[str, tuple[Take, ...]]
"""Identities, each with its takes, in a fixed order."""

Label = tuple[str, str]  # (dataset, subject)

MEAN_STYLE = "mean"
"""Not a person: the mean of all styles. A subject of this name goes by dataset/mean."""


@dataclass(frozen=True)
class Merged:
    """Subjects of different names that count as one person, since recordings of theirs are the same.

    clips    ids of the clips that carry more than one of the names
    source   a recording of the first of these clips, for people to look at
    """

    identity: str
    subjects: tuple[str, ...]
    clips: tuple[str, ...]
    source: str

    def __str__(self) -> str:
        first = f"{self.clips[0][:12]} ({self.source})"
        what = f"clip {first}" if len(self.clips) == 1 else f"{len(self.clips)} clips, the first {first},"
        return f"{', '.join(self.subjects)} share {what} and count as one person"

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Merged:
        return cls(value["identity"], tuple(value["subjects"]), tuple(value["clips"]), value["source"])


@dataclass(frozen=True)
class Split:
    """Three parts that share no identity. ``merged`` tells which subjects were made one."""

    train: Part
    validation: Part
    test: Part
    merged: tuple[Merged, ...] = ()

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
    of_label: dict[Label, list[Take]] = {}
    for take in takes:
        of_label.setdefault((take.dataset, take.subject), []).append(take)
    people: dict[str, tuple[Take, ...]] = {}
    for name, labels in _named(takes).items():
        own = sorted((take for label in labels for take in of_label[label]), key=lambda take: take.id)
        people[name] = tuple({(take.clip.id, take.target): take for take in reversed(own)}.values())[::-1]
    return people


def merged(takes: Sequence[Take]) -> tuple[Merged, ...]:
    """The identities that go by more than one subject name, in the order of their names.

    One name in two datasets that share clips is what is expected of a copy, and is not told.
    """
    carriers: dict[str, dict[str, Take]] = {}
    for take in sorted(takes, key=lambda take: (take.subject, take.source)):
        carriers.setdefault(take.clip.id, {}).setdefault(take.subject, take)
    shared = [next(iter(by.values())) for _, by in sorted(carriers.items()) if len(by) > 1]
    found = []
    for name, labels in _named(takes).items():
        if len(subjects := {subject for _, subject in labels}) > 1:
            own = [take for take in shared if (take.dataset, take.subject) in labels]
            clips = tuple(take.clip.id for take in own)
            found.append(Merged(name, tuple(sorted(subjects)), clips, own[0].source))
    return tuple(found)


def _named(takes: Sequence[Take]) -> dict[str, set[Label]]:
    """The labels of each identity, by its name, in the order of names."""
    count = Counter((take.dataset, take.subject) for take in takes)
    groups = {min(labels, key=lambda label: (-count[label], label)): labels for labels in _connected(takes)}
    alike = Counter(subject for _, subject in groups)
    alone = {label: alike[label[1]] == 1 and label[1] != MEAN_STYLE for label in groups}
    return dict(sorted((label[1] if alone[label] else "/".join(label), groups[label]) for label in groups))


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
    made_one = merged(takes)
    if len(people) < 3:
        raise BadInput(_too_few(list(people), made_one))
    order = sorted(people, key=lambda name: digest("split", {"seed": seed, "identity": name}))
    held = max(1, (2 * len(order) + 5) // 10)
    parts = order[2 * held :], order[:held], order[held : 2 * held]
    train, validation, test = ({name: people[name] for name in sorted(part)} for part in parts)
    return Split(train, validation, test, made_one)


def _too_few(people: Sequence[str], made_one: Sequence[Merged]) -> str:
    subjects = (
        "1 subject with a face track was"
        if len(people) == 1
        else (f"{len(people)} subjects with a face track were")
    )
    return (
        f"{subjects} found ({', '.join(people) or 'none'}); the cross-subject protocol needs at least 3, one "
        f"each to train, validate and test: precompute more{''.join(f'; {one}' for one in made_one)}"
    )


def _with_face(takes: tuple[Take, ...]) -> tuple[Take, ...]:
    return tuple(take for take in takes if take.target is not None)


def split(protocol: str, takes: Sequence[Take], seed: int) -> Split:
    """The split of a protocol by name. Raises BadInput for an unknown name."""
    if protocol == "cross-subject":
        return cross_subject(takes, seed)
    raise BadInput(f"protocol {protocol!r} is none of {', '.join(PROTOCOLS)}")
