"""Wav2Lip: speech and one still face to lip frames.

Our own writing of the network of "A Lip Sync Expert Is All You Need" (Prajwal et al. 2020) under
its published tensor names, so that the published checkpoints load key for key. The width is a
parameter: the published network has 16 channels in its first block; every other count is a
multiple of that.

Shapes: N frames, C channels; the network works on (N, C, y, x) and BGR in 0..1, this module's
callers on uint8 RGB.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pmm import BadInput, PmmError
from pmm.precompute import mel as mels
from pmm.precompute import memory
from pmm.precompute.weights import Tensors, fit, refuse_unexpected
from pmm.store import clock

ALGORITHM = "wav2lip-frames/1"
LATENT_ALGORITHM = "wav2lip-latent/1"
FACE_SIZE = 96
WINDOW_COLUMNS = 16
PUBLISHED_BASE = 16
_FIRST_WEIGHT = "face_encoder_blocks.0.0.conv_block.0.weight"


class Conv(nn.Module):
    """(Transposed) convolution, BatchNorm, the input again if ``residual``, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int | tuple[int, int] = 1,
        padding: int = 0,
        residual: bool = False,
        transposed: bool = False,
    ):
        super().__init__()
        layer: nn.Module
        if transposed:
            grown = 0 if stride == 1 else 1
            layer = nn.ConvTranspose2d(inputs, outputs, kernel, stride, padding, output_padding=grown)
        else:
            layer = nn.Conv2d(inputs, outputs, kernel, stride, padding)
        self.conv_block = nn.Sequential(layer, nn.BatchNorm2d(outputs))
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_block(x)
        return torch.relu_(y.add_(x) if self.residual else y)


def _down(
    inputs: int, outputs: int, residuals: int, kernel: int = 3, stride: int | tuple[int, int] = 2
) -> list[Conv]:
    first = Conv(inputs, outputs, kernel, stride, kernel // 2)
    return [first, *(Conv(outputs, outputs, 3, 1, 1, residual=True) for _ in range(residuals))]


def _up(inputs: int, outputs: int, residuals: int, stride: int = 2) -> nn.Sequential:
    first = Conv(inputs, outputs, 3, stride, 0 if stride == 1 else 1, transposed=True)
    return nn.Sequential(first, *(Conv(outputs, outputs, 3, 1, 1, residual=True) for _ in range(residuals)))


class Wav2Lip(nn.Module):
    """The published network at ``base`` channels in its first block (16 published, 2 in ``tiny``)."""

    def __init__(self, base: int = PUBLISHED_BASE):
        super().__init__()
        b = base
        self.face_encoder_blocks = nn.ModuleList(
            nn.Sequential(*block)
            for block in (
                _down(6, b, 0, kernel=7, stride=1),  # 96
                _down(b, 2 * b, 2),  # 48
                _down(2 * b, 4 * b, 3),  # 24
                _down(4 * b, 8 * b, 2),  # 12
                _down(8 * b, 16 * b, 2),  # 6
                _down(16 * b, 32 * b, 1),  # 3
                [Conv(32 * b, 32 * b, 3), Conv(32 * b, 32 * b, 1)],  # 1
            )
        )
        self.audio_encoder = nn.Sequential(
            *_down(1, 2 * b, 2, stride=1),  # 80 mels, 16 columns
            *_down(2 * b, 4 * b, 2, stride=(3, 1)),  # 27, 16
            *_down(4 * b, 8 * b, 2, stride=3),  # 9, 6
            *_down(8 * b, 16 * b, 1, stride=(3, 2)),  # 3, 3
            Conv(16 * b, 32 * b, 3),  # 1
            Conv(32 * b, 32 * b, 1),
        )
        self.face_decoder_blocks = nn.ModuleList(
            (
                nn.Sequential(Conv(32 * b, 32 * b, 1)),  # 1
                _up(64 * b, 32 * b, 1, stride=1),  # 3
                _up(64 * b, 32 * b, 2),  # 6
                _up(48 * b, 24 * b, 2),  # 12
                _up(32 * b, 16 * b, 2),  # 24
                _up(20 * b, 8 * b, 2),  # 48
                _up(10 * b, 4 * b, 2),  # 96
            )
        )
        self.output_block = nn.Sequential(Conv(5 * b, 2 * b, 3, 1, 1), nn.Conv2d(2 * b, 3, 1), nn.Sigmoid())

    def encode_face(self, face: Tensor) -> list[Tensor]:
        """What the decoder reads of a face (1, 6, 96, 96), coarsest first: (1, C, y, x) each."""
        features = []
        for block in self.face_encoder_blocks:
            face = block(face)
            features.append(face)
        return features[::-1]

    def decode(self, windows: Tensor, face_features: list[Tensor]) -> Tensor:
        """Mel windows (N, 1, 80, 16) and ``encode_face``'s output to BGR in 0..1: (N, 3, 96, 96)."""
        x = self.audio_encoder(windows)
        for block, feature in zip(self.face_decoder_blocks, face_features):
            x = torch.cat([block(x), feature.expand(len(x), -1, -1, -1)], dim=1)
        image: Tensor = self.output_block(x)
        return image

    def forward(self, windows: Tensor, face: Tensor) -> Tensor:
        return self.decode(windows, self.encode_face(face))


def face_input(face: np.ndarray) -> Tensor:
    """An RGB face (96, 96, 3) uint8 as the network takes it: (1, 6, 96, 96), BGR, lower half hidden first."""
    bgr = np.ascontiguousarray(face[:, :, ::-1]).astype(np.float32) / 255
    hidden = bgr.copy()
    hidden[FACE_SIZE // 2 :] = 0
    return torch.from_numpy(np.concatenate([hidden, bgr], axis=2)).permute(2, 0, 1)[None]


def mel_windows(wave: np.ndarray, frame_count: int, fps: int) -> np.ndarray:
    """Each video frame's 16 mel columns of a 16 kHz ``wave`` (n,): (T, 80, 16) float32.

    Exactly ``frame_count`` of them (see ``clock.mel_window_starts``); a wave shorter than 16 columns
    is followed by silence.
    """
    views, starts = _every_window(wave, frame_count, fps)
    return np.ascontiguousarray(views[starts])


def _every_window(wave: np.ndarray, frame_count: int, fps: int) -> tuple[np.ndarray, np.ndarray]:
    """A view of the windows from every column (columns, 80, 16), and where each frame's one starts (T,)."""
    short = clock.mel_samples(WINDOW_COLUMNS) - len(wave)
    if short > 0:
        wave = np.pad(wave, (0, short))
    columns = mels.mel_spectrogram(wave)
    starts = clock.mel_window_starts(frame_count, columns.shape[1], fps, WINDOW_COLUMNS)
    views = np.lib.stride_tricks.sliding_window_view(columns, WINDOW_COLUMNS, axis=1)
    return views.transpose(1, 0, 2), starts


def network_for(tensors: Tensors, where: str) -> Wav2Lip:
    """The network these tensors are the weights of, its width read from their shapes, in eval mode.

    Raises BadInput that names tensors missing, misshapen or left over.
    """
    first = tensors.get(_FIRST_WEIGHT)
    if first is None or first.ndim != 4:
        raise BadInput(f"{where} lacks {_FIRST_WEIGHT}; it is no Wav2Lip generator")
    with torch.device("meta"):
        network = Wav2Lip(base=first.shape[0])
    expected = network.state_dict()
    refuse_unexpected(expected, tensors, where)
    weights = fit(expected, tensors, where)
    network.load_state_dict({k: _float32(v) for k, v in weights.items()}, assign=True)
    return network.requires_grad_(False).eval()


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def folded(network: Wav2Lip) -> Wav2Lip:
    """The same function with each BatchNorm multiplied into its convolution (exact but for rounding)."""
    network = copy.deepcopy(network)
    for block in network.modules():
        if isinstance(block, Conv):
            layer: Any = block.conv_block[0]
            norm: Any = block.conv_block[1]
            transposed = isinstance(layer, nn.ConvTranspose2d)
            block.conv_block = nn.Sequential(fuse_conv_bn_eval(layer, norm, transpose=transposed))
    return network


class _Step(nn.Module):
    """A folded Conv as it moves deviations from rest: inputs x0 + d, f in, outputs less their own rest out.

    Let y0 be what the convolution (and the residual) gives at rest. As it is linear, and as
    ``relu(y0 + e) - relu(y0) == max(e + min(y0, 0), -relu(y0))`` for any e,

        d' = max(conv_x(d) [+ d] + low, floor),    low = min(y0, 0),    floor = -relu(y0)

    where y0, the still features f and the bias enter through two constants. Exact but for rounding.
    """

    low: Tensor
    floor: Tensor

    def __init__(self, block: Conv, moving: int, at_rest: Tensor):
        super().__init__()
        layer: Any = block.conv_block[0]
        inputs_axis = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
        self.conv = _without_bias(layer, layer.weight.narrow(inputs_axis, 0, moving).contiguous())
        self.residual = block.residual
        y0 = layer(at_rest) + (at_rest if block.residual else 0)
        self.register_buffer("low", y0.clamp(max=0))
        self.register_buffer("floor", -y0.clamp(min=0))

    def forward(self, d: Tensor) -> Tensor:
        y: Tensor = self.conv(d)
        if self.residual:
            y = y.add_(d)
        return torch.maximum(y.add_(self.low), self.floor, out=y)


def _without_bias(layer: Any, weight: Tensor) -> Any:
    """A layer of the same stride and padding, with another weight and no bias."""
    other = copy.copy(layer)
    other._parameters = {"weight": nn.Parameter(weight, requires_grad=False), "bias": None}
    return other


class FacePainter(nn.Module):
    """The decoder for one still face: audio embeddings (N, D, 1, 1) to BGR in 0..1, (N, 3, 96, 96) float32.

    network  folded
    face     as ``face_input`` gives it
    rest     (1, D, 1, 1) an embedding, such as that of silence: what is computed is how a frame deviates
             from the frame painted from it. Numbers of low precision err in proportion to
             their size, and deviations are small; the frame at rest is computed in float32.
    dtype    of the convolutions

    The last layer and the sigmoid run in float32 always: near 1, neighbouring bfloat16 numbers are a
    grey level apart.
    """

    rest: Tensor
    colours_at_rest: Tensor

    def __init__(self, network: Wav2Lip, face: Tensor, rest: Tensor, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        output: Any = network.output_block
        decoder: Any = network.face_decoder_blocks
        x0, steps = rest, []
        for read, block in zip([None, *network.encode_face(face)], [*decoder, output[:1]]):
            for number, conv in enumerate(block):
                at_rest = torch.cat([x0, read], dim=1) if read is not None and number == 0 else x0
                steps.append(_Step(conv, x0.shape[1], at_rest))
                x0 = -steps[-1].floor
        self.steps = nn.Sequential(*steps).to(dtype)
        self.colours = _without_bias(output[1], output[1].weight)
        self.register_buffer("rest", rest)
        self.register_buffer("colours_at_rest", output[1](x0))

    def forward(self, embeddings: Tensor) -> Tensor:
        deviation = (embeddings - self.rest).to(self.dtype)
        moved = self.colours(self.steps(deviation).float())
        return torch.sigmoid_(moved.add_(self.colours_at_rest))


_Rows = Callable[[slice], np.ndarray]
_Network = Callable[[Tensor], tuple[Tensor, Tensor]]


class LipGenerator:
    """Lip frames of one face, from sound or from latents.

    A *latent* is the network's audio embedding, ``latent_size`` = 32 x ``base`` numbers: given the face,
    all that a frame depends on. It is computed in float32; ``dtype`` is what the painter computes in.

    Everything runs in micro-batches of one fixed size, the last one filled up, so that the bits of a
    frame do not depend on what else was asked for; where memory runs out, that size is halved for good.
    What depends on the face alone is computed once. Several threads may ask at once.

    On a CPU the micro-batches run side by side, one thread each: threads inside the network's many
    small layers would mostly wait for one another (on a busy machine, three times slower).
    """

    def __init__(
        self,
        network: Wav2Lip,
        face: np.ndarray,
        fps: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        self.fps, self.device = fps, device
        on_cpu = device.type == "cpu"
        self.micro_batch = 16 if on_cpu else 64
        self._workers = ThreadPoolExecutor(
            torch.get_num_threads() if on_cpu else 1, "lips", initializer=torch.set_num_threads, initargs=(1,)
        )
        network = folded(network)
        with torch.no_grad():
            silence = torch.from_numpy(mel_windows(np.zeros(1, np.float32), 1, fps))[:, None]
            painter = FacePainter(network, face_input(face), network.audio_encoder(silence), dtype)
        layout: Any = {"device": device, "memory_format": torch.channels_last}
        self.encoder, self.painter = network.audio_encoder.to(**layout), painter.to(**layout)
        self.latent_size = painter.rest.shape[1]

    def frames(self, wave: np.ndarray, frame_count: int) -> np.ndarray:
        """Lip frames of a 16 kHz ``wave`` (n,): (T, 96, 96, 3) uint8 RGB, ``round(255 x)`` half to even.

        Raises BadInput where the network gives no numbers, PmmError where memory does not hold one frame.
        """
        windows, starts = _every_window(wave, frame_count, self.fps)
        return self._whole(frame_count, lambda part: windows[starts[part]], self._decode)

    def latents(self, wave: np.ndarray, frame_count: int) -> np.ndarray:
        """The latents of those frames: (T, D) float32. Raises as ``frames`` does."""
        windows, starts = _every_window(wave, frame_count, self.fps)
        return self._whole(frame_count, lambda part: windows[starts[part]], self._encode)

    def paint(self, latents: np.ndarray) -> np.ndarray:
        """The frames of latents (T, D), float32 or float16: (T, 96, 96, 3) uint8 RGB.

        From float32 these are the very frames that ``frames`` gives. Raises as ``frames`` does.
        """
        if latents.ndim != 2 or latents.shape[1] != self.latent_size:
            raise BadInput(
                f"latents of shape {latents.shape}; this lip generator paints (T, {self.latent_size})"
            )
        return self._whole(len(latents), lambda part: latents[part].astype(np.float32), self._paint)

    def _encode(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 80, 16) to latents (N, D), and whether they are numbers."""
        latents: Tensor = self.encoder(windows[:, None]).flatten(1)
        return latents, latents.isfinite().all()

    def _paint(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) to frames (N, 96, 96, 3) uint8 RGB, and whether they were numbers."""
        image: Tensor = self.painter(latents[:, :, None, None])
        pixels = (image * 255).round_().to(torch.uint8).flip(1).permute(0, 2, 3, 1)
        return pixels, image.isfinite().all()

    def _decode(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        return self._paint(self._encode(windows)[0])

    def _whole(self, count: int, rows: _Rows, step: _Network) -> np.ndarray:
        """``step`` of ``count`` rows in micro-batches, smaller ones where memory runs out."""
        while True:
            size = self.micro_batch
            try:
                return self._side_by_side(count, size, rows, step)
            except memory.ERRORS as error:
                if not memory.ran_out(error):
                    raise
            if size == 1:
                raise PmmError(f"not enough memory for one lip frame at a time ({self.device})")
            self.micro_batch = min(self.micro_batch, size // 2)
            memory.let_go(self.device)

    def _side_by_side(self, count: int, size: int, rows: _Rows, step: _Network) -> np.ndarray:
        def run(first: int) -> tuple[Tensor, Tensor]:
            batch = rows(slice(first, min(first + size, count)))
            filled = np.zeros((size, *batch.shape[1:]), np.float32)
            filled[: len(batch)] = batch
            sent = torch.from_numpy(filled)
            with torch.inference_mode():
                sent = sent.pin_memory() if self.device.type == "cuda" else sent
                return step(sent.to(self.device, non_blocking=True))

        # Nothing waits for a GPU before all is under way.
        values, numbers = zip(*self._workers.map(run, range(0, count, size)))
        if not torch.stack(numbers).all():
            raise BadInput("the lip generator gives values that are not numbers")
        with torch.inference_mode():
            return torch.cat(values)[:count].cpu().numpy()
