"""Splits are made by identity: nobody, and no clip, stands on two sides."""

from dataclasses import replace

import pytest

from pmm import BadInput
from pmm.store.clip import Clip, Take
from pmm.train import protocols


def take(clip, subject, dataset="studio", target="face"):
    return Take(Clip(clip, 16000, 1, 0, 16000), target and f"{target}-{clip}", subject, dataset)


def takes_of(count, clips=3):
    return [take(f"{who}-{n}", f"person{who}") for who in range(count) for n in range(clips)]


def ids(part):
    return {t.id for takes in part.values() for t in takes}


@pytest.mark.parametrize(
    ("people", "sizes"), [(3, (1, 1, 1)), (5, (3, 1, 1)), (10, (6, 2, 2)), (20, (12, 4, 4))]
)
def test_sixty_twenty_twenty_by_identity(people, sizes):
    takes = takes_of(people)
    split = protocols.cross_subject(takes, seed=0)
    assert (len(split.train), len(split.validation), len(split.test)) == sizes
    assert not set(split.train) & set(split.validation)
    assert not (set(split.train) | set(split.validation)) & set(split.test)
    assert ids(split.train) | ids(split.validation) | ids(split.test) == {t.id for t in takes}


def test_the_seed_decides_and_the_order_of_takes_does_not():
    takes = takes_of(10)
    once = protocols.cross_subject(takes, 1).to_json()
    assert protocols.cross_subject(takes[::-1], 1).to_json() == once
    assert len({str(protocols.cross_subject(takes, seed).to_json()) for seed in range(8)}) > 4


def test_labels_that_share_a_clip_are_one_identity():
    takes = [*takes_of(4), take("0-0", "person3"), take("1-1", "renamed", dataset="copy")]
    people = protocols.identities(takes)
    assert set(people) == {"person1", "person2", "person3"}
    for seed in range(12):
        split = protocols.cross_subject(takes, seed)
        sides = [{t.clip.id for ts in split[part].values() for t in ts} for part in protocols.PARTS]
        assert not sides[0] & sides[1]
        assert not (sides[0] | sides[1]) & sides[2]


def test_subjects_made_one_are_told_and_through_which_clip():
    takes = [*takes_of(4), take("0-0", "person3"), take("1-1", "renamed", dataset="copy")]
    other, one = protocols.cross_subject(takes, 0).merged
    assert one == protocols.Merged("person3", ("person0", "person3"), ("0-0",), "")
    assert (other.subjects, other.clips) == (("person1", "renamed"), ("1-1",))
    assert str(other) == "person1, renamed share clip 1-1 () and count as one person"
    chain = [*takes_of(4), take("0-0", "person1"), take("1-1", "person2")]
    (three,) = protocols.merged(chain)
    assert (three.identity, three.subjects) == ("person1", ("person0", "person1", "person2"))
    assert "share 2 clips, the first 0-0 (), and count" in str(three)


def test_a_copy_under_the_same_name_is_nothing_to_tell():
    takes = [*takes_of(3), take("0-0", "person0", dataset="copy")]
    assert protocols.merged(takes) == ()


def test_too_few_because_of_a_shared_clip_says_so():
    takes = [take(clip, f"S{n}") for n in range(4) for clip in ("slate", f"own-{n}")]
    with pytest.raises(BadInput) as caught:
        protocols.cross_subject([replace(one, source=f"{one.subject}/{one.clip.id}.wav") for one in takes], 0)
    assert str(caught.value) == (
        "1 subject with a face track was found (S0); the cross-subject protocol needs at least 3, one each "
        "to train, validate and test: precompute more; "
        "S0, S1, S2, S3 share clip slate (S0/slate.wav) and count as one person"
    )


def test_a_subject_called_mean_is_not_the_mean_style():
    takes = [*takes_of(2), take("x", "mean")]
    assert list(protocols.identities(takes)) == ["person0", "person1", "studio/mean"]


def test_the_same_performance_under_two_names_counts_once():
    takes = [*takes_of(3), take("0-0", "renamed", dataset="copy")]
    people = protocols.identities(takes)
    assert len(people["person0"]) == 3


def test_subjects_of_two_datasets_with_one_name_are_two_people():
    takes = [take("a", "sam", "here"), take("b", "sam", "there"), take("c", "kim", "here")]
    assert list(protocols.identities(takes)) == ["here/sam", "kim", "there/sam"]


def test_takes_without_a_face_do_not_count():
    takes = [*takes_of(3), take("x", "voice only", target=None)]
    assert "voice only" not in str(protocols.cross_subject(takes, 0).to_json())
    with pytest.raises(BadInput) as caught:
        protocols.cross_subject([*takes_of(2), take("x", "voice only", target=None)], 0)
    assert str(caught.value) == (
        "2 subjects with a face track were found (person0, person1); the cross-subject protocol needs at "
        "least 3, one each to train, validate and test: precompute more"
    )


def test_an_unknown_protocol_is_refused():
    with pytest.raises(BadInput, match="protocol 'random' is none of cross-subject"):
        protocols.split("random", takes_of(3), 0)
