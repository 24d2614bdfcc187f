"""`bkprune run` and `bkprune init`: a whole study in one command."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bkprune.terminal import JSON, QUIET, notice, one_line_errors, print_table

if TYPE_CHECKING:
    from bkprune.stages import Record, Stage
    from bkprune.studyfile import StudyFile

_BUILT_IN = ("emoji",)


def run(
    context: typer.Context,
    study: Annotated[
        Path, typer.Argument(metavar="STUDY", help="A study.toml, or the folder that it lies in.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Run folder. Default: `run` beside the study.toml.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and how long, and stop.")
    ] = False,
    as_json: JSON = False,
    quiet: QUIET = False,
) -> None:
    """Do everything that a study asks for: analyze, profile, search, prune, distill, report.

    What is up to date is skipped, what was interrupted goes on, and what has changed is done anew
    with everything that depends on it; each time it says why.
    """
    with one_line_errors("the same command goes on where it stopped"):
        from bkprune.needs import lacking
        from bkprune.stages import Record, stages_of

        root = context.find_root().command
        asked = _read(root, study)
        folder = out or asked.path.parent / "run"
        stages = stages_of(asked, folder)
        record = Record(folder, asked)
        due = [stage for stage in stages if record.why(stage)]
        missing = lacking(asked, due, folder, brings=asked.model in _BUILT_IN)
        if dry_run:
            _plan(asked, stages, record, as_json=as_json)
            for line in missing:
                notice(f"before it can run: {line}")
            return
        if missing:
            raise ValueError(f"{asked.path}: {'; '.join(missing)}")
        _all(root, asked, folder, stages, record, quiet=quiet)
        report = folder / "report.html"
        typer.echo(json.dumps({"report": str(report)}) if as_json else str(report))


def _all(
    root: Any,
    asked: StudyFile,
    folder: Path,
    stages: Sequence[Stage],
    record: Record,
    *,
    quiet: bool,
) -> None:
    from bkprune.study import write_atomic
    from bkprune.studyfile import NAME

    write_atomic(folder / NAME, asked.path.read_bytes())
    for i, stage in enumerate(stages, start=1):
        why = record.why(stage)
        place = f"[{i}/{len(stages)}] {stage.name}"
        if not why:
            notice(f"{place}: up to date")
            continue
        notice(f"{place}: {why}")
        words = record.words(stage)
        record.begin(stage)
        start = time.monotonic()
        code = root.main(
            args=[*words, *(["--quiet"] if quiet else [])],
            prog_name="bkprune",
            standalone_mode=False,
        )
        if code:
            if code != 130:
                notice(f"bkprune: {place} failed; once mended, `bkprune run` goes on from there")
            raise typer.Exit(code)
        record.finish(stage, time.monotonic() - start)


def _read(root: Any, path: Path) -> StudyFile:
    """The study, checked against the commands' own options."""
    from bkprune import studyfile
    from bkprune.presets import PRESETS

    options = {
        name: [
            studyfile.Option(
                found.opts[0].removeprefix("--"),
                bool(found.is_flag),
                bool(found.secondary_opts),
                bool(found.multiple),
            )
            for found in root.commands[name].params
            if found.param_type_name == "option"
        ]
        for name in studyfile.COMMANDS
    }
    return studyfile.read(path, options, tuple(PRESETS), _parser(root), _BUILT_IN)


def _parser(root: Any) -> Callable[[str, list[str]], str | None]:
    """Whether a command takes these words; what it does not need to know is filled in."""
    needed = {
        "distill": ["student", "--teacher", "teacher"],
        "prune": ["model", "--mask", "winner"],
    }

    def parse(command: str, words: list[str]) -> str | None:
        given = [*needed.get(command, ["model"]), *words]
        try:
            root.commands[command].make_context(command, given)
        except Exception as error:  # typer's own, and private to it
            hint = getattr(error, "param_hint", None) or getattr(
                getattr(error, "param", None), "name", ""
            )
            return f"{hint}: {error}".strip(": ")
        return None

    return parse


def _plan(asked: StudyFile, stages: Sequence[Stage], record: Record, *, as_json: bool) -> None:
    import pandas as pd

    from bkprune.estimates import seconds_of
    from bkprune.stages import table

    rows = [dict(row) for row in table(stages, record)]
    due = [stage for stage, row in zip(stages, rows, strict=True) if row[""] != "up to date"]
    guesses = seconds_of(asked, [s for s in due if record.seconds(s) is None])
    total, unknown = 0.0, False
    for stage, row in zip(stages, rows, strict=True):
        took = record.seconds(stage)
        if stage not in due:
            row["takes"] = ""
        elif took is not None:
            total += took
            row["takes"] = f"{_duration(took)}, as the last time"
        elif guesses.get(stage.name) is not None:
            total += guesses[stage.name] or 0.0
            row["takes"] = f"about {_duration(guesses[stage.name] or 0.0)}"
        else:
            unknown = True
            row["takes"] = "unknown: the model is not here"
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    print_table(pd.DataFrame(rows), f"{asked.path}: {asked.model}")
    if due:
        more = " and what is unknown" if unknown else ""
        typer.echo(f"{len(due)} of {len(stages)} stages to do, about {_duration(total)}{more}")
    else:
        typer.echo("everything is up to date")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def init(
    folder: Annotated[Path, typer.Argument(help="Folder of the new study.")] = Path(),
    model: Annotated[str, typer.Option(help="As in `analyze`.")] = "emoji",
    data: Annotated[
        Path | None, typer.Option(help="Captioned pictures, for analysis, training and prompts.")
    ] = None,
) -> None:
    """Write a commented study.toml to start from."""
    with one_line_errors("nothing was written"):
        from bkprune.study import write_atomic
        from bkprune.studyfile import NAME, begun

        path = folder / NAME
        if path.exists():
            raise ValueError(f"{path} is there already; choose another folder")
        text = begun(path, model, data, brings=model in _BUILT_IN)
        write_atomic(path, text.encode())
        typer.echo(str(path))


def report(
    study: Annotated[
        Path,
        typer.Argument(
            metavar="STUDY", help="A run folder, a study.toml, or the folder that it lies in."
        ),
    ],
    as_json: JSON = False,
    quiet: QUIET = False,
) -> None:
    """Build report.html and report.md from a study's tables; they need nothing else.

    Writes figures/*.png and *.svg too. Stages that were not run are named as missing.
    """
    with one_line_errors("nothing was written"):
        from bkprune.report import build

        folder = study.parent if study.is_file() else study
        if (folder / "run").is_dir() and not (folder / "run.json").exists():
            folder = folder / "run"
        path = build(folder)
        typer.echo(json.dumps({"report": str(path)}) if as_json else str(path))
