"""Run one cell, or a sweep of cells: `python run.py --help`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run() -> None:
    import hydra  # here, so that Ctrl-C is no traceback out of an import

    from fa_research import cli

    @hydra.main(config_path="configs", config_name="config", version_base="1.3")
    def main(cfg: DictConfig) -> object:
        return cli.run_one(cfg)

    cli.launch(main)


if __name__ == "__main__":
    try:
        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
