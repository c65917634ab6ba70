"""A small ResNet trained on the digits of scikit-learn, and image folders of them: for tests and benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional
from transformers import ResNetConfig, ResNetForImageClassification

DOMAINS = ("plain", "negative", "noisy")
EDGE = 16


def digits() -> tuple[Tensor, Tensor]:
    """Images float32 (1797, 16, 16) of 0 to 255, and their classes, in an order that mixes writers."""
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    images = torch.tensor(bunch.images[order], dtype=torch.float32) * (255 / 16)
    images = functional.interpolate(images[:, None], (EDGE, EDGE), mode="bilinear")[:, 0]
    return images, torch.tensor(bunch.target[order])


def shown(images: Tensor, domain: str, seed: int = 0) -> Tensor:
    """The images as one domain has them."""
    if domain == "negative":
        return 255 - images
    if domain == "noisy":
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        return (images + 70 * noise).clamp(0, 255)
    return images


def save_digits(folder: Path, images: Tensor, labels: Tensor, prefix: str = "") -> Path:
    """``folder/3/0001.png`` and so on, as ImageNet is kept."""
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        file = folder / str(label) / f"{prefix}{number:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.round().to(torch.uint8).numpy()).save(file)
    return folder


def train_resnet(
    folder: Path, images: Tensor, labels: Tensor, *, epochs: int, sizes: Sequence[int] = (16, 32, 64), seed: int = 0
) -> Path:
    """A ResNet trained on all domains of the images, saved as the hub stores one."""
    config = ResNetConfig(
        num_channels=1, embedding_size=sizes[0], hidden_sizes=list(sizes), depths=[1] * len(sizes), layer_type="basic",
        num_labels=10,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = ResNetForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    total = epochs * -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=total)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            forms = torch.stack([shown(images[batch], domain, int(torch.randint(2**31, ()))) for domain in DOMAINS])
            which = torch.randint(len(DOMAINS), (len(batch),))
            pixels = forms[which, torch.arange(len(batch))] / 255 - 0.5
            loss = functional.cross_entropy(model(pixel_values=pixels[:, None]).logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval().save_pretrained(folder)
    settings = {"size": {"height": EDGE, "width": EDGE}, "image_mean": [0.5], "image_std": [1.0], "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder
