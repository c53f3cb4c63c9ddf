"""Keys whose value is a text as it is typed: Hydra's grammar, in which `def main(` is an error, `a, b` a sweep and
`${seed}` a number, is not for them. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

FREE_TEXT = ("workload.prompt",)
PATHS = (
    "model.path",
    "workload.path",
)  # shells leave the ~ in `key=~/folder`, which the grammar does not take
_SWEEPS = {"-m", "--multirun"}
_IN_QUOTES = re.compile(r"""(["'])(?:(?!\1)[^\\]|\\.)*\1""", re.DOTALL)  # as a whole, unlike 'a' + 'b'
_INTERPOLATION = re.compile(r"(\\*)\$\{")


def quote_free_text(arguments: Iterable[str]) -> list[str]:
    """The command line with the values of `FREE_TEXT` in quotes, but `null` and what is in quotes already, and those of
    `PATHS` that begin with `~`. In a sweep a comma parts values, so nothing is changed there: texts with special
    characters take quotes of their own."""
    arguments = list(arguments)
    return arguments if _SWEEPS & set(arguments) else [_quoted(argument) for argument in arguments]


def _quoted(argument: str) -> str:
    key, _, value = argument.partition("=")
    name = key.lstrip("+")
    if name in PATHS and value.startswith("~"):
        return f"{key}={_quotes(value)}"
    if name not in FREE_TEXT or not value or value == "null" or _IN_QUOTES.fullmatch(value):
        return argument
    return f"{key}={_quotes(escape(value))}"


def escape(plain: Any) -> Any:
    """Plain data with texts such that OmegaConf reads them as they are, and `${x}` in them as no interpolation."""
    if isinstance(plain, dict):
        return {key: escape(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [escape(value) for value in plain]
    return _INTERPOLATION.sub(r"\1\1\\${", plain) if isinstance(plain, str) else plain


def _quotes(value: str) -> str:
    return QuotedString(value, Quote.single).with_quotes()
