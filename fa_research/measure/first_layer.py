"""Which layer's attention departs first, when a model's logits fail the oracle: run on failure only.

The request is run again, eagerly, through the engine's own backend. Each layer's attention is compared with the
definition in float64 on the queries that this layer got and on the keys and values that the cache holds, so that a
mistake of one layer does not show as a mistake of the next.

Legend: T new tokens, N slots of the request, M queries that are compared, H query heads, D head dim.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fa_research.attention.layer import PagedAttention
from fa_research.attention.reference import attention
from fa_research.batch import ForwardBatch, ForwardMode, extend_batch
from fa_research.engine.engine import Engine
from fa_research.measure.numerics import judge_rows
from fa_research.workloads.base import Case, pick

_MAX_QUERIES = 64


class _Watch(PagedAttention):
    """One pass of one request: the backend's own results, each compared until one departs."""

    def __init__(self, engine: Engine, batch: ForwardBatch, case: Case) -> None:
        backend, table = engine.backend, engine.runner.req_to_token_RW
        super().__init__(backend, engine.cache.kv, batch, backend.lowerings)
        backend.init_forward_metadata(batch, table)
        self._engine = engine
        self._slots_N = table[case.row, : batch.seq_lens_cpu[0]].long()
        self._rows_M = torch.tensor(pick(batch.num_tokens, _MAX_QUERIES), device=engine.device)
        self._positions_M = batch.positions_T[self._rows_M]
        self.found = ""

    def read(self, layer_id: int, q_THD: Tensor, sinks_H: Tensor | None = None) -> Tensor:
        out_THV = super().read(layer_id, q_THD, sinks_H)
        if not self.found:
            self._compare(layer_id, q_THD, out_THV, sinks_H)
        return out_THV

    def _compare(self, layer_id: int, q_THD: Tensor, out_THV: Tensor, sinks_H: Tensor | None) -> None:
        kv, spec, rows_M = self._engine.cache.kv, self._engine.specs[layer_id], self._rows_M
        given = (q_THD[rows_M], kv.k(layer_id)[self._slots_N], kv.v(layer_id)[self._slots_N])
        baseline, exact = (
            attention(*given, self._positions_M, spec, sinks_H=sinks_H, compute_dtype=dtype)[0]
            for dtype in (self._engine.dtype, torch.float64)
        )
        result = out_THV[rows_M]
        verdict = judge_rows([(result, baseline, exact)])
        if verdict.passed:
            return
        error_H = (result.double() - exact).abs().nan_to_num(nan=torch.inf).amax((0, 2))
        self.found = (
            f"layer {layer_id}, head {int(error_H.argmax())}: error {verdict.max_error:.3g}, tolerance "
            f"{verdict.tolerance:.3g}"
        )


@torch.inference_mode()
def first_layer_off(engine: Engine, case: Case) -> str:
    """The first layer whose attention is wrong by itself, in an extend pass over the case's tokens or in a decode step
    over the last of them, as a sentence; or that there is none. It writes the request's own slots again."""
    table = engine.runner.req_to_token_RW
    extend = extend_batch(table, [case.row], [case.prefix_len], [case.tokens_T])
    last = extend_batch(table, [case.row], [case.prefix_len + len(case.tokens_T) - 1], [case.tokens_T[-1:]])
    decode = replace(last, mode=ForwardMode.DECODE, extend_seq_lens_B=None, extend_seq_lens_cpu=())
    for name, batch in (("an extend pass", extend), ("a decode step", decode)):
        watch = _Watch(engine, batch, case)
        engine.runner.model(batch.input_ids_T, watch)
        if watch.found:
            return f"the first attention that is wrong by itself, in {name}, is that of {watch.found}"
    return (
        "each layer's attention is right for the queries, keys and values that it gets, in an extend pass and in a "
        "decode step of this request alone: look at what is written to the cache, at positions, batches and graphs"
    )
