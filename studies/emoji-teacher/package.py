"""Stage 5: the trained networks as one Stable Diffusion pipeline folder, in fp16 safetensors.

Reads the newest checkpoints, so it can be run at any time of the training; writes the folder that
the package ships: pipeline, the judge (`clip/`), the pairs, NOTICE.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import autoencoder as stage_autoencoder
import clip as stage_clip
import torch
import unet as stage_unet
from diffusers import DDIMScheduler, StableDiffusionPipeline
from recipe import DATASET, read_pairs
from transformers import CLIPImageProcessor

import bkprune

ASSET = Path(bkprune.__file__).parent / "assets" / "emoji"

NOTICE = """\
The built-in model `emoji` and its data
=======================================

pairs.zip holds 64x64 renderings of emoji with their captions, derived from

- Noto Emoji, Copyright Google LLC, Apache License 2.0, as packaged in the npm package
  @iconify-json/noto 1.2.9
- Fluent Emoji (flat), Copyright Microsoft Corporation, MIT License, as packaged in the npm package
  @iconify-json/fluent-emoji-flat 1.2.6
- captions from the Unicode CLDR short names, Copyright Unicode, Inc., Unicode License v3, as
  packaged in the npm package emojibase-data 17.0.0, Copyright Miles Johnson, MIT License

Flags and skin-tone variants are left out. The weights (unet, vae, text_encoder, tokenizer, clip)
were trained from scratch on these pairs alone by studies/emoji-teacher; no other weights went in.
The pictures were composited on white and scaled; the Apache License 2.0 is in LICENSE, and the MIT
License reads:

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES
OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def pipeline() -> StableDiffusionPipeline:
    """The trained networks, averaged weights, as a pipeline in fp16."""
    tokenizer = stage_clip.train_tokenizer(read_pairs("train").captions)
    vae = stage_autoencoder.trained()
    cached = torch.load(stage_autoencoder.LATENTS, map_location="cpu", weights_only=True)
    vae.register_to_config(scaling_factor=round(cached["scaling_factor"], 5))
    unet, text_encoder = stage_unet.trained()
    training = stage_unet.noise_scheduler().config
    scheduler = DDIMScheduler.from_config(training, set_alpha_to_one=False, steps_offset=1)
    built = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return built.to(dtype=torch.float16)


def main() -> None:
    with tempfile.TemporaryDirectory(dir=ASSET.parent) as beside:
        folder = Path(beside) / "emoji"
        pipeline().save_pretrained(folder)
        tokenizer = stage_clip.train_tokenizer([])
        stage_clip.trained(tokenizer).half().save_pretrained(folder / "clip")
        tokenizer.save_pretrained(folder / "clip")
        size = {"height": 64, "width": 64}
        CLIPImageProcessor(
            size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ).save_pretrained(folder / "clip")
        shutil.copyfile(DATASET, folder / "pairs.zip")
        (folder / "NOTICE").write_text(NOTICE, encoding="utf-8")
        shutil.rmtree(ASSET, ignore_errors=True)
        folder.rename(ASSET)
    size_mb = sum(f.stat().st_size for f in ASSET.rglob("*") if f.is_file()) / 1e6
    print(f"{ASSET}: {size_mb:.1f} MB")


if __name__ == "__main__":
    main()
