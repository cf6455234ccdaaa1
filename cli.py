"""pmm's command line: options to one library call, progress on stderr, one line on an error.

The only place that knows click and tqdm. Nothing heavy is imported here at the top: every command
imports what it needs, so that ``pmm --help`` answers at once.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pmm import PmmError, __version__

if TYPE_CHECKING:
    from tqdm import tqdm

    from pmm.precompute.forecast import Forecast
    from pmm.precompute.models import ModelSet
    from pmm.precompute.pipeline import Pace
    from pmm.precompute.plan import Plan
    from pmm.precompute.run import CarryOut, Outcome
    from pmm.store.care import Repaired
    from pmm.store.catalog import Store
    from pmm.store.share import Shared
    from pmm.train.ablate import Ablation
    from pmm.train.evaluate import Scores
    from pmm.train.importance import Importance
    from pmm.train.options import FitOptions
    from pmm.train.run import Result
    from pmm.train.runs import Comparison

FAILED_CLIPS = 3
INTERRUPTED = 130

PATH = click.Path(path_type=Path)


class _Store(click.ParamType):
    """A folder, or the address of a bucket."""

    name = "store"

    def convert(self, value: Any, param: Any, ctx: Any) -> Path | str:
        from pmm.store.remote import place

        return place(value) if isinstance(value, str) else value


STORE = _Store()


def main(args: list[str] | None = None) -> None:
    """The ``pmm`` command. Exit 0; 1 the user's error; 2 usage; 3 some clips failed; 130 interrupted."""
    # Threads that spin while they wait steal the cores they wait for as soon as the machine has other
    # work: fits took 3 to 4 times as long. OpenMP reads this once, when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = pmm.main(args, prog_name="pmm", standalone_mode=False)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "pmm"
        _complain(f"{error.format_message().rstrip('.')}; see `{where} --help`")
        code = error.exit_code
    except click.ClickException as error:
        _complain(error.format_message())
        code = error.exit_code
    except PmmError as error:
        _complain(str(error))
        code = 1
    except (click.Abort, KeyboardInterrupt):
        click.echo(
            "pmm: interrupted; nothing that was finished is lost: run the same command again to go on "
            "(pmm fit with --resume)",
            err=True,
        )
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:  # a full disk, a folder without permission, a file where a folder should be
        _complain(f"{error.filename or 'a file'}: {error.strerror or error}; mend that and run it again")
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _complain(message: str) -> None:
    click.echo(f"pmm: error: {' '.join(message.split())}", err=True)


# ---------------------------------------------------------------- what several commands share

_device = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute.",
)
_fps = click.option(
    "--fps", type=click.IntRange(1, 240), default=30, show_default=True, help="Video frames a second."
)
_seed = click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Same seed, same result."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


def _reading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How a store is read: what is kept of one in a bucket, and whether one on a disk is mapped."""
    for option in (
        click.option(
            "--safe-read",
            is_flag=True,
            help="Read the store rather than map it: for a disk that may vanish. So it is on network disks.",
        ),
        click.option(
            "--cache-gb",
            type=click.FloatRange(0, min_open=True),
            help="Keep this much of a store in a bucket on the local disk.  [default: PMM_CACHE_GB or 100]",
        ),
        click.option(
            "--cache-dir", type=PATH, help="Keep it there.  [default: PMM_CACHE_DIR or ~/.cache/pmm]"
        ),
    ):
        command = option(command)
    return command


def _model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--models and the parts of a model set that can be named one by one."""
    for option in (
        click.option("--face", help="Reference face: an image, instead of the set's own."),
        click.option("--lips", help="Wav2Lip checkpoint (.pth or .safetensors), instead of the set's own."),
        click.option("--text-model", help="CTC model for the text logits: Hugging Face id or folder."),
        click.option("--audio-layer", type=int, help="Take audio from this layer of the audio model."),
        click.option(
            "--audio-model", help="wav2vec2 model for the audio features: Hugging Face id or folder."
        ),
        click.option("--models", help="Model set: tiny, paper, paper-en or a .toml file.  [default: tiny]"),
    ):
        command = option(command)
    return command


def _resolve(models: str | None, **overrides: Any) -> ModelSet:
    from pmm.precompute.models import resolve

    return resolve(models or "tiny", **{key: value for key, value in overrides.items() if value is not None})


@contextmanager
def _bar(unit: str, label: str, **options: Any) -> Iterator[tqdm]:
    """A progress bar on stderr, with rate and time left; silent where stderr is no terminal."""
    from tqdm import tqdm

    shape = "{l_bar}{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    if options.get("unit_scale"):
        shape = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
    with tqdm(
        total=1,
        unit=unit,
        desc=label,
        disable=None,
        leave=False,
        dynamic_ncols=True,
        bar_format=shape,
        **options,
    ) as bar:
        yield bar


def _reach(bar: tqdm, done: float, total: float) -> None:
    """Move the bar to ``done`` of ``total``; its clock starts with the first move."""
    if not bar.n:
        bar.reset(total=total)
    bar.update(min(done, total) - bar.n)


def _say(label: str, text: str) -> None:
    """A line of a run's story, on stderr, above the bar if there is one."""
    from tqdm import tqdm

    tqdm.write(f"{label:<9} {text}", file=sys.stderr)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _some(names: Sequence[str], most: int = 12) -> str:
    """How many names, and the first of them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)}: {', '.join(names[:most])}{more}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


# ---------------------------------------------------------------- the commands


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pmm")
def pmm() -> None:
    """Speech to ARKit facial animation.

    The frozen models run once per utterance and their tensors are cached in a Zarr store
    (pmm precompute); a small trainer fits the heads from the cache in minutes (pmm fit).
    Start with: pmm demo
    """


@pmm.command()
@click.argument("out", type=PATH)
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=10.0, show_default=True)
@click.option("--subjects", type=click.IntRange(1, 200), default=10, show_default=True)
@click.option("--languages", default="en,cmn", show_default=True, help="Comma-separated: en, cmn.")
@_seed
@_json
def synth(out: Path, minutes: float, subjects: int, languages: str, seed: int, as_json: bool) -> None:
    """Write a talking corpus in the Live Link Face layout to the new folder OUT.

    Speech by espeak-ng, face curves by rule: a made corpus for demos and tests, no capture.
    """
    from pmm.precompute.synth import CorpusSpec, write_corpus
    from pmm.store import clock

    spec = CorpusSpec(minutes, subjects, tuple(part.strip() for part in languages.split(",")), seed)
    with _bar("s", "speaking") as bar:
        summary = write_corpus(
            spec, out, lambda event: _reach(bar, bar.n + event.seconds, clock.minutes(spec.minutes))
        )
    if as_json:
        _print_json(summary.to_json())
    else:
        length = _duration(summary.seconds)
        click.echo(
            f"{_count(summary.takes, 'take')} of {_count(summary.subjects, 'subject')}, "
            f"{length} of speech, in {out}"
        )


@pmm.command()
@click.argument("datasets", nargs=-1, required=True, type=PATH)
@click.option(
    "--store",
    "store_path",
    required=True,
    type=STORE,
    metavar="STORE",
    help="The feature store, a folder or s3://bucket/prefix; made if it is not there.",
)
@click.option("--layout", help="Dataset layout, where looking at the folder is not enough: livelink.")
@_model_options
@_fps
@_device
@click.option(
    "--batch-seconds", type=click.FloatRange(1), default=60.0, show_default=True, help="Audio in one batch."
)
@click.option(
    "--fragment-mb",
    type=click.FloatRange(0.001),
    default=512.0,
    show_default=True,
    help="Close a fragment at this size.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    default="fp32",
    show_default=True,
    help="Of the models' arithmetic; bf16 and fp16 are faster, and other features.",
)
@click.option(
    "--text-topk", type=click.IntRange(1), metavar="K", help="Keep the K largest logits of each step only."
)
@click.option(
    "--lip-features",
    type=click.Choice(["frames", "latent", "latent32"]),
    default="frames",
    show_default=True,
    help="Lip pictures, or the 27 times smaller latent (float16 or float32) they are painted from.",
)
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Compute in N processes, one a GPU.")
@click.option("--scheduler", metavar="ADDRESS", help="Compute on a Dask cluster: tcp://host:port.")
@click.option("--only", metavar="LIST", help="Only these, comma-separated: audio, text, image, targets.")
@click.option(
    "--limit", type=click.IntRange(1), metavar="N", help="Compute at most N clips; the next run goes on."
)
@click.option("--retry-failed", is_flag=True, help="Only clips whose last try failed.")
@click.option("--skip-failed", is_flag=True, help="Leave out clips whose last try failed.")
@click.option("--rehash", is_flag=True, help="Read every recording, also those that have not changed.")
@click.option("--readmit", is_flag=True, help="Take back what was removed from the store on purpose.")
@click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
@_json
def precompute(
    datasets: tuple[Path, ...],
    store_path: Path | str,
    layout: str | None,
    fps: int,
    device: str,
    batch_seconds: float,
    fragment_mb: float,
    precision: str,
    text_topk: int | None,
    lip_features: str,
    workers: int | None,
    scheduler: str | None,
    only: str | None,
    limit: int | None,
    retry_failed: bool,
    skip_failed: bool,
    rehash: bool,
    readmit: bool,
    dry_run: bool,
    as_json: bool,
    **models: Any,
) -> None:
    """Run the frozen models once over every clip of DATASETS and cache what they say in a store.

    What the store already holds is not computed again, whoever put it there. Interrupt it (Ctrl-C) and
    it finishes the batch under way, publishes what is computed and stops; twice, and it stops at once.
    Run the same command again: it goes on. Exit 3 when some clips could not be used (each is named).
    """
    from pmm.precompute.models import Options
    from pmm.precompute.plan import Choice
    from pmm.precompute.run import Limits
    from pmm.precompute.run import precompute as run_precompute

    choice = Choice(_modalities(only), limit, retry_failed, skip_failed)
    asked: dict[str, Any] = {
        "models": _resolve(**models),
        "options": Options(fps, device, precision, text_topk, lip_features),
    }
    limits = Limits(batch_seconds, round(fragment_mb * 1e6))
    with _bar("clip", "reading") as bar, _Interrupts(*_PRECOMPUTE_STOPS) as interrupts:
        progress = _PrecomputeProgress(bar, interrupts, shared=bool(workers or scheduler))
        told: dict[str, Any] = {"limits": limits, "on_event": progress, "stopping": interrupts.asked}
        plan, outcome = run_precompute(
            datasets,
            store_path,
            **asked,
            layout=layout,
            choice=choice,
            dry_run=dry_run,
            rehash=rehash,
            readmit=readmit,
            **told,
            carry_out=_carry_out(workers, scheduler, **asked, **told),
        )
    if outcome and outcome.pace.audio:
        took = replace(outcome.pace, elapsed=progress.elapsed)  # by the clock here, whoever computed
        _say("pace", f"{_pace_text(took)}; {_duration(took.audio)} of audio in {_duration(took.elapsed)}")
    _report(plan, outcome, progress.forecast, store_path, as_json)
    if outcome and outcome.left:
        click.echo(
            f"pmm: interrupted, {_count(outcome.left, 'clip')} left; what is computed is published: run the "
            "same command again to go on",
            err=True,
        )
        raise click.exceptions.Exit(INTERRUPTED)
    if outcome and outcome.failures:
        raise click.exceptions.Exit(FAILED_CLIPS)


def _carry_out(workers: int | None, scheduler: str | None, **given: Any) -> CarryOut | None:
    """Who computes: this process (None), workers that it starts, or those of a cluster there is."""
    if workers and scheduler:
        raise click.UsageError("--workers starts a cluster, --scheduler joins one; give one of them")
    if not (workers or scheduler):
        return None
    from pmm.precompute import cluster

    return partial(cluster.execute, workers=workers, scheduler=scheduler, **given)


def _modalities(only: str | None) -> frozenset[str]:
    """The features of --only, by the names the store has for them."""
    from pmm.store.feature import MODALITIES

    named = [part.strip().lower() for part in (only or "").split(",") if part.strip()]
    if only is None:
        return frozenset(MODALITIES)
    known = {**{name: name for name in MODALITIES}, "targets": "target"}
    if not named or any(name not in known for name in named):
        raise click.BadParameter(
            f"{only!r}; expected some of audio, text, image, targets", param_hint="--only"
        )
    return frozenset(known[name] for name in named)


class _Interrupts:
    """Ctrl-C while a long work is under way: once asks for a stop and says ``first``, twice is one.

    Before ``arm`` it is as everywhere: it stops the command.
    """

    def __init__(self, first: str, second: str) -> None:
        self._first, self._second = first, second
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> _Interrupts:
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def asked(self) -> bool:
        return self._asked

    def arm(self) -> None:
        if self._before is None and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        if self._asked:
            os.write(2, f"\npmm: {self._second}\n".encode())
            os._exit(INTERRUPTED)  # stores and runs are made for it: nothing half-written is ever visible
        self._asked = True
        os.write(2, f"\npmm: {self._first}\n".encode())


_PRECOMPUTE_STOPS = (
    "stopping after this batch, to publish what is computed; Ctrl-C again stops at once",
    "stopped at once; what was published is kept: run the same command again to go on",
)


class _PrecomputeProgress:
    """Events of a precompute run: a bar over clips read, the plan, a bar over seconds of audio."""

    def __init__(self, bar: tqdm, interrupts: _Interrupts, shared: bool):
        self.bar, self.interrupts, self.shared = bar, interrupts, shared
        self.seconds = 0.0
        self._began = time.perf_counter()
        self.forecast: Forecast | None = None
        self._paces: deque[Pace] = deque(maxlen=_RECENT_BATCHES)

    def __call__(self, event: Any) -> None:
        kind = type(event).__name__
        if kind == "Probed":
            _reach(self.bar, event.done, event.total)
        elif kind == "Planned":
            self._planned(event)
        elif kind == "ClipDone":
            _reach(self.bar, self.bar.n + event.seconds, self.seconds)
        elif kind == "BatchDone":
            self._paces.append(event.pace)
            recent = self._paces[-1] - self._paces[0] if len(self._paces) > 1 else event.pace
            self.bar.set_postfix_str(_pace_text(recent), refresh=False)
        elif kind in _CLUSTER_TEXTS:
            _say(*_CLUSTER_TEXTS[kind](event))

    @property
    def elapsed(self) -> float:
        """Seconds since the plan was made."""
        return time.perf_counter() - self._began

    def _planned(self, event: Any) -> None:
        self.seconds, self.forecast = event.plan.work_seconds, event.forecast
        _show_plan(event.plan, event.label, event.forecast, self.shared)
        self._began = time.perf_counter()
        self.bar.unit, self.bar.desc = "s", "computing: "
        self.bar.bar_format = _AUDIO_BAR
        self.bar.reset(total=self.seconds)
        self.interrupts.arm()


_CLUSTER_TEXTS: dict[str, Callable[[Any], tuple[str, str]]] = {
    "Joined": lambda event: (
        "cluster",
        f"{_count(event.workers, 'worker')} at {event.address}"
        + (f", to be watched at {event.dashboard}" if event.dashboard else ""),
    ),
    "Waiting": lambda event: (
        "waiting",
        f"no worker at {event.address} for {event.seconds:.0f} s; it goes on as soon as one comes",
    ),
    "Suspected": lambda event: (
        "died",
        f"{_count(event.deaths, 'worker')} of one task: its {event.clips} clips are tried in halves",
    ),
    "Stopping": lambda event: ("stopping", f"{_count(event.tasks, 'task')} under way"),
}
"""What is told of a cluster: a label and a line for each event."""

_RECENT_BATCHES = 8
_AUDIO_BAR = "{l_bar}{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}{postfix}]"
_STAGES = {"decode": "waiting for decoding", "models": "models busy", "disk": "waiting for the disk"}


def _pace_text(pace: Pace) -> str:
    """How fast, and what keeps it from being faster: ``12.3 s of audio a second, models busy``."""
    return f"{pace.speed:.1f} s of audio a second, {_STAGES[pace.bottleneck]}"


def _show_plan(plan: Plan, label: str, forecast: Forecast, shared: bool) -> None:
    subjects = len({(s.take.dataset, s.take.subject) for s in plan.sources})
    _say(
        "found",
        f"{_count(len(plan.sources), 'take')} of {_count(subjects, 'subject')}, "
        f"{_count(plan.clips, 'clip')}, {_duration(plan.seconds)}",
    )
    _say("models", label)
    for share in plan.shares:
        shape = "x".join(map(str, share.spec.shape))
        if share.missing:
            todo = f"{share.missing:6d} to compute {_size(share.bytes):>10}"
        else:
            todo = "       all cached" if share.cached and not plan.left_out else "     nothing to do"
        _say(
            "plan", f"{share.spec.modality:<7}{shape:>9} {share.spec.dtype:<8}{share.cached:6d} cached {todo}"
        )
    if plan.left_out:
        _say("left out", f"{_count(plan.left_out, 'clip')} that could be computed, as you chose")
    if plan.work:
        _say("needs", _needs_text(plan, forecast) + (", shared by the workers" if shared else ""))
    if forecast.tight:
        _say(
            "warning",
            f"the longest clip needs {_size(forecast.memory)} of memory beside the models, "
            f"{_size(forecast.free_memory or 0)} are free: cut it, or compute it on a larger machine",
        )


def _needs_text(plan: Plan, forecast: Forecast) -> str:
    """``disk 1.2 GB of 830.1 GB free; 600 clips, 1:00:00; about 0:10:00 of computing``."""
    disk = _size(forecast.disk)
    if forecast.free_disk is not None:
        disk = f"{disk} of {_size(forecast.free_disk)} free"
    audio = f"{_count(len(plan.work), 'clip')}, {_duration(plan.work_seconds)}"
    took = "" if forecast.seconds is None else f"; about {_duration(max(1, forecast.seconds))} of computing"
    return f"disk {disk}; {audio}{took}"


def _report(
    plan: Plan, outcome: Outcome | None, forecast: Forecast | None, store: Path | str, as_json: bool
) -> None:
    for failure in outcome.failures if outcome else ():
        named = Path(failure.source).name in failure.reason
        click.echo(f"pmm: failed: {'' if named else failure.source + ': '}{failure.reason}", err=True)
    if as_json:
        told = {**plan.to_json(), "forecast": forecast and forecast.to_json()}
        _print_json({"plan": told, "outcome": outcome and outcome.to_json()})
    elif outcome is None:
        click.echo(f"dry run: nothing computed; {_size(plan.bytes)} would be written")
    elif not plan.work and not outcome.failures and plan.left_out:
        click.echo(f"nothing to compute: {_count(plan.left_out, 'clip')} left out")
    elif not plan.work and not outcome.failures:
        click.echo(f"nothing to compute: all {plan.clips} clips are in {store}")
    else:
        click.echo(
            f"computed {outcome.clips} clips, published {_count(outcome.fragments, 'fragment')}, "
            f"{_size(outcome.bytes)}, to {store}"
        )
        if outcome.clipped:
            click.echo(f"clipped {outcome.clipped} coefficient values to [0, 1]")
        if outcome.dropped:
            click.echo(f"interpolated {outcome.dropped} dropped frames (each gap at most 100 ms)")
    if outcome and outcome.failures:
        click.echo(
            f"pmm: {_count(len(outcome.failures), 'recording')} could not be used; each is named above and, "
            f"unless refused, recorded in {store}/failures",
            err=True,
        )


@pmm.command()
@click.argument("store_path", metavar="STORE", type=STORE)
@click.option("--run", "run_path", required=True, type=PATH, help="A new folder for the run.")
@click.option(
    "--preset",
    type=click.Choice(["fast", "paper", "smoke"]),
    default="fast",
    show_default=True,
    help="smoke: seconds, to see whether everything works.",
)
@click.option("--rig", type=click.Choice(["lip32", "arkit52"]), default="lip32", show_default=True)
@_fps
@click.option("--epochs", type=click.IntRange(1), help="[default: the preset's]")
@click.option(
    "--batch", "batch_size", type=click.IntRange(1), help="Clips in a batch.  [default: the preset's]"
)
@click.option(
    "--lr", "learning_rate", type=click.FloatRange(0, min_open=True), help="[default: the preset's]"
)
@click.option("--lookahead", type=click.IntRange(0), help="Frames of the future the decoder sees.")
@click.option("--context", type=click.IntRange(1), help="Frames under each projection's kernel (odd).")
@click.option("--max-context", type=click.IntRange(1), help="Frames of the past attention sees.")
@click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), help="[default: 0.1]")
@click.option("--window", type=click.FloatRange(1), help="Seconds read of longer takes.  [default: 20]")
@click.option(
    "--patience",
    type=click.IntRange(0),
    help="Stop after so many epochs without a better one; 0: never.  [default: the preset's]",
)
@click.option("--decoder-input", type=click.Choice(["aligned", "separate"]), help="[default: aligned]")
@click.option("--loss-reduction", type=click.Choice(["sum", "mean"]), help="[default: sum]")
@click.option(
    "--without",
    multiple=True,
    type=click.Choice(["text", "audio", "image", "temporal", "semantic", "motion"]),
    help="Leave out a modality or a loss; may be repeated.",
)
@click.option(
    "--protocol",
    type=click.Choice(
        ["cross-subject", "cross-gender", "leave-one-subject-out", "vocaset", "manifest", "single"]
    ),
    help="Who trains, validates and is tested.  [default: cross-subject]",
)
@click.option("--test-subject", metavar="NAME", help="Who is left out, under leave-one-subject-out.")
@click.option("--split-seed", type=click.IntRange(0), help="Draws the split.  [default: what --seed is]")
@click.option("--subjects", metavar="LIST", help="Only these, comma-separated.  [default: everybody]")
@click.option(
    "--features", multiple=True, metavar="MODALITY=ID", help="Which features, where a store has several."
)
@click.option("--snapshot", metavar="NAME", help="Read exactly this snapshot of the store, or fail.")
@click.option(
    "--init", type=PATH, metavar="RUN", help="Begin with the heads of this run: a new person's style."
)
@click.option(
    "--freeze",
    metavar="LIST",
    help="With --init, what stays as it is: of image, projections, styles, decoder, output.",
)
@_seed
@_device
@click.option(
    "--cache",
    type=click.Choice(["auto", "device", "ram", "mmap"]),
    default="auto",
    show_default=True,
    help="Where features lie meanwhile; mmap: in the store, for more of them than memory.",
)
@click.option("--seeds", type=click.IntRange(1), help="Fit with so many seeds, into folders of --run.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=A,B",
    help="Fit with each value of an option, into folders of --run; several make a grid.",
)
@click.option("--resume", is_flag=True, help="Go on with what was interrupted.")
@_reading_options
@_json
def fit(
    store_path: Path | str,
    run_path: Path,
    features: tuple[str, ...],
    seeds: int | None,
    settings: tuple[str, ...],
    resume: bool,
    cache_dir: Path | None,
    cache_gb: float | None,
    safe_read: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Fit the alignment and decoder heads on the tensors cached in STORE.

    Interrupt it (Ctrl-C) and it keeps the heads after the step under way; --resume goes on from there, to
    the same result. With --seeds or --set several runs are fitted over one corpus, which is loaded once.
    """
    from pmm.store.cache import Cache
    from pmm.store.catalog import Store
    from pmm.train.run import fit as run_fit
    from pmm.train.sweep import sweep

    asked = _fit_options(features, **options)
    store = Store.open(store_path, Cache.default(cache_dir, cache_gb), safe_read or None)
    with _bar("step", "reading") as bar, _Interrupts(*_FIT_STOPS) as interrupts:
        progress = _FitProgress(bar, interrupts)
        told: dict[str, Any] = {"on_event": progress, "resume": resume, "stopping": interrupts.asked}
        if seeds or settings:
            results = sweep(store, run_path, asked, settings, seeds or 1, **told)
        else:
            results = [run_fit(store, run_path, asked, **told)]
    _report_fits(results, run_path, bool(seeds or settings), as_json)
    if any(one.ended == "interrupted" for one in results) or (interrupts.asked() and (seeds or settings)):
        click.echo("pmm: interrupted; run the same command again with --resume to go on", err=True)
        raise click.exceptions.Exit(INTERRUPTED)
    if progress.failed:
        raise click.exceptions.Exit(FAILED_CLIPS)


_FIT_STOPS = (
    "keeping the heads after this step; Ctrl-C again stops at once",
    "stopped at once; --resume goes on from where the heads were last kept",
)


def _fit_options(features: tuple[str, ...], **options: Any) -> FitOptions:
    from pmm.train.options import FitOptions

    given = {key: value for key, value in options.items() if value is not None}
    for name in ("subjects", "freeze"):
        if name in given:
            given[name] = tuple(part.strip() for part in given[name].split(",") if part.strip())
    if "init" in given:
        given["init"] = str(given["init"].absolute())
    return FitOptions(**given, features=dict(_pair(text) for text in features))


def _report_fits(results: list[Result], path: Path, several: bool, as_json: bool) -> None:
    from pmm.train.runs import compare

    if as_json:
        told = [one.to_json() for one in results]
        _print_json({"runs": told} if several else told[0])
    elif several:
        click.echo(_runs_table(compare(path)))
    else:
        (one,) = results
        best = f"best validation LVE {one.best_lve:.5f} at epoch {one.best_epoch}"
        click.echo(
            f"{best if one.best_epoch else 'no epoch is finished'}"
            f"{_ENDED[one.ended].format(one.epochs)}; run in {one.path}"
        )


_ENDED = {"done": "", "patience": " of {}, none better since", "interrupted": ", interrupted"}


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise click.BadParameter(f"{text!r} is not MODALITY=ID", param_hint="--features")
    return key, value


class _FitProgress:
    """Training events to a bar over steps and one line an epoch."""

    def __init__(self, bar: tqdm, interrupts: _Interrupts | None = None):
        self.bar, self.interrupts = bar, interrupts
        self.failed = 0

    def __call__(self, event: Any) -> None:
        kind = type(event).__name__
        if kind == "Fetched":
            self.bar.unit, self.bar.unit_scale, self.bar.desc = "B", True, "fetching: "
            _reach(self.bar, event.done_bytes, event.total_bytes)
        elif kind == "Content":
            kept = f"not kept in the store ({event.unpinned})" if event.unpinned else "kept in the store"
            self.bar.clear()
            _say("content", f"snapshot {event.snapshot}, {kept}")
        elif kind == "Cached":
            _say("cache", _cache_text(event))
        elif kind == "JobStarted":
            _say(f"{event.number}/{event.jobs}", str(event.path))
        elif kind == "JobFailed":
            self.failed += 1
            click.echo(f"pmm: failed: {event.path}: {event.reason}", err=True)
        elif kind == "Started":
            self.bar.unit, self.bar.unit_scale, self.bar.desc = "step", False, "fitting: "
            self.bar.reset(total=event.epochs * event.steps_per_epoch)
            self.bar.update(event.first_epoch * event.steps_per_epoch + event.first_step)
            if self.interrupts:
                self.interrupts.arm()
            note = f" ({event.skipped} takes lack features)" if event.skipped else ""
            subjects = _count(len(event.styles), "subject")
            _say(
                "fit",
                f"{_count(event.clips, 'clip')}, {event.frames} frames of {subjects}{note}; "
                f"{event.validation_clips} to validate; {event.parameters:,} parameters on {event.device}",
            )
            for part, people in event.split.items():
                _say("validate" if part == "validation" else part, _some(people))
            if event.unused:
                _say("unused", f"{_count(event.unused, 'take')} in no part of the protocol")
            if event.merged:
                more = f"; {len(event.merged) - 1} more in config.json" if len(event.merged) > 1 else ""
                _say("people", f"{event.merged[0]}{more}")
        elif kind == "StepDone":
            self.bar.update()
            self.bar.set_postfix_str(
                f"loss {event.losses['total']:.4f}, {event.frames_per_second:.0f} frames/s"
            )
        elif kind == "EpochDone":
            _say(
                f"{event.epoch:3d}/{event.epochs}",
                f"loss {event.losses['total']:.4f}  validation LVE {event.validation_lve:.5f}"
                f"{' *' if event.best else '  '}  {event.frames_per_second:.0f} frames/s",
            )


def _cache_text(event: Any) -> str:
    """``1.2 GB in memory of 8.0 GB free``."""
    place = {"device": "on the device", "ram": "in memory", "mmap": "in the store, read ahead"}[event.cache]
    free = "" if event.available is None else f", {_size(event.available)} free"
    why = " (too much to hold)" if (event.asked, event.cache) == ("auto", "mmap") else ""
    return f"features of {_size(event.needed)} {place}{free}{why}"


@pmm.command()
@click.argument("folder", metavar="DIR", type=PATH)
@_json
def runs(folder: Path, as_json: bool) -> None:
    """Compare the runs in DIR and in folders below it: their options where they differ, and their scores."""
    from pmm.train.runs import compare

    found = compare(folder)
    if as_json:
        _print_json(found.to_json())
    else:
        click.echo(_runs_table(found))


def _runs_table(found: Comparison) -> str:
    """A line a run, the best first; then means over seeds, and what stands against comparing."""
    differing = list(next((one.differences for one in found.runs if not one.problem), {}))
    head = ["run", *differing, "epochs", "loss", "val LVE", "test LVE", "test ALE"]
    lines = [
        [one.run, f"cannot be read: {one.problem}"]
        if one.problem
        else [
            one.run,
            *(_plainly(one.differences[name]) for name in differing),
            f"{one.epochs}/{one.planned}",
            _figure(one.loss),
            _figure(one.best_lve),
            _figure(one.test.get("lve")),
            _figure(one.test.get("ale")),
        ]
        for one in found.runs
    ]
    text = [_aligned(head, [line for line in lines if len(line) == len(head)])]
    text += ["  ".join(line) for line in lines if len(line) != len(head)]
    for group in found.groups:
        what = ", ".join(f"{name} {_plainly(value)}" for name, value in group.differences.items()) or "all"
        spread = "" if group.deviation is None else f" ± {group.deviation:.5f}"
        text.append(f"mean      {what}: val LVE {group.mean:.5f}{spread} of {_count(group.runs, 'run')}")
    return "\n".join([*text, *(f"note      {note}" for note in found.notes)])


def _aligned(head: list[str], lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *lines)]
    rows = [[cell.ljust(widths[0]), *map(str.rjust, rest, widths[1:])] for cell, *rest in (head, *lines)]
    return "\n".join("  ".join(row).rstrip() for row in rows)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"


def _plainly(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(map(str, value)) or "-"
    return "-" if value in (None, "", {}) else str(value)


@pmm.command(name="eval")
@click.argument("run_path", metavar="RUN", type=PATH)
@click.option(
    "--split", type=click.Choice(["train", "validation", "test"]), default="test", show_default=True
)
@click.option(
    "--style",
    default="",
    metavar="NAME",
    help="Everybody in this training subject's style, or in the mean.  [default: their own, or under every]",
)
@click.option(
    "--importance", is_flag=True, help="Also take each modality from other clips: do the heads listen to it?"
)
@click.option(
    "--store",
    "store_path",
    type=STORE,
    metavar="STORE",
    help="[default: the store the run was fitted on]",
)
@_device
@_reading_options
@_json
def evaluate(
    run_path: Path,
    split: str,
    style: str,
    importance: bool,
    store_path: Path | str | None,
    device: str,
    cache_dir: Path | None,
    cache_gb: float | None,
    safe_read: bool,
    as_json: bool,
) -> None:
    """Score a run beside the training mean face and silence, on the same clips.

    Errors (LVE, ALE), how it moves (motion, jitter), and how closed and still it is in pauses.
    """
    from pmm.store.cache import Cache
    from pmm.store.catalog import Store
    from pmm.train.evaluate import evaluate as score
    from pmm.train.importance import importance as weigh
    from pmm.train.run import load_run

    run = load_run(run_path, device=device)
    store = Store.open(store_path or run.store_path, Cache.default(cache_dir, cache_gb), safe_read or None)
    scores = score(run, store, split, style)
    weighed = weigh(run, store, split, style) if importance else None
    if as_json:
        _print_json(scores.to_json() | ({"importance": weighed.to_json()} if weighed else {}))
    else:
        click.echo(_score_table(scores))
        if weighed:
            click.echo("\n" + _importance_table(weighed))


_PREDICTORS = {"heads": "heads", "mean_face": "mean face", "silence": "silence", "target": "captured"}


def _score_table(scores: Scores) -> str:
    styles = _count(len(scores.styles), "style")
    style = f"in the style {scores.style}" if scores.style else f"under {styles}"
    lines = [
        f"{scores.split}: {_count(scores.clips, 'clip')}, {scores.frames} frames of "
        f"{_count(len(scores.subjects), 'subject')}, {style}",
        _row("", "LVE", "LVE (l2)", "ALE", "ALE (l2)"),
    ]
    for key, values in scores.scores.items():
        lines.append(_row(_PREDICTORS[key], *(values[name] for name in ("lve", "lve_l2", "ale", "ale_l2"))))
    lines += [
        _row("", "motion", "motion (l2)", "jitter", "pause jaw", "pause jitter"),
        *_motion_rows(scores),
        f"pauses: {scores.pauses.frames} frames in which the captured jaw rests and nothing moves",
        *_largest_errors(scores),
        "no motion to predict: the mean face is never wrong"
        if scores.ratio is None
        else f"LVE of the heads is {scores.ratio:.3f} of the mean face's",
    ]
    return "\n".join(lines)


def _motion_rows(scores: Scores) -> Iterator[str]:
    pauses = scores.pauses
    for key, name in _PREDICTORS.items():
        own = scores.scores.get(key, {"motion": None, "motion_l2": None, "jitter": scores.target_jitter})
        moving = (own[metric] for metric in ("motion", "motion_l2", "jitter"))
        yield _row(name, *moving, pauses.jaw_open[key], pauses.jitter[key])


def _largest_errors(scores: Scores, count: int = 3) -> Iterator[str]:
    worst = sorted(scores.coefficients.items(), key=lambda one: -one[1]["heads"]["squared"])[:count]
    yield f"{'largest squared errors':<24}{'heads':>13}{'mean face':>13}"
    for name, score in worst:
        yield f"  {name:<22}{score['heads']['squared']:13.5f}{score['mean_face']['squared']:13.5f}"


def _row(name: str, *values: str | float | None) -> str:
    """A row of a table: a name, then columns of numbers, of words, or of nothing to say."""
    cells = (f"{one:.5f}" if isinstance(one, float) else one or "-" for one in values)
    return f"{name:<11}" + "".join(f"{cell:>13}" for cell in cells)


def _importance_table(found: Importance) -> str:
    lines = [
        f"importance: LVE on {found.clips} clips with one modality taken from another clip",
        f"{'as it is':<11}{found.lve:12.5f}",
    ]
    for name, lve in found.swapped.items():
        relative = found.relative(name)
        change = "" if relative is None else f"{100 * relative:+9.1f} %"
        lines.append(f"{name:<11}{lve:12.5f}{change}")
    return "\n".join(lines)


# How `pmm ablate` fits each run: the options of `pmm fit`, but for those that the rows decide.
_ABLATED = (
    *("preset", "rig", "fps", "epochs", "batch_size", "learning_rate", "lookahead", "context"),
    *("max_context", "dropout", "window", "patience", "decoder_input", "loss_reduction", "protocol"),
    *("test_subject", "split_seed", "subjects", "features", "snapshot", "seed", "device", "cache"),
    *("cache_dir", "cache_gb", "safe_read"),
)


@pmm.command(params=[one for one in fit.params if one.name in _ABLATED])
@click.argument("store_path", metavar="STORE", type=STORE)
@click.option("--run", "run_path", required=True, type=PATH, help="A folder for all runs, new or begun.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Runs of each row.")
@_json
def ablate(
    store_path: Path | str,
    run_path: Path,
    seeds: int,
    features: tuple[str, ...],
    cache_dir: Path | None,
    cache_gb: float | None,
    safe_read: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Fit with and without each modality and loss, and print Table V of the paper beside its figures.

    Seven rows, several seeds each, as run folders in the folder --run. Interrupt it and run the same
    command again: it goes on.
    """
    from pmm.store.cache import Cache
    from pmm.store.catalog import Store
    from pmm.train.ablate import ablate as run_ablate

    asked = _fit_options(features, **options)
    store = Store.open(store_path, Cache.default(cache_dir, cache_gb), safe_read or None)
    with _bar("step", "reading") as bar, _Interrupts(*_ABLATE_STOPS) as interrupts:
        progress = _AblationProgress(bar, interrupts)
        table = run_ablate(store, run_path, asked, seeds, progress, interrupts.asked)
    if table is None:
        click.echo("pmm: interrupted; run the same command again to go on", err=True)
        raise click.exceptions.Exit(INTERRUPTED)
    if as_json:
        _print_json(table.to_json())
    else:
        click.echo(_ablation_table(table))


_ABLATE_STOPS = (
    "keeping the run under way after this step; Ctrl-C again stops at once",
    "stopped at once; run the same command again to go on from what was kept",
)


class _AblationProgress:
    """One line a run, and a bar over the steps of the run under way."""

    def __init__(self, bar: tqdm, interrupts: _Interrupts):
        self.bar, self.interrupts = bar, interrupts
        self.label, self.fitting = "", _FitProgress(bar)

    def __call__(self, event: Any) -> None:
        kind = type(event).__name__
        if kind == "CellStarted":
            self.label = f"{event.number}/{event.cells}"
            if event.state == "goes on":
                _say(self.label, f"{event.cell.row.name}, seed {event.cell.seed}: goes on")
        elif kind == "CellDone":
            name = f"{event.cell.row.name}, seed {event.cell.seed}"
            _say(self.label, f"{name:<26} LVE {event.lve:.5f}  ALE {event.ale:.5f}")
        elif kind == "Started":
            self.interrupts.arm()
            self.bar.unit, self.bar.unit_scale, self.bar.desc = "step", False, f"{self.label}: "
            self.bar.reset(total=event.epochs * event.steps_per_epoch)
            self.bar.update(event.first_epoch * event.steps_per_epoch + event.first_step)
        elif kind != "EpochDone":
            self.fitting(event)


def _ablation_table(table: Ablation) -> str:
    from statistics import fmean

    from pmm.train.ablate import spread

    def cell(values: tuple[float, ...], scale: float = 100) -> str:
        deviation = spread(values)
        beside = "" if deviation is None else f"± {scale * deviation:.3f}"
        return f"{scale * fmean(values):9.3f} {beside:<8}"

    seeds = _count(len(table.seeds), "seed")
    lines = [
        f"{table.protocol}, test subjects, x1e-2: means of {seeds}"
        + (" ± sample standard deviation" if len(table.seeds) > 1 else "")
        + "; of full: LVE over full's",
        f"{'':<17}{'LVE':>9}{'':9}{'ALE':>9}{'':9}{'of full':>9}{'':9}  paper: LVE / ALE on 3D-CAVFA",
    ]
    for one in table.rows:
        ours = cell(one.lve) + cell(one.ale) + cell(one.lve_over_full, 1)
        lines.append(f"{one.row.name:<17}{ours}  {one.row.paper_lve:.3f} / {one.row.paper_ale:.3f}")
    lines.append(f"{'mean face':<17}{cell(table.mean_face_lve)}".rstrip())
    if table.stand_in:
        lines.append("features by untrained stand-ins: what a row loses here says little about the method")
    return "\n".join(lines)


@pmm.command()
@click.argument("run_path", metavar="RUN", type=PATH)
@click.argument("audio", type=PATH, required=False)
@click.option("-o", "--out", required=True, type=PATH, help="The Live Link Face CSV to write.")
@click.option(
    "--style", default="mean", show_default=True, help="A training subject's style, or the mean of all."
)
@click.option("--plot", type=PATH, help="Also draw a few curves over the waveform, to this PNG.")
@click.option("--against", type=PATH, help="A captured CSV of the same speech, drawn beside the prediction.")
@click.option(
    "--features-from-store",
    "store_path",
    type=STORE,
    metavar="STORE",
    help="Animate a take of this store from its cached features, without any model.",
)
@click.option("--clip", metavar="NAME", help="The take: its name there, or 8 digits of its id.")
@_model_options
@_device
@_json
def animate(
    run_path: Path,
    audio: Path | None,
    out: Path,
    style: str,
    plot: Path | None,
    against: Path | None,
    store_path: Path | str | None,
    clip: str | None,
    device: str,
    as_json: bool,
    **models: Any,
) -> None:
    """Turn the speech in AUDIO into facial animation: a Live Link Face CSV that Unreal reads."""
    from pmm.animate.speak import animate_file

    if store_path is not None:
        if audio or plot or against or any(models.values()) or clip is None:
            raise click.UsageError(
                "--features-from-store goes with --clip, -o, --style and --device only: no sound, no model"
            )
        _animate_cached(run_path, store_path, clip, out, style, device, as_json)
        return
    if audio is None or clip is not None:
        raise click.UsageError("name a sound file to animate, or a --clip with --features-from-store")
    named = models.pop("models")
    replaced = {key: value for key, value in models.items() if value is not None}
    done = animate_file(
        run_path,
        audio,
        out,
        style=style,
        models=None if named is None else _resolve(named),
        replaced=replaced,
        device=device,
        picture=plot,
        captured=against,
    )
    if as_json:
        _print_json(done.to_json())
    else:
        click.echo(
            f"{done.frames} frames at {done.fps} fps ({_duration(done.seconds)}) by {done.models}, in {out}"
        )
        if plot:
            click.echo(f"picture in {plot}")


def _animate_cached(
    run_path: Path, store_path: Path | str, clip: str, out: Path, style: str, device: str, as_json: bool
) -> None:
    from pmm.animate.speak import animate_take
    from pmm.store.catalog import Store

    done = animate_take(run_path, Store.open(store_path), clip, out, style=style, device=device)
    if as_json:
        _print_json(done.to_json())
    else:
        length = _duration(done.seconds)
        click.echo(f"{done.frames} frames at {done.fps} fps ({length}) from {done.models}, in {out}")


@pmm.group()
def store() -> None:
    """Look into a feature store and check it."""


_store_argument = click.argument("store_path", metavar="STORE", type=STORE)


@store.command()
@_store_argument
@_json
def compact(store_path: Path | str, as_json: bool) -> None:
    """Join the small fragments of STORE into large ones, which open and copy faster.

    Every row stays, byte for byte. Interrupt it and run it again: it goes on. Exit 3 when damaged
    fragments were left alone (`pmm store verify --repair` sets them aside).
    """
    from pmm.store.catalog import Store
    from pmm.store.compact import compact as join

    with _bar("B", "compacting", unit_scale=True) as bar:
        done = join(
            Store.open(store_path), on_event=lambda event: _reach(bar, event.done_bytes, event.total_bytes)
        )
    for folder in done.damaged:
        click.echo(f"pmm: damaged: {folder}: left alone; run `pmm store verify --repair`", err=True)
    if as_json:
        _print_json(done.to_json())
    else:
        click.echo(
            f"wrote {len(done.written)} fragments, {_size(done.bytes)}; retired {len(done.retired)} others"
        )
    if done.damaged:
        raise click.exceptions.Exit(FAILED_CLIPS)


@store.command()
@_store_argument
@_json
def doctor(store_path: Path | str, as_json: bool) -> None:
    """Try out whether the disk or bucket of STORE, made or not, can keep what a store promises.

    Writes a few small objects there and takes them away again. Exit 1 where no store can be kept.
    """
    from dataclasses import asdict

    from pmm.store.doctor import REFUSED, examine

    found = examine(store_path)
    if as_json:
        _print_json([asdict(one) for one in found])
    else:
        for one in found:
            click.echo(f"{one.state:<8} {one.probe:<12} {one.seen}")
    if any(one.state == REFUSED for one in found):
        raise click.exceptions.Exit(1)


class _Age(click.ParamType):
    """A length of time: 90s, 30m, 24h, 7d. Seconds."""

    name = "age"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        if isinstance(value, float):
            return value
        number, unit = value[:-1], {"s": 1, "m": 60, "h": 3600, "d": 86_400}.get(value[-1:])
        if unit is None or not number.isdecimal():
            self.fail(f"{value!r} is no length of time; 90s, 30m, 24h or 7d was expected", param, ctx)
        return float(int(number) * unit)


@store.command()
@_store_argument
@click.option("--grace", type=_Age(), default="24h", show_default=True, help="Leave what is younger alone.")
@click.option("--dry-run", is_flag=True, help="Say what would be deleted, and delete nothing.")
@_json
def gc(store_path: Path | str, grace: float, dry_run: bool, as_json: bool) -> None:
    """Delete from STORE what killed writers left, and damaged copies of what it has whole.

    A writer that is only slow loses work, not data: it publishes again.
    """
    from pmm.store.catalog import Store
    from pmm.store.gc import gc as collect

    done = collect(Store.open(store_path), grace, dry_run)
    if as_json:
        _print_json(done.to_json())
        return
    click.echo(
        f"{'would delete' if dry_run else 'deleted'} {len(done.unfinished)} unfinished fragments, "
        f"{len(done.replaced)} damaged copies and {done.drafts} drafts, {_size(done.bytes)}"
        + (f"; {done.young} are younger than the grace period" if done.young else "")
    )
    for folder in done.kept:
        click.echo(f"kept {folder}: damaged, and nothing else has all its rows; run `pmm precompute` again")


@store.command()
@_store_argument
@_json
def info(store_path: Path | str, as_json: bool) -> None:
    """What is in STORE, since when, by whom and how large."""
    from pmm.store.care import info as summarise
    from pmm.store.catalog import Store

    summary = summarise(Store.open(store_path))
    if as_json:
        _print_json(summary)
    else:
        click.echo(_info_text(summary))


def _info_text(summary: dict[str, Any]) -> str:
    lines = [
        f"store     {summary['path']}, format {summary['format']}, since {_when(summary['created'])}",
        f"holds     {_count(summary['takes'], 'take')} of {_count(summary['subjects'], 'subject')}, "
        f"{_count(summary['clips'], 'clip')}, "
        f"{_duration(summary['hours'] * 3600)}, {_size(summary['bytes'])}",
    ]
    for one in summary["datasets"]:
        lines.append(
            f"dataset   {one['dataset']}: {_count(one['takes'], 'take')} of "
            f"{_count(len(one['subjects']), 'subject')}"
        )
    for one in summary["features"]:
        shape = "x".join(map(str, one["shape"]))
        lines.append(
            f"{one['modality']:<9} {one['spec'][:12]} {shape:>8} {one['dtype']:<8}{one['clips']:6d} clips "
            f"{_size(one['bytes']):>9}  {_made_with(one)}; last {_when(one['last_written'])} "
            f"by {', '.join(one['writers'])}"
        )
    lines += [f"failed    {one['source']}: {one['reason']}" for one in summary["failures"]]
    lines += [f"problem   {where}: {reason}" for where, reason in summary["problems"].items()]
    return "\n".join(lines)


def _made_with(feature: dict[str, Any]) -> str:
    """By what it was made; and what is left of its fullest form, where that is not all: (latent, bf16)."""
    if feature["modality"] == "target":
        return str(feature["algorithm"])
    labels = ", ".join(sorted({made.get("label", "?") for made in feature["made_with"]}))
    return f"{labels}: {feature['form']}" if feature["form"] else labels


def _when(iso: str) -> str:
    return iso[:16].replace("T", " ") + " UTC" if iso else "-"


@store.command()
@_store_argument
@_json
def ls(store_path: Path | str, as_json: bool) -> None:
    """The takes in STORE, one a line, with the modalities each has."""
    from pmm.store.care import contents
    from pmm.store.catalog import Store
    from pmm.store.feature import MODALITIES

    for take, present in (found := contents(Store.open(store_path))):
        if not as_json:
            has = " ".join(name if name in present else "-" * len(name) for name in MODALITIES)
            click.echo(f"{take.id[:12]} {take.clip.seconds:8.2f} s  {has}  {take.subject:<10} {take.source}")
    if as_json:
        _print_json([{**take.to_json(), "modalities": list(present)} for take, present in found])


_other_argument = click.argument("other_path", metavar="OTHER", type=STORE)
_check = click.option(
    "--check",
    is_flag=True,
    help="Also read what the receiving store has already, and replace what is damaged.",
)


@store.command()
@_store_argument
@_other_argument
@click.option("--no-check", is_flag=True, help="Do not read what both have already, to find what is damaged.")
@_json
def merge(store_path: Path | str, other_path: Path | str, no_check: bool, as_json: bool) -> None:
    """Give STORE and OTHER the same contents: what either has, less what was removed in either.

    Exit 3 when something damaged could not be copied (each is named).
    """
    from pmm.store.catalog import Store
    from pmm.store.share import merge as bring_together

    with _bar("B", "merging", unit_scale=True) as bar:
        there, back = bring_together(
            Store.open(store_path),
            Store.open(other_path),
            lambda event: _reach(bar, event.done_bytes, event.total_bytes),
            check=not no_check,
        )
    _report_shared({f"{store_path} to {other_path}": there, f"{other_path} to {store_path}": back}, as_json)


@store.command()
@_store_argument
@click.argument("out", type=PATH)
@click.option("--subjects", help="Only takes of these, comma-separated.  [default: everybody's]")
@click.option(
    "--snapshot", help="What was in the store when this snapshot was made.  [default: what is there now]"
)
@_json
def pack(
    store_path: Path | str, out: Path, subjects: str | None, snapshot: str | None, as_json: bool
) -> None:
    """Write features and takes of STORE to the new HDF5 file OUT, to hand to someone.

    The file explains itself and any HDF5 reader opens it; `pmm store unpack` puts it into a store again.
    """
    from pmm.store.catalog import Store
    from pmm.store.pack import pack as write

    chosen = [part.strip() for part in subjects.split(",")] if subjects else []
    with _bar("B", "packing", unit_scale=True) as bar:
        done = write(
            Store.open(store_path),
            out,
            chosen,
            snapshot or "",
            lambda event: _reach(bar, event.done_bytes, event.total_bytes),
        )
    if as_json:
        _print_json(done.to_json())
    else:
        click.echo(f"packed {done.takes} takes, {done.rows} rows of features, {_size(done.bytes)}, in {out}")


@store.command()
@_store_argument
@_other_argument
@_check
@_json
def pull(store_path: Path | str, other_path: Path | str, check: bool, as_json: bool) -> None:
    """Copy what OTHER has and STORE lacks to STORE, which is made if it is not there.

    Interrupt it and run it again: it goes on. Exit 3 when something damaged could not be copied.
    """
    from pmm.store.catalog import Store

    _push(Store.open(other_path), Store.open_or_create(store_path), check, as_json)


@store.command()
@_store_argument
@_other_argument
@_check
@_json
def push(store_path: Path | str, other_path: Path | str, check: bool, as_json: bool) -> None:
    """Copy what STORE has and OTHER lacks to OTHER, which is made if it is not there.

    Interrupt it and run it again: it goes on. Exit 3 when something damaged could not be copied.
    """
    from pmm.store.catalog import Store

    _push(Store.open(store_path), Store.open_or_create(other_path), check, as_json)


def _push(source: Store, target: Store, check: bool, as_json: bool) -> None:
    from pmm.store.share import push as send

    with _bar("B", "copying", unit_scale=True) as bar:
        done = send(source, target, lambda event: _reach(bar, event.done_bytes, event.total_bytes), check)
    _report_shared({f"{source.where} to {target.where}": done}, as_json)


def _report_shared(runs: dict[str, Shared], as_json: bool) -> None:
    """What was copied each way, the damaged named; exit 3 if there is any."""
    for way, done in runs.items():
        for skipped in done.skipped:
            click.echo(f"pmm: not copied from {way}: {skipped.where}: {skipped.reason}", err=True)
        if not as_json:
            size = f"{done.fragments} fragments, {_size(done.bytes)}, and {done.lists} lists"
            click.echo(f"{f'copied {size}' if done.fragments + done.lists else 'nothing to copy'} from {way}")
    if as_json:
        told = [done.to_json() for done in runs.values()]
        _print_json(told[0] if len(told) == 1 else {"there": told[0], "back": told[1]})
    if any(done.skipped for done in runs.values()):
        raise click.exceptions.Exit(FAILED_CLIPS)


@store.command()
@_store_argument
@click.option(
    "--clips", multiple=True, metavar="ID", help="A take, clip or target (8 digits do), or a source."
)
@click.option("--subjects", multiple=True, metavar="NAME", help="Every take of a subject.")
@click.option("--spec", "specs", multiple=True, metavar="ID", help="A feature set, all its rows.")
@click.option("--purge", is_flag=True, help="Destroy the bytes, too: this cannot be taken back.")
@_json
def rm(
    store_path: Path | str,
    clips: tuple[str, ...],
    subjects: tuple[str, ...],
    specs: tuple[str, ...],
    purge: bool,
    as_json: bool,
) -> None:
    """Take clips, subjects or feature sets out of STORE, for everybody and in every store it is merged with.

    `pmm precompute` refuses them from then on, unless told to --readmit them. Each option may be given
    several times.
    """
    from pmm.store.catalog import Store
    from pmm.store.removal import remove

    if not (clips or subjects or specs):
        raise click.UsageError("nothing to remove; name --clips, --subjects or --spec")
    done = remove(Store.open(store_path), clips, subjects, specs, purge)
    if as_json:
        _print_json(done.to_json())
        return
    for source in done.sources:
        click.echo(f"removed {source}")
    gone = done.purged
    click.echo(
        f"removed {len(done.takes)} takes, {len(done.rows)} rows and {len(done.specs)} feature sets"
        + (f"; deleted {gone.fragments} fragments and {gone.lists} lists that held them" if gone else "")
    )


@store.command()
@_store_argument
@click.argument("name")
@_json
def snapshot(store_path: Path | str, name: str, as_json: bool) -> None:
    """Name what STORE holds now, for ever: `pmm fit --snapshot NAME` reads exactly that, or fails."""
    from pmm.store import snapshots
    from pmm.store.catalog import Store

    taken = snapshots.take(Store.open(store_path), name)
    rows = sum(map(len, taken.rows.values()))
    if as_json:
        told = {"name": taken.name, "id": taken.id, "created": taken.created}
        _print_json({**told, "takes": len({take.id for take in taken.takes}), "rows": rows})
    else:
        takes = len({take.id for take in taken.takes})
        click.echo(f"snapshot {name} ({taken.id[:12]}): {takes} takes, {rows} rows of features")


@store.command()
@click.argument("packed", metavar="FILE", type=PATH)
@_store_argument
@_json
def unpack(packed: Path, store_path: Path | str, as_json: bool) -> None:
    """Put what is in FILE, which `pmm store pack` wrote, into STORE, which is made if it is not there.

    All of FILE is checked first: from one that is not wholly as it should be, nothing is taken.
    """
    from pmm.store.pack import unpack as take_over

    with _bar("B", "unpacking", unit_scale=True) as bar:
        done = take_over(packed, store_path, lambda event: _reach(bar, event.done_bytes, event.total_bytes))
    if as_json:
        _print_json(done.to_json())
    else:
        click.echo(
            f"took {done.takes} takes, {done.rows} rows of features, {_size(done.bytes)}, from {packed}"
        )


@store.command()
@_store_argument
@click.option("--quick", is_flag=True, help="Sizes and small objects only, not the rows themselves.")
@click.option(
    "--repair", "mend", is_flag=True, help="Set what is damaged aside, and save what is whole of it."
)
@_json
def verify(store_path: Path | str, quick: bool, mend: bool, as_json: bool) -> None:
    """Read every byte of STORE and check it against its checksum; exit 3 if anything is damaged."""
    from pmm.store.care import repair
    from pmm.store.care import verify as check
    from pmm.store.catalog import Store

    opened = Store.open(store_path)
    with _bar("B", "verifying", unit_scale=True) as bar:
        report = check(opened, lambda event: _reach(bar, event.done_bytes, event.total_bytes), quick)
    for damage in report.damaged:
        clips = ", ".join(damage.sources or [row[:12] for row in damage.rows])
        click.echo(
            f"pmm: damaged: {damage.where}: {damage.reason}" + (f"; clips: {clips}" if clips else ""),
            err=True,
        )
    repaired = repair(opened, report) if mend else None
    if as_json:
        _print_json(report.to_json() | ({"repaired": repaired.to_json()} if repaired else {}))
    else:
        click.echo(
            f"{'clean' if report.clean else 'damaged'}: read {report.fragments} fragments, "
            f"{report.objects} objects, {report.rows} rows, {_size(report.bytes)}"
            + (f"; {report.orphans} unfinished fragments of killed writers" if report.orphans else "")
        )
        if repaired and not report.clean:
            click.echo(_repaired_text(repaired))
    if not report.clean:
        raise click.exceptions.Exit(FAILED_CLIPS)


def _repaired_text(repaired: Repaired) -> str:
    lines = [
        f"set aside {len(repaired.marked)} damaged fragments and lists, wrote {len(repaired.written)} specs "
        f"anew, saved {repaired.saved} whole rows; {len(repaired.lost)} rows are lost"
        + (": `pmm precompute` computes them, `pmm store pull` fetches them" if repaired.lost else "")
    ]
    lines += [f"not mended: {where}; put it back, or make it anew" for where in repaired.left]
    return "\n".join(lines)


@pmm.command()
@click.option(
    "--dir", "folder", type=PATH, default=Path("pmm-demo"), show_default=True, help="Where to put it all."
)
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=6.0, show_default=True)
@click.option("--epochs", type=click.IntRange(1), help="[default: the preset's]")
@_seed
@_device
def demo(folder: Path, minutes: float, epochs: int | None, seed: int, device: str) -> None:
    """All of it in sequence, on a small corpus made on the spot: speech, features, heads, score, curves.

    Run it again: what is cached stays cached, and a new run is fitted beside the first.
    """
    corpus, features = folder / "corpus", folder / "store"
    run = _unused(folder / "run")
    took: list[tuple[str, float]] = []

    def step(*args: object) -> None:
        command = [str(arg) for arg in args if arg is not None]
        click.secho(f"\n$ pmm {shlex.join(command)}", bold=True)
        began = time.perf_counter()
        code = pmm.main(command, prog_name="pmm", standalone_mode=False)
        took.append((command[0], time.perf_counter() - began))
        click.echo(f"  ({took[-1][1]:.1f} s)")
        if code:
            raise click.exceptions.Exit(code)

    folder.mkdir(parents=True, exist_ok=True)
    if (corpus / "subjects.csv").exists():
        click.echo(f"the corpus is in {corpus} already")
    else:
        step("synth", corpus, "--minutes", f"{minutes:g}", "--subjects", 10, "--seed", seed)
    where = () if device == "auto" else ("--device", device)
    step("precompute", corpus, "--store", features, *where)
    step("store", "info", features)
    chosen = () if epochs is None else ("--epochs", epochs)
    step("fit", features, "--run", run, "--seed", seed, *where, *chosen)
    take = _test_take(run, features, corpus)
    csv, picture = _unused(folder / f"{take.stem}.csv"), _unused(folder / f"{take.stem}.png")
    captured = take.with_suffix(".csv")
    step("animate", run, take, "-o", csv, "--plot", picture, "--against", captured, *where)
    step("eval", run, *where)
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in took)
    click.echo(f"\ncurves    {csv} (Live Link Face: import it in Unreal)\npicture   {picture}")
    click.echo(f"time      {sum(seconds for _, seconds in took):.0f} s: {times}")


def _unused(path: Path) -> Path:
    """``path``, or the first of path-2, path-3, ... that is not there."""
    candidates = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return path if not path.exists() else next(one for one in candidates if not one.exists())


def _test_take(run: Path, features: Path, corpus: Path) -> Path:
    """The sound of a take whose subject the run never saw."""
    from pmm.store.catalog import Store
    from pmm.train.run import read_config

    tested = {take for takes in read_config(run)["split"]["test"].values() for take in takes}
    source = min(take.source for take in Store.open(features).takes() if take.id in tested)
    return corpus / f"{source}.wav"
