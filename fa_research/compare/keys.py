"""What a user may ask about: a config key, a group of keys, or a fact of the environment, in full or in short."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fa_research.compare.reading import Record
from fa_research.errors import ConfigError
from fa_research.tracking.columns import format_value

# Where and how results are made and kept; not part of the config hash either.
NOT_MATCHED = ("study", "tracking", "sweep", "measure.timeout_s")
# What these change is computed, not only how long it takes.
_OF_THE_RESULT = ("model", "kv.dtype", "sampling", "seed")
ENVIRONMENT = "environment."
ABSENT = "absent"


def within(key: str, name: str) -> bool:
    """Whether `key` is `name` or lies in the group of that name."""
    return key == name or key.startswith(f"{name}.")


def changes_result(name: str) -> bool:
    """Whether other values of this key or group compute something else, and not the same in another way."""
    return any(within(name, key) for key in _OF_THE_RESULT)


@dataclass(frozen=True)
class Question:
    """A key or a group, and what each record answers.

    Attributes:
        name: dotted, in full.
        labels: the answers in the order they are shown: numbers by size, the rest by name.
    """

    name: str
    labels: tuple[str, ...]
    by_record: dict[int, str]

    @property
    def is_environment(self) -> bool:
        return self.name.startswith(ENVIRONMENT)

    @property
    def title(self) -> str:
        return self.name.removesuffix(".name")

    def label(self, record: Record) -> str | None:
        """The record's answer; None where its config has no such key."""
        return self.by_record.get(id(record))


def ask(text: str, records: Sequence[Record]) -> Question:
    """The question that `text` stands for.

    Raises ConfigError for a name that is unknown or stands for several keys, naming what is close, and where all
    records give one answer.
    """
    name = resolve(text, records)
    question = question_of(name, records)
    if len(question.labels) < 2:
        others = [key for key in varying(records) if not within(key, name)]
        count = len(question.by_record)
        only = f"the only row{' with it' * (len(records) > 1)} has"
        having = f"all {count} rows have" if count > 1 else only
        rest = f"; what varies between them: {', '.join(others[:12]) or 'nothing'}" * (len(records) > 1)
        raise ConfigError(f"{having} {name}={question.labels[0]}, so there is nothing to compare{rest}")
    return question


def question_of(name: str, records: Sequence[Record]) -> Question:
    """The question of a key or group given in full; it may have one answer, or none."""
    answers = {id(r): values for r in records if (values := _values(r, name))}
    labels = _labels(name, list({repr(values): values for values in answers.values()}.values()))
    by_record = {key: labels[repr(values)] for key, values in answers.items()}
    order = {
        labels[repr(values)]: [order_of(value) for value in values.values()] for values in answers.values()
    }
    return Question(name, tuple(sorted(order, key=order.__getitem__)), by_record)


def resolve(text: str, records: Sequence[Record]) -> str:
    """The full name of a key, a group or an environment fact: as given, or the only one that ends with it."""
    keys = dict.fromkeys(key for record in records for key in record.config if not _unmatched(key))
    facts = dict.fromkeys(key for record in records for key in record.environment)
    names = [*_with_groups(keys), *_with_groups(facts)]
    if text in names:
        return text
    for candidates in (
        list(_with_groups(keys)),
        names,
    ):  # a fact of the environment where no key has the name
        ending = [name for name in candidates if name.endswith(f".{text}")]
        if len(ending) == 1:
            return ending[0]
        if ending:
            raise ConfigError(f"{text} may be {' or '.join(ending)}: say which")
    raise ConfigError(f"no row has a key {text}{did_you_mean(text, names)}")


def did_you_mean(text: str, names: Iterable[str]) -> str:
    """Names close to `text`, or to the last part of which it is close, else the names themselves."""
    names = list(names)
    tops = [name for name in names if "." not in name]
    return near(text, names) or (f"; there are {', '.join(tops[:12])}" if tops else "")


def near(text: str, names: Iterable[str]) -> str:
    """Names close to `text`, or to the last part of which it is close; nothing where there is none."""
    by_short: dict[str, list[str]] = {}
    for name in names:
        by_short.setdefault(name, []).append(name)
        by_short.setdefault(name.rpartition(".")[2], []).append(name)
    close = difflib.get_close_matches(text, list(by_short), n=3, cutoff=0.6)
    meant = list(dict.fromkeys(name.removesuffix(".name") for found in close for name in by_short[found]))[:4]
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def varying(records: Sequence[Record]) -> list[str]:
    """Dotted keys whose values differ between records, in the order of their configs."""
    keys = dict.fromkeys(key for record in records for key in record.config)
    return [
        key
        for key in keys
        if not _unmatched(key) and len({repr(r.config.get(key, ABSENT)) for r in records}) > 1
    ]


def readable(keys: Sequence[str], records: Sequence[Record]) -> list[str]:
    """The keys among `keys` that a table needs: where a group's name varies, what comes with each name is left out."""
    kept = []
    for key in keys:
        group, _, rest = key.partition(".")
        values: dict[str, set[str]] = {}
        for record in records:
            name = str(record.config.get(f"{group}.name")) if rest != "name" else ""
            values.setdefault(name, set()).add(repr(record.config.get(key, ABSENT)))
        if any(len(found) > 1 for found in values.values()):
            kept.append(key)
    return kept


def _unmatched(key: str) -> bool:
    return any(within(key, name) for name in NOT_MATCHED)


def _with_groups(keys: Iterable[str]) -> dict[str, None]:
    """The keys and every group that holds one."""
    found: dict[str, None] = {}
    for key in keys:
        parts = key.split(".")
        found |= dict.fromkeys(".".join(parts[: n + 1]) for n in range(len(parts)))
    return found


def _values(record: Record, name: str) -> dict[str, Any]:
    """What a record has under `name`: one value, or all of a group."""
    source = record.environment if name.startswith("environment") else record.config
    return {key: value for key, value in source.items() if within(key, name)}


def _labels(name: str, answers: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A short text for each answer: the value or the group's name, and with it the keys in which namesakes differ."""
    labels: dict[str, str] = {}
    keys = dict.fromkeys(key for values in answers for key in values)
    head = f"{name}.name"
    for values in answers:
        if set(values) == {name}:
            labels[repr(values)] = text_of(values[name])
            continue
        alike = [other for other in answers if other.get(head) == values.get(head)]
        differing = [k for k in keys if len({repr(other.get(k, ABSENT)) for other in alike}) > 1]
        settings = [f"{k[len(name) + 1 :]}={text_of(values[k])}" for k in differing if k in values]
        named = [str(values[head])] if head in values else []
        labels[repr(values)] = " ".join([*named, *settings]) or name
    return labels


def text_of(value: Any) -> str:
    """A value as one types it: null, true, 1024."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else format_value(value)


def short(key: str, keys: Iterable[str]) -> str:
    """The last part of a dotted key, where no other of `keys` ends alike."""
    base = key.removesuffix(".name")
    last = base.rpartition(".")[2]
    others = [other.removesuffix(".name").rpartition(".")[2] for other in keys if other != key]
    return base if last in others else last


def title_of(where: dict[str, Any]) -> str:
    """Keys and values on one line: batch_size=1, context_len=1024."""
    return ", ".join(f"{short(key, where)}={text_of(value)}" for key, value in where.items())


def order_of(value: Any) -> tuple[int, float, str]:
    """For sorting values of any type: numbers by size before the rest by name."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, value, "") if number else (1, 0, str(value))
