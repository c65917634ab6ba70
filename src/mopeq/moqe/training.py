"""Training a router: labels from held-out losses, cross-entropy and the balance loss of MoQE.

Labels are each variant's loss on what follows the prompt (or on the image): ``softmax(-loss / temperature)`` over the
variants, with the temperature in units of how far variants differ, or the least loss alone (MoQE's labels). The loss
is ``CE + alpha (1 + s) N sum_i P_i F_i``: P_i the mean probability of variant i, F_i the share of inputs sent to it
(Switch, arXiv 2101.03961, equations 4 to 6), s the relative standard deviation of F, and alpha falls linearly from
0.02 to 0 (arXiv 2508.09204). The losses are differences of hundredths, so what is learned is judged by the loss that
routing gives on inputs kept apart, and the best epoch is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from mopeq.errors import DataError, InputError, OutputError
from mopeq.progress import Track, silent

__all__ = ["Settings", "Trained", "balance", "fit", "soft_labels"]

Inputs = Callable[[Tensor], tuple[Tensor, ...]]
"""What a router is called with, for the inputs of these numbers."""
TRAINING = "training.safetensors"


@dataclass(frozen=True)
class Settings:
    """How a router is trained. ``temperature`` 0 takes the least loss as the label, as the paper does."""

    epochs: int = 40
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    temperature: float = 0.5
    alpha: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1 or min(self.temperature, self.alpha) < 0 or self.learning_rate <= 0:
            raise InputError(
                f"epochs {self.epochs}, batch size {self.batch_size}, temperature {self.temperature}, "
                f"alpha {self.alpha}, learning rate {self.learning_rate}; expected at least 1, 1, 0, 0, and above 0"
            )


@dataclass(frozen=True)
class Trained:
    """What training found on the inputs kept apart, in mean loss: of the router, the best variant alone, the oracle."""

    epoch: int
    epochs: int
    inputs: int
    validation_inputs: int
    routed: float
    best: float
    best_variant: str
    oracle: float
    random: float
    usage: tuple[float, ...]

    @property
    def sentence(self) -> str:
        """What that means, in words that are true of the numbers."""
        gain, room = self.best - self.routed, self.best - self.oracle
        if gain <= 0:
            return (
                f"on inputs kept apart, routing does not beat {self.best_variant} alone ({self.routed:.4f} against "
                f"{self.best:.4f}; an oracle would reach {self.oracle:.4f}): use that variant"
            )
        return (
            f"on inputs kept apart, routing has {self.routed:.4f} against {self.best:.4f} of {self.best_variant} "
            f"alone (the best epoch was chosen on them): {100 * gain / room:.0f} % of what an oracle would gain"
        )


def soft_labels(losses: Tensor, temperature: float) -> Tensor:
    """Targets (n, variants) from losses (n, variants): ``softmax(-loss / (temperature * spread))``.

    ``spread`` is the mean over inputs of the standard deviation over variants; temperature 0 is the argmin, one-hot.
    """
    if temperature == 0:
        return functional.one_hot(losses.argmin(1), losses.shape[1]).float()
    spread = losses.std(1).mean().clamp_min(1e-8)
    return (-losses / (temperature * spread)).softmax(1).float()


def balance(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Switch's balance loss ``N sum_i P_i F_i``, 1 where usage is even, and the relative deviation of F."""
    count = logits.shape[1]
    share = functional.one_hot(logits.argmax(1), count).float().mean(0)
    return count * (logits.softmax(1).mean(0) * share).sum(), share.std(correction=0) * count


def fit(
    router: nn.Module,
    inputs: Inputs,
    losses: Tensor,
    names: tuple[str, ...],
    settings: Settings,
    folder: Path,
    *,
    restart: bool = False,
    track: Track = silent,
) -> Trained:
    """Train ``router`` in place and leave it at its best epoch.

    losses: (n, variants), mean loss of every input with every variant. Every fifth input is kept apart. After every
    epoch everything is written to ``folder/training.safetensors``; called again with the same request it goes on from
    there, to the same result as without the interruption. Raises :class:`OutputError` where another training waits
    there, unless ``restart``.
    """
    apart = torch.arange(len(losses)) % 5 == 4
    learning, judging = (~apart).nonzero().flatten(), apart.nonzero().flatten()
    if len(judging) < 2:
        raise DataError(f"{len(losses)} inputs to learn from; expected at least 10; give more data")
    targets = soft_labels(losses, settings.temperature)
    optimizer = torch.optim.AdamW(router.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    request = _request(router, losses, settings)
    file = folder / TRAINING
    if restart:
        file.unlink(missing_ok=True)
    state = _resumed(file, request, router, optimizer)
    steps_in_epoch = -(-len(learning) // settings.batch_size)
    total = settings.epochs * steps_in_epoch
    for epoch in track(range(state.epoch, settings.epochs), "train the router", settings.epochs - state.epoch):
        router.train()
        order = torch.randperm(len(learning), generator=torch.Generator().manual_seed(settings.seed * 100_003 + epoch))
        for number, batch in enumerate(torch.split(learning[order], settings.batch_size)):
            logits = router(*inputs(batch))
            even, deviation = balance(logits)
            left = 1 - (epoch * steps_in_epoch + number) / total
            loss = functional.cross_entropy(logits, targets[batch])
            loss = loss + settings.alpha * left * (1 + deviation) * even
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(router.parameters(), 1.0)
            optimizer.step()
        routed = _routed(router, inputs, losses, judging, settings.batch_size)
        state = state.after(epoch + 1, routed, router)
        _write(file, request, state, router, optimizer)
    router.load_state_dict(state.best)
    choice = choose(router, inputs, judging, settings.batch_size)
    means = losses[judging].mean(0)
    best = int(means.argmin())
    return Trained(
        epoch=state.best_epoch,
        epochs=settings.epochs,
        inputs=len(learning),
        validation_inputs=len(judging),
        routed=float(losses[judging, choice].mean()),
        best=float(means[best]),
        best_variant=names[best],
        oracle=float(losses[judging].amin(1).mean()),
        random=float(means.mean()),
        usage=tuple((choice == i).float().mean().item() for i in range(len(names))),
    )


def choose(router: nn.Module, inputs: Inputs, numbers: Tensor, batch_size: int) -> Tensor:
    """The variants, int64 (n,), that a router chooses for the inputs of these numbers."""
    router.eval()
    with torch.no_grad():
        return torch.cat([router(*inputs(part)).argmax(1) for part in torch.split(numbers, batch_size)])


def finish(folder: Path) -> None:
    """Forget the training that is done."""
    (folder / TRAINING).unlink(missing_ok=True)


def _routed(router: nn.Module, inputs: Inputs, losses: Tensor, numbers: Tensor, batch_size: int) -> float:
    return float(losses[numbers, choose(router, inputs, numbers, batch_size)].mean())


@dataclass(frozen=True)
class _State:
    """Where a training stands."""

    epoch: int
    best_epoch: int
    best_loss: float
    best: dict[str, Tensor]

    def after(self, epoch: int, routed: float, router: nn.Module) -> _State:
        if self.best and routed >= self.best_loss:
            return _State(epoch, self.best_epoch, self.best_loss, self.best)
        return _State(epoch, epoch, routed, {k: t.clone() for k, t in router.state_dict().items()})


def _request(router: nn.Module, losses: Tensor, settings: Settings) -> str:
    """A hash of everything that the result depends on."""
    sizes = {key: list(tensor.shape) for key, tensor in router.state_dict().items()}
    text = json.dumps([asdict(settings), sizes, list(losses.shape)])
    return hashlib.sha256(text.encode() + losses.double().numpy().tobytes()).hexdigest()[:16]


def _write(file: Path, request: str, state: _State, router: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tensors = {f"model.{k}": t for k, t in router.state_dict().items()} | {
        f"best.{k}": t for k, t in state.best.items()
    }
    for number, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in slots.items()}
    metadata = {
        "request": request, "epoch": str(state.epoch), "best_epoch": str(state.best_epoch),
        "best_loss": repr(state.best_loss),
    }  # fmt: skip
    file.parent.mkdir(exist_ok=True)
    beside = file.with_name(f".{file.name}.partial")
    save_file({k: t.clone().contiguous() for k, t in tensors.items()}, beside, metadata=metadata)
    beside.replace(file)


def _resumed(file: Path, request: str, router: nn.Module, optimizer: torch.optim.Optimizer) -> _State:
    """Where an interrupted training stands, its weights and optimizer put back; or the start."""
    if not file.is_file():
        return _State(0, 0, float("inf"), {})
    try:
        with safe_open(file, "pt") as stored:
            about = stored.metadata()
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as error:
        raise OutputError(
            f"{file} of an interrupted training is damaged ({error}); start anew with --restart"
        ) from error
    if about.get("request") != request:
        raise OutputError(
            f"{file} is of an interrupted training with other text or settings; give those to go on, or --restart"
        )

    def part(prefix: str) -> dict[str, Any]:
        return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}

    router.load_state_dict(part("model."))
    slots: dict[int, dict[str, Tensor]] = {}
    for key, tensor in part("optimizer.").items():
        number, _, name = key.partition(".")
        slots.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
    return _State(int(about["epoch"]), int(about["best_epoch"]), float(about["best_loss"]), part("best."))
