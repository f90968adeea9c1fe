"""Writes the Grafana dashboards into a folder: `python -m tools.dashboards deploy/grafana` (part of `make generate`).

`tools/dashboard_panels.py` says what they show; Grafana's own builders make valid JSON of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grafana_foundation_sdk.builders.common import VizLegendOptions
from grafana_foundation_sdk.builders.dashboard import Dashboard, DatasourceVariable, QueryVariable, Row
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.timeseries import Panel as TimeSeries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DataSourceRef, GridPos, VariableRefresh

from tools.dashboard_panels import DASHBOARDS, Panel

SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")
WIDTH, HEIGHT, PER_ROW = 8, 8, 3


def dashboard(name: str) -> str:
    """Renders a dashboard as JSON that Grafana imports."""
    title, rows = DASHBOARDS[name]
    built = (
        Dashboard(title)
        .uid(f"safelight-{name}")
        .tags(["safelight"])
        .time("now-6h", "now")
        .refresh("30s")
        .with_variable(DatasourceVariable("source").label("Prometheus").type("prometheus"))
        .with_variable(
            QueryVariable("job")
            .query("label_values(safelight_instances, job)")
            .datasource(SOURCE)
            .refresh(VariableRefresh.ON_DASHBOARD_LOAD)
            .include_all(True)
            .multi(True)
        )
    )
    y = 0
    for heading, panels in rows.items():
        built = built.with_row(Row(heading).grid_pos(GridPos(h=1, w=24, x=0, y=y)))
        y += 1
        for number, panel in enumerate(panels):
            across, down = number % PER_ROW, number // PER_ROW
            place = GridPos(h=HEIGHT, w=WIDTH, x=across * WIDTH, y=y + down * HEIGHT)
            built = built.with_panel(graph(panel, place))
        y += -(-len(panels) // PER_ROW) * HEIGHT
    return JSONEncoder(sort_keys=True, indent=1).encode(built.build()) + "\n"


def graph(panel: Panel, place: GridPos) -> TimeSeries:
    """Makes a panel at its place in the grid of 24 columns."""
    legend = VizLegendOptions().show_legend(True).display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    drawn = TimeSeries().title(panel.title).description(panel.about).unit(panel.unit).datasource(SOURCE)
    drawn = drawn.grid_pos(place).legend(legend).fill_opacity(10)
    if not panel.signed:
        drawn = drawn.min(0)
    for number, (name, query) in enumerate(panel.queries.items()):
        drawn = drawn.with_target(Dataquery().ref_id(chr(ord("A") + number)).expr(query).legend_format(name))
    return drawn


def main() -> None:
    """Writes all dashboards into the folder that the command line names."""
    for name in DASHBOARDS:
        (Path(sys.argv[1]) / f"{name}.json").write_text(dashboard(name))


if __name__ == "__main__":
    main()
