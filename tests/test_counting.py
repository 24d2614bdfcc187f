"""Golden numbers of the published networks, both conventions, from shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bkprune.blocks import Inventory
from bkprune.bypass import bypassed
from bkprune.cost import rows_of
from bkprune.counting import Call, activation_peaks, count, unet_call
from bkprune.presets import preset
from bkprune.skeleton import skeleton

Meta = Callable[[str], Any]


@pytest.mark.parametrize(
    ("family", "params", "macs_paper", "macs"),
    [
        ("sd_v1", 859_520_964, 338_749_194_240, 401_636_720_640),
        ("sd_v2_base", 865_910_724, 339_241_205_760, 402_128_732_160),
        ("sd_v2_768", 865_910_724, 760_797_839_360, 1_074_552_872_960),
        ("sdxl", 2_567_463_684, None, 3_380_618_199_040),
    ],
)
def test_whole_unets(meta: Meta, family: str, params: int, macs_paper: int, macs: int) -> None:
    unet = meta(family)
    counted = count(unet, unet_call(unet.config), rows_of(Inventory.of(unet)))
    assert counted.whole.params == params
    assert counted.whole.weight_bytes == 4 * params
    assert counted.whole.macs == macs
    if macs_paper is not None:
        assert counted.whole.macs_paper == macs_paper
    for name in ("params", "macs_paper", "macs"):
        parts = [*counted.modules.values(), counted.rest]
        assert sum(getattr(part, name) for part in parts) == getattr(counted.whole, name)


@pytest.mark.parametrize(
    ("family", "name", "params", "macs_paper", "macs"),
    [
        ("sd_v1", "bk-sdm-base", 579_384_964, 223_755_632_640, 261_496_995_840),
        ("sd_v1", "bk-sdm-small", 482_346_884, 217_727_959_040, 255_447_203_840),
        ("sd_v1", "bk-sdm-tiny", 323_384_964, 205_035_274_240, 242_754_519_040),
        ("sd_v2_base", "bk-sdm-base", 583_480_964, 224_071_024_640, 261_812_387_840),
        ("sd_v2_base", "bk-sdm-small", 485_787_524, 217_992_888_320, 255_712_133_120),
        ("sd_v2_base", "bk-sdm-tiny", 326_825_604, 205_300_203_520, 243_019_448_320),
    ],
)
def test_students_by_running_them(
    meta: Meta, family: str, name: str, params: int, macs_paper: int, macs: int
) -> None:
    unet = meta(family)
    inventory = Inventory.of(unet)
    with bypassed(unet, inventory.plan(preset(name, inventory))):
        whole = count(unet, unet_call(unet.config)).whole
    assert (whole.params, whole.macs_paper, whole.macs) == (params, macs_paper, macs)


@pytest.mark.parametrize(
    ("block", "params", "gmacs"),
    [
        ("down_blocks.0.attentions.1", 2_546_240, 19.366),
        ("up_blocks.2.attentions.0", 9_188_480, 9.907),
        ("up_blocks.1.attentions.2", 34_760_960, 8.758),
        ("mid_block.attentions.0", 34_760_960, 2.272),
        ("down_blocks.0.resnets.0", 2_255_040, 7.550),
        ("down_blocks.1.resnets.0", 6_558_080, 5.873),
        ("down_blocks.1.resnets.1", 8_196_480, 7.551),
        ("down_blocks.2.resnets.0", 24_584_960, 5.874),
        ("down_blocks.2.resnets.1", 31_138_560, 7.551),
        ("mid_block.resnets.1", 31_138_560, 1.889),
        ("up_blocks.0.resnets.2", 49_164_800, 3.043),
        ("up_blocks.1.resnets.1", 49_164_800, 12.165),
        ("up_blocks.1.resnets.2", 40_971_520, 10.068),
        ("up_blocks.2.resnets.0", 16_801_280, 16.359),
        ("up_blocks.2.resnets.1", 12_704_000, 12.164),
        ("up_blocks.2.resnets.2", 10_655_360, 10.067),
        ("up_blocks.3.resnets.0", 4_407_040, 16.358),
        ("up_blocks.3.resnets.2", 3_382_400, 12.164),
        ("down_blocks.0.downsamplers.0", 921_920, 0.944),
        ("down_blocks.2.downsamplers.0", 14_746_880, 0.944),
        ("up_blocks.0.upsamplers.0", 14_746_880, 3.775),
        ("up_blocks.2.upsamplers.0", 3_687_040, 15.099),
    ],
)
def test_blocks_of_sd_v1(sd_v1_counts: Any, block: str, params: int, gmacs: float) -> None:
    found = sd_v1_counts.modules[block]
    assert found.params == params
    assert round(found.macs / 1e9, 3) == gmacs


@pytest.fixture(scope="module")
def sd_v1_counts(meta: Meta) -> Any:
    unet = meta("sd_v1")
    return count(unet, unet_call(unet.config), rows_of(Inventory.of(unet)))


def test_text_encoders_and_decoder() -> None:
    for family, params, macs_paper in (
        ("sd_v1", 123_060_480, 6_545_882_112),
        ("sd_v2_base", 340_387_840, 22_299_160_576),
    ):
        encoder = skeleton(family).text_encoders["text_encoder"]
        ids = torch.zeros((1, 77), dtype=torch.long, device="meta")
        found = count(encoder, Call((ids,), {})).whole
        assert (found.params, found.macs_paper) == (params, macs_paper)
    vae = skeleton("sd_v1").vae
    assert vae is not None
    latents = torch.zeros((1, 4, 64, 64), device="meta")
    found = count(vae.decoder, Call((latents,), {})).whole
    assert (found.params, found.macs_paper) == (49_490_179, 1_240_079_532_032)


class _Three(nn.Module):
    """Holds a 4-channel input's copy across a wide middle: the peak is known by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(4, 16, 1, bias=False)
        self.narrow = nn.Conv2d(16, 4, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = x + 1
        out: torch.Tensor = self.narrow(self.wide(held)) + held
        return out


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_activation_peaks_by_hand(device: str) -> None:
    network = _Three().to(device)
    x = torch.zeros(2, 4, 8, 8, device=device)
    thin = 2 * 4 * 8 * 8 * 4  # bytes of one 4-channel tensor
    peaks = activation_peaks(network, Call((x,), {}), ["wide", "narrow"])
    assert peaks["wide"] == thin + 4 * thin
    assert peaks["narrow"] == thin + 4 * thin + thin
    assert peaks[""] == 6 * thin
    assert peaks["rest"] == 3 * thin  # the narrow output, what was held, and their sum
    if device == "meta":
        assert count(network, Call((x,), {})).whole.activation_bytes == 6 * thin


def test_activations_scale_with_the_batch_and_attention_keeps_no_scores(meta: Meta) -> None:
    unet = meta("sd_v1")
    one, two = (
        count(unet, unet_call(unet.config, batch_size=n)).whole.activation_bytes for n in (1, 2)
    )
    assert two / one == pytest.approx(2, rel=1e-4)  # but for the timestep table
    scores = 8 * 4096 * 4096 * 4
    assert one < scores / 3


def test_shapes_that_do_not_fit_are_refused(meta: Meta) -> None:
    unet = meta("sd_v1")
    call = unet_call(unet.config)
    wrong = Call((call.args[0][:, :3], *call.args[1:]), call.kwargs)
    with pytest.raises(ValueError, match=r"cannot be run on inputs \[\[1, 3, 64, 64\]"):
        count(unet, wrong)
