"""What is varied in the tests of semantics: masks, page sizes, batches, softcap, sinks, heads, head dims and dtypes."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from fa_research import masks
from fa_research.masks import Mask
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
        extras = ("-softcap" if self.softcap else "") + ("-sink" if self.has_sink else "")
        shape = f"d{self.head_dim}-h{self.heads[0]}:{self.heads[1]}-{said(self.dtype)}"
        return f"{said(self.mask)}{extras}-page{self.page_size}-{self.batch}-{shape}"

    @property
    def spec(self) -> AttentionSpec:
        return make_spec(self.heads, self.head_dim, self.mask, self.softcap, self.has_sink)

    def scene(self, device: str) -> Scene:
        lens = LENS[device][self.batch]
        decode = self.batch == "decode"
        return Scene(self.spec, lens, self.page_size, self.dtype, device, decode=decode)


def said(value: Any) -> str:
    """A value of a dimension, in few characters."""
    if isinstance(value, Mask):
        return f"{value.name}{getattr(value, 'size', '')}"
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


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

_SIZES = {"cpu": {"chunked": 12}, "cuda": {"chunked": 256}}
_OTHER_SIZES = {"cpu": 7, "cuda": 100}
_VALUES: dict[type, Any] = {int: 4, float: 0.5, bool: True, str: ""}  # of fields without a default


@cache
def every_mask(device: str) -> tuple[tuple[Mask, ...], tuple[str, ...]]:
    """Each mask of the package and of plugins, and, for those that cannot be made here, the reason. A mask has the size
    above if it takes one, and the defaults of its other fields."""
    made, problems = [], []
    for name, cls in sorted(masks._registry().items()):
        kinds, size = typing.get_type_hints(cls), _SIZES[device].get(name, _OTHER_SIZES[device])
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        takes_size = fields.pop("size", None) is not None
        needed = [
            name for name, field in fields.items() if field.default is field.default_factory
        ]  # both missing
        try:
            options = {name: _VALUES[kinds[name]] for name in needed}
            made.append(masks.build(name, size if takes_size else None, options))
        except ValueError as error:
            problems.append(f"mask {name}: {error}; give its fields defaults that work")
    return tuple(made), tuple(problems)


def dimensions(device: str) -> dict[str, Sequence[Any]]:
    """The values of each field of `Case`."""
    on_gpu = device == "cuda"
    return {
        "mask": every_mask(device)[0],
        "page_size": (1, 16, 64, 128, 256) if on_gpu else (1, 3, 16, 128),
        "batch": tuple(LENS[device]),
        "heads": ((4, 4), (8, 2), (6, 2), (16, 1)) if on_gpu else ((2, 2), (4, 1), (6, 2)),
        "dtype": (torch.bfloat16, torch.float16, torch.float32) if on_gpu else (torch.float32, torch.float16),
        "softcap": (0.0, 4.0),
        "has_sink": (False, True),
        "head_dim": (64, 128, 256, 96) if on_gpu else (64, 128, 256, 96, 40),
    }
