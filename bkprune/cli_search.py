"""`bkprune search`: options, files and printed tables of a search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

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
    notice,
    one_line_errors,
)

_HOW, _WHERE, _RACE = "How long", "Where it runs", "With --objective distilled"


def search(
    model: MODEL,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="METRIC<=VALUE: latency, params, macs, macs_paper, memory or weights, absolute "
            "(500M, 40ms, 3GB) or relative to the teacher (0.6x, 60%). May be repeated; all hold."
        ),
    ] = None,
    front: Annotated[
        str | None,
        typer.Option(
            help="Two objectives, quality and this metric (latency, params, macs, ...): the whole "
            "trade-off, under the budgets if there are any, rather than one winner."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Study folder, with the importance.csv of `analyze` and the cost.csv of "
            "`profile`. Default: bkprune-NAME beside you."
        ),
    ] = None,
    grain: Annotated[str, typer.Option(help=f"What is removed: {', '.join(GRAINS)}.")] = "block",
    objective: Annotated[
        str,
        typer.Option(
            help="measured (every mask is ablated on calibration samples), distilled (the best of "
            "those are distilled for a short while, and ranked by what is left) or additive "
            "(summed importance: the exact optimum, at once)."
        ),
    ] = "measured",
    keep: Annotated[
        list[str] | None, typer.Option(help="Block, unit or glob never removed. Repeatable.")
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(help="Block, unit or glob always removed. Repeatable.")
    ] = None,
    cost: Annotated[
        Path | None,
        typer.Option(help="Cost table measured elsewhere. Default: the study's cost.csv."),
    ] = None,
    trials: Annotated[
        int, typer.Option(help="Masks to measure in all.", rich_help_panel=_HOW)
    ] = 200,
    timeout: Annotated[
        float | None, typer.Option(help="Stop after so many seconds.", rich_help_panel=_HOW)
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Calibration samples of the search.", rich_help_panel=_HOW)
    ] = 96,
    judged: Annotated[
        int,
        typer.Option(
            help="Further samples to choose the winner on, and as many again to report it on.",
            rich_help_panel=_HOW,
        ),
    ] = 256,
    data: Annotated[str | None, typer.Option(help="As in `analyze`.", rich_help_panel=_HOW)] = None,
    finalists_by: Annotated[
        str | None,
        typer.Option(
            help="Also draw pictures with every finalist: latent, clip, or both, comma-separated.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    clip: Annotated[
        Path | None,
        typer.Option(
            help="CLIPModel folder for clip. Default: the built-in one.", rich_help_panel=_HOW
        ),
    ] = None,
    finalists: Annotated[
        int, typer.Option(help="How many masks start.", rich_help_panel=_RACE)
    ] = 8,
    kd_steps: Annotated[
        int,
        typer.Option(
            help="Steps of the last two; the better half goes on at each halving before.",
            rich_help_panel=_RACE,
        ),
    ] = 200,
    kd: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE, an option of `distill` (lr=1e-3, batch-size=32, feature=0). "
            "Repeatable. Default: as `distill`.",
            rich_help_panel=_RACE,
        ),
    ] = None,
    kd_data: Annotated[
        str | None,
        typer.Option(help="As --data of `distill`; a cache is best.", rich_help_panel=_RACE),
    ] = None,
    kd_together: Annotated[
        int,
        typer.Option(help="Students held in memory at once.", rich_help_panel=_RACE),
    ] = 8,
    kd_judge: Annotated[
        str | None,
        typer.Option(
            help="What ranks them: pictures (distance of CLIP features from the teacher's picture "
            "of the same prompt and seed) or output (error on noised latents). Default: pictures "
            "where a CLIP model is known (--clip, or the built-in model).",
            rich_help_panel=_RACE,
        ),
    ] = None,
    kd_pictures: Annotated[
        int,
        typer.Option(
            help="Pictures that decide, and as many again that only report.", rich_help_panel=_RACE
        ),
    ] = 64,
    kd_guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Guidance of those pictures. Default: 7.5 (emoji: 3).", rich_help_panel=_RACE
        ),
    ] = None,
    kd_sampling_steps: Annotated[
        int, typer.Option(help="Sampling steps of those pictures.", rich_help_panel=_RACE)
    ] = 10,
    seed: Annotated[int, typer.Option(help="Same seed and one worker: same winner.")] = 1234,
    batch_size: Annotated[int, typer.Option(help="Changes memory and speed.")] = 16,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Optuna storage URL (postgresql://...) that workers on many machines share. "
            "Default: a journal file in the study folder.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Processes on this machine.", rich_help_panel=_WHERE)
    ] = 1,
    join: Annotated[
        bool,
        typer.Option(
            "--join",
            help="Only measure for a search that runs elsewhere: no finalists, no files.",
            rich_help_panel=_WHERE,
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Put a study made otherwise aside and start afresh.")
    ] = False,
    as_json: JSON = False,
    quiet: QUIET = False,
    tokenizer: TOKENIZER = None,
    text_encoder: TEXT_ENCODER = None,
    vae: VAE = None,
    prediction_type: PREDICTION = None,
) -> None:
    """Find the mask that loses least under the budgets, and show it beside what people do today.

    Writes candidates.csv, finalists.csv, winner.json, figures and the Optuna journal. The same
    command again goes on where it stopped; started twice, both work on one study.
    """
    with one_line_errors("the same command resumes where it stopped"):
        from bkprune.models import Parts
        from bkprune.race_job import RaceSettings
        from bkprune.search import OBJECTIVES, SearchSettings
        from bkprune.search_job import Inputs, Job
        from bkprune.space import METRICS

        settings = SearchSettings(
            grain=choice("--grain", grain, GRAINS),
            objective=choice("--objective", objective, OBJECTIVES),
            front=None if front is None else METRICS[choice("--front", front, tuple(METRICS))][0],
            budgets=tuple(budget or ()),
            keep=tuple(sorted(keep or ())),
            remove=tuple(sorted(remove or ())),
            seed=seed,
            n_trials=trials,
            timeout_s=timeout,
        )
        if not budget and front is None:
            raise ValueError("give a --budget such as latency<=0.6x, or --front latency")
        if workers < 1:
            raise ValueError("--workers must be at least 1")
        pictures = tuple(name.strip() for name in (finalists_by or "").split(",") if name.strip())
        judge, guidance_scale = judged_by(model, kd_judge, kd_guidance_scale, clip)
        race = RaceSettings(
            finalists,
            kd_steps,
            tuple(kd or ()),
            kd_data,
            kd_together,
            judge,
            kd_pictures,
            guidance_scale,
            kd_sampling_steps,
        )
        if objective == "distilled" and judge == "output" and kd_judge is None and not quiet:
            notice("finalists are ranked by output error: no CLIP model is known (--clip DIR)")
        race.recipe(seed)  # says what is wrong with it before anything runs
        inputs = Inputs(cost, data, samples, judged, batch_size, storage, pictures, clip, race)
        folder = out or Path(f"bkprune-{Path(model).stem}")
        parts = Parts(tokenizer, text_encoder, vae, prediction_type)
        job = Job(model, parts, folder, settings, inputs)
        found = job.run(workers, join=join, force=force, quiet=quiet or as_json)
        if found is None:
            return
        if as_json:
            typer.echo(json.dumps(found, indent=1))
        typer.echo(str(folder / ("winner.json" if budget else "finalists.csv")), err=as_json)


def judged_by(
    model: str, judge: str | None, guidance_scale: float | None, clip: Path | None
) -> tuple[str, float]:
    """What ranks finalists, and the guidance of their pictures."""
    from bkprune.models import BUILT_IN
    from bkprune.protocols import PROTOCOLS
    from bkprune.race_job import JUDGES

    known = clip is not None or model in BUILT_IN
    protocol = PROTOCOLS["emoji" if model in BUILT_IN else "own"]
    chosen = choice("--kd-judge", judge, JUDGES) if judge else JUDGES[0] if known else JUDGES[1]
    if chosen == "pictures" and not known:
        raise ValueError("--kd-judge pictures needs --clip DIR, a CLIPModel folder, or use output")
    if guidance_scale is None:
        guidance_scale = protocol.sampling.guidance_scale
    return chosen, guidance_scale
