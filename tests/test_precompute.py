"""Precompute as users see it: hits and misses, kills, damage, one bad clip among good ones."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from pmm.store.catalog import Store

from .conftest import write_take

Run = Callable[..., Any]


def precompute(pmm: Run, dataset: Path, store: Path, *options: object) -> dict[str, Any]:
    done = pmm("precompute", dataset, "--store", store, "--json", *options)
    assert done.code == 0, done.err
    return json.loads(done.out)


def missing(report: dict[str, Any]) -> dict[str, int]:
    return {modality: share["missing"] for modality, share in report["plan"]["features"].items()}


@pytest.fixture
def filled(pmm: Run, captures: Path, tmp_path: Path) -> Path:
    store = tmp_path / "store"
    report = precompute(pmm, captures, store)
    assert report["outcome"]["rows"] == {"audio": 4, "text": 4, "image": 4, "target": 4}
    return store


ALL_HIT = {"audio": 0, "text": 0, "image": 0, "target": 0}


def test_second_run_computes_nothing_and_says_so(pmm: Run, captures: Path, filled: Path) -> None:
    before = sorted(path for path in filled.rglob("*") if path.is_file())
    done = pmm("precompute", captures, "--store", filled)
    assert (done.code, done.out) == (0, f"nothing to compute: all 4 clips are in {filled}\n")
    assert done.err.count("all cached") == 4
    assert sorted(path for path in filled.rglob("*") if path.is_file()) == before


def test_rows_are_what_the_clock_says_and_takes_are_listed(filled: Path) -> None:
    store = Store.open(filled)
    specs = {spec.modality: name for name, spec in store.specs.items()}
    takes = store.takes()
    assert sorted((take.subject, take.source) for take in takes) == [
        ("ada", "ada/take_0/take_0_ada"),
        ("ada", "ada/take_1/take_1_ada"),
        ("bob", "bob/take_2/take_2_bob"),
        ("bob", "bob/take_3/take_3_bob"),
    ]
    for take in takes:
        frames = round(take.clip.seconds * 30 + 1e-9)
        assert store.read(specs["image"], take.clip.id).shape == (frames, 96, 96, 3)
        assert store.read(specs["target"], take.target).shape == (frames, 52)
        steps = (round(take.clip.seconds * 16000) - 400) // 320 + 1
        assert len(store.read(specs["audio"], take.clip.id)) == steps
        assert len(store.read(specs["text"], take.clip.id)) == steps


def test_another_folder_other_names_and_flac_are_hits(
    pmm: Run, captures: Path, filled: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere" / "renamed"
    for number, wav in enumerate(sorted(captures.rglob("*.wav"))):
        folder = elsewhere / f"person{number // 2}" / f"clip_{number}"
        folder.mkdir(parents=True)
        sound, rate = soundfile.read(wav, dtype="int16")
        stem = folder / f"clip_{number}_person{number // 2}"
        soundfile.write(stem.with_suffix(".flac"), sound, rate)
        shutil.copy(wav.with_suffix(".csv"), stem.with_suffix(".csv"))
    assert missing(precompute(pmm, elsewhere, filled)) == ALL_HIT


def test_one_edited_cell_recomputes_its_targets_and_nothing_else(
    pmm: Run, captures: Path, filled: Path
) -> None:
    path = captures / "ada" / "take_0" / "take_0_ada.csv"
    lines = path.read_text().splitlines()
    cells = lines[7].split(",")
    cells[20] = "0.1234500000"
    lines[7] = ",".join(cells)
    path.write_text("\n".join(lines) + "\n")
    report = precompute(pmm, captures, filled)
    assert missing(report) == {**ALL_HIT, "target": 1}
    assert report["outcome"]["rows"] == {"target": 1}
    assert len(Store.open(filled).takes()) == 4


def test_another_face_or_rate_is_another_feature(
    pmm: Run, captures: Path, filled: Path, tmp_path: Path
) -> None:
    portrait = tmp_path / "face.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)).save(portrait)
    plan = precompute(pmm, captures, filled, "--face", portrait, "--dry-run")
    assert missing(plan) == {**ALL_HIT, "image": 4}
    plan = precompute(pmm, captures, filled, "--fps", 25, "--dry-run")
    assert missing(plan) == {**ALL_HIT, "image": 4, "target": 4}
    plan = precompute(pmm, captures, filled, "--audio-layer", 3, "--dry-run")
    assert missing(plan) == {**ALL_HIT, "audio": 4}


def test_features_do_not_depend_on_the_batch(pmm: Run, captures: Path, filled: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    precompute(pmm, captures, alone, "--batch-seconds", 1)
    together, single = Store.open(filled), Store.open(alone)
    assert together.specs.keys() == single.specs.keys()
    for name, spec in together.specs.items():
        rows = together.rows(name)
        assert rows == single.rows(name)
        for row in rows:
            ours, theirs = (store.read(name, row).astype(np.float64) for store in (together, single))
            if spec.modality in ("image", "target"):
                np.testing.assert_array_equal(ours, theirs)
            else:
                assert (np.abs(ours - theirs) <= 1e-3 * np.maximum(1, np.abs(theirs))).all()


def test_a_kill_loses_nothing_and_nothing_is_published_twice(
    pmm: Run, pmm_process: Run, captures: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    command = ("precompute", captures, "--store", store, "--fragment-mb", "0.01", "--batch-seconds", 1)
    kills = 0
    for wanted in (1, 4, 9):  # kill once so many records are there: between the first write and the last
        process = pmm_process(*command)
        while process.poll() is None and len(records(store)) < wanted:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL and 0 < len(published(store)) < 16
        assert pmm("store", "verify", store).code == 0
    assert kills == 3
    survivors, kept = records(store), published(store)
    report = precompute(pmm, captures, store, "--fragment-mb", "0.01")
    assert 0 < sum(report["outcome"]["rows"].values()) == 16 - len(kept)
    assert survivors < records(store)
    assert kept < published(store)
    assert len(published(store)) == 16
    assert set(published(store).values()) == {1}
    assert pmm("store", "verify", store).code == 0


def records(store: Path) -> set[Path]:
    return set(store.glob("records/*/*.json"))


def published(store: Path) -> Counter[tuple[str, str]]:
    """How often each (spec, row) was published."""
    return Counter((one.spec_id, row) for one in Store.open(store).fragments() for row in one.row_ids)


def test_an_interrupt_keeps_what_was_computed_and_exits_130(
    pmm_process: Run, captures: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    process = pmm_process(
        "precompute", captures, "--store", store, "--fragment-mb", "0.01", "--batch-seconds", 1
    )
    while process.poll() is None and not records(store):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "run the same command again to go on" in err
    assert records(store)


# ---------------------------------------------------------------- what people have in their folders


def spoil_wav(path: Path, kind: str) -> None:
    sound, rate = soundfile.read(path, dtype="int16")
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "no samples":
        soundfile.write(path, sound[:0], rate)
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-20_000])
    elif kind == "all zero":
        soundfile.write(path, sound * 0, rate)
    elif kind == "short":
        soundfile.write(path, sound[: rate // 10], rate)
    elif kind == "not audio":
        path.write_bytes(b"this is no sound at all" * 40)
    elif kind == "other length":
        soundfile.write(path, sound[: len(sound) // 2], rate)


def spoil_csv(path: Path, kind: str) -> None:
    lines = path.read_text().splitlines()
    names = lines[0].split(",")
    jaw = names.index("JawOpen")
    if kind == "column":
        names[jaw] = "JawAjar"
        lines[0] = ",".join(names)
    elif kind in ("text", "nan"):
        cells = lines[9].split(",")
        cells[jaw] = {"text": "wide", "nan": "nan"}[kind]
        lines[9] = ",".join(cells)
    elif kind == "no rows":
        del lines[1:]
    elif kind == "gap":
        del lines[20:28]
    elif kind == "ragged":
        lines[-1] = lines[-1][:100]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("empty", "empty"),
        ("no samples", "0 samples"),
        ("truncated", "truncated"),
        ("all zero", "zero"),
        ("short", "0.2 s"),
        ("not audio", "audio"),
        ("other length", "its audio take_3_bob.wav 0.6000 s"),
    ],
)
def test_bad_audio_is_named_and_the_others_go_on(
    pmm: Run, captures: Path, tmp_path: Path, kind: str, said: str
) -> None:
    wav = captures / "bob" / "take_3" / "take_3_bob.wav"
    spoil_wav(wav, kind)
    check_one_bad(pmm, captures, tmp_path / "store", "take_3_bob", said)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("column", "JawOpen"),
        ("text", "row 10, column JawOpen: 'wide'"),
        ("nan", "row 10, column JawOpen: 'nan'"),
        ("no rows", "no rows"),
        ("gap", "gap of 0.150 s after row 20"),
        ("ragged", "row 73"),
    ],
)
def test_a_bad_face_track_is_named_and_the_others_go_on(
    pmm: Run, captures: Path, tmp_path: Path, kind: str, said: str
) -> None:
    spoil_csv(captures / "bob" / "take_3" / "take_3_bob.csv", kind)
    check_one_bad(pmm, captures, tmp_path / "store", "take_3_bob", said)


def test_a_csv_without_audio_is_named_and_the_others_go_on(pmm: Run, captures: Path, tmp_path: Path) -> None:
    (captures / "bob" / "take_3" / "take_3_bob.wav").unlink()
    check_one_bad(pmm, captures, tmp_path / "store", "take_3_bob", "without audio")


def check_one_bad(pmm: Run, dataset: Path, store: Path, name: str, said: str) -> None:
    """One of four clips is bad: exit 3, one line for it, three published, a durable record, and again."""
    for attempt in (1, 2):
        done = pmm("precompute", dataset, "--store", store)
        assert done.code == 3, done.err
        assert "Traceback" not in done.err
        (line,) = [line for line in done.err.splitlines() if line.startswith("pmm: failed: ")]
        assert name in line
        assert said in line
        (failure,) = Store.open(store).open_failures()
        assert failure.attempt == attempt
        assert failure.reason in line
    specs = Store.open(store).specs
    rows = {spec.modality: len(Store.open(store).rows(name)) for name, spec in specs.items()}
    assert rows == {"audio": 3, "text": 3, "image": 3, "target": 3}


def test_a_mended_clip_is_no_open_failure(pmm: Run, captures: Path, tmp_path: Path) -> None:
    wav = captures / "bob" / "take_3" / "take_3_bob.wav"
    kept = wav.read_bytes()
    wav.write_bytes(b"")
    store = tmp_path / "store"
    assert pmm("precompute", captures, "--store", store).code == 3
    wav.write_bytes(kept)
    assert pmm("precompute", captures, "--store", store).code == 0
    assert Store.open(store).open_failures() == []
    assert len(Store.open(store).failures()) == 1


def test_folders_that_hold_no_dataset(pmm: Run, tmp_path: Path) -> None:
    store = tmp_path / "store"
    done = pmm("precompute", tmp_path / "nowhere", "--store", store)
    assert (done.code, done.complaint) == (1, f"{tmp_path / 'nowhere'}: no such dataset folder")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    done = pmm("precompute", tmp_path / "photos", "--store", store)
    assert done.code == 1
    assert "no clips found; looked for Live Link Face takes" in done.complaint
    assert "found 1 .jpg" in done.complaint
    assert not store.exists()


def test_places_that_are_no_store(pmm: Run, captures: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    done = pmm("precompute", captures, "--store", file)
    assert done.code == 1
    assert str(file) in done.complaint
    assert "is a file" in done.complaint
    assert file.read_text() == "mine"
    newer = tmp_path / "newer"
    Store.create(newer)
    mark = newer / "pmm.json"
    mark.chmod(0o644)
    mark.write_text(mark.read_text().replace('"format":1', '"format":2'))
    done = pmm("precompute", captures, "--store", newer)
    assert done.code == 1
    assert "newer" in done.complaint
    done = pmm("store", "info", tmp_path / "captures")
    assert done.code == 1
    assert "no store" in done.complaint


def test_mistyped_commands_are_usage_errors(pmm: Run) -> None:
    for args in (
        ("precompute",),
        ("fit", "--run"),
        ("nonsense",),
        ("precompute", "x", "--store", "y", "--fps", "0"),
    ):
        done = pmm(*args)
        assert done.code == 2
        assert "--help" in done.complaint


# ---------------------------------------------------------------- who is who, and what stands beside it


def test_one_bad_face_track_does_not_stop_the_other_take_of_its_clip(
    pmm: Run, captures: Path, tmp_path: Path
) -> None:
    for name in ("cyd", "dan"):  # the very sound of ada's take_0, with tracks of their own
        shutil.copytree(captures / "ada" / "take_0", captures / name / "take_0")
        for path in (captures / name / "take_0").iterdir():
            path.rename(path.with_name(path.name.replace("ada", name)))
    spoil_csv(captures / "cyd" / "take_0" / "take_0_cyd.csv", "text")
    spoil_csv(captures / "dan" / "take_0" / "take_0_dan.csv", "nan")
    done = pmm("precompute", captures, "--store", tmp_path / "store")
    assert done.code == 3
    failed = [line for line in done.err.splitlines() if line.startswith("pmm: failed: ")]
    assert sorted("cyd" in line or "dan" in line for line in failed) == [True, True]
    store = Store.open(tmp_path / "store")
    assert {spec.modality: len(store.rows(n)) for n, spec in store.specs.items()} == {
        "audio": 4,
        "text": 4,
        "image": 4,
        "target": 4,
    }


def test_folders_of_one_name_with_other_people_are_two_datasets(
    pmm: Run, captures: Path, tmp_path: Path
) -> None:
    other = tmp_path / "studio b" / "captures"
    write_take(other, "ada", "take_9", 1.1, 99)  # another ada
    store = tmp_path / "store"
    for _ in range(2):  # and the same labels the second time
        assert pmm("precompute", captures, other, "--store", store).code == 0
        takes = Store.open(store).takes()
        assert {(take.dataset, take.subject) for take in takes} == {
            ("captures", "ada"),
            ("captures", "bob"),
            ("studio b/captures", "ada"),
        }
    shutil.copytree(captures, tmp_path / "copy" / "captures")  # the same clips: the same people
    assert pmm("precompute", tmp_path / "copy" / "captures", "--store", store).code == 0
    assert len(Store.open(store).takes()) == 5


def test_models_that_cannot_be_had_leave_no_store_behind(pmm: Run, captures: Path, tmp_path: Path) -> None:
    done = pmm("precompute", captures, "--store", tmp_path / "store", "--models", "paper")
    assert done.code == 1
    assert "non-commercial" in done.complaint
    assert not (tmp_path / "store").exists()


def test_a_dry_run_writes_nothing(pmm: Run, captures: Path, tmp_path: Path) -> None:
    done = pmm("precompute", captures, "--store", tmp_path / "store", "--dry-run")
    assert (done.code, done.out.startswith("dry run: nothing computed")) == (0, True)
    assert not (tmp_path / "store").exists()


def test_an_interrupt_in_the_middle_publishes_the_clips_that_are_done(captures: Path, tmp_path: Path) -> None:
    from pmm.precompute.models import resolve
    from pmm.precompute.run import ClipDone, Limits, precompute

    def stop(event: object) -> None:
        if isinstance(event, ClipDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        precompute([captures], tmp_path / "store", resolve("tiny"), limits=Limits(1.0), on_event=stop)
    assert sorted(published(tmp_path / "store").values()) == [1, 1, 1, 1]  # one clip, four features


def test_the_plan_says_what_it_will_take(pmm: Run, captures: Path, tmp_path: Path) -> None:
    done = pmm("precompute", captures, "--store", tmp_path / "store", "--dry-run", "--json")
    told = json.loads(done.out)["plan"]
    forecast = told["forecast"]
    assert told["bytes"] < forecast["disk"] < told["bytes"] + 16 * 1000
    assert abs(forecast["free_disk"] - shutil.disk_usage(tmp_path).free) < 1 << 30
    assert 0 < forecast["seconds"] < 600
    assert forecast["memory"] > max(told["features"]["image"]["bytes"] // 4, 1)
    assert "needs     disk " in done.err
    assert "4 clips, 0:00:06; about 0:00:" in done.err


def test_features_and_clips_are_chosen(pmm: Run, captures: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"

    def rows() -> dict[str, int]:
        opened = Store.open(store)
        return {spec.modality: len(opened.rows(name)) for name, spec in opened.specs.items()}

    assert precompute(pmm, captures, store, "--only", "targets")["plan"]["features"].keys() == {"target"}
    assert rows() == {"target": 4}
    precompute(pmm, captures, store, "--only", "audio, text", "--limit", 3)
    assert rows() == {"target": 4, "audio": 3, "text": 3}
    report = precompute(pmm, captures, store, "--limit", 1)
    assert report["plan"]["clips_left_out"] == 3
    assert len(Store.open(store).takes()) == 4  # all are listed, whatever was computed of them
    precompute(pmm, captures, store)
    assert rows() == {"target": 4, "audio": 4, "text": 4, "image": 4}
    for wrong in ("smell", "", "audio,,smell"):
        done = pmm("precompute", captures, "--store", store, "--only", wrong)
        assert (done.code, "expected some of audio, text, image, targets" in done.complaint) == (2, True)


def test_other_forms_of_the_features_are_other_features(pmm: Run, captures: Path, filled: Path) -> None:
    smaller = ("--text-topk", 8, "--lip-features", "latent", "--only", "text,image")
    assert missing(precompute(pmm, captures, filled, *smaller)) == {"text": 4, "image": 4}
    assert missing(precompute(pmm, captures, filled, *smaller)) == {"text": 0, "image": 0}
    rough = ("--precision", "bf16", "--only", "audio,targets", "--dry-run")
    assert missing(precompute(pmm, captures, filled, *rough)) == {"audio": 4, "target": 0}
    told = pmm("store", "info", filled).out
    assert "tiny (untrained stand-in): 8 largest of 54; last" in told
    assert "tiny (untrained stand-in): latent; last" in told
    assert pmm("store", "verify", filled).code == 0


def test_timing_changes_no_bit(captures: Path, tmp_path: Path) -> None:
    """One thread or four before the models, a byte or all the room behind them, a slow reader of events."""
    from pmm.precompute.models import resolve
    from pmm.precompute.run import Limits
    from pmm.precompute.run import precompute as run

    def digests(store: Path, limits: Limits, pause: float) -> dict[str, dict[str, bytes]]:
        run([captures], store, resolve("tiny"), limits=limits, on_event=lambda _: time.sleep(pause))
        opened = Store.open(store)
        return {n: {row: opened.read(n, row).tobytes() for row in opened.rows(n)} for n in opened.specs}

    tight = digests(
        tmp_path / "tight", Limits(3.0, 1 << 20, decoded_bytes=1, waiting_bytes=1, decoders=1), 0.02
    )
    roomy = digests(tmp_path / "roomy", Limits(3.0, decoders=4), 0.0)
    assert tight == roomy


def test_the_stage_that_holds_a_run_up_is_named(
    captures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk, and slow files: as real ones, but for the pauses."""
    from pmm.precompute import media
    from pmm.precompute.models import resolve
    from pmm.precompute.run import BatchDone, Limits
    from pmm.precompute.run import precompute as run
    from pmm.store.medium import LocalMedium

    def paced(name: str, limits: Limits) -> Any:
        """Of the four batches, before what is left is published."""
        events: list[object] = []
        _, outcome = run([captures], tmp_path / name, resolve("tiny"), limits=limits, on_event=events.append)
        assert outcome is not None
        assert outcome.pace.audio == pytest.approx(6.05)
        _, _, _, last = [event.pace for event in events if isinstance(event, BatchDone)]
        return last

    decode = media.decode
    monkeypatch.setattr(media, "decode", lambda *args: time.sleep(0.6) or decode(*args))
    assert paced("files", Limits(1.0, decoders=1)).bottleneck == "decode"
    monkeypatch.undo()

    def before(operation: str, key: str) -> None:
        if operation == "fsync" and key.endswith("values"):
            time.sleep(0.15)

    monkeypatch.setattr(LocalMedium.__init__, "__defaults__", (before, None))
    pace = paced("disk", Limits(1.0, fragment_bytes=1, waiting_bytes=1))
    assert pace.bottleneck == "disk"
    assert pace.disk >= 12 * 0.15


def test_a_lost_spec_file_is_written_again(pmm: Run, captures: Path, filled: Path) -> None:
    lost = next(filled.glob("specs/*.json"))
    kept = lost.read_bytes()
    lost.unlink()
    assert pmm("precompute", captures, "--store", filled).code == 0
    assert lost.read_bytes() == kept


def test_damage_is_found_set_aside_and_computed_again(pmm: Run, captures: Path, filled: Path) -> None:
    payload = max(filled.glob("fragments/*/*/values/c/**/*"), key=lambda path: path.stat().st_size)
    payload.chmod(0o644)
    payload.write_bytes(payload.read_bytes()[:-1])
    assert pmm("store", "verify", filled).code == 3
    pmm("store", "verify", filled, "--repair")
    assert missing(precompute(pmm, captures, filled)) == {**ALL_HIT, "image": 4}
    assert missing(precompute(pmm, captures, filled)) == ALL_HIT
