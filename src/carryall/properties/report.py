"""One self-contained HTML page of sections: pictures and styles inside, no link to anything outside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --ink: #1d252c; --soft: #5b6670; --line: #dfe4e8; }
:root { --paper: #ffffff; --band: #f4f6f8; --accent: #2563a8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaee; --soft: #9aa6b1; --line: #333c45; --paper: #14191e; --band: #1d242b; --accent: #7ab2ea; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 54rem; background: var(--paper); color: var(--ink); }
body { font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; padding-top: .75rem; color: var(--accent); }
h2 { border-top: 1px solid var(--line); }
p { margin: .5rem 0; }
.lead { color: var(--soft); }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; margin: .5rem 0; min-width: 50%; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: right; }
@media (max-width: 30rem) { th, td { padding: .3rem .25rem; font-size: .95em; } }
th:first-child, td:first-child { text-align: left; }
th { background: var(--band); font-weight: 600; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
figure { margin: .75rem 0; max-width: 32rem; }
img { display: block; width: 100%; height: auto; border-radius: 6px; background: #ffffff; }
figcaption { font-size: .85rem; color: var(--soft); margin-top: .3rem; }
"""


@dataclass(frozen=True)
class Table:
    """Header and rows of text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG file and what it shows."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading with what belongs to it, shown in the order of the fields; paragraphs of text are parted by empty lines."""

    title: str
    text: str = ""
    table: Table | None = None
    pictures: Sequence[Picture] = ()


def write_report(path: str | Path, title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Write the page; it appears under its name when complete."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    part.write_text(page(title, lead, sections), encoding="utf-8")
    part.replace(path)
    return path


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The HTML text."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(section_html(one) for one in sections)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        f'<body><h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n{body}\n</body></html>\n'
    )


def section_html(section: Section) -> str:
    """One section."""
    paragraphs = [f"<p>{escape(one)}</p>" for one in section.text.split("\n\n") if one.strip()]
    table = [table_html(section.table)] if section.table else []
    pictures = (
        [f'<div class="pictures">{"".join(picture_html(one) for one in section.pictures)}</div>'] if section.pictures else []
    )
    return "\n".join([f"<section><h2>{escape(section.title)}</h2>", *paragraphs, *table, *pictures, "</section>"])


def table_html(table: Table) -> str:
    """A table; cells wrap on a narrow screen, and it scrolls sideways where that is not enough."""
    head = "".join(f"<th>{escape(one)}</th>" for one in table.header)
    rows = "".join("<tr>" + "".join(f"<td>{escape(one)}</td>" for one in row) + "</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def picture_html(picture: Picture) -> str:
    """The PNG inside the page."""
    data = base64.b64encode(Path(picture.path).read_bytes()).decode()
    caption = escape(picture.caption)
    return f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
