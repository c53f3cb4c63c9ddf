"""Run one cell, or a sweep of cells: `python run.py --help`."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from fa_research import cli


@hydra.main(config_path="configs", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> object:
    return cli.run_one(cfg)


if __name__ == "__main__":
    cli.launch(main)
