"""Which combinations of an attention variant, a page size and a batch are run: each pair of values occurs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fa_research.masks import Causal, Chunked, Full, Mask, SlidingWindow
from fa_research.spec import AttentionSpec
from tests.helpers import Scene, make_spec


@dataclass(frozen=True)
class Case:
    """One combination. `batch` names the lengths, `heads` are (query, KV)."""

    mask: Mask
    page_size: int
    batch: str
    softcap: float
    has_sink: bool
    head_dim: int
    heads: tuple[int, int]
    dtype: torch.dtype

    def __str__(self) -> str:
        size = getattr(self.mask, "size", "")
        extras = ("-softcap" if self.softcap else "") + ("-sink" if self.has_sink else "")
        shape = f"d{self.head_dim}-h{self.heads[0]}:{self.heads[1]}-{str(self.dtype).removeprefix('torch.')}"
        return f"{self.mask.name}{size}{extras}-page{self.page_size}-{self.batch}-{shape}"

    @property
    def spec(self) -> AttentionSpec:
        return make_spec(self.heads, self.head_dim, self.mask, self.softcap, self.has_sink)

    def scene(self, device: str) -> Scene:
        lens = LENS[device][self.batch]
        decode = self.batch == "decode"
        return Scene(self.spec, lens, self.page_size, self.dtype, device, decode=decode)


# (prefix, new) tokens. Lengths stand on, before and after the borders of pages, windows, chunks and kernel tiles.
LENS: dict[str, dict[str, tuple[tuple[int, int], ...]]] = {
    "cpu": {
        "extend": ((0, 2), (0, 17), (0, 32)),
        "prefix": ((16, 5), (31, 9), (3, 30)),
        "mixed": ((0, 6), (20, 1), (15, 18), (0, 1)),
        "decode": ((0, 1), (15, 1), (16, 1), (32, 1), (49, 1)),
    },
    "cuda": {
        "extend": ((0, 2), (0, 130), (0, 1025), (0, 256)),
        "prefix": ((128, 64), (1000, 200), (255, 33), (3, 700)),
        "mixed": ((0, 300), (511, 1), (2000, 1), (640, 129), (0, 1)),
        "decode": ((0, 1), (15, 1), (127, 1), (128, 1), (1000, 1), (4096, 1), (9001, 1)),
    },
}

_COMMON: dict[str, Sequence[Any]] = {
    "softcap": (0.0, 4.0),
    "has_sink": (False, True),
    "head_dim": (64, 128, 256, 96),
}
DIMENSIONS: dict[str, dict[str, Sequence[Any]]] = {
    "cpu": {
        "mask": (Causal(), SlidingWindow(7), Chunked(12), Full()),
        "page_size": (1, 3, 16, 128),
        "batch": tuple(LENS["cpu"]),
        "heads": ((2, 2), (4, 1), (6, 2)),
        "dtype": (torch.float32, torch.float16),
        **_COMMON,
        "head_dim": (*_COMMON["head_dim"], 40),
    },
    "cuda": {
        "mask": (Causal(), SlidingWindow(100), Chunked(256), Full()),
        "page_size": (1, 16, 64, 128, 256),
        "batch": tuple(LENS["cuda"]),
        "heads": ((4, 4), (8, 2), (6, 2), (16, 1)),
        "dtype": (torch.bfloat16, torch.float16, torch.float32),
        **_COMMON,
    },
}


def covering(dimensions: Mapping[str, Sequence[Any]], full: Sequence[str]) -> list[dict[str, Any]]:
    """Rows that hold every combination of the dimensions `full`, and every pair of values of any two dimensions. The
    same rows in every process: test runners that share the work compare what they found."""
    names = [*full, *(name for name in dimensions if name not in full)]

    def pairs(row: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        return list(itertools.combinations(((name, row[name]) for name in names if name in row), 2))

    missing = {  # a dict and not a set, for its order
        pair: None
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(dimensions[a], dimensions[b])
        for pair in pairs({a: x, b: y})
    }
    rows: list[dict[str, Any]] = []

    def gain(row: Mapping[str, Any]) -> int:
        return sum(pair in missing for pair in pairs(row))

    def add(row: dict[str, Any]) -> None:
        for bit, name in enumerate(name for name in names if name not in row):
            # Where no value gains a pair: switches as the bits of the row's number, of sizes the cheapest.
            values = list(dimensions[name])
            start = len(rows) >> bit & 1 if len(values) == 2 else 0
            row[name] = max(values[start:] + values[:start], key=lambda x: gain({**row, name: x}))  # noqa: B023
        for pair in pairs(row):
            missing.pop(pair, None)
        rows.append(row)

    for combination in itertools.product(*(dimensions[name] for name in full)):
        add(dict(zip(full, combination, strict=True)))
    while missing:
        add(dict(next(iter(missing))))
    return rows


# On the GPU every case compiles kernels, so only masks x page sizes are complete there.
FULL = {"cpu": ("mask", "page_size", "batch"), "cuda": ("mask", "page_size")}
CASES: dict[str, list[Case]] = {
    device: [Case(**row) for row in covering(DIMENSIONS[device], FULL[device])] for device in DIMENSIONS
}
# And what is run most, everywhere: kernels choose their path by page size and batch.
CASES["cuda"] += [
    case
    for page_size, batch in itertools.product(DIMENSIONS["cuda"]["page_size"], LENS["cuda"])
    if (case := Case(Causal(), page_size, batch, 0.0, False, 128, (8, 2), torch.bfloat16))
    not in CASES["cuda"]
]
