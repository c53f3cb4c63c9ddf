"""The oracle at work: a model's logits, or the attention path's outputs, computed again in float64 with the
masks' own predicates. The float64 copy of the weights exists one layer at a time, so an 8B model fits beside
itself.

Legend: T new tokens of one request, N slots, H query heads, K KV heads, D head dim, V value head dim, M
positions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fa_research.attention.reference import attention
from fa_research.engine.engine import Engine
from fa_research.kernels import ops
from fa_research.kv_cache import TokenToKVPool
from fa_research.measure.numerics import Verdict, judge, judge_median_row, judge_rows
from fa_research.measure.where import Name, where_off
from fa_research.spec import AttentionSpec
from fa_research.workloads.base import Case, Pass, pick

# How far float32 keys and values of two correct computations are apart at most, in units of float32's epsilon times the
# largest value of their head.
_APART = 16
_MAX_QUERIES = 256  # rows of one request that the check of a long extend pass compares


class OracleAttention:
    """`Attend` for one request, computed in `dtype`: its first `prefix_len` keys come from the cache, the
    rest are the new tokens' own. Nothing is written. `kv_dtype` and `shift`: as `as_cached` takes them."""

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        kv: TokenToKVPool,
        slots_N: Tensor,
        num_tokens: int,
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None,
        shift: float = 0.0,
    ) -> None:
        self._specs, self._kv, self._slots_N, self._dtype = specs, kv, slots_N, dtype
        self._kv_dtype, self._shift = kv_dtype, shift
        prefix_len = slots_N.shape[0]
        self._positions_T = torch.arange(prefix_len, prefix_len + num_tokens, device=slots_N.device)

    def __call__(
        self,
        layer_id: int,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKV: Tensor,
        *,
        rope: Tensor | None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        if rope is not None:
            rotated, values = torch.empty_like(k_TKD), torch.empty_like(v_TKV)
            own = torch.arange(k_TKD.shape[0], device=k_TKD.device)
            ops.rope_write_kv(q_THD, k_TKD, v_TKV, rope, self._positions_T, rotated, values, own)
            k_TKD = rotated
        k_TKD, v_TKV = (as_cached(x, self._kv_dtype, self._shift) for x in (k_TKD, v_TKV))
        k = torch.cat([self._kv.k(layer_id)[self._slots_N].to(k_TKD.dtype), k_TKD])
        v = torch.cat([self._kv.v(layer_id)[self._slots_N].to(v_TKV.dtype), v_TKV])
        spec = self._specs[layer_id]
        out, _ = attention(q_THD, k, v, self._positions_T, spec, sinks_H=sinks_H, compute_dtype=self._dtype)
        return out.to(q_THD.dtype)


def own_kv_dtype(engine: Engine) -> torch.dtype | None:
    """The cache's dtype where it is not the model's, else None: what is read is then what was written, but for a
    rounding that is part of what the user asked for and no error."""
    return engine.kv_dtype if engine.kv_dtype != engine.dtype else None


def as_cached(x: Tensor, kv_dtype: torch.dtype | None, shift: float = 0.0) -> Tensor:
    """`x` [T, K, D] as it would come back from a cache of that dtype, if every value were larger by `shift` times the
    largest of its head. A small shift changes only values that lie near the middle between two of the cache's."""
    if kv_dtype is None:
        return x
    moved = x.double() + shift * x.abs().amax(-1, keepdim=True) if shift else x
    return moved.to(kv_dtype).to(x.dtype)


@contextmanager
def weights_as(dtype: torch.dtype, model: nn.Module, layers: nn.ModuleList) -> Iterator[None]:
    """Within, `model` computes in `dtype`: a layer's weights are converted when it is called and dropped after,
    those outside the layers at once. The weights themselves, and the graphs that hold their addresses, are
    untouched."""
    outside: list[tuple[nn.Parameter, Tensor]] = []
    inside: list[tuple[nn.Parameter, Tensor]] = []  # of the layer that runs

    def convert(parameters: Iterable[nn.Parameter], kept: list[tuple[nn.Parameter, Tensor]]) -> None:
        for parameter in parameters:
            if parameter.dtype != dtype:
                kept.append((parameter, parameter.data))
                parameter.data = parameter.data.to(dtype)

    def restore(kept: list[tuple[nn.Parameter, Tensor]]) -> None:
        while kept:
            parameter, data = kept.pop()
            parameter.data = data

    of_layers = {id(p) for p in layers.parameters()}
    handles = []
    for layer in layers:
        handles.append(layer.register_forward_pre_hook(lambda m, _: convert(m.parameters(), inside)))
        handles.append(layer.register_forward_hook(lambda *_: restore(inside)))
    try:
        convert((p for p in model.parameters() if id(p) not in of_layers), outside)
        yield
    finally:
        restore(inside)
        restore(outside)
        for handle in handles:
            handle.remove()


def case_logits(engine: Engine, case: Case, dtype: torch.dtype, shift: float = 0.0) -> Tensor:
    """Logits [M, X] of the case, with attention computed in `dtype` over the cache as it is, and the model's
    weights in whatever precision they are now. `shift`: of keys and values before they are rounded (`as_cached`)."""
    table, device = engine.runner.req_to_token_RW, engine.device
    slots_N = table[case.row, : case.prefix_len].long()
    tokens_T = case.tokens_T.to(device)
    kv = engine.cache.kv
    attend = OracleAttention(engine.specs, kv, slots_N, len(tokens_T), dtype, own_kv_dtype(engine), shift)
    logits = engine.runner.model.compute_logits(engine.runner.model(tokens_T, attend, case.at_M.to(device)))
    assert logits is not None
    return logits


def _shifts(engine: Engine) -> tuple[float, ...]:
    """Of the keys and values of each baseline. In float32 with a cache of fewer bits, a value near the middle between
    two of the cache's is rounded up by one correct computation and down by another, and the difference is thousands of
    times float32's own errors. Few values are so near, and in one baseline there may be none: so two more baselines
    round all of them up, and all of them down. In 16 bit the errors of the computation itself are as large."""
    if own_kv_dtype(engine) is None or engine.dtype != torch.float32:
        return (0.0,)
    apart = _APART * torch.finfo(torch.float32).eps
    return (0.0, apart, -apart)


def _furthest(baselines: Sequence[Tensor], reference: Tensor) -> Tensor:
    """Each value from the baseline that is furthest from the reference there; NaN is furthest of all."""
    stacked = torch.stack(tuple(baselines))
    far = (stacked.double() - reference.double()).abs().nan_to_num(nan=float("inf")).argmax(0, keepdim=True)
    return stacked.gather(0, far)[0]


class Oracle:
    """The cases' logits in float64, and as the same model in its own precision gives them: computed once, to judge
    any number of results."""

    @torch.no_grad()
    def __init__(self, engine: Engine, cases: Sequence[Case]) -> None:
        model = engine.runner.model
        assert isinstance(model, nn.Module) and isinstance(model.layers, nn.ModuleList)
        self._cases = cases
        experts, wide = engine.config.model.moe.num_experts, engine.dtype in (torch.float32, torch.float64)
        self._judge = judge_median_row if experts and not wide else judge
        shifts = _shifts(engine)
        baselines = [[case_logits(engine, case, engine.dtype, shift) for shift in shifts] for case in cases]
        with weights_as(torch.float64, model, model.layers):
            self._references = [case_logits(engine, case, torch.float64) for case in cases]
        self._baselines = list(map(_furthest, baselines, self._references))

    def judge(self, results: Sequence[Tensor]) -> Verdict:
        """The verdict on one result [M, X] for each case: of all logits, or, for a mixture of experts in 16 bit, of the
        median position."""
        return self._judge(zip(results, self._baselines, self._references, strict=True))

    def worst_case(self, results: Sequence[Tensor]) -> Case:
        """The case whose result is furthest from the reference; NaN is furthest of all."""
        errors = [
            (result.double() - reference).abs().nan_to_num(nan=torch.inf).max().item()
            for result, reference in zip(results, self._references, strict=True)
        ]
        return self._cases[errors.index(max(errors))]

    def where(self, results: Sequence[Tensor], verdict: Verdict) -> str:
        """Where a result that failed is off: request, position and vocabulary id."""

        def name(case: Case) -> Name:
            def at(index: tuple[int, ...]) -> str:
                position = case.prefix_len + int(case.at_M[index[0]])
                return f"request {case.request}, position {position}, vocabulary id {index[1]}"

            return at

        sides = zip(map(name, self._cases), results, self._baselines, self._references, strict=True)
        return where_off(sides, verdict.tolerance, "positions")


@torch.no_grad()
def check_attention(engine: Engine, passes: Sequence[Pass], max_requests: int) -> tuple[Verdict, str]:
    """Every layer's attention output of these passes (each the last of its mode and size) against float64, for some
    requests and rows; where it fails, also the place of the worst value."""
    stack, kv = engine.stack, engine.cache.kv
    assert stack is not None

    def name(done: Pass, i: int, layer_id: int, positions: Tensor) -> Name:
        def at(index: tuple[int, ...]) -> str:
            position = int(positions[index[0]])
            slot = int(engine.runner.req_to_token_RW[done.rows[i], position])
            page, inside = divmod(slot, engine.cache.page_size)
            return (
                f"{done.mode.name.lower()} pass, request {i}, position {position}, layer {layer_id}, head {index[1]}, "
                f"dim {index[2]} (the token is in page {page}, slot {inside} of it)"
            )

        return at

    def named(done: Pass) -> Iterator[tuple[Name, Tensor, Tensor, Tensor]]:
        for i in pick(len(done.rows), max_requests):
            seq_len, extend_len = done.seq_lens[i], done.extend_lens[i]
            prefix_len, first = seq_len - extend_len, done.first_query[i]
            slots_N = engine.runner.req_to_token_RW[done.rows[i], :prefix_len].long()
            own = slice(
                first, first + extend_len
            )  # not from the cache: what was not written there would not show
            rows = torch.tensor(pick(extend_len, _MAX_QUERIES), device=engine.device)
            positions, rows = rows + prefix_len, rows + first
            for layer_id, spec in enumerate(engine.specs):
                q = stack.q_THD[rows]
                k = torch.cat([kv.k(layer_id)[slots_N], stack.k_TKD[own].to(engine.kv_dtype)])
                v = torch.cat([kv.v(layer_id)[slots_N], stack.v_TKV[own].to(engine.kv_dtype)])
                baseline, reference = (
                    attention(q, k, v, positions, spec, sinks_H=stack.sinks_H, compute_dtype=dtype)[0]
                    for dtype in (engine.dtype, torch.float64)
                )
                result = stack.outputs[done.mode, done.num_tokens][layer_id][rows]
                yield name(done, i, layer_id, positions), result, baseline, reference

    def everything() -> Iterator[tuple[Name, Tensor, Tensor, Tensor]]:
        return (one for done in passes for one in named(done))

    verdict = judge_rows(triple for _, *triple in everything())  # type: ignore[misc]
    return verdict, "" if verdict.passed else where_off(everything(), None, "queries")


@torch.inference_mode()
def reprefill(engine: Engine, cases: Sequence[Case]) -> list[Tensor]:
    """The logits of the same tokens once more, in one extend pass of the same backend: what incremental decoding
    must equal."""
    results = []
    for case in cases:
        request = engine.cache.open()
        batch = engine.runner.prepare_extend([request], [case.tokens_T])
        engine.backend.init_forward_metadata(batch, engine.runner.req_to_token_RW)
        hidden = engine.runner.forward(batch, case.at_M.to(engine.device))
        logits = engine.runner.model.compute_logits(hidden)
        engine.cache.close(request)
        assert logits is not None
        results.append(logits)
    return results


def compare_logits(cases: Sequence[Case], again: Sequence[Tensor]) -> dict[str, float]:
    """Largest difference between the cases' logits and the re-prefilled ones, and the share of positions where both
    choose the same token."""
    pairs = [(case.logits_MX, logits) for case, logits in zip(cases, again, strict=True)]
    differences = torch.stack([(a.double() - b.double()).abs().max() for a, b in pairs])  # max keeps NaN
    agree = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in pairs])
    return {
        "reprefill_max_difference": differences.max().item(),
        "reprefill_top1_agreement": agree.double().mean().item(),
    }
