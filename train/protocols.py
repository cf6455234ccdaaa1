"""Who trains, who validates, who is tested.

An *identity* is one person, whatever folders or names their takes came under: (dataset, subject)
labels that share a clip are the same identity. Splits are made by identity, so nobody is on two
sides; only ``vocaset`` and ``manifest``, whose sides somebody else has drawn, and ``single``, which is
for one person, may put one person's takes on two. No clip is on two sides in any.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pmm import BadInput
from pmm.store.clip import Take
from pmm.store.digest import digest

PROTOCOLS = ("cross-subject", "cross-gender", "leave-one-subject-out", "vocaset", "manifest", "single")
PARTS = ("train", "validation", "test")

GENDERS = {"m": "male", "male": "male", "man": "male", "f": "female", "female": "female", "woman": "female"}
"""How datasets spell them, in lower case."""

SPELLINGS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""How manifests spell the parts, in lower case."""

VOCASET = {
    "train": (
        *("170728_03272", "170904_00128", "170725_00137", "170915_00223"),
        *("170811_03274", "170913_03279", "170904_03276", "170912_03278"),
    ),
    "validation": ("170811_03275", "170908_03277"),
    "test": ("170809_00138", "170731_00024"),
}
"""VOCASET's subjects by part, as FaceFormer publishes them, less the prefix FaceTalk_ and the suffix _TA."""

VOCASET_SENTENCES = {"train": range(1, 41), "validation": range(21, 41), "test": range(21, 41)}

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
    """Three parts that share no clip. ``merged`` tells which subjects were made one.

    ``unused`` counts the takes with a face track that are in none of the parts.
    """

    train: Part
    validation: Part
    test: Part
    merged: tuple[Merged, ...] = ()
    unused: int = 0

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
    people, made_one = _people(takes, "cross-subject")
    order = _shuffled(people, seed)
    held = max(1, (2 * len(order) + 5) // 10)
    return _split(people, order[2 * held :], order[:held], order[held : 2 * held], made_one)


def cross_gender(takes: Sequence[Take], seed: int) -> Split:
    """All men train; the women validate and test, half of the identities each, at random by ``seed``.

    Of an odd number of women, the one more is tested. Raises BadInput where takes say no gender
    (GENDERS has the spellings) or one person's say two, and with no man or fewer than two women.
    """
    people, made_one = _people(takes, "cross-gender")
    gender = _genders(takes, people)
    men = [name for name in people if gender[name] == "male"]
    women = _shuffled([name for name in people if gender[name] == "female"], seed)
    if not men or len(women) < 2:
        raise BadInput(
            f"{len(men)} men and {len(women)} women with a face track were found; the cross-gender protocol "
            "needs at least 1 man to train and 2 women, one each to validate and test: precompute more"
        )
    half = len(women) // 2
    return _split(people, men, women[:half], women[half:], made_one)


def _genders(takes: Sequence[Take], people: Part) -> dict[str, str]:
    """male or female, by identity: what any take of theirs says."""
    said: dict[Label, set[str]] = {}
    for take in takes:
        word = GENDERS.get(take.gender.strip().casefold())
        said.setdefault((take.dataset, take.subject), set()).update({word} if word else ())
    labels = _named(takes)
    found = {name: set().union(*(said[label] for label in labels[name])) for name in people}
    silent = [take for name, own in people.items() if not found[name] for take in own]
    if silent:
        word = f" (it says {silent[0].gender!r})" if silent[0].gender else ""
        raise BadInput(
            f"{len(silent)} of {sum(map(len, people.values()))} takes say no gender, the first "
            f"{_named_take(silent[0])}{word}; the cross-gender protocol needs male or female of each person: "
            "name it in subjects.csv and precompute again"
        )
    if both := [name for name in people if len(found[name]) > 1]:
        raise BadInput(
            f"some takes of {both[0]} say male and some female; the cross-gender protocol needs one gender "
            "of each person: mend subjects.csv and precompute again"
        )
    return {name: min(found[name]) for name in people}


def leave_one_subject_out(takes: Sequence[Take], seed: int, test_subject: str = "") -> Split:
    """One identity is tested, another validates, and all others train.

    ``test_subject`` names the one tested, by identity or by any subject name of theirs; without it,
    ``seed`` chooses. ``seed`` chooses who validates. Raises BadInput for a name that nobody has or
    several have, and with fewer than three identities.
    """
    people, made_one = _people(takes, "leave-one-subject-out")
    order = _shuffled(people, seed)
    tested = _called(test_subject, takes, people) if test_subject else order[0]
    validating, *others = (name for name in order if name != tested)
    return _split(people, others, [validating], [tested], made_one)


def _called(subject: str, takes: Sequence[Take], people: Part) -> str:
    """The identity that goes by this name."""
    names = _named(takes)
    bearing = [name for name in people if subject in {own for _, own in names[name]}]
    found = [subject] if subject in people else bearing
    if len(found) != 1:
        raise BadInput(
            f"test subject {subject!r} is {'none' if not found else 'more than one'} of the subjects with a "
            f"face track; name one of {', '.join(found or people)}"
        )
    return found[0]


def vocaset(takes: Sequence[Take]) -> Split:
    """The published split of VOCASET: 8 / 2 / 2 subjects, sentences 1-40 / 21-40 / 21-40.

    Subjects go by FaceTalk_170728_03272_TA or by 170728_03272 alone; a take's sentence is the last
    ``sentenceNN`` in its source. Takes of other subjects and sentences are not used. Raises BadInput
    where one of the twelve is missing, a take of theirs names no sentence, or a clip is on two sides.
    """
    present = {_vocaset_name(take.subject) for take in takes if take.target is not None}
    wanted = {name: part for part, names in VOCASET.items() for name in names}
    if missing := [name for name in wanted if name not in present]:
        found = sorted({take.subject for take in takes if take.target is not None})
        listed = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
        raise BadInput(
            f"{len(missing)} of VOCASET's {len(wanted)} subjects are not among the {len(found)} with a face "
            f"track ({listed or 'none'}); the vocaset protocol needs all, as FaceTalk_{missing[0]}_TA: "
            "precompute them, or choose another protocol"
        )

    def part_of(take: Take) -> str:
        part = wanted.get(_vocaset_name(take.subject), "")
        return part if part and _sentence(take) in VOCASET_SENTENCES[part] else ""

    return _drawn(takes, part_of)


def _vocaset_name(subject: str) -> str:
    return re.sub(r"^facetalk_|_ta$", "", subject, flags=re.IGNORECASE)


def _sentence(take: Take) -> int:
    numbers = re.findall(r"sentence[ _-]?(\d+)", take.source, re.IGNORECASE)
    if not numbers:
        raise BadInput(
            f"{_named_take(take)}: no sentence number; the vocaset protocol reads it from a name such as "
            "FaceTalk_170728_03272_TA_sentence01.wav: name the recordings so and precompute again"
        )
    return int(numbers[-1])


def manifest(takes: Sequence[Take]) -> Split:
    """The dataset's own split, as its takes say it (SPELLINGS has how).

    Takes that say none are not used. Raises BadInput for another word, for a part that no take
    names, and where a clip is on two sides.
    """
    faces = [take for take in takes if take.target is not None]
    strange = [take for take in faces if take.split.strip() and not _spelt(take)]
    if strange:
        raise BadInput(
            f"{len(strange)} takes say a split that is none of {', '.join(SPELLINGS)}, the first "
            f"{_named_take(strange[0])} {strange[0].split!r}; mend it in subjects.csv and precompute again"
        )
    said = Counter(_spelt(take) for take in faces)
    if missing := [part for part in PARTS if not said[part]]:
        raise BadInput(
            f"no take with a face track says that it is to {'/'.join(missing)} ({said['']} of {len(faces)} "
            "say nothing); the manifest protocol needs train, validation and test: fill the column split of "
            "subjects.csv and precompute again, or choose another protocol"
        )
    return _drawn(takes, _spelt)


def single(takes: Sequence[Take], seed: int) -> Split:
    """80 / 10 / 10 % of each identity's clips to train, validate and test, at random by ``seed``.

    For the style of one person, who is on all three sides with different clips: at least one to validate
    and one to test. Raises BadInput for an identity with fewer than three clips with a face track.
    """
    side: dict[str, str] = {}
    for name, own in identities(takes).items():
        clips = _shuffled({take.clip.id for take in _with_face(own)}, seed)
        if 0 < len(clips) < 3:
            raise BadInput(
                f"{name} has {len(clips)} clips with a face track; the single protocol needs at least 3 of "
                "each subject, one each to train, validate and test: precompute more, or choose by --subjects"
            )
        held = max(1, (len(clips) + 5) // 10)
        parts = ["validation"] * held + ["test"] * held + ["train"] * (len(clips) - 2 * held)
        side.update(zip(clips, parts))
    if not side:
        raise BadInput(
            "no subject with a face track was found; the single protocol needs one: precompute more"
        )
    return _drawn(takes, lambda take: side.get(take.clip.id, ""))


def _spelt(take: Take) -> str:
    return SPELLINGS.get(take.split.strip().casefold(), "")


# --- what the protocols share ----------------------------------------------------------------------


def _people(takes: Sequence[Take], protocol: str) -> tuple[Part, tuple[Merged, ...]]:
    """Identities with the takes that have a face track, at least three, and who was made one."""
    everyone = identities(takes)
    people = {name: with_face for name in everyone if (with_face := _with_face(everyone[name]))}
    made_one = merged(takes)
    if len(people) < 3:
        raise BadInput(_too_few(list(people), made_one, protocol))
    return people, made_one


def _shuffled(names: Iterable[str], seed: int) -> list[str]:
    return sorted(names, key=lambda name: digest("split", {"seed": seed, "identity": name}))


def _split(
    people: Part,
    train: Sequence[str],
    validation: Sequence[str],
    test: Sequence[str],
    made_one: tuple[Merged, ...],
) -> Split:
    def side(names: Sequence[str]) -> Part:
        return {name: people[name] for name in sorted(names)}

    return Split(side(train), side(validation), side(test), made_one)


def _drawn(takes: Sequence[Take], part_of: Callable[[Take], str]) -> Split:
    """The split in which each take is where ``part_of`` puts it ("": nowhere).

    One identity's takes may be on several sides, but no clip: whoever it was listed under.
    """
    sides: dict[str, Take] = {}
    for take in takes:
        if take.target is None or not part_of(take):
            continue
        other = sides.setdefault(take.clip.id, take)
        if part_of(other) != part_of(take):
            raise BadInput(
                f"{_named_take(other)} and {_named_take(take)} are one recording, clip {take.clip.id[:12]}, "
                f"and stand in {part_of(other)} and in {part_of(take)}; take one of them out"
            )
    people, used = identities(takes), {clip: part_of(take) for clip, take in sides.items()}
    every = {name: _with_face(own) for name, own in people.items()}
    train, validation, test = (
        {name: mine for name, own in every.items() if (mine := _on_side(own, used, part))} for part in PARTS
    )
    unused = sum(take.clip.id not in used for own in every.values() for take in own)
    return Split(train, validation, test, merged(takes), unused)


def _on_side(takes: Sequence[Take], sides: Mapping[str, str], part: str) -> tuple[Take, ...]:
    return tuple(take for take in takes if sides.get(take.clip.id) == part)


def _named_take(take: Take) -> str:
    return take.source or take.id[:12]


def _too_few(people: Sequence[str], made_one: Sequence[Merged], protocol: str) -> str:
    subjects = (
        "1 subject with a face track was"
        if len(people) == 1
        else (f"{len(people)} subjects with a face track were")
    )
    return (
        f"{subjects} found ({', '.join(people) or 'none'}); the {protocol} protocol needs at least 3, one "
        f"each to train, validate and test: precompute more{''.join(f'; {one}' for one in made_one)}"
    )


def _with_face(takes: tuple[Take, ...]) -> tuple[Take, ...]:
    return tuple(take for take in takes if take.target is not None)


def split(protocol: str, takes: Sequence[Take], seed: int, test_subject: str = "") -> Split:
    """The split of a protocol by name; only leave-one-subject-out takes a ``test_subject``.

    Raises BadInput for an unknown name, and as the protocol does.
    """
    if protocol not in PROTOCOLS:
        raise BadInput(f"protocol {protocol!r} is none of {', '.join(PROTOCOLS)}")
    if protocol == "leave-one-subject-out":
        return leave_one_subject_out(takes, seed, test_subject)
    if test_subject:
        raise BadInput(
            f"test subject {test_subject!r} with the {protocol} protocol, which chooses for itself; "
            "use --protocol leave-one-subject-out"
        )
    if protocol == "single":
        return single(takes, seed)
    if protocol in ("vocaset", "manifest"):
        return vocaset(takes) if protocol == "vocaset" else manifest(takes)
    return cross_subject(takes, seed) if protocol == "cross-subject" else cross_gender(takes, seed)
