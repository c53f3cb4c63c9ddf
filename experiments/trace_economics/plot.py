"""Draw `pareto.png` from `results/rows_*.jsonl` and print the table: what each page size costs and saves.

Needs matplotlib.

A panel for each trace. Right: more requests fit the same pool; up: more tokens per second; both against page size 1 of
the same backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
Curves = dict[str, dict[int, dict[str, Any]]]  # backend -> page size -> metrics

HEAD = (
    "| trace | backend | page | requests that fit | waste | prompt found | table read per step | step | tokens/s |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def curves_of_traces() -> dict[str, Curves]:
    """The rows that were timed, by trace; the latest of each cell."""
    traces: dict[str, Curves] = {}
    for file in sorted((HERE / "results").glob("rows_*.jsonl")):
        for line in file.open(encoding="utf-8"):
            row = json.loads(line)
            if row["status"] not in ("ok", "suspect"):
                continue
            config = row["config"]
            curves = traces.setdefault(Path(config["workload"]["path"]).stem, {})
            backend = row["environment"].get("backend", config["backend"]["name"])
            curves.setdefault(backend, {})[config["kv"]["page_size"]] = row["metrics"]
    return traces


def against_smallest(curve: dict[int, dict[str, Any]], name: str) -> dict[int, float]:
    """A metric in percent, from that of the smallest page size."""
    first = curve[min(curve)][name]
    return {page: (curve[page][name] / first - 1) * 100 for page in sorted(curve)}


def table_row(trace: str, backend: str, page: int, m: dict[str, Any], fits: float, speed: float) -> str:
    cells = (
        f"{m['trace_live_requests_mean']:.1f} ({fits:+.1f} %)",
        f"{m['trace_waste_fraction_mean']:.2%}",
        f"{m['trace_prefix_hit_fraction']:.2%}",
        f"{m['trace_page_table_bytes_read'] / 1024:,.0f} KiB",
        f"{m['decode_step_us']:,.1f} us x {m['trace_step_requests']}",
        f"{m['trace_tokens_per_s']:,.0f} ({speed:+.1f} %)",
    )
    return f"| {trace} | {backend} | {page} | {' | '.join(cells)} |"


def main() -> None:
    traces = curves_of_traces()
    figure, panels = plt.subplots(1, len(traces), figsize=(5.5 * len(traces), 4.2), squeeze=False)
    print(HEAD)
    for axes, (trace, curves) in zip(panels[0], traces.items(), strict=True):
        for color, (backend, curve) in zip(COLORS, sorted(curves.items()), strict=False):
            fits, speed = (
                against_smallest(curve, name) for name in ("trace_live_requests_mean", "trace_tokens_per_s")
            )
            axes.plot(fits.values(), speed.values(), "o-", color=color, label=backend, linewidth=1)
            for page in fits:
                if page != min(curve):  # all curves begin at the origin
                    place = (fits[page], speed[page])
                    axes.annotate(str(page), place, textcoords="offset points", xytext=(5, 4), color=color)
                print(table_row(trace, backend, page, curve[page], fits[page], speed[page]))
        axes.margins(x=0.1, y=0.12)
        axes.set_title(trace)
        axes.set_xlabel("requests that fit the pool, against page size 1 (%)")
        axes.set_ylabel("tokens per second, against page size 1 (%)")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(HERE / "pareto.png", dpi=110)


if __name__ == "__main__":
    main()
