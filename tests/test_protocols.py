"""Splits are made by identity: nobody, and no clip, stands on two sides."""

import itertools
import json
import random
import shutil
from dataclasses import replace

import pytest

from pmm import BadInput, cli
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


# --- cross-gender ----------------------------------------------------------------------------------


def gendered(men, women, clips=2):
    people = [("man", n, word) for n, word in zip(range(men), ("male", "M", " Man") * men)]
    people += [("woman", n, word) for n, word in zip(range(women), ("female", "f", "Woman") * women)]
    return [
        replace(take(f"{kind}{n}-{c}", f"{kind}{n}"), gender=word)
        for kind, n, word in people
        for c in range(clips)
    ]


def test_men_train_and_the_women_are_halved_by_identity():
    takes = gendered(4, 5)
    split = protocols.split("cross-gender", takes, 3)
    assert list(split.train) == ["man0", "man1", "man2", "man3"]
    assert (len(split.validation), len(split.test)) == (2, 3)
    assert sorted([*split.validation, *split.test]) == [f"woman{n}" for n in range(5)]
    assert sum(len(ids(split[part])) for part in protocols.PARTS) == len(takes)
    assert protocols.cross_gender(takes[::-1], 3).to_json() == split.to_json()
    assert len({tuple(protocols.cross_gender(takes, seed).test) for seed in range(12)}) > 4


def test_women_who_share_a_clip_are_on_one_side():
    takes = [*gendered(1, 4), replace(take("woman0-0", "woman3"), gender="female")]
    for seed in range(8):
        split = protocols.cross_gender(takes, seed)
        sides = [set(split.validation), set(split.test)]
        assert sorted(map(len, sides)) == [1, 2]
        assert {"woman0", "woman3"} & (sides[0] | sides[1])
        assert not ids(split.validation) & ids(split.test)


def test_a_missing_gender_is_one_line_that_counts_the_takes():
    takes = gendered(2, 3)
    silent = [
        replace(one, gender="", source="woman1/a.wav") if one.subject == "woman1" else one for one in takes
    ]
    with pytest.raises(BadInput) as caught:
        protocols.cross_gender(silent, 0)
    assert str(caught.value) == (
        "2 of 10 takes say no gender, the first woman1/a.wav; the cross-gender protocol needs male or female "
        "of each person: name it in subjects.csv and precompute again"
    )
    with pytest.raises(
        BadInput, match=r"2 of 10 takes say no gender, the first woman1/a.wav \(it says 'x'\)"
    ):
        protocols.cross_gender([replace(one, gender=one.gender or "x") for one in silent], 0)
    # Another listing of the same person may say it.
    assert protocols.cross_gender([*silent, replace(take("woman1-0", "w", "copy"), gender="f")], 0).test


def test_genders_that_cannot_be_split_are_refused():
    both = [*gendered(2, 2), replace(take("x", "man0"), gender="female")]
    with pytest.raises(BadInput, match="some takes of man0 say male and some female; the cross-gender"):
        protocols.cross_gender(both, 0)
    with pytest.raises(BadInput, match="3 men and 1 women with a face track were found; the cross-gender"):
        protocols.cross_gender(gendered(3, 1), 0)
    with pytest.raises(BadInput, match="1 man to train and 2 women"):
        protocols.cross_gender(gendered(0, 3), 0)


# --- leave one subject out -------------------------------------------------------------------------


def test_one_is_left_out_by_name_or_by_seed():
    takes = takes_of(6)
    named = protocols.split("leave-one-subject-out", takes, 0, "person4")
    assert list(named.test) == ["person4"]
    assert len(named.validation) == 1
    assert sorted([*named.train, *named.validation]) == [
        "person0",
        "person1",
        "person2",
        "person3",
        "person5",
    ]
    assert {min(protocols.split("leave-one-subject-out", takes, seed).test) for seed in range(30)} == {
        f"person{n}" for n in range(6)
    }
    others = {min(protocols.leave_one_subject_out(takes, seed, "person4").validation) for seed in range(30)}
    assert others == {"person0", "person1", "person2", "person3", "person5"}


def test_the_one_left_out_may_be_called_by_any_of_their_names():
    takes = [*takes_of(4), take("1-1", "renamed", dataset="copy")]
    assert list(protocols.leave_one_subject_out(takes, 0, "renamed").test) == ["person1"]
    with pytest.raises(BadInput) as caught:
        protocols.leave_one_subject_out(takes, 0, "nobody")
    assert str(caught.value) == (
        "test subject 'nobody' is none of the subjects with a face track; name one of person0, person1, "
        "person2, person3"
    )
    two = [*takes_of(3), take("a", "sam", "here"), take("b", "sam", "there")]
    with pytest.raises(BadInput, match=r"'sam' is more than one of .* name one of here/sam, there/sam"):
        protocols.leave_one_subject_out(two, 0, "sam")
    assert list(protocols.leave_one_subject_out(two, 0, "here/sam").test) == ["here/sam"]
    with pytest.raises(BadInput, match="the leave-one-subject-out protocol needs at least 3"):
        protocols.leave_one_subject_out(takes_of(2), 0, "person0")
    with pytest.raises(BadInput, match="with the cross-subject protocol, which chooses for itself"):
        protocols.split("cross-subject", takes, 0, "person0")


# --- vocaset ---------------------------------------------------------------------------------------


def vocaset_takes(sentences=range(1, 41), name="FaceTalk_{}_TA", source="wav/{who}_sentence{n:02}.wav"):
    return [
        replace(
            take(f"{who}-{n}", name.format(who)),
            source=source.format(who=name.format(who), n=n),
        )
        for names in protocols.VOCASET.values()
        for who in names
        for n in sentences
    ]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("FaceTalk_{}_TA", "wav/{who}_sentence{n:02}.wav"),
        ("{}", "audio/{who}/sentence{n}.wav"),
        ("facetalk_{}_ta", "{who}/Sentence_{n:02}/take.wav"),
    ],
)
def test_the_published_split_of_vocaset(name, source):
    split = protocols.split("vocaset", vocaset_takes(name=name, source=source), 0)
    assert [len(split[part]) for part in protocols.PARTS] == [8, 2, 2]
    assert [len(ids(split[part])) for part in protocols.PARTS] == [8 * 40, 2 * 20, 2 * 20]
    assert set(split.test) == {name.format("170809_00138"), name.format("170731_00024")}
    numbers = {int(t.clip.id.split("-")[1]) for takes in split.test.values() for t in takes}
    assert numbers == set(range(21, 41))
    assert split.unused == 4 * 20


def test_vocasets_own_numbers():
    """The published lists, as they stand in its users' scripts."""
    names = [name for part in protocols.PARTS for name in protocols.VOCASET[part]]
    assert len(set(names)) == 12
    assert " ".join(f"FaceTalk_{name}_TA" for name in protocols.VOCASET["train"]) == (
        "FaceTalk_170728_03272_TA FaceTalk_170904_00128_TA FaceTalk_170725_00137_TA FaceTalk_170915_00223_TA "
        "FaceTalk_170811_03274_TA FaceTalk_170913_03279_TA FaceTalk_170904_03276_TA FaceTalk_170912_03278_TA"
    )
    assert protocols.VOCASET["validation"] == ("170811_03275", "170908_03277")


def test_others_are_not_used_under_vocaset():
    takes = [*vocaset_takes(range(30, 33)), *takes_of(2)]
    split = protocols.vocaset(takes)
    assert len(ids(split.train)) == 8 * 3
    assert split.unused == 6


def test_what_is_not_vocaset_is_one_line():
    with pytest.raises(BadInput) as caught:
        protocols.vocaset(takes_of(5))
    assert str(caught.value) == (
        "12 of VOCASET's 12 subjects are not among the 5 with a face track (person0, person1, person2, "
        "person3, ...); the vocaset protocol needs all, as FaceTalk_170728_03272_TA: precompute them, or "
        "choose another protocol"
    )
    nameless = [
        replace(one, source=one.source.replace("sentence", "s")) for one in vocaset_takes(range(25, 26))
    ]
    with pytest.raises(
        BadInput, match=r"wav/FaceTalk_170728_03272_TA_s25.wav: no sentence number; the vocaset"
    ):
        protocols.vocaset(nameless)


def test_a_clip_under_two_subjects_is_never_on_two_sides():
    takes = vocaset_takes(range(25, 27))
    trained, tested = "170728_03272", "170809_00138"
    copied = replace(take(f"{trained}-25", f"FaceTalk_{tested}_TA"), source="wav/copy_sentence25.wav")
    with pytest.raises(BadInput) as caught:
        protocols.vocaset([*takes, copied])
    assert str(caught.value) == (
        f"wav/FaceTalk_{trained}_TA_sentence25.wav and wav/copy_sentence25.wav are one recording, clip "
        f"{trained}, and stand in train and in test; take one of them out"
    )


# --- the dataset's own -----------------------------------------------------------------------------


def said(*words, who="ann"):
    return [
        replace(take(f"{who}{n}", who), split=word, source=f"{who}/{n}.wav") for n, word in enumerate(words)
    ]


def test_the_datasets_own_split_in_its_spellings():
    takes = [*said("train", "Training", "val", ""), *said("dev", " Test ", "testing", who="bob")]
    split = protocols.split("manifest", takes, 0)
    assert {who: len(own) for who, own in split.train.items()} == {"ann": 2}
    assert {who: len(own) for who, own in split.validation.items()} == {"ann": 1, "bob": 1}
    assert {who: len(own) for who, own in split.test.items()} == {"bob": 2}
    assert split.unused == 1


def test_what_a_manifest_does_not_say_is_one_line():
    with pytest.raises(BadInput) as caught:
        protocols.manifest([*said("train", "test", ""), take("x", "voice", target=None)])
    assert str(caught.value) == (
        "no take with a face track says that it is to validation (1 of 3 say nothing); the manifest protocol "
        "needs train, validation and test: fill the column split of subjects.csv and precompute again, or "
        "choose another protocol"
    )
    with pytest.raises(
        BadInput, match=r"1 takes say a split that is none of train, .* the first ann/3.wav 'held'"
    ):
        protocols.manifest(said("train", "val", "test", "held"))
    copied = replace(said("test", who="bob")[0], clip=said("train")[0].clip)
    with pytest.raises(
        BadInput, match=r"ann/0.wav and bob/0.wav are one recording.* in train and in test; take"
    ):
        protocols.manifest([*said("train", "val", "test"), copied])


# --- one person -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clips", "sizes"), [(3, (1, 1, 1)), (14, (12, 1, 1)), (20, (16, 2, 2))])
def test_one_persons_clips_are_on_three_sides(clips, sizes):
    takes = [*takes_of(1, clips), take("x", "voice only", target=None)]
    split = protocols.split("single", takes, 0)
    assert [list(split[part]) for part in protocols.PARTS] == [["person0"]] * 3
    assert tuple(len(ids(split[part])) for part in protocols.PARTS) == sizes
    assert len({str(protocols.single(takes, seed).to_json()) for seed in range(20)}) > 2


def test_too_few_clips_of_one_person_are_one_line():
    with pytest.raises(
        BadInput, match=r"person1 has 2 clips with a face track; the single protocol needs at"
    ):
        protocols.single([*takes_of(1), take("a", "person1"), take("b", "person1")], 0)
    with pytest.raises(
        BadInput, match="no subject with a face track was found; the single protocol needs one"
    ):
        protocols.single([take("x", "voice only", target=None)], 0)


# --- all of them -----------------------------------------------------------------------------------


def listing(seed):
    """Takes of a dozen labels that share clips now and then, with genders and splits drawn at random."""
    draw = random.Random(seed)
    people = [
        (f"person{n}", draw.choice(("", "copy")), draw.choice("mf")) for n in range(draw.randint(4, 12))
    ]
    listed = []
    for n, (who, dataset, gender) in enumerate(people):
        for c in range(draw.randint(1, 5)):
            clip = f"{n}-{c}" if draw.random() > 0.1 else f"{draw.randrange(len(people))}-0"
            words = ("train", "val", "test", "")
            one = take(clip, who, dataset, target=draw.choice(("face", "face", "face", None)))
            listed.append(replace(one, gender=gender, split=draw.choice(words)))
    return draw.sample(listed, len(listed))


def apart(sides):
    return not any(one & other for one, other in itertools.combinations(sides, 2))


def refused_or_split(protocol, takes, seed):
    """None where the protocol refuses, in one line."""
    try:
        return protocols.split(protocol, takes, seed)
    except BadInput as error:
        return None if "\n" not in str(error) else pytest.fail(str(error))


def test_no_clip_and_nobody_is_on_two_sides():
    """Random listings: each protocol splits them without a leak, or refuses in one line."""
    done = dict.fromkeys([name for name in protocols.PROTOCOLS if name != "vocaset"], 0)
    for seed in range(300):
        takes = listing(seed)
        for protocol in done:
            if (split := refused_or_split(protocol, takes, seed)) is None:
                continue
            done[protocol] += 1
            clips = [{t.clip.id for own in split[part].values() for t in own} for part in protocols.PARTS]
            assert all(clips)
            assert apart(clips)
            if protocol not in ("manifest", "single"):
                assert apart([{(t.dataset, t.subject) for t in takes if t.clip.id in own} for own in clips])
    assert min(done.values()) > 15, done


# --- the command -----------------------------------------------------------------------------------


def test_fit_says_whom_it_chose_and_keeps_it(pmm, fitted, tmp_path):
    options = ("--protocol", "leave-one-subject-out", "--test-subject", "cyd", "--without", "image")
    store = shutil.copytree(fitted / "store", tmp_path / "store")  # a fit leaves a snapshot in it
    done = pmm("fit", store, "--run", tmp_path / "run", "--epochs", 1, "--device", "cpu", *options)
    assert done.code == 0, done.err
    lines = [line.split(None, 1) for line in done.err.splitlines()]
    said = {line[0]: line[1] for line in lines if line[0] in ("train", "validate", "test")}
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    chosen = {part: list(config["split"][part]) for part in protocols.PARTS}
    told = {part: f"{len(people)}: {', '.join(people)}" for part, people in chosen.items()}
    assert said == {"train": told["train"], "validate": told["validation"], "test": told["test"]}
    assert said["test"] == "1: cyd"
    assert (len(chosen["train"]), config["options"]["test_subject"], config["unused"]) == (3, "cyd", 0)
    scores = json.loads(pmm("eval", tmp_path / "run", "--json").out)
    assert list(scores["subjects"]) == ["cyd"]


def test_fit_refuses_what_a_protocol_cannot_split(pmm, fitted, tmp_path):
    def complaint(*options):
        done = pmm("fit", fitted / "store", "--run", tmp_path / "run", *options)
        assert done.code == 1
        return done.complaint

    assert complaint("--protocol", "cross-gender").startswith("10 of 10 takes say no gender, the first ")
    assert complaint("--protocol", "vocaset").startswith("12 of VOCASET's 12 subjects are not among the 5 ")
    assert complaint("--protocol", "manifest").startswith(
        "no take with a face track says that it is to train/"
    )
    assert "'cyd' with the cross-subject protocol, which chooses" in complaint("--test-subject", "cyd")
    assert not (tmp_path / "run").exists()


def test_the_command_knows_every_protocol():
    (option,) = [one for one in cli.fit.params if one.name == "protocol"]
    assert tuple(option.type.choices) == protocols.PROTOCOLS
