"""Names made from content: pinned, so that a store written today is a hit for ever."""

import hashlib
import json

import numpy as np
import pytest

from pmm import BadInput, StoreCorrupt
from pmm.store import clip, clock, digest, feature, rig

SAMPLES = np.arange(-500, 500, dtype="<i2")


def audio(**changes):
    given = {"rate": 16000, "channels": 1, "sample_format": "s16", "start": 0, "end": 1000}
    given["blocks"] = [SAMPLES.tobytes()]
    return clip.lossless_clip(**{**given, **changes})


def test_a_digest_is_the_bytes_the_docs_say():
    fields = b'{"a":1,"b":["\xc3\xa9",null,true]}'
    expected = hashlib.sha256(
        b"pmm:tag\0" + len(fields).to_bytes(8, "little") + fields + (3).to_bytes(8, "little") + b"xyz"
    )
    assert digest.digest("tag", {"b": ("é", None, True), "a": 1}, b"xyz") == expected.hexdigest()


def test_golden_names():
    spec = feature.FeatureSpec(
        "audio", "wav2vec2-hidden/1", "float16", (8,), None, {"weights": "w", "layer": 2}
    )
    lossless = audio()
    lossy = clip.lossy_clip("aac", b"private", 48000, 2, 0, 0, 4096, [b"one", b"two"])
    track = clip.target_id(lossless, b"Timecode,BlendshapeCount\n")
    take = clip.Take(lossless, track, "anna")
    assert {
        "lossless": lossless.id,
        "lossy": lossy.id,
        "target": track,
        "mesh": clip.target_id(lossless, b"Timecode,BlendshapeCount\n", b"template"),
        "take": take.id,
        "mute": clip.Take(lossless, None, "anna").id,
        "spec": spec.id,
    } == GOLDEN


GOLDEN = {
    "lossless": "02bd775be8195180b96ad677867bfb8401cb144f132f9bde2c44461c70a30e26",
    "lossy": "16885278ecb46c25bbbdf789bf5a5e1a32a17cc05b80ea89872e39cc4313072f",
    "target": "ca5f112b60780045133d801f1ce22918c3fc934660745e9cc48a87efc2dc454a",
    "mesh": "529e85b35b42e7af40b8223bed827467c65ddf007fc9f69099ce1b0f089d3a83",
    "take": "09766b5b399ad000d4bf2699f2d9da967680267cf1a5f16d6cf0f49650393eb5",
    "mute": "64cf3361936d5e0e8826d5cee4b961af3b588c3c18a95a6a58dfaf94217dcb57",
    "spec": "f578f5044ec2fb5900f9d39c0d81ee1fc9e788f2490e6fcfd71802e25c834b04",
}


def test_the_same_integers_in_other_blocks_are_the_same_clip():
    raw = SAMPLES.tobytes()
    assert audio(blocks=[raw[:7], b"", memoryview(raw)[7:1001], raw[1001:]]) == audio()
    assert audio(blocks=[SAMPLES[:400].data, SAMPLES[400:].data]) == audio()


@pytest.mark.parametrize(
    "changes",
    [
        {"rate": 48000},
        {"channels": 2, "end": 500},
        {"sample_format": "s8", "end": 2000},
        {"blocks": [SAMPLES[::-1].tobytes()]},
    ],
)
def test_anything_that_sounds_different_is_another_clip(changes):
    assert audio(**changes).id != audio().id


def test_blocks_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="1998 bytes came where 2000 were announced"):
        audio(blocks=[SAMPLES[1:].tobytes()])


def test_where_samples_lie_in_their_file_is_no_part_of_their_name():
    moved = audio(start=500, end=1500)
    assert (moved.id, moved.start, moved.end) == (audio().id, 500, 1500)


def lossy(**changes):
    given = {"codec": "aac", "private": b"", "rate": 48000, "channels": 2, "silence": 0}
    given |= {"start": 0, "end": 4096, "packets": [b"ab", b"c"]}
    return clip.lossy_clip(**{**given, **changes}).id


@pytest.mark.parametrize(
    "changes",
    [
        {"codec": "mp3"},
        {"private": b"x"},
        {"rate": 44100},
        {"channels": 1},
        {"silence": 480},
        {"start": 1},
        {"end": 4095},
        {"packets": [b"a", b"bc"]},
        {"packets": [b"c", b"ab"]},
    ],
)
def test_packets_that_decode_to_something_else_are_another_clip(changes):
    assert lossy(**changes) != lossy()


def test_a_take_is_clip_target_and_subject_and_nothing_else():
    take = clip.Take(audio(), None, "anna", dataset="a", text="hello", split="train", source="a.wav")
    other = clip.Take(audio(), None, "anna", dataset="b", gender="f", language="en", source="b.wav")
    assert take.id == other.id
    assert take.id != clip.Take(audio(), None, "berta").id
    assert clip.Take.from_json(json.loads(json.dumps(take.to_json())), "here") == take


@pytest.mark.parametrize("key", ["clip", "start", "target", "subject", "take"])
def test_a_take_whose_fields_are_not_those_of_its_name_is_refused(key):
    value = clip.Take(audio(), None, "anna").to_json()
    with pytest.raises(BadInput, match=r"^here: not a take"):
        clip.Take.from_json({name: value[name] for name in value if name != key}, "here")
    if key in ("clip", "subject", "take"):
        with pytest.raises(BadInput, match=r"^here: not a take"):
            clip.Take.from_json({**value, key: "0" * 64}, "here")


def test_canonical_json_has_one_spelling():
    assert digest.canonical_json({"b": 1, "a": (1, "é")}) == b'{"a":[1,"\xc3\xa9"],"b":1}'
    assert digest.canonical_json({"name": b"\xff.wav".decode("utf-8", "surrogateescape")}) == (
        b'{"name":"\\udcff.wav"}'
    )
    with pytest.raises(TypeError, match=r"float \(0\.5\); spell it as a string"):
        digest.canonical_json({"x": [0.5]})
    with pytest.raises(TypeError, match="keys are strings, got 1"):
        digest.canonical_json({1: 2})


@pytest.mark.parametrize("text", ['{"a":1,"a":2}', "[NaN]", "[Infinity]", "{", "", b"\xff", "[" * 100_000])
def test_strict_json_refuses_what_two_readers_could_read_in_two_ways(text):
    with pytest.raises(BadInput, match=r"^here is not valid JSON"):
        digest.strict_json(text, "here")


def test_every_changed_byte_breaks_a_seal():
    data = digest.sealed({"format": 1, "names": ["a", "é"], "rate": 0.5})
    assert digest.unsealed(data, "here") == {"format": 1, "names": ["a", "é"], "rate": 0.5}
    assert json.loads(data)["sha256"] == hashlib.sha256(data[: data.index(b',"sha256"')] + b"}").hexdigest()
    for index in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[index] ^= 1 << bit
            with pytest.raises(StoreCorrupt, match=r"^here is not as it was written"):
                digest.unsealed(bytes(flipped), "here")
    with pytest.raises(StoreCorrupt):
        digest.unsealed(data[:-1], "here")


def test_every_setting_of_a_feature_decides_its_name():
    base = {"modality": "target", "algorithm": "livelink/1", "dtype": "float32", "shape": (52,), "fps": 30}
    settings = {"gap": 100}
    first = feature.FeatureSpec(**base, settings=settings)
    changed = [
        {"algorithm": "livelink/2"},
        {"dtype": "float16"},
        {"shape": (32,)},
        {"fps": 60},
        {"settings": {"gap": 101}},
    ]
    others = {feature.FeatureSpec(**{**base, "settings": settings, **change}).id for change in changed}
    assert len(others | {first.id}) == len(changed) + 1
    assert feature.FeatureSpec.from_bytes(first.to_bytes(), "here") == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modality": "smell"}, "modality 'smell' is none of audio, text, image, target"),
        ({"dtype": "object"}, "dtype 'object' is none of float16, float32, uint8"),
        ({"shape": ()}, r"a row of shape \(\)"),
        ({"shape": (0,)}, r"a row of shape \(0,\)"),
        ({"shape": (4, 4)}, "a row of target has axes"),
        ({"fps": "30"}, "fps is '30'"),
        ({"settings": []}, "an object for its settings"),
    ],
)
def test_a_spec_that_is_none_is_refused(change, message):
    given = {
        "modality": "target",
        "algorithm": "a/1",
        "dtype": "float32",
        "shape": (52,),
        "fps": 30,
        "settings": {},
    }
    with pytest.raises(BadInput, match=message):
        feature.FeatureSpec(**{**given, **change})


@pytest.mark.parametrize("text", [b"[]", b"{}", b'{"shape":3}', b"3", b'{"shape":"ab","modality":"audio"}'])
def test_a_spec_file_that_is_none_is_refused(text):
    with pytest.raises(BadInput, match=r"^here is not a feature spec"):
        feature.FeatureSpec.from_bytes(text, "here")


def test_targets_are_named_by_their_track_and_all_else_by_the_clip():
    audio_spec = feature.FeatureSpec("audio", "a/1", "float16", (8,), None, {})
    target_spec = feature.FeatureSpec("target", "a/1", "float32", (52,), 30, {})
    assert audio_spec.row_id("c", "t") == "c"
    assert target_spec.row_id("c", "t") == "t"
    with pytest.raises(BadInput, match="no target row"):
        target_spec.row_id("c", None)


def test_clock_counts_in_integers():
    assert [clock.steps(n) for n in (0, 399, 400, 16000, 32000, 160000)] == [0, 0, 1, 49, 99, 499]
    assert clock.frames(48000 * 3600 * 100, 48000, 60) == 60 * 3600 * 100
    assert [clock.frames(n, 16000, 30) for n in (266, 267, 800, 32000)] == [0, 1, 2, 60]
    assert clock.resampled(44100, 44100) == 16000
    assert clock.samples(0.1, 16000) == 1600
    assert clock.seconds(8000, 16000) == 0.5
    assert clock.minutes(1.5) == 90
    assert [clock.ticks(n) for n in (1, 100)] == [60, 6000]
    assert clock.ticks(1000) == clock.TICKS_PER_SECOND
    assert clock.device_rate(30, 59.9) == pytest.approx(29.95)


def test_clock_counts_along_times():
    times = 7 + clock.device_times(601, 60)
    assert clock.spacing(times) == pytest.approx(1 / 60)
    assert clock.spacing(times[:1]) == 0
    assert clock.half_periods(times, 0.5)[[0, 300, 600]].tolist() == pytest.approx([0, 5, 10])


def test_clock_places_frames_on_steps():
    whole = clock.step_positions(60, 99, 30)
    assert whole[0] == 0
    assert whole[3] == pytest.approx(50 * 3 / 30 - 0.625)
    assert whole.max() == pytest.approx(50 * 59 / 30 - 0.625)
    np.testing.assert_array_equal(clock.step_positions(10, 99, 30, first_frame=20), whole[20:30])
    assert clock.step_positions(1000, 99, 30)[-1] == 98
    assert clock.mel_window_starts(5, 100, 30, 16).tolist() == [0, 2, 5, 8, 10]
    assert clock.mel_window_starts(3, 18, 30, 16).tolist() == [0, 2, 2]


def test_the_rig_has_each_coefficient_once_and_maps_by_name():
    assert len(set(rig.ARKIT52)) == 52
    assert len(set(rig.LIP32)) == 32
    assert set(rig.LIP32) < set(rig.ARKIT52)
    assert rig.columns(("JawOpen", "MouthClose"), ("mouthclose", "x", "JAWOPEN"), "here") == [2, 0]
    picked = [rig.ARKIT52[i] for i in rig.columns(rig.LIP32, rig.ARKIT52, "here")]
    assert tuple(picked) == rig.LIP32
    with pytest.raises(BadInput, match=r"^here: 1 of 2 coefficients are missing \(MouthClose\)"):
        rig.columns(("JawOpen", "MouthClose"), ("JawOpen",), "here")
    with pytest.raises(BadInput, match=r"^here: coefficient 'jawopen' stands twice"):
        rig.columns(("JawOpen",), ("JawOpen", "jawopen"), "here")
