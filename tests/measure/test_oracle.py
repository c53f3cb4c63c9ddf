"""The oracle: right where the engine is right, and not to be deceived by a backend with a mistake."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from fa_research.attention.reference import attention
from fa_research.backends.torch_backend import TorchBackend
from fa_research.config import Dtype, Level, MaskConfig, MixedWorkload
from fa_research.engine.engine import Engine
from fa_research.kv_cache import TokenToKVPool
from fa_research.masks import Causal, Chunked, SlidingWindow
from fa_research.measure.cell import check
from fa_research.measure.oracle import (
    OracleAttention,
    case_logits,
    compare_logits,
    reprefill,
    weights_as,
)
from fa_research.models import Decoder
from fa_research.workloads import Workload
from fa_research.workloads.base import Case
from tests.engine.lab import EXACT, Lab, WholeSequence, prompts_of
from tests.helpers import DEVICES, make_spec
from tests.measure.broken import (
    DropsLastKey,
    FirstTableForAll,
    HalvesLastRow,
    IgnoresMask,
    LastRowOff,
    LongPrefillMixesPages,
    NaNInLastRow,
    OneHeadOff,
    PrefillIsZero,
    Right,
    WindowOneWider,
    WrongScale,
    install,
)
from tests.workloads.cells import LEVELS, cell, model_config, prepared

WINDOW = MaskConfig("sliding_window", 6)
CHUNK = MaskConfig("chunked", 8)
CAUSAL = MaskConfig()
EACH_LEVEL = pytest.mark.parametrize("level", LEVELS, ids=str)
MISTAKES = [
    (DropsLastKey, CAUSAL, "decode"),
    (DropsLastKey, CAUSAL, "text"),
    (DropsLastKey, CHUNK, "decode"),
    (PrefillIsZero, CAUSAL, "text"),
    (WindowOneWider, WINDOW, "decode"),
    (WindowOneWider, WINDOW, "extend"),
    (IgnoresMask, CHUNK, "mixed"),
    (IgnoresMask, WINDOW, "text"),
    (WrongScale, CAUSAL, "decode"),
    (FirstTableForAll, CAUSAL, "mixed"),
    (FirstTableForAll, CAUSAL, "decode"),
    (NaNInLastRow, CAUSAL, "extend"),
    (LastRowOff, CAUSAL, "extend"),
    (LastRowOff, CAUSAL, "mixed"),
]


def strong(engine: Engine) -> None:
    """Random weights of the usual size make attention almost uniform, and a wrong scale all but invisible."""
    model = engine.runner.model
    if isinstance(model, Decoder):
        for layer in model.layers:
            layer.qkv *= 8


def checked(
    monkeypatch: pytest.MonkeyPatch,
    backend: type[TorchBackend],
    mask: MaskConfig,
    name: str,
    level: Level,
    **model: object,
) -> tuple[bool, dict[str, float], Engine, Workload]:
    install(monkeypatch, backend)
    workload, engine = prepared(cell(name, level, model=model_config(mask=mask, **model)))
    strong(engine)
    passed, columns = check(engine, workload)
    return passed, columns, engine, workload


@pytest.mark.parametrize(("backend", "mask", "name"), MISTAKES)
@EACH_LEVEL
def test_a_mistake_is_caught(
    monkeypatch: pytest.MonkeyPatch, backend: type[TorchBackend], mask: MaskConfig, name: str, level: Level
) -> None:
    passed, columns, _, _ = checked(monkeypatch, backend, mask, name, level)
    what = "attention" if level is Level.attention else "logits"
    assert not passed and columns[f"{what}_passed"] is False
    assert not columns[f"{what}_max_error"] <= columns[f"{what}_tolerance"]


@EACH_LEVEL
def test_where_a_result_is_off_is_said(monkeypatch: pytest.MonkeyPatch, level: Level) -> None:
    _, columns, engine, workload = checked(monkeypatch, NaNInLastRow, CAUSAL, "extend", level)
    if level is Level.model:
        assert "NaN" in columns["logits_fault"] and "result has" in columns["logits_fault"]
        assert re.match(
            r"worst at request \d+, position 13, vocabulary id 0: result nan", columns["logits_where"]
        )
        return
    slot = int(engine.runner.req_to_token_RW[workload.current_pass().rows[2], 13])
    assert columns["attention_where"].startswith(
        "worst at extend pass, request 2, position 13, layer 0, head 0, dim 0 "
        f"(the token is in page {slot // 16}, slot {slot % 16} of it): result nan"
    )
    assert "2 of " in columns["attention_where"] and "in 2 of 36 queries" in columns["attention_where"]


@pytest.mark.parametrize("workload", ["decode", "text"])
def test_the_first_layer_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch, workload: str) -> None:
    passed, columns, _, _ = checked(monkeypatch, OneHeadOff, CAUSAL, workload, Level.model)
    assert not passed
    said = columns["logits_where"]
    assert "wrong by itself, in a decode step, is that of layer 1, head 1: error" in said, said


def test_where_no_layer_is_wrong_by_itself_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests read the first one's pages, so one request alone is right."""
    passed, columns, _, _ = checked(monkeypatch, FirstTableForAll, CAUSAL, "decode", Level.model)
    assert not passed and "each layer's attention is right" in columns["logits_where"]


def test_logits_that_pass_float16_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Right)
    workload, engine = prepared(cell("decode", model=model_config(dtype=Dtype.float16)))
    assert isinstance(engine.runner.model, Decoder)
    with torch.no_grad():
        engine.runner.model.head *= 6e4 / engine.runner.model.head.abs().max().item()
    passed, columns = check(engine, workload)
    assert not passed and "baseline in float16 overflows" in columns["logits_fault"]


@pytest.mark.parametrize("mask", [CAUSAL, WINDOW, CHUNK])
@pytest.mark.parametrize("name", ["decode", "extend", "mixed", "text"])
@EACH_LEVEL
def test_what_is_right_passes(
    monkeypatch: pytest.MonkeyPatch, mask: MaskConfig, name: str, level: Level
) -> None:
    passed, columns, _, _ = checked(monkeypatch, Right, mask, name, level)
    assert passed, columns


@pytest.mark.parametrize("dtype", [Dtype.float16, Dtype.bfloat16])
@EACH_LEVEL
def test_low_precision_is_no_mistake_but_a_mistake_is_one_in_low_precision(
    monkeypatch: pytest.MonkeyPatch, dtype: Dtype, level: Level
) -> None:
    assert checked(monkeypatch, Right, CAUSAL, "decode", level, dtype=dtype)[0]
    assert not checked(monkeypatch, DropsLastKey, CAUSAL, "decode", level, dtype=dtype)[0]


@pytest.mark.parametrize(("backend", "passes"), [(Right, True), (HalvesLastRow, False)])
def test_a_query_over_many_keys_is_judged_apart_from_those_over_few(
    monkeypatch: pytest.MonkeyPatch, backend: type[TorchBackend], passes: bool
) -> None:
    """The first tokens of a prompt have outputs as large as a value; those of a decoding request are means of many."""
    install(monkeypatch, backend)
    options = MixedWorkload(extend_requests=1, new_len=9, decode_requests=1, context_len=1500)
    model = model_config(dtype=Dtype.bfloat16, max_context_len=2048)
    workload, engine = prepared(cell(options, Level.attention, model=model))
    assert check(engine, workload)[0] == passes


@pytest.mark.parametrize("name", ["decode", "extend", "mixed"])
@EACH_LEVEL
def test_keys_that_were_not_written_are_caught(
    monkeypatch: pytest.MonkeyPatch, name: str, level: Level
) -> None:
    def nothing(pool: TokenToKVPool, layer_id: int, *written: object) -> None:
        """Attention sees whatever was there: finite numbers, as if another token had the slot."""

    monkeypatch.setattr(TokenToKVPool, "write", nothing)
    monkeypatch.setattr(TokenToKVPool, "rope_and_write", nothing)
    assert not checked(monkeypatch, Right, CAUSAL, name, level)[0]


def test_the_reprefill_disagrees_with_a_decode_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    passed, columns, engine, workload = checked(monkeypatch, DropsLastKey, CAUSAL, "text", Level.model)
    assert not passed and columns["reprefill_max_difference"] > 1e-3
    assert columns["reprefill_passed"] and not columns["logits_passed"]
    _, cases = workload.checked_passes()
    pages = engine.cache.allocator.pages_used
    again = reprefill(engine, cases)
    assert engine.cache.allocator.pages_used == pages
    assert compare_logits(cases, again)["reprefill_max_difference"] > 1e-3
    same = [case.logits_MX for case in cases]
    assert compare_logits(cases, same) == {"reprefill_max_difference": 0.0, "reprefill_top1_agreement": 1.0}
    shifted = [logits.roll(1, -1) for logits in same]
    assert compare_logits(cases, shifted)["reprefill_top1_agreement"] == 0.0


def test_a_wrong_reprefill_is_caught_where_decode_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    passed, columns, _, _ = checked(monkeypatch, LongPrefillMixesPages, CAUSAL, "text", Level.model)
    assert not passed and columns["logits_passed"] and not columns["reprefill_passed"]


# The oracle's own arithmetic.


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(5), Chunked(8)])
@pytest.mark.parametrize("prefix_len", [0, 1, 16, 37])
def test_case_logits_are_those_of_the_whole_sequence(
    mask: Causal | SlidingWindow | Chunked, prefix_len: int, sink: bool
) -> None:
    """A prefix from the cache and new tokens give what one dense pass over everything gives."""
    lab = Lab(EXACT, page_size=4, mask=mask, sink=sink)
    (prompt,) = prompts_of(45)
    (request,), _ = lab.prefill([prompt])
    slots = [page * 4 + i for page in request.pages for i in range(4)][:prefix_len]
    specs = lab.model.attention_specs
    new = torch.tensor(prompt[prefix_len:])
    attend = OracleAttention(
        specs, lab.cache.kv, torch.tensor(slots, dtype=torch.int64), len(new), torch.float64
    )
    logits = lab.model.compute_logits(lab.model(new, attend))
    torch.testing.assert_close(logits, lab.oracle(prompt)[prefix_len:], rtol=1e-9, atol=1e-9)


def test_the_oracle_writes_nothing() -> None:
    lab = Lab(EXACT)
    (prompt,) = prompts_of(20)
    (request,), _ = lab.prefill([prompt])
    before = lab.cache.kv.k_LNKD.clone(), lab.cache.kv.v_LNKV.clone(), lab.runner.req_to_token_RW.clone()
    slots = torch.tensor([request.pages[0] * 16 + i for i in range(16)])
    attend = OracleAttention(lab.model.attention_specs, lab.cache.kv, slots, 4, torch.float64)
    lab.model(torch.tensor(prompt[16:]), attend)
    after = lab.cache.kv.k_LNKD, lab.cache.kv.v_LNKV, lab.runner.req_to_token_RW
    assert all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(before, after, strict=True))


def test_attention_without_rope_and_in_a_lower_precision() -> None:
    """At `dtype` below that of the queries the softmax runs in it: that is the baseline's error."""
    lab, spec = Lab(EXACT), make_spec()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(7, heads, 64, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    none = torch.zeros(0, dtype=torch.int64)
    outs = {
        dtype: OracleAttention((spec,), lab.cache.kv, none, 7, dtype)(0, q, k, v, rope=None)
        for dtype in (torch.float64, torch.bfloat16)
    }
    exact = attention(q, k, v, torch.arange(7), spec, compute_dtype=torch.float64)[0]
    torch.testing.assert_close(outs[torch.float64], exact)
    assert outs[torch.bfloat16].dtype == torch.float64
    assert 1e-4 < float((outs[torch.bfloat16] - exact).abs().max()) < 0.1


# Weights in float64 for a while.


def state(model: nn.Module) -> dict[str, tuple[int, torch.dtype, tuple[int, ...]]]:
    return {name: (p.data_ptr(), p.dtype, p.stride()) for name, p in model.named_parameters()}


def small_model(device: str, tied: bool) -> Decoder:
    config = model_config(tie_word_embeddings=tied)
    model = Decoder(config, dtype=torch.bfloat16, device=device)
    model.init_random_(0)
    return model


def whole(model: Decoder, ids: Tensor) -> Tensor:
    return model.compute_logits(model(ids, WholeSequence(model.attention_specs)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_float64_weights_compute_in_float64_and_leave_no_trace(device: str, tied: bool) -> None:
    model, ids = small_model(device, tied), torch.arange(9, device=device)
    before, values = state(model), {n: p.clone() for n, p in model.state_dict().items()}
    low = whole(model, ids)
    with weights_as(torch.float64, model, model.layers):
        outside = {name: p.dtype for name, p in model.named_parameters() if "layers." not in name}
        inside = {p.dtype for name, p in model.layers.named_parameters() if "_norm_" not in name}
        high = whole(model, ids)
    assert set(outside.values()) == {torch.float64} and inside == {torch.bfloat16}  # one layer at a time
    reference = Decoder(model.config, dtype=torch.float64, device=device)
    reference.load_state_dict(values)
    assert high.dtype == torch.float64
    torch.testing.assert_close(high, whole(reference, ids), rtol=1e-12, atol=1e-12)
    assert state(model) == before
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    torch.testing.assert_close(whole(model, ids), low, rtol=0, atol=0)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.layers)


@pytest.mark.parametrize("failing_layer", [0, 1])
def test_float64_weights_are_put_back_after_an_exception(failing_layer: int) -> None:
    model, ids = small_model("cpu", False), torch.arange(9)
    before, low = state(model), whole(model, ids)
    seen = []

    def attend(layer_id: int, q: Tensor, k: Tensor, v: Tensor, **rest: object) -> Tensor:
        seen.append({p.dtype for p in model.layers[layer_id].parameters()})
        if layer_id == failing_layer:
            raise torch.OutOfMemoryError("as on a GPU that is too full for the oracle")
        return WholeSequence(model.attention_specs)(layer_id, q, k, v, **rest)  # type: ignore[arg-type]

    with pytest.raises(torch.OutOfMemoryError), weights_as(torch.float64, model, model.layers):
        model(ids, attend)
    assert seen == [{torch.float64}] * (failing_layer + 1)
    assert state(model) == before
    torch.testing.assert_close(whole(model, ids), low, rtol=0, atol=0)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.layers)


def test_a_check_leaves_the_weights_of_captured_steps_where_they_are() -> None:
    workload, engine = prepared(cell("decode"))
    model = engine.runner.model
    assert isinstance(model, nn.Module)
    before = state(model)
    assert check(engine, workload)[0]
    assert state(model) == before


def test_case_logits_follow_the_weights_at_hand() -> None:
    workload, engine = prepared(cell("extend"))
    _, cases = workload.checked_passes()
    assert isinstance(engine.runner.model, Decoder)
    case: Case = cases[0]
    with torch.no_grad():
        before = case_logits(engine, case, torch.float32)
        engine.runner.model.head *= 2
        torch.testing.assert_close(case_logits(engine, case, torch.float32), 2 * before)
