"""Small base models that a process without this package can unpickle; peft_models imports it, this file does not."""

from __future__ import annotations

import torch
from torch import nn


class Nested(nn.Module):
    """Names that are the end of another's (``foo``, ``bar.foo``), or match it as a regular expression (``bar.foo``)."""

    def __init__(self):
        super().__init__()
        self.foo = nn.Linear(12, 16)
        self.bar = nn.ModuleDict({"foo": nn.Linear(16, 16), "baz": nn.Linear(16, 16)})
        self.barxfoo = nn.Linear(16, 16)
        self.qux = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.tanh(self.foo(x))
        x = torch.tanh(self.bar["foo"](x)) + self.bar["baz"](x)
        return self.qux(torch.tanh(self.barxfoo(x)))


class Convolution(nn.Module):
    """One convolution of 1, 2 or 3 dimensions."""

    def __init__(self, dimensions: int, groups: int):
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.conv = kind(8, 12, 3, padding=1, stride=2, groups=groups)

    def forward(self, x):
        return self.conv(x)


class Attention(nn.Module):
    """torch's own attention, which PEFT adapts as one layer with another inside."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.out_proj = nn.Linear(16, 5)

    def forward(self, x):
        return self.out_proj(self.attention(x, x, x)[0])


class Tokens(nn.Module):
    """An embedding and a linear layer, not of transformers."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(20, 12)
        self.first = nn.Linear(12, 9)

    def forward(self, ids):
        return self.first(torch.tanh(self.tokens(ids)))
