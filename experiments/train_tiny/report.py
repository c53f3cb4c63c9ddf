"""What the held-out figure is made of: bits per byte with and without tests, of text that training text does not
hold, and by file.

python experiments/train_tiny/report.py --data outputs/corpus.npz --run outputs/train_tiny

Writes `report.json` and `files.csv` into --run. A byte is `shared` if a stretch of 64 bytes around it is also found in
a training file.
"""

from __future__ import annotations

import argparse
import csv
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
from data import load

WINDOW = 64
_PRIME = np.uint64(1099511628211)


def hashes(stream: np.ndarray) -> np.ndarray:
    """Of every WINDOW bytes of `stream` (uint8): uint64, by doubling the width."""
    found, width = stream.astype(np.uint64) + np.uint64(1), 1
    while width < WINDOW:
        factor = np.uint64(pow(int(_PRIME), width, 2**64))
        found = found[:-width] * factor + found[width:]
        found ^= found >> np.uint64(29)
        width *= 2
    return found


def shared_bytes(stream: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Which bytes of `stream` lie in a window that `train` holds too."""
    begins = np.flatnonzero(np.isin(hashes(stream), hashes(train)))
    change = np.zeros(len(stream) + 1, dtype=np.int64)
    np.add.at(change, begins, 1)
    np.add.at(change, begins + WINDOW, -1)
    return change.cumsum()[:-1] > 0


def is_test(path: str) -> bool:
    parts = path.split("/")
    return bool({"test", "tests", "idle_test"} & set(parts[:-1])) or parts[-1].startswith("test_")


def xz_bits(stream: np.ndarray, before: np.ndarray) -> float:
    """Bits per byte of `stream` with LZMA, whose dictionary holds `before`."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 64 << 20}]
    lens = [
        len(lzma.compress(data.tobytes(), format=lzma.FORMAT_RAW, filters=filters))
        for data in (before, np.concatenate((before, stream)))
    ]
    return 8 * (lens[1] - lens[0]) / len(stream)


def report(
    corpus: dict[str, np.ndarray], bits: np.ndarray, split: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Of one split, and a row for each of its files. bits: of each byte, NaN for separators."""
    stream, starts, names = (corpus[split + end] for end in ("", "_starts", "_names"))
    bits, counted = np.nan_to_num(bits.astype(np.float64)), ~np.isnan(bits)
    shared = shared_bytes(stream, corpus["train"])
    tests = np.zeros(len(stream), dtype=bool)
    rows = []
    for first, last, name in zip(starts[:-1].tolist(), starts[1:].tolist(), names.tolist(), strict=True):
        tests[first:last] = is_test(name)
        row = {"split": split, "file": name, "bytes": last - first - 1}
        row |= {"bits_per_byte": round(bits[first:last].sum() / row["bytes"], 4)}
        rows.append(row | {"shared": round(float(shared[first:last].mean()), 3)})
    chosen = {"all": counted, "tests": tests, "not_tests": ~tests, "shared": shared, "not_shared": ~shared}
    parts = {key: mask & counted for key, mask in chosen.items()}
    nothing = stream[:0]
    xz = {"alone": xz_bits(stream, nothing), "after_train": xz_bits(stream, corpus["train"])}
    return {
        "bits_per_byte": {
            key: round(float(bits[part].mean()), 4) for key, part in parts.items() if part.any()
        },
        "bytes": {key: int(part.sum()) for key, part in parts.items()},
        "xz_bits_per_byte": {key: round(value, 4) for key, value in xz.items()},
    }, sorted(rows, key=lambda row: float(row["bits_per_byte"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a file of data.py; default: the running Python's library")
    parser.add_argument("--run", type=Path, required=True, help="a folder that train.py wrote")
    args = parser.parse_args()
    corpus, rows, found = load(args.data), [], {}
    with np.load(args.run / "bits.npz") as stored:
        for split in stored.files:
            found[split], files = report(corpus, stored[split], split)
            rows += files
    (args.run / "report.json").write_text(json.dumps(found, indent=2) + "\n")
    with (args.run / "files.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
