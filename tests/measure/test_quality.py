"""Quality of real text: the cross entropy of transformers, the same by prefill and by decode steps, worse where a
backend is wrong."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fa_research.attention.call import AttentionCall, AttentionOutput
from fa_research.config import (
    Config,
    CudaGraphConfig,
    Dtype,
    GraphMode,
    KVConfig,
    MaskConfig,
    ModelConfig,
    SamplingConfig,
    TextWorkload,
)
from fa_research.config.checkpoint import take_from_folder
from fa_research.errors import Refusal
from fa_research.measure.quality import measure_quality, not_finite
from fa_research.workloads.text import Text
from tests.measure.broken import (
    FirstTableForAll,
    NaNInLastRow,
    PrefillIsZero,
    Right,
    install,
)
from tests.models.checkpoints import PEERS, Peer, save, save_tokenizer, transformers
from tests.workloads.cells import build, cell, model_config, prepared, text_file

OPTIONS = TextWorkload(batch_size=3, prompt_len=41, shared_prefix_len=19, chunk_size=7, steps=5)


def quality_of(config: Config) -> tuple[dict[str, float], Text]:
    workload, engine = prepared(config)
    assert isinstance(workload, Text)
    return measure_quality(engine, workload), workload


def cell_of(folder: Path, text: Path, dtype: Dtype = Dtype.auto, **changes: Any) -> Config:
    options = {f.name: changes.pop(f.name) for f in dataclasses.fields(TextWorkload) if f.name in changes}
    model = take_from_folder(ModelConfig(path=str(folder), dtype=dtype))
    return cell(dataclasses.replace(OPTIONS, path=str(text), **options), model=model, **changes)


def nats_of(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """Of each token but the first, by the logits of transformers."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        return F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none").double()


@pytest.mark.parametrize("shared", [0, 1, 19, 40])
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("tokenizer", [False, True])
def test_it_is_the_cross_entropy_of_transformers(
    shared: int, page_size: int, tokenizer: bool, tmp_path: Path
) -> None:
    """The shared prefix counts once; the tokenizer's own first token counts neither as a target nor as bytes."""
    folder, text = tmp_path / "model", text_file(tmp_path)
    theirs = save(PEERS["qwen2-window"], folder, vocab_size=300)
    if tokenizer:
        save_tokenizer(folder)
    columns, workload = quality_of(cell_of(folder, text, shared_prefix_len=shared, page_size=page_size))
    nats = [nats_of(theirs, passage.tokens) for passage in workload.passages]
    sizes = [torch.tensor(passage.num_bytes[1:]) for passage in workload.passages]
    own = [slice(max(0, shared - 1) if i else 0, 41 - 1 + 1) for i in range(3)]
    total = sum(n[s].sum() for n, s in zip(nats, own, strict=True))
    num_bytes = sum(n[s].sum() for n, s in zip(sizes, own, strict=True))
    count = sum(len(n[s]) for n, s in zip(nats, own, strict=True))
    assert columns["scored_tokens"] == count
    assert columns["bits_per_byte"] == pytest.approx(float(total / num_bytes / math.log(2)), rel=1e-5)
    assert columns["oracle_bits_per_byte"] == pytest.approx(columns["bits_per_byte"], rel=1e-5)
    assert columns["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert columns["top1_agreement"] == columns["decode_top1_agreement"] == 1.0
    decoded, decoded_bytes = torch.cat([n[41:] for n in nats]), torch.cat([n[41:] for n in sizes])
    assert columns["decode_scored_tokens"] == len(decoded) == 15
    expected = float(decoded.sum() / decoded_bytes.sum() / math.log(2))
    assert columns["decode_bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert columns["decode_oracle_bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    if not tokenizer:
        assert int(num_bytes) == count


@pytest.mark.parametrize("mask", [MaskConfig(), MaskConfig("sliding_window", 6), MaskConfig("chunked", 8)])
@pytest.mark.parametrize("mode", [GraphMode.off, GraphMode.simulate])
@pytest.mark.parametrize("page_size", [1, 16])
def test_decode_steps_score_what_a_prefill_scores(
    mask: MaskConfig, mode: GraphMode, page_size: int, tmp_path: Path
) -> None:
    """Prompts of 30 tokens and 11 decode steps against prompts of 41."""
    text = str(text_file(tmp_path))
    model = model_config(mask=mask, sink=True, vocab_size=260)
    runs = {}
    for steps in (11, 1):
        options = dataclasses.replace(OPTIONS, path=text, prompt_len=41 - steps + (steps == 1), steps=steps)
        config = cell(options, model=model, kv=KVConfig(page_size), cuda_graph=CudaGraphConfig(mode, [1, 4]))
        runs[steps], _ = quality_of(config)
    short, long = runs[11], runs[1]
    assert short["scored_tokens"] + short["decode_scored_tokens"] == long["scored_tokens"]
    parts = [short[f"{part}bits_per_byte"] * short[f"{part}scored_tokens"] for part in ("", "decode_")]
    assert sum(parts) == pytest.approx(long["bits_per_byte"] * long["scored_tokens"], rel=1e-6)
    assert parts[1] / 33 != pytest.approx(short["bits_per_byte"], rel=1e-3)
    assert short["top1_agreement"] == short["decode_top1_agreement"] == long["top1_agreement"] == 1.0


def test_pieces_of_logits_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dataclasses.replace(OPTIONS, path=str(text_file(tmp_path)))
    whole, _ = quality_of(cell(options))
    monkeypatch.setattr("fa_research.measure.quality._ROWS", 3)
    assert quality_of(cell(options))[0] == pytest.approx(whole)


@pytest.mark.parametrize("front", [[], [7], [7, 8], [7, 8, 9]])
def test_tokens_before_the_text_are_not_predicted(front: list[int], tmp_path: Path) -> None:
    """Of 41 tokens and the one after them all but the first are scored, and none of the tokenizer's own."""
    config = cell(dataclasses.replace(OPTIONS, path=str(text_file(tmp_path)), batch_size=1))
    workload, engine = build(config)
    assert isinstance(workload, Text)
    workload.tokenizer.leading_ids = front
    del workload.__dict__["passages"]  # read again, with it
    workload.prepare(engine)
    assert measure_quality(engine, workload)["scored_tokens"] == 42 - max(1, len(front))


def test_sampling_changes_nothing(tmp_path: Path) -> None:
    """The text's own tokens are fed, whatever a step would draw."""
    options = dataclasses.replace(OPTIONS, path=str(text_file(tmp_path)))
    greedy, _ = quality_of(cell(options))
    drawn, workload = quality_of(cell(options, sampling=SamplingConfig(temperature=50.0)))
    assert drawn == greedy and workload.decoder.sampling


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with a model that has learnt to count, and the text that it counts in."""
    folder = tmp_path_factory.mktemp("trained")
    text = text_file(folder, 20_000)
    torch.manual_seed(0)
    changes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    peer = Peer("Llama", changes | {"num_key_value_heads": 2, "vocab_size": 256})
    model = peer.make()
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if "norm" in name else 0.0, 0.0 if "norm" in name else 0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    data = torch.tensor(list(text.read_bytes()))
    for _ in range(150):
        starts = torch.randint(len(data) - 80, (16,))
        ids = torch.stack([data[start : start + 80] for start in starts.tolist()])
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1.0, loss
    model.eval().save_pretrained(folder / "model")
    return folder / "model", text


def test_a_trained_model_predicts_its_text(
    trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, Right)
    columns, _ = quality_of(cell_of(*trained))
    assert 0 < columns["bits_per_byte"] < 2.0 and 0 < columns["decode_bits_per_byte"] < 1.5
    assert columns["top1_agreement"] == columns["decode_top1_agreement"] == 1.0
    low, _ = quality_of(cell_of(*trained, dtype=Dtype.bfloat16))
    assert low["oracle_bits_per_byte"] == pytest.approx(columns["bits_per_byte"], rel=0.02)
    assert low["bits_per_byte"] != low["oracle_bits_per_byte"]
    assert 0.9 < low["top1_agreement"] <= 1.0


def test_the_oracle_is_the_same_weights_in_float32(trained: tuple[Path, Path]) -> None:
    """Of a bfloat16 model: its rounded weights (norms are not), with everything computed in float32."""
    columns, workload = quality_of(cell_of(*trained, dtype=Dtype.bfloat16, batch_size=1))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(trained[0])
    for name, weight in theirs.named_parameters():
        weight.data = weight.data if "norm" in name else weight.data.bfloat16().float()
    nats = nats_of(theirs, workload.passages[0].tokens)
    expected = float(nats[:41].mean()) / math.log(2), float(nats[41:].mean()) / math.log(2)
    found = columns["oracle_bits_per_byte"], columns["decode_oracle_bits_per_byte"]
    assert found == pytest.approx(expected, rel=1e-5)
    assert columns["bits_per_byte"] != pytest.approx(expected[0], rel=1e-5)


class DecodeIsZero(Right):
    """The prefill is right."""

    def attend(self, call: AttentionCall) -> AttentionOutput:
        out, lse = super().attend(call)
        return out * (call.metadata.q_len != 1), lse


@pytest.mark.parametrize(("mistake", "prefill", "decode"), [
    (FirstTableForAll, True, True), (PrefillIsZero, True, True), (DecodeIsZero, False, True),
])  # fmt: skip
def test_a_wrong_backend_predicts_worse(
    mistake: type[Right],
    prefill: bool,
    decode: bool,
    trained: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, mistake)
    columns, _ = quality_of(cell_of(*trained))
    for wrong, prefix in ((prefill, ""), (decode, "decode_")):
        cost = columns[f"{prefix}bits_per_byte"] / columns[f"{prefix}oracle_bits_per_byte"]
        assert cost > 1.2 if wrong else cost == pytest.approx(1, rel=1e-5)
        assert (columns[f"{prefix}top1_agreement"] < 0.97) is wrong


def test_nan_is_no_number(trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, NaNInLastRow)
    columns, _ = quality_of(cell_of(*trained))
    assert math.isnan(columns["bits_per_byte"]) and math.isnan(columns["perplexity"])
    assert columns["top1_agreement"] < 1 and math.isfinite(columns["oracle_bits_per_byte"])


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "page_size"), [("triton", 16), ("fa3", 1), ("fa2", 256)])
def test_on_a_gpu_it_is_what_float32_says(backend: str, page_size: int, trained: tuple[Path, Path]) -> None:
    """bfloat16 through kernels and captured steps: a little worse or better, the same tokens but for near ties."""
    try:
        columns, _ = quality_of(cell_of(*trained, device="cuda", backend=backend, page_size=page_size))
    except Refusal as refusal:
        pytest.skip(str(refusal))
    for prefix in ("", "decode_"):
        expected = columns[f"{prefix}oracle_bits_per_byte"]
        assert columns[f"{prefix}bits_per_byte"] == pytest.approx(expected, rel=0.02)
        assert columns[f"{prefix}top1_agreement"] >= 0.9


@pytest.mark.gpu
def test_float32_on_a_gpu_agrees_everywhere(trained: tuple[Path, Path]) -> None:
    columns, _ = quality_of(cell_of(*trained, dtype=Dtype.float32, device="cuda", backend="triton"))
    assert columns["top1_agreement"] == columns["decode_top1_agreement"] == 1.0
    here, _ = quality_of(cell_of(*trained))
    for name in ("bits_per_byte", "decode_bits_per_byte", "oracle_bits_per_byte"):
        assert columns[name] == pytest.approx(here[name], rel=1e-3)


def test_quality_that_is_not_finite_is_said() -> None:
    good = {"bits_per_byte": 1.0, "top1_agreement": 1.0, "perplexity": float("inf")}
    assert not_finite(good) == ""  # exp() overflows past 709 nats a token: bad, but a number
    for bad in ("nan", "inf"):
        assert f"decode_bits_per_byte={bad}" in not_finite(good | {"decode_bits_per_byte": float(bad)})
