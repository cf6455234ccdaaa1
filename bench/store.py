"""What the store costs: reading, loading and writing beside numpy and other formats; the catalogue at scale.

    python bench/store.py [--json] [--quick] [--folder DIR]

All contenders hold the same features (about 1 GB: 2.5 minutes of every modality as the paper has them), take
turns within each round, and hand out fresh arrays in memory. Figures are medians with quartiles over at
least 15 rounds, as ratios to numpy in the same round. The page cache is warm. Contenders that are not
installed are left out; so is what a format cannot do (webdataset has no random access).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import wave
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from pmm.store import clock
from pmm.store.catalog import Store, now, writer
from pmm.store.clip import Clip, Take
from pmm.store.feature import FeatureSpec
from pmm.store.fragment import Fragment, Object, fragment_id

SPECS = {
    "audio": FeatureSpec("audio", "bench/1", "float16", (1024,), None, {}),
    "text": FeatureSpec("text", "bench/1", "float16", (3503,), None, {}),
    "image": FeatureSpec("image", "bench/1", "uint8", (96, 96, 3), 30, {}),
    "target": FeatureSpec("target", "bench/1", "float32", (52,), 30, {}),
}
WINDOW_FRAMES = 100
Data = dict[str, list[np.ndarray]]


@dataclass(frozen=True)
class Size:
    clips: int
    rounds: int
    windows: int
    written_clips: int
    takes: int
    records: int
    planned_clips: int


FULL = Size(160, 15, 60, 160, 1_000_000, 16_000, 100_000)
QUICK = Size(4, 3, 4, 2, 2_000, 320, 60)


def features(clips: int, seed: int = 0) -> Data:
    """Made features of ``clips`` clips of 4 to 6 s, with the sizes and types of the paper's."""
    rng = np.random.default_rng(seed)
    made: Data = {modality: [] for modality in SPECS}
    face = rng.integers(0, 255, (96, 96, 3), dtype=np.uint8)
    for _ in range(clips):
        samples = int(rng.integers(4 * clock.SPEECH_RATE, 6 * clock.SPEECH_RATE))
        steps, frames = clock.steps(samples), clock.frames(samples, clock.SPEECH_RATE, 30)
        made["audio"].append(_wander(rng, steps, 1024).astype(np.float16))
        made["text"].append((_wander(rng, steps, 3503) * 5 - 10).astype(np.float16))
        moved = face[None] + rng.integers(0, 3, (frames, 96, 96, 3), dtype=np.uint8)
        made["image"].append(moved)
        made["target"].append(np.clip(_wander(rng, frames, 52), 0, 1))
    return made


def _wander(rng: np.random.Generator, rows: int, size: int) -> np.ndarray:
    return rng.standard_normal((rows, size), dtype=np.float32) * 0.3 + rng.standard_normal(
        size, dtype=np.float32
    )


# -- contenders: written by ``write``, opened by the constructor, read by ``window`` and ``load``


class Memmap:
    """numpy alone: what there is to be lost."""

    name = "numpy"

    @staticmethod
    def write(folder: Path, data: Data) -> None:
        for modality, arrays in data.items():
            with open(folder / modality, "wb") as file:
                for array in arrays:
                    array.tofile(file)
                file.flush()
                os.fsync(file.fileno())

    def __init__(self, folder: Path, data: Data):
        self._folder = folder
        self._edges = {m: np.cumsum([0, *map(len, arrays)]) for m, arrays in data.items()}
        self._rows = {
            m: np.memmap(folder / m, arrays[0].dtype, "r").reshape(-1, *arrays[0].shape[1:])
            for m, arrays in data.items()
        }

    def window(self, modality: str, clip: int, first: int, last: int) -> np.ndarray:
        start = self._edges[modality][clip]
        return np.array(self._rows[modality][start + first : start + last])

    def load(self, modality: str) -> object:
        return np.fromfile(self._folder / modality, self._rows[modality].dtype)


class Pmm:
    name = "pmm"

    @staticmethod
    def write(folder: Path, data: Data) -> None:
        store = Store.create(folder / "store")
        for modality, arrays in data.items():
            store.publish(SPECS[modality], [(_row(n), array) for n, array in enumerate(arrays)], {})

    def __init__(self, folder: Path, data: Data):
        self._store = Store.open(folder / "store")
        self._names = [_row(n) for n in range(len(data["audio"]))]

    def window(self, modality: str, clip: int, first: int, last: int) -> np.ndarray:
        return np.array(self._store.read(SPECS[modality].id, self._names[clip])[first:last])

    def load(self, modality: str) -> object:
        """All rows of a modality in one array, as `pmm fit` takes them in."""
        spec = SPECS[modality]
        edges = np.cumsum([0, *(self._store.length(spec.id, name) for name in self._names)])
        whole = np.empty((edges[-1], *spec.shape), spec.dtype)
        for name, first, last in zip(self._names, edges, edges[1:]):
            whole[first:last] = self._store.read(spec.id, name)
        return whole


class _Whole:
    """Formats with one array a modality: clips one after another, as in a fragment."""

    def __init__(self, folder: Path, data: Data):
        self._edges = {m: np.cumsum([0, *map(len, arrays)]) for m, arrays in data.items()}
        self._rows = {m: self._open(folder, m) for m in data}

    def _open(self, folder: Path, modality: str):
        raise NotImplementedError

    def window(self, modality: str, clip: int, first: int, last: int) -> np.ndarray:
        start = int(self._edges[modality][clip])
        return self._take(self._rows[modality], start + first, start + last)

    def load(self, modality: str) -> object:
        return self._take(self._rows[modality], 0, int(self._edges[modality][-1]))

    @staticmethod
    def _take(rows, first: int, last: int) -> np.ndarray:
        return rows[first:last]


class H5py(_Whole):
    name = "h5py"

    @staticmethod
    def write(folder: Path, data: Data) -> None:
        import h5py

        with h5py.File(folder / "all.h5", "w") as file:
            for modality, arrays in data.items():
                file.create_dataset(modality, data=np.concatenate(arrays))
        _sync(folder)

    def _open(self, folder: Path, modality: str):
        import h5py

        return h5py.File(folder / "all.h5", "r")[modality]


def _chunk(arrays: list[np.ndarray]) -> tuple[int, ...]:
    """Rows of about 1 MiB: what such arrays are commonly cut into."""
    return (max(1, (1 << 20) // arrays[0][0].nbytes), *arrays[0].shape[1:])


class ZarrPython(_Whole):
    name = "zarr-python"

    @staticmethod
    def write(folder: Path, data: Data) -> None:
        import zarr

        group = zarr.create_group(folder / "z.zarr")
        for modality, arrays in data.items():
            whole = np.concatenate(arrays)
            made = group.create_array(
                modality, shape=whole.shape, chunks=_chunk(arrays), dtype=whole.dtype, compressors=None
            )
            made[:] = whole
        _sync(folder)

    def _open(self, folder: Path, modality: str):
        import zarr

        return zarr.open_group(folder / "z.zarr", mode="r")[modality]


class TensorStore(_Whole):
    name = "tensorstore"

    @staticmethod
    def write(folder: Path, data: Data) -> None:
        for modality, arrays in data.items():
            whole = np.concatenate(arrays)
            made = _tensorstore(
                folder / modality,
                create=True,
                dtype=whole.dtype.name,
                shape=whole.shape,
                chunk_layout={"chunk": {"shape": _chunk(arrays)}},
            )
            made.write(whole).result()
        _sync(folder)

    def _open(self, folder: Path, modality: str):
        return _tensorstore(folder / modality, open=True)

    @staticmethod
    def _take(rows, first: int, last: int) -> np.ndarray:
        return rows[first:last].read().result()


def _tensorstore(path: Path, **options):
    import tensorstore

    layout = options.pop("chunk_layout", None)
    if layout:
        options["chunk_layout"] = tensorstore.ChunkLayout(chunk_shape=layout["chunk"]["shape"])
    return tensorstore.open({"driver": "zarr3", "kvstore": f"file://{path}/"}, **options).result()


class LitData:
    """Whole clips only: a window costs its clip."""

    name = "litdata"

    @staticmethod
    def write(folder: Path, data: Data) -> None:
        from litdata.streaming.writer import BinaryWriter

        maker = BinaryWriter(str(folder), chunk_bytes=64 << 20)
        for index, clip in enumerate(zip(*data.values())):
            maker[index] = dict(zip(data, clip))
        maker.done()
        maker.merge()
        _sync(folder)

    def __init__(self, folder: Path, data: Data):
        from litdata import StreamingDataset

        self._set = StreamingDataset(str(folder))
        self._count = len(data["audio"])

    def window(self, modality: str, clip: int, first: int, last: int) -> np.ndarray:
        return np.array(self._set[clip][modality][first:last])

    def load(self, modality: str) -> object:
        return [self._set[clip][modality] for clip in range(self._count)]


class WebDataset:
    """A tar of clips, read from its beginning to its end."""

    name = "webdataset"
    window = None

    @staticmethod
    def write(folder: Path, data: Data) -> None:
        import webdataset

        with webdataset.TarWriter(str(folder / "all.tar")) as tar:
            for index, clip in enumerate(zip(*data.values())):
                tar.write({"__key__": f"{index:06}", **{f"{m}.npy": a for m, a in zip(data, clip)}})
        _sync(folder)

    def __init__(self, folder: Path, data: Data):
        self._path = folder / "all.tar"

    def load_all(self, modalities: Sequence[str]) -> None:
        """One pass for all: a pass for each would read the whole tar each time."""
        import webdataset

        for sample in webdataset.WebDataset(str(self._path), shardshuffle=False).decode():
            for modality in modalities:
                np.asarray(sample[f"{modality}.npy"])


def _row(number: int) -> str:
    return f"{number:064x}"


def _sync(folder: Path) -> None:
    """Everything below ``folder`` on the disk, as the store has it."""
    for place, _, files in os.walk(folder):
        for name in (*files, "."):
            fd = os.open(os.path.join(place, name), os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)


CONTENDERS = {
    "numpy": Memmap,
    "pmm": Pmm,
    "h5py": H5py,
    "zarr": ZarrPython,
    "tensorstore": TensorStore,
    "litdata": LitData,
    "webdataset": WebDataset,
}


# -- rounds


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rounds(
    count: int, jobs: dict[str, Callable[[], object]], warm: bool, after: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each job in each round; every round runs all of them, each time in another order.

    ``warm``: just before, the same job runs unmeasured, as the kernel takes idle pages from its cache.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    for turn in range(count):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if warm:
                jobs[name]()
            seconds[name].append(timed(jobs[name]))
            after()
    return seconds


def told(seconds: dict[str, list[float]], size: int) -> dict[str, dict[str, float]]:
    """Per contender: MB/s (median), and the ratio to numpy within the round (median and quartiles)."""
    found = {}
    for name, times in seconds.items():
        ratios = sorted(base / own for base, own in zip(seconds["numpy"], times))
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[name] = {
            "mb_per_s": round(size / 1e6 / statistics.median(times), 1),
            "ratio": round(middle, 3),
            "quartiles": [round(low, 3), round(high, 3)],
        }
    return found


def reading(root: Path, size: Size) -> dict[str, object]:
    data = features(size.clips)
    total = sum(array.nbytes for arrays in data.values() for array in arrays)
    opened = {}
    for name, kind in _installed().items():
        (root / name).mkdir()
        kind.write(root / name, data)
        opened[kind.name] = kind(root / name, data)
    windows = _windows(data, size.windows)
    window_bytes = sum((last - first) * data[m][clip][0].nbytes for m, clip, first, last in windows)
    _check(opened, data, windows)

    def window_job(one) -> Callable[[], object]:
        return lambda: deque((one.window(*window) for window in windows), maxlen=0)

    def load_job(one) -> Callable[[], object]:
        if hasattr(one, "load_all"):
            return partial(one.load_all, list(data))
        return lambda: deque((one.load(modality) for modality in data), maxlen=0)

    random = {name: window_job(one) for name, one in opened.items() if one.window}
    whole = {name: load_job(one) for name, one in opened.items()}
    result = {
        "bytes": total,
        "windows": told(rounds(size.rounds, random, warm=True), window_bytes),
        "full_load": told(rounds(size.rounds, whole, warm=True), total),
    }
    shutil.rmtree(root)
    root.mkdir()
    return result


def _windows(data: Data, count: int) -> list[tuple[str, int, int, int]]:
    """Raw stored rows of random windows: the frames, and the steps of the same seconds."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(count):
        clip = int(rng.integers(len(data["image"])))
        frames = len(data["image"][clip])
        first = int(rng.integers(max(1, frames - WINDOW_FRAMES)))
        last = min(frames, first + WINDOW_FRAMES)
        for modality, arrays in data.items():
            scale = len(arrays[clip]) / frames
            found.append((modality, clip, int(first * scale), int(last * scale)))
    return found


def _check(opened: dict[str, object], data: Data, windows: list[tuple[str, int, int, int]]) -> None:
    for name, one in opened.items():
        for modality, clip, first, last in windows[:8] if one.window else ():
            np.testing.assert_array_equal(
                one.window(modality, clip, first, last), data[modality][clip][first:last], name
            )


def writing(root: Path, size: Size) -> dict[str, object]:
    data = features(size.written_clips)
    total = sum(array.nbytes for arrays in data.values() for array in arrays)
    folder = root / "written"
    folder.mkdir()

    def clear() -> None:
        shutil.rmtree(folder)
        folder.mkdir()

    jobs = {kind.name: partial(kind.write, folder, data) for kind in _installed().values()}
    seconds = rounds(size.rounds, jobs, warm=False, after=clear)
    shutil.rmtree(folder)
    return {"bytes": total, **told(seconds, total)}


def _installed() -> dict[str, type]:
    return {name: kind for name, kind in CONTENDERS.items() if name == "pmm" or find_spec(name)}


# -- the catalogue at scale


def fill(path: Path, takes: int, records: int) -> None:
    """A store whose catalogue is that large: records and a listing as runs write them, without fragments."""
    store, rng = Store.create(path), np.random.default_rng(0)
    clips, targets = ([rng.bytes(32) for _ in range(takes)] for _ in range(2))
    for modality, spec in SPECS.items():
        store.medium.create(f"specs/{spec.id}.json", spec.to_bytes())
        rows = targets if modality == "target" else clips
        for part in np.array_split(np.arange(takes), records // len(SPECS)):
            _put_record(store, spec, sorted(rows[n] for n in part), rng)
    attributes = {"gender": "f", "language": "zh", "split": "train"}
    listed = [
        Take(
            Clip(clip.hex(), 48000, 1, 0, 240000),
            target.hex(),
            f"subject{n % 100}",
            text=f"a sentence of ordinary length, the {n}th",
            source=f"subject{n % 100}/take_{n}",
            **attributes,
        )
        for n, (clip, target) in enumerate(zip(clips, targets))
    ]
    store.publish_takes("big", listed, {"host": "h", "root": "/data", "layout": "livelink"})


def _put_record(store: Store, spec: FeatureSpec, ids: list[bytes], rng: np.random.Generator) -> None:
    names = [
        "zarr.json",
        *(f"{a}/{b}" for a in ("values", "offsets", "clips", "sums") for b in ("zarr.json", "c/0")),
    ]
    objects = tuple(Object(name, 1000, rng.bytes(32).hex()) for name in sorted(names))
    lengths = np.full(len(ids), 150, np.int64)
    location = rng.bytes(16).hex()
    made_with = {
        "models": {"audio": "facebook/wav2vec2-large-xlsr-53"},
        "versions": {"torch": "2"},
        "device": "cpu",
    }
    one = Fragment(
        spec.id,
        fragment_id(spec.id, objects),
        location,
        b"".join(ids),
        lengths,
        objects,
        now(),
        writer(),
        made_with,
    )
    path = store.path / one.record
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(one.to_bytes())  # not durable: nobody needs it after this run


_OPEN = """
import json, sys, time
from pathlib import Path
from pmm.store.catalog import Store

def most():  # kB; unlike getrusage's, of this process alone and not of the one that started it
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(told["VmHWM"].split()[0])

base = most()
start = time.perf_counter()
store = Store.open(sys.argv[1])
opened = time.perf_counter() - start
for spec in store.specs:
    store.has(spec, "00" * 32)
indexed = time.perf_counter() - start
peak = most()
takes = len(store.takes()) if sys.argv[2] == "takes" else 0
listed = time.perf_counter() - start - indexed
memory = (peak - base) / 1024, (most() - base) / 1024
print(json.dumps({"open_s": opened, "open_and_look_up_s": indexed, "memory_mb": memory[0],
    "takes": takes, "takes_s": listed, "memory_with_takes_mb": memory[1]}))
"""


def catalogue(root: Path, size: Size, count: int) -> dict[str, object]:
    fill(root / "store", size.takes, size.records)
    bare = [_opened(root / "store") for _ in range(min(3, count))]
    start = time.perf_counter()
    Store.open(root / "store").keep_index()
    made = time.perf_counter() - start
    indexed = [_opened(root / "store") for _ in range(count)]
    takes = _opened(root / "store", "takes")
    shutil.rmtree(root / "store")
    return {
        "takes": size.takes,
        "records": size.records,
        "without_index": _median(bare),
        "writing_the_index_s": round(made, 3),
        "with_index": _median(indexed),
        "takes_read_s": round(takes["takes_s"], 3),
        "memory_with_takes_mb": round(takes["memory_with_takes_mb"], 1),
    }


def _opened(path: Path, takes: str = "") -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", _OPEN, path, takes], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def _median(runs: list[dict[str, float]]) -> dict[str, float]:
    keys = ("open_s", "open_and_look_up_s", "memory_mb")
    return {key: round(statistics.median(run[key] for run in runs), 3) for key in keys}


# -- planning


def planning(root: Path, size: Size) -> dict[str, object]:
    """A second `precompute` over a dataset all of which is cached: find, name, plan (models aside)."""
    from pmm.precompute.datasets import find
    from pmm.precompute.identities import Identities
    from pmm.precompute.plan import make_plan
    from pmm.precompute.survey import survey

    _dataset(root / "data", size.planned_clips)
    time.sleep(2.1)  # files younger than 2 s are not trusted
    store = Store.create(root / "store")

    def planned():
        with Identities(root / "identities.sqlite") as known:
            seen = survey([(root / "data", find(root / "data"))], identities=known)
        plan = make_plan(seen.sources, SPECS, Store.open(root / "store").has)
        return seen, plan

    start = time.perf_counter()
    seen, plan = planned()
    first = time.perf_counter() - start
    assert len(plan.work) == size.planned_clips
    rng = np.random.default_rng(0)
    for spec in SPECS.values():
        store.medium.create(f"specs/{spec.id}.json", spec.to_bytes())
        rows = sorted(bytes.fromhex(spec.row_id(s.take.clip.id, s.take.target)) for s in seen.sources)
        for part in np.array_split(np.arange(len(rows)), max(1, len(rows) // 250)):
            _put_record(store, spec, [rows[n] for n in part], rng)
    Store.open(root / "store").keep_index()
    start = time.perf_counter()
    _, plan = planned()
    second = time.perf_counter() - start
    assert not plan.work
    return {"clips": size.planned_clips, "first_s": round(first, 2), "second_s": round(second, 2)}


def _dataset(root: Path, clips: int) -> None:
    """Captures of a quarter of a second each, in the Live Link Face layout; no two sound the same."""
    from pmm.precompute.datasets import livelink

    rng = np.random.default_rng(0)
    livelink.write(root.parent / "track.csv", np.full((15, 52), 0.3))
    track = (root.parent / "track.csv").read_bytes()
    for number in range(clips):
        folder = root / f"subject{number % 100}" / f"take_{number}"
        folder.mkdir(parents=True)
        (folder / f"take_{number}_subject{number % 100}.csv").write_bytes(track)
        with wave.open(str(folder / f"take_{number}_subject{number % 100}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 4000, "NONE", ""))
            file.writeframes(rng.integers(-9999, 9999, 4000, dtype=np.int16).tobytes())


# -- telling


def show(result: dict[str, object]) -> None:
    for part in ("windows", "full_load", "write"):
        if part in result:
            print(f"\n{part:<14}{'MB/s':>10}{'x numpy':>10}   quartiles")
            rows = {name: one for name, one in result[part].items() if name != "bytes"}
            for name, one in rows.items():
                low, high = one["quartiles"]
                print(f"{name:<14}{one['mb_per_s']:>10.0f}{one['ratio']:>10.2f}   {low:.2f} to {high:.2f}")
    for part in ("catalogue", "plan"):
        if part in result:
            print(f"\n{part}: {json.dumps(result[part], indent=1)}")


PARTS = ("reading", "writing", "catalogue", "planning")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="a few seconds: whether it works, no figures")
    parser.add_argument("--folder", type=Path, help="where to write: about 4 GB; a new folder in it is used")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; may be given again")
    asked = parser.parse_args()
    size, parts = QUICK if asked.quick else FULL, asked.only or PARTS
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        root, result = Path(folder), {"cores": os.cpu_count()}
        if "reading" in parts:
            result |= reading(root, size)
        if "writing" in parts:
            result["write"] = writing(root, size)
        if "catalogue" in parts:
            result["catalogue"] = catalogue(root, size, size.rounds)
        if "planning" in parts:
            result["plan"] = planning(root, size)
    print(json.dumps(result)) if asked.json else show(result)


if __name__ == "__main__":
    main()
