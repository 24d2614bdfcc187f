"""`bkprune profile`: options, files and printed tables of a profile."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bkprune.terminal import (
    JSON,
    QUIET,
    choice,
    notice,
    one_line_errors,
    progress_bar,
)

if TYPE_CHECKING:
    import pandas as pd

    from bkprune.cost import CostTable
    from bkprune.profiling import Profile
    from bkprune.study import Stamp, Study

_TARGET, _SHAPES, _REPEATS = "Target", "What one pass is given", "How long it is timed"
_PARTS = "Parts that the model lacks: a folder or a config.json"


def profile(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="`emoji`, a diffusers pipeline or U-Net folder, a U-Net's config.json, a "
            ".safetensors or .ckpt file in the original layout, a hub id, or a family: sd_v1, "
            "sd_v2_base, sd_v2_768, sdxl, ... Weights are never read.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Study folder. Default: bkprune-NAME beside you.")
    ] = None,
    latency: Annotated[
        bool, typer.Option("--latency/--no-latency", help="Time it, or count only.")
    ] = True,
    validate: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Time N random masks and the presets beside the teacher, and say how "
            "well the table predicts them.",
        ),
    ] = 0,
    mask: Annotated[
        list[str] | None,
        typer.Option(
            help="A preset, a mask file such as winner.json, or comma-separated blocks, units or "
            "globs: shown, and timed, beside the teacher. May be repeated."
        ),
    ] = None,
    operators: Annotated[
        bool, typer.Option("--operators", help="MACs of the U-Net by operator (fvcore).")
    ] = False,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, mps.", rich_help_panel=_TARGET)
    ] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="float32, float16 or bfloat16.", rich_help_panel=_TARGET)
    ] = "float32",
    backend: Annotated[
        str, typer.Option(help="eager, compile, onnxruntime, openvino.", rich_help_panel=_TARGET)
    ] = "eager",
    latency_cmd: Annotated[
        str | None,
        typer.Option(
            help="Any other runtime: a command in which {onnx} stands for an exported graph, and "
            "which prints milliseconds as its last number.",
            rich_help_panel=_TARGET,
        ),
    ] = None,
    latency_pattern: Annotated[
        str | None,
        typer.Option(
            help="Regular expression whose group is the milliseconds, where they are not the last "
            "number.",
            rich_help_panel=_TARGET,
        ),
    ] = None,
    threads: Annotated[
        int, typer.Option(help="CPU threads; 0 is the library's default.", rich_help_panel=_TARGET)
    ] = 0,
    batch_size: Annotated[int, typer.Option(help="Images.", rich_help_panel=_SHAPES)] = 1,
    resolution: Annotated[
        str | None,
        typer.Option(
            help="Of the images, in pixels: 512 or 512x768 (height x width). Default: the model's.",
            rich_help_panel=_SHAPES,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Of the prompt. Default: the model's, 77.", rich_help_panel=_SHAPES),
    ] = None,
    guidance: Annotated[
        bool,
        typer.Option(
            "--guidance/--no-guidance",
            help="Classifier-free guidance: twice the batch in U-Net and text encoder.",
            rich_help_panel=_SHAPES,
        ),
    ] = False,
    steps: Annotated[
        int, typer.Option(help="Of a whole image, always guided.", rich_help_panel=_SHAPES)
    ] = 25,
    precision: Annotated[
        float,
        typer.Option(
            help="Repeat until the medians' 95 % intervals are within this share ...",
            rich_help_panel=_REPEATS,
        ),
    ] = 0.02,
    max_seconds: Annotated[
        float,
        typer.Option(help="... or this time is up, for each thing.", rich_help_panel=_REPEATS),
    ] = 60.0,
    seed: Annotated[int, typer.Option(help="Order of turns, and random masks.")] = 1234,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a record made otherwise.")
    ] = False,
    as_json: JSON = False,
    quiet: QUIET = False,
    text_encoder: Annotated[
        Path | None, typer.Option("--text-encoder", rich_help_panel=_PARTS)
    ] = None,
    vae: Annotated[Path | None, typer.Option("--vae", rich_help_panel=_PARTS)] = None,
) -> None:
    """Count params, MACs and memory of every block, and time them on this machine.

    Writes cost.csv, machine.json, latency.csv and figures into the study folder. The same command
    again resumes what was interrupted, or does nothing.
    """
    with one_line_errors("the same command resumes where it stopped"):
        from bkprune.backends import BACKENDS, DTYPES, Target
        from bkprune.latency import TimingSettings
        from bkprune.masks import read_mask
        from bkprune.models import Parts
        from bkprune.profiling import Profile, ProfileSettings
        from bkprune.skeleton import skeleton

        target = Target(
            device,
            choice("--dtype", dtype, tuple(DTYPES)),
            "command" if latency_cmd else choice("--backend", backend, BACKENDS[:-1]),
            threads,
            latency_cmd,
            latency_pattern,
        )
        bones = skeleton(model, Parts(text_encoder=text_encoder, vae=vae))
        height, width = _latents(resolution, bones)
        settings = ProfileSettings(
            target=target,
            timing=TimingSettings(precision, max_s=max_seconds, seed=seed),
            latency=latency,
            batch_size=batch_size,
            height=height,
            width=width,
            n_tokens=tokens,
            guidance=guidance,
            steps=steps,
        )
        if validate < 0:
            raise ValueError(f"--validate {validate}: a number of masks is expected")
        if latency or validate:
            target.check()
        made = Profile(bones, settings)
        masks = {text: read_mask(text, made.inventory) for text in mask or ()}
        folder = out or Path(f"bkprune-{_stem(model)}")
        shown = _profile(made, masks, validate, folder, force=force, quiet=quiet)
        if operators:
            shown["operators"] = _operators(made)
        if as_json:
            typer.echo(json.dumps(shown, indent=1))
        elif not quiet:
            from bkprune.profile_view import print_profile

            print_profile(shown, made, model)
        typer.echo(str(folder / "cost.csv"), err=as_json)


def _profile(
    made: Profile,
    masks: dict[str, Any],
    n_random: int,
    folder: Path,
    *,
    force: bool,
    quiet: bool,
) -> dict[str, Any]:
    """Everything that is asked for and not there yet; returns what is to be shown."""
    from bkprune import machine, plots_cost, study
    from bkprune.drawing import png
    from bkprune.measuring import compare, measure, validation_masks
    from bkprune.profiling import identity
    from bkprune.series import accuracy

    s = made.settings
    record = study.Study(folder)
    stamp = study.Stamp.of(s.stamped, identity(made))
    table, wholes = _existing(record, stamp, made, force=force, quiet=quiet)
    if table is None:
        table = made.table
        if s.latency:
            unfinished = study.Unfinished(record, study.COST, stamp)
            with progress_bar(quiet) as progress:
                table, wholes = measure(made, unfinished, progress)
            record.save_table(study.LATENCY, wholes, stamp)
        facts = machine.describe(s.target.device, s.target.n_threads)
        facts["profile"] = s.stamped | {"n_tokens": made.n_tokens, "latents": made.latent_size}
        record.save_bytes(study.MACHINE, (json.dumps(facts, indent=1) + "\n").encode(), stamp)
        blocks = _blocks(made)
        record.save_table(study.BLOCKS, blocks, stamp)
        for name, figure in plots_cost.cost_figures(blocks, table.rows, _importance(record)):
            record.save_bytes(f"{study.FIGURES}/{name}", png(figure), stamp)
        record.save_table(study.COST, table.rows, stamp)
        if s.latency:
            unfinished.clear()
    shown: dict[str, Any] = {
        "cost": _records(table.rows),
        "latency": _records(wholes) if wholes is not None else [],
        "masks": [
            {"mask": name, **vars(table.cost_of(m))} for name, m in {"teacher": (), **masks}.items()
        ],
    }
    compared = dict(masks) if s.latency else {}
    if n_random:
        compared |= validation_masks(made.inventory, n_random, s.timing.seed)
    if compared:
        inputs = {
            **stamp.inputs,
            "masks": study.digest({n: sorted(m) for n, m in compared.items()}),
        }
        inputs["cost"] = study.digest(record.path(study.COST).read_text(encoding="utf-8"))
        stamp = study.Stamp.of(s.stamped, inputs)
        if record.is_current(study.VALIDATION, stamp):
            found = record.load_table(study.VALIDATION, stamp)
        else:
            unfinished = study.Unfinished(record, study.VALIDATION, stamp)
            with progress_bar(quiet) as progress:
                found = compare(made, compared, table, unfinished, progress)
            if n_random:
                figure = plots_cost.validation_figure(found, accuracy(found))
                name = f"{study.FIGURES}/{plots_cost.VALIDATION}"
                record.save_bytes(name, png(figure), stamp)
            record.save_table(study.VALIDATION, found, stamp)
            unfinished.clear()
        shown["compared"] = _records(found)
        if n_random:
            shown["accuracy"] = accuracy(found)
    return shown


def _existing(
    record: Study, stamp: Stamp, made: Profile, *, force: bool, quiet: bool
) -> tuple[CostTable | None, pd.DataFrame | None]:
    """The table that is there already, if this command would make the same one."""
    from bkprune import cost, study

    old = record.stamp_of(study.COST)
    if old is None or (force and old.key != stamp.key):
        return None, None
    if old.key != stamp.key and stamp.settings["latency"] and not old.settings.get("latency"):
        return None, None  # counts alone, of whatever: nothing is lost
    wanted = stamp
    if not stamp.settings["latency"] and old.settings.get("latency"):
        wanted = old  # it holds the counts and more; whether they are ours is checked below
    record.load_table(study.COST, wanted)  # says what differs
    table = cost.read(record.path(study.COST), made.table)
    if not quiet:
        notice(f"{record.path(study.COST)} is up to date")
    has_times = record.path(study.LATENCY).exists()
    return table, record.load_table(study.LATENCY) if has_times else None


def _stem(model: str) -> str:
    path = Path(model)
    return path.resolve().parent.name if path.name == "config.json" else path.stem


def _latents(resolution: str | None, bones: Any) -> tuple[int | None, int | None]:
    """Pixels to latents, by the VAE's factor; 8 where there is no VAE."""
    if resolution is None:
        return None, None
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", resolution)
    factor = 2 ** (len(bones.vae.config.block_out_channels) - 1) if bones.vae else 8
    sizes = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not all(size and size % factor == 0 for size in sizes):
        raise ValueError(
            f"--resolution {resolution!r}: pixels such as 512 or 512x768 are expected, multiples "
            f"of {factor}"
        )
    return sizes[0] // factor, sizes[1] // factor


def _blocks(made: Profile) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(made.inventory.rows())


def _importance(record: Study) -> pd.DataFrame | None:
    from bkprune import study

    return record.load_table(study.IMPORTANCE) if record.path(study.IMPORTANCE).exists() else None


def _operators(made: Profile) -> list[dict[str, Any]]:
    from bkprune.measuring import network
    from bkprune.operators import operators

    return _records(operators(network(made), made.unet_call(made.settings.target.device)))


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(table.to_json(orient="records"))
    return found
