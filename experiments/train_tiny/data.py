"""The corpus: the .py files of the running Python's standard library, split by file name into train, dev and held_out.

`python experiments/train_tiny/data.py --out corpus.npz` (from the repository root, with it on PYTHONPATH).
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SEPARATOR = 0  # a byte that no source file holds: before every file, and after the last
SPLITS = ("train", "dev", "held_out")
DEV_BYTES = 7  # of 256: 2.7 % of the files, for choosing settings; held-out files choose nothing


def split_of(relative_path: str) -> str:
    from fa_research.workloads.heldout import HELD_OUT_BYTES, is_held_out, split_byte

    if is_held_out(relative_path):
        return "held_out"
    return "dev" if split_byte(relative_path) < HELD_OUT_BYTES + DEV_BYTES else "train"


def source_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(path relative to `folder`, content) of every file of the corpus, sorted by path; of equal files the first."""
    from fa_research.workloads.heldout import is_in_corpus

    seen: set[bytes] = set()
    for path in sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.py")):
        if not is_in_corpus(path):
            continue
        content = (folder / path).read_bytes()
        digest = hashlib.sha256(content).digest()
        if digest in seen or not content or not _is_text(content):
            continue
        seen.add(digest)
        yield path, content


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return SEPARATOR not in content


def build(folder: Path) -> dict[str, np.ndarray]:
    """For each split its bytes (uint8, a separator before each file and after the last), `<split>_starts` (int64: where
    each file's separator is, then the end) and `<split>_names`; `python`: the version whose library it is."""
    files: dict[str, list[tuple[str, bytes]]] = {split: [] for split in SPLITS}
    for path, content in source_files(folder):
        files[split_of(path)].append((path, content))
    corpus: dict[str, np.ndarray] = {"python": np.array(platform.python_version())}
    for split, members in files.items():
        joined = b"".join(bytes([SEPARATOR]) + content for _, content in members) + bytes([SEPARATOR])
        corpus[split] = np.frombuffer(joined, dtype=np.uint8)
        lens = [1 + len(content) for _, content in members]
        corpus[f"{split}_starts"] = np.concatenate([[0], np.cumsum(lens)]).astype(np.int64)
        corpus[f"{split}_names"] = np.array([path for path, _ in members])
    return corpus


def load(file: Path | None) -> dict[str, np.ndarray]:
    """The corpus in `file`, or (None) that of the running Python."""
    if file is None:
        return build(Path(sysconfig.get_path("stdlib")))
    with np.load(file) as stored:
        return {key: stored[key] for key in stored.files}


def describe(corpus: dict[str, np.ndarray]) -> dict[str, object]:
    """Files, bytes and SHA-256 of each split."""
    return {"python": str(corpus["python"])} | {
        split: {
            "files": len(corpus[f"{split}_names"]),
            "bytes": len(corpus[split]),
            "sha256": hashlib.sha256(corpus[split].tobytes()).hexdigest(),
        }
        for split in SPLITS
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    corpus = load(None)
    np.savez_compressed(out, **corpus)  # type: ignore[arg-type]
    print(describe(corpus), f"{out.stat().st_size / 1e6:.1f} MB")
