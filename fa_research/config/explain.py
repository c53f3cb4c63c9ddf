"""Turns what Hydra and OmegaConf raise into one line that names the key, what was given and what would work."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any

from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError
from yaml.error import MarkedYAMLError  # type: ignore[import-untyped]

from fa_research.config.schemas import WORKLOADS, Config, WorkloadConfig
from fa_research.config.yaml_words import hint

# Launchers of Hydra that are packages of their own: which, and which extra of this one brings it.
_LAUNCHERS = {
    "joblib": ("hydra-joblib-launcher", "launchers"),
    "submitit_local": ("hydra-submitit-launcher", "launchers"),
    "submitit_slurm": ("hydra-submitit-launcher", "launchers"),
    "ray": ("hydra-ray-launcher", "ray"),
}
_IN_A_FILE = r"In '(.*)': \w+ raised while composing config"  # Hydra's words
_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def explain(error: BaseException) -> str:
    """One line for a user about an error of composition or conversion."""
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, MarkedYAMLError):
            return _not_yaml(cause)
    where = next((found[1] for cause in chain if (found := re.match(_IN_A_FILE, str(cause)))), None)
    for cause in chain:
        if isinstance(cause, MissingConfigException) and cause.options:
            return _unknown_choice(cause)
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            return f"{where}.yaml: {_explain_omegaconf(cause)}" if where else _explain_omegaconf(cause)
        if several := re.match(r"Ambiguous value for argument '(.*)'", str(cause)):
            key, _, values = several[1].partition("=")
            a_list = f"; a list is {key}=[{values}]" if "." in key else ""
            return f"{several[1]}: several values need a sweep: add -m (--multirun){a_list}"
    for cause in chain:
        if plain := re.match(r"Merge error: \w+ is not a subclass of (\w+)\. value: (.*)", str(cause)):
            return _plain_for_group(plain[1], plain[2], where)
    if "Unsupported item value in defaults" in str(error):
        return (
            "a choice in a list of defaults is no text to YAML (a bare off or no is false, on or yes true, 1 a "
            'number): put it in quotes there, as in override /cuda_graph: "off"'
        )
    if any(isinstance(cause, ValueError) and "group override must be" in str(cause) for cause in chain):
        return (
            f"{error}: a group takes the name of one of its choices, as in backend=triton; --help lists them"
        )
    if isinstance(error, OverrideParseException):
        return _unreadable(str(error.override))
    return " ".join(str(error).split())


def _not_yaml(error: MarkedYAMLError) -> str:
    """A file that is no YAML: where, and what YAML says."""
    mark = error.problem_mark
    where = f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}" if mark else "a config file"
    return f"{where}: this is no YAML: {error.problem or error.context}"


def _plain_for_group(schema: str, value: str, where: str | None) -> str:
    """A value was given where a preset has a group of keys, as in `tracking: off`."""
    named = [
        key for key, kind in typing.get_type_hints(Config).items() if getattr(kind, "__name__", "") == schema
    ]
    workloads = {kind.__name__ for kind in WORKLOADS.values()}
    group = named[0] if named else "workload" if schema in workloads else schema
    return (
        f"{f'{where}.yaml: ' if where else ''}{group}={value}: is a group of keys, no value; a choice of it stands in "
        f"the list of defaults: override /{group}: <choice>"
    )


def _unreadable(override: str) -> str:
    how = "write key=value, and quote special characters"
    if override.lstrip("+").partition("=")[0] == "sweep.exclude":  # the shell takes the inner quotes away
        how = """quote each entry, and all for the shell: "sweep.exclude=['backend=fa4,kv.page_size=1']\""""
    return f"cannot read the override {override!r}: {how}"


def unknown_key(full_key: str, schema: type | None) -> str:
    """Says that `full_key` does not exist and which keys do; `schema` is the dataclass it was looked up in."""
    parent, _, key = full_key.rpartition(".")
    if schema is None or not dataclasses.is_dataclass(schema):
        return f"unknown key {full_key}; a plus in front adds it: +{full_key}=..."
    names = [field.name for field in dataclasses.fields(schema)]
    qualified = [f"{parent}.{name}" if parent else name for name in names]
    near = _elsewhere(full_key) or _did_you_mean(key, names, prefix=parent)
    text = f"unknown key {full_key}{near}"
    elsewhere = [name for name, cls in WORKLOADS.items() if key in {f.name for f in dataclasses.fields(cls)}]
    if issubclass(schema, WorkloadConfig) and elsewhere:
        text += f"; it belongs to workload={' and workload='.join(elsewhere)}"
    return f"{text}; keys here: {', '.join(qualified)}"


def expected(schema: type | None, key: str) -> str:
    """What the field `key` of a dataclass takes, in words; empty where nothing is known."""
    if schema is None or not dataclasses.is_dataclass(schema):
        return ""
    return _type_in_words(typing.get_type_hints(schema).get(key))


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        # Hydra raises the error of composition while it handles that of OmegaConf, without naming it as the cause
        composing = isinstance(current, ConfigCompositionException)
        current = current.__cause__ or (current.__context__ if composing else None)


def _explain_omegaconf(error: OmegaConfBaseException) -> str:
    full_key, schema = str(error.full_key), error.object_type
    if isinstance(error, ConfigKeyError) or type(error).__name__ == "ConfigAttributeError":
        return unknown_key(full_key, schema)
    if isinstance(error, MissingMandatoryValue):
        return f"{full_key} has no value; expected {expected(schema, str(error.key)) or 'one'}"
    if isinstance(error, ValidationError):
        wanted = expected(schema, str(error.key)) or _list_item(full_key)
        if wanted:
            return f"{full_key}={_as_typed(error.value)}: expected {wanted}{_unquoted(error.value, wanted)}"
    if "does not support deletion" in str(error):
        return f"{full_key} cannot be removed, only set: {full_key}=..."
    reason = str(error.msg or error).splitlines()[0]
    return f"{full_key}: {reason}"


def _unquoted(value: Any, wanted: str) -> str:
    """What YAML 1.1 made of a bare word, where a choice is wanted."""
    if not wanted.startswith("one of "):
        return ""
    return hint(wanted.removeprefix("one of ").replace(" or null", "").split(", "), value)


def _list_item(full_key: str) -> str:
    """What an item of a list takes: the schema in such an error is `list`, so walk down from the root."""
    node: Any = Config
    for name in full_key.split("[")[0].split("."):
        node = typing.get_type_hints(node).get(name) if dataclasses.is_dataclass(node) else None
    return _type_in_words(typing.get_args(node)[0]) if typing.get_origin(node) is list else ""


def _type_in_words(kind: Any) -> str:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        options = [_type_in_words(arg) for arg in typing.get_args(kind) if arg is not type(None)]
        return " or ".join([*options, "null"])
    if typing.get_origin(kind) is list:
        return f"a list, each item {_type_in_words(typing.get_args(kind)[0])}, as in [a,b]"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(kind.__members__)}"
    if dataclasses.is_dataclass(kind):
        return f"a group with the keys {', '.join(f.name for f in dataclasses.fields(kind))}"
    return _TYPE_NAMES.get(kind, "")


def _unknown_choice(error: MissingConfigException) -> str:
    group, _, given = str(error.missing_cfg_file).rpartition("/")
    options = [str(option) for option in error.options or ()]
    if group == "hydra/launcher" and given in _LAUNCHERS:
        package, extra = _LAUNCHERS[given]
        return f"hydra/launcher={given} needs {package}, which is not installed: pip install -e '.[{extra}]'"
    return f"{group}={given} is unknown{_did_you_mean(given, options)}; choose one of {', '.join(options)}"


def _elsewhere(full_key: str) -> str:
    """Where the config has a key of this name, for one that was given without the groups above it."""
    paths = [
        *_paths(Config),
        *(path for schema in WORKLOADS.values() for path in _paths(schema, "workload.")),
    ]
    found = [path for path in dict.fromkeys(paths) if path.endswith(f".{full_key}")]
    return f" (did you mean {' or '.join(found)}?)" if found and len(found) <= 3 else ""


def _paths(schema: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys of a dataclass and of those in it."""
    for name, kind in typing.get_type_hints(schema).items():
        yield prefix + name
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from _paths(kind, f"{prefix}{name}.")


def _did_you_mean(given: str, options: Iterable[str], prefix: str = "") -> str:
    by_lower = {option.lower(): option for option in options}
    close = difflib.get_close_matches(given.lower(), list(by_lower), n=1, cutoff=0.6)
    return f" (did you mean {prefix + '.' if prefix else ''}{by_lower[close[0]]}?)" if close else ""


def _as_typed(value: Any) -> str:
    return "null" if value is None else repr(value) if isinstance(value, str) else str(value)
