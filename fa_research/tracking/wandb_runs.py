"""W&B runs: in which mode, with which settings, and what happens where one cannot be started.

wandb is imported only when a run is really opened.
"""

from __future__ import annotations

import logging
import netrc
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fa_research.config import TrackingConfig, TrackingMode

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

# System sampling would disturb what is timed, and machine facts are in the row without naming the host.
SETTINGS: dict[str, Any] = {
    "silent": True,
    "console": "off",
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "init_timeout": 30,
    "finish_timeout": 60,
}


def agents_sweep() -> str | None:
    """The id of the W&B sweep whose agent started this process; None: no agent did."""
    return os.environ.get("WANDB_SWEEP_ID") or None


def open_run(
    tracking: TrackingConfig, output_dir: Path, *, study: str, own_id: bool, **about: Any
) -> tuple[wandb.Run | None, list[str]]:
    """A run in the mode that `tracking` asks for, under `output_dir`/wandb; where online fails offline, where that
    fails too, or `tracking` wants none, no run.

    Args:
        own_id: take no run id from the environment: this is one of several runs.
        about: what `wandb.init` is told besides.

    Returns:
        the run, and what went wrong on the way to it; that is logged too.
    """
    notes: list[str] = []
    mode = resolve_mode(tracking.mode)
    attempts = {
        TrackingMode.disabled: [],
        TrackingMode.offline: [mode],
        TrackingMode.online: [mode, TrackingMode.offline],
    }[mode]
    for attempt in attempts:
        try:
            return _init(tracking, attempt, output_dir, study, own_id, about), notes
        except Exception as error:
            instead = "without W&B" if attempt is attempts[-1] else "offline"
            notes.append(note(f"W&B could not start a run in mode {attempt}, went on {instead}", error))
            log.warning(notes[-1])
    return None, notes


def _init(
    tracking: TrackingConfig,
    mode: TrackingMode,
    output_dir: Path,
    study: str,
    own_id: bool,
    about: dict[str, Any],
) -> wandb.Run:
    import wandb

    return wandb.init(
        mode="online" if mode is TrackingMode.online else "offline",
        dir=output_dir,
        project=tracking.project,
        entity=tracking.entity,
        tags=[study, *tracking.tags],
        id=secrets.token_hex(4) if own_id else None,
        reinit="finish_previous",
        settings=SETTINGS,
        **about,
    )


def place_of(run: wandb.Run) -> dict[str, str]:
    """Where to find a run; of an offline run as far as it is known before it is uploaded."""
    place = {"entity": run.entity, "project": run.project, "group": run.group, "run_id": run.id}
    return {key: value for key, value in place.items() if value}


def note(what: str, error: BaseException) -> str:
    """What went wrong, on one line."""
    detail = " ".join(str(error).split())
    return f"{what}: {type(error).__name__}: {detail}"[:500]


def resolve_mode(mode: TrackingMode) -> TrackingMode:
    """What `auto` means here: WANDB_MODE if it is set, else online if a key is configured, else offline."""
    if mode is not TrackingMode.auto:
        return mode
    wanted = os.environ.get("WANDB_MODE", "").lower()
    if wanted in ("online", "offline", "disabled"):
        return TrackingMode[wanted]
    return TrackingMode.online if has_key() else TrackingMode.offline


def has_key() -> bool:
    """Whether a W&B key is in the environment or in netrc. Reads no more than whether it is there."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(str(path)).authenticators(host) is not None:
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
