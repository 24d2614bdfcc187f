"""Stage 3: a byte-level BPE tokenizer and a small CLIP, trained on the same pairs.

The CLIP is the offline judge of text-image agreement. Its text tower is where the pipeline's text
encoder starts from; the pipeline's is then trained along with the U-Net, the judge's is not, so
that the judge never learns the generator's habits.
"""

from __future__ import annotations

from collections import Counter

import recipe
import torch
import torch.nn.functional as F
from recipe import (
    BUILD,
    SEED,
    SIZE,
    batch_indices,
    generator,
    loop,
    read_pairs,
    warmup_cosine,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

CHECKPOINT = BUILD / "clip.pt"
TOKENIZER = BUILD / "tokenizer"
VOCAB_SIZE = 1536
MAX_TOKENS = 24
WIDTH = 128


def train_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Learn merges on the training captions; the byte alphabet makes every string encodable."""
    if (TOKENIZER / "tokenizer.json").exists():
        return CLIPTokenizer.from_pretrained(TOKENIZER)
    stock = CLIPTokenizer()
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = stock.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(alphabet) - 2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    learner.model.save(str(BUILD))
    merges = [
        tuple(line.split(" "))
        for line in (BUILD / "merges.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#version")
    ]
    tokens = alphabet + [f"{byte}</w>" for byte in alphabet]
    tokens += [left + right for left, right in merges if left + right not in tokens]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        model_max_length=MAX_TOKENS,
    )
    tokenizer.save_pretrained(TOKENIZER)
    return tokenizer


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids [N, MAX_TOKENS], padded with the end token as Stable Diffusion pads."""
    batch = tokenizer(
        captions,
        padding="max_length",
        truncation=True,
        max_length=MAX_TOKENS,
        return_tensors="pt",
    )
    ids: Tensor = batch.input_ids
    return ids


def build(tokenizer: CLIPTokenizer) -> CLIPModel:
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=WIDTH,
    )
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=8,
        projection_dim=WIDTH,
    )
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH
    )
    return CLIPModel(config)


def trained(tokenizer: CLIPTokenizer) -> CLIPModel:
    model = build(tokenizer)
    state = torch.load(CHECKPOINT, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    return model.eval()


@torch.no_grad()
def top1_among_100(model: CLIPModel, images: Tensor, ids: Tensor, pool: Tensor) -> float:
    """Share of images whose own caption scores highest beside 99 others drawn from `pool`."""
    image = torch.cat([model.get_image_features(b).pooler_output for b in images.split(128)])
    own = F.normalize(model.get_text_features(ids).pooler_output, dim=-1)
    others = F.normalize(model.get_text_features(pool).pooler_output, dim=-1)
    score, cosine = (F.normalize(image, dim=-1) * own).sum(-1), F.normalize(image, dim=-1)
    cosine = cosine @ others.T
    is_own = (pool[None] == ids[:, None]).all(-1)
    cosine = cosine.masked_fill(is_own, -2)
    hits = [
        bool(score[i] > cosine[i, _ninety_nine(is_own[i], i)].max()) for i in range(len(images))
    ]
    return sum(hits) / len(hits)


def _ninety_nine(is_own: Tensor, index: int) -> Tensor:
    candidates = (~is_own).nonzero().squeeze(-1)
    order = torch.randperm(len(candidates), generator=generator(index, stream=7))
    return candidates[order[:99]]


def augment(pixels: Tensor, random: torch.Generator) -> Tensor:
    """Flip, shift, scale and mildly recolour: the judge must know the thing, not its pixels."""
    n = len(pixels)
    flip = torch.where(torch.rand(n, generator=random) < 0.5, -1.0, 1.0)
    scale = 0.85 + 0.4 * torch.rand(n, generator=random)
    shift = 0.3 * (torch.rand(n, 2, generator=random) - 0.5)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = flip * scale, scale, shift
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels - 1, grid, align_corners=False) + 1  # pad with white
    gain = 1 + 0.2 * (torch.rand(n, 3, 1, 1, generator=random) - 0.5)
    noise = 0.1 * torch.rand(n, 1, 1, 1, generator=random)
    moved = (moved + 1) * gain - 1
    return moved + noise * torch.randn(moved.shape, generator=random)


def main() -> None:
    options = recipe.options(__doc__, steps=800, batch_size=128, lr=1e-3)

    train, heldout = read_pairs("train"), read_pairs("heldout")
    tokenizer = train_tokenizer(train.captions)
    ids, heldout_ids = tokenize(tokenizer, train.captions), tokenize(tokenizer, heldout.captions)
    lengths = Counter((ids != tokenizer.eos_token_id).sum(-1).tolist())
    print(f"vocabulary {len(tokenizer)}, longest caption {max(lengths) + 1} tokens")
    torch.manual_seed(SEED)
    model = build(tokenizer)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.2
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: warmup_cosine(step, options.steps)
    )

    def step(index: int) -> dict[str, float]:
        chosen = batch_indices(index, options.batch_size, len(train.images))
        pixels = augment(train.images[chosen], generator(index))
        output = model(input_ids=ids[chosen], pixel_values=pixels, return_loss=True)
        optimiser.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)
        return {"loss": output.loss.item()}

    def check(_: int) -> dict[str, float]:
        model.eval()
        shares = {
            "heldout_top1_of_100": top1_among_100(model, heldout.images, heldout_ids, heldout_ids),
            "train_top1_of_100": top1_among_100(model, train.images[::9], ids[::9], ids),
        }
        model.train()
        return shares

    modules = {"model": model, "optimiser": optimiser, "schedule": schedule}
    loop(CHECKPOINT, modules, options.steps, step, check=check)


if __name__ == "__main__":
    main()
