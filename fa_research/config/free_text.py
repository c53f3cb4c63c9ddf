"""Keys whose value is a text as it is typed: Hydra's grammar, in which `def main(` is an error, `a, b` a sweep and
`${seed}` a number, is not for them. No torch."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

FREE_TEXT = ("workload.prompt",)
PATHS = ("model.path", "workload.path", "workload.prompt_file", "hydra.run.dir", "hydra.sweep.dir")
# Texts that may look like a number or a truth value: the grammar would make 202401 of study=2024_01, 1.1 of 1.10
# and 1000.0 of 1e3, before the schema makes texts of them again.
TEXTS = frozenset(
    {
        "study",
        "tracking.project",
        "tracking.entity",
        "tracking.tags",
        "backend.provider",
        "model.name",
        *PATHS,
    }
)
OVERRIDES = ("measure.against",)  # lists of overrides, as in [backend=triton]: the grammar takes no = there
_SWEEPS = {"-m", "--multirun"}
_IN_QUOTES = re.compile(r"""(["'])(?:(?!\1)[^\\]|\\.)*\1""", re.DOTALL)  # as a whole, unlike 'a' + 'b'
_TOKENS = re.compile(rf"{_IN_QUOTES.pattern}|.", re.DOTALL)
_VALUES = re.compile(
    rf",\s*(?:{_IN_QUOTES.pattern}\s*(?=,|$)|[^,]*)", re.DOTALL
)  # of a sweep, each with its comma
_PLAIN = re.compile(
    r"[^,\[\]()]+"
)  # an element of a list, of a sweep or of choice(...), where it has no quotes
_NO_CHOICE = re.compile(
    r"(range|interval|glob|int|float|bool)\s*\("
)  # functions whose arguments are no texts
_INTERPOLATION = re.compile(r"(\\*)\$\{")
_OVERRIDE = re.compile(r"[~+]*\w[\w.@:/-]*=|~\w")


def options_first(arguments: Iterable[str]) -> list[str]:
    """The command line with its overrides last: Hydra's parser takes them in one piece only, and
    `run.py backend=torch -m kv.page_size=1,16` has two."""
    return sorted(arguments, key=lambda text: bool(_OVERRIDE.match(text)))


def quote_free_text(arguments: Iterable[str]) -> list[str]:
    """The command line with the values of `FREE_TEXT` in quotes, but `null` and what is in quotes already; those of
    `PATHS` that Hydra's grammar would not read as the text they are; and elements of `OVERRIDES`. In a sweep a comma
    parts values, so prompts with special characters take quotes of their own there. Values of `TEXTS` that the grammar
    cannot read, or would read as something else, are put in quotes everywhere."""
    arguments = list(arguments)
    if not _SWEEPS & set(arguments):
        arguments = [_quoted(argument) for argument in arguments]
    return [_quoted_elements(_quoted_numbers(_readable(argument))) for argument in arguments]


def _readable(argument: str) -> str:
    """The argument with the values of one of `TEXTS` in quotes that Hydra's grammar cannot read without, as `é` and
    `a=b`; where it cannot read the whole, a comma outside quotes parts values."""
    key, _, value = argument.partition("=")
    if key.lstrip("+") not in TEXTS or key.endswith(".tags") or _can_be_read(argument):
        return argument
    values = (match[0][1:].strip() for match in _VALUES.finditer(f",{value}"))
    return f"{key}=" + ",".join(text if _can_be_read(f"{key}={text}") else quotes(text) for text in values)


def _can_be_read(argument: str) -> bool:
    try:
        OverridesParser.create().parse_overrides([argument])
    except HydraException:
        return False
    return True


def not_utf8(arguments: Iterable[str]) -> str | None:
    """What is wrong with arguments whose bytes are no UTF-8, on one line; None if nothing is. A prompt may hold them:
    the shipped model's tokens are bytes."""
    for argument in arguments:
        key = argument.partition("=")[0].lstrip("+")
        if key not in FREE_TEXT and re.search("[\ud800-\udfff]", argument):
            shown = os.fsencode(argument).decode("utf-8", "backslashreplace")
            return f"{shown}: is no UTF-8, which rows and files are in; give it in UTF-8, or another name"
    return None


def _quoted(argument: str) -> str:
    key, _, value = argument.partition("=")
    name = key.lstrip("+")
    if name in PATHS and value and not _IN_QUOTES.fullmatch(value) and not _is_read_as_typed(argument, value):
        return f"{key}={quotes(value)}"
    if name not in FREE_TEXT or not value or value == "null" or _IN_QUOTES.fullmatch(value):
        return argument
    return f"{key}={quotes(escape(value))}"


def _quoted_numbers(argument: str) -> str:
    """The argument with every element in quotes that the grammar takes for a number or a truth value, if it is one of
    `TEXTS`."""
    key, _, value = argument.partition("=")
    if key.lstrip("+") not in TEXTS or _NO_CHOICE.match(value):
        return argument
    changed, end = "", 0
    for kept in _IN_QUOTES.finditer(value):
        changed += _PLAIN.sub(_as_text, value[end : kept.start()]) + kept[0]
        end = kept.end()
    return f"{key}={changed}{_PLAIN.sub(_as_text, value[end:])}"


def _as_text(element: re.Match[str]) -> str:
    text = element[0].strip()
    try:
        (read,) = OverridesParser.create().parse_overrides([f"key={text}"])
        is_text = not isinstance(read.value(), bool | int | float)
    except HydraException:
        is_text = True
    return element[0] if is_text else quotes(text)


def _is_read_as_typed(argument: str, value: str) -> bool:
    """Whether Hydra's grammar takes the value of `argument` as one: this text, null, or with an interpolation in it."""
    try:
        (read,) = OverridesParser.create().parse_overrides([argument])
    except HydraException:
        return False
    return not read.is_sweep_override() and (read.value() in (value, None) or "${" in value)


def _quoted_elements(argument: str) -> str:
    """The argument with the overrides in its lists in quotes, if it is one of `OVERRIDES`."""
    key, _, value = argument.partition("=")
    if key.lstrip("+") not in OVERRIDES:
        return argument
    parts, depth = [""], 0  # elements, and between them the brackets and commas around them
    for match in _TOKENS.finditer(value):
        token = match[0]
        depth -= token == "]"
        if (token in "[]" and depth == 0) or (token == "," and depth == 1):
            parts += [token, ""]
        else:
            parts[-1] += token
        depth += token == "["
    bare = (part.strip() for part in parts)
    return f"{key}=" + "".join(
        quotes(text) if "=" in text and text[0] not in "'\"" else text for text in bare
    )


def escape(plain: Any) -> Any:
    """Plain data with texts such that OmegaConf reads them as they are, and `${x}` in them as no interpolation."""
    if isinstance(plain, dict):
        return {key: escape(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [escape(value) for value in plain]
    return _INTERPOLATION.sub(r"\1\1\\${", plain) if isinstance(plain, str) else plain


def quotes(value: str) -> str:
    """The text as Hydra's grammar takes it, whatever is in it."""
    return QuotedString(value, Quote.single).with_quotes()


def for_shell(key: str, value: str) -> str:
    """`key=value` as it is typed: quotes for Hydra's grammar where it needs them, and for the shell around them."""
    try:
        (read,) = OverridesParser.create().parse_overrides([f"{key}={value}"])
        as_it_is = not read.is_sweep_override() and read.value() == value
    except HydraException:
        as_it_is = False
    return shlex.quote(f"{key}={value if as_it_is else QuotedString(value, Quote.double).with_quotes()}")
