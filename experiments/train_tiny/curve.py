"""Draws results/curve.png from results/curve.csv; needs the extra `report`.

python experiments/train_tiny/curve.py --run experiments/train_tiny/results
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import altair as alt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a folder with curve.csv and summary.json")
    folder = parser.parse_args().run
    pass_bytes = json.loads((folder / "summary.json").read_text())["corpus"]["train"]["bytes"]
    points = []
    with (folder / "curve.csv").open() as file:
        for row in csv.DictReader(file):
            for name, key in (("training", "train_bits_per_byte"), ("dev files", "dev_bits_per_byte")):
                if row[key]:
                    point = {"text": name, "bits per byte": float(row[key])}
                    points.append(point | {"passes over the data": int(row["bytes"]) / pass_bytes})
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("passes over the data:Q"),
        y=alt.Y("bits per byte:Q", scale=alt.Scale(domain=[0.4, 1.2], clamp=True)),
        color=alt.Color("text:N", title=None, sort=["training", "dev files"]),
    )
    dots = base.mark_point(filled=True).transform_filter(alt.datum.text == "dev files")
    (base.mark_line(clip=True) + dots).properties(width=520, height=280).save(
        folder / "curve.png", scale_factor=2
    )


if __name__ == "__main__":
    main()
