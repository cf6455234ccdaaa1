"""The corpus made on the spot: lips that close and lead, the spread of real speech, the layout."""

import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pmm import AlreadyThere, BadInput
from pmm.precompute import datasets, media, synth
from pmm.precompute.datasets import livelink
from pmm.precompute.synth import corpus, sentences
from pmm.precompute.synth.curves import LEAD_SECONDS, Face, animate
from pmm.precompute.synth.phonemes import SHAPES, Segment, segments, shapes_of
from pmm.precompute.synth.voice import speak
from pmm.store import clock
from pmm.store.rig import ARKIT52

SPEC = synth.CorpusSpec(minutes=3.0, subjects=8, seed=5)


def column(values: np.ndarray, name: str) -> np.ndarray:
    return values[:, ARKIT52.index(name)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, synth.Summary, list[synth.TakeWritten]]:
    out = tmp_path_factory.mktemp("corpus") / "talk"
    events: list[synth.TakeWritten] = []
    return out, synth.write_corpus(SPEC, out, events.append), events


@pytest.fixture(scope="module")
def tracks(made) -> list[livelink.Track]:
    return [livelink.read_targets(r.target, 60) for r in datasets.find(made[0]).recordings]


def talk(*shapes: str, each: float = 0.12) -> tuple[Segment, ...]:
    """A timeline: half a second of rest, the shapes one after another, and rest again."""
    said = [
        Segment(shape, 0.5 + i * each, 0.5 + (i + 1) * each, shape in ("a", "E", "O"))
        for i, shape in enumerate(shapes)
    ]
    end = 0.5 + len(shapes) * each
    return (Segment("pause", 0, 0.5), *said, Segment("pause", end, end + 0.5))


def face_of(timeline: tuple[Segment, ...], face: Face | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(times, coefficients) at 60 fps."""
    times = clock.frame_times(clock.samples(timeline[-1].end, 60), 60)
    return times, animate(timeline, times, face or Face(), np.random.default_rng(0)).coefficients


# --- what is said ---------------------------------------------------------------------------------


@pytest.mark.parametrize("voice", ["en-us+f1", "en-gb-x-rp+m2", "cmn+f3"])
def test_every_phoneme_of_every_word_has_a_mouth_shape(voice):
    words = sentences.every_word("cmn" if voice.startswith("cmn") else "en")
    names = Counter(phoneme.name for word in words for phoneme in speak(word, voice).phonemes)
    assert {name for name in names if shapes_of(name) is None} == set()
    assert len(names) > 40


def test_names_are_understood_whole_or_not_at_all():
    assert shapes_of("'aU") == ("a", "U")
    assert shapes_of(",OI") == ("O", "I")
    assert shapes_of("ong") == ("O", "velar")
    assert shapes_of("ts.h") == ("postalveolar",)
    assert shapes_of("p") == shapes_of("ph") == ("bilabial",)
    assert shapes_of("_:") == ("pause",)
    assert shapes_of("i.") == ("apical",)
    assert shapes_of("a9%%Q") is None
    assert all(shape in SHAPES for name in ("@L", "aI@", "tS;h", "y&") for shape in shapes_of(name))


def test_phonemes_fill_the_wave_and_diphthongs_are_split():
    spoken = speak("My brown cow.", "en-us+m3")
    assert spoken.pcm.dtype == np.int16
    starts = [p.start for p in spoken.phonemes]
    assert starts == sorted(starts)
    assert [p.end for p in spoken.phonemes[:-1]] == starts[1:]
    assert spoken.phonemes[-1].end == pytest.approx(len(spoken.pcm) / spoken.rate)
    found, unknown = segments(spoken.phonemes)
    assert unknown == ()
    shapes = [segment.shape for segment in found]
    assert shapes[:6] == ["bilabial", "a", "I", "bilabial", "r", "a"]


def test_hundreds_of_sentences_in_both_languages():
    rng = np.random.default_rng(0)
    for language, script in (("en", str.isascii), ("cmn", lambda text: "\u4e00" <= text[0] <= "\u9fff")):
        said = {sentences.sentence(language, rng) for _ in range(1000)}
        assert len(said) > 700
        assert all(script(text) for text in said)
        assert not any("{" in text for text in said)


def test_an_unknown_voice_is_refused():
    with pytest.raises(BadInput, match="espeak-ng has no voice 'tlh\\+x9'"):
        speak("qapla", "tlh+x9")


# --- how the face moves ---------------------------------------------------------------------------


def test_lips_meet_at_every_bilabial_and_part_between():
    timeline = talk("a", "bilabial", "a", "bilabial", "O", "bilabial", "I", "bilabial", "E")
    times, values = face_of(timeline, Face(noise=0))
    gap = column(values, "JawOpen") - column(values, "MouthClose")
    for segment in timeline:
        near = np.abs(times + LEAD_SECONDS - segment.centre) < 0.05
        if segment.shape == "bilabial":
            assert gap[near].min() < 0.02
        if segment.shape == "a":
            assert gap[near].max() > 0.2
    pressed = column(values, "MouthPressLeft")
    assert pressed[gap < 0.02].max() > 0.05


def test_lips_meet_at_every_bilabial_of_real_sentences():
    gaps = []
    for take in synth.plan(synth.CorpusSpec(minutes=1, subjects=4, seed=1)):
        timeline, _ = corpus.lay_out(speak(take.text, take.speaker.voice, words_per_minute=190))
        times, values = face_of(timeline, take.speaker.face)
        gap = column(values, "JawOpen") - column(values, "MouthClose")
        for segment in (s for s in timeline if s.shape == "bilabial"):
            shifted = times + LEAD_SECONDS
            gaps.append(gap[(shifted > segment.start - 0.02) & (shifted < segment.end + 0.02)].min())
    assert len(gaps) > 50
    assert max(gaps) < 0.03


def test_labiodentals_touch_and_rounding_is_anticipated():
    times, values = face_of(
        talk("a", "labiodental", "a", "alveolar", "alveolar", "U", "alveolar"), Face(noise=0)
    )
    lips = times + LEAD_SECONDS
    f = np.abs(lips - 0.68) < 0.03
    assert column(values, "MouthRollLower")[f].max() > 0.12
    assert column(values, "JawOpen")[f].min() < 0.2 < column(values, "JawOpen").max()
    pucker = column(values, "MouthPucker")
    peak = pucker.max()
    before = times[np.flatnonzero(pucker > 0.3 * peak)[0]]
    after = times[np.flatnonzero(pucker > 0.3 * peak)[-1]]
    middle = times[int(pucker.argmax())]
    assert middle - before > 1.2 * (after - middle), "lips round ahead of the vowel longer than after it"


def test_the_tongue_leaves_the_lips_to_their_neighbours():
    _, between_round = face_of(talk("U", "alveolar", "U"), Face(noise=0))
    _, between_wide = face_of(talk("I", "alveolar", "I"), Face(noise=0))
    middle = clock.samples(0.68 - LEAD_SECONDS, 60)
    assert column(between_round, "MouthPucker")[middle] > 0.12
    assert column(between_wide, "MouthPucker")[middle] < 0.04
    assert column(between_wide, "MouthSmileLeft")[middle] > 0.12


def test_the_mouth_rests_closed():
    _, values = face_of((Segment("pause", 0, 4.0),))
    assert column(values, "JawOpen").max() < 0.06
    assert column(values, "MouthFunnel").max() < 0.06


def test_a_timeline_and_a_seed_give_one_face():
    timeline = talk("a", "bilabial", "O")
    times, one = face_of(timeline)
    _, two = face_of(timeline)
    assert np.array_equal(one, two)
    other = animate(timeline, times, Face(), np.random.default_rng(1)).coefficients
    assert not np.array_equal(one, other)


def test_speakers_differ_and_are_a_little_crooked():
    timeline = talk("a", "I", "a", "I")
    _, small = face_of(timeline, Face(gain=0.8, noise=0))
    _, large = face_of(timeline, Face(gain=1.2, asymmetry=1, smile=0.05, noise=0))
    assert column(large, "JawOpen").max() > 1.2 * column(small, "JawOpen").max()
    left, right = column(large, "MouthSmileLeft"), column(large, "MouthSmileRight")
    assert (left > right).mean() > 0.95
    assert np.corrcoef(left, right)[0, 1] > 0.95


# --- the corpus -----------------------------------------------------------------------------------

# percentiles 50, 90 and 99 of captured speech; ours is made by rule, so it only has to come near
REAL = {
    "JawOpen": (0.08, 0.31, 0.76),
    "MouthFunnel": (0.09, 0.35, 0.80),
    "MouthPucker": (0.05, 0.19, 0.55),
    "MouthLowerDownLeft": (0.10, 0.61, 0.84),
    "MouthUpperUpLeft": (0.07, 0.43, 0.65),
    "MouthSmileLeft": (0.08, 0.35, 0.59),
    "MouthRollLower": (0.02, 0.08, 0.18),
    "MouthPressLeft": (0.02, 0.07, 0.13),
    "MouthClose": (0.02, 0.09, 0.32),
}


@pytest.mark.parametrize("name", REAL)
def test_the_spread_is_near_that_of_real_speech(tracks, name):
    found = np.percentile(np.concatenate([column(t.values, name) for t in tracks]), [50, 90, 99])
    assert np.abs(found - REAL[name])[0] < 0.05
    assert np.abs(found - REAL[name])[1] < 0.13
    assert np.abs(found - REAL[name])[2] < 0.15


def test_mouth_close_never_passes_the_jaw(tracks):
    for track in tracks:
        over = column(track.values, "MouthClose") - column(track.values, "JawOpen")
        assert over.max() <= 0.03 + 1e-6


def test_lips_lead_the_sound_by_about_100_ms(made, tracks):
    lags, fits = range(-18, 19), np.zeros(37)
    for recording, track in zip(datasets.find(made[0]).recordings, tracks):
        wave = media.decode(recording.audio, media.probe(recording.audio)).astype(np.float64)
        edges = np.arange(len(track.values) + 1) * 16_000 // 60
        loud = np.log(1e-3 + np.sqrt([np.mean(wave[a:b] ** 2) for a, b in pairwise(edges)]))
        jaw = column(track.values, "JawOpen")
        inner = slice(30, -30)
        fits += [np.corrcoef(jaw[inner], np.roll(loud, -lag)[inner])[0, 1] for lag in lags]
    assert 0.07 <= lags[int(fits.argmax())] / 60 <= 0.13
    assert fits.max() > 1.5 * max(0, fits[18]), "in step with the sound they fit much worse"


def test_left_and_right_agree_and_nothing_but_the_tongue_is_still(tracks):
    values = np.concatenate([track.values for track in tracks])
    for name in ("Smile", "Stretch", "LowerDown", "Dimple"):
        pair = column(values, f"Mouth{name}Left"), column(values, f"Mouth{name}Right")
        assert 0.93 < np.corrcoef(*pair)[0, 1] < 0.9999
    still = {name for name in ARKIT52 if np.ptp(column(values, name)) == 0}
    assert still == {"TongueOut"}
    assert column(values, "EyeBlinkLeft").max() > 0.6
    assert all(track.clipped == 0 for track in tracks)


def test_the_layout_reads_back(made, tracks):
    out, summary, events = made
    found = datasets.find(out)
    assert found.refused == ()
    assert len(found.recordings) == summary.takes == len(events) == len(synth.plan(SPEC))
    assert summary.unknown_phonemes == ()
    assert summary.subjects == 8
    assert sum(event.seconds for event in events) == pytest.approx(summary.seconds)
    for recording, track in zip(found.recordings, tracks):
        subject, take, stem = recording.name.split("/")
        assert stem == f"{take}_{subject}" == f"{take}_{recording.subject}"
        assert recording.audio == out / subject / take / f"{stem}.wav"
        info = soundfile.info(recording.audio)
        assert (info.samplerate, info.channels, info.subtype) == (48_000, 1, "PCM_16")
        livelink.check_durations(media.probe(recording.audio), track, recording.audio, recording.target)
        assert abs(info.frames / 48_000 - track.seconds) < 1 / 60
        assert 59.88 < track.native_fps < 59.98
        assert recording.target.read_text().split("\n", 1)[0].count(",") == 62
        assert recording.text


def test_both_genders_speak_both_languages(made):
    recordings = datasets.find(made[0]).recordings
    people = {(r.subject, r.gender, r.language) for r in recordings}
    assert Counter((gender, language) for _, gender, language in people) == {
        ("female", "en"): 2,
        ("male", "en"): 2,
        ("female", "cmn"): 2,
        ("male", "cmn"): 2,
    }
    table = (made[0] / "subjects.csv").read_text()
    assert table.startswith("subject,gender,language\nen-f01,female,en\n")
    for recording in recordings:
        assert recording.text.isascii() == (recording.language == "en")


def test_takes_last_as_long_as_takes_do_and_the_corpus_as_asked(made):
    seconds = [event.seconds for event in made[2]]
    assert np.median(seconds) == pytest.approx(6.5, abs=1)
    assert min(seconds) > 2.5
    assert max(seconds) < 11
    assert sum(seconds) == pytest.approx(60 * SPEC.minutes, rel=0.1)


def test_levels_and_time_codes_differ_between_speakers(made):
    recordings = datasets.find(made[0]).recordings
    peaks = {r.subject: np.abs(soundfile.read(r.audio)[0]).max() for r in recordings}
    assert max(peaks.values()) / min(peaks.values()) > 1.15
    assert max(peaks.values()) < 1
    codes = {r.target.read_text().splitlines()[1].split(",")[0] for r in recordings}
    assert len(codes) == len(recordings)


def test_a_plan_is_a_function_of_its_specification():
    assert synth.plan(SPEC) == synth.plan(SPEC)
    other = synth.plan(synth.CorpusSpec(minutes=3.0, subjects=8, seed=6))
    assert {take.text for take in other} != {take.text for take in synth.plan(SPEC)}
    speakers = {take.speaker for take in synth.plan(SPEC)}
    assert len({(s.voice, s.pitch, s.words_per_minute) for s in speakers}) == 8
    longer = synth.plan(synth.CorpusSpec(minutes=60, subjects=20, seed=0))
    assert len({take.text for take in longer}) > 0.98 * len(longer)


def test_30_fps_takes_and_one_language(tmp_path):
    spec = synth.CorpusSpec(minutes=0.1, subjects=1, languages=("cmn",), fps=30, rate=44_100)
    synth.write_corpus(spec, tmp_path / "c")
    (recording,) = datasets.find(tmp_path / "c").recordings
    assert recording.language == "cmn"
    assert 29.94 < livelink.read_targets(recording.target, 30).native_fps < 29.99
    assert soundfile.info(recording.audio).samplerate == 44_100


def test_a_folder_with_anything_in_it_is_left_alone(tmp_path, made):
    spec = synth.CorpusSpec(minutes=0.1, subjects=1)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        AlreadyThere, match=r"is not empty \(it holds notes\.txt\) and nothing is overwritten"
    ):
        synth.write_corpus(spec, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(AlreadyThere, match="a finished corpus"):
        synth.write_corpus(spec, made[0])
    with pytest.raises(AlreadyThere, match="is a file"):
        synth.write_corpus(spec, tmp_path / "notes.txt")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing_and_hinders_no_other(tmp_path, stop):
    spec = synth.CorpusSpec(minutes=0.2, subjects=1)
    (tmp_path / "mine.txt").write_text("mine")
    seen: list[list[str]] = []

    def halt(_: synth.TakeWritten) -> None:
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        raise stop

    with pytest.raises(stop):
        synth.write_corpus(spec, tmp_path / "new" / "talk", halt)
    assert seen == [["mine.txt", "new"]]
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "new" / "talk").mkdir(parents=True)
    with pytest.raises(stop):
        synth.write_corpus(spec, tmp_path / "new" / "talk", halt)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["talk"], "an empty folder is not ours"
    synth.write_corpus(spec, tmp_path / "new" / "talk")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["talk"]
    assert len(datasets.find(tmp_path / "new" / "talk").recordings) == len(synth.plan(spec))


def test_a_killed_run_does_not_block_the_same_command(tmp_path):
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from pmm.precompute import synth\n"
        "spec = synth.CorpusSpec(minutes=0.2, subjects=1)\n"
        "synth.write_corpus(spec, Path(sys.argv[1]) / 'talk', lambda event: os._exit(9))\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program, str(tmp_path)], check=False)
    assert done.returncode == 9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("talk.")
    assert left.name.endswith(".partial")
    before = sorted(left.rglob("*"))
    synth.write_corpus(synth.CorpusSpec(minutes=0.1, subjects=1), tmp_path / "talk")
    assert {path.name for path in tmp_path.iterdir()} == {"talk", left.name}
    assert sorted(left.rglob("*")) == before, "what another run made is not taken away"


def test_a_folder_that_was_filled_meanwhile_is_left_alone(tmp_path):
    def fill(_: synth.TakeWritten) -> None:
        (tmp_path / "talk").mkdir()
        (tmp_path / "talk" / "notes.txt").write_text("mine")

    with pytest.raises(AlreadyThere, match="is no longer empty or cannot be replaced"):
        synth.write_corpus(synth.CorpusSpec(minutes=0.05, subjects=1), tmp_path / "talk", fill)
    assert [path.name for path in tmp_path.rglob("*")] == ["talk", "notes.txt"]


def test_a_made_corpus_has_the_permissions_of_any_new_folder(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o770)
    (tmp_path / "link").symlink_to("shared")
    spec = synth.CorpusSpec(minutes=0.05, subjects=1)
    synth.write_corpus(spec, tmp_path / "talk")
    synth.write_corpus(spec, tmp_path / "link")
    assert (tmp_path / "talk").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o770
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "link" / "subjects.csv").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"languages": ("en", "tlh")},
        {"languages": ()},
        {"minutes": 0},
        {"subjects": 0},
        {"fps": 25},
        {"rate": 100},
    ],
)
def test_a_specification_that_makes_no_sense_is_refused(options):
    with pytest.raises(BadInput):
        synth.CorpusSpec(**options)


def test_without_the_extra_the_pip_line_is_given_and_nothing_is_made(tmp_path):
    program = (
        "import sys; sys.modules['espeakng_loader'] = None\n"
        "from pathlib import Path\n"
        "from pmm import ExtraMissing\n"
        "from pmm.precompute import synth\n"
        "try: synth.write_corpus(synth.CorpusSpec(minutes=0.1, subjects=1), Path(sys.argv[1]) / 'c')\n"
        "except ExtraMissing as error: print(error)\n"
        "print(any(Path(sys.argv[1]).iterdir()), 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == (
        "speech on the spot needs espeak-ng, and it is not installed: pip install 'pmmtalk[synth]'\n"
        "False False\n"
    )
