"""wav2vec2's convolutions over the waveform, as matrix products.

A step's inputs lie side by side in memory when channels come last, so a convolution of stride s is one
product of rows s steps apart with its first s taps, and one with the rest; and LayerNorm over channels
needs no transposing. The same sums as ``Wav2Vec2FeatureEncoder``'s, in another order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Extractor(nn.Module):
    """Waves (B, n) to (B, D, S), as transformers gives them with layer norms, in ``dtype``."""

    def __init__(self, encoder: Any, dtype: torch.dtype):
        super().__init__()
        self.layers = nn.ModuleList(_Layer(layer, dtype) for layer in encoder.conv_layers)
        self.dtype = dtype

    def forward(self, waves: Tensor) -> Tensor:
        x = waves[:, :, None].to(self.dtype)
        with torch.autocast(waves.device.type, enabled=False):
            for layer in self.layers:
                x = layer(x)
        return x.transpose(1, 2)


class _Layer(nn.Module):
    """Convolution, LayerNorm over channels, GELU: (B, n, C) to (B, m, D)."""

    bias: Tensor

    def __init__(self, layer: Any, dtype: torch.dtype):
        super().__init__()
        weight = layer.conv.weight  # (D, C, taps)
        self.stride: int = layer.conv.stride[0]
        self.taps: int = weight.shape[2]
        self.norm = nn.LayerNorm(len(weight), eps=layer.layer_norm.eps)
        self.norm.load_state_dict(layer.layer_norm.state_dict())
        bias = layer.conv.bias
        self.register_buffer("bias", weight.new_zeros(len(weight)) if bias is None else bias)
        for first in range(0, self.taps, self.stride):
            taps = weight[:, :, first : first + self.stride].permute(2, 1, 0).flatten(0, 1)
            self.register_buffer(f"taps_{first}", taps.contiguous())
        self.activation = layer.activation
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        clips, inputs, channels = x.shape
        steps = (inputs - self.taps) // self.stride + 1
        y = x.new_empty(clips, steps, len(self.bias))
        for clip, out in zip(x, y):  # row by row: the rows of several clips are no one matrix
            for first in range(0, self.taps, self.stride):
                weight = self.get_buffer(f"taps_{first}")
                at = clip.storage_offset() + first * channels
                rows = clip.as_strided((steps, len(weight)), (self.stride * channels, 1), at)
                torch.addmm(out if first else self.bias, rows, weight, out=out)
        return self.activation(self.norm(y))
