"""Go on from the shipped weights, on a machine that has not the checkpoints that made them.

Writes into `build/` what `unet.py` needs: dataset, tokenizer, judge, autoencoder, latents, and the
shipped U-Net and text encoder as a start. Then `python unet.py --steps N` trains N further steps;
optimiser states are not shipped, so the rate warms up anew.
"""

from __future__ import annotations

import shutil

import autoencoder as stage_autoencoder
import clip as stage_clip
import unet as stage_unet
from package import ASSET
from recipe import BUILD, DATASET, read_pairs, save_atomic
from transformers import CLIPModel

from bkprune.models import load


def main() -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ASSET / "pairs.zip", DATASET)
    pipeline = load("emoji")
    pipeline.tokenizer.save_pretrained(stage_clip.TOKENIZER)
    judge = CLIPModel.from_pretrained(ASSET / "clip").float()
    save_atomic({"model": judge.state_dict()}, stage_clip.CHECKPOINT)
    save_atomic({"model": pipeline.vae.state_dict()}, stage_autoencoder.CHECKPOINT)
    stage_autoencoder.cache_latents(pipeline.vae, read_pairs("train").images)
    start = {"unet": pipeline.unet.state_dict(), "text_encoder": pipeline.text_encoder.state_dict()}
    save_atomic(start, stage_unet.START)
    print(f"{stage_unet.START}: now run unet.py --steps N")


if __name__ == "__main__":
    main()
