"""Live Link Face: the CSV of 52 ARKit coefficients, in and out, and folders of takes.

A CSV has a ``Timecode``, a ``BlendshapeCount`` (also spelt ``BlendShapeCount``), 52 coefficients and
nine rotations. Columns map by name, never by position. Rows are placed by their time code, never
by their number: real devices run at 59.90 to 59.97 Hz, and taking rows as 60 fps drifts.

Rows are numbered as an editor or a spreadsheet numbers them: the header is row 1.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pmm import AlreadyThere, BadInput, NotFound
from pmm.precompute.datasets import Found, Recording, refuse_special, walk
from pmm.store import clock
from pmm.store.clip import Clip
from pmm.store.feature import FeatureSpec
from pmm.store.rig import ARKIT52, columns

ROTATIONS = (
    *("HeadYaw", "HeadPitch", "HeadRoll"),
    *("LeftEyeYaw", "LeftEyePitch", "LeftEyeRoll"),
    *("RightEyeYaw", "RightEyePitch", "RightEyeRoll"),
)
COUNT_HEADERS = ("BlendshapeCount", "BlendShapeCount")

GAP_LIMIT_MS = 100
"""Rows up to this far apart are interpolated; a longer gap refuses the take."""

MAX_MISMATCH_SECONDS = 0.1
"""How much audio and face track of one take may differ in length."""

_GAP_LIMIT_TICKS = clock.ticks(GAP_LIMIT_MS)
_DROP_RATIO = 1.5  # an interval this much longer than the median is a dropped frame


def target_spec(fps: int) -> FeatureSpec:
    """How :func:`parse_targets` makes (T, 52) float32 coefficients at ``fps``."""
    settings = {
        "names": list(ARKIT52),
        "resampling": "linear, by time code",
        "gap_limit_ms": GAP_LIMIT_MS,
        "clipping": "0..1 before resampling",
    }
    return FeatureSpec("target", "livelink-csv/1", "float32", (len(ARKIT52),), fps, settings)


# --- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drop:
    """An interval longer than the take's own, interpolated: its length and where it begins."""

    row: int
    timecode: str
    at_seconds: float
    gap_seconds: float


@dataclass(frozen=True)
class Track:
    """A face track on the video clock, and what its file was like.

    values     (T, 52) float32 in [0, 1], in ARKIT52 order, at ``fps``
    seconds    first to last row and one interval
    rows       data rows in the file, which came at ``native_fps`` on average, drops included
    clipped    how many cells of the file lay outside [0, 1] and were moved to its edge
    constant   coefficients that never change (a calibrated take has some)
    """

    values: np.ndarray
    fps: int
    seconds: float
    rows: int
    native_fps: float
    drops: tuple[Drop, ...]
    clipped: int
    constant: tuple[str, ...]


def read_targets(path: Path, fps: int, data: bytes | None = None) -> Track:
    """The face track in a CSV file, or in ``data`` if its bytes have been read already.

    Raises NotFound, or what :func:`parse_targets` raises.
    """
    return parse_targets(read_bytes(path) if data is None else data, fps, str(path))


def read_bytes(path: Path) -> bytes:
    """The file as it is, for ``clip.target_id`` and :func:`parse_targets` to see the same bytes."""
    try:
        refuse_special(path)
        size = path.stat().st_size
        if size > _LARGEST:
            raise BadInput(f"{path}: {size} bytes; a face track of hours has fewer than {_LARGEST}")
        return path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"{path}: no such face track") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None


def parse_targets(data: bytes, fps: int, where: str) -> Track:
    """The face track in the bytes of a CSV, resampled linearly to frames at ``j / fps`` seconds.

    T is the duration (first to last row, plus the median interval) in frames, rounded.

    Raises BadInput, one line naming ``where``, row and column: not such a CSV, a missing column, a
    ragged row, text or NaN in a cell, no rows, time that does not advance, or a gap over 100 ms.
    """
    table = _Table.split(data, where)
    ticks = table.ticks()
    native = table.coefficients()
    drops = _check_gaps(ticks, where)
    length = clock.track_ticks(ticks)
    count = clock.frames(length, clock.TICKS_PER_SECOND, fps)
    held = np.clip(native, 0, 1)
    return Track(
        values=_interpolate(held, clock.track_positions(ticks, count, fps)),
        fps=fps,
        seconds=clock.seconds(length, clock.TICKS_PER_SECOND),
        rows=len(ticks),
        native_fps=clock.track_rate(ticks),
        drops=drops,
        clipped=int(np.count_nonzero(native != held)),
        constant=tuple(np.array(ARKIT52)[np.ptp(native, axis=0) == 0].tolist()),
    )


def _interpolate(rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """(N, K) rows at (T,) real positions in [0, N - 1]: (T, K) float32."""
    below = np.minimum(positions.astype(np.int64), len(rows) - 2)
    weight = (positions - below)[:, None]
    return (rows[below] * (1 - weight) + rows[below + 1] * weight).astype(np.float32)


def _check_gaps(ticks: np.ndarray, where: str) -> tuple[Drop, ...]:
    intervals = np.diff(ticks)
    longer = np.flatnonzero(intervals > _DROP_RATIO * np.median(intervals)).tolist()
    for index in np.flatnonzero(intervals > _GAP_LIMIT_TICKS).tolist():
        gap = _drop(ticks, index)
        raise BadInput(
            f"{where}: a gap of {gap.gap_seconds:.3f} s after row {gap.row} ({gap.timecode}, "
            f"{gap.at_seconds:.2f} s into the take); up to {GAP_LIMIT_MS} ms is interpolated, split it there"
        )
    return tuple(_drop(ticks, index) for index in longer)


def _drop(ticks: np.ndarray, index: int) -> Drop:
    def to_seconds(length: np.int64) -> float:
        return clock.seconds(int(length), clock.TICKS_PER_SECOND)

    return Drop(
        index + 2,
        clock.timecode(int(ticks[index])),
        to_seconds(ticks[index] - ticks[0]),
        to_seconds(ticks[index + 1] - ticks[index]),
    )


_TIMECODE = re.compile(r"(\d{1,2}):([0-5]?\d):([0-5]?\d):([0-5]?\d)(?:\.(\d{1,3}))?")


@dataclass(frozen=True)
class _Table:
    """Lines of a CSV whose header has been understood. ``wanted`` are the columns of ARKIT52."""

    where: str
    lines: list[str]
    names: list[str]
    time_column: int
    wanted: list[int]

    @classmethod
    def split(cls, data: bytes, where: str) -> _Table:
        header, *lines = _text(data, where).splitlines() or [""]
        names = [name.strip() for name in header.split(",")]
        folded = [name.casefold() for name in names]
        if "timecode" not in folded:
            raise BadInput(
                f"{where}: not a Live Link Face CSV: row 1 has no column Timecode (it begins {header[:40]!r})"
            )
        wanted = columns(ARKIT52, names, where)
        while lines and not lines[-1].strip():
            lines.pop()
        if len(lines) < 2:
            raise BadInput(f"{where}: {len(lines) or 'no'} rows under the header; a take has at least 2")
        table = cls(where, lines, names, folded.index("timecode"), wanted)
        table._check_widths()
        return table

    def _check_widths(self) -> None:
        commas = len(self.names) - 1
        for row, line in enumerate(self.lines, start=2):
            if line.count(",") != commas:
                raise BadInput(
                    f"{self.where}: row {row} has {line.count(',') + 1} cells, the header "
                    f"has {commas + 1}; the file was cut off or edited"
                )

    def ticks(self) -> np.ndarray:
        """Time of each row in ticks, (N,) int64, strictly increasing (past midnight, too)."""
        cells = [line.split(",", self.time_column + 1)[self.time_column] for line in self.lines]
        fields = [self._fields(row, cell) for row, cell in enumerate(cells, start=2)]
        ticks = clock.timecode_ticks(*np.array(fields, dtype=np.int64).T)
        wraps = np.diff(ticks) < -clock.TICKS_PER_DAY // 2
        ticks[1:] += np.cumsum(wraps) * clock.TICKS_PER_DAY
        for index in np.flatnonzero(np.diff(ticks) <= 0):
            raise BadInput(
                f"{self.where}: row {index + 3}, column Timecode: {cells[index + 1]} is not after "
                f"{cells[index]} in the row before; time must advance"
            )
        return ticks

    def _fields(self, row: int, cell: str) -> tuple[int, int, int, int, int]:
        match = _TIMECODE.fullmatch(cell.strip())
        if match is None or int(match[1]) > 23:
            raise BadInput(
                f"{self.where}: row {row}, column Timecode: {cell.strip()[:20]!r}, "
                "expected HH:MM:SS:FF.sss with FF in 60ths"
            )
        hour, minute, second, frame, thousandths = match.groups()
        return int(hour), int(minute), int(second), int(frame), int((thousandths or "0").ljust(3, "0"))

    def coefficients(self) -> np.ndarray:
        """(N, 52) float64 as written."""
        try:
            values = np.loadtxt(self.lines, delimiter=",", usecols=self.wanted, comments=None, ndmin=2)
        except ValueError:
            raise self._bad_cell() from None
        if not np.isfinite(values).all():
            raise self._bad_cell()
        return values

    def _bad_cell(self) -> BadInput:
        """The slow, careful path: find the cell that is at fault."""
        for row, line in enumerate(self.lines, start=2):
            cells = line.split(",")
            for column in self.wanted:
                if not _is_number(cells[column]):
                    return BadInput(
                        f"{self.where}: row {row}, column {self.names[column]}: "
                        f"{cells[column].strip()[:20]!r}, expected a number from 0 to 1"
                    )
        return BadInput(f"{self.where}: its cells cannot be read as numbers")


def _is_number(cell: str) -> bool:
    try:
        return bool(np.isfinite(float(cell))) and "_" not in cell
    except ValueError:
        return False


def _text(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadInput(f"{where}: not a CSV: it holds bytes that are no text") from None
    if not text.strip():
        raise BadInput(f"{where}: is empty, expected a Live Link Face CSV")
    return text


def check_durations(clip: Clip, track: Track, audio: Path, target: Path) -> None:
    """Raises BadInput, naming both files and durations, if they differ by over 100 ms.

    Within that they are cropped to the shorter; beyond it they are not of one performance.
    """
    if round(abs(clip.seconds - track.seconds), 6) > MAX_MISMATCH_SECONDS:
        raise BadInput(
            f"{target}: the face track lasts {track.seconds:.4f} s and its audio {audio.name} "
            f"{clip.seconds:.4f} s; they may differ by {MAX_MISMATCH_SECONDS} s: are they of one take?"
        )


# --- writing --------------------------------------------------------------------------------------


def write(
    path: Path,
    values: np.ndarray,
    *,
    names: Sequence[str] = ARKIT52,
    fps: int = 60,
    rotations: np.ndarray | None = None,
    start: int = 0,
    device_hz: float | None = None,
    count_header: str = COUNT_HEADERS[0],
) -> None:
    """Write (N, len(names)) coefficients as Live Link Face does: LF, no BOM, 10 decimals, 63 columns.

    ``fps`` is 60 or 30 (then time codes step by two 60ths); time codes are exact, from ``start``
    ticks after midnight. ``device_hz`` places rows as a device that runs at 59.9 Hz or so would.
    ``rotations`` is (N, 9) radians, 0 without. Coefficients that ``names`` lacks are written as 0.

    Raises AlreadyThere if ``path`` exists; BadInput for NaN, an unknown name or another rate.
    """
    if fps not in (30, 60):
        raise BadInput(f"{path}: Live Link Face counts 60 or 30 frames per second, got {fps}; resample first")
    rows = _full_rows(path, values, names, rotations)
    ticks = (
        clock.export_ticks(len(rows), fps) if device_hz is None else clock.device_ticks(len(rows), device_hz)
    )
    cells = ",".join(["%.10f"] * rows.shape[1])
    lines = [",".join(("Timecode", count_header, *ARKIT52, *ROTATIONS))]
    lines += [
        f"{clock.timecode(tick)},{rows.shape[1]},{cells % tuple(row)}"
        for tick, row in zip((ticks + start).tolist(), rows.tolist())
    ]
    try:
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write("\n".join(lines) + "\n")
    except FileExistsError:
        raise AlreadyThere(
            f"{path}: already there, and nothing is overwritten; choose another name"
        ) from None


def _full_rows(
    path: Path, values: np.ndarray, names: Sequence[str], rotations: np.ndarray | None
) -> np.ndarray:
    """(N, 61) float64 in the order of the file."""
    if values.ndim != 2 or values.shape[1] != len(names):
        raise BadInput(f"{path}: values of shape {values.shape}, expected (rows, {len(names)} coefficients)")
    if not np.isfinite(values).all():
        raise BadInput(f"{path}: NaN or infinite coefficients cannot be written; check what made them")
    rows = np.zeros((len(values), len(ARKIT52) + len(ROTATIONS)))
    rows[:, columns(names, ARKIT52, str(path))] = values
    if rotations is not None:
        rows[:, len(ARKIT52) :] = rotations
    return rows


# --- folders of takes -----------------------------------------------------------------------------

LOOKED_FOR = (
    "Live Link Face takes (<take>_<subject>.csv with a .wav, .flac or .mov of that name or in that folder)"
)

_AUDIO = (".wav", ".flac", ".aiff", ".aif", ".mov", ".mp4", ".m4a")  # the first that is there
_NO_TAKE = ("frame_log.csv", "subjects.csv")
_TAKE = re.compile(r"(?P<slate>.+?)_(?P<take>\d+)_(?P<subject>.+)")
_SUBJECT_COLUMNS = ("gender", "language", "split")
_LONGEST_HEADER = 1 << 16  # bytes
_LARGEST = 2 << 30  # bytes


def find(folder: Path) -> Found:
    """Takes below ``folder``: the corpus of ``pmm synth``, the app's own take folders, flat folders.

    A ``subjects.csv`` (subject, gender, language, split) at the root and a transcript of the take's
    name (``.txt``) are read if there. With that table, a take of somebody else is refused: a subject
    guessed wrongly puts one person on both sides of a split.

    Raises BadInput if subjects.csv is not such a table.
    """
    _, top = next(walk(folder, []), (folder, []))
    subjects = _subjects(folder, top)
    recordings: list[Recording] = []
    refused: list[tuple[Path, str]] = []
    silent: list[tuple[Path, str]] = []
    for path, names in walk(folder, refused):
        here = _Folder.of(path, names)
        for stem in here.tracks:
            try:
                recordings.append(_recording(folder, here, stem, subjects))
            except BadInput as error:
                refused.append((path / here.tracks[stem], str(error)))
        refused += here.without_coefficients()
        silent += here.without_face_track()
    if recordings:  # else it is no folder of takes, and its audio belongs to another layout
        refused += silent
    return Found("livelink", tuple(sorted(recordings, key=lambda r: r.name)), tuple(sorted(refused)))


@dataclass(frozen=True)
class _Folder:
    """One directory. ``names``: lower-case to real file names. ``tracks``: stem of a take to its CSV."""

    path: Path
    names: dict[str, str]
    tracks: dict[str, str]
    audio: tuple[str, ...]

    @classmethod
    def of(cls, path: Path, files: list[str]) -> _Folder:
        audio = tuple(name for name in files if name.lower().endswith(_AUDIO))
        return cls(path, {name.lower(): name for name in files}, _face_tracks(path, files, audio), audio)

    def audio_of(self, stem: str) -> str | None:
        """Of the CSV's own name, or the only recording in a folder with one face track."""
        for wanted in (self.tracks[stem][:-4], stem):
            for suffix in _AUDIO:
                if (name := self.names.get((wanted + suffix).lower())) is not None:
                    return name
        if len(self.tracks) > 1:
            return None
        by_suffix = ([name for name in self.audio if name.lower().endswith(suffix)] for suffix in _AUDIO)
        return next((found[0] for found in by_suffix if len(found) == 1), None)

    def without_coefficients(self) -> list[tuple[Path, str]]:
        """Takes for MetaHuman Animator have a movie and a take.json, and no CSV of coefficients."""
        if self.tracks or "take.json" not in self.names or not self.audio:
            return []
        return [(self.path, "a MetaHuman Animator take: it has no coefficient CSV; record in ARKit mode")]

    def without_face_track(self) -> list[tuple[Path, str]]:
        if len(self.tracks) == 1 or "take.json" in self.names:
            return []
        stems = {stem.lower() for stem in self.tracks}
        alone = [name for name in self.audio if Path(name).stem.lower() not in stems]
        return [
            (self.path / n, f"audio without a face track: looked for {Path(n).stem}.csv beside it")
            for n in alone
        ]


def _face_tracks(folder: Path, files: list[str], audio: tuple[str, ...]) -> dict[str, str]:
    """{stem of a take: its CSV}. The app may add _cal (calibrated), _raw and _neutral (one pose, no take).

    Of one take the plain file is taken, else the calibrated, else the raw one.
    """
    spoken = {Path(name).stem.lower() for name in audio}
    best: dict[str, tuple[int, str]] = {}
    for name in files:
        if not name.lower().endswith(".csv") or name.lower() in _NO_TAKE:
            continue
        base, _, kind = name[:-4].rpartition("_")
        kind = kind.lower() if base else ""
        rank = {"cal": 1, "raw": 2}.get(kind, 0)
        stem = base if rank else name[:-4]
        named = not spoken.isdisjoint((stem.lower(), name[:-4].lower()))
        if kind != "neutral" and (named or _has_timecodes(folder / name)):
            best[stem] = min(best.get(stem, (9, "")), (rank, name))
    return {stem: name for stem, (_, name) in sorted(best.items())}


def _has_timecodes(path: Path) -> bool:
    """Whether a CSV means to be a face track: a shot list lies in many folders of takes."""
    try:
        refuse_special(path)
        with path.open("rb") as file:
            header = file.readline(_LONGEST_HEADER).decode("utf-8-sig", "replace")
    except (BadInput, OSError):
        return True  # to be refused with the reason
    return "timecode" in (name.strip().casefold() for name in header.split(","))


def _recording(folder: Path, here: _Folder, stem: str, subjects: dict[str, dict[str, str]]) -> Recording:
    audio = here.audio_of(stem)
    if audio is None:
        raise BadInput(f"a face track without audio: looked for {stem}.wav, .flac or .mov beside it")
    subject = _subject(folder, here.path, stem, subjects)
    text = here.names.get(f"{stem}.txt".lower())
    return Recording(
        name=(here.path / stem).relative_to(folder).as_posix(),
        audio=here.path / audio,
        target=here.path / here.tracks[stem],
        subject=subject,
        text=_transcript(here.path / text) if text else "",
        **{key: subjects.get(subject, {}).get(key, "") for key in _SUBJECT_COLUMNS},
    )


def _subject(folder: Path, here: Path, stem: str, subjects: dict[str, dict[str, str]]) -> str:
    """Who it is: as subjects.csv, else as the names of file and folders say.

    1. A name of subjects.csv that ends the file's name, then one that is a folder above it, the nearest.
    2. A folder above it that the file's name ends with.
    3. As the app names takes, {slate}_{take}_{subject}; else the topmost folder below the root.

    Raises BadInput if there is a subjects.csv and it does not know them.
    """
    above = here.relative_to(folder).parts[::-1]
    ends = [name for name in subjects if f"_{stem}".endswith(f"_{name}")]
    if ends:
        return max(ends, key=len)
    for name in above:
        if name in subjects:
            return name
    guess = _guessed_subject(folder, above, stem)
    if subjects:
        raise BadInput(
            f"its subject {guess!r} is not in subjects.csv; add a row for it there, or end the file's name "
            "or name a folder above it with a subject of that table"
        )
    return guess


def _guessed_subject(folder: Path, above: tuple[str, ...], stem: str) -> str:
    """``above`` are the names of the folders between the take and the root, nearest first."""
    for name in above:
        if stem.endswith(f"_{name}"):
            return name
    match = _TAKE.fullmatch(stem)
    if match:
        return match["subject"]
    return above[-1] if above else Path(os.path.abspath(folder)).name


def _transcript(path: Path) -> str:
    try:
        refuse_special(path)
        return path.read_text("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"its transcript {path.name} cannot be read ({error}); expected UTF-8 text") from None


def _subjects(folder: Path, files: list[str]) -> dict[str, dict[str, str]]:
    """subjects.csv: {subject: {gender, language, split}}; {} if there is none.

    As spreadsheets write it, too: a BOM, semicolons, headers in any case, empty rows.
    """
    path = next((folder / name for name in files if name.lower() == "subjects.csv"), None)
    if path is None:
        return {}
    header, rows = _subject_rows(path)
    if "subject" not in header:
        raise BadInput(
            f"{path}: row 1 has no column subject (it is {', '.join(header)[:60]!r}); "
            "expected subject,gender,language,split"
        )
    table: dict[str, dict[str, str]] = {}
    first: dict[str, int] = {}
    for row, cells in rows:
        who = dict(zip(header, cells))
        name = who.get("subject", "")
        if not name:
            raise BadInput(f"{path}: row {row} has no subject; name one or delete the row")
        if name in first:
            raise BadInput(
                f"{path}: row {row}: subject {name!r} stands in row {first[name]} already; keep one"
            )
        first[name] = row
        table[name] = {key: who.get(key, "") for key in _SUBJECT_COLUMNS}
    if not table:
        raise BadInput(f"{path}: no rows under the header; name the subjects, or take the file away")
    return table


def _subject_rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """(the header in lower case, [(row as a spreadsheet counts, its cells)]), empty rows left out."""
    try:
        refuse_special(path)
        lines = path.read_text("utf-8-sig").splitlines() or [""]
        delimiter = ";" if lines[0].count(";") > lines[0].count(",") else ","
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(
            f"{path}: cannot be read ({error}); expected a CSV in UTF-8 with a column subject"
        ) from None
    header, *body = rows or [[]]
    named = [(row, cells) for row, cells in enumerate(body, start=2) if any(cells)]
    return [name.lower() for name in header], named
