"""Model sets: which frozen models hear a clip, and what they are together.

A *model set* names a speech model for the audio features, one for the text features (often the
same, and then one forward serves both), a lip generator and a reference face. ``resolve`` picks
one by name or from a studio's own ``.toml``; ``load`` makes :class:`FrozenModels` of it.

Importing this module is cheap: torch and transformers come in with ``load``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pmm import BadInput, NotFound, PmmError
from pmm.store import clock
from pmm.store.feature import FeatureSpec

if TYPE_CHECKING:
    import torch

    from pmm.precompute import lips, speech

BUILTIN = "builtin"
STAND_IN = "untrained stand-in"
PRECISIONS = ("fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")
LIPS = ("frames", "latent", "latent32")
_LARGEST_FPS = 240


@dataclass(frozen=True)
class Options:
    """What is asked of a model set, beside which models they are.

    fps        video frames per second of the lips
    device     auto (a GPU if there is one), cpu or cuda
    precision  fp32 on every device; bf16 and fp16 are other features (other specs)
    text_topk  None for all V logits, or how many of the largest are kept of each step
    lips       frames (uint8 pictures), latent (what the pictures are painted from, float16) or
               latent32 (the same in float32)

    Raises BadInput for a value that cannot be.
    """

    fps: int = 30
    device: str = "auto"
    precision: str = "fp32"
    text_topk: int | None = None
    lips: str = "frames"

    def __post_init__(self) -> None:
        for what, legal in (("device", DEVICES), ("precision", PRECISIONS), ("lips", LIPS)):
            if (value := getattr(self, what)) not in legal:
                raise BadInput(f"{what} {value!r} is none of {', '.join(legal)}")
        if not 1 <= self.fps <= _LARGEST_FPS:
            raise BadInput(f"fps {self.fps}, expected 1 to {_LARGEST_FPS}")
        if self.text_topk is not None and self.text_topk < 1:
            raise BadInput(f"text_topk {self.text_topk}: at least 1 logit of each step must be kept")


@dataclass(frozen=True)
class ModelSet:
    """The frozen models by name.

    audio_model, text_model  a Hugging Face id, a folder with a checkpoint, or ``builtin``
    audio_revision, text_revision  a commit, tag or branch on the hub; None for its main branch
    audio_layer  n for the output of transformer block n (from 1, before any final norm) of the audio
                 model; None for its last hidden state (after the final norm)
    lips         an official Wav2Lip ``.pth``, a ``.safetensors`` of the same tensors, or ``builtin``;
                 None where the user has yet to name one
    face         an image of one face, or ``builtin`` for the drawn one
    """

    name: str
    audio_model: str
    text_model: str
    audio_revision: str | None = None
    audio_layer: int | None = None
    text_revision: str | None = None
    lips: str | None = None
    face: str = BUILTIN

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            wanted = int if field.name == "audio_layer" else str
            optional = field.name in ("audio_revision", "audio_layer", "text_revision", "lips")
            if not (optional and value is None) and (type(value) is not wanted or value == ""):
                raise BadInput(f"model set: {field.name} is {value!r}, expected {_KINDS[wanted]}")
        if self.one_forward and self.audio_layer is None:
            raise BadInput(
                f"model set {self.name}: audio and text would both be the last hidden state of "
                f"{self.audio_model}; give audio_layer (a middle layer), or another audio_model"
            )

    @property
    def one_forward(self) -> bool:
        """Whether one model, run once, gives both audio and text features."""
        return (self.audio_model, self.audio_revision) == (self.text_model, self.text_revision)


_KINDS: dict[type, str] = {int: "a whole number", str: "a name or path in quotes"}

MODEL_SETS = {
    "tiny": ModelSet("tiny", audio_model=BUILTIN, text_model=BUILTIN, audio_layer=2, lips=BUILTIN),
    "paper": ModelSet(
        "paper",
        audio_model="facebook/wav2vec2-large-xlsr-53",
        text_model="jonatasgrosman/wav2vec2-large-xlsr-53-chinese-zh-cn",
    ),
    "paper-en": ModelSet(
        "paper-en",
        audio_model="facebook/wav2vec2-large-xlsr-53",
        text_model="jonatasgrosman/wav2vec2-large-xlsr-53-english",
    ),
}
"""``tiny`` is embedded and untrained, ``paper`` the paper's (Mandarin), ``paper-en`` its English sister."""


def resolve(name_or_toml: str, **overrides: str | int | None) -> ModelSet:
    """The model set of that name, or of a ``.toml`` file with ModelSet's fields.

    Paths in a toml are relative to it. ``overrides`` replace fields; None leaves a field as it is.
    Raises BadInput that lists the legal values, NotFound for a toml that is not there.
    """
    if name_or_toml.endswith(".toml"):
        base = _from_toml(Path(name_or_toml))
    elif name_or_toml in MODEL_SETS:
        base = MODEL_SETS[name_or_toml]
    else:
        known = ", ".join(MODEL_SETS)
        raise BadInput(f"model set {name_or_toml!r} is none of {known}, nor a .toml file of your own")
    given = {key: value for key, value in overrides.items() if value is not None}
    _refuse_unknown(given, "model set")
    return replace(base, **given)  # type: ignore[arg-type]


def _from_toml(path: Path) -> ModelSet:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(
            f"no model set at {path}; expected a .toml file or one of {', '.join(MODEL_SETS)}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise BadInput(f"{path} is no readable TOML ({error})") from None
    _refuse_unknown(values, str(path))
    missing = [key for key in ("audio_model", "text_model", "lips") if key not in values]
    if missing:
        raise BadInput(f"{path} lacks {', '.join(missing)}; expected the fields {_field_names()}")
    for key in ("audio_model", "text_model", "lips", "face"):
        if isinstance(value := values.get(key), str):
            values[key] = _beside(path, key, value)
    return ModelSet(**{"name": path.stem, **values})


def _beside(toml: Path, key: str, value: str) -> str:
    """A path of a toml, from its folder. A model that is no folder there stays a Hugging Face id."""
    if value == BUILTIN:
        return value
    path = toml.parent / Path(value).expanduser()
    is_path = key in ("lips", "face") or path.is_dir() or value.startswith((".", "~", "/"))
    return str(path) if is_path else value


def _field_names() -> str:
    return ", ".join(field.name for field in fields(ModelSet))


def _refuse_unknown(values: Mapping[str, Any], where: str) -> None:
    unknown = [key for key in values if key not in {field.name for field in fields(ModelSet)}]
    if unknown:
        raise BadInput(f"{where}: unknown field {', '.join(unknown)}; expected {_field_names()}")


# --- the models, loaded -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speech:
    """What the speech models say of a clip, S steps of 20 ms: audio (S, D) and text (S, V), float16.

    Where only k logits of each step are kept, text is (S, 2, k + 1) float32 (see ``topk``).
    """

    audio: np.ndarray
    text: np.ndarray


def options_of(specs: Mapping[str, FeatureSpec], fps: int, device: str = "auto") -> Options:
    """What has to be asked for to get features of these specs again, by modality; others do not matter."""
    found: dict[str, Any] = {}
    for spec in specs.values():
        found |= {"precision": spec.settings["precision"]} if "precision" in spec.settings else {}
    text, image = specs.get("text"), specs.get("image")
    if text is not None and len(text.shape) == 2:
        found["text_topk"] = text.settings["kept"]
    if image is not None and len(image.shape) == 1:
        found["lips"] = {"float16": "latent", "float32": "latent32"}[image.dtype]
    return Options(fps, device, **found)


class FrozenModels:
    """The frozen models of one set, ready to hear clips. Made by :func:`load`.

    specs              the FeatureSpec of "audio", "text" and "image"
    description        JSON for records and run configurations: the set, library versions, device
    label              the set's name for people, which says where stand-ins are untrained
    can_batch          whether clips of unequal lengths run together (group-norm models: only equal ones)
    max_batch_seconds  padded seconds that run in one forward; ``speech`` splits what it is given
    """

    def __init__(
        self,
        specs: Mapping[str, FeatureSpec],
        description: Mapping[str, Any],
        label: str,
        audio: speech.SpeechModel | speech.PairedModels,
        text: speech.SpeechModel | speech.PairedModels,
        generator: lips.LipGenerator,
    ):
        self.specs = dict(specs)
        self.description = dict(description)
        self.label = label
        self._audio, self._text, self._generator = audio, text, generator
        self.can_batch = audio.can_pad and text.can_pad
        self.max_batch_seconds = _batch_seconds(audio, text)

    def speech(self, waves: Sequence[np.ndarray]) -> list[Speech | PmmError]:
        """Audio and text features of each wave (n,) float32 at 16 kHz, or why there are none.

        A wave's features do not depend on the others (beyond rounding). A wave that is too short,
        not finite, or whose features overflow float16 has a BadInput in its place.
        """
        from pmm.precompute import speech

        limit = clock.samples(self.max_batch_seconds, clock.SPEECH_RATE)
        with _exact():
            heard = speech.features(self._audio, waves, limit)
            read = heard if self._text is self._audio else speech.features(self._text, waves, limit)
        return [_pair(one, other) for one, other in zip(heard, read)]

    def lips(self, wave: np.ndarray, frame_count: int) -> np.ndarray:
        """Lip features of one wave (n,) float32 at 16 kHz, exactly T of them, as ``specs["image"]`` has them.

        (T, 96, 96, 3) uint8 RGB frames, or (T, D) latents, which ``paint`` makes frames of.
        """
        spec = self.specs["image"]
        with _exact():
            if len(spec.shape) > 1:
                return self._generator.frames(wave, frame_count)
            latents = self._generator.latents(wave, frame_count)
        with np.errstate(over="ignore"):
            stored = latents.astype(spec.dtype)
        if not np.isfinite(stored).all():
            raise BadInput("lip latents overflow float16; they can be stored as float32 (latent32)")
        return stored

    def paint(self, latents: np.ndarray) -> np.ndarray:
        """Frames (T, 96, 96, 3) uint8 RGB of latents (T, D), of this set's face.

        Those of float32 latents are the frames that ``lips`` would give, those of float16 at most a
        grey level apart.
        """
        with _exact():
            return self._generator.paint(latents)


def _batch_seconds(*models: speech.SpeechModel | speech.PairedModels) -> int:
    """Padded seconds of one forward: no more help the speed, and half of what memory is free holds them."""
    from pmm.precompute import memory

    device = models[0].device
    free = memory.free(device)
    wanted = 60 if device.type == "cpu" else 480
    held = wanted if free is None else free // 2 // max(one.bytes_per_second for one in models)
    return max(1, min(wanted, held))


def _pair(audio: Any, text: Any) -> Speech | PmmError:
    for result in (audio, text):
        if isinstance(result, PmmError):
            return result
    return Speech(audio[0], text[1])


def _exact() -> AbstractContextManager[None]:
    """Float32 means float32 on a GPU too (no TF32), and the same bits every time."""
    import torch

    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def load(models: ModelSet, options: Options = Options(), **choices: Any) -> FrozenModels:
    """Read the checkpoints of a set and make its models.

    ``choices`` are fields of Options, by name, that replace those of ``options``.

    Raises NotFound and BadInput with one line: a file, model or id that cannot be had, a checkpoint
    of another kind, an illegal option.
    """
    from pmm.precompute import lips, speech

    options = replace(options, **choices)
    fps, precision = options.fps, options.precision
    where, dtype = _device(options.device), _dtype(precision)
    lip_tensors, lip_origin = _lip_tensors(models)
    face = _face(models)
    text_checkpoint = _speech_checkpoint(models.text_model, models.text_revision)
    if models.one_forward:
        audio_checkpoint = text_checkpoint
        audio = text = speech.SpeechModel(
            text_checkpoint, models.audio_layer, True, True, where, dtype, options.text_topk
        )
    else:
        audio_checkpoint = _speech_checkpoint(models.audio_model, models.audio_revision)
        audio = speech.SpeechModel(audio_checkpoint, models.audio_layer, True, False, where, dtype)
        text = speech.SpeechModel(text_checkpoint, None, False, True, where, dtype, options.text_topk)
    generator = lips.LipGenerator(lips.network_for(lip_tensors, lip_origin), face, fps, where, dtype)
    specs = {
        "audio": _audio_spec(audio_checkpoint, audio, precision),
        "text": _text_spec(text_checkpoint, text, precision),
        "image": _image_spec(lip_tensors, face, generator.latent_size, options),
    }
    description = _description(models, specs, options, str(where))
    name = label(models)
    if text is not audio and speech.PairedModels.fit(audio, text):
        pair = speech.PairedModels(audio, text)
        return FrozenModels(specs, description, name, pair, pair, generator)
    return FrozenModels(specs, description, name, audio, text, generator)


def label(models: ModelSet) -> str:
    """The set's name for people: ``tiny (untrained stand-in)``."""
    parts = {"audio": models.audio_model, "text": models.text_model, "lips": models.lips}
    made_up = [part for part, name in parts.items() if name == BUILTIN]
    if len(made_up) == len(parts):
        return f"{models.name} ({STAND_IN})"
    return f"{models.name} ({', '.join(made_up)}: {STAND_IN})" if made_up else models.name


def _device(name: str) -> torch.device:
    import torch

    present = torch.cuda.is_available()
    if name == "cuda" and not present:
        raise BadInput("device cuda: this torch sees no GPU; use --device cpu, or install a torch with CUDA")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and present) else "cpu")


def _dtype(precision: str) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _speech_checkpoint(name: str, revision: str | None) -> speech.Checkpoint:
    from pmm.precompute import speech, standin

    return standin.speech_checkpoint() if name == BUILTIN else speech.read_checkpoint(name, revision)


def _lip_tensors(models: ModelSet) -> tuple[dict[str, torch.Tensor], str]:
    """The lip generator's tensors, and where they came from."""
    from pmm.precompute import standin, weights

    if models.lips is None:
        raise BadInput(
            f"model set {models.name} needs a Wav2Lip checkpoint: get wav2lip_gan.pth from the links in the "
            "README of github.com/Rudrabha/Wav2Lip (its weights are for non-commercial use) "
            "and give --lips wav2lip_gan.pth"
        )
    if models.lips == BUILTIN:
        return standin.lips_tensors(), "the built-in lip generator"
    return weights.read_tensors(Path(models.lips)), models.lips


def _face(models: ModelSet) -> np.ndarray:
    from pmm.precompute import face

    return face.drawn_face() if models.face == BUILTIN else face.read_face(Path(models.face))


# --- what the specs say -----------------------------------------------------------------------------------


def _speech_settings(checkpoint: speech.Checkpoint, precision: str) -> dict[str, Any]:
    from pmm.precompute import speech
    from pmm.precompute.media import PREPROCESSING

    return {
        "weights": checkpoint.digest,
        "preprocessing": dict(PREPROCESSING),
        "normalisation": "zero mean, unit variance" if checkpoint.do_normalize else "none",
        "chunks": {
            "above_steps": speech.CHUNK_ABOVE_STEPS,
            "kept_steps": speech.CHUNK_KEPT_STEPS,
            "overlap_steps": speech.CHUNK_OVERLAP_STEPS,
        },
        "precision": precision,
    }


def _audio_spec(checkpoint: speech.Checkpoint, model: speech.SpeechModel, precision: str) -> FeatureSpec:
    from pmm.precompute import speech

    layer = "last hidden state" if model.layer is None else model.layer
    settings = {**_speech_settings(checkpoint, precision), "layer": layer}
    return FeatureSpec("audio", speech.HIDDEN_ALGORITHM, "float16", (model.hidden_size,), None, settings)


def _text_spec(checkpoint: speech.Checkpoint, model: speech.SpeechModel, precision: str) -> FeatureSpec:
    from pmm.precompute import speech, topk

    settings = _speech_settings(checkpoint, precision)
    size, kept = model.vocabulary_size, model.text_topk
    if kept is None:
        return FeatureSpec("text", speech.LOGITS_ALGORITHM, "float16", (size,), None, settings)
    settings |= {"vocabulary_size": size, "kept": kept, "rounding": "float16", "rest": "mean"}
    return FeatureSpec("text", topk.ALGORITHM, "float32", (2, kept + 1), None, settings)


def _image_spec(
    tensors: dict[str, torch.Tensor], face: np.ndarray, latent_size: int, options: Options
) -> FeatureSpec:
    """Of frames, or of latents: those do not depend on the face, and are float32 until they are stored."""
    from pmm.precompute import lips, mel, weights
    from pmm.precompute.face import face_digest
    from pmm.precompute.media import PREPROCESSING

    settings = {
        "weights": weights.weights_digest(tensors, {}),
        "preprocessing": dict(PREPROCESSING),
        "mel": mel.ALGORITHM,
        "window_columns": lips.WINDOW_COLUMNS,
        "past_the_end": "last full window",
        "short_audio": "silence to one window",
    }
    if options.lips != "frames":
        dtype = {"latent": "float16", "latent32": "float32"}[options.lips]
        return FeatureSpec("image", lips.LATENT_ALGORITHM, dtype, (latent_size,), options.fps, settings)
    settings |= {
        "face": face_digest(face),
        "rounding": "half to even",
        "precision": options.precision,
    }
    shape = (lips.FACE_SIZE, lips.FACE_SIZE, 3)
    return FeatureSpec("image", lips.ALGORITHM, "uint8", shape, options.fps, settings)


def located(models: ModelSet) -> ModelSet:
    """The same set with absolute paths: a run finds its models again from any folder."""

    def located(name: str) -> str:
        return str(Path(name).absolute()) if Path(name).exists() else name

    return replace(
        models,
        audio_model=located(models.audio_model),
        text_model=located(models.text_model),
        lips=models.lips and located(models.lips),
        face=located(models.face),
    )


def _description(
    models: ModelSet, specs: Mapping[str, FeatureSpec], options: Options, device: str
) -> dict[str, Any]:
    from importlib.metadata import version

    libraries = ("numpy", "torch", "transformers", "safetensors", "soundfile", "soxr", "av", "pillow")
    return {
        "models": asdict(located(models)),
        "label": label(models),
        "untrained stand-in": BUILTIN in (models.audio_model, models.text_model, models.lips),
        "weights": {modality: spec.settings["weights"] for modality, spec in specs.items()},
        "fps": options.fps,
        "device": device,
        "precision": options.precision,
        "libraries": {name: version(name) for name in libraries},
    }
