"""What a replay found, as columns of the row. Means are over steps, each step alike."""

from __future__ import annotations

from typing import Any

from fa_research.workloads.replay import ReplayCounts


def replay_columns(counts: ReplayCounts, page_size: int) -> dict[str, Any]:
    """Capacity (requests, tokens), waste (share of used slots without a token) and prefixes (tokens of prompts).

    Capacity counts live requests alone. They have the pool without what is retained, which is up to
    `workload.retained_fraction` of it once requests have finished.
    """
    prompts = counts.prompt_tokens
    return {
        "trace_steps": counts.steps,
        "trace_requests_admitted": counts.admitted,
        "trace_requests_never_fit": counts.never_fit,
        "trace_live_requests_mean": counts.live_steps / counts.steps,
        "trace_live_requests_peak": counts.peak_live,
        "trace_live_tokens_mean": counts.token_steps / counts.steps,
        "trace_memory_bound_fraction": counts.memory_bound_steps / counts.steps,
        "trace_waste_fraction_mean": counts.empty_steps / counts.slot_steps,
        "trace_waste_fraction_peak": counts.peak_empty / counts.peak_slots,
        "trace_prefix_found_tokens": counts.found_tokens,
        "trace_prefix_hit_tokens": counts.shared_tokens,
        "trace_prefix_hit_fraction": counts.shared_tokens / prompts,
        # A prefix may end anywhere in the block after the last known one: what whole pages could lose of that, at most.
        "trace_prefix_loss_bound_fraction": counts.hits * (page_size - 1) / prompts,
    }
