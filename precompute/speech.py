"""wav2vec2: speech to hidden states and CTC logits, both from one forward where one model gives both.

A checkpoint is a Hugging Face id or a folder with ``config.json``, ``preprocessor_config.json``,
``vocab.json`` (CTC models) and ``model.safetensors`` or ``pytorch_model.bin``. We read the files
ourselves, so that pickles run no code and the weights' name does not depend on the file format.

Shapes: B clips, S steps of 20 ms (``clock.steps`` of the clip's samples), D features, V vocabulary.
Where only k logits are kept, (S, V) float16 stands for (S, 2, k + 1) float32 (see ``topk``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pmm import BadInput, NotFound, PmmError
from pmm.precompute import memory, topk
from pmm.precompute.extractor import Extractor
from pmm.precompute.weights import Tensors, canonical, fit, one_line, read_tensors, weights_digest
from pmm.store import clock
from pmm.store.digest import strict_json

HIDDEN_ALGORITHM = "wav2vec2-hidden/1"
LOGITS_ALGORITHM = "wav2vec2-logits/1"

CHUNK_KEPT_STEPS = 1300
"""Steps kept of each chunk of a long clip (26 s); with the overlap on both sides it runs 30 s."""

CHUNK_OVERLAP_STEPS = 100
"""Steps computed and discarded on either side of a chunk (2 s)."""

CHUNK_ABOVE_STEPS = CHUNK_KEPT_STEPS + 2 * CHUNK_OVERLAP_STEPS

# Configuration that decides values, with wav2vec2's published defaults: a saved config.json omits
# or spells out defaults depending on the library version, and that must not rename the weights.
_CONFIG_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "feat_extract_norm": "group",
    "feat_extract_activation": "gelu",
    "conv_dim": [512] * 7,
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_bias": False,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "do_stable_layer_norm": False,
    "adapter_attn_dim": None,
}
_PROCESSOR_DEFAULTS = {"do_normalize": True, "sampling_rate": clock.SPEECH_RATE, "feature_size": 1}
_UNUSED_TENSORS = ("wav2vec2.masked_spec_embed",)  # only training masks anything


@dataclass(frozen=True)
class Checkpoint:
    """A wav2vec2 checkpoint as read: ``origin`` says from where, for people."""

    origin: str
    config: dict[str, Any]
    processor: dict[str, Any]
    vocabulary: dict[str, int] | None
    tensors: Tensors

    @cached_property
    def architecture(self) -> dict[str, Any]:
        """The configuration that decides values, defaults filled in."""
        return {key: self.config.get(key, default) for key, default in _CONFIG_DEFAULTS.items()}

    @cached_property
    def digest(self) -> str:
        """The weights' name: tensors, configuration, vocabulary and processor."""
        processor = {key: self.processor.get(key, value) for key, value in _PROCESSOR_DEFAULTS.items()}
        settings = {"config": self.architecture, "processor": processor, "vocabulary": self.vocabulary}
        return weights_digest(self.tensors, _spelt(settings))

    @property
    def do_normalize(self) -> bool:
        return bool(self.processor.get("do_normalize", True))

    @property
    def has_logits(self) -> bool:
        return "lm_head.weight" in self.tensors


def _spelt(value: Any) -> Any:
    """JSON with its floats as strings: canonical JSON holds none."""
    if isinstance(value, dict):
        return {key: _spelt(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spelt(item) for item in value]
    return repr(value) if isinstance(value, float) else value


# --- reading a checkpoint ---------------------------------------------------------------------------------


def read_checkpoint(name: str, revision: str | None = None) -> Checkpoint:
    """The wav2vec2 checkpoint in the folder ``name``, or of that Hugging Face id at ``revision``.

    Raises NotFound when it cannot be had (the message says how to bring it), BadInput when it is
    not a wav2vec2 model for 16 kHz mono with one vector each 20 ms.
    """
    folder = Path(name)
    files = _Folder(folder, name) if folder.is_dir() else _Folder(_downloaded(name, revision), name)
    config = _read_object(files.required("config.json"))
    processor = _read_processor(files)
    vocabulary = files.optional("vocab.json")
    _check_kind(config, processor, name)
    return Checkpoint(
        origin=files.origin,
        config=config,
        processor=processor,
        vocabulary=None if vocabulary is None else _read_object(vocabulary),
        tensors=_prefixed(_read_weights(files)),
    )


class _Folder:
    """The files of a checkpoint in a folder."""

    def __init__(self, folder: Path, origin: str):
        self.folder, self.origin = folder, origin

    def optional(self, file: str) -> Path | None:
        path = self.folder / file
        return path if path.is_file() else None

    def required(self, file: str) -> Path:
        path = self.optional(file)
        if path is None:
            raise NotFound(f"{self.origin} has no {file}; expected the files of a Hugging Face checkpoint")
        return path


def _downloaded(name: str, revision: str | None) -> Path:
    """The local snapshot of a Hugging Face id, fetched if need be; safetensors where there are any."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    shown = name if revision is None else f"{name} at {revision}"
    bring = "download it where there is network access and give its folder"
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise NotFound(f"no folder {name}, and it is no Hugging Face id (owner/name) either")
    try:
        for weights in ("model*.safetensors", "pytorch_model*.bin"):
            patterns = ["*config.json", "vocab.json", weights, f"{weights}.index.json"]
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
            if any(folder.glob(weights)):
                break
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        raise NotFound(
            f"the Hugging Face hub shows no model {shown} (misspelt, private or gated?); "
            f"check the id and revision, log in with `hf auth login`, or {bring}"
        ) from None
    except OSError as error:  # every other failure of the hub's client, offline included
        raise NotFound(f"cannot get {shown} from the Hugging Face hub ({one_line(error)}); {bring}") from None
    return folder


def _read_object(path: Path) -> dict[str, Any]:
    value = strict_json(path.read_bytes(), str(path))
    if not isinstance(value, dict):
        raise BadInput(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def _read_processor(files: _Folder) -> dict[str, Any]:
    """The feature extractor's settings; newer checkpoints keep them inside processor_config.json."""
    combined = files.optional("processor_config.json")
    if combined is not None:
        inner = _read_object(combined).get("feature_extractor")
        if isinstance(inner, dict):
            return inner
    return _read_object(files.required("preprocessor_config.json"))


def _check_kind(config: dict[str, Any], processor: dict[str, Any], name: str) -> None:
    if config.get("model_type") != "wav2vec2":
        raise BadInput(f"{name} is a {config.get('model_type')!r} model, expected wav2vec2")
    kernels = config.get("conv_kernel", _CONFIG_DEFAULTS["conv_kernel"])
    strides = config.get("conv_stride", _CONFIG_DEFAULTS["conv_stride"])
    hop, seen = 1, 1
    for kernel, stride in zip(kernels, strides):
        seen += (kernel - 1) * hop
        hop *= stride
    if (hop, seen) != (clock.STEP_SAMPLES, clock.STEP_RECEPTIVE_SAMPLES) or config.get("add_adapter"):
        raise BadInput(
            f"{name} does not make one vector each 320 samples from 400; other time bases do not fit"
        )
    rate = processor.get("sampling_rate", clock.SPEECH_RATE)
    if rate != clock.SPEECH_RATE:
        raise BadInput(f"{name} wants audio at {rate} Hz, expected {clock.SPEECH_RATE}")


def _read_weights(files: _Folder) -> Tensors:
    for whole in ("model.safetensors", "pytorch_model.bin"):
        path = files.optional(whole)
        if path is not None:
            return read_tensors(path)
        index = files.optional(f"{whole}.index.json")
        if index is not None:
            return _read_shards(files, index)
    raise NotFound(f"{files.origin} has neither model.safetensors nor pytorch_model.bin")


def _read_shards(files: _Folder, index: Path) -> Tensors:
    shards = _read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not all(Path(str(s)).name == s for s in shards.values()):
        raise BadInput(f"{index} has no weight_map of tensor names to file names")
    tensors: Tensors = {}
    for shard in sorted(set(shards.values())):
        tensors |= read_tensors(files.required(shard))
    return tensors


def _prefixed(tensors: Tensors) -> Tensors:
    """Tensors saved from the bare model get the prefix they carry in every other checkpoint."""
    if any(name.startswith("wav2vec2.") for name in tensors):
        return tensors
    return canonical({f"wav2vec2.{name}": tensor for name, tensor in tensors.items()}, "")


def parse_layer(layer: int | None, checkpoint: Checkpoint) -> int | None:
    """Check a layer number against the checkpoint. Raises BadInput with the legal range."""
    count = checkpoint.architecture["num_hidden_layers"]
    if layer is not None and not 1 <= layer <= count:
        raise BadInput(
            f"audio_layer {layer}: {checkpoint.origin} has layers 1 to {count}, or none for the last"
        )
    return layer


# --- the model --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """One forward's worth of a clip: samples [start, end) in, steps [first, last) of the clip kept."""

    clip: int
    start: int
    end: int
    first: int
    last: int

    @property
    def samples(self) -> int:
        return self.end - self.start


def spans(clip: int, samples: int) -> Iterator[Span]:
    """A clip of so many samples as one span, or, above 30 s, as 26 s chunks with 2 s more on either side."""
    count = clock.steps(samples)
    if count <= CHUNK_ABOVE_STEPS:
        yield Span(clip, 0, samples, 0, count)
        return
    for first in range(0, count, CHUNK_KEPT_STEPS):
        last = min(first + CHUNK_KEPT_STEPS, count)
        before, after = max(0, first - CHUNK_OVERLAP_STEPS), min(last + CHUNK_OVERLAP_STEPS, count)
        yield Span(clip, *clock.step_span(before, after), first, last)


class SpeechModel:
    """One frozen wav2vec2 checkpoint in eval mode (no dropout, no SpecAugment).

    ``layer`` n means the output of transformer block n, counted from 1, before any final norm;
    None means the last hidden state, after the final norm where the model has one.
    ``text_topk`` is how many logits of each step are kept, None for all.
    ``max_batch_samples`` is what the memory is known to hold at once; None until it ran out.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layer: int | None,
        wants_hidden: bool,
        wants_logits: bool,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        text_topk: int | None = None,
    ):
        self.layer = parse_layer(layer, checkpoint)
        self.wants_hidden, self.wants_logits = wants_hidden, wants_logits
        self.do_normalize = checkpoint.do_normalize
        self.device, self.dtype = device, dtype
        self.hidden_size: int = checkpoint.architecture["hidden_size"]
        self.vocabulary_size: int = checkpoint.architecture["vocab_size"]
        if wants_logits and text_topk is not None and text_topk >= self.vocabulary_size:
            raise BadInput(
                f"text_topk {text_topk}: {checkpoint.origin} has {self.vocabulary_size} logits, keep fewer"
            )
        self.text_topk = text_topk
        self.max_batch_samples: int | None = None
        self.bytes_per_second = _bytes_per_second(checkpoint.architecture)
        # A group norm spans time: padding would change every step, even under a mask.
        self.can_pad = checkpoint.architecture["feat_extract_norm"] != "group"
        self.model = build(checkpoint, wants_logits).to(device)
        if self.can_pad and device.type == "cpu":  # with a group norm transformers' own is the faster
            self.model.wav2vec2.feature_extractor = Extractor(self.model.wav2vec2.feature_extractor, dtype)
        if dtype != torch.float32:
            _store_matrices(self.model, dtype)
        self._block_output: Tensor | None = None
        if self.layer is not None:
            self._encoder.layers[self.layer - 1].register_forward_hook(self._keep)
            if not wants_logits:
                self._encoder.layers = self._encoder.layers[: self.layer]

    @property
    def _encoder(self) -> Any:
        return self.model.wav2vec2.encoder

    def _keep(self, block: nn.Module, inputs: Any, output: Any) -> None:
        self._block_output = output[0] if isinstance(output, tuple) else output

    def forward(self, waves: Sequence[np.ndarray]) -> list[tuple[np.ndarray | None, np.ndarray | None]]:
        """Hidden states (S, D) and logits (S, V), float32, of each wave (n,), run as one padded batch."""
        hidden, logits = (None if x is None else x.float().cpu().numpy() for x in self._outputs(waves))
        counts = [clock.steps(len(wave)) for wave in waves]
        return [(_row(hidden, i, count), _row(logits, i, count)) for i, count in enumerate(counts)]

    def rows(self, waves: Sequence[np.ndarray]) -> list[tuple[np.ndarray | None, np.ndarray | None]]:
        """The same as they are stored: hidden states (S, D) and logits (S, V), float16.

        What is beyond float16 is infinite. Each of both comes from the device in one copy.
        """
        hidden, logits = self._outputs(waves)
        return self.cut(waves, hidden, logits)

    def cut(
        self, waves: Sequence[np.ndarray], hidden: Tensor | None, logits: Tensor | None
    ) -> list[tuple[np.ndarray | None, np.ndarray | None]]:
        """Each wave's own steps of hidden states (B, S, D) and logits (B, S, V), as they are stored."""
        with torch.inference_mode():
            half = None if logits is None else logits.half()
            kept = half if half is None or self.text_topk is None else topk.largest(half, self.text_topk)
            both = [_fetched(x) for x in (None if hidden is None else hidden.half(), kept)]
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        counts = [clock.steps(len(wave)) for wave in waves]
        return [(_row(both[0], i, count), _row(both[1], i, count)) for i, count in enumerate(counts)]

    def _outputs(self, waves: Sequence[np.ndarray]) -> tuple[Tensor | None, Tensor | None]:
        """Hidden states (B, S, D) and logits (B, S, V) of the longest's S, on the device."""
        return self.run(*self.sent(waves))

    def sent(self, waves: Sequence[np.ndarray]) -> tuple[Tensor, Tensor | None]:
        """Waves on the device, side by side (B, n), and what of it is sound; None where all is."""
        lengths = torch.tensor([len(wave) for wave in waves])
        batch = torch.zeros(len(waves), int(lengths.max()), pin_memory=self.device.type == "cuda")
        for row, wave in zip(batch, waves):
            row[: len(wave)] = torch.from_numpy(wave)
        mask = (torch.arange(batch.shape[1]) < lengths[:, None]).long()
        padded = bool(lengths.min() < lengths.max())
        return batch.to(self.device, non_blocking=True), mask.to(self.device) if padded else None

    @torch.inference_mode()
    def run(self, batch: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The forward of what ``sent`` gives: hidden states (B, S, D) and logits (B, S, V)."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self._run(batch, mask)

    def _run(self, batch: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        last = self.model.wav2vec2(batch, attention_mask=mask).last_hidden_state
        hidden = last if self.layer is None else self._block_output
        self._block_output = None
        logits = self.model.lm_head(last) if self.wants_logits else None
        return hidden if self.wants_hidden else None, logits


class PairedModels:
    """Hidden states of one model and logits of another whose convolutions are the same, which run once.

    Fine-tuning usually leaves the convolutions over the waveform as they were pre-trained. To
    ``features`` this is one SpeechModel.
    """

    def __init__(self, audio: SpeechModel, text: SpeechModel):
        self.audio, self.text = audio, text
        self.can_pad, self.do_normalize, self.device = text.can_pad, text.do_normalize, text.device
        self.max_batch_samples: int | None = None
        self.bytes_per_second = max(audio.bytes_per_second, text.bytes_per_second)
        self._shared = _Shared(text.model.wav2vec2.feature_extractor)
        for one in (audio, text):
            one.model.wav2vec2.feature_extractor = self._shared

    @staticmethod
    def fit(audio: SpeechModel, text: SpeechModel) -> bool:
        """Whether the two can be paired: the same convolutions of the same sound."""
        same = (audio.do_normalize, audio.dtype) == (text.do_normalize, text.dtype)
        one, other = (m.model.wav2vec2.feature_extractor.state_dict() for m in (audio, text))
        return same and one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)

    def rows(self, waves: Sequence[np.ndarray]) -> list[tuple[np.ndarray | None, np.ndarray | None]]:
        """As ``SpeechModel.rows``."""
        batch, mask = self.text.sent(waves)
        try:
            hidden, _ = self.audio.run(batch, mask)
            _, logits = self.text.run(batch, mask)
        finally:
            self._shared.forget()
        return self.text.cut(waves, hidden, logits)


class _Shared(nn.Module):
    """A module that, asked again about the same tensor, gives what it gave."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.forget()

    def forget(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not x:
            self._last = (x, self.inner(x))
        return self._last[1]


def _row(values: np.ndarray | None, row: int, count: int) -> np.ndarray | None:
    return None if values is None else values[row, :count]


def _fetched(values: Tensor | None) -> np.ndarray | None:
    """On its way to the CPU; from a GPU into pinned memory, there once the stream is done."""
    if values is None or values.device.type == "cpu":
        return None if values is None else values.numpy()
    landed = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return landed.copy_(values, non_blocking=True).numpy()


def _store_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Weights of what runs in ``dtype`` under autocast, in ``dtype``: the same bits, cast once.

    The convolution over positions is left: its weight is made of two factors in every forward.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)) and not hasattr(module, "parametrizations"):
            module.to(dtype)


_HELD_AT_ONCE = 4
"""Tensors of the size of a layer's output that a forward holds at its fullest, about."""


def _bytes_per_second(architecture: dict[str, Any]) -> int:
    """Memory that one padded second fills in a forward, about: the widest of its layers, in float32.

    The first convolutions are: they run at thousands of steps a second.
    """
    sizes, rate = [], clock.SPEECH_RATE
    for channels, stride in zip(architecture["conv_dim"], architecture["conv_stride"]):
        rate //= stride
        sizes.append(rate * channels)
    wide = 3 * architecture["hidden_size"] + architecture["intermediate_size"] + architecture["vocab_size"]
    return _HELD_AT_ONCE * 4 * max(*sizes, rate * wide)


def build(checkpoint: Checkpoint, with_logits: bool) -> Any:
    """The transformers model of a checkpoint, frozen, in eval mode, float32, on the CPU.

    It is always a ``Wav2Vec2ForCTC``; without logits its head stays empty. Raises BadInput when
    tensors are missing or misshapen. Tensors for pre-training only are left aside.
    """
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    if with_logits and not checkpoint.has_logits:
        raise BadInput(f"{checkpoint.origin} has no CTC head (lm_head.weight); it cannot be the text model")
    config = Wav2Vec2Config(**checkpoint.architecture)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = Wav2Vec2ForCTC(config)
    expected = {k: v for k, v in model.state_dict().items() if with_logits or not k.startswith("lm_head.")}
    found = fit(expected, checkpoint.tensors, checkpoint.origin, optional=_UNUSED_TENSORS)
    model.load_state_dict({name: tensor.float() for name, tensor in found.items()}, strict=False, assign=True)
    if not with_logits:
        model.lm_head = nn.Identity()
    return model.requires_grad_(False).eval()


_NORMALISED_AT_ONCE = 1 << 20


def normalised(wave: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance over the whole utterance (n,), as wav2vec2's feature extractor does."""
    parts = [slice(start, start + _NORMALISED_AT_ONCE) for start in range(0, len(wave), _NORMALISED_AT_ONCE)]
    mean = sum(wave[part].sum(dtype=np.float64) for part in parts) / len(wave)
    variance = sum(np.square(wave[part] - mean).sum() for part in parts) / len(wave)
    result = np.empty(len(wave), np.float32)
    for part in parts:  # a recording of hours is not held in float64
        result[part] = (wave[part] - mean) / np.sqrt(variance + 1e-7)
    return result


# --- clips to features ------------------------------------------------------------------------------------


Pieces = dict[int, list[tuple[int, np.ndarray | None, np.ndarray | None]]]
"""Of each clip: first step, hidden states and logits of what is there so far."""


def features(
    model: SpeechModel | PairedModels, waves: Sequence[np.ndarray], max_batch_samples: int
) -> list[tuple[np.ndarray | None, np.ndarray | None] | PmmError]:
    """Hidden states (S, D) and logits (S, V) as float16 of each 16 kHz wave (n,) float32.

    Waves run together where the model allows it: padded batches of at most ``max_batch_samples``
    (and at least one span), equal lengths only for group-norm models. Where memory runs out, batches are
    half as large from then on. A wave that cannot be done (too short, not finite, values beyond
    float16, no memory for one span) yields its error in its place.
    """
    problems = [_unusable(wave) for wave in waves]
    good = [i for i, problem in enumerate(problems) if problem is None]
    ready = {i: normalised(waves[i]) if model.do_normalize else waves[i] for i in good}
    pieces: Pieces = {i: [] for i in good}
    left = [span for i in good for span in spans(i, len(ready[i]))]
    while left:
        limit = min(max_batch_samples, model.max_batch_samples or max_batch_samples)
        batch = next(batches(left, model.can_pad, limit))
        if not _heard(model, batch, ready, pieces):
            if len(batch) > 1:
                model.max_batch_samples = len(batch) * batch[0].samples // 2
                continue
            problems[batch[0].clip] = _too_large(model, batch[0])
        done = {(span.clip, span.first) for span in batch}
        left = [s for s in left if (s.clip, s.first) not in done and problems[s.clip] is None]
    return [problem or _joined(pieces[i]) for i, problem in enumerate(problems)]


def _heard(
    model: SpeechModel | PairedModels, batch: list[Span], waves: dict[int, np.ndarray], pieces: Pieces
) -> bool:
    """Whether the memory held a batch; if so, its ``pieces`` are there."""
    try:
        outputs = model.rows([waves[span.clip][span.start : span.end] for span in batch])
    except memory.ERRORS as error:
        if not memory.ran_out(error):
            raise
        held = False
    else:
        held = True
    if not held:  # outside the handler: the error's traceback holds the tensors
        memory.let_go(model.device)
        return False
    for span, (hidden, logits) in zip(batch, outputs):
        skipped = span.first - clock.first_step(span.start)
        kept = slice(skipped, skipped + span.last - span.first)
        pieces[span.clip].append((span.first, _part(hidden, kept), _part(logits, kept)))
    return True


def _too_large(model: SpeechModel | PairedModels, span: Span) -> PmmError:
    seconds = clock.seconds(span.samples, clock.SPEECH_RATE)
    return PmmError(f"not enough memory for {seconds:.1f} s of audio at a time ({model.device})")


def batches(parts: Iterable[Span], can_pad: bool, max_batch_samples: int) -> Iterator[list[Span]]:
    """Spans of like length together, the longest first, within a number of (padded) samples."""
    batch: list[Span] = []
    for span in sorted(parts, key=lambda span: (-span.samples, span.clip, span.first)):
        longest = batch[0].samples if batch else span.samples
        full = (len(batch) + 1) * longest > max_batch_samples
        if batch and (full or (not can_pad and span.samples != longest)):
            yield batch
            batch = []
        batch.append(span)
    if batch:
        yield batch


def _unusable(wave: np.ndarray) -> PmmError | None:
    if clock.steps(len(wave)) == 0:
        return BadInput(f"{len(wave)} samples at 16 kHz, expected at least {clock.STEP_RECEPTIVE_SAMPLES}")
    if not np.isfinite(wave).all():
        return BadInput("the audio holds values that are not numbers")
    return None


def _part(values: np.ndarray | None, kept: slice) -> np.ndarray | None:
    """Steps of a row, by themselves: a view would keep the whole batch."""
    return None if values is None else values[kept].copy()


def _joined(
    pieces: list[tuple[int, np.ndarray | None, np.ndarray | None]],
) -> tuple[np.ndarray | None, np.ndarray | None] | PmmError:
    pieces = sorted(pieces, key=lambda piece: piece[0])
    joined = [_whole([piece[k] for piece in pieces]) for k in (1, 2)]  # type: ignore[misc]
    for name, values in zip(("hidden states", "logits"), joined):
        if values is not None and not np.isfinite(values).all():
            return BadInput(
                f"{name} overflow float16 or are not numbers; this clip cannot be stored as float16"
            )
    return joined[0], joined[1]


def _whole(values: list[np.ndarray | None]) -> np.ndarray | None:
    present = [value for value in values if value is not None]
    return np.concatenate(present) if present else None
