"""The inputs on which blocks are ablated: noised latents with their conditions.

Knows where latents come from (captioned images, the teacher's own sampling for prompts alone, or
plain noise for timing) and how timesteps are stratified. Noise and timestep of sample `i` depend on
the seed and on `i` alone, so the batch size changes nothing. It does not know what is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bkprune.data import Pairs
from bkprune.models import need
from bkprune.sampling import SamplingSettings, sample_latents

_N_TOKENS = 77  # of the noise calibration set, as CLIP pads


def sample_generator(seed: int, index: int) -> torch.Generator:
    """The randomness of one sample, whatever batch it falls into."""
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)


def pick(n_available: int, n: int, seed: int) -> list[int]:
    """Which pairs or prompts are taken: a seeded shuffle, gone through again when it runs out."""
    order = torch.randperm(n_available, generator=sample_generator(seed, -1)).tolist()
    return [order[i % n_available] for i in range(n)]


@dataclass(frozen=True)
class Calibration:
    """Noised latents with their conditions: the inputs on which blocks are ablated.

    Attributes:
        latents: clean, scaled latents `[N, C, H, W]`, float32.
        noise: `[N, C, H, W]`.
        timesteps: `[N]`, stratified: sample `i` lies in bin `i % n_bins`.
        bins: `[N]`, the timestep bin of each sample.
        embeddings: text embeddings `[N, tokens, width]`.
        added: SDXL's `text_embeds` and `time_ids`, or empty.
        extra: input channels beyond the latents (inpainting, pix2pix), or None.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    bins: Tensor
    embeddings: Tensor
    added: dict[str, Tensor]
    extra: Tensor | None

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, chosen: slice) -> Calibration:
        return Calibration(
            self.latents[chosen],
            self.noise[chosen],
            self.timesteps[chosen],
            self.bins[chosen],
            self.embeddings[chosen],
            {name: tensor[chosen] for name, tensor in self.added.items()},
            None if self.extra is None else self.extra[chosen],
        )

    def batches(self, batch_size: int) -> Iterator[tuple[slice, Calibration]]:
        """Consecutive batches with the rows they cover."""
        for first in range(0, len(self), batch_size):
            rows = slice(first, min(first + batch_size, len(self)))
            yield rows, self[rows]

    def inputs(self, scheduler: Any, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments of the U-Net's forward for this batch."""
        noisy = scheduler.add_noise(self.latents, self.noise, self.timesteps)
        if self.extra is not None:
            noisy = torch.cat([noisy, self.extra], dim=1)
        inputs: dict[str, Any] = {
            "sample": noisy.to(dtype),
            "timestep": self.timesteps,
            "encoder_hidden_states": self.embeddings.to(dtype),
        }
        if self.added:
            inputs["added_cond_kwargs"] = {n: t.to(dtype) for n, t in self.added.items()}
        return inputs

    def target(self, scheduler: Any) -> Tensor:
        """What the U-Net is trained to predict here, after the scheduler's `prediction_type`."""
        kind = scheduler.config.prediction_type
        if kind == "epsilon":
            return self.noise
        if kind == "v_prediction":
            abar = scheduler.alphas_cumprod[self.timesteps].view(-1, 1, 1, 1)
            v: Tensor = abar.sqrt() * self.noise - (1 - abar).sqrt() * self.latents
            return v
        raise ValueError(f"prediction_type {kind!r} is not supported: epsilon or v_prediction")


def draw(
    latents: Tensor,
    conditions: tuple[Tensor, dict[str, Tensor]],
    unet_config: Any,
    *,
    n_train_timesteps: int,
    n_bins: int,
    seed: int,
) -> Calibration:
    """Noise clean latents at timesteps stratified over `n_bins` equal bins."""
    n = len(latents)
    embeddings, added = conditions
    bins = torch.arange(n) % n_bins
    generators = [sample_generator(seed, i) for i in range(n)]
    within = torch.stack([torch.rand((), generator=g) for g in generators])
    timesteps = ((bins + within) / n_bins * n_train_timesteps).long()
    noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators])
    extra = _extra_channels(latents, int(unet_config["in_channels"]), generators)
    return Calibration(latents, noise, timesteps, bins, embeddings, added, extra)


def _extra_channels(
    latents: Tensor, in_channels: int, generators: list[torch.Generator]
) -> Tensor | None:
    """Inputs beyond the noisy latents: inpainting's mask and masked latents, pix2pix's source.

    The hole is a random rectangle of a quarter of the area, cut out of the latents themselves; the
    source image of pix2pix is the image itself.
    """
    n, channels, height, width = latents.shape
    n_extra = in_channels - channels
    if n_extra == 0:
        return None
    if n_extra == channels:
        return latents
    if n_extra != channels + 1:
        raise ValueError(
            f"{in_channels} input channels over {channels} latent ones: neither text-to-image, nor "
            "inpainting, nor pix2pix"
        )
    mask = torch.zeros(n, 1, height, width)
    for i, generator in enumerate(generators):
        y, x = (torch.rand(2, generator=generator) * 0.5).tolist()
        top, left = int(y * height), int(x * width)
        mask[i, :, top : top + height // 2, left : left + width // 2] = 1
    return torch.cat([mask, latents * (1 - mask)], dim=1)


def noise_latents(unet_config: Any, n: int, seed: int) -> Tensor:
    """Unit Gaussian latents `[n, C, H, W]` of the U-Net's own size: for timing, not importance."""
    size = unet_config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    shape = (int(unet_config["out_channels"]), height, width)
    return torch.stack(
        [torch.randn(shape, generator=sample_generator(seed + 1, i)) for i in range(n)]
    )


def noise_conditions(unet_config: Any, n: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Unit Gaussian text embeddings for a U-Net without a text encoder."""
    text = unet_config["cross_attention_dim"]
    width = int(text if isinstance(text, int) else text[0])
    generators = [sample_generator(seed + 2, i) for i in range(n)]
    embeddings = torch.stack([torch.randn(_N_TOKENS, width, generator=g) for g in generators])
    added: dict[str, Tensor] = {}
    if unet_config["addition_embed_type"] == "text_time":
        pooled = int(unet_config["projection_class_embeddings_input_dim"]) - 6 * int(
            unet_config["addition_time_embed_dim"]
        )
        added["text_embeds"] = torch.stack([torch.randn(pooled, generator=g) for g in generators])
        side = 8.0 * int(unet_config["sample_size"])
        added["time_ids"] = torch.tensor([[side, side, 0, 0, side, side]]).repeat(n, 1)
    return embeddings, added


@torch.no_grad()
def encode_images(vae: Any, images: Tensor, batch_size: int) -> Tensor:
    """Scaled latents `[N, C, H, W]`, the posteriors' means, in float32."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    means = [
        vae.encode(batch.to(vae.dtype)).latent_dist.mean.float()
        for batch in images.split(batch_size)
    ]
    return (torch.cat(means) - shift) * float(vae.config.scaling_factor)


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Text embeddings `[N, tokens, width]` by the pipeline's own encoder, with SDXL's additions."""
    embeddings, pooled = [], []
    for prompt in prompts:
        encoded = pipeline.encode_prompt(
            prompt=prompt,
            device=pipeline.unet.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        embeddings.append(encoded[0].float())
        if len(encoded) == 4:
            pooled.append(encoded[2].float())
    added: dict[str, Tensor] = {}
    if pooled:
        side = float(pipeline.unet.config.sample_size * pipeline.vae_scale_factor)
        added["text_embeds"] = torch.cat(pooled)
        added["time_ids"] = torch.tensor([[side, side, 0, 0, side, side]]).repeat(len(prompts), 1)
    return torch.cat(embeddings), added


def calibrate(
    pipeline: Any,
    source: Pairs | list[str] | None,
    *,
    n: int,
    n_bins: int,
    seed: int,
    batch_size: int,
    sampling: SamplingSettings,
) -> Calibration:
    """A calibration set of `n` samples over `n_bins` timestep bins.

    Captioned images are encoded by the VAE; prompts alone get latents from the teacher's own
    sampling; `None` gives noise for latents and text embeddings, which times a network but says
    nothing about importance. Which pairs or prompts are taken depends on the seed.

    Raises:
        ValueError: the pipeline lacks the part that the source needs.
    """
    unet, scheduler = pipeline.unet, pipeline.scheduler
    if source is None:
        latents = noise_latents(unet.config, n, seed)
        conditions = noise_conditions(unet.config, n, seed)
    else:
        need(pipeline, "text_encoder", "encoding captions")
        need(pipeline, "tokenizer", "encoding captions")
        vae = need(pipeline, "vae", "latents")
        chosen = pick(len(source), n, seed)
        if isinstance(source, Pairs):
            pairs = source.subset(chosen)
            size = int(unet.config.sample_size * pipeline.vae_scale_factor)
            prompts = pairs.captions
            latents = encode_images(vae, pairs.images(size), batch_size)
        else:
            prompts = [source[i] for i in chosen]
            latents = sample_latents(pipeline, prompts, sampling)
        conditions = encode_prompts(pipeline, prompts)
    return draw(
        latents,
        conditions,
        unet.config,
        n_train_timesteps=int(scheduler.config.num_train_timesteps),
        n_bins=n_bins,
        seed=seed,
    )
