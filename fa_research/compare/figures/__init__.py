"""The figures of a comparison, as Altair charts. Altair is imported when the first is drawn."""

from __future__ import annotations

from collections.abc import Callable

from fa_research.compare.comparison import Comparison
from fa_research.compare.figures.base import Figure
from fa_research.compare.figures.costs import cost_figure, regret_figure
from fa_research.compare.figures.ledger import ledger_figures
from fa_research.compare.figures.lines import latency_figure, roof_figure
from fa_research.compare.figures.page_size import page_size_figure
from fa_research.compare.figures.pareto import pareto_figure
from fa_research.compare.figures.wins import decision_figure
from fa_research.errors import ConfigError

__all__ = ["Figure", "draw", "require_altair"]


def require_altair() -> None:
    """Raises ConfigError where figures cannot be drawn, naming the extra to install."""
    try:
        import altair  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f'figures need {error.name}, which is not installed: pip install -e ".[report]"'
        ) from None


def draw(comparison: Comparison) -> list[Figure]:
    """All figures that the rows have something for. Raises ConfigError without Altair."""
    require_altair()
    makers: tuple[Callable[[Comparison], Figure | None], ...] = (
        latency_figure,
        cost_figure,
        roof_figure,
        decision_figure,
        regret_figure,
        page_size_figure,
        pareto_figure,
    )
    made = [figure for make in makers if (figure := make(comparison)) is not None]
    return made + ledger_figures(comparison)
