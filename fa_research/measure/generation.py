"""The times of a text that was written once, as a user who waits for it meets them."""

from __future__ import annotations

from itertools import pairwise

from fa_research.engine.engine import Engine
from fa_research.measure.cell import Measurement, memory_columns
from fa_research.measure.timing import Timing
from fa_research.workloads.generation import Generation


def measure_generation(engine: Engine, generation: Generation) -> Measurement:
    """Columns of the newest text of `generation`, from the host's clock.

    `ttft_us` is from the start of the prefill to the first token on the host (its one sample has no percentiles);
    `itl_us` the median gap between two tokens, with `itl_p10_us` and `itl_p90_us`; `decode_tokens_per_s` the tokens
    after the first over the time that they took. Gaps hold what showing a token costs.
    """
    arrived, result = generation.arrived_ns, Measurement()
    result.metrics["ttft_us"] = (arrived[0] - generation.started_ns) / 1e3
    if gaps := tuple((after - before) / 1e3 for before, after in pairwise(arrived)):
        result.metrics["decode_tokens_per_s"] = len(gaps) / sum(gaps) * 1e6
        result.add("itl", Timing(gaps, "perf_counter", "any"))
        result.series["itl_us"] = gaps
    result.metrics |= {
        "prompt_tokens": len(generation.prompt),
        "generated_tokens": len(generation.written),
        "finish_reason": "eos" if generation.ended else "length",
        "timing_method": "perf_counter",
        "timing_l2": "any",
    }
    result.metrics |= memory_columns(engine)
    return result
