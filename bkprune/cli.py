"""The command line: each command opens a study, calls one function, saves, prints the paths.

Knows options, progress bars, tables for people and exit codes (0 done, 2 usage or input, 130
interrupted). Heavy modules are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import bkprune
from bkprune.blocks import GRAINS

if TYPE_CHECKING:
    import pandas as pd

    from bkprune.data import Pairs
    from bkprune.importance import AnalyzeSettings
    from bkprune.models import Parts

app = typer.Typer(
    name="bkprune",
    help="Fit a Stable Diffusion checkpoint to a budget by removing U-Net blocks.",
    epilog="Example: bkprune analyze emoji --out demo",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
)
_debug = False


def main() -> None:
    """Entry point of the `bkprune` command."""
    app()


def _version(value: bool) -> None:
    if value:
        typer.echo(f"bkprune {bkprune.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    global _debug
    _debug = debug


@contextmanager
def _one_line_errors(on_interrupt: str) -> Iterator[None]:
    """Turn what a user can mend into one line and exit code 2; Ctrl-C into 130."""
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        if _debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        typer.echo(f"bkprune: {text}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo(f"bkprune: interrupted; {on_interrupt}", err=True)
        raise typer.Exit(130) from None


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A bar with time left on stderr, or nothing where nobody watches."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
    )
    tasks: dict[str, Any] = {}

    def report(done: int, total: int, what: str) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done)

    with bar:
        yield report


MODEL = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="`emoji` (built in), a diffusers pipeline or U-Net folder, a .safetensors or .ckpt "
        "file in the original layout, or a hub id.",
    ),
]
_PARTS = "Parts that the model lacks"
TOKENIZER = Annotated[
    Path | None, typer.Option("--tokenizer", help="Tokenizer folder.", rich_help_panel=_PARTS)
]
TEXT_ENCODER = Annotated[
    Path | None,
    typer.Option("--text-encoder", help="Text encoder folder.", rich_help_panel=_PARTS),
]
VAE = Annotated[Path | None, typer.Option("--vae", help="VAE folder.", rich_help_panel=_PARTS)]
PREDICTION = Annotated[
    str | None,
    typer.Option(
        "--prediction-type",
        help="epsilon or v_prediction, where the file cannot say it: SD v2 in the original "
        "layout is taken for v2-768, which is v_prediction.",
        rich_help_panel=_PARTS,
    ),
]
JSON = Annotated[bool, typer.Option("--json", help="Print data as JSON on stdout.")]
QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no table.")]


@app.command(epilog="Example: bkprune blocks emoji --grain pair")
def blocks(
    model: MODEL,
    grain: Annotated[str, typer.Option(help=f"One of {', '.join(GRAINS)}.")] = "block",
    as_json: JSON = False,
    tokenizer: TOKENIZER = None,
    text_encoder: TEXT_ENCODER = None,
    vae: VAE = None,
) -> None:
    """Print the inventory: every block with its level, channels and bypass."""
    with _one_line_errors("nothing was written"):
        import pandas as pd

        from bkprune.blocks import Inventory
        from bkprune.models import Parts, load

        pipeline = load(model, Parts(tokenizer, text_encoder, vae))
        inventory = Inventory.of(pipeline.unet)
        units = inventory.units(_choice("--grain", grain, GRAINS))
        table = pd.DataFrame(inventory.rows())
        table["params"] = [
            sum(p.numel() for p in pipeline.unet.get_submodule(name).parameters())
            for name in table["name"]
        ]
        if grain != "block":
            column = "pair" if grain == "pair" else "stage"
            table = table.groupby(column, sort=False, as_index=False).agg(
                level=("level", "first"), blocks=("name", list), params=("params", "sum")
            )
            table["blocks"] = [", ".join(names) for names in table["blocks"]]
        else:
            table = table.drop(columns=["stage", "pair"])
        if as_json:
            typer.echo(json.dumps(json.loads(table.to_json(orient="records")), indent=1))
            return
        _print_table(
            table, f"{model}: {len(inventory)} blocks, {len(units)} units of grain {grain}"
        )


@app.command(
    epilog="Examples:  bkprune analyze emoji --out demo   |   "
    "bkprune analyze ./sd15 --data ./pairs --samples 128 --grain pair   |   "
    "bkprune analyze ./sd15 --data prompts.txt --criterion latent,clip --clip ./clip-vit"
)
def analyze(
    model: MODEL,
    out: Annotated[
        Path | None, typer.Option(help="Study folder. Default: bkprune-NAME beside you.")
    ] = None,
    grain: Annotated[str, typer.Option(help=f"What is removed: {', '.join(GRAINS)}.")] = "block",
    criterion: Annotated[
        str,
        typer.Option(
            help="Comma-separated: output (what the U-Net's output changes by), task (rise of the "
            "denoising loss), latent, clip (both sample pictures), magnitude, taylor."
        ),
    ] = "output",
    weighting: Annotated[
        str, typer.Option(help="Over timesteps: uniform, x0 (as error of the image), snr.")
    ] = "uniform",
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder or zip of images with metadata.jsonl or .csv (file_name, text); a .txt of "
            "prompts; or `noise`, which times a U-Net but says nothing about importance. Default: "
            "the built-in pairs, for the built-in model."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 256,
    bins: Annotated[int, typer.Option(help="Timestep bins.")] = 8,
    prompts: Annotated[int, typer.Option(help="Prompts for latent and clip.")] = 16,
    steps: Annotated[int, typer.Option(help="Sampling steps for latent and clip.")] = 25,
    guidance_scale: Annotated[float, typer.Option(help="Guidance for latent and clip.")] = 7.5,
    clip: Annotated[
        Path | None,
        typer.Option(help="CLIPModel folder for clip. Default: the one of the built-in model."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same numbers.")] = 1234,
    batch_size: Annotated[int, typer.Option(help="Changes memory and speed, not numbers.")] = 16,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a record made otherwise.")
    ] = False,
    as_json: JSON = False,
    quiet: QUIET = False,
    tokenizer: TOKENIZER = None,
    text_encoder: TEXT_ENCODER = None,
    vae: VAE = None,
    prediction_type: PREDICTION = None,
) -> None:
    """Ablate every unit over a calibration set and rank them by what is lost.

    Writes importance.csv, blocks.csv and figures into the study folder. The same command again
    resumes what was interrupted, or does nothing.
    """
    with _one_line_errors("the same command resumes where it stopped"):
        from bkprune.importance import CRITERIA, WEIGHTINGS, AnalyzeSettings
        from bkprune.models import Parts

        settings = AnalyzeSettings(
            grain=_choice("--grain", grain, GRAINS),
            criteria=tuple(
                _choice("--criterion", c.strip(), CRITERIA) for c in criterion.split(",")
            ),
            weighting=_choice("--weighting", weighting, WEIGHTINGS),
            n_samples=samples,
            n_bins=bins,
            seed=seed,
            batch_size=batch_size,
            n_prompts=prompts,
            steps=steps,
            guidance_scale=guidance_scale,
        )
        parts = Parts(tokenizer, text_encoder, vae, prediction_type)
        folder = out or Path(f"bkprune-{Path(model).stem}")
        table = _analyze(model, parts, data, clip, folder, settings, force=force, quiet=quiet)
        if as_json:
            typer.echo(table.to_json(orient="records", indent=1))
            return
        if not quiet:
            _print_importance(table)
        typer.echo(str(folder / "importance.csv"))


def _analyze(
    model: str,
    parts: Parts,
    data: str | None,
    clip: Path | None,
    folder: Path,
    settings: AnalyzeSettings,
    *,
    force: bool,
    quiet: bool,
) -> pd.DataFrame:
    import pandas as pd

    from bkprune import plots, study
    from bkprune.blocks import Inventory
    from bkprune.importance import analyze
    from bkprune.metrics import ClipScore
    from bkprune.models import fingerprint, load

    record = study.Study(folder)
    pipeline = load(model, parts)
    source, source_key = _source(model, data)
    inventory = Inventory.of(pipeline.unet)
    clip_score = ClipScore.load(clip) if "clip" in settings.criteria else None
    networks = {name: getattr(pipeline, name, None) for name in ("unet", "vae", "text_encoder")}
    networks["clip"] = clip_score.model if clip_score else None
    inputs = {name: fingerprint(net) for name, net in networks.items() if net is not None}
    inputs["data"] = source_key
    inputs["prediction_type"] = str(pipeline.scheduler.config.prediction_type)
    stamp = study.Stamp.of(settings.stamped, inputs)
    if record.is_current(study.IMPORTANCE, stamp):
        if not quiet:
            typer.echo(f"{record.path(study.IMPORTANCE)} is up to date", err=True)
        return record.load_table(study.IMPORTANCE, stamp)
    if record.path(study.IMPORTANCE).exists() and not force:
        record.load_table(study.IMPORTANCE, stamp)  # says what differs
    blocks_table = pd.DataFrame(inventory.rows())
    unfinished = study.Unfinished(record, study.IMPORTANCE, stamp)
    with _progress(quiet) as progress:
        table = analyze(pipeline, source, settings, unfinished, progress, clip_score)
    record.save_table(study.BLOCKS, blocks_table, stamp)
    for name, figure in plots.importance_figures(blocks_table, table):
        record.save_bytes(f"{study.FIGURES}/{name}", plots.png(figure), stamp)
    record.save_table(study.IMPORTANCE, table, stamp)
    unfinished.clear()
    return table


def _source(model: str, data: str | None) -> tuple[Pairs | list[str] | None, str]:
    """What to calibrate on, and a name for it that changes when it does."""
    from bkprune.data import read_pairs, read_source
    from bkprune.models import BUILT_IN
    from bkprune.study import digest

    source: Pairs | list[str]
    if data == "noise":
        return None, "noise"
    if data is not None:
        source = read_source(data)
    elif model in BUILT_IN:
        source = read_pairs(BUILT_IN[model] / "pairs.zip").split("train")
    else:
        raise ValueError(
            f"{model} brings no calibration data: give --data with a folder of captioned images, a "
            ".txt of prompts, or `noise` to time it"
        )
    rows = source if isinstance(source, list) else source.rows
    return source, digest(rows)


def _choice(option: str, value: str, choices: tuple[Any, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"{option} {value!r}: choose one of {', '.join(choices)}")
    return value


def _print_table(table: pd.DataFrame, title: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140
    view = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in table.columns:
        numeric = table[column].dtype.kind in "if"
        view.add_column(str(column), justify="right" if numeric else "left", no_wrap=numeric)
    for row in table.itertuples(index=False):
        view.add_row(*(f"{v:,}" if isinstance(v, int) else str(v) for v in row))
    Console(width=width).print(view)


def _print_importance(table: pd.DataFrame) -> None:
    """One ranked table a criterion, the variants of `output` as columns of one."""
    total = table[table["timestep_bin"].astype(str) == "all"]
    for criterion in dict.fromkeys(total["criterion"]):
        if criterion.startswith("output_per"):
            continue
        ranked = total[total["criterion"] == criterion].sort_values("score", ascending=False)
        top = max(float(ranked["score"].max()), 1e-300)
        view = ranked[["unit"]].assign(
            score=[f"{s:.4g}" for s in ranked["score"]],
            stderr=[f"± {e:.2g}" for e in ranked["stderr"]],
        )
        if criterion == "output":
            for name in ("output_per_power", "output_per_error"):
                other = total[total["criterion"] == name].set_index("unit")["score"]
                view[name.removeprefix("output_")] = [f"{other[u]:.4g}" for u in view["unit"]]
        view[" "] = ["█" * round(24 * max(s, 0) / top) for s in ranked["score"]]
        view.insert(0, "rank", range(1, len(view) + 1))
        n = int(ranked["n"].iloc[0])
        _print_table(view, f"Importance by {criterion} (n = {n}, most important first)")
