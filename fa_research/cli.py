"""The command line around one cell: errors a user can read, a row for every cell of a sweep, a table at its end."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml.error import MarkedYAMLError  # type: ignore[import-untyped]

from fa_research import fingerprint
from fa_research.config import Config, read_config, to_plain, validate
from fa_research.config.against import read_against
from fa_research.config.explain import explain
from fa_research.config.free_text import escape, for_shell, not_utf8, options_first, quote_free_text
from fa_research.config.no_effect import given_keys
from fa_research.config.preset_texts import number_for_text
from fa_research.config.store import GROUPS, choices, register
from fa_research.config.validate import study_problem
from fa_research.errors import BackendFault, DoesNotFit, FaResearchError
from fa_research.isolation.watcher import watched
from fa_research.streams import complain, drop, replace_what_cannot_be_shown, use_utf8
from fa_research.sweep import (
    gather,
    outcome,
    report_and_mirror,
    request_stop,
    running_a_cell,
    stop_requested,
)
from fa_research.text import plural
from fa_research.tracking.cell_rows import count_rows, record_failure
from fa_research.tracking.failures import log_bug
from fa_research.tracking.opening import opening

if TYPE_CHECKING:
    from fa_research.tracking import Row

log = logging.getLogger(__name__)

FAILED = 1  # exit code of a run that ended with a wrong result, without memory, or with a bug
USER_ERROR = 2  # exit code of a run that was asked for something impossible

HELP = """\
fa_research: change one part of an attention serving engine, check it against an exact oracle, time it.

  python run.py                                                    the default: real text through a small model
  python run.py backend=triton kv.page_size=16 workload=decode     other choices and values
  python run.py -m backend=torch,triton kv.page_size=1,16          a sweep: one row a cell, a table at the end
  python run.py experiment=first_ablation                          a preset of configs/experiment/

Groups, as in group=choice; a group's keys are set as in kv.page_size=64:
{groups}
At the root: study (the folder in outputs/), seed, device (auto, cpu, cuda).

  --cfg job        show the config that the run would use, with what else is on the command line
  -m, --multirun   sweep over comma-separated values
  --hydra-help     what Hydra offers beyond this

  eval "$(python run.py -sc install=bash)"   complete groups, choices and keys in this shell

Results are in outputs/<study>/. Without an account W&B runs offline; without a GPU everything runs on the CPU.
"""

_wants_traceback = False
_sweep_dir: str | None = None  # of the sweep that is under way


def launch(main: Callable[[], Any]) -> None:
    """Run a function that `hydra.main` made; errors of composition become one line and exit code 2."""
    global _wants_traceback
    use_utf8()
    replace_what_cannot_be_shown()
    if problem := not_utf8(sys.argv[1:]):
        _exit_with(problem)
    # Hydra's own help takes a second longer: it scans all groups, its own too
    if {"-h", "--help"} & set(sys.argv[1:]):
        groups = "\n".join(f"  {name:<11} {', '.join(choices(name))}" for name in GROUPS)
        print(HELP.format(groups=groups), end="")
        return
    # torch's threads sleep while they wait for one another: beside other programs, spinning costs many times the work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A plugin may import JAX before the package does, and JAX would take 75 % of a GPU at its first use.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    register()
    sys.argv[1:] = quote_free_text(options_first(sys.argv[1:]))
    if any(text.startswith(("--cfg", "-c")) and not text.startswith("--config") for text in sys.argv[1:]):
        _show_real_values()
    _wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise; otherwise it prints its own text and exits
    try:
        main()
    except (HydraException, OmegaConfBaseException, MarkedYAMLError, ValueError) as error:
        if _wants_traceback:
            raise
        _exit_with(str(error) if isinstance(error, FaResearchError) else explain(error))
    except KeyboardInterrupt:
        complain(f"interrupted; {_how_to_go_on(_sweep_dir)}" if _sweep_dir else "interrupted")
        raise SystemExit(130) from None
    except BrokenPipeError:  # as in `python run.py --cfg job | head -3`
        _exit_unread()


def _show_real_values() -> None:
    """Have Hydra show the values that the run would use; comments come first, but not where one package is asked for,
    whose value a shell may read."""
    from hydra._internal.hydra import Hydra

    from fa_research.config.shown import show_real_values

    compose, whole = Hydra.compose_config, not any(text.startswith(("-p", "--package")) for text in sys.argv)

    def compose_as_run(hydra: Hydra, config_name: str | None, overrides: list[str], **how: Any) -> DictConfig:
        cfg = compose(hydra, config_name, overrides, **how)
        for line in show_real_values(cfg, cfg.hydra.overrides.task):
            if whole:
                print(line)
        return cfg

    Hydra.compose_config = compose_as_run  # type: ignore[method-assign, assignment]  # there is no hook


def run_one(cfg: DictConfig) -> Row | None:
    """One cell: check the config, run it, and see to it that a row says how it ended.

    A user's mistake in a single run ends the process with one line and exit code 2; in a sweep it becomes a row. None:
    a cell before it failed, and `sweep.fail_fast` is set.
    """
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return _run(cfg, hydra)
    sweep_dir = Path(hydra.sweep.dir)
    if stop_requested(sweep_dir):
        return None
    with running_a_cell(sweep_dir):
        row = _run(cfg, hydra)
    if cfg.sweep.fail_fast and exit_code([row], sweep=True):
        request_stop(sweep_dir)
    return row


def _run(cfg: DictConfig, hydra: Any) -> Row:
    output_dir, multirun = Path(hydra.runtime.output_dir), hydra.mode == RunMode.MULTIRUN
    rows_before = count_rows(output_dir)
    asked: DictConfig | dict[str, Any] = cfg
    try:
        config = read_config(cfg, hydra.overrides.task)
        asked = resolved = to_plain(config)
        validate(config)
        OmegaConf.save(OmegaConf.create(escape(resolved)), output_dir / "config.yaml")
        against = read_against(config, hydra.job.config_name, hydra.overrides.task)
        if not multirun:
            log.info("%s", opening(config, output_dir))
        with nullcontext() if multirun else watched(output_dir, resolved, rows_before):
            row = _run_cell(config, resolved, output_dir, multirun, against, _given(hydra))
    except Exception as error:
        row = record_failure(
            output_dir, error, asked, rows_before=rows_before, overrides=hydra.overrides.task
        )
        if not multirun and _wants_traceback:
            raise
        if _is_plain(row, error):
            if not multirun:
                if isinstance(error, FaResearchError):
                    _exit_with(
                        str(error), FAILED if isinstance(error, BackendFault | DoesNotFit) else USER_ERROR
                    )
                _exit_with("; ".join(row.reasons), FAILED)
        else:
            log_bug(log, error)
    if not multirun and (code := exit_code([row])):
        raise SystemExit(code)
    return row


def _run_cell(
    config: Config,
    resolved: dict[str, Any],
    output_dir: Path,
    multirun: bool,
    against: Config | None,
    given: list[str],
) -> Row:
    """Here, or for a sweep in a worker process, so that this one imports no torch."""
    if multirun and config.sweep.isolate:
        from fa_research.isolation import run_apart

        return run_apart(config, resolved=resolved, output_dir=output_dir, against=against, given=given)
    fingerprint.take()
    from fa_research.runner import run_cell

    return run_cell(
        config, resolved=resolved, output_dir=output_dir, multirun=multirun, against=against, given=given
    )


def _given(hydra: Any) -> list[str]:
    """The keys that the command line and the preset set."""
    preset = None
    if name := hydra.runtime.choices.get("experiment"):
        folders = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
        files = [folder / "experiment" / f"{name}.yaml" for folder in folders]
        preset = next((file for file in files if file.is_file()), None)
    own = [text for text in hydra.overrides.hydra if not text.startswith("hydra.mode=")]
    return given_keys([*hydra.overrides.task, *own], preset)


def _is_plain(row: Row, error: Exception) -> bool:
    """Whether the message says all: what a user can cause, and memory that ran out. The rest keeps its traceback."""
    return isinstance(error, FaResearchError) or str(row.status) == "oom"


def exit_code(rows: Iterable[Row], sweep: bool = False) -> int:
    """0 if the results stand. In a sweep a cell that cannot run is a result; a wrong or broken one never is."""
    statuses = {str(row.status) for row in rows}
    if statuses & {"error", "inaccurate"}:
        return FAILED
    if sweep:
        return 0
    return FAILED if "oom" in statuses else USER_ERROR if "unsupported" in statuses else 0


def _exit_with(message: str, code: int = USER_ERROR) -> NoReturn:
    complain(f"error: {' '.join(message.split())}")
    raise SystemExit(code)


def _exit_unread() -> NoReturn:
    """Ends the process where nobody reads what it prints any more."""
    drop(sys.stdout)
    raise SystemExit(FAILED) from None


class RunCallback(Callback):
    """Refuses an unwritable output folder before anything runs; gathers and shows the rows of a sweep."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _check_folder(config, "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        global _sweep_dir
        _check_agent(config)
        _check_folder(config, "hydra.sweep.dir")
        _sweep_dir = config.hydra.sweep.dir

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from fa_research.tracking import CONSOLE, print_table

        sweep_dir, known = Path(config.hydra.sweep.dir), outcome()
        rows = gather(sweep_dir, known)
        print_table(rows)
        CONSOLE.print(f"{plural(len(rows), 'row')} in {sweep_dir}", soft_wrap=True)
        if known.unwritten:
            jobs = ", ".join(f"#{job}" for job in sorted(known.unwritten))
            CONSOLE.print(f"not on disk, which did not take them: {jobs}", style="red", soft_wrap=True)
        if known.not_run:
            stopped = "stopped at the first cell that failed (sweep.fail_fast=true)"
            rest = f"{len(known.not_run)} not run: {_how_to_go_on(str(sweep_dir))}"
            CONSOLE.print(f"{stopped}, {rest}", soft_wrap=True)
        if rows:
            report_and_mirror(config, sweep_dir, tracebacks=_wants_traceback)
        if not rows or known.unwritten or known.not_run:
            raise SystemExit(FAILED)
        if code := exit_code(rows, sweep=True):
            raise SystemExit(code)


def _how_to_go_on(sweep_dir: str) -> str:
    again = for_shell("hydra.sweep.dir", sweep_dir)
    return f"the same command with {again} goes on from the rows made so far"


def _check_agent(config: DictConfig) -> None:
    """Ends the process where a W&B agent wants one run and got a sweep, whose cells would all be that run."""
    if os.environ.get("WANDB_SWEEP_ID") and str(config.tracking.mode) != "disabled":
        _exit_with(
            "a W&B agent started this (WANDB_SWEEP_ID is set) for one cell of its sweep: give no -m, no lists of "
            "values and no experiment= that sweeps; or tracking=disabled"
        )


def _check_folder(config: DictConfig, key: str) -> None:
    """Ends the process unless files can be made in the folder that `key` names."""
    try:
        folder = Path(OmegaConf.select(config, key))
        if problem := number_for_text(config) or study_problem(
            config.study
        ):  # before a folder of that name is made
            _exit_with(problem)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OmegaConfBaseException as error:
        _exit_with(explain(error))
    except OSError as error:
        _exit_with(
            f"cannot write to {key}={folder}: {error.strerror}; give a writable folder, as in {key}=/tmp/run"
        )
