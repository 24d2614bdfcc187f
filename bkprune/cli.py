"""The command line: one entry for each command, which live in rooms of their own.

Knows the app, its global options and the commands' names. Heavy modules are imported inside the
commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

import bkprune
from bkprune.blocks import GRAINS
from bkprune.cli_analyze import analyze
from bkprune.cli_distill import cache, distill
from bkprune.cli_evaluate import evaluate, stats
from bkprune.cli_profile import profile
from bkprune.cli_prune import diff, prune
from bkprune.cli_run import init, report, run
from bkprune.cli_search import search
from bkprune.terminal import (
    JSON,
    MODEL,
    TEXT_ENCODER,
    TOKENIZER,
    VAE,
    choice,
    one_line_errors,
    print_table,
    show_tracebacks,
)

app = typer.Typer(
    name="bkprune",
    help="Fit a Stable Diffusion checkpoint to a budget by removing U-Net blocks.",
    epilog="Example: bkprune analyze emoji --out demo",
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
)


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
    show_tracebacks(debug)


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
    with one_line_errors("nothing was written"):
        import pandas as pd

        from bkprune.blocks import Inventory
        from bkprune.models import Parts, load

        pipeline = load(model, Parts(tokenizer, text_encoder, vae))
        inventory = Inventory.of(pipeline.unet)
        units = inventory.units(choice("--grain", grain, GRAINS))
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
        print_table(table, f"{model}: {len(inventory)} blocks, {len(units)} units of grain {grain}")


app.command(
    epilog="Examples:  bkprune analyze emoji --out demo   |   "
    "bkprune analyze ./sd15 --data ./pairs --samples 128 --grain pair   |   "
    "bkprune analyze ./sd15 --data prompts.txt --criterion latent,clip --clip ./clip-vit"
)(analyze)
app.command(
    epilog="Examples:  bkprune profile emoji --out demo   |   "
    "bkprune profile unet/config.json --no-latency   |   "
    "bkprune profile ./sd15 --device cuda --dtype float16 --validate 20   |   "
    "bkprune profile sd_v1 --latency-cmd 'trtexec --onnx={onnx}' --latency-pattern "
    "'median = ([0-9.]+) ms'"
)(profile)
app.command(
    epilog="Examples:  bkprune search emoji --out demo --budget 'macs<=0.6x'   |   "
    "bkprune search ./sd15 --out study --budget 'latency<=0.6x' --budget 'params<=500M' "
    "--keep 'down_blocks.0*'"
)(search)
app.command(
    epilog="Examples:  bkprune prune emoji --mask demo/winner.json --out small   |   "
    "bkprune prune ./sd15 --mask bk-sdm-base --dtype float16   |   bkprune prune --check small"
)(prune)
app.command(
    epilog="Examples:  bkprune distill small --teacher emoji --steps 400   |   "
    "bkprune distill ./sd15-base --teacher ./sd15 --data 'shards/{000..099}.tar' --dry-run"
)(distill)
app.command(
    epilog="Examples:  bkprune evaluate small --teacher emoji --out quality   |   "
    "bkprune evaluate pruned=./a distilled=./b --teacher ./sd15 --protocol coco30k --prompts "
    "metadata.csv --inception weights.pth --clip ./clip-vit-g --reference val2014.npz"
)(evaluate)
app.command(epilog="Example: bkprune stats ./val2014 --size 256 --inception w.pth --out val.npz")(
    stats
)
app.command(epilog="Example: bkprune cache ./sd15 --data ./pairs --out latents")(cache)
app.command(
    epilog="Examples:  bkprune run studies/emoji   |   bkprune run studies/emoji --dry-run"
)(run)
app.command(epilog="Example: bkprune report studies/emoji")(report)
app.command(epilog="Example: bkprune init my-study --model ./sd15")(init)
app.command(epilog="Example: bkprune diff ./sd14 ./bk-sdm-base")(diff)


if __name__ == "__main__":
    main()
