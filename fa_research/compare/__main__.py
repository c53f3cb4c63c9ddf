"""`python -m fa_research.compare outputs/A outputs/B --question backend`"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from fa_research.compare.out import require_free
from fa_research.errors import ConfigError, FaResearchError
from fa_research.streams import complain

SCREEN_LOST = 1
USER_ERROR = 2
INTERRUPTED = 130

_EPILOG = """\
examples:
  python -m fa_research.compare outputs/decode_step --question backend
  python -m fa_research.compare outputs/A outputs/B --question page_size --regret
  python -m fa_research.compare experiments/decode_step --question kv.page_size --metric decode_step_host_us
  python -m fa_research.compare outputs/A outputs/B --question environment.gpu --out report
  python -m fa_research.compare outputs/attention_rows outputs/model_rows --closure --out report
  python -m fa_research.compare --reproduce experiments/decode_step --cells 6

Rows that are equal in everything but the question are compared; rows that are not `ok` are shown and never counted.
"""


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    made = argparse.ArgumentParser(
        prog="python -m fa_research.compare",
        description="Which choice is faster where, by how much, and how surely: from rows, without running anything.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_what_is_asked(made)
    _add_how_to_compare(made)
    made.add_argument(
        "--out", type=Path, metavar="DIR", help="write CSV, Markdown, figures and report.html here"
    )
    made.add_argument(
        "--wandb", action="store_true", help="make a report on W&B, over the rows' runs; needs a login"
    )
    return made


def _add_what_is_asked(made: argparse.ArgumentParser) -> None:
    made.add_argument("paths", nargs="+", type=Path, help="folders of results, or rows.jsonl files")
    asked = made.add_mutually_exclusive_group(required=True)
    asked.add_argument("-q", "--question", metavar="KEY", help="config key or group, short or in full")
    asked.add_argument(
        "--closure",
        action="store_true",
        help="predict decode steps of rows with workload.level=model from rows with workload.level=attention",
    )
    asked.add_argument(
        "--reproduce",
        action="store_true",
        help="run a sample of the rows' cells again on this machine, and say how many land in their intervals",
    )


def _add_how_to_compare(made: argparse.ArgumentParser) -> None:
    made.add_argument("--metric", help="what to compare; the time that most rows have")
    made.add_argument("--regret", action="store_true", help="the best single choice, and who wins where")
    made.add_argument("--across", action="store_true", help="compare rows of different GPUs and versions")
    made.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="KEY",
        help="a key that need not be equal; repeatable",
    )
    made.add_argument(
        "--tie", type=_percentage, default=1.0, metavar="PERCENT", help="smaller differences are ties; 1"
    )
    made.add_argument(
        "--cells", type=_count, metavar="N", help="with --reproduce: how many cells to run again; 10"
    )
    made.add_argument("--seed", type=int, help="with --reproduce: which cells are drawn; 0")
    made.add_argument("--better", choices=("lower", "higher"), help="where the metric's name does not say")


def _percentage(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 100:
        raise argparse.ArgumentTypeError(f"{text} is not a percentage from 0 to 100")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of cells, from 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, write and show. Returns 0, 1 if the screen took not all of it, 130 if interrupted, and 2 for what the
    user can put right, with a line on stderr and the notes made by then."""
    options = parser().parse_args(argv)
    try:
        return _run(options)
    except FaResearchError as error:
        complain(f"error: {error}")
        for note in getattr(error, "__notes__", ()):
            complain(f"note: {note}")
        return USER_ERROR
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except OSError as error:
        complain(f"error: {error.filename}: {error.strerror or error}")
        return USER_ERROR


def _run(options: argparse.Namespace) -> int:
    from fa_research.tracking import CONSOLE

    CONSOLE.tells_lost_reader = False  # a comparison makes no rows: who has read enough misses nothing
    if options.out is not None:
        require_free(options.out)
    if options.reproduce:
        _run_reproduction(options)
    else:
        _refuse(options, "cells", "seed", to="--reproduce")
        (_run_closure if options.closure else _run_question)(options)
    return SCREEN_LOST if CONSOLE.quiet else 0


def _run_question(options: argparse.Namespace) -> None:
    from fa_research.compare.comparison import compare
    from fa_research.compare.report import write_report
    from fa_research.compare.screen import print_comparison
    from fa_research.tracking import CONSOLE

    if options.wandb:
        from fa_research.compare.wandb_report import publish, require_wandb

        require_wandb()
    higher = None if options.better is None else options.better == "higher"
    comparison = compare(
        options.paths,
        options.question,
        metric=options.metric,
        ignore=options.ignore,
        across=options.across,
        tie=options.tie / 100,
        higher=higher,
    )
    try:  # files first: they are there though the screen's reader is gone, and the screen though a file fails
        written = write_report(comparison, options.out) if options.out else []
    finally:
        print_comparison(comparison, regret=options.regret)
    _say(written, options.out)
    if options.wandb:
        CONSOLE.print(publish(comparison), soft_wrap=True, markup=False)


def _run_reproduction(options: argparse.Namespace) -> None:
    from fa_research.compare.reproduce import reproduce, show, write_csv

    _refuse(options, "metric", "regret", "ignore", "better", "wandb", to="--question")
    cells, seed = options.cells or 10, options.seed or 0
    found, folder = reproduce(options.paths, cells=cells, seed=seed, across=options.across, out=options.out)
    write_csv(found, folder)
    show(found, folder)


def _refuse(options: argparse.Namespace, *names: str, to: str) -> None:
    """Raises ConfigError for options that belong to another task."""
    if given := [f"--{name}" for name in names if getattr(options, name) not in (None, False, [])]:
        raise ConfigError(f"{' and '.join(given)} belong{'s' * (len(given) == 1)} to {to}")


def _say(written: Sequence[Path], folder: Path) -> None:
    from fa_research.tracking import CONSOLE

    if written:
        names = ", ".join(path.name for path in written)
        CONSOLE.print(f"wrote {names} to {folder}", soft_wrap=True, markup=False)


def _run_closure(options: argparse.Namespace) -> None:
    from fa_research.compare.closure import close
    from fa_research.compare.closure_files import print_closure, write_closure

    _refuse(options, "metric", "regret", "ignore", "better", "wandb", to="--question")
    closure = close(options.paths, across=options.across)
    try:
        written = write_closure(closure, options.out) if options.out else []
    finally:
        print_closure(closure)
    _say(written, options.out)


if __name__ == "__main__":
    raise SystemExit(main())
