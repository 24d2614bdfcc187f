"""`bkprune analyze`: options, files and the printed ranking of an importance analysis."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bkprune.blocks import GRAINS
from bkprune.terminal import (
    JSON,
    MODEL,
    PREDICTION,
    QUIET,
    TEXT_ENCODER,
    TOKENIZER,
    VAE,
    choice,
    one_line_errors,
    print_table,
    progress_bar,
)

if TYPE_CHECKING:
    import pandas as pd

    from bkprune.data import Pairs
    from bkprune.importance import AnalyzeSettings
    from bkprune.models import Parts


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
    with one_line_errors("the same command resumes where it stopped"):
        from bkprune.importance import CRITERIA, WEIGHTINGS, AnalyzeSettings
        from bkprune.models import Parts

        settings = AnalyzeSettings(
            grain=choice("--grain", grain, GRAINS),
            criteria=tuple(
                choice("--criterion", c.strip(), CRITERIA) for c in criterion.split(",")
            ),
            weighting=choice("--weighting", weighting, WEIGHTINGS),
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
    from bkprune.clip import ClipScore
    from bkprune.drawing import png
    from bkprune.importance import analyze
    from bkprune.models import fingerprint, load

    record = study.Study(folder)
    pipeline = load(model, parts)
    source, source_key = calibration_source(model, data)
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
    with progress_bar(quiet) as progress:
        table = analyze(pipeline, source, settings, unfinished, progress, clip_score)
    record.save_table(study.BLOCKS, blocks_table, stamp)
    for name, figure in plots.importance_figures(blocks_table, table):
        record.save_bytes(f"{study.FIGURES}/{name}", png(figure), stamp)
    record.save_table(study.IMPORTANCE, table, stamp)
    unfinished.clear()
    return table


def calibration_source(model: str, data: str | None) -> tuple[Pairs | list[str] | None, str]:
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


def training_data(model: str, data: str | None, split: str | None) -> tuple[str, str | None]:
    """What to learn from and which rows of it: the built-in pairs, for the built-in model.

    Raises:
        ValueError: the model brings none.
    """
    from bkprune.models import BUILT_IN

    if data is not None:
        return data, split
    if model in BUILT_IN:
        return str(BUILT_IN[model] / "pairs.zip"), split or "train"
    raise ValueError(f"{model} brings no training data: give --data")


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
        print_table(view, f"Importance by {criterion} (n = {n}, most important first)")
