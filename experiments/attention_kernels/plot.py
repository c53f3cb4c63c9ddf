"""Draw `speed.png` from `results/rows.jsonl`: each kernel's speed against FA3 in the same run (needs matplotlib)."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PAGES = {1: "tab:blue", 16: "tab:orange", 128: "tab:green"}


def label(config: dict[str, int]) -> str:
    length = f"{config['length'] // 1024}k"
    if config["new"] == 1:
        return f"decode\n{config['requests']} x {length}"
    return f"extend\n{config['requests']} x {config['new'] // 1024}k/{length}"


def main() -> None:
    rows = [json.loads(line) for line in (HERE / "results" / "rows.jsonl").open()]
    rows = [row for row in rows if row["config"]["variant"] == "triton" and row["config"]["head_dim"] == 128]
    names = list(dict.fromkeys(label(row["config"]) for row in rows))
    figure, axes = plt.subplots(figsize=(11, 4))
    for offset, (page_size, color) in enumerate(PAGES.items()):
        mine = {
            label(r["config"]): r["metrics"]["speed_against_fa3"]
            for r in rows
            if r["config"]["page_size"] == page_size
        }
        at = [i + 0.25 * (offset - 1) for i in range(len(names))]
        axes.bar(at, [mine[name] for name in names], 0.23, color=color, label=f"page {page_size}")
    axes.axhline(1.0, color="black", linewidth=1)
    axes.text(len(names) - 0.5, 1.01, "FA3", ha="right", va="bottom")
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel("speed against FA3")
    axes.set_title("Triton kernels against FA3 in one run, H200, bfloat16, 32/8 heads, head dim 128")
    axes.legend(loc="upper right", bbox_to_anchor=(1.0, 0.9), framealpha=1.0)
    figure.tight_layout()
    figure.savefig(HERE / "speed.png", dpi=110)


if __name__ == "__main__":
    main()
