"""Live Link Face: what is read from its CSV, what is written, which folders hold takes."""

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pmm import AlreadyThere, BadInput, NotFound
from pmm.precompute import datasets
from pmm.precompute.datasets import livelink
from pmm.store import clock
from pmm.store.clip import Clip
from pmm.store.rig import ARKIT52, LIP32

JAW = ARKIT52.index("JawOpen")


def curves(rows: int, seed: int = 0) -> np.ndarray:
    """(rows, 52) in (0, 1), each column of its own."""
    rng = np.random.default_rng(seed)
    phase = np.arange(rows)[:, None] * rng.uniform(0.02, 0.2, len(ARKIT52)) + rng.uniform(0, 6, len(ARKIT52))
    return 0.5 + 0.4 * np.sin(phase)


def capture(path: Path, values: np.ndarray, **options) -> Path:
    livelink.write(path, values, **options)
    return path


def at_times(path: Path, ticks: np.ndarray, values: np.ndarray) -> Path:
    """A CSV whose rows stand at any ``ticks``: time codes replaced in a written file."""
    header, *rows = capture(path, values).read_text().splitlines()
    body = [f"{clock.timecode(int(tick))},{row.split(',', 1)[1]}" for tick, row in zip(ticks, rows)]
    path.write_text("\n".join([header, *body]) + "\n")
    return path


# --- writing --------------------------------------------------------------------------------------


def test_the_file_is_spelt_as_the_app_spells_it(tmp_path):
    values = np.zeros((3, 1))
    values[:, 0] = 0.1, 0.25, 1 / 3
    path = capture(tmp_path / "a.csv", values, names=["jawopen"], start=clock.TICKS_PER_DAY - 1000)
    text = path.read_bytes().decode()
    header, *rows = text.split("\n")
    assert header.startswith("Timecode,BlendshapeCount,EyeBlinkLeft,EyeLookDownLeft,")
    assert header.endswith(",TongueOut," + ",".join(livelink.ROTATIONS))
    assert (
        ",JawForward,JawRight,JawLeft,JawOpen,MouthClose,MouthFunnel,MouthPucker,MouthRight,MouthLeft,"
        in header
    )
    assert header.count(",") == 62
    assert rows[3:] == [""], "one line feed ends the file"
    assert [row[:15] for row in rows[:3]] == ["23:59:59:59.000", "00:00:00:00.000", "00:00:00:01.000"]
    cells = rows[2].split(",")
    assert len(cells) == 63
    assert cells[1] == "61"
    assert cells[2 + JAW] == "0.3333333333"
    assert set(cells[2:]) == {"0.0000000000", "0.3333333333"}


def test_a_30_fps_file_counts_60ths_in_steps_of_two(tmp_path):
    path = capture(tmp_path / "a.csv", curves(32), fps=30, count_header="BlendShapeCount")
    lines = path.read_text().splitlines()
    codes = [line.split(",")[0] for line in lines[1:]]
    assert codes[:3] == ["00:00:00:00.000", "00:00:00:02.000", "00:00:00:04.000"]
    assert codes[29:] == ["00:00:00:58.000", "00:00:01:00.000", "00:00:01:02.000"]
    assert lines[0].split(",")[1] == "BlendShapeCount"


def test_writing_refuses_to_overwrite_and_to_write_nonsense(tmp_path):
    path = capture(tmp_path / "a.csv", curves(3))
    before = path.read_bytes()
    with pytest.raises(AlreadyThere, match="nothing is overwritten"):
        livelink.write(path, curves(4))
    assert path.read_bytes() == before
    broken = curves(3)
    broken[1, 1] = np.nan
    for values, options, message in [
        (broken, {}, "NaN"),
        (curves(3), {"fps": 25}, "60 or 30 frames per second, got 25"),
        (curves(3)[:, :5], {}, "expected"),
        (curves(3)[:, :1], {"names": ["JawOpn"]}, "JawOpn"),
    ]:
        with pytest.raises(BadInput, match=message):
            livelink.write(tmp_path / "b.csv", values, **options)
        assert not (tmp_path / "b.csv").exists()


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [60, 30])
def test_what_is_written_comes_back(tmp_path, fps):
    values = curves(100)
    track = livelink.read_targets(capture(tmp_path / "a.csv", values, fps=fps), fps)
    assert track.values.dtype == np.float32
    assert np.abs(track.values - values).max() < 1e-7
    assert (track.rows, track.fps, track.native_fps, track.clipped) == (100, fps, fps, 0)
    assert track.seconds == 100 / fps
    assert track.drops == ()
    assert track.constant == ()


def test_columns_map_by_name_in_any_order_case_and_spelling(tmp_path):
    plain = capture(tmp_path / "a.csv", curves(20))
    expected = livelink.read_targets(plain, 60).values
    cells = [line.split(",") for line in plain.read_text().splitlines()]
    order = np.random.default_rng(1).permutation(63)
    order = order[order != 60]  # a file without one of the rotations
    shuffled = [[row[i] for i in order] for row in cells]
    shuffled[0] = [name.upper() if name != "BlendshapeCount" else "BlendShapeCount" for name in shuffled[0]]
    other = tmp_path / "b.csv"
    other.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(",".join(row) for row in shuffled).encode() + b"\r\n\r\n")
    assert np.array_equal(livelink.read_targets(other, 60).values, expected)


def test_rows_stand_where_their_time_code_says(tmp_path):
    """A device at 59.9 Hz: by row number, frame 1790 would be 50 ms late after 30 s."""
    hz, rows = 59.9, 1797
    seconds = clock.device_times(rows, hz)
    values = np.repeat((seconds / 40)[:, None], 52, axis=1)
    path = capture(tmp_path / "a.csv", values, device_hz=hz, start=123_456_789)
    track = livelink.read_targets(path, 30)
    assert track.values.shape == (900, 52)
    assert abs(track.native_fps - hz) < 1e-3
    inside = track.values[:-1, JAW]
    assert np.abs(inside * 40 - clock.frame_times(900, 30)[:-1]).max() < 1e-4


def test_a_take_may_run_past_midnight(tmp_path):
    values = curves(120)
    plain = livelink.read_targets(capture(tmp_path / "a.csv", values), 30)
    late = capture(tmp_path / "b.csv", values, start=clock.TICKS_PER_DAY - 30_500)
    assert np.abs(livelink.read_targets(late, 30).values - plain.values).max() < 1e-6


def test_dropped_frames_are_interpolated_and_told(tmp_path):
    rows = clock.export_ticks(90, 30)
    kept = np.delete(np.arange(90), 40)
    ramp = np.repeat(np.linspace(0, 0.9, 90)[:, None], 52, axis=1)
    track = livelink.read_targets(at_times(tmp_path / "a.csv", rows[kept], ramp[kept]), 30)
    assert track.values.shape == (90, 52)
    assert np.abs(track.values - ramp).max() < 1e-6
    (drop,) = track.drops
    assert (drop.row, drop.timecode, round(drop.gap_seconds, 4)) == (41, "00:00:01:18.000", 0.0667)


def test_gaps_up_to_100_ms_pass_and_longer_ones_are_refused_with_their_time(tmp_path):
    rows = clock.export_ticks(60, 60)
    rows[30:] += 6_000 - 1_000
    livelink.read_targets(at_times(tmp_path / "a.csv", rows, curves(60)), 30)
    rows[30:] += 1
    path = at_times(tmp_path / "b.csv", rows, curves(60))
    with pytest.raises(BadInput) as caught:
        livelink.read_targets(path, 30)
    assert str(caught.value) == (
        f"{path}: a gap of 0.100 s after row 31 (00:00:00:29.000, 0.48 s into the take); up to 100 ms is "
        "interpolated, split it there"
    )


def test_values_outside_0_to_1_are_clipped_and_counted(tmp_path):
    values = curves(10)
    values[3, JAW], values[4, JAW], values[5, 0] = 1.0033, -0.002, 2
    track = livelink.read_targets(capture(tmp_path / "a.csv", values), 60)
    assert track.clipped == 3
    assert (track.values[3, JAW], track.values[4, JAW], track.values[5, 0]) == (1, 0, 1)


def test_constant_columns_are_named(tmp_path):
    values = curves(10)
    values[:, JAW], values[:, 3] = 0.25, 0
    track = livelink.read_targets(capture(tmp_path / "a.csv", values), 60)
    assert track.constant == ("EyeLookOutLeft", "JawOpen")


def test_the_output_of_this_algorithm_version_is_pinned(tmp_path):
    """If this fails, what is stored changed: raise the version in target_spec."""
    ticks = np.array([0, 990, 2010, 3001, 7000, 8003])
    path = at_times(tmp_path / "a.csv", ticks, curves(6, seed=3) * 1.3)
    track = livelink.read_targets(path, 30)
    assert track.values.shape == (5, 52)
    golden = [0.356144, 0.251680, 0.201053, 0.184279, 0.151276]
    assert np.abs(track.values[:, JAW] - golden).max() < 1e-5
    assert livelink.target_spec(30).id == "da6618b507150764e9059ed7a69df0242ca379bb02456c5293b1f71a97aeda69"
    assert livelink.target_spec(30).id != livelink.target_spec(60).id


def edited(path: Path, row: int, column: int, cell: str) -> Path:
    lines = capture(path, curves(12)).read_text().splitlines()
    cells = lines[row - 1].split(",")
    cells[column] = cell
    lines[row - 1] = ",".join(cells)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("row", "column", "cell", "message"),
    [
        (5, 2 + JAW, "open", "row 5, column JawOpen: 'open', expected a number from 0 to 1"),
        (2, 2, "", "row 2, column EyeBlinkLeft: '', expected a number from 0 to 1"),
        (13, 53, "nan", "row 13, column TongueOut: 'nan', expected a number from 0 to 1"),
        (3, 2 + JAW, "inf", "row 3, column JawOpen: 'inf', expected a number from 0 to 1"),
        (3, 2 + JAW, "0x1p-2", "row 3, column JawOpen: '0x1p-2', expected a number from 0 to 1"),
        (7, 3, "0.1,0.2", "row 7 has 64 cells, the header has 63; the file was cut off or edited"),
        (4, 0, "0:0:61:2", "row 4, column Timecode: '0:0:61:2', expected HH:MM:SS:FF.sss with FF in 60ths"),
        (4, 0, "12.25", "row 4, column Timecode: '12.25', expected HH:MM:SS:FF.sss with FF in 60ths"),
        (
            *(4, 0, "00:00:00:00.500"),
            "row 4, column Timecode: 00:00:00:00.500 is not after 00:00:00:01.000 in the row before; "
            "time must advance",
        ),
        (
            *(4, 0, "00:00:00:01.000"),
            "row 4, column Timecode: 00:00:00:01.000 is not after 00:00:00:01.000 in the row before; "
            "time must advance",
        ),
        (
            *(1, 0, "Time"),
            "not a Live Link Face CSV: row 1 has no column Timecode "
            "(it begins 'Time,BlendshapeCount,EyeBlinkLeft,EyeLoo')",
        ),
        (*(1, 2 + JAW, "Jaw"), "1 of 52 coefficients are missing (JawOpen); it needs one column for each"),
    ],
)
def test_what_is_wrong_is_said_with_row_and_column(tmp_path, row, column, cell, message):
    path = edited(tmp_path / "a.csv", row, column, cell)
    with pytest.raises(BadInput) as caught:
        livelink.read_targets(path, 30)
    assert str(caught.value) == f"{path}: {message}"


def test_files_without_rows_or_without_text(tmp_path):
    header = capture(tmp_path / "a.csv", curves(1)).read_text().splitlines()[0]
    cases = {
        "empty.csv": (b"", "is empty, expected a Live Link Face CSV"),
        "header.csv": (header.encode(), "no rows under the header; a take has at least 2"),
        "one.csv": ((tmp_path / "a.csv").read_bytes(), "1 rows under the header; a take has at least 2"),
        "movie.csv": (bytes(range(256)), "not a CSV: it holds bytes that are no text"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadInput) as caught:
            livelink.read_targets(tmp_path / name, 30)
        assert str(caught.value) == f"{tmp_path / name}: {message}"
    with pytest.raises(NotFound, match="no such face track"):
        livelink.read_targets(tmp_path / "none.csv", 30)


def test_a_cut_off_file_is_refused(tmp_path):
    path = capture(tmp_path / "a.csv", curves(30))
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(BadInput, match=r"row 31 has \d+ cells, the header has 63; the file was cut off"):
        livelink.read_targets(path, 30)


def test_audio_of_another_length_is_refused_with_both_durations(tmp_path):
    track = livelink.read_targets(capture(tmp_path / "a.csv", curves(120)), 30)
    fine = Clip("0" * 64, 48_000, 1, 0, 48_000 * 2 + 4_800)
    livelink.check_durations(fine, track, Path("a.wav"), Path("a.csv"))
    long = Clip("0" * 64, 48_000, 1, 0, 48_000 * 2 + 4_801)
    with pytest.raises(BadInput) as caught:
        livelink.check_durations(long, track, Path("in/a.wav"), Path("in/a.csv"))
    assert str(caught.value) == (
        "in/a.csv: the face track lasts 2.0000 s and its audio a.wav 2.1000 s; they may differ by 0.1 s: "
        "are they of one take?"
    )


# --- folders --------------------------------------------------------------------------------------


def take(
    folder: Path, stem: str, *, audio: str | None = ".wav", csv: str | None = ".csv", text: str = ""
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if csv:
        capture(folder / f"{stem}{csv}", curves(4))
    if audio:
        (folder / f"{stem}{audio}").write_bytes(b"not opened by find")
    if text:
        (folder / f"{stem}.txt").write_text(text + "\n", encoding="utf-8")


def names(found: datasets.Found) -> list[tuple[str, str, str]]:
    return [(r.name, r.subject, r.audio.name) for r in found.recordings]


def test_the_layout_of_a_made_corpus(tmp_path):
    take(tmp_path / "bob" / "take002", "take002_bob", text="你好，妈妈。")
    take(tmp_path / "bob" / "take001", "take001_bob", audio=".flac")
    take(tmp_path / "ann_x" / "take001", "take001_ann_x")
    (tmp_path / "subjects.csv").write_text("subject,gender,language\nbob,male,en\nann_x,female,cmn\n")
    found = datasets.find(tmp_path)
    assert found.layout == "livelink"
    assert found.refused == ()
    assert names(found) == [
        ("ann_x/take001/take001_ann_x", "ann_x", "take001_ann_x.wav"),
        ("bob/take001/take001_bob", "bob", "take001_bob.flac"),
        ("bob/take002/take002_bob", "bob", "take002_bob.wav"),
    ]
    ann, _, second = found.recordings
    assert (ann.gender, ann.language, ann.text) == ("female", "cmn", "")
    assert (second.gender, second.language, second.text) == ("male", "en", "你好，妈妈。")
    assert second.target == tmp_path / "bob" / "take002" / "take002_bob.csv"


def test_the_apps_own_take_folders(tmp_path):
    folder = tmp_path / "20240131_MySlate_3"
    take(folder, "MySlate_3_Ada_s_iPhone", audio=".mov")
    (folder / "take.json").write_text("{}")
    (folder / "frame_log.csv").write_text("F,0,0\n")
    other = tmp_path / "20240131_MySlate_4"
    take(other, "MySlate_4_Ada_s_iPhone", audio=None)
    (other / "take.mov").write_bytes(b"")
    assert names(datasets.find(tmp_path)) == [
        ("20240131_MySlate_3/MySlate_3_Ada_s_iPhone", "Ada_s_iPhone", "MySlate_3_Ada_s_iPhone.mov"),
        ("20240131_MySlate_4/MySlate_4_Ada_s_iPhone", "Ada_s_iPhone", "take.mov"),
    ]


def test_calibrated_raw_and_neutral_files_are_one_take(tmp_path):
    for kind in ("_cal", "_raw", "_neutral"):
        take(tmp_path, f"S_1_ada{kind}", audio=None)
    take(tmp_path, "S_1_ada", csv=None)
    take(tmp_path, "S_2_ada_raw", audio=None)
    take(tmp_path, "S_2_ada", csv=None)
    found = datasets.find(tmp_path)
    assert names(found) == [("S_1_ada", "ada", "S_1_ada.wav"), ("S_2_ada", "ada", "S_2_ada.wav")]
    assert [r.target.name for r in found.recordings] == ["S_1_ada_cal.csv", "S_2_ada_raw.csv"]
    assert found.refused == ()


def test_a_flat_folder_with_names_of_any_kind(tmp_path):
    take(tmp_path / "flat", "hello", audio=".WAV")
    take(tmp_path / "flat", "world")
    assert names(datasets.find(tmp_path / "flat")) == [
        ("hello", "flat", "hello.WAV"),
        ("world", "flat", "world.wav"),
    ]


def test_what_cannot_be_used_is_listed_not_dropped(tmp_path):
    take(tmp_path / "a", "S_1_ada")
    take(tmp_path / "a", "S_2_ada", audio=None)
    take(tmp_path / "b", "S_3_ada", csv=None)
    take(tmp_path / "c", "S_4_ada", csv=None, audio=".mov")
    (tmp_path / "c" / "take.json").write_text("{}")
    take(tmp_path / "d", "S_5_ada")
    (tmp_path / "d" / "S_5_ada.txt").write_bytes(b"\xff\xfe\xff")
    found = datasets.find(tmp_path)
    assert [r.name for r in found.recordings] == ["a/S_1_ada"]
    reasons = {path.relative_to(tmp_path).as_posix(): reason for path, reason in found.refused}
    assert list(reasons) == ["a/S_2_ada.csv", "b/S_3_ada.wav", "c", "d/S_5_ada.csv"]
    assert (
        reasons["a/S_2_ada.csv"]
        == "a face track without audio: looked for S_2_ada.wav, .flac or .mov beside it"
    )
    assert "MetaHuman Animator" in reasons["c"]
    assert "transcript" in reasons["d/S_5_ada.csv"]


def test_nothing_found_says_what_was_looked_for_and_what_is_there(tmp_path):
    with pytest.raises(NotFound) as missing:
        datasets.find(tmp_path / "nowhere")
    assert str(missing.value) == f"{tmp_path / 'nowhere'}: no such dataset folder"
    (tmp_path / "docs").mkdir()
    for name in ("a.pdf", "b.pdf", "docs/notes.md"):
        (tmp_path / name).touch()
    with pytest.raises(BadInput) as caught:
        datasets.find(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: no clips found; looked for Live Link Face takes (<take>_<subject>.csv with a .wav, "
        ".flac or .mov of that name or in that folder); found 2 .pdf, 1 .md"
    )
    with pytest.raises(BadInput, match="is a file, expected a dataset folder"):
        datasets.find(tmp_path / "a.pdf")
    with pytest.raises(BadInput, match="layout 'vhs' is none of livelink"):
        datasets.find(tmp_path, "vhs")


def test_loops_of_links_are_walked_once(tmp_path):
    take(tmp_path / "data" / "a", "S_1_ada")
    (tmp_path / "data" / "a" / "back").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "gone").symlink_to(tmp_path / "nowhere")
    outside = tmp_path / "outside"
    take(outside, "S_2_bob")
    (tmp_path / "data" / "b").symlink_to(outside)
    assert [r.name for r in datasets.find(tmp_path / "data").recordings] == ["a/S_1_ada", "b/S_2_bob"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list any folder")
def test_an_unreadable_folder_is_listed(tmp_path):
    take(tmp_path / "a", "S_1_ada")
    (tmp_path / "b").mkdir(mode=0)
    found = datasets.find(tmp_path)
    assert found.refused == ((tmp_path / "b", "cannot be listed (Permission denied)"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name,age\nbob,3\n",
            "row 1 has no column subject (it is 'name, age'); expected subject,gender,language,split",
        ),
        ("", "row 1 has no column subject (it is ''); expected subject,gender,language,split"),
        (
            "subject,gender\nbob,male\n\nbob,male\n",
            "row 4: subject 'bob' stands in row 2 already; keep one",
        ),
        ("subject;gender\nbob;male\n;male\n", "row 3 has no subject; name one or delete the row"),
        ("subject,gender\n,\n", "no rows under the header; name the subjects, or take the file away"),
    ],
)
def test_a_broken_subjects_table_is_refused_with_its_row(tmp_path, text, message):
    take(tmp_path / "bob" / "t", "t_bob")
    (tmp_path / "subjects.csv").write_text(text)
    with pytest.raises(BadInput) as caught:
        datasets.find(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'subjects.csv'}: {message}"


def test_a_subjects_table_in_the_encoding_of_old_windows_is_refused(tmp_path):
    take(tmp_path / "t", "t_bob")
    (tmp_path / "subjects.csv").write_bytes("subject\nZoë\n".encode("cp1252"))
    with pytest.raises(BadInput, match=r"subjects\.csv: cannot be read .*; expected a CSV in UTF-8"):
        datasets.find(tmp_path)


def test_a_subjects_table_as_a_spreadsheet_writes_it(tmp_path):
    take(tmp_path, "t_bob")
    table = "Split; Subject ;GENDER;Language\r\ntest; bob ;male;en\r\n;;;\r\n"
    (tmp_path / "Subjects.csv").write_bytes(b"\xef\xbb\xbf" + table.encode())
    (found,) = datasets.find(tmp_path).recordings
    assert (found.subject, found.gender, found.language, found.split) == ("bob", "male", "en", "test")


# --- who it is ------------------------------------------------------------------------------------


def subjects(folder: Path, *who: str) -> None:
    (folder / "subjects.csv").write_text("subject,gender\n" + "".join(f"{name},\n" for name in who))


def found_subjects(folder: Path) -> dict[str, str]:
    return {r.name: r.subject for r in datasets.find(folder).recordings}


def test_a_folder_named_in_the_table_says_who_whatever_the_file_is_called(tmp_path):
    subjects(tmp_path, "P01", "P02", "P03")
    take(tmp_path / "P01", "scene_0_happy")
    take(tmp_path / "P02", "scene_0_happy")
    take(tmp_path / "P02" / "day one" / "scene_1", "scene_1_sad")
    take(tmp_path / "session" / "P03", "hello")
    take(tmp_path / "P01" / "as" / "P02", "x")
    found = datasets.find(tmp_path)
    assert found.refused == ()
    assert {r.name: r.subject for r in found.recordings} == {
        "P01/as/P02/x": "P02",
        "P01/scene_0_happy": "P01",
        "P02/day one/scene_1/scene_1_sad": "P02",
        "P02/scene_0_happy": "P02",
        "session/P03/hello": "P03",
    }


def test_the_files_own_ending_comes_before_its_folders_and_the_longest_name_wins(tmp_path):
    subjects(tmp_path, "x", "ann_x", "bob")
    take(tmp_path / "bob", "S_1_ann_x")
    take(tmp_path, "bob")
    assert found_subjects(tmp_path) == {"bob/S_1_ann_x": "ann_x", "bob": "bob"}


def test_a_subject_that_the_table_does_not_know_is_refused(tmp_path):
    subjects(tmp_path, "P01")
    take(tmp_path / "P01", "scene_0_happy")
    take(tmp_path / "P1", "scene_0_happy")
    take(tmp_path / "takes" / "P9", "one_P9")
    take(tmp_path / "more", "hello")
    found = datasets.find(tmp_path)
    assert [r.name for r in found.recordings] == ["P01/scene_0_happy"]
    rest = (
        " is not in subjects.csv; add a row for it there, or end the file's name or name a folder above it "
        "with a subject of that table"
    )
    assert found.refused == (
        (tmp_path / "P1" / "scene_0_happy.csv", f"its subject 'happy'{rest}"),
        (tmp_path / "more" / "hello.csv", f"its subject 'more'{rest}"),
        (tmp_path / "takes" / "P9" / "one_P9.csv", f"its subject 'P9'{rest}"),
    )


def test_without_a_table_names_are_read_as_the_app_and_people_write_them(tmp_path):
    take(tmp_path / "ann" / "day 1", "hello")
    take(tmp_path / "bob" / "day 1", "hello")
    take(tmp_path / "ann_x" / "take001", "S_1_ann_x")
    take(tmp_path / "20240131_S_1", "S_1_Ada_s_iPhone")
    assert found_subjects(tmp_path) == {
        "20240131_S_1/S_1_Ada_s_iPhone": "Ada_s_iPhone",
        "ann/day 1/hello": "ann",
        "ann_x/take001/S_1_ann_x": "ann_x",
        "bob/day 1/hello": "bob",
    }


def test_the_folder_one_stands_in_names_the_subject_too(tmp_path, monkeypatch):
    take(tmp_path / "flat", "hello")
    monkeypatch.chdir(tmp_path / "flat")
    assert found_subjects(Path(".")) == {"hello": "flat"}


# --- other tables beside the takes ----------------------------------------------------------------


def test_a_shot_list_is_no_face_track_and_does_not_part_a_take_from_its_movie(tmp_path):
    folder = tmp_path / "20240131_S_1"
    take(folder, "S_1_ada", audio=None)
    (folder / "take.mov").write_bytes(b"")
    (folder / "shotlist.csv").write_text("shot,note\n1,close\n")
    (tmp_path / "notes.csv").write_text("")
    found = datasets.find(tmp_path)
    assert found.refused == ()
    assert names(found) == [("20240131_S_1/S_1_ada", "ada", "take.mov")]


def test_a_table_with_time_codes_or_with_audio_of_its_name_is_a_face_track(tmp_path):
    take(tmp_path, "S_1_ada")
    (tmp_path / "S_2_ada.csv").write_bytes(b"\xef\xbb\xbftimeCode , JawOpen\n")
    take(tmp_path, "S_3_ada", csv=None)
    (tmp_path / "S_3_ada_raw.csv").write_text("damaged\n")
    found = datasets.find(tmp_path)
    assert [r.name for r in found.recordings] == ["S_1_ada", "S_3_ada"]
    assert [path.name for path, _ in found.refused] == ["S_2_ada.csv"]


def test_lip32_selects_by_name_from_what_is_stored():
    assert set(LIP32) <= set(ARKIT52)
    assert livelink.target_spec(30).settings["names"] == list(ARKIT52)


def test_soundfile_reads_what_find_lists(tmp_path):
    """find's suffixes are ones that libsndfile or FFmpeg read; WAV in capitals included."""
    take(tmp_path, "S_1_ada", audio=None)
    soundfile.write(tmp_path / "S_1_ada.WAV", np.ones(4800) / 2, 16_000)
    (recording,) = datasets.find(tmp_path).recordings
    assert soundfile.info(recording.audio).frames == 4800
