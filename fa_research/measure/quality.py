"""What a backend, a page size or a dtype costs a model: how well it predicts real text, and how often it chooses the
token that the same model in float32 chooses.

Every token is scored by the passes that serve: prompts by the chunked prefill, what follows them by decode steps that
are fed the text's own tokens. Bits per byte do not depend on the tokenizer, as perplexity does (Gao et al., "The Pile",
2020).

Legend: B passages, X tokens of a passage, M scored positions, T tokens of a pass, E hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa_research.batch import ForwardBatch
from fa_research.engine.engine import Engine
from fa_research.measure.oracle import OracleAttention, weights_as
from fa_research.workloads.text import Text

_ROWS = 512  # positions whose logits exist at once: a vocabulary is large
ComputeLogits = Callable[[Tensor], Tensor | None]


class Scores:
    """Of position x of passage b: the negative log likelihood (nats, float32) of the token at x + 1, and the likeliest
    token."""

    def __init__(self, tokens_BX: Tensor, compute_logits: ComputeLogits) -> None:
        self.tokens_BX = tokens_BX
        self.nll_BX = torch.zeros(tokens_BX.shape, device=tokens_BX.device)
        self.top1_BX = torch.full_like(tokens_BX, -1)
        self._compute_logits = compute_logits

    def add(self, hidden_ME: Tensor, rows_M: Tensor, positions_M: Tensor) -> None:
        """Score hidden states of these passages at these positions."""
        for hidden, rows, positions in zip(
            hidden_ME.split(_ROWS), rows_M.split(_ROWS), positions_M.split(_ROWS), strict=True
        ):
            logits = self._compute_logits(hidden)
            assert logits is not None, "the attention path alone predicts nothing"
            self.add_logits(logits, rows, positions)

    def add_logits(self, logits_MX: Tensor, rows_M: Tensor, positions_M: Tensor) -> None:
        """The same for logits; the last dimension is the vocabulary."""
        targets_M = self.tokens_BX[rows_M, positions_M + 1]
        self.nll_BX[rows_M, positions_M] = F.cross_entropy(logits_MX.float(), targets_M, reduction="none")
        self.top1_BX[rows_M, positions_M] = logits_MX.argmax(-1)


@torch.no_grad()
def measure_quality(engine: Engine, workload: Text) -> dict[str, float]:
    """Columns, those of the decode steps named `decode_*`. Runs the prefill and `steps` decode steps of the prepared
    workload, and the reference over the same tokens."""
    tokens = [passage.tokens for passage in workload.passages]
    tokens_BX = torch.tensor(tokens, device=engine.device)
    compute_logits = engine.runner.model.compute_logits
    scores, reference = Scores(tokens_BX, compute_logits), Scores(tokens_BX, compute_logits)
    workload.prefill(partial(_score_pass, scores, workload))
    _score_decoding(scores, workload)
    _score_reference(reference, engine, workload)
    num_bytes_BX = torch.tensor([p.num_bytes for p in workload.passages], device=engine.device)
    columns: dict[str, float] = {}
    decoded_from = int(workload.options.prompt_len)
    scored_BX = _scored(scores, workload)
    for prefix, part in (("", slice(decoded_from)), ("decode_", slice(decoded_from, None))):
        chosen_BX = torch.zeros_like(scored_BX)
        chosen_BX[:, part] = scored_BX[:, part]
        columns |= {
            f"{prefix}{k}": v for k, v in _columns(scores, reference, num_bytes_BX, chosen_BX).items()
        }
    return columns


def not_finite(columns: dict[str, float]) -> str:
    """Why these columns are no quality at all; empty where they are finite. A perplexity alone may be past float64."""
    wrong = [
        f"{k}={v:g}" for k, v in columns.items() if not math.isfinite(v) and not k.endswith("perplexity")
    ]
    if not wrong:
        return ""
    return (
        f"quality is not finite: {', '.join(wrong)}; the logits hold NaN or infinities, or the tokens no bytes; where "
        "they overflow in float16, use model.dtype=bfloat16 or float32"
    )


def _score_pass(
    scores: Scores, workload: Text, is_shared: bool, batch: ForwardBatch, hidden_TE: Tensor
) -> None:
    """One prefill pass. The shared prefix is scored once, but its last position for every prompt, which differ in what
    follows; what a prompt computes of it again (the tokens of a partly filled page) is not."""
    count, positions_T = len(workload.prompts), batch.positions_T
    last_shared = int(workload.options.shared_prefix_len) - 1
    if not is_shared:
        rows_T = torch.arange(count, device=positions_T.device).repeat_interleave(len(positions_T) // count)
        own = positions_T > last_shared
        scores.add(hidden_TE[own], rows_T[own], positions_T[own])
        return
    before = positions_T < last_shared
    scores.add(hidden_TE[before], torch.zeros_like(positions_T[before]), positions_T[before])
    for hidden_E in hidden_TE[positions_T == last_shared]:
        rows_B = torch.arange(count, device=positions_T.device)
        scores.add(hidden_E.expand(count, -1), rows_B, torch.full_like(rows_B, last_shared))


def _score_decoding(scores: Scores, workload: Text) -> None:
    """Decode steps after the prefill; instead of what a step samples, the next is fed the text's own token."""
    tokens_BX, decoder, first = scores.tokens_BX, workload.decoder, int(workload.options.prompt_len)
    count, steps = len(workload.requests), int(workload.options.steps)
    rows_B = torch.arange(count, device=tokens_BX.device)
    decoder.start(workload.requests, tokens_BX[:, first])
    for position in range(first, first + steps):
        decoder.step()
        assert decoder.logits_BX is not None
        scores.add_logits(decoder.logits_BX, rows_B, torch.full_like(rows_B, position))
        decoder.state.input_ids_B[:count].copy_(tokens_BX[:, position + 1])


def _score_reference(scores: Scores, engine: Engine, workload: Text) -> None:
    """The same model in float32, with attention by definition: each passage in one pass, without cache."""
    model = engine.runner.model
    assert isinstance(model, nn.Module) and isinstance(model.layers, nn.ModuleList)
    nothing_cached = torch.empty(0, dtype=torch.int64, device=engine.device)
    with weights_as(torch.float32, model, model.layers):
        for row, tokens_X in enumerate(scores.tokens_BX[:, :-1]):
            length = len(tokens_X)
            first = max(0, int(workload.options.shared_prefix_len) - 1) if row else 0
            positions_M = torch.arange(first, length, device=engine.device)
            attend = OracleAttention(engine.specs, engine.cache.kv, nothing_cached, length, torch.float32)
            hidden_ME = model(tokens_X, attend, positions_M)
            scores.add(hidden_ME, torch.full_like(positions_M, row), positions_M)


def _scored(scores: Scores, workload: Text) -> Tensor:
    """Positions that count, bool [B, X]: all that were scored but those before a token of the tokenizer's own."""
    scored_BX = scores.top1_BX >= 0
    scored_BX[:, : max(0, len(workload.tokenizer.leading_ids) - 1)] = False
    return scored_BX


def _columns(scores: Scores, reference: Scores, num_bytes_BX: Tensor, chosen_BX: Tensor) -> dict[str, float]:
    """Over the chosen positions; a position's bytes are those of the token that it predicts."""
    count = int(chosen_BX.sum())
    num_bytes = int(num_bytes_BX[:, 1:][chosen_BX[:, :-1]].sum())

    def nats(of: Scores) -> Tensor:
        return of.nll_BX[chosen_BX].double().sum()

    def bits_per_byte(of: Scores) -> float:
        return nats(of).item() / math.log(2) / num_bytes if num_bytes else math.nan

    agree = scores.top1_BX[chosen_BX] == reference.top1_BX[chosen_BX]
    return {
        "bits_per_byte": bits_per_byte(scores),
        "oracle_bits_per_byte": bits_per_byte(reference),
        "top1_agreement": agree.double().mean().item(),
        "perplexity": (nats(scores) / count).exp().item(),
        "scored_tokens": count,
    }
