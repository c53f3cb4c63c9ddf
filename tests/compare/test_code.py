"""Rows of different code: what is compared, what is refused, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fa_research.compare import compare
from fa_research.compare.__main__ import main
from fa_research.compare.overview import read_sweep
from fa_research.compare.wording import regret_summary, summary
from fa_research.errors import ConfigError
from fa_research.tracking import CONSOLE, ROWS_FILE, Row, Status
from tests.compare.results import H200, METRIC, config_of, noisy, row_of, write_rows, write_sweep


def code(measure: str = "1", **plugins: str) -> dict[str, Any]:
    """The facts of a row whose package has this digest of `measure`."""
    found: dict[str, Any] = {"package": f"p{measure}", "parts": {"backends": "b", "measure": measure}}
    return H200 | {"code": found | ({"plugins": plugins} if plugins else {})}


def made(
    backend: str, time: float, facts: dict[str, Any], page: int = 1, minute: int = 0, **more: Any
) -> Row:
    finished = f"2026-01-01T00:{minute:02}:00.000+00:00"
    samples = noisy(time, seed=minute)
    return row_of(config_of(backend, page=page), samples, environment=facts, finished=finished, **more)


def best_of(found: Any) -> list[tuple[str, ...]]:
    return [verdict.best for verdict in found.verdicts]


def test_rows_of_another_package_are_not_compared_and_what_differs_is_named(tmp_path: Path) -> None:
    a = write_rows(tmp_path / "a" / ROWS_FILE, made("torch", 2.0, code("1")))
    b = write_rows(tmp_path / "b" / ROWS_FILE, made("triton", 1.0, code("2")))
    with pytest.raises(ConfigError, match=r"code.package \(p1 and p2, which differ in measure\); --across"):
        compare([a, b], "backend")
    found = compare([a, b], "backend", across=True)
    said = (
        "made by different code, so backend alone does not explain their differences: code.package (p1 and p2"
    )
    assert said in summary(found)[0] and said in regret_summary(found)
    assert any("put together: code.package (p1 and p2" in note for note in found.notes)
    with CONSOLE.capture() as screen:
        assert main([str(a), str(b), "-q", "backend", "--across"]) == 0
    assert "different code" in screen.get()


@pytest.mark.parametrize("question", ["code.package", "environment.code.parts.measure", "environment.code"])
def test_code_that_is_asked_about_needs_no_across(tmp_path: Path, question: str) -> None:
    rows = [made("torch", 2.0, code("1")), made("torch", 1.0, code("2"), minute=1)]
    files = [write_rows(tmp_path / row.finished / ROWS_FILE, row) for row in rows]
    found = compare(files, question)
    assert len(found.cells[0].measured) == 2
    assert "different code" not in " ".join(summary(found))


def test_two_commits_of_one_code_are_compared(tmp_path: Path) -> None:
    """As where a README was edited between them."""
    rows = [made(name, 1.0, code() | {"git_commit": name, "git_dirty": True}) for name in ("torch", "triton")]
    found = compare(
        [write_rows(tmp_path / row.config["backend"]["name"] / ROWS_FILE, row) for row in rows], "backend"
    )
    assert found.mixed_code == "" and found.notes == []


def test_the_latest_version_of_a_plugin_is_compared_with_rows_that_did_not_use_it(tmp_path: Path) -> None:
    rows = [
        made("torch", 2.0, code()),
        made("mine", 1.0, code(mine="v1"), minute=1),
        made("mine", 3.0, code(mine="v2"), minute=2),
    ]
    files = [write_rows(tmp_path / row.finished / ROWS_FILE, row) for row in rows]
    found = compare(files, "backend")
    assert best_of(found) == [("torch",)]
    assert any("1 row has no other" in note for note in found.notes)
    versions = compare(files, "environment.code.plugins.mine")
    assert best_of(versions) == [("v1",)]


def test_versions_of_a_plugin_are_not_compared_where_something_else_is_asked(tmp_path: Path) -> None:
    rows = [
        made("mine", 1.0, code(mine="v1"), page=1),
        made("mine", 2.0, code(mine="v2"), page=16, minute=1),
    ]
    files = [write_rows(tmp_path / row.finished / ROWS_FILE, row) for row in rows]
    with pytest.raises(ConfigError, match=r"code.plugins.mine \(v1 and v2\)"):
        compare(files, "page_size")


@pytest.mark.parametrize("status", [Status.ok, Status.inaccurate])
def test_in_a_sweep_that_went_on_with_changed_code_the_latest_rows_count(
    tmp_path: Path, status: Status
) -> None:
    """The code that was fast is no more."""
    old = [made("torch", 2.0, code()), made("mine", 1.0, code(mine="v1"))]
    write_sweep(tmp_path, *((row, row.samples.get(METRIC, ())) for row in old))
    new = made("mine", 4.0, code(mine="v2"), minute=1, status=status)
    write_rows(tmp_path / "1" / ROWS_FILE, new)
    (tmp_path / ROWS_FILE).unlink()
    write_rows(tmp_path / ROWS_FILE, old[0], new)
    found = compare([tmp_path], "backend")
    assert best_of(found) == [("torch",)]
    (part,) = read_sweep(tmp_path).parts
    assert [len(cell.entries) for cell in part.asked[0].cells] == [2]
    assert best_of(part.asked[0]) == [("torch",)]


def test_rows_that_were_made_before_fingerprints_are_read_and_told_apart(tmp_path: Path) -> None:
    old = H200 | {"git_commit": "abc"}
    a = write_rows(tmp_path / "a" / ROWS_FILE, made("torch", 2.0, old), made("flex", 1.0, old))
    b = write_rows(tmp_path / "b" / ROWS_FILE, made("triton", 1.0, code()))
    assert best_of(compare([a], "backend")) == [("flex",)]
    with pytest.raises(ConfigError, match=r"code.package \(made before fingerprints and p1\)"):
        compare([a, b], "backend")


def test_a_sweep_key_that_a_row_lacks_is_not_worth_a_note(tmp_path: Path) -> None:
    rows = [made(name, 1.0, code()) for name in ("torch", "triton")]
    for row in rows:
        del row.config["sweep"]["keep_stale"], row.config["tracking"]["tags"]
    assert compare([write_rows(tmp_path / ROWS_FILE, *rows)], "backend").notes == []
