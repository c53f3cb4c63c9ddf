"""W&B runs: in which mode, with which settings, and what happens where one cannot be started.

wandb is imported only when a run is really opened.
"""

from __future__ import annotations

import hashlib
import logging
import netrc
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fa_research.config import TrackingConfig, TrackingMode
from fa_research.tracking.wandb_offline import go_offline, require_reachable, why_offline

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
    "init_timeout": 15,
    "finish_timeout": 60,
}


# W&B refuses longer texts. The row and the run's config keep them in full.
TAG_CHARS, PROJECT_CHARS, NAME_CHARS = 64, 128, 128


def agents_sweep() -> str | None:
    """The id of the W&B sweep whose agent started this process; None: no agent did."""
    return os.environ.get("WANDB_SWEEP_ID") or None


def open_run(
    tracking: TrackingConfig,
    output_dir: Path,
    *,
    study: str,
    own_id: bool,
    sweep_dir: Path | None = None,
    **about: Any,
) -> tuple[wandb.Run | None, list[str]]:
    """A run in the mode that `tracking` asks for, under `output_dir`/wandb; where online fails offline, where that
    fails too, or `tracking` wants none, no run.

    Args:
        own_id: take no run id from the environment: this is one of several runs.
        sweep_dir: of the sweep that the run belongs to. Once one of its runs could not start online, the others start
            offline at once, and only the first failure is logged.
        about: what `wandb.init` is told besides.

    Returns:
        the run, and what went wrong on the way to it; that is logged too.
    """
    notes: list[str] = []
    mode = resolve_mode(tracking.mode)
    if mode is TrackingMode.online and sweep_dir is not None and (said := why_offline(sweep_dir)):
        mode, notes = TrackingMode.offline, [said]
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
            if attempt is TrackingMode.online:
                notes[-1] = _tell_offline(notes[-1], output_dir, sweep_dir)
            else:
                log.warning(notes[-1])
    return None, notes


def _tell_offline(said: str, output_dir: Path, sweep_dir: Path | None) -> str:
    """Log what kept a run from being online, in a sweep once for all cells; returns what the row says of it."""
    if sweep_dir is not None and not go_offline(sweep_dir, said):
        return why_offline(sweep_dir) or said
    runs, others = (
        (f"{output_dir}/", "")
        if sweep_dir is None
        else (f"{sweep_dir}/{{,*/}}", "; so does every later cell")
    )
    log.warning(f"{said}{others}. Nothing is lost: wandb sync {runs}wandb/offline-run-* uploads later")
    return said


def _init(
    tracking: TrackingConfig,
    mode: TrackingMode,
    output_dir: Path,
    study: str,
    own_id: bool,
    about: dict[str, Any],
) -> wandb.Run:
    import wandb

    if mode is TrackingMode.online:
        require_reachable(os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url)
    return wandb.init(
        mode="online" if mode is TrackingMode.online else "offline",
        dir=output_dir,
        project=shortened(tracking.project, PROJECT_CHARS),
        entity=tracking.entity,
        tags=[shortened(tag, TAG_CHARS) for tag in (study, *tracking.tags) if tag],
        id=secrets.token_hex(4) if own_id else None,
        reinit="finish_previous",
        settings=SETTINGS,
        **about
        | {key: shortened(about[key], NAME_CHARS) for key in ("group", "name", "job_type") if about.get(key)},
    )


def shortened(text: str, limit: int) -> str:
    """A text that W&B takes: where it has more than `limit` characters its beginning, and a hash of the whole."""
    if len(text) <= limit:
        return text
    return f"{text[: limit - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


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
