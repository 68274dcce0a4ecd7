"""A result in all its forms: Markdown, JSON, PNG, and one HTML page that needs no network."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from dbop_raw.sizing.tables import Table

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
        text = json.dumps({"about": self.about, **self.data}, indent=1, allow_nan=False)
        # For a reader: an item a line, but a list of plain numbers is one line.
        text = re.sub(r"\[[-+.,\s\deE]+\]", lambda found: " ".join(found[0].split()), text) + "\n"
        forms = {
            "json": text.encode(),
            "md": self.markdown().encode(),
            "png": self.png,
            "html": self.html().encode(),
        }
        paths = [folder / f"{self.name}.{ending}" for ending in forms]
        for path, content in zip(paths, forms.values(), strict=True):
            path.write_bytes(content)
        return paths

    def markdown(self) -> str:
        """As Markdown, beside its PNG."""
        first, *others = self.sentences
        facts = [f"- {name}: {_fact(value)}" for name, value in self.about.items()]
        lines = [f"# {self.title}", f"**{first}**", *others, f"![{self.picture}]({self.name}.png)"]
        lines += [table.markdown().rstrip("\n") for table in self.tables]
        return "\n\n".join([*lines, "### Where it comes from", "\n".join(facts)]) + "\n"

    def html(self) -> str:
        """As one page, with the chart inside."""
        body = str(MarkdownIt("commonmark").enable("table").render(self.markdown()))
        picture = base64.b64encode(self.png).decode("ascii")
        body = body.replace(f'src="{self.name}.png"', f'src="data:image/png;base64,{picture}"')
        return _PAGE.format(title=html.escape(self.title), body=body)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; }}
body {{ max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; }} h3 {{ font-size: 1.1rem; margin-top: 2rem; }}
h1 + p {{ border-left: 4px solid #c2410c; padding: .4rem 1rem; font-size: 1.1rem; background: #fdf3ec; }}
img {{ max-width: 100%; height: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }}
th, td {{ padding: .25rem .8rem; border-bottom: 1px solid #ddd; white-space: nowrap; }}
table + p, li {{ color: #555; font-size: .9rem; }}
</style>
</head>
<body>
{body}</body>
</html>
"""


def _fact(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_fact(inner)}" for name, inner in value.items() if inner is not None)
    return ",".join(str(one) for one in value) if isinstance(value, (list, tuple)) else str(value)
