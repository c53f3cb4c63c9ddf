"""Bits per byte of whole files, and text from the model."""

from __future__ import annotations

import math

import numpy as np
import torch
from model import BlockMask, TinyModel
from torch import Tensor


def windows_of(starts: np.ndarray, context: int) -> list[tuple[int, int, int]]:
    """(first token, first target that counts, end) of each window: every byte of every file counts once, and all but a
    file's first ones see at least half a context. A file begins with its separator, which is given, not counted."""
    windows = []
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        counted = start + 1
        first = start
        while counted < end:
            last = min(first + context + 1, end)
            windows.append((first, counted, last))
            first, counted = first + context // 2, last
    return windows


@torch.no_grad()
def bits_of_each(
    model: TinyModel, stream: Tensor, starts: np.ndarray, window: BlockMask | Tensor, batch: int, context: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """What each byte of `stream` (uint8) costs, float32 of its shape; NaN for separators. Windows of `context` every
    `context // 2`."""
    model.eval()
    spans = windows_of(starts, context)
    bits = torch.full((len(stream),), math.nan, device=stream.device)
    positions = torch.arange(context + 1, device=stream.device)
    for i in range(0, len(spans), batch):
        part = spans[i : i + batch]
        part = part + [(0, 1, 1)] * (batch - len(part))  # one shape for all: nothing is compiled twice
        first, counted, end = torch.tensor(part, device=stream.device).T[:, :, None]
        index = first + positions
        tokens = stream[index.clamp(max=len(stream) - 1)].long()
        with torch.autocast(stream.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            nats = model.nats(tokens[:, :-1], tokens[:, 1:], window, dtype)
        target = index[:, 1:]
        counts = (target >= counted) & (target < end)
        bits[target[counts]] = nats[counts].float() / math.log(2)
    model.train()
    return bits


@torch.no_grad()
def sample(model: TinyModel, prompt: bytes, length: int, seed: int, temperature: float = 0.8) -> str:
    """`prompt` and `length` bytes after it; slow (nothing is cached) and simple."""
    model.eval()
    device = model.norm.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    text = torch.tensor([list(prompt)], device=device)
    for _ in range(length):
        logits = model.logits(text)[:, -1].float() / temperature
        text = torch.cat((text, torch.multinomial(logits.softmax(-1), 1, generator=generator)), dim=1)
    model.train()
    return bytes(text[0].tolist()).decode(errors="replace")
