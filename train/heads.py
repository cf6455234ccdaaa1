"""What is trained: image encoder, cross-modal alignment, decoder (paper, sections IV-B and IV-C).

Axes: B clips, T video frames, D features of one modality, P features of a style, K coefficients,
H attention heads. Every tensor over time comes with ``valid`` (B, T) bool, False where a clip of a
batch has ended; what stands there changes nothing before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pmm import BadInput
from pmm.store import clock

MODALITIES = ("image", "text", "audio")
"""In the order in which the decoder reads them: I^, C^, A^."""

PAIRS = (("image", "text"), ("image", "audio"), ("text", "audio"))
"""The pairs of equations 5 to 7: (I, C), (I, A), (C, A)."""

LOOKAHEAD_SECONDS = 0.2
QUERY_BLOCK = 1024
MAX_SCALE = 100.0


@dataclass(frozen=True)
class HeadsConfig:
    """The shape of the heads, by plain numbers.

    feature_sizes     size of one row by modality: {"audio": D, "text": V}, and {"image": D} where it comes
                      as latents; lip frames have none
    coefficients      K
    styles            training subjects, one style embedding each
    fps               frames per second; also the period of positions and attention biases
    modalities        a subset of MODALITIES
    width             D of every projected modality
    style_width       P
    attention_heads   H, in the decoder and in the image encoder
    lookahead         frames the first decoder layer sees ahead
    context           odd number of frames a projection reads
    max_context       frames every attention layer sees back
    decoder_input     "aligned": the decoder reads the projections that the alignment trains;
                      "separate": it has its own
    image_rows        [first, end) rows of the 96 x 96 frame that are read
    image_patch       pixels folded into channels before the first convolution
    image_channels    of the convolutions: 1x1 to the first, then 3x3 with stride 2

    Raises BadInput for sizes that cannot work.
    """

    feature_sizes: Mapping[str, int]
    coefficients: int
    styles: int
    fps: int
    modalities: tuple[str, ...] = MODALITIES
    width: int = 64
    style_width: int = 64
    attention_heads: int = 4
    decoder_layers: int = 1
    image_layers: int = 1
    dropout: float = 0.1
    modality_dropout: float = 0.1
    lookahead: int = 6
    context: int = 5
    max_context: int = 600
    decoder_input: str = "aligned"
    image_rows: tuple[int, int] = (48, 96)
    image_size: int = 96
    image_patch: int = 4
    image_channels: tuple[int, ...] = (32, 64, 64)

    def __post_init__(self) -> None:
        if not self.modalities or any(name not in MODALITIES for name in self.modalities):
            found = ", ".join(self.modalities) or "none"
            raise BadInput(f"modalities {found}: at least one of {', '.join(MODALITIES)} must remain")
        if self.context < 1 or self.context % 2 == 0:
            raise BadInput(f"context {self.context}: it must be an odd number of frames, such as 1 or 5")
        if self.lookahead < 0 or self.max_context < 1:
            raise BadInput(
                f"lookahead {self.lookahead}, max_context {self.max_context}: they must be at least 0 and 1"
            )
        if self.decoder_input not in ("aligned", "separate"):
            raise BadInput(f"decoder input {self.decoder_input!r} is neither 'aligned' nor 'separate'")
        if self.decoder_width % self.attention_heads or self.width % self.attention_heads:
            raise BadInput(
                f"widths {self.width} and {self.decoder_width} must divide by {self.attention_heads}, "
                "the number of attention heads"
            )

    @property
    def decoder_width(self) -> int:
        return len(self.modalities) * self.width + self.style_width

    @property
    def reads_latents(self) -> bool:
        """Whether the image comes as latents (T, D), not as lip frames."""
        return "image" in self.feature_sizes

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        return tuple(pair for pair in PAIRS if set(pair) <= set(self.modalities))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "feature_sizes": dict(self.feature_sizes)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> HeadsConfig:
        """Raises TypeError for fields this version does not know or misses."""
        tuples = {f.name for f in fields(cls) if str(f.type).startswith("tuple")}
        keywords: dict[str, Any] = {k: tuple(v) if k in tuples else v for k, v in value.items()}
        return cls(**keywords)


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "paper": {
        "width": 256,
        "decoder_layers": 2,
        "image_layers": 2,
        "modality_dropout": 0.0,
        "lookahead": 0,
        "context": 1,
        "image_rows": (0, 96),
        "image_patch": 2,
        "image_channels": (16, 32, 64, 128, 128),
    },
    "smoke": {"width": 16, "style_width": 16, "image_channels": (8, 16, 16)},
}
"""What each preset changes of HeadsConfig. ``fast`` is its defaults, with the lookahead below; ``smoke``
shows in seconds whether everything works, and is no measure of anything."""


def preset(name: str, fps: int, **changes: Any) -> dict[str, Any]:
    """Keywords of HeadsConfig for a preset at ``fps``; ``changes`` that are None leave the preset's value.

    Raises BadInput for an unknown name.
    """
    if name not in PRESETS:
        raise BadInput(f"preset {name!r} is none of {', '.join(PRESETS)}")
    lookahead = clock.frames_in(LOOKAHEAD_SECONDS, fps)
    given = {key: value for key, value in changes.items() if value is not None}
    return {"fps": fps, "lookahead": lookahead, **PRESETS[name], **given}


@dataclass(frozen=True)
class Reach:
    """How many frames of input before and after frame t can change the output at t."""

    past: int
    future: int


@dataclass(frozen=True)
class Encoded:
    """Projected modalities, each (B, T, D): ``aligned`` for equations 11 and 12, ``read`` by the decoder."""

    aligned: dict[str, Tensor]
    read: dict[str, Tensor]


@dataclass(frozen=True)
class Output:
    """``prediction`` (B, T, K), the ``aligned`` modalities (B, T, D) and the similarity ``scale`` ()."""

    prediction: Tensor
    aligned: dict[str, Tensor]
    scale: Tensor


def slopes(heads: int) -> list[float]:
    """ALiBi's slopes: ``2^(-8h/H)``, h = 1..H; interleaved from the powers of two around H otherwise."""
    if heads & (heads - 1) == 0:
        return [2.0 ** (-8 * h / heads) for h in range(1, heads + 1)]
    below = 1 << (heads.bit_length() - 1)
    return slopes(below) + slopes(2 * below)[::2][: heads - below]


def band_bias(query: Tensor, key: Tensor, slope: Tensor, past: int, future: int, period: int) -> Tensor:
    """(H, Q, J): ``-slope_h * floor(|i - j| / period)`` where ``i - past <= j <= i + future``, else -inf.

    ``query`` (Q,) and ``key`` (J,) are frame numbers i and j, ``slope`` (H,).
    """
    lag = query[:, None] - key[None, :]
    bias = -slope[:, None, None] * (lag.abs() // period)
    return bias.masked_fill((lag > past) | (lag < -future), -math.inf)


class Attention(nn.Module):
    """Self-attention within a band of frames, in blocks of queries: memory grows with T, not T x T."""

    slope: Tensor

    def __init__(self, width: int, heads: int, past: int, future: int, period: int):
        super().__init__()
        self.heads, self.past, self.future, self.period = heads, past, future, period
        self.input = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.register_buffer("slope", torch.tensor(slopes(heads)), persistent=False)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        q, k, v = self.input(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        frames = x.shape[1]
        blocks = [
            self._block(q, k, v, valid, start, min(start + QUERY_BLOCK, frames))
            for start in range(0, frames, QUERY_BLOCK)
        ]
        return self.output(torch.cat(blocks, dim=2).transpose(1, 2).flatten(2))

    def _block(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, start: int, stop: int) -> Tensor:
        first, last = max(0, start - self.past), min(q.shape[2], stop + self.future)
        query = torch.arange(start, stop, device=q.device)
        key = torch.arange(first, last, device=q.device)
        bias = band_bias(query, key, self.slope, self.past, self.future, self.period)
        # A frame past its clip's end may see itself: a row without any key would be NaN.
        hidden = ~valid[:, None, None, first:last] & (query[:, None] != key[None, :])
        bias = bias.masked_fill(hidden, -math.inf)
        return F.scaled_dot_product_attention(
            q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last], attn_mask=bias
        )


class Layer(nn.Module):
    """One transformer layer: normalisation first, self-attention, feed-forward of twice the width."""

    def __init__(
        self, width: int, heads: int, *, past: int, future: int = 0, period: int, dropout: float = 0.0
    ):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, past, future, period)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), valid))
        return x + self.dropout(self.feed_forward(x))


class ImageEncoder(nn.Module):
    """``I = psi_IE(V)``: one convolutional network for every frame, then causal transformer layers.

    Frames are read as ``(pixel - mean face) / scale``, both measured on the training frames:
    untrained lips move by a few grey levels only.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        width: int,
        *,
        rows: tuple[int, int],
        size: int,
        patch: int,
        channels: Sequence[int],
        layers: int,
        heads: int,
        max_context: int,
        period: int,
        dropout: float,
    ):
        super().__init__()
        self.patch = patch
        height = rows[1] - rows[0]
        self.register_buffer("mean", torch.full((height, size, 3), 127.5))
        self.register_buffer("scale", torch.tensor(127.5))
        pairs = pairwise(channels)
        self.convolutions = nn.Sequential(
            nn.Conv2d(3 * patch**2, channels[0], 1),
            nn.ReLU(inplace=True),
            *(part for pair in pairs for part in (nn.Conv2d(*pair, 3, 2, 1), nn.ReLU(inplace=True))),
        ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        shrink = patch * 2 ** (len(channels) - 1)
        self.flat = nn.Linear(channels[-1] * -(-height // shrink) * -(-size // shrink), width)
        self.layers = nn.ModuleList(
            Layer(width, heads, past=max_context, period=period, dropout=dropout) for _ in range(layers)
        )

    def forward(self, frames: Tensor, valid: Tensor) -> Tensor:
        """(B, T, height, 96, 3) uint8 RGB, the rows of ``rows`` only -> (B, T, D)."""
        x = self._every(frames[valid])
        x = x.new_zeros(*valid.shape, x.shape[-1]).masked_scatter(valid[..., None], x)
        for layer in self.layers:
            x = layer(x, valid)
        return x

    def _every(self, frames: Tensor) -> Tensor:
        """(N, height, 96, 3) uint8 -> (N, D), in slices when no gradient needs the activations."""
        step = len(frames) if torch.is_grad_enabled() else 512
        parts = [self._some(frames[start : start + step]) for start in range(0, len(frames), max(1, step))]
        return torch.cat(parts)

    def _some(self, frames: Tensor) -> Tensor:
        # Folding on uint8 with the channels last is a cheap copy, and the result is already
        # in the layout that the convolutions want.
        x = self._fold(frames).to(self.mean.dtype).sub_(self._fold(self.mean[None])).div_(self.scale)
        x = self.convolutions(x.permute(0, 3, 1, 2))
        return self.flat(x.permute(0, 2, 3, 1).flatten(1))

    def _fold(self, frames: Tensor) -> Tensor:
        """(N, y, x, 3) -> (N, y / patch, x / patch, patch * patch * 3)."""
        n, height, width, colours = frames.shape
        p = self.patch
        cells = frames.reshape(n, height // p, p, width // p, p, colours)
        return cells.permute(0, 1, 3, 2, 4, 5).reshape(n, height // p, width // p, p * p * colours)


class LatentEncoder(nn.Module):
    """``I = psi_IE(V)`` of what lip frames are painted from: a Linear, then causal transformer layers.

    Latents are read as ``(latent - mean) / scale``, both measured on the training frames.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        size: int,
        width: int,
        *,
        layers: int,
        heads: int,
        max_context: int,
        period: int,
        dropout: float,
    ):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.tensor(1.0))
        self.flat = nn.Linear(size, width)
        self.layers = nn.ModuleList(
            Layer(width, heads, past=max_context, period=period, dropout=dropout) for _ in range(layers)
        )

    def forward(self, latents: Tensor, valid: Tensor) -> Tensor:
        """(B, T, size) -> (B, T, D)."""
        x = self.flat((latents - self.mean) / self.scale).masked_fill(~valid[..., None], 0)
        for layer in self.layers:
            x = layer(x, valid)
        return x


class Projection(nn.Module):
    """``X^``: a convolution over ``context`` frames (1 is the paper's Linear), then LayerNorm."""

    def __init__(self, size: int, width: int, context: int):
        super().__init__()
        self.convolution = nn.Conv1d(size, width, context, padding=context // 2)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, T, size) -> (B, T, D); beyond a clip's ends stand zeros."""
        x = x.masked_fill(~valid[..., None], 0)
        return self.norm(self.convolution(x.transpose(1, 2)).transpose(1, 2))


class Alignment(nn.Module):
    """One projection per modality, shared by its pairs (equations 5 to 7), and one learnable scale.

    The losses take ``D = exp(log_scale) * cos(X^, Y^)``; initial 1 / 0.07 and at most 100, as CLIP's.
    """

    def __init__(self, sizes: Mapping[str, int], width: int, context: int):
        super().__init__()
        self.projections = nn.ModuleDict(
            {name: Projection(size, width, context) for name, size in sizes.items()}
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, features: Mapping[str, Tensor], valid: Tensor) -> dict[str, Tensor]:
        """(B, T, size) by modality -> (B, T, D) by modality."""
        return {name: project(features[name], valid) for name, project in self.projections.items()}

    @torch.no_grad()
    def limit_scale(self) -> None:
        """Hold the scale at MAX_SCALE; called after every optimiser step."""
        self.log_scale.clamp_(max=math.log(MAX_SCALE))


def periodic_positions(frames: int, period: int, width: int, device: torch.device) -> Tensor:
    """Sines and cosines of ``t mod period``: (T, width). Chunks start at a multiple of the period."""
    position = (torch.arange(frames, device=device) % period)[:, None].float()
    rate = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
    return torch.stack([torch.sin(position * rate), torch.cos(position * rate)], dim=-1).flatten(1)[:, :width]


class Decoder(nn.Module):
    """``concat(I^, C^, A^, p)`` to coefficients, all frames at once (section IV-C).

    The lookahead is spent once, in the first layer; every later layer is causal.
    """

    def __init__(
        self,
        width: int,
        coefficients: int,
        *,
        layers: int,
        heads: int,
        lookahead: int,
        max_context: int,
        period: int,
        dropout: float,
    ):
        super().__init__()
        self.period = period
        self.layers = nn.ModuleList(
            Layer(
                width,
                heads,
                past=max_context,
                future=lookahead if index == 0 else 0,
                period=period,
                dropout=dropout,
            )
            for index in range(layers)
        )
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, coefficients)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, features: Sequence[Tensor], style: Tensor, valid: Tensor) -> Tensor:
        """``features`` (B, T, D) each, ``style`` (B, P) -> (B, T, K)."""
        frames = valid.shape[1]
        x = torch.cat([*features, style[:, None].expand(-1, frames, -1)], dim=-1)
        x = self.dropout(x + periodic_positions(frames, self.period, x.shape[-1], x.device))
        for layer in self.layers:
            x = layer(x, valid)
        return self.output(self.norm(x))


class Heads(nn.Module):
    """Everything that is trained, from frame-rate features to coefficients."""

    def __init__(self, config: HeadsConfig):
        super().__init__()
        self.config = config
        sizes = {
            name: config.width if name == "image" else config.feature_sizes[name]
            for name in config.modalities
        }
        self.image = _image_encoder(config) if "image" in sizes else None
        self.alignment = Alignment(sizes, config.width, config.context)
        self.separate = (
            Alignment(sizes, config.width, config.context).projections
            if config.decoder_input == "separate"
            else None
        )
        self.styles = nn.Embedding(config.styles, config.style_width)
        nn.init.normal_(self.styles.weight, std=0.1)
        self.decoder = Decoder(
            config.decoder_width,
            config.coefficients,
            layers=config.decoder_layers,
            heads=config.attention_heads,
            lookahead=config.lookahead,
            max_context=config.max_context,
            period=config.fps,
            dropout=config.dropout,
        )

    @property
    def reach(self) -> Reach:
        """Attention layers in a chain each add ``max_context``; the lookahead and the context count once."""
        config = self.config
        chained = config.decoder_layers + (config.image_layers if self.image is not None else 0)
        side = (config.context - 1) // 2
        return Reach(chained * config.max_context + side, config.lookahead + side)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The parameters by plain names: what ``--freeze`` names, and the scale of the similarities."""
        own: dict[str, list[nn.Module]] = {
            "image": [] if self.image is None else [self.image],
            "projections": [self.alignment.projections, *([] if self.separate is None else [self.separate])],
            "styles": [self.styles],
            "decoder": [self.decoder.layers, self.decoder.norm],
            "output": [self.decoder.output],
        }
        found = {
            name: [p for module in modules for p in module.parameters()] for name, modules in own.items()
        }
        return {**found, "scale": [self.alignment.log_scale]}

    def freeze(self, names: Sequence[str]) -> None:
        """These parts keep their weights."""
        for name in names:
            for parameter in self.parts()[name]:
                parameter.requires_grad_(False)

    @torch.no_grad()
    def start_from(self, target_mean: Tensor, image_mean: Tensor | None, image_scale: float) -> None:
        """Begin at the training mean: output bias (K,), mean face (height, 96, 3), grey levels of motion.

        Of latents their mean (D,) and deviation.
        """
        self.decoder.output.bias.copy_(target_mean)
        if self.image is not None and image_mean is not None:
            self.image.mean.copy_(image_mean)
            self.image.scale.fill_(image_scale)

    def encode(self, features: Mapping[str, Tensor], valid: Tensor) -> Encoded:
        """Everything that does not depend on the style.

        ``features``: audio (B, T, D), text (B, T, V), both normalised, image (B, T, height, 96, 3) uint8
        or latents (B, T, D).
        """
        features = {name: features[name] for name in self.config.modalities}
        if self.image is not None:
            features["image"] = self.image(features["image"], valid)
        aligned = self.alignment(features, valid)
        if self.separate is None:
            return Encoded(aligned, aligned)
        own = {name: project(features[name], valid) for name, project in self.separate.items()}
        return Encoded(aligned, own)

    def decode(self, encoded: Encoded, style: Tensor, valid: Tensor) -> Tensor:
        """Projected modalities and ``style`` (B, P) -> (B, T, K)."""
        read = [self._drop(encoded.read[name]) for name in self.config.modalities]
        return self.decoder(read, style, valid)

    def _drop(self, x: Tensor) -> Tensor:
        """Modality dropout: in training, a clip now and then goes without one of its modalities."""
        if not self.training or not self.config.modality_dropout:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) >= self.config.modality_dropout
        return x * kept

    def forward(self, features: Mapping[str, Tensor], style: Tensor, valid: Tensor) -> Output:
        """``style`` (B,) numbers of training subjects. See ``encode`` for the shapes of ``features``."""
        encoded = self.encode(features, valid)
        prediction = self.decode(encoded, self.styles(style), valid)
        return Output(prediction, encoded.aligned, self.alignment.log_scale.exp())


def _image_encoder(config: HeadsConfig) -> ImageEncoder | LatentEncoder:
    time: dict[str, Any] = {
        "layers": config.image_layers,
        "heads": config.attention_heads,
        "max_context": config.max_context,
        "period": config.fps,
        "dropout": config.dropout,
    }
    if config.reads_latents:
        return LatentEncoder(config.feature_sizes["image"], config.width, **time)
    return ImageEncoder(
        config.width,
        rows=config.image_rows,
        size=config.image_size,
        patch=config.image_patch,
        channels=config.image_channels,
        **time,
    )


def valid_frames(lengths: Tensor, frames: int | None = None) -> Tensor:
    """(B,) lengths in frames -> (B, T) bool, T the longest unless given."""
    longest = int(lengths.max()) if frames is None else frames
    return torch.arange(longest, device=lengths.device) < lengths[:, None]
