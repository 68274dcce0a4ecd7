"""What the benchmarks have in common: their command line, their server, and where the results go."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from bench.header import header
from bench.measure import Case, measure
from bench.report import Section, draw, markdown, verdict
from bench.results import FIGURES, RESULTS, Result
from dbop_raw.testing import Server, ServerError, ServerUnavailable, postgres


def size(full: Any, about: str = "", *, quick: Any = None, least: int = 1) -> Any:
    """A field that says how much is measured; `quick`: the same in tiny sizes, which show that it works."""
    quick = full if quick is None else quick
    return field(default=full, metadata={"about": about, "quick": quick, "least": least})


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Where it is measured, and how much."""

    server: Server
    dsn: str
    """Of an empty database, dropped at the end."""
    sizes: Any
    result: Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    name: str
    title: str
    sizes: Any
    """A dataclass of `size`s: how much is measured; its whole numbers are options."""
    packages: Sequence[str]
    """Whose versions the header has."""
    parts: Mapping[str, Callable[[Run], Iterable[Case]]]
    """What is measured, in this order."""
    sections: Mapping[str, Section]
    """How the result is shown, by the names of its sections."""
    derive: Callable[[Result], None] = lambda _: None
    """Adds the figures that follow from the others."""

    def main(self, arguments: Sequence[str]) -> int:
        """Measure, print and write; exit code 1 when something failed or missed its bound."""
        asked = self._parser().parse_args(arguments)
        if asked.report:
            self.write(Result.read(RESULTS / f"{self.name}.json"), RESULTS)
            return 0
        given = {one.name: one.metadata["quick"] for one in fields(self.sizes) if asked.quick}
        given |= {
            one.name: getattr(asked, one.name)
            for one in fields(self.sizes)
            if getattr(asked, one.name, None) is not None
        }
        sizes = replace(self.sizes, **given)
        try:
            with database(asked.dsn, f"bench_{self.name}") as (server, dsn):
                result = asyncio.run(self._measure(server, dsn, sizes, asked, arguments))
        except (ServerUnavailable, ServerError) as exc:
            print(f"bench {self.name}: {exc}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"bench {self.name}: stopped by Ctrl-C; nothing was written", file=sys.stderr)
            return 130
        print(markdown(result, self.title, self.sections))
        # A part, or quick sizes, must not take the place of a whole result.
        out = asked.out or (None if asked.quick or asked.only else RESULTS)
        if out is not None:
            self.write(result, out)
        faults = result.failures if asked.quick else faults_of(result)
        for line in faults:
            print(f"bench {self.name}: {line}", file=sys.stderr)
        return 1 if faults else 0

    async def _measure(
        self, server: Server, dsn: str, sizes: Any, asked: argparse.Namespace, arguments: Sequence[str]
    ) -> Result:
        # Neither the DSN nor a folder of this machine belongs in a result that others read.
        private = {asked.dsn, str(asked.out)}
        command = " ".join(
            ["./scripts/bench", self.name, *("…" if one in private else one for one in arguments)]
        )
        about = await header(
            self.name, dsn, self.packages, asdict(sizes), command=command, embedded=asked.dsn is None
        )
        result = Result(self.name, about | {"quick": asked.quick})
        run = Run(server=server, dsn=dsn, sizes=sizes, result=result)
        await measure([case for part in asked.only or self.parts for case in self.parts[part](run)], result)
        self.derive(result)
        return result

    def write(self, result: Result, folder: Path) -> None:
        """Write the result, its tables and its chart."""
        folder.mkdir(parents=True, exist_ok=True)
        result.write(folder / f"{self.name}.json")
        texts = {f"{self.name}.md": markdown(result, self.title, self.sections), **result.files}
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        why = draw(result, self.sections, folder / f"{self.name}.png")
        print(f"written: {self.name}.*, in {folder.name}")
        if why:
            print(why, file=sys.stderr)

    def _parser(self) -> argparse.ArgumentParser:
        made = argparse.ArgumentParser(prog=f"bench {self.name}", description=self.title, allow_abbrev=False)
        made.add_argument("--dsn", help="postgresql:// URL; gets a database for the time. Default: embedded")
        made.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works")
        made.add_argument(
            "--only", action="append", choices=list(self.parts), help="this part; may be repeated"
        )
        made.add_argument(
            "--out", type=Path, help="folder; default: bench/results, with --quick or --only none"
        )
        made.add_argument(
            "--report", action="store_true", help="only draw the tables and chart of bench/results again"
        )
        for one in fields(self.sizes):
            if one.type == "int":
                option, least = f"--{one.name.replace('_', '-')}", _at_least(one.metadata["least"])
                about = one.metadata["about"] and f"{one.metadata['about']}; "
                made.add_argument(option, type=least, metavar="N", help=f"{about}default: {one.default:,}")
        return made


def faults_of(result: Result) -> list[str]:
    """What failed, and what misses its bound."""
    verdicts = {figure: verdict(result, figure) for figure in result.contenders(FIGURES)}
    return result.failures + [f"{figure}: {said}" for figure, said in verdicts.items() if said != "PASS"]


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return value

    return number


@contextmanager
def database(dsn: str | None, name: str) -> Iterator[tuple[Server, str]]:
    """A durable server of its own, or one that is named; and on it an empty database, dropped at the end."""
    with postgres(dsn=dsn) if dsn is not None else postgres(durable=True) as server:
        # On a named server it gets a unique name.
        made = server.create_database(None if dsn is not None else name)
        try:
            yield server, made
        finally:
            server.drop_database(made)
