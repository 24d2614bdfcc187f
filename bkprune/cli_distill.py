"""`bkprune distill` and `bkprune cache`: options of retraining and of its data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bkprune.cli_analyze import training_data
from bkprune.terminal import (
    JSON,
    MODEL,
    PREDICTION,
    QUIET,
    TEXT_ENCODER,
    TOKENIZER,
    VAE,
    choice,
    notice,
    one_line_errors,
)

_LOSS, _HOW, _WHERE = "What is minimised", "How it is trained", "Where it runs"
DATA = Annotated[
    str | None,
    typer.Option(
        help="A cache of `bkprune cache`; a folder or zip of pictures with metadata.jsonl or .csv; "
        "a folder of pictures with a .txt beside each; webdataset shards (shard-{000..099}.tar, "
        "URLs too); a Hugging Face dataset on disk; a .txt of prompts: the teacher draws. "
        "Default: the built-in pairs, for the built-in model."
    ),
]


def distill(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="What `prune` has written.")],
    teacher: Annotated[str, typer.Option(help="The model it was pruned from.")],
    data: DATA = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder. Default: NAME-distilled beside you.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Updates in all.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Samples a forward pass and process.")] = 16,
    accumulate: Annotated[int, typer.Option(help="Forward passes an update.")] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 5e-5,
    task: Annotated[
        float, typer.Option(help="Weight of the task loss.", rich_help_panel=_LOSS)
    ] = 1.0,
    output: Annotated[
        float, typer.Option(help="Weight of the output loss.", rich_help_panel=_LOSS)
    ] = 1.0,
    feature: Annotated[
        float, typer.Option(help="Weight of the feature loss.", rich_help_panel=_LOSS)
    ] = 1.0,
    normalise_features: Annotated[
        bool,
        typer.Option(
            "--normalise-features",
            help="Divide each feature term by the teacher feature's mean square.",
            rich_help_panel=_LOSS,
        ),
    ] = False,
    snr_gamma: Annotated[
        float | None, typer.Option(help="min-SNR weighting, e.g. 5.", rich_help_panel=_LOSS)
    ] = None,
    schedule: Annotated[
        str, typer.Option(help="constant, cosine or linear.", rich_help_panel=_HOW)
    ] = "constant",
    warmup: Annotated[int, typer.Option(help="Warm-up steps.", rich_help_panel=_HOW)] = 0,
    ema: Annotated[
        float | None,
        typer.Option(help="Save a moving average of this decay.", rich_help_panel=_HOW),
    ] = None,
    optimiser: Annotated[
        str, typer.Option(help="adamw or adamw8bit.", rich_help_panel=_HOW)
    ] = "adamw",
    clip_norm: Annotated[
        float, typer.Option(help="Largest gradient norm.", rich_help_panel=_HOW)
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Order, noise and timesteps.")] = 1234,
    precision: Annotated[
        str, typer.Option(help="no, fp16 or bf16 (autocast).", rich_help_panel=_WHERE)
    ] = "no",
    device: Annotated[
        str | None, typer.Option(help="cpu, or whatever is there.", rich_help_panel=_WHERE)
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=_WHERE
        ),
    ] = False,
    compile_nets: Annotated[
        bool, typer.Option("--compile", help="torch.compile both.", rich_help_panel=_WHERE)
    ] = False,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
    preview_every: Annotated[
        int, typer.Option(help="Steps between preview grids (teacher, pruned, now); 0 for none.")
    ] = 200,
    preview_guidance: Annotated[float, typer.Option(help="Guidance of the previews.")] = 7.5,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Log to TensorBoard too, in OUT/distill.")
    ] = False,
    split: Annotated[
        str | None, typer.Option(help="Rows of the caption file whose column split says so.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Two steps, then what a run would take.")
    ] = False,
    as_json: JSON = False,
    quiet: QUIET = False,
    tokenizer: TOKENIZER = None,
    text_encoder: TEXT_ENCODER = None,
    vae: VAE = None,
    prediction_type: PREDICTION = None,
) -> None:
    """Retrain a pruned model against its teacher: task, output and feature loss (BK-SDM).

    Writes train.jsonl, checkpoints, previews and the finished pipeline in OUT/distilled. The same
    command goes on after any interruption, with the same bits. `accelerate launch -m bkprune.cli
    distill ...` runs it on several processes.
    """
    with one_line_errors("a checkpoint was saved; the same command goes on from it"):
        from bkprune.distill_job import DISTILLED, Asked, Job
        from bkprune.losses import LossSettings
        from bkprune.models import Parts
        from bkprune.recipe import OPTIMISERS, SCHEDULES, DistillSettings

        settings = DistillSettings(
            steps=steps,
            batch_size=batch_size,
            accumulate=accumulate,
            lr=lr,
            schedule=choice("--schedule", schedule, SCHEDULES),
            warmup=warmup,
            clip_norm=clip_norm,
            ema=ema,
            optimiser=choice("--optimiser", optimiser, OPTIMISERS),
            precision=choice("--precision", precision, ("no", "fp16", "bf16")),
            checkpointing=gradient_checkpointing,
            compile=compile_nets,
            seed=seed,
            save_every=save_every,
            preview_every=preview_every,
            losses=LossSettings(task, output, feature, normalise_features, snr_gamma),
        )
        given, rows = training_data(teacher, data, split)
        folder = out or Path(f"{Path(student).name}-distilled")
        asked = Asked(
            student,
            teacher,
            given,
            folder,
            Parts(tokenizer, text_encoder, vae, prediction_type),
            rows,
            device,
            tensorboard=tensorboard,
            preview_guidance=preview_guidance,
        )
        job = Job(asked, settings, quiet=quiet or as_json)
        if dry_run:
            _print_dry_run(job.dry_run(), as_json=as_json)
            return
        job.run()
        if job.acc.is_main_process:
            typer.echo(str(folder / DISTILLED))


def _print_dry_run(shown: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(shown, indent=1))
        return
    import pandas as pd

    from bkprune.terminal import print_table

    rows = [{"": name.replace("_", " "), " ": f"{value}"} for name, value in shown.items()]
    print_table(pd.DataFrame(rows), "What this run would take, by two steps of it")


def cache(
    model: MODEL,
    out: Annotated[Path, typer.Option(help="Cache folder.")],
    data: DATA = None,
    size: Annotated[
        int | None, typer.Option(help="Pixels: shorter side, centre crop. Default: the model's.")
    ] = None,
    flip: Annotated[bool, typer.Option(help="Encode mirrored pictures too.")] = True,
    split: Annotated[
        str | None, typer.Option(help="Rows of the caption file whose column split says so.")
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Pairs a shard.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Changes memory and speed.")] = 16,
    max_bad: Annotated[
        float, typer.Option(help="Share of unreadable pairs above which it is an error.")
    ] = 0.02,
    steps: Annotated[int, typer.Option(help="Sampling steps, for prompts alone.")] = 25,
    guidance_scale: Annotated[float, typer.Option(help="Guidance, for prompts alone.")] = 7.5,
    seed: Annotated[int, typer.Option(help="Seed, for prompts alone.")] = 1234,
    as_json: JSON = False,
    quiet: QUIET = False,
    tokenizer: TOKENIZER = None,
    text_encoder: TEXT_ENCODER = None,
    vae: VAE = None,
) -> None:
    """Encode pictures to latents and captions to text embeddings, once, in shards.

    Training from a cache needs neither VAE nor text encoder. The same command goes on where it was
    interrupted. Of prompts alone the model draws the latents itself.
    """
    with one_line_errors("the same command goes on where it stopped"):
        from bkprune import models
        from bkprune.distill_job import fill_cache

        given, rows = training_data(model, data, split)
        pipeline = models.load(model, models.Parts(tokenizer, text_encoder, vae))
        options: dict[str, Any] = {
            "flip": flip,
            "shard_size": shard_size,
            "batch_size": batch_size,
            "max_bad": max_bad,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "seed": seed,
        }
        if size is not None:
            options["size"] = size
        done = fill_cache(pipeline, given, rows, out, options, quiet=quiet or as_json)
        if as_json:
            typer.echo(json.dumps({"pairs": done.n, "unreadable": done.n_bad}))
        elif not quiet:
            notice(f"{done.n:,} pairs encoded, {done.n_bad:,} unreadable")
        typer.echo(str(out), err=as_json)
