"""The safetensors files of a Hugging Face folder, and where each tensor lies in them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fa_research.errors import CheckpointError

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
}  # fmt: skip
_NAMED = 50  # names of one kind of problem in a message; the rest is counted


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: its dtype as safetensors writes it, and its bytes from `offset` on."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    def map(self) -> Tensor:
        """Its bytes, mapped: read as they are used."""
        end = self.offset + self.num_bytes
        file = torch.from_file(str(self.path), shared=False, size=end, dtype=torch.uint8)
        return file[self.offset :]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's weights, by name.

    Raises:
        CheckpointError: safetensors is not installed; no such files; or a file (named) that is corrupt, truncated or
            not there, or that holds what another holds too.
    """
    found: dict[str, Stored] = {}
    for path in _weight_files(folder):
        _verify(path)
        inside = _read_header(path)
        if twice := sorted(found.keys() & inside.keys()):
            raise CheckpointError(
                f"model.path: {path} holds tensors that another file holds too: {name_some(twice)}"
            )
        found |= inside
    return found


def name_some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return ", ".join(listed[:_NAMED]) + more


def _verify(path: Path) -> None:
    """What safetensors itself checks of a file when it opens it: the header, and that all of the data is there."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise CheckpointError(
            f"model.path needs the package safetensors, which cannot be imported ({error}): pip install safetensors"
        ) from error
    try:
        with safe_open(path, framework="pt", device="cpu"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"model.path: {path} cannot be read: {error}; it is corrupt, truncated "
            "or no safetensors file: fetch it again"
        ) from error


def _read_header(path: Path) -> dict[str, Stored]:
    """Of a file that is in order: eight bytes for the length of a JSON object, the object, then the data."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        found[name] = Stored(path, name, entry["dtype"], shape, 8 + length + begin, end - begin)
    return found


def _weight_files(folder: Path) -> list[Path]:
    """The one file, or the shards that the index names."""
    if (folder / ONE_FILE).exists():
        return [folder / ONE_FILE]
    if (folder / INDEX).exists():
        files = [folder / name for name in _shards(folder / INDEX)]
        if absent := [file.name for file in files if not file.exists()]:
            raise CheckpointError(f"model.path={folder} lacks shards that {INDEX} names: {name_some(absent)}")
        return files
    suffixes = {".safetensors", ".bin", ".pth", ".gguf"}
    found = sorted(file.name for file in folder.glob("*") if file.suffix in suffixes)
    there = f"; it has {name_some(found)}" if found else ""
    others = any(not name.endswith(".safetensors") for name in found)
    hint = "; convert them to safetensors first" if others else ""
    raise CheckpointError(f"model.path={folder} has neither {ONE_FILE} nor {INDEX}{there}{hint}")


def _shards(index: Path) -> list[str]:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({str(name) for name in files})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"model.path: {index} is no index of shards ({type(error).__name__}: {error}); fetch it again"
        ) from error
