"""The picture of a run: bars of the figures that matter most, as SVG."""

from collections.abc import Iterator
from xml.sax.saxutils import escape

from report import BRIDGES, Report

_PANELS = (
    ("highest_rate", "highest rate at p99 ≤ 5 ms, deltas/s: more is better"),
    ("cpu_us_20000", "CPU per delta at 20,000/s, µs: less is better"),
    ("cpu_us_coalesced", "CPU per delta, 20 in a write, µs: less is better"),
    ("p99_5000", "added latency at 5,000/s, p99, ms: less is better"),
    ("short_us_10", "CPU per job of 10 tokens in one write, µs: less is better"),
)
_COLOURS = {"straightforward": "#9aa5b1", "node": "#7b9e6b", "ours": "#d9622b", "floor": "#5b7db1"}
_WIDTH, _LEFT, _BAR, _ROW, _HEAD = 720, 120, 460, 22, 34


def svg(report: Report) -> str:
    """Bars of each figure, one below the other, drawn for light and dark pages alike."""
    lines: list[str] = []
    top = 0
    for figure, title in _PANELS:
        names = [name for name in BRIDGES if any(figure in each.get(name, {}) for each in report.rounds)]
        if any(report.medians[name][figure] for name in names):
            lines += _panel(report, names, figure, title, top)
            top += _HEAD + _ROW * len(names) + 12
    height = top + 30
    size = f'viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
    font = 'font-family="system-ui, sans-serif" font-size="13" fill="#7a828c"'
    machine = f'<text x="0" y="{height - 8}" font-size="11">{escape(report.machine.line)}</text>'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>', *lines, machine, "</svg>", ""])


def _panel(report: Report, names: list[str], figure: str, title: str, top: int) -> Iterator[str]:
    most = max(report.medians[name][figure] or 0 for name in names)
    yield f'<text x="0" y="{top + 20}" font-weight="600">{escape(title)}</text>'
    for place, name in enumerate(names):
        value, y = report.medians[name][figure], top + _HEAD + place * _ROW
        width = max(1, round(_BAR * value / most)) if value else 0
        shown = "cannot" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:,.2f}"
        yield f'<text x="{_LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(name)}</text>'
        yield f'<rect x="{_LEFT}" y="{y}" width="{width}" height="16" rx="2" fill="{_COLOURS[name]}"/>'
        yield f'<text x="{_LEFT + width + 8}" y="{y + 12}">{shown}</text>'
