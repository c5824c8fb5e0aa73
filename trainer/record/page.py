"""HTML pages that need nothing but a browser: no network, no scripts; light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tilewright.trainer.errors import TrainingError
from tilewright.trainer.record.plot import Plot
from tilewright.trainer.record.quantities import gigabytes
from tilewright.trainer.run_directory import write_atomically


def document(title: str, sections: Iterable[str], *, refresh: int = 0) -> str:
    """The whole page.

    Args:
        refresh: seconds after which a browser reads it again; 0: never.
        title: plain text.
        sections: HTML, one below the other; whatever came from outside is escaped there already.
    """
    body = "\n".join(section for section in sections if section)
    again = f'<meta http-equiv="refresh" content="{refresh}">\n' if refresh else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{again}<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def write(path: Path, page: str) -> None:
    """Write a page, whole or not at all.

    Raises:
        TrainingError: it cannot be written there.
    """
    try:
        write_atomically(path, page)
    except OSError as error:
        raise TrainingError(f"could not write {path}: {error.strerror or error}; mend that and try again") from error


def progress(part: float) -> str:
    """A bar of which `part`, from 0 to 1, is done."""
    return f'<div class="progress"><div style="width: {100 * min(max(part, 0.0), 1.0):.1f}%"></div></div>'


def cards(figures: Iterable[tuple[str, str, str]]) -> str:
    """The headlines: label, value and remark of each."""
    inner = [
        f'<div class="card"><dt>{escape(label)}</dt><dd>{escape(value)}</dd><dd class="soft">{escape(note)}</dd></div>'
        for label, value, note in figures
    ]
    columns = 4 if len(inner) % 4 == 0 or len(inner) % 3 else 3  # no row with gaps, where that can be
    return "\n".join([f'<dl class="figures" style="--columns: {columns}">', *inner, "</dl>"])


def plots(drawn: Iterable[Plot]) -> str:
    """Plots side by side, as many as the window is wide."""
    figures = "\n".join(
        f'<figure class="card"><figcaption><b>{escape(plot.title)}</b> <span class="soft">{escape(plot.caption)}</span>'
        f"</figcaption>\n{plot.svg}</figure>"
        for plot in drawn
    )
    return f'<section class="plots">\n{figures}\n</section>'


def environment(facts: Mapping[str, Any]) -> str:
    """Where the figures come from: nested JSON as a table of its leaves; nothing where there is none."""
    if not facts:
        return ""
    rows = "\n".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in _leaves(facts))
    return f'<section>\n<h2>Environment</h2>\n<div class="card"><table>\n{rows}\n</table></div>\n</section>'


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of nested JSON by dotted name, as text."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _leaves(entry, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Sequence) and any(isinstance(entry, Mapping) for entry in value):
        for place, entry in enumerate(value):
            yield from _leaves(entry, f"{name}.{place}")
    elif isinstance(value, list):
        yield name, ", ".join(map(str, value)) or "none"
    elif name.endswith("_bytes") and isinstance(value, int):
        yield name.removesuffix("_bytes"), gigabytes(value)
    else:
        yield name, "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f6f3; --card: #ffffff; --ink: #1d2025; --soft: #5f656d; --line: #d9dbdf;
  --first: #2a5fc4; --second: #b5521b; --third: #2b7d4f; --note: #fdf1d8;
  --fourth: #8a3fa8; --fifth: #a8293f; --sixth: #1f7f8c; --seventh: #86701a; --eighth: #59606b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14161a; --card: #1d2025; --ink: #e5e7ea; --soft: #9ba1a9; --line: #383d45;
    --first: #7ca6ff; --second: #f0a06a; --third: #6cc796; --note: #3a311b;
    --fourth: #cf92e8; --fifth: #f58a9b; --sixth: #6fcad6; --seventh: #d3bb5c; --eighth: #aab2bf;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 28px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 8px; }
p { margin: 6px 0; }
.soft { color: var(--soft); font-size: 14px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.status { font-size: 14px; font-weight: 600; padding: 3px 10px; border-radius: 99px; vertical-align: middle;
  border: 1px solid currentColor; white-space: nowrap; }
.done { color: var(--third); }
.open { color: var(--second); }
.running { color: var(--first); }
.progress { height: 6px; margin-top: 12px; border-radius: 99px; background: var(--line); overflow: hidden; }
.progress div { height: 100%; border-radius: 99px; background: var(--first); }
.note { background: var(--note); padding: 10px 14px; border-radius: 8px; margin: 14px 0; }
.figures { display: grid; grid-template-columns: repeat(var(--columns), 1fr); gap: 12px; margin: 22px 0; }
@media (max-width: 800px) { .figures { grid-template-columns: repeat(2, 1fr); } main { padding: 18px 14px; } }
.figures .card { padding: 12px 16px; }
.figures dt { color: var(--soft); font-size: 14px; }
.figures dd { margin: 0; font-size: 25px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.figures dd.soft { font-size: 13px; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); gap: 14px; }
figure { margin: 0; padding: 12px 14px 6px; min-width: 0; }
figcaption { margin-bottom: 6px; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; }
pre { margin: 0; padding: 14px 16px; overflow-x: auto; font: 13px/1.5 ui-monospace, monospace; }
.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 6px 16px; }
td { overflow-wrap: anywhere; }
th { font-weight: 400; color: var(--soft); width: 30%; white-space: nowrap; }
tr + tr > * { border-top: 1px solid var(--line); }
.data { overflow-x: auto; margin: 10px 0; }
.data table { width: auto; min-width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
.data th, .data td { width: auto; padding: 4px 12px; white-space: nowrap; overflow-wrap: normal; }
.data thead th { border-bottom: 1px solid var(--line); }
.data .number { text-align: right; }
.better { color: var(--third); }
.worse { color: var(--fifth); font-weight: 600; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--soft); font-size: 14px; }
footer { margin-top: 36px; border-top: 1px solid var(--line); }
"""
