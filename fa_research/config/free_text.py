"""Keys whose value is a text as it is typed: Hydra's grammar, in which `def main(` is an error and `a, b` a sweep, is
not for them. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from hydra.core.override_parser.types import Quote, QuotedString

FREE_TEXT = ("workload.prompt",)
_SWEEPS = {"-m", "--multirun"}


def quote_free_text(arguments: Iterable[str]) -> list[str]:
    """The command line with the values of `FREE_TEXT` in quotes, but `null` and what is in quotes already. In a sweep a
    comma parts values, so nothing is changed there: texts with special characters take quotes of their own."""
    arguments = list(arguments)
    return arguments if _SWEEPS & set(arguments) else [_quoted(argument) for argument in arguments]


def _quoted(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if not equals or key.lstrip("+") not in FREE_TEXT or not value or value == "null" or _in_quotes(value):
        return argument
    return f"{key}={QuotedString(value, Quote.single).with_quotes()}"


def _in_quotes(value: str) -> bool:
    return len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
