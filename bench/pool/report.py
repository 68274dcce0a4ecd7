"""One result in all its forms: terminal, JSON, Markdown, PNG, and one HTML page that needs no network."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from bench.pool.tables import Table

__all__ = ["Report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What is reported, ready to be written."""

    name: str
    """Of the files, without an ending."""
    title: str
    sentences: tuple[str, ...]
    """What came out of it, most important first."""
    tables: Sequence[Table]
    about: dict[str, Any]
    data: dict[str, Any]
    """For JSON, beside `about`."""
    png: bytes
    picture: str
    """What the chart shows, for those who can't see it."""

    def write(self, folder: Path) -> list[Path]:
        """Write all files into `folder`, which is made where it is missing; gives their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        forms = {
            "json": _json({"about": self.about, **self.data}).encode(),
            "md": self.markdown().encode(),
            "png": self.png,
            "html": self.html().encode(),
        }
        paths = []
        for ending, content in forms.items():
            path = folder / f"{self.name}.{ending}"
            path.write_bytes(content)
            paths.append(path)
        return paths

    def print(self, console: Console) -> None:
        """Show it in a terminal."""
        console.print(f"\n[bold]{self.title}[/bold]")
        for table in self.tables:
            if table.rows:
                console.print(_rich(table))
            if table.note:
                console.print(table.note, style="dim", markup=False, highlight=False)
        console.print()
        for number, sentence in enumerate(self.sentences):
            console.print(sentence, style="bold green" if not number else "", markup=False, highlight=False)

    def markdown(self) -> str:
        """As Markdown, beside its PNG."""
        lines = [f"# {self.title}", "", f"**{self.sentences[0]}**", ""]
        lines += [f"{sentence}\n" for sentence in self.sentences[1:]]
        lines += [f"![{self.picture}]({self.name}.png)", ""]
        lines += [table.markdown() for table in self.tables]
        lines += [
            "### Where it comes from",
            "",
            *(f"- {name}: {text}" for name, text in _facts(self.about)),
            "",
        ]
        return "\n".join(lines)

    def html(self) -> str:
        """As one page, with the chart inside."""
        picture = base64.b64encode(self.png).decode("ascii")
        rest = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in self.sentences[1:])
        facts = "".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in _facts(self.about)
        )
        return _PAGE.format(
            title=html.escape(self.title),
            sentence=html.escape(self.sentences[0]),
            rest=rest,
            picture=f'<img alt="{html.escape(self.picture)}" src="data:image/png;base64,{picture}">',
            tables="".join(_html(table) for table in self.tables),
            facts=facts,
        )


# A list of plain numbers.
_NUMBERS = re.compile(r"\[[-+.,\s\deE]+\]")
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; }}
body {{ max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
.answer {{ border-left: 4px solid #c2410c; padding: .4rem 1rem; font-size: 1.1rem; background: #fdf3ec; }}
img {{ max-width: 100%; height: auto; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
tr.marked td {{ background: #fdf3ec; font-weight: 600; }}
.note, dl {{ color: #555; font-size: .9rem; }}
dt {{ font-weight: 600; }} dd {{ margin: 0 0 .4rem 0; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="answer">{sentence}</p>
{rest}
{picture}
{tables}
<h2>Where it comes from</h2>
<dl>{facts}</dl>
</body>
</html>
"""


def _json(data: dict[str, Any]) -> str:
    """For a reader: an item a line, but a list of plain numbers is one line."""
    text = json.dumps(data, indent=1, allow_nan=False)
    return _NUMBERS.sub(lambda found: " ".join(found[0].split()), text) + "\n"


def _rich(table: Table) -> RichTable:
    shown = RichTable(title=table.title, title_justify="left", title_style="bold")
    for number, name in enumerate(table.head):
        shown.add_column(name, justify="right" if number else "left", overflow="fold")
    for number, row in enumerate(table.rows):
        shown.add_row(*row, style="bold" if number == table.marked else None)
    return shown


def _html(table: Table) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.head)
    body = "".join(_html_row(row, marked=number == table.marked) for number, row in enumerate(table.rows))
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    shown = f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>' if table.rows else ""
    return f"<h2>{html.escape(table.title)}</h2>{shown}{note}"


def _html_row(row: Sequence[str], *, marked: bool) -> str:
    cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
    return f'<tr class="marked">{cells}</tr>' if marked else f"<tr>{cells}</tr>"


def _facts(about: dict[str, Any]) -> list[tuple[str, str]]:
    """The header as lines."""
    facts = []
    for name, value in about.items():
        if isinstance(value, dict):
            text = ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items() if inner is not None)
        else:
            text = str(value)
        facts.append((name, text))
    return facts


def _plain(value: object) -> str:
    return ",".join(str(one) for one in value) if isinstance(value, (list, tuple)) else str(value)
