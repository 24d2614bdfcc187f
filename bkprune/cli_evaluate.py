"""`bkprune evaluate` and `bkprune stats`: options, and what is printed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bkprune.terminal import (
    JSON,
    PREDICTION,
    QUIET,
    TEXT_ENCODER,
    TOKENIZER,
    VAE,
    choice,
    notice,
    one_line_errors,
    print_table,
    progress_bar,
)

if TYPE_CHECKING:
    import pandas as pd

_WHAT, _HOW, _NETS, _WHERE = (
    "What is drawn",
    "How it is drawn",
    "What judges",
    "Where it runs",
)
_DETAILS = ("s_text_encoder", "s_unet", "s_vae_decoder")  # of the table, not of the screen
INCEPTION = Annotated[
    Path | None,
    typer.Option(
        help="weights-inception-2015-12-05-6726825d.pth, for fid, kid and is.",
        rich_help_panel=_NETS,
    ),
]
CLIP = Annotated[
    Path | None,
    typer.Option(
        help="CLIPModel folder of transformers. Default: the small one beside the built-in "
        "model, under the protocol emoji only.",
        rich_help_panel=_NETS,
    ),
]


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="What to judge, as in `analyze`; LABEL=MODEL gives it a name in the tables.",
        ),
    ],
    teacher: Annotated[
        str | None,
        typer.Option(help="What they came from: drawn too, and pictures are compared with its."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for pictures and tables. The same command goes on.")
    ] = Path("evaluation"),
    protocol: Annotated[
        str | None,
        typer.Option(
            help="coco30k (30,000 prompts, PNDM 25 steps, guidance 7.5, 256 px), emoji, or own. "
            "Default: emoji for the built-in teacher, else own."
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: fid, kid, is, clip_score, frechet_clip, kernel_clip, lpips, "
            "psnr, ssim, output_error, speed. Default: the protocol's."
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A .txt with one a line, a .csv or .jsonl with a column text, or captioned "
            "pictures.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            help="Pictures; beyond the prompts they begin anew with other seeds. Default: one a "
            "prompt.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="Image-to-image from the prompts' own pictures, with this share of the steps.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    teacher_steps: Annotated[
        str | None,
        typer.Option(
            help="Split sampling: the teacher takes the first steps, e.g. 0,5,10 for a sweep.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Default: 25.", rich_help_panel=_HOW)] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Default: 7.5; emoji 3.", rich_help_panel=_HOW)
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="pndm, ddim, ddpm, dpm++, unipc, euler, euler-a, heun, lcm. Default: the "
            "protocol's, or the model's own.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    negative_prompt: Annotated[
        str, typer.Option(help="For all pictures.", rich_help_panel=_HOW)
    ] = "",
    seed: Annotated[
        int, typer.Option(help="Of picture 0; picture i has seed + i.", rich_help_panel=_HOW)
    ] = 1234,
    together: Annotated[
        bool | None,
        typer.Option(
            "--together/--one-by-one",
            help="Pictures of a batch go through the networks together: faster, and equal up to "
            "rounding. One by one, the batch size changes no bit on a CPU. Default: together on "
            "a GPU.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures at a time.", rich_help_panel=_HOW)] = 16,
    safety_checker: Annotated[
        bool | None,
        typer.Option(
            help="Keep the model's safety checker; what it blacks out is counted. Default: kept, "
            "except under coco30k.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    inception: INCEPTION = None,
    clip: CLIP = None,
    lpips: Annotated[
        Path | None,
        typer.Option(help="alexnet-owt-7be5be79.pth, for lpips.", rich_help_panel=_NETS),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Real pictures for distances: a folder, or .npz of `bkprune stats` or "
            "pytorch-fid.",
            rich_help_panel=_NETS,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Default: a GPU if there is one.", rich_help_panel=_WHERE)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Default: float16 on a GPU, float32.", rich_help_panel=_WHERE),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Drawing processes, one thread each. Default on a CPU: one a core.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    max_seconds: Annotated[
        float, typer.Option(help="Limit for measuring speed.", rich_help_panel=_WHERE)
    ] = 60.0,
    as_json: JSON = False,
    quiet: QUIET = False,
    tokenizer: TOKENIZER = None,
    text_encoder: TEXT_ENCODER = None,
    vae: VAE = None,
    prediction_type: PREDICTION = None,
) -> None:
    """Draw the same prompts and seeds with every model and say how good the pictures are.

    Appends to eval.csv and differences.csv (paired, with 95 % intervals), and draws a grid with a
    column a model. Pictures that are there already are not drawn again.
    """
    with one_line_errors("the same command goes on where it stopped"):
        from dataclasses import replace

        import torch

        from bkprune.evaluate_job import Asked, Job
        from bkprune.models import Parts
        from bkprune.protocols import CHOICES, PROTOCOLS

        named = _labelled([m for m in models if m != teacher])
        origin = _labelled([teacher])[0] if teacher else None
        is_built_in = "emoji" in {path for _, path in (*named, *((origin,) if origin else ()))}
        name = protocol or ("emoji" if is_built_in else "own")
        chosen = PROTOCOLS[choice("--protocol", name, tuple(PROTOCOLS))]
        if safety_checker is not None:
            chosen = replace(chosen, keeps_checker=safety_checker)
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        on_cpu = where == "cpu"
        given: dict[str, Any] = {
            "steps": steps,
            "guidance_scale": guidance_scale,
            "scheduler": scheduler,
            "strength": strength,
        }
        sampling = replace(
            chosen.sampling,
            seed=seed,
            batch_size=batch_size,
            negative_prompt=negative_prompt,
            is_exact=on_cpu if together is None else not together,
            **{key: value for key, value in given.items() if value is not None},
        )
        sweep = _steps(teacher_steps, sampling.steps)
        if sweep and (teacher is None or strength is not None):
            raise ValueError("--teacher-steps needs --teacher, and no --strength")
        if n is not None and n < 1:
            raise ValueError(f"--n {n}: at least one picture")
        asked = Asked(
            models=named,
            teacher=origin,
            out=out,
            protocol=chosen,
            sampling=sampling,
            prompts=prompts,
            n=n,
            metrics=_names(metrics, CHOICES),
            reference=reference,
            inception=inception,
            clip=clip,
            lpips=lpips,
            parts=Parts(tokenizer, text_encoder, vae, prediction_type),
            teacher_steps=sweep,
            device=where,
            dtype=choice(
                "--dtype",
                dtype or ("float32" if on_cpu else "float16"),
                ("float32", "float16", "bfloat16"),
            ),
            max_speed_s=max_seconds,
            workers=workers or (len(os.sched_getaffinity(0)) if on_cpu else 1),
        )
        table = Job(asked, quiet=quiet or as_json).run()
        if table is None:
            return
        if as_json:
            typer.echo(json.dumps(json.loads(table.to_json(orient="records")), indent=1))
        elif not quiet:
            print_evaluation(table)
        typer.echo(str(out / "eval.csv"), err=as_json)


def _names(text: str | None, choices: tuple[str, ...]) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    return tuple(choice("--metrics", name, choices) for name in names)


def _steps(text: str | None, most: int) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        found = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ValueError(f"--teacher-steps {text!r}: whole numbers with commas") from None
    if not found or found[0] < 0 or found[-1] > most:
        raise ValueError(f"--teacher-steps {text!r}: from 0 to {most}, the steps of a picture")
    return found


def _labelled(models: list[str]) -> tuple[tuple[str, str], ...]:
    """Short names that differ: LABEL=MODEL, or as much of a path's end as it takes."""
    out: list[tuple[str, str]] = []
    for model in models:
        label, sign, path = model.partition("=")
        if sign and not Path(model).exists():
            out.append((label, path))
            continue
        parts = Path(model).parts or (model,)
        ends = ["/".join(parts[-k:]) for k in range(1, len(parts) + 1)]
        others = {"/".join(Path(m).parts[-k:]) for m in models if m != model for k in (1, 2, 3, 4)}
        out.append((next((end for end in ends if end not in others), model), model))
    labels = [label for label, _ in out]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"two models are called {twice[0]!r}: give LABEL=MODEL")
    return tuple(out)


def print_evaluation(table: pd.DataFrame) -> None:
    """One row a model, one column a metric."""
    import pandas as pd

    rows: dict[str, dict[str, str]] = {}
    for row in table.to_dict("records"):
        error = "" if pd.isna(row["stderr"]) else f" ± {row['stderr']:.2g}"
        rows.setdefault(row["model"], {})[row["metric"]] = f"{row['value']:.4g}{error}"
    view = pd.DataFrame.from_dict(rows, orient="index").fillna("")
    hidden = [c for c in ("black", "not_finite", "flagged") if (view[c] == "0").all()]
    view = view.drop(columns=[*hidden, *(c for c in _DETAILS if c in view)])
    view = view.rename(columns={c: c.replace("_", " ") for c in view.columns})
    view.insert(0, "model", view.index)
    first = table.iloc[0]
    n = int(table.loc[table["metric"] == "black", "n"].iloc[0])
    print_table(view, f"{first['task']}, {n} pictures a model, {first['sampling']}")


def stats(
    images: Annotated[
        str, typer.Argument(metavar="IMAGES", help="Folder of pictures, or a zip of pairs.")
    ],
    out: Annotated[Path, typer.Option(help="The .npz to write.")],
    size: Annotated[
        int | None,
        typer.Option(help="Reduce to this size first (PIL bicubic, centre crop), e.g. 256."),
    ] = None,
    features: Annotated[
        bool, typer.Option("--features", help="Keep the features too: kernel distances need them.")
    ] = False,
    inception: INCEPTION = None,
    clip: CLIP = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quiet: QUIET = False,
) -> None:
    """Statistics of real pictures, once: mean and covariance of their features.

    The file has pytorch-fid's names, and says which network made it.
    """
    with one_line_errors("nothing was written"):
        from tempfile import TemporaryDirectory

        from bkprune.clip import ClipScore
        from bkprune.features import ClipRows, InceptionRows, Network, save_reference
        from bkprune.inception import WEIGHTS, WHERE
        from bkprune.judges import real_statistics

        if (inception is None) == (clip is None):
            raise ValueError(f"give --inception FILE ({WEIGHTS}, from {WHERE}) or --clip DIR")
        if out.suffix != ".npz":
            raise ValueError(f"--out {out}: statistics are an .npz file")
        network: Network
        if inception is not None:
            network = InceptionRows(inception, device)
        else:
            network = ClipRows(ClipScore.load(clip), device)
        with TemporaryDirectory() as cache, progress_bar(quiet) as progress:
            found = real_statistics(images, network, size, Path(cache), progress)
            assert found.features is not None
            save_reference(out, found.features, network, size, keep_features=features)
        if found.moments.n < 2 * network.width:
            notice(
                f"{found.moments.n} pictures for {network.width} features: a distance to them is "
                "biased upwards"
            )
        typer.echo(str(out))
