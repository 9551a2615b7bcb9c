"""Two models in plain torch, for what Hugging Face has no plain form of: a recurrent net, and one with long skips.

Both take labels and return {"loss", "logits"}, as Hugging Face models do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LstmClassifier(nn.Module):
    """Embedding (B, S, width), an LSTM, and a linear layer on its last output (B, hidden). logits: (B, classes)."""

    def __init__(self, vocab: int, width: int, hidden: int, layers: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.lstm = nn.LSTM(width, hidden, layers, batch_first=True, dropout=dropout)
        self.head = nn.Linear(hidden, classes)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """input_ids: (B, S) int64; labels: (B,) int64."""
        hidden, _ = self.lstm(self.embed(input_ids))
        logits = self.head(hidden[:, -1])
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class UNet(nn.Module):
    """Ronneberger et al., arXiv:1505.04597, with padded convolutions and batch norm, so sizes in equal sizes out.

    Level i works at size / 2^i with width * 2^i channels; `size` must divide by 2^depth. logits: (B, classes, H, W).
    """

    def __init__(self, channels: int, classes: int, width: int, depth: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(_twice(*pair) for pair in zip([channels, *widths[:-2]], widths[:-1], strict=True))
        self.bottom = _twice(widths[-2], widths[-1])
        self.rise = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths[:-1]))
        self.up = nn.ModuleList(_twice(2 * w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """pixel_values: (B, C, H, W); labels: (B, H, W) int64."""
        x, skips = pixel_values, []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for rise, block in zip(self.rise, self.up, strict=True):
            x = block(torch.cat((skips.pop(), rise(x)), dim=1))
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def _twice(inside: int, outside: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with batch norm and ReLU; the bias goes, as the norm's takes its place."""
    layers: list[nn.Module] = []
    for channels in (inside, outside):
        layers += [nn.Conv2d(channels, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers)
