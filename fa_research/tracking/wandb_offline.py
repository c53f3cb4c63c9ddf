"""A sweep whose W&B server does not answer: the first cell that finds out tells the others, in any process.

Without it every cell would wait for the same failure once more. What is told is a file in the sweep's folder; a sweep
that is started again tries W&B again.
"""

from __future__ import annotations

import socket
import threading
import urllib.request
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

SWEEP_FILE = "multirun.yaml"  # Hydra writes it into the folder of a sweep before the first cell begins
_FILE = ".wandb-offline"
CONNECT_S = 5.0  # a server that takes longer to accept a connection is not waited for


def sweep_of(cell_dir: Path) -> Path:
    """The folder of the sweep that a cell's folder is of: the nearest sweep's folder above it, else its parent."""
    return next((folder for folder in cell_dir.parents if (folder / SWEEP_FILE).exists()), cell_dir.parent)


def why_offline(sweep_dir: Path) -> str | None:
    """What an earlier cell of the sweep has said of W&B, None if all is well."""
    try:
        return (sweep_dir / _FILE).read_text(encoding="utf-8") or None
    except OSError:
        return None


def go_offline(sweep_dir: Path, why: str) -> bool:
    """Keep the sweep's other cells from trying; False where another cell was first."""
    try:
        with (sweep_dir / _FILE).open("x", encoding="utf-8") as file:
            file.write(why)
    except FileExistsError:
        return False
    except OSError:
        pass  # nowhere to write it: each cell finds out by itself
    return True


def try_again(sweep_dir: Path) -> None:
    """Forget what an earlier attempt at the sweep found."""
    with suppress(OSError):
        (sweep_dir / _FILE).unlink(missing_ok=True)


def require_reachable(url: str, seconds: float = CONNECT_S) -> None:
    """Raises ConnectionError unless the server of a URL, or the proxy before it, accepts a connection in time."""
    target = _proxy_for(url) or url
    parts = urlsplit(target if "//" in target else f"//{target}")
    host, port = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
    failed: list[str] = [f"no answer within {seconds:g} s"]

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=seconds).close()
            failed.clear()
        except OSError as error:
            failed[0] = error.strerror or str(error)

    # In a thread: looking up a name takes as long as the system's resolver wants.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise ConnectionError(f"{host}:{port} cannot be reached: {failed[0]}")


def _proxy_for(url: str) -> str | None:
    parts = urlsplit(url)
    if parts.hostname is None or urllib.request.proxy_bypass(parts.hostname):
        return None
    return urllib.request.getproxies().get(parts.scheme)
