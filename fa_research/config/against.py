"""`measure.against`: the config of the second engine, composed from what was typed and the overrides given there."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from fa_research.config.explain import explain
from fa_research.config.load import load_config
from fa_research.config.schemas import Config, GenerateWorkload
from fa_research.errors import ConfigError

_KEY = "measure.against"
_FIXED = (
    "device",
    "study",
    "experiment",
    "hydra",
    "sweep",
    "tracking",
    "measure",
)  # of the run, not of an engine


def read_against(config: Config, config_name: str | None, overrides: Sequence[str]) -> Config | None:
    """The typed config of `measure.against`; None where it is empty. Hydra must be initialised, as in a task function.

    overrides: what was typed for the first config (`hydra.overrides.task`).

    Raises ConfigError for overrides that Hydra cannot read or compose, for keys that are unknown or belong to the run
    as a whole, and for what `load_config` refuses.
    """
    given = list(config.measure.against)
    if not given:
        return None
    for override in given:
        key = override.lstrip("+~").partition("=")[0]
        if key.partition(".")[0].partition("/")[0] in _FIXED:
            raise ConfigError(
                f"{_KEY}={given}: {key} is of the run and the same for both; give keys of backend, kv, cuda_graph, "
                "model, workload or sampling"
            )
    typed = [*overrides, *given, f"{_KEY}=[]"]  # the last of a key counts
    try:
        second = load_config(compose(config_name, typed), typed)
    except ConfigError as error:
        raise ConfigError(f"{_KEY}={given}: {error}") from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{_KEY}={given}: {explain(error)}") from error
    if GenerateWorkload in (type(config.workload), type(second.workload)):
        raise ConfigError(
            f"{_KEY}={given}: workload=generate times one text while it is written, and repeats nothing in turns; "
            "use workload=text or workload=decode"
        )
    return second
