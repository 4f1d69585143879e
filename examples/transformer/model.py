"""A decoder-only transformer over bytes: rotary positions, RMSNorm, SwiGLU, no biases."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

BYTES = 256
BASE = 10_000.0  # of the rotary wavelengths


class Transformer(nn.Module):
    """Scores of the next byte.

    Args:
        layers: blocks.
        width: of the residual stream.
        heads: of the attention; `width` is a multiple of twice their number.
        context: longest sequence, in bytes.
    """

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, width)
        self.blocks = nn.ModuleList(Block(width, heads, layers) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        for table in (self.embedding.weight, self.head.weight):
            nn.init.normal_(table, std=0.02)
        self.cos: Tensor
        self.sin: Tensor
        for name, part in zip(("cos", "sin"), rotations(context, width // heads), strict=True):
            self.register_buffer(name, part, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, length] to scores [batch, length, 256]."""
        x = self.embedding(tokens)
        length = tokens.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:length], self.sin[:length])
        scores: Tensor = self.head(self.norm(x))
        return scores


class Block(nn.Module):
    """Attention, then the MLP, each beside the residual stream."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.RMSNorm(width), SwiGLU(width)
        for last in (self.attention.out, self.mlp.down):  # the stream's variance must not grow with depth
            nn.init.normal_(last.weight, std=0.02 / (2 * layers) ** 0.5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        added: Tensor = x + self.mlp(self.norm2(x))
        return added


class Attention(nn.Module):
    """Causal, with as many heads as the projections have: a tensor parallel rank has some of them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.size = width // heads
        self.query, self.key, self.value, self.out = (linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class SwiGLU(nn.Module):
    """Shazeer, "GLU Variants Improve Transformer", 2020; 8/3 as wide as the stream, in whole 32s."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 32 * -(-width // 12)
        self.gate, self.up = linear(width, hidden), linear(width, hidden)
        self.down = linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return out


def linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=0.02)
    return layer


def rotations(context: int, size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [context, size / 2] of the angles by which a pair of channels turns at a position."""
    wavelengths = BASE ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.arange(context)[:, None] / wavelengths
    return angles.cos().float(), angles.sin().float()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[batch, heads, length, size], its first half of channels paired with its second."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
