"""Stage 4: the U-Net with Stable Diffusion v1's topology, and its text encoder, trained together.

Epsilon prediction on cached latents, scaled-linear betas, min-SNR-5 weighting (Hang et al. 2023,
arXiv 2303.09556), a tenth of the captions dropped for classifier-free guidance, an exponential
moving average of both networks. The rate is constant, then falls to zero over the last quarter, so
that a longer run may continue from any checkpoint made before the fall.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import autoencoder as stage_autoencoder
import clip as stage_clip
import recipe
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from recipe import BUILD, SEED, batch_indices, generator, loop, read_pairs
from torch import Tensor, nn
from transformers import CLIPTextModel

CHECKPOINT = BUILD / "unet.pt"
START = BUILD / "unet-start.pt"  # of unpackage.py: weights to go on from
CAPTION_DROPOUT = 0.1
SNR_GAMMA = 5.0
FALL = 0.25


def build() -> UNet2DConditionModel:
    """SD v1's topology and proportions, with an initialisation under which depth is heard.

    PyTorch's default convolution attenuates by sqrt(3), so after the dozen shortcuts of the up
    stages removing the mid block changes 1e-4 of an untrained network's output power (1e-10 after
    750 steps: it is never found again). Here shortcuts hand on the hidden half as it is and
    samplers keep the variance, which makes it 1e-2.
    """
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        norm_num_groups=8,
        cross_attention_dim=stage_clip.WIDTH,
        attention_head_dim=(2, 4, 4, 4),  # diffusers' old name for the number of heads
    )
    for name, module in unet.named_modules():
        if name.endswith("conv_shortcut") or ("samplers" in name and name.endswith("conv")):
            nn.init.zeros_(module.bias)
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        if name.startswith("up_blocks") and name.endswith("conv_shortcut"):
            n_out = module.out_channels
            if module.in_channels <= 2 * n_out:
                nn.init.dirac_(module.weight[:, :n_out])
    return unet


def text_encoder(judge: Any) -> CLIPTextModel:
    """A copy of the judge's text tower."""
    encoder = CLIPTextModel(judge.config.text_config)
    encoder.load_state_dict(judge.text_model.state_dict())
    return encoder


def noise_scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="epsilon",
        clip_sample=False,
    )


def rate(step: int, n_steps: int, n_warmup: int = 200) -> float:
    """Factor of the learning rate: warm up, hold, fall linearly over the last quarter."""
    return min((step + 1) / n_warmup, 1.0, (n_steps - step) / (FALL * n_steps))


def trained() -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """The averaged U-Net and text encoder of the newest checkpoint."""
    tokenizer = stage_clip.train_tokenizer([])
    unet, encoder = build(), text_encoder(stage_clip.build(tokenizer))
    state = torch.load(CHECKPOINT, map_location="cpu", weights_only=True)
    parameters = list(chain(unet.parameters(), encoder.parameters()))
    for parameter, average in zip(parameters, state["ema"]["shadow_params"], strict=True):
        parameter.data.copy_(average)
    return unet.eval(), encoder.eval()


def main() -> None:
    options = recipe.options(__doc__, steps=8800, batch_size=48, lr=8e-4)

    train, heldout = read_pairs("train"), read_pairs("heldout")
    tokenizer = stage_clip.train_tokenizer(train.captions)
    ids = stage_clip.tokenize(tokenizer, train.captions)
    heldout_ids = stage_clip.tokenize(tokenizer, heldout.captions)
    empty = stage_clip.tokenize(tokenizer, [""])
    cached = torch.load(stage_autoencoder.LATENTS, map_location="cpu", weights_only=True)
    scale = cached["scaling_factor"]
    with torch.no_grad():
        posterior = stage_autoencoder.trained().encode(heldout.images).latent_dist
        heldout_latents = posterior.mean * scale

    scheduler = noise_scheduler()
    abar: Tensor = scheduler.alphas_cumprod
    snr = abar / (1 - abar)
    weight = snr.clamp(max=SNR_GAMMA) / snr

    torch.manual_seed(SEED)
    unet, encoder = build(), text_encoder(stage_clip.trained(tokenizer)).train()
    if START.exists():
        start = torch.load(START, map_location="cpu", weights_only=True)
        unet.load_state_dict(start["unet"])
        encoder.load_state_dict(start["text_encoder"])
    unet.to(memory_format=torch.channels_last)  # a tenth faster on a CPU
    parameters = list(chain(unet.parameters(), encoder.parameters()))
    optimiser = torch.optim.AdamW(
        parameters, lr=options.lr, betas=(0.9, 0.99), weight_decay=1e-2, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, options.steps))
    ema = EMAModel(parameters, decay=0.999)

    def error(latents: Tensor, tokens: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Squared error of the predicted noise, [B], and the timesteps, stratified over a batch."""
        n = len(latents)
        strata = (torch.arange(n) + torch.rand(n, generator=random)) / n
        timesteps = (strata * len(abar)).long()
        noise = torch.randn(latents.shape, generator=random)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        predicted = unet(noisy, timesteps, encoder(tokens).last_hidden_state).sample
        return (predicted - noise).square().mean(dim=(1, 2, 3)), timesteps

    def step(index: int) -> dict[str, float]:
        random = generator(index)
        chosen = batch_indices(index, options.batch_size, len(train.images))
        mean, std = cached["mean"][chosen], cached["std"][chosen]
        latents = (mean + std * torch.randn(mean.shape, generator=random)) * scale
        dropped = torch.rand(len(chosen), 1, generator=random) < CAPTION_DROPOUT
        tokens = torch.where(dropped, empty, ids[chosen])
        errors, timesteps = error(latents, tokens, random)
        optimiser.zero_grad()
        (errors * weight[timesteps]).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        ema.step(parameters)
        return {"loss": errors.mean().item()}

    @torch.no_grad()
    def check(_: int) -> dict[str, float]:
        """Unweighted denoising loss of the averaged networks: seen latents, and held-out ones."""
        ema.store(parameters)
        ema.copy_to(parameters)
        seen = error(cached["mean"][:2902:9] * scale, ids[::9], generator(0, stream=5))[0].mean()
        unseen = error(heldout_latents, heldout_ids, generator(0, stream=5))[0].mean()
        ema.restore(parameters)
        return {"ema_train_loss": seen.item(), "ema_heldout_loss": unseen.item()}

    modules = {"unet": unet, "text_encoder": encoder, "optimiser": optimiser}
    loop(CHECKPOINT, modules | {"schedule": schedule, "ema": ema}, options.steps, step, check=check)


if __name__ == "__main__":
    main()
