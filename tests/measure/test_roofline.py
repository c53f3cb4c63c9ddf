"""The roof on disk: only what is whole, young and of this very GPU is believed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fa_research.config import L2State
from fa_research.measure.roofline import Roof, _byte_rates, cache_folder, read_roof, write_roof
from fa_research.measure.timing import Timer

IDENTITY = {
    "gpu": "NVIDIA H200",
    "uuid": "b5f3",
    "driver": "570.1",
    "torch": "2.11.0",
    "dtype": "torch.bfloat16",
}
TODAY = date(2026, 3, 1)
ROOF = Roof(4.1e12, 4.4e12, 7.4e14, TODAY.isoformat())


def test_what_is_kept_is_read(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "roof.json"
    write_roof(place, IDENTITY, ROOF)
    assert read_roof(place, IDENTITY, TODAY) == Roof(4.1e12, 4.4e12, 7.4e14, "2026-03-01", cached=True)
    assert [path.name for path in place.parent.iterdir()] == ["roof.json"]


@pytest.mark.parametrize("key", IDENTITY)
def test_of_something_else_it_is_not(tmp_path: Path, key: str) -> None:
    write_roof(place := tmp_path / "roof.json", IDENTITY, ROOF)
    assert read_roof(place, IDENTITY | {key: "another"}, TODAY) is None


@pytest.mark.parametrize(("days", "believed"), [(-1, False), (0, True), (30, True), (31, False)])
def test_it_grows_stale(tmp_path: Path, days: int, believed: bool) -> None:
    write_roof(place := tmp_path / "roof.json", IDENTITY, ROOF)
    found = read_roof(place, IDENTITY, TODAY + timedelta(days=days))
    assert (found is not None) == believed


def change(**values: Any) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | values)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:30],
        lambda text: "",
        lambda text: "[]",
        lambda text: "null",
        lambda text: "\x00\x01",
        change(copy_bytes_per_s=0),
        change(read_bytes_per_s=-1),
        change(flops_per_s="fast"),
        change(flops_per_s=float("nan")),
        change(measured="yesterday"),
        change(measured=5),
        change(identity=None),
        change(read_bytes_per_s=None),
    ],
)
def test_damaged_it_is_measured_again(tmp_path: Path, damage: Callable[[str], str]) -> None:
    write_roof(place := tmp_path / "roof.json", IDENTITY, ROOF)
    place.write_text(damage(place.read_text()))
    assert read_roof(place, IDENTITY, TODAY) is None
    assert read_roof(tmp_path / "none.json", IDENTITY, TODAY) is None


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "roof.json").write_bytes(b"\xff\xfe{")
    assert read_roof(tmp_path / "roof.json", IDENTITY, TODAY) is None


def test_a_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    write_roof(tmp_path / "file" / "roof.json", IDENTITY, ROOF)
    assert "was not kept" in caplog.text


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fa_research"
    for ignored in ("", "relative"):  # as the XDG specification says
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        monkeypatch.setenv("HOME", "/home/someone")
        assert cache_folder() == Path("/home/someone/.cache/fa_research")


def test_a_file_of_an_older_format_is_not_believed(tmp_path: Path) -> None:
    write_roof(place := tmp_path / "roof.json", IDENTITY | {"format": 1}, ROOF)
    assert read_roof(place, IDENTITY | {"format": 2}, TODAY) is None
    data = json.loads(place.read_text())
    data["bytes_per_s"] = data.pop("copy_bytes_per_s")
    place.write_text(json.dumps(data))
    assert read_roof(place, IDENTITY | {"format": 1}, TODAY) is None


def test_a_copy_counts_both_ways_and_a_read_one() -> None:
    """Timed here as on a GPU; with a clock that says 1, 4 and 2 us, 1 MiB is 2, 0.25 and 0.5 MiB a microsecond."""
    device, num_bytes = torch.device("cpu"), 1 << 20
    timer = Timer(device, warmup=1, max_seconds=1.0, l2=L2State.warm)
    assert all(math.isfinite(rate) and rate > 0 for rate in _byte_rates(timer, device, num_bytes))
    clock = iter((1.0, 4.0, 2.0))
    told = SimpleNamespace(time=lambda run, samples: SimpleNamespace(median_us=next(clock), run=run()))
    rates = _byte_rates(told, device, num_bytes)  # type: ignore[arg-type]
    assert rates == pytest.approx((2 * num_bytes * 1e6, num_bytes / 2 * 1e6))


def test_fractions() -> None:
    roof = Roof(0.9e12, 1e12, 2e12)
    assert roof.bytes_per_s == Roof(1e12, 0.9e12, 2e12).bytes_per_s == 1e12
    assert roof.fraction(1_000_000, 1_000_000, 1.0) == pytest.approx(1.0)  # bytes decide
    assert roof.fraction(1_000_000, 4_000_000, 4.0) == pytest.approx(0.5)  # operations do
