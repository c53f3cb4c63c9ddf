"""Whether all masks, backends and workloads can be found, those of plugins too: asked before any cell runs."""

from __future__ import annotations

import signal
import subprocess
import sys

from fa_research.discovery import PLUGINS, plugins
from fa_research.errors import ConfigError

_MARK = "fa_research: "  # others may write to stderr as well
_CHECK = "import sys; sys.path[:] = sys.argv[1:]; from fa_research.plugins import main; main()"


def check() -> None:
    """Raises ConfigError for a plugin that cannot be imported, and for classes that `discovery.discover` refuses.
    Imports them all, and torch."""
    from fa_research import backends, masks, workloads

    for part in (masks, backends, workloads):
        part.names()


def check_apart() -> None:
    """The same, if there are plugins, in a process of its own: one that only launches cells imports no torch."""
    if not plugins():
        return
    done = subprocess.run([sys.executable, "-c", _CHECK, *sys.path], capture_output=True, text=True)
    if done.returncode == 0:
        return
    lines = done.stderr.strip().splitlines()
    if ours := [line.removeprefix(_MARK) for line in lines if line.startswith(_MARK)]:
        raise ConfigError(ours[-1])
    how = f" by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else ""
    said = f"; its last line was: {lines[-1]}" if lines else ""
    raise ConfigError(f"{PLUGINS}={','.join(plugins())}: cannot be imported: it ended its process{how}{said}")


def main() -> None:
    """Ends the process with what is wrong, on one line."""
    try:
        check()
    except ConfigError as error:
        sys.exit(_MARK + " ".join(str(error).split()))
