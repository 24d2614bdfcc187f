"""Stage 2: an AutoencoderKL, 64x64 pixels to 16x16x4 latents, trained on pixels alone.

Loss: squared error, a tenth of absolute error for edges, and a KL term small enough to cost about
0.1 dB that keeps the latents near unit scale. The scaling factor is measured at the end, as one
over the standard deviation of the training latents (Rombach et al. 2022, appendix G).
"""

from __future__ import annotations

import recipe
import torch
from diffusers import AutoencoderKL
from recipe import (
    BUILD,
    SEED,
    SIZE,
    batch_indices,
    generator,
    loop,
    read_pairs,
    save_atomic,
    warmup_cosine,
)
from torch import Tensor

CHECKPOINT = BUILD / "autoencoder.pt"
LATENTS = BUILD / "latents.pt"
KL_WEIGHT = 5e-4  # per latent element


def build() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(24, 48, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
    )


def trained() -> AutoencoderKL:
    autoencoder = build()
    state = torch.load(CHECKPOINT, map_location="cpu", weights_only=True)
    autoencoder.load_state_dict(state["model"])
    return autoencoder.eval()


@torch.no_grad()
def psnr(autoencoder: AutoencoderKL, images: Tensor) -> float:
    """Mean over images of each one's peak signal-to-noise ratio, in dB, from the latent mean."""
    values = []
    for batch in images.split(64):
        latents = autoencoder.encode(batch).latent_dist.mean
        decoded = autoencoder.decode(latents).sample.clamp(-1, 1)
        error = (decoded - batch).square().mean(dim=(1, 2, 3))
        values.append(10 * torch.log10(4 / error))
    return torch.cat(values).mean().item()


@torch.no_grad()
def cache_latents(autoencoder: AutoencoderKL, images: Tensor) -> None:
    """Store mean and standard deviation of every training image's posterior, flipped ones too."""
    posteriors = [
        autoencoder.encode(batch).latent_dist
        for source in (images, images.flip(-1))
        for batch in source.split(64)
    ]
    mean = torch.cat([p.mean for p in posteriors])
    std = torch.cat([p.std for p in posteriors])
    save_atomic({"mean": mean, "std": std, "scaling_factor": 1 / mean.std().item()}, LATENTS)


def main() -> None:
    options = recipe.options(__doc__, steps=3300, batch_size=12, lr=2e-3)

    train, heldout = read_pairs("train"), read_pairs("heldout")
    torch.manual_seed(SEED)
    autoencoder = build().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(
        autoencoder.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=1e-4
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: warmup_cosine(step, options.steps)
    )

    def step(index: int) -> dict[str, float]:
        random = generator(index)
        pixels = train.images[batch_indices(index, options.batch_size, len(train.images))]
        flipped = torch.rand(len(pixels), 1, 1, 1, generator=random) < 0.5
        pixels = torch.where(flipped, pixels.flip(-1), pixels)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        posterior = autoencoder.encode(pixels).latent_dist
        decoded = autoencoder.decode(posterior.sample(generator=random)).sample
        squared = (decoded - pixels).square().mean()
        absolute = (decoded - pixels).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = squared + 0.1 * absolute + KL_WEIGHT * kl
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        return {"squared": squared.item(), "absolute": absolute.item(), "kl": kl.item()}

    def check(_: int) -> dict[str, float]:
        return {"heldout_psnr_db": psnr(autoencoder, heldout.images[::4])}

    modules = {"model": autoencoder, "optimiser": optimiser, "schedule": schedule}
    loop(CHECKPOINT, modules, options.steps, step, check=check)
    autoencoder.eval()
    cache_latents(autoencoder, train.images)
    for name, pairs in (("train", train), ("heldout", heldout)):
        print(f"{name} PSNR {psnr(autoencoder, pairs.images):.2f} dB (mean over images)")


if __name__ == "__main__":
    main()
