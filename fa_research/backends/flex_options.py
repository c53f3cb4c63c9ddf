"""What `backend.options` of `flex` may hold."""

from __future__ import annotations

from fa_research.backends.base import BackendSettings
from fa_research.errors import ConfigError

# Ours -> `kernel_options` of FlexAttention.
OPTIONS = {"block_m": "BLOCK_M", "block_n": "BLOCK_N", "num_warps": "num_warps", "num_stages": "num_stages"}


def check_options(settings: BackendSettings) -> None:
    """Raises ConfigError for values that Triton would refuse, from deep within a compilation, at the first layer."""
    for name, value in settings.options.items():
        powers = name != "num_stages"
        if type(value) is not int or value < 1 or (powers and value & (value - 1)):
            raise ConfigError(
                f"backend.options.{name}={value}: must be a {'power of two' if powers else 'whole number from 1 on'}"
            )
    block_n = settings.options.get("block_n", 1)
    if settings.page_size % block_n:
        raise ConfigError(
            f"backend.options.block_n={block_n}: the keys of a tile lie in one page, so it must divide "
            f"kv.page_size={settings.page_size}"
        )
