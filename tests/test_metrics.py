"""Metrics against torch-fidelity's numbers, laws of the bootstrap, and the networks that judge.

Numbers named golden were computed by torch-fidelity 0.3.0 on the same inputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics.functional.image.lpips as reference_lpips
from torch import nn

from bkprune.inception import Inception, resize_like_tensorflow
from bkprune.lpips import Lpips
from bkprune.metrics import (
    METRICS,
    Frechet,
    InceptionScore,
    Kernel,
    Mean,
    Measured,
    Moments,
    bootstrap_weights,
)

GOLDEN = {
    64: (3.135348806984723, 0.032236513919864804, 9.868008673813998),
    2048: (1765.9004029609205, 0.0296295409424857, 25.238459863546343),
}


def features(width: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(width)
    return rng.normal(size=(1200, width)), rng.normal(0.1, 1.1, size=(1300, width))


@pytest.mark.filterwarnings("ignore:a Frechet distance")
@pytest.mark.parametrize("width", [64, 2048])
def test_distances_and_scores_are_torch_fidelitys(width: int) -> None:
    a, b = features(width)
    fid, kid, inception_score = GOLDEN[width]
    assert Frechet(a, Moments.of(b)).value == pytest.approx(fid, rel=1e-8)
    assert Kernel(a, b).value == pytest.approx(kid, rel=1e-8)
    assert InceptionScore(3 * a).value == pytest.approx(inception_score, rel=1e-10)


def test_few_pictures_warn() -> None:
    a, b = features(64)
    with pytest.warns(UserWarning, match="100 samples in 64 dimensions is biased upwards"):
        Frechet(a[:100], Moments.of(b))


def test_equal_features_are_no_distance_apart() -> None:
    a, _ = features(64)
    assert Frechet(a, Moments.of(a)).value == pytest.approx(0, abs=1e-9)


def test_weights_are_repetitions() -> None:
    a, b = features(64)
    a = a[:300]
    weights = np.random.default_rng(0).multinomial(300, np.full(300, 1 / 300)).astype(float)
    repeated = np.repeat(a, weights.astype(int), axis=0)
    ours, theirs = Moments.of(a, weights), Moments.of(repeated)
    np.testing.assert_allclose(ours.mean, theirs.mean, atol=1e-12)
    np.testing.assert_allclose(ours.cov, theirs.cov, atol=1e-12)
    reference = Moments.of(b)
    assert Frechet(a, reference).resampled(weights) == pytest.approx(
        Frechet(repeated, reference).value, rel=1e-9
    )
    values = a[:, 0]
    assert Mean(values).resampled(weights) == pytest.approx(repeated[:, 0].mean())


@pytest.mark.parametrize("kind", [Frechet, Kernel, Mean])
def test_equal_weights_change_nothing(kind: Any) -> None:
    a, b = features(64)
    against = {Frechet: (a, Moments.of(b)), Kernel: (a, b), Mean: (a[:, 0],)}
    estimate = kind(*against[kind])
    assert estimate.resampled(np.ones(len(a))) == pytest.approx(estimate.value, rel=1e-9)


def test_the_kernel_distance_moves_along_its_influence() -> None:
    """First order: dropping a few pictures moves it as measuring the rest does."""
    a, b = features(64)
    a[:30] += 0.5
    weights = np.ones(len(a))
    weights[:30] = 0
    predicted = Kernel(a, b).resampled(weights) - Kernel(a, b).value
    measured = Kernel(a[30:], b).value - Kernel(a, b).value
    assert abs(predicted) > 1e-3
    assert predicted == pytest.approx(measured, rel=0.15)


def test_the_bootstrap_knows_the_error_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(size=2000)
    measured = Measured.of(Mean(values), np.arange(2000))
    assert measured.stderr == pytest.approx(2000**-0.5, rel=0.15)


def test_pictures_of_one_prompt_are_drawn_together() -> None:
    """Four equal pictures a prompt say no more than one."""
    values = np.random.default_rng(0).normal(size=500)
    alone = Measured.of(Mean(values), np.arange(500))
    repeated = Measured.of(Mean(np.repeat(values, 4)), np.repeat(np.arange(500), 4))
    assert repeated.stderr == pytest.approx(alone.stderr, rel=0.1)
    naive = Measured.of(Mean(np.repeat(values, 4)), np.arange(2000))
    assert naive.stderr < 0.6 * alone.stderr


def test_paired_differences_cancel_what_both_find_hard() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(size=400)
    groups = np.arange(400)
    a = Measured.of(Mean(hard + 0.1), groups)
    b = Measured.of(Mean(hard), groups)
    apart, stderr = a.minus(b)
    assert apart == pytest.approx(0.1)
    assert stderr < 1e-9 < b.stderr


def test_resamples_keep_their_number_of_groups() -> None:
    groups = np.array([0, 0, 1, 2, 2, 2])
    weights = np.stack(list(bootstrap_weights(groups, 50)))
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 0] + weights[:, 2] + weights[:, 3] == 3).all()


def test_every_metric_has_a_direction() -> None:
    assert all(m.better in ("lower", "higher") and m.words for m in METRICS.values())


# --- networks --------------------------------------------------------------------------------


def made_up(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a healthy scale that depend on their names alone."""
    out = {}
    for name, tensor in state.items():
        if tensor.dtype == torch.int64:
            out[name] = tensor
            continue
        values = torch.randn(
            tensor.shape, generator=torch.Generator().manual_seed(sum(map(ord, name)))
        )
        if name.endswith("running_var"):
            values = values.abs() + 0.5
        elif name.endswith("bn.weight"):
            values = 1 + 0.1 * values
        else:
            values *= (2 / values[0].numel()) ** 0.5 if values.ndim > 1 else 0.1
        out[name] = values
    return out


def test_inception_is_torch_fidelitys(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(made_up(Inception().state_dict()), path)
    network = Inception.load(path)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (3, 3, 64, 48), dtype=torch.uint8, generator=generator)
    found, logits = network(pictures)
    assert found.shape == (3, 2048)
    assert logits.shape == (3, 1008)
    assert float(found.double().mean()) == pytest.approx(0.25813222, rel=1e-5)
    assert float(found.double().std()) == pytest.approx(0.348137836, rel=1e-5)
    assert float(logits.double().mean()) == pytest.approx(-0.0230202014, rel=1e-4)
    assert float(logits.double().std()) == pytest.approx(0.632397132, rel=1e-5)
    torch.testing.assert_close(
        logits[1, :3], torch.tensor([0.3909, -0.0283, 0.1219]), rtol=0, atol=1e-4
    )


def test_resizing_as_tensorflow_one_did() -> None:
    """Output pixel i reads input coordinate i * n / size, and the last one stays."""
    row = torch.tensor([0.0, 10.0, 20.0, 30.0]).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    out = resize_like_tensorflow(row, 8)[0, 0, 0]
    torch.testing.assert_close(out, torch.tensor([0.0, 5, 10, 15, 20, 25, 30, 30]))


def test_inception_weights_are_named_where_missing(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"weights-inception-2015-12-05-6726825d\.pth is wanted, at https"
    ):
        Inception.load(tmp_path / "none.pth")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not the weights weights-inception"):
        Inception.load(tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="not the weights weights-inception"):
        Inception.load(tmp_path / "text.pth")


def test_lpips_is_torchmetrics_with_the_same_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "alexnet.pth"
    backbone = Lpips().features
    state = {f"features.{k}": v for k, v in made_up(backbone.state_dict()).items()}
    torch.save({**state, "classifier.1.weight": torch.zeros(2)}, path)
    ours = Lpips.load(path)

    def same_backbone(net: str, pretrained: bool = False) -> nn.Module:
        return Lpips.load(path).features

    monkeypatch.setattr(reference_lpips, "_get_tv_model_features", same_backbone)
    theirs = reference_lpips._LPIPS(pretrained=True, net="alex", pnet_rand=True).eval()
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(3, 3, 64, 64, generator=generator) * 2 - 1 for _ in range(2))
    found = ours(a, b)
    assert found.min() > 0.01
    torch.testing.assert_close(found, theirs(a, b).flatten(), rtol=1e-5, atol=1e-6)
    assert ours(a, a).abs().max() == 0
    with pytest.raises(ValueError, match=r"alexnet-owt-7be5be79\.pth"):
        Lpips.load(tmp_path / "none.pth")
