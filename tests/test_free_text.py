"""A prompt as it is typed in a shell reaches the config, character by character."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from omegaconf import OmegaConf

from fa_research.config import Config, TextWorkload, config_hash, to_plain
from fa_research.config.free_text import escape, for_shell, not_utf8, quote_free_text
from fa_research.config.preset_texts import number_for_text

TEXTS = (
    "def main(",
    "a, b",
    "it's",
    'say "so"',
    "tail ",
    " head",
    "back\\",
    "\\'",
    "{a: 1",
    "[1]",
    "1",
    "true",
    "$x",
    "a=b",
    "#",
    "echo ${seed} ${no such}",
    r"\${seed} a\\${seed} ${",
    '"""doc"""',
    "'a' + 'b'",
)


def read(argument: str) -> list[object]:
    """The values that Hydra's grammar reads, one of each cell in a sweep."""
    (override,) = OverridesParser.create().parse_overrides(quote_free_text(["-m", argument])[1:])
    if not override.is_sweep_override():
        return [override.value()]
    return [item.text if isinstance(item, QuotedString) else item for item in override.value().list]


@pytest.mark.parametrize("key", ["study", "+tracking.project", "model.path", "tracking.entity"])
@pytest.mark.parametrize("text", ["2024_01", "1.10", "1e3", "007", "true", "nan", "-1", "v1", "a.b", "1 2"])
def test_a_text_that_looks_like_a_number_stays_as_it_is_typed(key: str, text: str) -> None:
    assert read(f"{key}={text}") == [text]
    assert read(f"{key}={text},b, '1.50'") == [text, "b", "1.50"]
    assert read(f"{key}=choice({text},b)") == [text, "b"]


def test_tags_that_look_like_numbers_stay_as_they_are_typed() -> None:
    assert read("tracking.tags=[1e3, x,'2.0']") == [["1e3", "x", "2.0"]]
    assert read("tracking.tags=[]") == [[]]


def test_what_is_no_text_is_left_alone() -> None:
    assert read("tracking.entity=null") == [None]
    assert read("seed=1_0") == [10]
    for argument in ("study=range(1,3)", "study=${now:%Y}", "study="):
        assert quote_free_text([argument]) == [argument]


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_is_a_text(text: str) -> None:
    (argument,) = quote_free_text([f"workload.prompt={text}"])
    override = OverridesParser.create().parse_override(argument)
    assert override.key_or_group == "workload.prompt"
    composed = OmegaConf.create({"seed": 7, "workload": {"prompt": override.value()}})
    assert composed.workload.prompt == text


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_stays_as_it_is_in_rows_and_files(text: str) -> None:
    config = Config(workload=TextWorkload(prompt=text))
    plain = to_plain(config)
    assert plain["workload"]["prompt"] == text and config_hash(config) == config_hash(plain)
    saved = OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(escape(plain))))
    assert to_plain(saved) == plain and config_hash(saved) == config_hash(plain)


@pytest.mark.parametrize("key", ["model.path", "workload.path", "+model.path"])
def test_a_path_may_begin_at_home(key: str) -> None:
    (argument,) = quote_free_text([f"{key}=~/it's (new)"])
    assert OverridesParser.create().parse_override(argument).value() == "~/it's (new)"


@pytest.mark.parametrize("argument", [
    "workload.prompt=null", "workload.prompt=", "workload.prompt='a, b'", 'workload.prompt="a"', "workload.prompt",
    "workload.prompt='it\\'s'", "model.path=${oc.env:HOME}/x", "workload.generate=2", "kv.page_size=1,16", "--cfg",
])  # fmt: skip
def test_what_is_left_alone(argument: str) -> None:
    assert quote_free_text([argument]) == [argument]


def test_a_sweep_over_prompts() -> None:
    arguments = ["-m", "workload.prompt=a,b"]
    assert quote_free_text(arguments) == arguments


@pytest.mark.parametrize(
    ("typed", "values"),
    [
        ("[backend=triton]", [["backend=triton"]]),
        ("[backend=fa3, kv.page_size=1]", [["backend=fa3", "kv.page_size=1"]]),
        ("[cuda_graph.batch_sizes=[1,2],seed=3]", [["cuda_graph.batch_sizes=[1,2]", "seed=3"]]),
        ("['kv.page_size=1',backend=fa3]", [["kv.page_size=1", "backend=fa3"]]),
        ("[]", [[]]),
        ("[backend=fa3],[backend=triton]", [["backend=fa3"], ["backend=triton"]]),
    ],
)
def test_overrides_in_a_list_are_typed_as_they_are(typed: str, values: list[list[str]]) -> None:
    """In a sweep too, where a comma outside the brackets parts values."""
    *rest, argument = quote_free_text(["-m", f"measure.against={typed}"])
    override = OverridesParser.create().parse_override(argument)
    choices = list(override.sweep_string_iterator()) if override.is_sweep_override() else [typed]
    for choice, elements in zip(choices, values, strict=True):
        (argument,) = quote_free_text([f"measure.against={choice}"])
        assert OverridesParser.create().parse_override(argument).value() == elements
    assert rest == ["-m"]


@pytest.mark.parametrize(
    "argument", ["kv.page_size=[a=b]", "measure.against=", "measure.against=[a,b]", "-m"]
)
def test_other_arguments_are_left_alone(argument: str) -> None:
    assert quote_free_text([argument]) == [argument]


@pytest.mark.parametrize(
    "folder",
    [
        "sweep",
        "outputs/my sweep",
        "outputs/s 3, x",
        "a=b",
        "[a",
        "it's",
        'a "b" \\',
        "x$y",
        "1",
        "range(3)",
        "é(1)",
    ],
)
def test_a_folder_is_read_by_shell_and_grammar_as_it_is(folder: str) -> None:
    (typed,) = shlex.split(for_shell("hydra.sweep.dir", folder))
    (read,) = OverridesParser.create().parse_overrides([typed])
    value = read.value()
    assert not read.is_sweep_override()
    assert (value.text if isinstance(value, QuotedString) else str(value)) == folder


def test_what_needs_no_quotes_has_none() -> None:
    assert for_shell("hydra.sweep.dir", "outputs/a/b-1") == "hydra.sweep.dir=outputs/a/b-1"


@pytest.mark.parametrize(
    ("written", "said"), [("2024_01", True), ("1.10", True), ("1e3", True), ("'1e3'", False), ("v1", False)]
)
def test_a_study_that_yaml_reads_as_a_number_is_told(written: str, said: bool, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text(f"# @package _global_\nstudy: {written}\nkv:\n  page_size: 4\n")
    sources = [{"path": "", "schema": "structured"}, {"path": str(tmp_path), "schema": "file"}]
    runtime = {"choices": {"experiment": "mine"}, "config_sources": sources}
    problem = number_for_text(OmegaConf.create({"hydra": {"runtime": runtime}}))
    expected = f"study: {written} in {file} is no text to YAML; put it in quotes there: study: '{written}'"
    assert problem == (expected if said else None)
    runtime["choices"] = {"experiment": None}
    assert number_for_text(OmegaConf.create({"hydra": {"runtime": runtime}})) is None


ODD_PATHS = (
    "/data/my model",
    "é/ü",
    "a=b",
    "x, y",
    "it's",
    "[1",
    "{a",
    "#1",
    "a & b",
    "f (1)",
    "~/m",
    "a(",
    "007",
    "???",
)


@pytest.mark.parametrize("key", ["model.path", "workload.path", "hydra.run.dir", "+model.path"])
@pytest.mark.parametrize("path", ODD_PATHS)
def test_a_path_is_what_was_typed(key: str, path: str) -> None:
    (argument,) = quote_free_text([f"{key}={path}"])
    assert OverridesParser.create().parse_override(argument).value() == path


def test_a_path_keeps_quotes_null_and_interpolations() -> None:
    typed = ["model.path=null", "model.path='a b'", "hydra.run.dir=outputs/${study}", "model.path=pkg://a/b"]
    assert quote_free_text(typed) == typed


@pytest.mark.parametrize("key", ["model.path", "+workload.path", "study"])
@pytest.mark.parametrize("path", [path for path in ODD_PATHS if "," not in path and path not in ("???",)])
def test_a_sweep_over_odd_paths(key: str, path: str) -> None:
    assert read(f"{key}={path}") == [path]
    assert read(f"{key}={path}, plain ,'x, y'") == [path, "plain", "x, y"]


def test_bytes_that_are_no_utf8_are_told() -> None:
    path = os.fsdecode(b"model.path=/d/\xff")
    assert not_utf8(["seed=1", path]) == (
        "model.path=/d/\\xff: is no UTF-8, which rows and files are in; give it in UTF-8, or another name"
    )
    assert not_utf8(["model.path=\u00fc", os.fsdecode(b"workload.prompt=\xff")]) is None
