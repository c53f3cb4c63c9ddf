"""The style sheet of report.html."""

from __future__ import annotations

from fa_research.compare.figures.theme import css_variables

_STYLE = """
:root { color-scheme: light dark; --bg: #ffffff; --panel: #f6f7f9; --link: #0b5fa5; --mark: #fff3c4; --good: #d9f2e6;
  --warn: #8a5a00; %(light)s }
@media (prefers-color-scheme: dark) { :root { --bg: #14171c; --panel: #1c2027; --link: #7cc0f5; --mark: #4a3f14;
  --good: #173d2e; --warn: #f0b93a; %(dark)s } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 28px 24px 80px; }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 6px; }
h2 { font-size: 19px; margin: 44px 0 10px; padding-top: 14px; border-top: 1px solid var(--grid); }
p.banner { font-size: 17px; font-weight: 600; color: var(--warn); border-left: 4px solid var(--warn);
  padding: 4px 12px; max-width: 75ch; }
p.lead { font-size: 17px; margin: 8px 0; max-width: 75ch; }
.muted, figcaption, .small { color: var(--muted); font-size: 13.5px; }
a { color: var(--link); text-decoration: none; } a:hover { text-decoration: underline; }
nav a { margin-right: 16px; font-size: 14px; }
figure { margin: 22px 0 30px; overflow-x: auto; } figure svg { max-width: 100%%; height: auto; display: block; }
@media (max-width: 640px) { figure svg { max-width: none; } } figure svg text { font-family: inherit; }
figure a:hover path { stroke-width: 3.5px; }
figcaption { margin-top: 4px; max-width: 85ch; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 11px; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap;
  vertical-align: top; }
th { color: var(--muted); font-weight: 600; border-bottom: 2px solid var(--grid); }
td.text, th.text { text-align: left; } td.wrap { white-space: normal; min-width: 260px; text-align: left; }
td.best { background: var(--good); } td.best a { font-weight: 650; }
td.status { color: var(--warn); }
tr:target td, tr:target + tr td { background: var(--mark); }
tr.more td { text-align: left; padding-top: 0; white-space: normal; }
h3 { font-size: 16px; margin: 34px 0 6px; } h4 { font-size: 14px; font-weight: 500; margin: 0; }
section.row { border-bottom: 1px solid var(--grid); padding: 4px 8px; overflow-wrap: anywhere; }
section.row .body { display: none; padding: 4px 0 8px; } section.row .status { color: var(--warn); }
section.row:target { background: var(--panel); } section.row:target .body { display: block; }
body:has(#all-rows:checked) section.row .body { display: block; }
summary { cursor: pointer; color: var(--muted); }
pre { background: var(--panel); padding: 10px 14px; overflow-x: auto; font-size: 12.5px; line-height: 1.45;
  border-radius: 6px; columns: 2 380px; column-gap: 32px; margin: 6px 0; }
"""


def style_sheet() -> str:
    """The page's CSS, with the colours of figures in light and dark."""
    return _STYLE % {"light": css_variables(False), "dark": css_variables(True)}
