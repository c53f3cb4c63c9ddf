"""A comparison as a report on W&B: verdicts as text, and panels over the runs of the rows. Needs a login."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from fa_research.compare.comparison import Comparison
from fa_research.compare.decision import axes
from fa_research.compare.estimates import MAIN
from fa_research.compare.files import cells_table
from fa_research.compare.keys import short
from fa_research.compare.names import axis_title, quantity
from fa_research.compare.reading import Record
from fa_research.compare.wandb_lines import in_name
from fa_research.compare.wandb_sweep import JOB_TYPE
from fa_research.compare.wording import caveats, regret_summary, summary
from fa_research.errors import ConfigError
from fa_research.tracking import CONSOLE
from fa_research.tracking.wandb_runs import has_key

_LONGEST_TITLE = 128  # W&B's limit


@dataclass(frozen=True)
class Place:
    """Where the runs of a comparison's rows are. `entity`: None where the rows were made offline."""

    entity: str | None
    project: str
    groups: tuple[str, ...]


def publish(comparison: Comparison) -> str:
    """Save the report, in the project of the rows' runs. Returns its address.

    Raises ConfigError where a login, the extra `wandb-report`, or W&B runs of the rows are missing, and for what W&B
    refuses.
    """
    require_wandb()
    place = place_of(comparison)
    try:
        report = build(comparison, place, place.entity or _own_entity())
        report.save()
    except Exception as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"W&B did not take the report: {type(error).__name__}: {text}"[:500]) from error
    if place.entity is None:
        CONSOLE.print(
            "offline runs show up in it once `wandb sync` has uploaded them", soft_wrap=True, markup=False
        )
    return str(report.url)


def require_wandb() -> None:
    """Raises ConfigError that names all that is missing for a report on W&B."""
    missing = []
    if not has_key():
        missing.append("a login: run `wandb login`, or set WANDB_API_KEY")
    try:
        import wandb_workspaces.reports.v2  # noqa: F401
    except ImportError:
        missing.append('the package wandb-workspaces: pip install -e ".[wandb-report]"')
    if missing:
        raise ConfigError(f"--wandb needs {', and '.join(missing)}")


def place_of(comparison: Comparison) -> Place:
    """Where to find the runs of the rows that are compared. Raises ConfigError for none, and for several projects."""
    found = [record.row.wandb for record in _compared(comparison) if record.row.wandb.get("project")]
    if not found:
        raise ConfigError(
            "--wandb: none of the rows compared has a W&B run, which a report would show; rows made with "
            "tracking=disabled have none, nor have those of versions that did not note it"
        )
    if len(projects := sorted({run["project"] for run in found})) > 1:
        raise ConfigError(
            f"--wandb: the rows are in the W&B projects {', '.join(projects)}: give rows of one"
        )
    if len(entities := sorted({run["entity"] for run in found if run.get("entity")})) > 1:
        raise ConfigError(f"--wandb: the rows belong to {', '.join(entities)} on W&B: give rows of one")
    groups = tuple(sorted({run["group"] for run in found if run.get("group")}))
    return Place(entities[0] if entities else None, projects[0], groups)


def build(comparison: Comparison, place: Place, entity: str) -> Any:
    """The report as an object of wandb-workspaces; nothing is sent."""
    import wandb_workspaces.reports.v2 as wr

    table = _linked(cells_table(comparison), comparison, f"{_app_url()}/{entity}/{place.project}/runs")
    title = f"{comparison.question.title} by {quantity(comparison.metric)}"
    lines = [*summary(comparison), regret_summary(comparison), *caveats(comparison), *comparison.notes]
    text = [f"- {line}" for line in lines]
    blocks = [
        wr.MarkdownBlock("\n".join([*text, "", *table])),
        wr.H2("Runs"),
        wr.PanelGrid(runsets=[_cells_set(comparison, place)], panels=_cell_panels(comparison)),
        wr.H2("Sweeps"),
        wr.PanelGrid(runsets=[_sweeps_set(place)], panels=_sweep_panels(comparison)),
    ]
    return wr.Report(
        project=place.project, entity=entity, title=title[:_LONGEST_TITLE], blocks=blocks, width="fluid"
    )


def _cells_set(comparison: Comparison, place: Place) -> Any:
    """The cells' runs, together by answer. Without a project of its own a run set is of the report's project."""
    import wandb_workspaces.reports.v2 as wr

    key = _answer_key(comparison)
    columns = [f"config:{_stored(name)}" for name in [key, *axes(comparison.cells)] if name is not None]
    return wr.Runset(
        name="cells",
        filters=_filters(place, sweeps=False),
        groupby=[f"config.{key}"] if key else [],
        pinned_columns=[
            "run:displayName",
            "summary:status",
            *columns,
            f"summary:metrics/{comparison.metric}",
        ],
    )


def _sweeps_set(place: Place) -> Any:
    import wandb_workspaces.reports.v2 as wr

    return wr.Runset(name="sweeps", filters=_filters(place, sweeps=True))


def _filters(place: Place, sweeps: bool) -> str:
    """As text, which is parsed as Python: the package's filter objects do not quote quotes."""
    kind = f"JobType {'==' if sweeps else '!='} {JOB_TYPE!r}"
    return f"Group in {list(place.groups)!r} and {kind}" if place.groups else kind


def _cell_panels(comparison: Comparison) -> list[Any]:
    """A bar for each answer, and every cell as a point along what varies first."""
    import wandb_workspaces.reports.v2 as wr

    name = wr.SummaryMetric(f"metrics/{comparison.metric}")
    panels: list[Any] = []
    if key := _answer_key(comparison):
        panels.append(
            wr.BarPlot(
                title=f"{quantity(comparison.metric)}, median of all cells",
                metrics=[name],
                groupby=wr.Config(key),
                groupby_aggfunc="median",
                groupby_rangefunc="minmax",
                layout=wr.Layout(x=0, y=0, w=8, h=8),
            )
        )
    for where in axes(comparison.cells)[:1]:
        panels.append(
            wr.ScatterPlot(
                title=f"{quantity(comparison.metric)} by {axis_title(where)}",
                x=wr.Config(where),
                y=name,
                log_x=True,
                log_y=True,
                layout=wr.Layout(x=8, y=0, w=16, h=8),
            )
        )
    return panels


def _sweep_panels(comparison: Comparison) -> list[Any]:
    """The lines that each sweep's run holds, its table and its figures."""
    import wandb_workspaces.reports.v2 as wr

    panels: list[Any] = []
    keys = axes(comparison.cells)
    if keys and comparison.metric in MAIN:
        along = in_name(short(keys[0], keys))
        panels.append(
            wr.LinePlot(
                title=f"{quantity(comparison.metric)} along {axis_title(keys[0])}",
                x=f"axis/{along}",
                metric_regex=f"along_{re.escape(along)}/{re.escape(comparison.metric)}/.*",
                log_x=True,
                log_y=True,
                layout=wr.Layout(x=0, y=0, w=24, h=10),
            )
        )
    ending = comparison.question.title.rpartition(".")[2]
    figures = ["figures/latency", f"figures/decision_{ending}", f"figures/regret_{ending}"]
    panels.append(wr.MediaBrowser(media_keys=figures, layout=wr.Layout(x=0, y=10, w=24, h=12)))
    panels.append(wr.WeavePanelSummaryTable(table_name="rows", layout=wr.Layout(x=0, y=22, w=24, h=12)))
    return panels


def _compared(comparison: Comparison) -> list[Record]:
    return [entry.record for cell in comparison.cells for entry in cell.entries.values()]


def _answer_key(comparison: Comparison) -> str | None:
    """The key that holds the answers, as W&B has it; None for a group that has no name."""
    name = comparison.question.name
    if comparison.question.is_environment:
        return name
    known = {key for record in _compared(comparison) for key in record.config}
    return next((key for key in (name, f"{name}.name") if key in known), None)


def _stored(key: str) -> str:
    """A dotted key as W&B stores it: the first part is an entry whose `value` holds the rest."""
    first, dot, rest = key.partition(".")
    return f"{first}.value{dot}{rest}"


def _linked(lines: list[str], comparison: Comparison, runs: str) -> list[str]:
    """The table's numbers with links to their runs in place of links to rows; those without a run have none."""

    def to_run(link: re.Match[str]) -> str:
        run_id = comparison.records[int(link[2])].row.wandb.get("run_id")
        return f"[{link[1]}]({runs}/{run_id})" if run_id else link[1]

    return [re.sub(r"\[([^]]*)\]\(#row-(\d+)\)", to_run, line) for line in lines]


def _app_url() -> str:
    import wandb

    return str(wandb.util.api_to_app_url(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")))


def _own_entity() -> str:
    import wandb

    return str(wandb.Api().default_entity)
