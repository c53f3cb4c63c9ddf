"""Which files of the Python standard library the shipped model never saw. Pure Python.

The rule looks at a file's path alone, so it is the same for every version of Python and on every machine.
"""

from __future__ import annotations

import hashlib

HELD_OUT_BYTES = 13  # of 256: 5 % of the files

# Tables, generated files and files that say something of one machine: neither learnt nor asked for.
_EXCLUDED = ("site-packages/", "dist-packages/", "encodings/", "pydoc_data/", "config-", "_sysconfigdata")


def is_in_corpus(relative_path: str) -> bool:
    """Whether the file of this path (relative to the standard library's folder, with `/`) is one of those that the
    shipped model's data are made of, for training or held out."""
    return relative_path.endswith(".py") and not relative_path.startswith(_EXCLUDED)


def split_byte(relative_path: str) -> int:
    """The number in [0, 256) that decides where a file belongs: the last byte of the SHA-256 of its path.

    A module and its tests go together: folders named `test` or `tests` and the prefix `test_` are left out of the path,
    so that `json/decoder.py` and `test/test_json/test_decoder.py` have one number.
    """
    parts = [part.removeprefix("test_") for part in relative_path.split("/") if part not in ("test", "tests")]
    return hashlib.sha256("/".join(parts).encode()).digest()[-1]


def is_held_out(relative_path: str) -> bool:
    """Whether the shipped model was never trained on the file of this path (see `is_in_corpus`), and was not chosen by
    it either: what is measured on these files is what it does on text that it does not know."""
    return is_in_corpus(relative_path) and split_byte(relative_path) < HELD_OUT_BYTES
