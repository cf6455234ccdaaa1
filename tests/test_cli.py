"""The commands around a fitted run, as a person at a terminal meets them."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from pmm.precompute.datasets import livelink
from pmm.store.catalog import Store

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., Any]


@pytest.fixture
def wav(fitted: Path) -> Path:
    return fitted / "captures" / "cyd" / "take_5" / "take_5_cyd.wav"


# ---------------------------------------------------------------- fit


def test_fit_refuses_a_run_that_is_there_and_leaves_it_alone(pmm: Run, fitted: Path) -> None:
    before = {path: path.read_bytes() for path in (fitted / "run").iterdir()}
    done = pmm("fit", fitted / "store", "--run", fitted / "run")
    assert done.code == 1
    assert done.complaint == (
        f"{fitted / 'run'} already exists and nothing is overwritten; go on with it by --resume, "
        "or name another folder"
    )
    assert {path: path.read_bytes() for path in (fitted / "run").iterdir()} == before


def test_fit_needs_enough_subjects(pmm: Run, fitted: Path, tmp_path: Path) -> None:
    shutil.copytree(fitted / "captures" / "ada", tmp_path / "few" / "ada")
    shutil.copytree(fitted / "captures" / "bob", tmp_path / "few" / "bob")
    assert pmm("precompute", tmp_path / "few", "--store", tmp_path / "store").code == 0
    done = pmm("fit", tmp_path / "store", "--run", tmp_path / "run")
    assert done.code == 1
    assert "2" in done.complaint
    assert "3" in done.complaint
    assert "subjects" in done.complaint
    assert not (tmp_path / "run").exists()


def test_fit_needs_a_store(pmm: Run, tmp_path: Path) -> None:
    done = pmm("fit", tmp_path / "nowhere", "--run", tmp_path / "run")
    assert done.code == 1
    assert done.complaint.startswith(f"no store at {tmp_path / 'nowhere'}")
    assert not (tmp_path / "run").exists()


def test_fit_says_what_it_chose_and_how_it_goes(pmm: Run, fitted: Path, tmp_path: Path) -> None:
    done = pmm("fit", fitted / "store", "--run", tmp_path / "run", "--epochs", 1, "--json")
    result = json.loads(done.out)
    assert (done.code, result["epochs"], result["training_clips"]) == (0, 1, 6)
    assert "6 clips" in done.err
    assert re.search(r"1/1 +loss \d+\.\d+ +validation LVE \d\.\d{5}", done.err)


def test_an_interrupted_fit_keeps_its_epochs(
    pmm: Run, pmm_process: Run, fitted: Path, tmp_path: Path
) -> None:
    process = pmm_process("fit", fitted / "store", "--run", tmp_path / "run", "--epochs", 10_000)
    while process.poll() is None and not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "pmm: interrupted; run the same command again with --resume to go on" in err
    assert pmm("eval", tmp_path / "run").code == 0


# ---------------------------------------------------------------- eval


def test_eval_prints_a_table_beside_two_baselines(pmm: Run, fitted: Path) -> None:
    done = pmm("eval", fitted / "run")
    assert done.code == 0, done.err
    assert done.out.splitlines()[1].split() == ["LVE", "LVE", "(l2)", "ALE", "ALE", "(l2)"]
    assert re.search(r"^heads +(0\.\d{5} *){4}$", done.out, re.M)
    assert re.search(r"^mean face +(0\.\d{5} *){4}$", done.out, re.M)
    assert re.search(r"^silence +(0\.\d{5} *){4}$", done.out, re.M)


def test_eval_baselines_are_what_they_say(pmm: Run, fitted: Path) -> None:
    """Silence and mean face, computed here from the captures and the run's split alone."""
    scores = json.loads(pmm("eval", fitted / "run", "--json").out)
    config = json.loads((fitted / "run" / "config.json").read_text())
    store = Store.open(fitted / "store")
    takes = {take.id: take for take in store.takes()}
    (spec,) = [name for name, one in store.specs.items() if one.modality == "target"]
    columns = [livelink.ARKIT52.index(name) for name in config["names"]]

    def targets(part: str) -> np.ndarray:
        chosen = [takes[name] for own in config["split"][part].values() for name in own]
        tracks = [
            store.read(spec, take.target)[: math.floor(take.clip.seconds * 30 + 0.5)] for take in chosen
        ]
        return np.concatenate(tracks)[:, columns]

    train, test = targets("train").astype(np.float64), targets("test").astype(np.float64)
    assert scores["frames"] == len(test)
    for name, guess in (("silence", 0), ("mean_face", train.mean(0))):
        error = (test - guess) ** 2
        assert scores["scores"][name]["lve"] == pytest.approx(error.max(1).mean(), rel=1e-5)
        assert scores["scores"][name]["ale"] == pytest.approx(error.mean(1).mean(), rel=1e-5)


def test_eval_other_parts_and_no_run(pmm: Run, fitted: Path, tmp_path: Path) -> None:
    assert json.loads(pmm("eval", fitted / "run", "--split", "train", "--json").out)["clips"] == 6
    done = pmm("eval", tmp_path / "nowhere")
    assert done.code == 1
    assert done.complaint.startswith(f"no run at {tmp_path / 'nowhere'}")


# ---------------------------------------------------------------- animate


def test_animate_writes_a_live_link_face_csv(pmm: Run, fitted: Path, wav: Path, tmp_path: Path) -> None:
    out = tmp_path / "line.csv"
    done = pmm("animate", fitted / "run", wav, "-o", out)
    assert done.code == 0, done.err
    assert "untrained stand-in" in done.out
    frames = round(soundfile.info(wav).duration * 30)
    rows = list(csv.reader(out.read_text().splitlines()))
    assert [len(row) for row in rows] == [63] * (frames + 1)
    assert rows[1][0] == "00:00:00:00.000"
    assert rows[2][0] == "00:00:00:02.000"
    track = livelink.read_targets(out, 30)
    assert track.values.shape == (frames, 52)
    assert track.clipped == 0
    moving = [name for name in livelink.ARKIT52 if name not in track.constant]
    assert "JawOpen" in moving
    assert not [name for name in moving if name.startswith(("Eye", "Brow", "Tongue"))]


def test_animate_draws_the_curves_beside_the_capture(
    pmm: Run, fitted: Path, wav: Path, tmp_path: Path
) -> None:
    done = pmm(
        *("animate", fitted / "run", wav, "-o", tmp_path / "a.csv"),
        *("--plot", tmp_path / "a.png", "--against", wav.with_suffix(".csv"), "--json"),
    )
    assert json.loads(done.out)["frames"] == round(soundfile.info(wav).duration * 30)
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_animate_speaks_in_a_style_and_names_those_it_knows(
    pmm: Run, fitted: Path, wav: Path, tmp_path: Path
) -> None:
    styles = json.loads((fitted / "run" / "config.json").read_text())["styles"]
    assert pmm("animate", fitted / "run", wav, "-o", tmp_path / "mean.csv").code == 0
    assert pmm("animate", fitted / "run", wav, "-o", tmp_path / "own.csv", "--style", styles[0]).code == 0
    assert (tmp_path / "mean.csv").read_text() != (tmp_path / "own.csv").read_text()
    done = pmm("animate", fitted / "run", wav, "-o", tmp_path / "no.csv", "--style", "nobody")
    assert done.code == 1
    assert all(style in done.complaint for style in ("'nobody'", *styles))
    assert not (tmp_path / "no.csv").exists()


def test_animate_overwrites_nothing(pmm: Run, fitted: Path, wav: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.csv"
    out.write_text("mine")
    done = pmm("animate", fitted / "run", wav, "-o", out)
    assert done.complaint == f"{out} already exists and nothing is overwritten; choose another name"
    assert out.read_text() == "mine"


def test_a_file_where_a_folder_should_be_is_one_line(pmm: Run, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for args in (("demo", "--dir", file), ("synth", file), ("precompute", file, "--store", tmp_path / "s")):
        done = pmm(*args)
        assert done.code == 1
        assert str(file) in done.complaint
    assert file.read_text() == "mine"


def test_animate_refuses_models_the_heads_do_not_know(
    pmm: Run, fitted: Path, wav: Path, tmp_path: Path
) -> None:
    done = pmm(
        "animate", fitted / "run", wav, "-o", tmp_path / "a.csv", "--models", "tiny", "--audio-layer", 3
    )
    assert done.code == 1
    assert "makes audio features" in done.complaint
    done = pmm("animate", fitted / "run", wav, "-o", tmp_path / "a.csv", "--models", "huge")
    assert done.complaint == "model set 'huge' is none of tiny, paper, paper-en, nor a .toml file of your own"


def test_animate_replaces_one_part_of_the_models_the_run_was_fitted_with(
    pmm: Run, fitted: Path, wav: Path, tmp_path: Path
) -> None:
    assert pmm("animate", fitted / "run", wav, "-o", tmp_path / "a.csv", "--face", "builtin").code == 0
    Image.new("RGB", (96, 96), "white").save(tmp_path / "white.png")
    done = pmm("animate", fitted / "run", wav, "-o", tmp_path / "b.csv", "--face", tmp_path / "white.png")
    assert done.code == 1
    assert "makes image features" in done.complaint


def test_a_run_at_25_fps_from_any_folder_is_written_at_60(
    pmm: Run, fitted: Path, wav: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (96, 96), "white").save(tmp_path / "face.png")
    monkeypatch.chdir(tmp_path)
    for args in (
        ("precompute", fitted / "captures", "--store", "store", "--fps", 25, "--face", "face.png"),
        ("fit", "store", "--run", "run", "--fps", 25, "--epochs", 1),
    ):
        assert pmm(*args).code == 0
    monkeypatch.chdir(fitted)  # where there is no face.png
    out = tmp_path / "line.csv"
    assert pmm("animate", tmp_path / "run", wav, "-o", out).code == 0
    track = livelink.read_targets(out, 60)
    assert track.native_fps == pytest.approx(60)
    assert abs(track.seconds - soundfile.info(wav).duration) <= 1 / 25


def test_a_picture_is_refused_before_anything_is_written(
    pmm: Run, fitted: Path, wav: Path, tmp_path: Path
) -> None:
    done = pmm("animate", fitted / "run", wav, "-o", tmp_path / "a.csv", "--plot", tmp_path / "a.jpgx")
    assert done.code == 1
    assert "written as .png" in done.complaint
    assert not (tmp_path / "a.csv").exists()


# ---------------------------------------------------------------- store


def test_store_info_tells_what_is_there(pmm: Run, fitted: Path) -> None:
    text = pmm("store", "info", fitted / "store").out
    assert "10 takes of 5 subjects, 10 clips" in text
    assert text.count("tiny (untrained stand-in)") == 3
    summary = json.loads(pmm("store", "info", fitted / "store", "--json").out)
    assert [one["modality"] for one in summary["features"]] == ["audio", "image", "target", "text"]
    assert summary["bytes"] == sum(one["bytes"] for one in summary["features"]) > 1e6


def test_store_ls_lists_takes_with_what_they_have(pmm: Run, fitted: Path) -> None:
    lines = pmm("store", "ls", fitted / "store").out.splitlines()
    assert len(lines) == 10
    assert "audio text image target" in lines[0]
    assert lines[0].endswith("ada/take_0/take_0_ada")
    takes = json.loads(pmm("store", "ls", fitted / "store", "--json").out)
    assert [sorted(take["modalities"]) for take in takes] == [["audio", "image", "target", "text"]] * 10


def test_store_verify_is_clean_then_names_the_clip_of_a_flipped_byte(
    pmm: Run, fitted: Path, tmp_path: Path
) -> None:
    done = pmm("store", "verify", fitted / "store")
    assert done.code == 0
    assert done.out.startswith("clean: read 4 fragments, ")
    copy = tmp_path / "store"
    shutil.copytree(fitted / "store", copy)
    (one,) = [
        one for one in Store.open(copy).fragments() if Store.open(copy).specs[one.spec_id].modality == "image"
    ]
    payload = max((copy / "fragments" / one.spec_id).rglob("*"), key=lambda path: path.stat().st_size)
    payload.chmod(0o644)
    data = bytearray(payload.read_bytes())
    data[1000] ^= 1  # of the first clip in this fragment
    payload.write_bytes(data)
    done = pmm("store", "verify", copy)
    assert done.code == 3
    hurt = next(take.source for take in Store.open(copy).takes() if take.clip.id == one.row_ids[0])
    assert f"clips: {hurt}" in done.err
    assert json.loads(pmm("store", "verify", copy, "--json").out)["clean"] is False


# ---------------------------------------------------------------- help


def commands() -> list[str]:
    import click

    from pmm.cli import pmm as group

    names = []
    for name, command in group.commands.items():
        inner = command.commands if isinstance(command, click.Group) else {}
        names += [f"{name} {sub}" for sub in inner] or [name]
    return names


@pytest.mark.parametrize("command", commands())
def test_every_command_explains_itself_and_stands_in_the_readme(pmm: Run, command: str) -> None:
    done = pmm(*command.split(), "--help")
    assert done.code == 0
    assert len(done.out.splitlines()[2].strip()) > 20
    readme = (ROOT / "README.md").read_text()
    assert f"pmm {command.split()[0]}" in readme
    assert f"`{command.split()[-1]}`" in readme or f"pmm {command}" in readme
