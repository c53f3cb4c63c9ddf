"""`workload=generate` writes the text that `workload=text` writes; its times come with it, and its check repeats it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fa_research import workloads
from fa_research.config import (
    Config,
    CudaGraphConfig,
    Device,
    GenerateWorkload,
    GraphMode,
    Level,
    MeasureConfig,
    SamplingConfig,
    TextWorkload,
)
from fa_research.config.sizes import least_work
from fa_research.engine.decode import DecodeRunner
from fa_research.errors import ConfigError
from fa_research.tracking import Row, Status
from fa_research.workloads.generate import Generate
from fa_research.workloads.text import Text
from tests.measure.broken import WrongScale, install
from tests.test_runner import run
from tests.workloads.cells import build, cell, prepared

OPTIONS = GenerateWorkload(prompt="def main(", generate=20, chunk_size=4)
TIMES = {"ttft_us", "itl_us", "itl_p10_us", "itl_p90_us", "itl_count", "decode_tokens_per_s"}
NUCLEUS = SamplingConfig(temperature=1.0, top_p=0.9, seed=5)


def cell_of(**changes: Any) -> Config:
    """Options of the workload, and groups of the config, which are dataclasses."""
    groups = {name: value for name, value in changes.items() if dataclasses.is_dataclass(value)}
    options = {name: value for name, value in changes.items() if name not in groups}
    return cell(dataclasses.replace(OPTIONS, **options), **groups)  # type: ignore[arg-type]


def written(config: Config) -> Generate:
    workload, _ = prepared(config)
    assert isinstance(workload, Generate)
    list(workload.generation.text())
    return workload


@pytest.mark.parametrize("sampling", [SamplingConfig(), NUCLEUS], ids=["greedy", "nucleus"])
@pytest.mark.parametrize("mode", [GraphMode.off, GraphMode.simulate])
def test_the_text_is_that_of_workload_text(sampling: SamplingConfig, mode: GraphMode) -> None:
    graph = CudaGraphConfig(mode, [1, 2])
    options = TextWorkload(
        prompt_len=23, shared_prefix_len=5, chunk_size=4, steps=2, generate=20, prompt="def main("
    )
    text, engine = build(cell(options, sampling=sampling, cuda_graph=graph))
    assert isinstance(text, Text)
    tokens = list(text.generation(engine).tokens())
    assert written(cell_of(sampling=sampling, cuda_graph=graph)).generation.written == tokens
    assert len(set(tokens)) > 3


def test_the_row_has_the_text_and_its_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = run(cell_of(), tmp_path)
    assert row.status is Status.ok and row.metrics.keys() >= TIMES
    assert row.generated["prompt"] == "def main(" and row.generated["text"]
    named = ("prompt_tokens", "generated_tokens", "finish_reason", "itl_count", "timing_method")
    assert [row.metrics[name] for name in named] == [9, 20, "length", 19, "perf_counter"]
    gaps = row.samples["itl_us"]
    assert len(gaps) == 19 and row.metrics["decode_tokens_per_s"] == pytest.approx(19e6 / sum(gaps), rel=1e-3)
    assert row.metrics["ttft_us"] > 0 and not {"ttft_p10_us", "ttft_count"} & set(row.metrics)
    assert row.checks["logits_passed"] and row.checks["reprefill_passed"]
    assert not [note for note in row.notes if "decoded the text again" in note]


def test_no_step_and_no_capture_is_in_the_time_to_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner of the steps is made before the clock starts, and the first token is read before a step."""
    calls: list[str] = []
    for name in ("__init__", "step"):
        monkeypatch.setattr(DecodeRunner, name, noted(getattr(DecodeRunner, name), name, calls))
    workload, _ = prepared(cell_of(measure=MeasureConfig(warmup=3)))
    assert isinstance(workload, Generate)
    assert calls == ["__init__", "step", "step"], "three tokens were written to warm up"
    assert workload.generation.ahead is False
    tokens = workload.generation.tokens()
    next(tokens)
    assert len(calls) == 3 and len(workload.generation.arrived_ns) == 1


def noted(call: Any, name: str, calls: list[str]) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return call(*args, **kwargs)

    return wrapped


def test_one_token_has_no_gap(tmp_path: Path) -> None:
    row = run(cell_of(generate=1), tmp_path)
    assert row.status is Status.ok and row.metrics["generated_tokens"] == 1
    assert TIMES & row.metrics.keys() == {"ttft_us"}


def test_a_text_that_the_model_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = written(cell_of()).generation.written
    end = next(token for i, token in enumerate(whole) if i > 2 and token not in whole[:i])
    monkeypatch.setattr("fa_research.models.tokenizer.ByteTokenizer.__init__", ending_with(end))
    row = run(cell_of(), tmp_path)
    count = whole.index(end) + 1
    assert (row.metrics["finish_reason"], row.metrics["generated_tokens"]) == ("eos", count)
    assert row.status is Status.ok and row.metrics["itl_count"] == count - 1


def ending_with(token: int) -> Any:
    def init(self: Any, eos: frozenset[int] = frozenset()) -> None:
        self.leading_ids, self.eos = [], frozenset({token})

    return init


def test_the_check_repeats_what_was_written() -> None:
    """Also where a token was drawn that is not the likeliest; everything is given back to the cache."""
    workload = written(cell_of(sampling=NUCLEUS))
    (done,), (case,) = workload.checked_passes()
    text = [*workload.prompt, *workload.generation.written]
    assert case.tokens_T.tolist() == text[:-1] and case.at_M.tolist() == list(range(8, 28))
    assert case.logits_MX.shape == (20, 256) and done.seq_lens == [28]
    assert case.logits_MX.argmax(-1).tolist() != workload.generation.written
    assert workload.engine.cache.allocator.pages_used == 0 and not workload.engine.cache.requests


def test_of_a_long_text_some_tokens_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fa_research.workloads.generate._CHECKED_TOKENS", 3)
    _, (case,) = written(cell_of()).checked_passes()
    assert case.at_M.tolist() == [8, 18, 27] and len(case.logits_MX) == 3
    assert run(cell_of(), tmp_path).status is Status.ok


def test_a_wrong_text_has_no_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, WrongScale)
    row = run(cell_of(), tmp_path)
    assert row.status is Status.inaccurate and row.generated["text"] and not TIMES & row.metrics.keys()


def test_an_unchecked_text_says_so(tmp_path: Path) -> None:
    row = run(cell_of(measure=MeasureConfig(check=False, warmup=0)), tmp_path)
    assert row.status is Status.ok and row.checks == {} and row.metrics.keys() >= TIMES
    assert "not checked against the oracle: measure.check=false" in row.notes


def test_a_prompt_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "a prompt").write_bytes("é = 1\n".encode())
    row = run(cell_of(prompt_file=str(tmp_path / "a prompt")), tmp_path / "out")
    assert row.generated["prompt"] == "é = 1\n" and row.metrics["prompt_tokens"] == 7


@pytest.mark.parametrize(("name", "said"), [
    ("nowhere", "workload.prompt_file=.*nowhere: cannot be read: No such file or directory"),
    ("", "workload.prompt_file=.*: cannot be read: Is a directory"),
    ("empty", "workload.prompt_file=.*empty is empty; give some text"),
    ("long", "workload.prompt_file=.*long of 120 tokens [+] workload.generate=20 = 140 tokens: must be at most "
     "model.max_context_len=128"),
])  # fmt: skip
def test_files_that_are_no_prompt(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "long").write_text("x" * 120)
    with pytest.raises(ConfigError, match=said):
        build(cell_of(prompt_file=str(tmp_path / name)))


@pytest.mark.parametrize(("changes", "said"), [
    ({"level": Level.attention}, "workload.level=attention: the attention path alone writes no text"),
    ({"prompt": None}, "workload.prompt=null: give a prompt, or the file of one in workload.prompt_file"),
    ({"generate": 0}, "workload.generate=0: must be at least 1"),
    ({"chunk_size": 0}, "workload.chunk_size=0: must be at least 1"),
    ({"generate": 128}, "workload.generate=128 [+] 1 = 129 tokens: must be at most model.max_context_len=128"),
])  # fmt: skip
def test_what_cannot_be_asked(changes: dict[str, Any], said: str) -> None:
    level = changes.pop("level", Level.model)
    with pytest.raises(ConfigError, match=said):
        cell(dataclasses.replace(OPTIONS, **changes), level)


def test_the_least_that_it_takes() -> None:
    config = cell_of(prompt="x")
    needs, work = workloads.create(config).needs(), least_work(config)
    assert work is not None and (work.requests, work.longest) == (1, 20) and needs.seq_lens == (20,)
    assert work.pages == needs.pages(config.kv.page_size)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [GraphMode.off, GraphMode.on])
@pytest.mark.parametrize("sampling", [SamplingConfig(), NUCLEUS], ids=["greedy", "nucleus"])
def test_on_a_gpu(mode: GraphMode, sampling: SamplingConfig, tmp_path: Path) -> None:
    """A step ahead of the host, captured or not: the same tokens, checked."""
    config = cell_of(
        sampling=sampling, cuda_graph=CudaGraphConfig(mode, [1, 2]), measure=MeasureConfig(self_test=False)
    )
    config.device, config.backend.name = Device.cuda, "triton"
    workload = written(config)
    assert workload.generation.ahead and len(workload.generation.written) == 20
    tokens = list(workload.generation.written)
    assert list(workload.generation.tokens()) == tokens
    row: Row = run(config, tmp_path)
    assert row.status is Status.ok and row.metrics.keys() >= TIMES
    assert not [note for note in row.notes if "decoded the text again" in note]
