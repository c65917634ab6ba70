"""Routers, their labels and losses, and training: seeded, resumable, and able to learn."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mopeq.errors import DataError, OutputError
from mopeq.moqe.router import SHARE, RouterShape, fitting_shape, make_router, parameters_of
from mopeq.moqe.training import TRAINING, Settings, Trained, balance, fit, soft_labels
from mopeq.progress import silent

SHAPE = RouterShape("language", inputs=24, variants=3, width=16, tokens=12)
NAMES = ("a", "b", "c")


def test_padding_changes_nothing() -> None:
    router = make_router(SHAPE).eval()
    x = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(1))
    alone = router(x, torch.ones(1, 5, dtype=torch.bool))
    padded = torch.cat([x, torch.full((1, 7, 24), 9.0)], 1)
    mask = torch.arange(12)[None] < 5
    torch.testing.assert_close(router(padded, mask), alone)


def test_sizes() -> None:
    for kind, inputs, parameters in (("language", 2048, 7e9), ("language", 256, 24.7e6), ("vision", 3, 25e6)):
        shape = fitting_shape(kind, inputs, 4, int(parameters))
        assert parameters_of(make_router(shape)) <= SHARE * parameters
    assert fitting_shape("language", 2048, 4, int(7e9)).width == 256
    images = make_router(fitting_shape("vision", 3, 2, int(25e6)))
    assert images(torch.randn(2, 3, 224, 160)).shape == (2, 2)


def test_soft_labels() -> None:
    losses = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.4, 0.9]], dtype=torch.float64)
    assert soft_labels(losses, 0).tolist() == [[1, 0, 0], [0, 1, 0]], "MoQE's labels: the least loss"
    soft = soft_labels(losses, 0.5)
    torch.testing.assert_close(soft.sum(1), torch.ones(2))
    torch.testing.assert_close(soft, soft_labels(losses + 7, 0.5), msg="what all variants lose says nothing")
    torch.testing.assert_close(soft, soft_labels(losses * 9, 0.5), msg="the temperature is in units of the spread")
    assert torch.equal(soft.argmax(1), losses.argmin(1))


def test_balance_is_switch_s() -> None:
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(2))
    found, deviation = balance(logits)
    probabilities = logits.softmax(1).tolist()
    share, mean = [0.0] * 3, [0.0] * 3
    for row in probabilities:
        share[row.index(max(row))] += 1 / 40
        mean = [m + p / 40 for m, p in zip(mean, row, strict=True)]
    assert found.item() == pytest.approx(3 * sum(p * f for p, f in zip(mean, share, strict=True)), rel=1e-5)
    assert deviation.item() == pytest.approx((sum((f - 1 / 3) ** 2 for f in share) / 3) ** 0.5 * 3, rel=1e-5)
    even = torch.eye(3).repeat(5, 1) * 50
    assert [value.item() for value in balance(even)] == pytest.approx([1, 0], abs=1e-5)
    assert balance(torch.tensor([[50.0, 0, 0]]))[0].item() == pytest.approx(3)


def problem(count: int = 120) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of three kinds, each of which another variant suits, and noise in every loss."""
    source = torch.Generator().manual_seed(3)
    kinds = torch.arange(count) % 3
    x = torch.randn(count, 6, 24, generator=source)
    x[:, 2, :3] += 4 * functional.one_hot(kinds, 3)
    losses = 2 + 0.2 * (1 - functional.one_hot(kinds, 3)) + 0.05 * torch.randn(count, 3, generator=source)
    return x, losses.double(), kinds


def trained(
    folder: Path, settings: Settings, track: Any = silent, restart: bool = False
) -> tuple[Trained, dict[str, Tensor]]:
    x, losses, _ = problem()
    router = make_router(SHAPE, settings.seed)

    def inputs(numbers: Tensor) -> tuple[Tensor, ...]:
        return x[numbers], torch.ones(len(numbers), 6, dtype=torch.bool)

    found = fit(router, inputs, losses, NAMES, settings, folder, restart=restart, track=track)
    return found, router.state_dict()


def stop_after(epochs: int) -> Any:
    def track(items: Iterable[Any], description: str, total: int | None = None) -> Iterable[Any]:
        for number, item in enumerate(items):
            if number == epochs:
                raise KeyboardInterrupt
            yield item

    return track


SETTINGS = Settings(epochs=12, batch_size=16, learning_rate=3e-3)


def test_it_learns(tmp_path: Path) -> None:
    found, _ = trained(tmp_path, SETTINGS)
    assert found.oracle < found.routed < found.best < found.random + 0.05
    assert found.best - found.routed > 0.8 * (found.best - found.oracle)
    assert max(found.usage) < 0.5, "every variant is used"
    assert "% of what an oracle would gain" in found.sentence


def test_chance_is_called_chance(tmp_path: Path) -> None:
    losses = 2 + torch.tensor([0.0, 0.3, 0.3], dtype=torch.float64).repeat(60, 1)
    x = torch.randn(60, 6, 24)
    router = make_router(SHAPE)
    found = fit(router, lambda n: (x[n], torch.ones(len(n), 6, dtype=torch.bool)), losses, NAMES, SETTINGS, tmp_path)
    assert "does not beat a alone" in found.sentence


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_the_labels_reach_every_weight(temperature: float) -> None:
    """The published code has a softmax over the one chosen logit, whose gradient is zero."""
    x, losses, _ = problem(12)
    router = make_router(SHAPE)
    mask = torch.ones(12, 6, dtype=torch.bool)
    functional.cross_entropy(router(x, mask), soft_labels(losses, temperature)).backward()
    gradients = {name: p.grad for name, p in router.named_parameters() if name != "score.bias"}  # softmax ignores it
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())


def test_a_seed_gives_one_router_however_often_it_is_interrupted(tmp_path: Path) -> None:
    whole, want = trained(tmp_path / "whole", SETTINGS)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "parts", SETTINGS, stop_after(4))
    parts, got = trained(tmp_path / "parts", SETTINGS)
    assert parts == whole
    assert all(torch.equal(want[key], got[key]) for key in want)
    other, _ = trained(tmp_path / "other", Settings(epochs=12, batch_size=16, learning_rate=3e-3, seed=1))
    assert other != whole


def test_another_training_is_not_continued(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, SETTINGS, stop_after(2))
    other = Settings(epochs=2, batch_size=16)
    with pytest.raises(OutputError, match="other text or settings"):
        trained(tmp_path, other)
    trained(tmp_path, other, restart=True)
    (tmp_path / TRAINING).write_bytes(b"no")
    with pytest.raises(OutputError, match="damaged"):
        trained(tmp_path, other)


def test_too_little_to_learn_from(tmp_path: Path) -> None:
    router = make_router(SHAPE)
    with pytest.raises(DataError, match="expected at least 10"):
        fit(router, lambda n: (), torch.rand(5, 3).double(), NAMES, SETTINGS, tmp_path)
