"""report.html and report.md of a run folder: one page that needs nothing else, and its figures.

Knows how sections become HTML (escaped, self-contained, without a network) and Markdown. What they
say is for `sections.py`. It needs no torch.
"""

from __future__ import annotations

import base64
import json
import multiprocessing
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import escape
from matplotlib.figure import Figure

import bkprune
from bkprune import study
from bkprune.drawing import png_and_svg
from bkprune.evidence import Run, Section
from bkprune.sections import sections, winner_line
from bkprune.study import write_atomic

_ASSETS = Path(bkprune.__file__).parent / "assets" / "report"
HTML, MARKDOWN, _MADE = "report.html", "report.md", "made.json"


def build(folder: Path) -> Path:
    """Write the report of a run folder and say where its page is.

    Raises:
        ValueError: no tables there, or one that is not what it should be.
    """
    run = Run(folder)
    found = list(sections(run))
    files = _drawn(folder / study.FIGURES, run.figures, _key(folder))
    title = f"bkprune: {_subject(run)}"
    lead = winner_line(run) if run.winner else "No search was run."
    page = _page(run, found, files, title, lead)
    write_atomic(folder / MARKDOWN, _markdown(found, title, lead).encode())
    write_atomic(folder / HTML, page.encode())
    return folder / HTML


def _subject(run: Run) -> str:
    models = run.evaluation.get("models", {})
    model = models.get("teacher") or run.machine.get("model")
    first = next(iter(run.record.get("stages", {}).values()), None)
    name = model or (first["words"][0] if first else run.folder.resolve().name)
    return Path(str(name)).name


def _key(folder: Path) -> str:
    """Changes with any table: figures of the same tables need not be drawn again."""
    found = sorted(p for p in folder.rglob("*") if p.suffix in (".csv", ".jsonl", ".json"))
    tables = [p for p in found if p.name not in (_MADE, "run.json") and "pictures" not in p.parts]
    digests = [study.digest([p.name, p.read_bytes().hex()]) for p in tables]
    return study.digest([bkprune.__version__, matplotlib.__version__, digests])


_INHERITED: dict[str, Figure] = {}  # in a forked process: what the parent has, without pickling it


def _inherited(stem: str) -> tuple[bytes, bytes]:
    return png_and_svg(_INHERITED[stem])


def _drawn(into: Path, figures: Mapping[str, Figure], key: str) -> dict[str, tuple[bytes, bytes]]:
    """PNG and SVG of every figure, written; two at a time where nothing forbids to fork."""
    places = {stem: (into / f"{stem}.png", into / f"{stem}.svg") for stem in figures}
    made = into / _MADE
    told = json.dumps({"key": key}) + "\n"
    is_made = made.exists() and made.read_text(encoding="utf-8", errors="replace") == told
    if is_made and all(path.exists() for pair in places.values() for path in pair):
        return {n: (png.read_bytes(), svg.read_bytes()) for n, (png, svg) in places.items()}
    if sys.platform == "linux" and "torch" not in sys.modules and len(figures) > 2:
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(2, fork, _INHERITED.update, (figures,)) as pool:
            drawn = list(pool.map(_inherited, figures))
    else:
        drawn = [png_and_svg(figure) for figure in figures.values()]
    files = dict(zip(figures, drawn, strict=True))
    for stem, pair in files.items():
        for path, data in zip(places[stem], pair, strict=True):
            write_atomic(path, data)
    write_atomic(made, told.encode())
    return files


# --- HTML ------------------------------------------------------------------------------------


def _page(
    run: Run,
    found: list[Section],
    files: Mapping[str, tuple[bytes, bytes]],
    title: str,
    lead: str,
) -> str:
    loader = jinja2.FileSystemLoader(_ASSETS)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("report.html")
    shown = [
        {
            **asdict(section),
            "front": _json(section.front) if section.front else "",
            "figures": [
                figure
                for stem, caption in section.figures
                if (figure := _inline(run, files, stem, caption)) is not None
            ],
        }
        for section in found
    ]
    page: str = template.render(
        title=title,
        lead=lead,
        sections=shown,
        css=(_ASSETS / "report.css").read_text(encoding="utf-8"),
        js=(_ASSETS / "report.js").read_text(encoding="utf-8"),
        footer=f"Made by bkprune {bkprune.__version__} from the tables beside this page.",
    )
    return page


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _inline(
    run: Run, files: Mapping[str, tuple[bytes, bytes]], stem: str, caption: str
) -> dict[str, str] | None:
    if stem in files:
        kind, data = "svg+xml", files[stem][1]
    else:
        path = run.folder / stem
        if not path.is_file():
            return None
        kind, data = "png", path.read_bytes()
    return {"kind": kind, "data": base64.b64encode(data).decode(), "caption": caption}


# --- Markdown --------------------------------------------------------------------------------


def _markdown(found: list[Section], title: str, lead: str) -> str:
    lines = [f"# {_plain(title)}", "", _plain(lead), ""]
    for section in found:
        lines += [f"## {section.title}", ""]
        if section.missing:
            lines += [f"*{section.missing}*", ""]
        for words in section.words:
            lines += [_plain(words), ""]
        for table in section.tables:
            lines += [_row(table.columns), _row(_rules(len(table.columns), table.numeric))]
            lines += [*map(_row, table.rows), ""]
        for stem, caption in section.figures:
            path = stem if stem.endswith(".png") else f"{study.FIGURES}/{stem}.png"
            lines += [f"![{_plain(caption)}]({path})", ""]
        for code in section.code:
            lines += [*(f"    {line}" for line in code.splitlines()), ""]
    return "\n".join(lines).rstrip() + "\n"


def _rules(n: int, numeric: Any) -> list[str]:
    return ["---:" if i in numeric else "---" for i in range(n)]


def _row(cells: Any) -> str:
    return "| " + " | ".join(_plain(str(cell)).replace("|", "\\|") for cell in cells) + " |"


def _plain(text: str) -> str:
    """Markdown renderers take HTML: what comes from outside must not be any."""
    return str(escape(" ".join(text.split()))).replace("&#39;", "'").replace("&#34;", '"')
