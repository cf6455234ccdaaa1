"""Audio identity and decoding: what is the same clip, what the models hear, what is refused."""

import os
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from pmm import BadInput, NotFound
from pmm.precompute import media
from pmm.store import clock

RATE = 48_000


def tone(seconds: float = 1.0, rate: int = RATE, hz: float = 440.0) -> np.ndarray:
    """int16 with energy in it, and no period that a shift would hide."""
    n = clock.samples(seconds, rate)
    t = np.arange(n) / rate
    return (8000 * np.sin(2 * np.pi * hz * t) * np.linspace(0.2, 1, n)).astype(np.int16)


def encode(path: Path, samples: np.ndarray, codec: str, *, late: int = 0) -> Path:
    """``samples`` int16 mono in a container, beginning ``late`` samples after the movie does."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, layout="mono")
        for at in range(0, len(samples), 1024):
            frame = av.AudioFrame.from_ndarray(samples[None, at : at + 1024], format="s16", layout="mono")
            frame.rate, frame.pts = RATE, at + late
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def wav(path: Path, samples: np.ndarray, rate: int = RATE, subtype: str = "PCM_16") -> Path:
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


def test_the_same_integers_are_the_same_clip_in_every_lossless_coat(tmp_path):
    x = tone()
    coats = [
        wav(tmp_path / "a.wav", x),
        wav(tmp_path / "renamed elsewhere.flac", x),
        wav(tmp_path / "a.aiff", x),
        encode(tmp_path / "a.mov", x, "pcm_s16le"),
    ]
    extra = (tmp_path / "a.wav").read_bytes() + b"LIST\x0c\x00\x00\x00INFOISFTxxxx"
    (tmp_path / "tagged.wav").write_bytes(extra)
    clips = {media.probe(path) for path in [*coats, tmp_path / "tagged.wav"]}
    assert len(clips) == 1
    (clip,) = clips
    assert (clip.rate, clip.channels, clip.start, clip.end) == (RATE, 1, 0, RATE)
    heard = [media.decode(path, clip) for path in coats]
    assert all(np.array_equal(heard[0], other) for other in heard)


def test_24_and_8_bits_agree_between_wav_flac_and_alac(tmp_path):
    wide = tone().astype(np.int32) << 16 | 0x1700
    a = wav(tmp_path / "a.wav", wide, subtype="PCM_24")
    b = wav(tmp_path / "a.flac", wide, subtype="PCM_24")
    assert media.probe(a) == media.probe(b)
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("pcm_s24le", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(wide[None], format="s32", layout="mono")
        frame.rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert media.probe(tmp_path / "a.mov") == media.probe(a)
    alac = encode(tmp_path / "alac.m4a", tone(), "alac")  # FFmpeg's ALAC widens s16 to 24 bits
    plain = wav(tmp_path / "plain.wav", tone().astype(np.int32) << 16, subtype="PCM_24")
    assert media.probe(alac) == media.probe(plain)
    narrow = [
        wav(tmp_path / "n.wav", tone(), subtype="PCM_U8"),
        wav(tmp_path / "n.flac", tone(), subtype="PCM_S8"),
    ]
    assert len({media.probe(path).id for path in narrow}) == 1


def test_the_same_samples_cut_out_elsewhere_are_the_same_clip(tmp_path):
    x = tone()
    part = media.probe(wav(tmp_path / "part.wav", x[5_000:40_000]))
    cut = media.probe(wav(tmp_path / "whole.wav", x), 5_000, 40_000)
    assert (cut.id, cut.start, cut.end) == (part.id, 5_000, 40_000)
    movie = encode(tmp_path / "whole.mov", x, "pcm_s16le")
    assert media.probe(movie, 5_000, 40_000).id == part.id


def test_one_sample_the_rate_or_the_range_makes_another_clip(tmp_path):
    x = tone()
    y = x.copy()
    y[-1] += 1
    ids = {
        media.probe(wav(tmp_path / "x.wav", x)).id,
        media.probe(wav(tmp_path / "y.wav", y)).id,
        media.probe(wav(tmp_path / "slow.wav", x, 44_100)).id,
        media.probe(tmp_path / "x.wav", 100).id,
        media.probe(tmp_path / "x.wav", 0, 47_000).id,
    }
    assert len(ids) == 5


def test_a_range_is_decoded_as_the_samples_it_names(tmp_path):
    x = tone()
    whole = wav(tmp_path / "whole.wav", x, 16_000)
    clip = media.probe(whole, 5_000, 15_000)
    heard = media.decode(whole, clip)
    assert np.array_equal(heard, x[5_000:15_000].astype(np.float32) / 2**15)
    movie = encode(tmp_path / "whole.mov", tone(), "pcm_s16le")
    part = media.probe(movie, 5_000, 41_000)
    same = media.probe(wav(tmp_path / "same.wav", tone()), 5_000, 41_000)
    assert part == same
    assert np.array_equal(media.decode(movie, part), media.decode(tmp_path / "same.wav", same))


def test_lossy_audio_is_named_by_its_packets(tmp_path):
    x = tone()
    first = encode(tmp_path / "a.m4a", x, "aac")
    (tmp_path / "copy.m4a").write_bytes(first.read_bytes())
    clip = media.probe(first)
    assert clip == media.probe(tmp_path / "copy.m4a")
    assert clip.id != media.probe(encode(tmp_path / "b.m4a", x[::-1].copy(), "aac")).id
    assert clip.samples == RATE, "the encoder's filling of its last packet is not part of the clip"
    heard = media.decode(first, clip)
    reference = media.decode(wav(tmp_path / "a.wav", x), media.probe(tmp_path / "a.wav"))
    lags = np.arange(-40, 41)
    errors = [np.abs(np.roll(heard, lag) - reference)[4000:12000].mean() for lag in lags]
    assert lags[int(np.argmin(errors))] == 0, "the codec's delay is taken out"


def test_a_track_that_starts_late_in_its_movie_begins_with_silence(tmp_path):
    late = encode(tmp_path / "late.mov", tone(), "pcm_s16le", late=4800)
    clip = media.probe(late)
    assert clip.samples == RATE + 4800
    heard = media.decode(late, clip)
    assert np.abs(heard[:1550]).max() < 1e-3
    assert np.abs(heard[1650:1750]).max() > 1e-2


def test_lossy_packets_that_start_late_in_their_movie_are_another_clip(tmp_path):
    x = tone()
    early = media.probe(encode(tmp_path / "early.m4a", x, "aac"))
    late = encode(tmp_path / "late.m4a", x, "aac", late=4800)
    assert media.probe(late).samples > early.samples + 4000
    assert media.probe(late, 0, early.end).id != early.id


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100, 48_000, 96_000])
def test_decode_gives_exactly_the_clocks_count_at_any_rate(tmp_path, rate):
    path = wav(tmp_path / "a.wav", tone(1.2345, rate), rate)
    clip = media.probe(path)
    heard = media.decode(path, clip)
    assert heard.dtype == np.float32
    assert heard.shape == (clock.resampled(clip.samples, rate),)
    t = np.arange(len(heard)) / 16_000
    ideal = 8000 / 2**15 * np.sin(2 * np.pi * 440 * t) * np.interp(t, [0, 1.2345], [0.2, 1])
    assert np.abs(heard - ideal)[800:-800].max() < 1e-3


def test_channels_are_mixed_by_their_mean(tmp_path):
    left, right = tone(hz=300), tone(hz=500)
    stereo = wav(tmp_path / "s.wav", np.stack([left, right], 1), 16_000)
    mean = (left.astype(np.float64) + right) / 2 / 2**15
    heard = media.decode(stereo, media.probe(stereo))
    assert np.abs(heard - mean).max() < 1e-6
    assert media.probe(stereo).channels == 2


def test_a_long_file_is_read_in_blocks(tmp_path):
    x = np.tile(tone(), 30)
    path = wav(tmp_path / "long.wav", x)
    source, sizes = media._open(path), []
    source.clip(0, source.samples, lambda blocks: (sizes.append(len(block)) or block for block in blocks))
    assert max(sizes) <= 1 << 16
    assert sum(sizes) == len(x)


def test_streamed_files_that_announce_no_length_are_read_to_their_end(tmp_path):
    path = wav(tmp_path / "a.wav", tone())
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = data[4:8] = b"\xff" * 4
    (tmp_path / "piped.wav").write_bytes(data)
    assert media.probe(tmp_path / "piped.wav") == media.probe(path)


def test_tags_that_are_not_utf_8_are_no_reason_to_refuse(tmp_path):
    path = tmp_path / "tagged.m4a"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "title of eight"
        stream = container.add_stream("aac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone()[None], format="s16", layout="mono")
        frame.rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    plain = media.probe(path)
    data = path.read_bytes()
    assert b"title of eight" in data
    path.write_bytes(data.replace(b"title of eight", "马老师说话了".encode("gbk") + b"  "))
    assert media.probe(path) == plain


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(BadInput) as caught:
        media.probe(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_missing_empty_and_foreign_files(tmp_path):
    with pytest.raises(NotFound, match="no such audio file"):
        media.probe(tmp_path / "none.wav")
    (tmp_path / "empty.wav").touch()
    refused(tmp_path / "empty.wav", "0 bytes")
    (tmp_path / "text.wav").write_text("Dear diary, " * 99)
    refused(tmp_path / "text.wav", "not audio")
    refused(tmp_path, "is a folder")
    (tmp_path / "head.wav").write_bytes(wav(tmp_path / "a.wav", tone()).read_bytes()[:20])
    refused(tmp_path / "head.wav", "truncated")
    refused(wav(tmp_path / "none.wav", np.zeros(0, np.int16)), "0 samples")


def test_a_movie_without_sound(tmp_path):
    with av.open(str(tmp_path / "mute.mov"), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width = stream.height = 16
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    refused(tmp_path / "mute.mov", "no audio stream")


@pytest.mark.parametrize("name", ["a.wav", "a.aiff", "a.flac", "a.mov", "a.m4a"])
def test_truncated_files_are_refused(tmp_path, name):
    path = tmp_path / name
    if path.suffix in (".mov", ".m4a"):
        encode(path, tone(), "aac" if path.suffix == ".m4a" else "pcm_s16le")
    else:
        wav(path, tone())
    cut = tmp_path / f"cut{path.suffix}"
    cut.write_bytes(path.read_bytes()[:-20_000] if path.suffix != ".m4a" else path.read_bytes()[:-900])
    refused(cut, "truncated")


def test_a_movie_with_its_index_first_and_its_sound_cut_off(tmp_path):
    whole = tmp_path / "fast.mov"
    with av.open(str(whole), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for at in range(0, RATE, 1024):
            frame = av.AudioFrame.from_ndarray(tone()[None, at : at + 1024], format="s16", layout="mono")
            frame.rate, frame.pts = RATE, at
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert media.probe(whole).samples == RATE
    (tmp_path / "cut.mov").write_bytes(whole.read_bytes()[:-40_000])
    refused(tmp_path / "cut.mov", "truncated")


def test_silence_short_clips_and_numbers_that_are_none(tmp_path):
    refused(wav(tmp_path / "zero.wav", np.zeros(RATE, np.int16)), "every sample is zero")
    refused(wav(tmp_path / "zero8.wav", np.zeros(RATE, np.int16), subtype="PCM_U8"), "every sample is zero")
    refused(wav(tmp_path / "short.wav", tone(0.19)), "0.190 s of audio; at least 0.2 s")
    media.probe(wav(tmp_path / "just.wav", tone(0.2)))
    broken = tone().astype(np.float32) / 2**15
    broken[999] = np.nan
    refused(wav(tmp_path / "nan.wav", broken, subtype="FLOAT"), "NaN")
    refused(wav(tmp_path / "slow.wav", tone(), 10), "10 Hz")


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mov", "a.m4a"])
def test_decode_refuses_a_file_that_changed_since(tmp_path, name):
    path = tmp_path / name

    def record(samples: np.ndarray) -> None:
        path.unlink(missing_ok=True)
        if path.suffix in (".mov", ".m4a"):
            encode(path, samples, "aac" if path.suffix == ".m4a" else "pcm_s16le")
        else:
            wav(path, samples)

    record(tone())
    clip = media.probe(path)
    media.decode(path, clip)
    record(tone(0.5))
    with pytest.raises(BadInput, match="changed since it was probed"):
        media.decode(path, clip)
    record(tone(hz=441))
    with pytest.raises(BadInput) as caught:
        media.decode(path, clip)
    assert str(caught.value) == (
        f"{path}: the file changed since it was probed: it was 48000 samples, 1 x 48000 Hz, and is of other "
        "content; run the command again"
    )
    record(tone())
    media.decode(path, clip)


def test_decode_of_part_of_a_file_minds_that_part_only(tmp_path):
    x = tone()
    clip = media.probe(wav(tmp_path / "a.wav", x), 5_000, 30_000)
    x[40_000:] = 0
    media.decode(wav(tmp_path / "a.wav", x), clip)
    x[29_999] += 1
    with pytest.raises(BadInput, match="is of other content"):
        media.decode(wav(tmp_path / "a.wav", x), clip)


@pytest.mark.skipif(os.name != "posix", reason="only POSIX names are bytes")
@pytest.mark.parametrize("name", [b"\xff bad.wav", b"\xff bad.flac", b"\xff bad.m4a"])
def test_names_that_are_not_utf_8(tmp_path, name):
    plain = tmp_path / ("plain" + Path(os.fsdecode(name)).suffix)
    encode(plain, tone(), "aac") if plain.suffix == ".m4a" else wav(plain, tone())
    path = plain.rename(tmp_path / os.fsdecode(name))
    clip = media.probe(path)
    assert len(media.decode(path, clip)) == 16_000
    path.write_bytes(path.read_bytes()[:20])
    refused(path, "truncated")


def test_what_decode_makes_of_48_khz_stereo_is_pinned(tmp_path):
    """If this fails, what the models hear changed: it must say so in PREPROCESSING."""
    expected = {"downmix": "mean", "resampler": "soxr", "quality": "HQ", "rate": 16_000}
    assert expected == media.PREPROCESSING
    noise = np.random.Generator(np.random.PCG64(7)).integers(-20_000, 20_000, (RATE, 2))
    path = wav(tmp_path / "noise.wav", noise.astype(np.int16))
    heard = media.decode(path, media.probe(path))
    assert heard.shape == (16_000,)
    assert (float(heard.mean()), float(heard.std())) == pytest.approx(MEAN_AND_STD, abs=1e-4)
    assert heard[[0, 1, 800, 5_000, 9_999, 15_998, 15_999]].tolist() == pytest.approx(HEARD, abs=1e-4)


MEAN_AND_STD = (0.001271, 0.140394)
HEARD = [0.261681, 0.022496, 0.152446, -0.296383, -0.030927, -0.262238, 0.130761]
