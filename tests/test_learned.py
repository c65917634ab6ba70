"""Roundings of whole experts: against a plain version, and in checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import killing
import mopeq.pack as pack_module
from mopeq.analyze import Routed
from mopeq.checkpoint import writer as writing
from mopeq.errors import InputError, OutputError
from mopeq.learned import TOKENS, learned
from mopeq.measure import observed, open_model, split_texts
from mopeq.pack import pack_model
from mopeq.precision import FULL, GROUPS, Precision
from mopeq.qtensor import dequantize
from mopeq.quantize import quantize
from mopeq.quantizers import rtn, signround
from test_pack import MIXED, same, stored

Make = Callable[..., Path]
UP, DOWN = Precision(2, 32), Precision(3, 64)


class Experts(nn.Module):
    """What is asked of an experts module."""

    act_fn = nn.SiLU()


def layer(tokens: int, share: float = 0.5) -> tuple[Routed, dict[str, Tensor]]:
    """A layer of two experts, 64 wide, 64 within; the first gets its share of the tokens, some twice."""
    draw = torch.Generator().manual_seed(5)
    hidden = torch.randn(tokens, 64, generator=draw) @ (torch.eye(64) + 0.3 * torch.randn(64, 64, generator=draw))
    index = (torch.rand(tokens, 2, generator=draw) > share).long()
    seen = Routed(hidden, index, torch.rand(tokens, 2, generator=draw), False)
    rows = {"gate_up": 128, "down": 64}
    return seen, {group: torch.randn(n, 64, generator=draw) / 8 for group, n in rows.items()}


def output(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return (gate * gate.sigmoid() * up) @ down.T


def tokens_of(seen: Routed, expert: int) -> tuple[Tensor, Tensor]:
    """Rows and weights in the order of the tokens."""
    found = [
        (t, w)
        for t, row in enumerate(seen.index.tolist())
        for e, w in zip(row, seen.weights[t], strict=True)
        if e == expert
    ]
    return torch.tensor([t for t, _ in found]), torch.stack([w for _, w in found])[:, None]


def error(seen: Routed, expert: int, weights: dict[str, Tensor], made: dict[str, Tensor]) -> float:
    rows, c = tokens_of(seen, expert)
    x = seen.hidden[rows]
    return float((c * (output(x, **made) - output(x, **weights))).square().sum())


def plain(
    seen: Routed, expert: int, weights: dict[str, Tensor], precisions: dict[str, Precision], turns: int
) -> dict[str, Tensor]:
    """The same, from the formulas of the paper: the last of the iterates, whatever its loss."""
    rows, c = tokens_of(seen, expert)
    draw = torch.Generator().manual_seed(expert)
    free = {
        g: [
            torch.zeros_like(w),
            torch.ones(len(w), w.shape[1] // precisions[g].group_size),
            torch.ones(len(w), w.shape[1] // precisions[g].group_size),
        ]
        for g, w in weights.items()
    }

    def straight(x: Tensor, through: Callable[[Tensor], Tensor]) -> Tensor:
        return x + (through(x) - x).detach()

    def made() -> dict[str, Tensor]:
        found = {}
        for g, w in weights.items():
            size, top = precisions[g].group_size, precisions[g].levels - 1
            (v, a, b), columns = free[g], []
            for k in range(w.shape[1] // size):
                part = w[:, k * size : (k + 1) * size]
                low, high = a[:, k] * part.min(1).values.clamp(max=0), b[:, k] * part.max(1).values.clamp(min=0)
                s = straight((high - low) / top, lambda x: x.half().float())[:, None]
                z = straight(-low[:, None] / s, torch.round).clamp(0, top)
                q = (straight(part / s + v[:, k * size : (k + 1) * size], torch.round) + z).clamp(0, top)
                columns.append(s * (q - z))
            found[g] = torch.cat(columns, 1)
        return found

    for turn in range(turns):
        flat = [p.requires_grad_() for group in free.values() for p in group]
        some = torch.randint(len(rows), (min(TOKENS, len(rows)),), generator=draw)
        x = seen.hidden[rows[some]]
        loss = (c[some] * (output(x, **made()) - output(x, **weights))).square().sum()
        slopes = torch.autograd.grad(loss, flat)
        rate = (1 - turn / turns) / turns
        moved = [(p.detach() - rate * slope.sign()) for p, slope in zip(flat, slopes, strict=True)]
        for i, group in enumerate(free.values()):
            v, a, b = moved[3 * i : 3 * i + 3]
            group[:] = v.clamp(-0.5, 0.5), a.clamp(0, 1), b.clamp(0, 1)
    return {g: w.detach() for g, w in made().items()}


def test_roundings_are_those_of_the_plain_version() -> None:
    seen, weights = layer(700)
    precisions = {"gate_up": UP, "down": DOWN}
    codes = learned(seen, Experts(), 0, weights, precisions, iterations=30)
    expected = plain(seen, 0, weights, precisions, 30)
    for group in GROUPS:
        assert codes[group].precision == precisions[group]
        equal = (dequantize(codes[group])[0] - expected[group]).abs() < 1e-6
        assert float(equal.double().mean()) > 0.995  # where a gradient is all but zero its sign may differ


def test_an_experts_output_loses_less_than_by_matrices() -> None:
    seen, weights = layer(1200)
    rows, c = tokens_of(seen, 0)
    x = c * seen.hidden[rows]
    gate, up = (seen.hidden[rows] @ weights["gate_up"].T).chunk(2, -1)
    inner = c * gate * gate.sigmoid() * up
    found = {}
    for name, h in (("gate_up", x), ("down", inner)):
        found[name] = dequantize(signround(weights[name][None], Precision(2, 64), (h.T @ h)[None], iterations=100))[0]
    by_matrices = error(seen, 0, weights, found)
    nearest = error(seen, 0, weights, {g: dequantize(rtn(w[None], Precision(2, 64)))[0] for g, w in weights.items()})
    codes = learned(seen, Experts(), 0, weights, dict.fromkeys(GROUPS, Precision(2, 64)), iterations=100)
    together = error(seen, 0, weights, {g: dequantize(codes[g])[0] for g in GROUPS})
    assert together < 0.95 * by_matrices < 0.95 * 0.8 * nearest


def test_sixteen_bits_few_tokens_and_none() -> None:
    seen, weights = layer(400, share=0.02)
    wanted = {"gate_up": UP, "down": FULL}
    codes = learned(seen, Experts(), 0, weights, wanted, iterations=10)
    assert list(codes) == ["gate_up"]
    assert learned(seen, Experts(), 0, weights, dict.fromkeys(GROUPS, FULL), iterations=10) == {}
    filled = learned(seen, Experts(), 0, weights, wanted, minimum=200, iterations=10)
    again = learned(seen, Experts(), 0, weights, wanted, minimum=200, iterations=10)
    assert torch.equal(filled["gate_up"].codes, again["gate_up"].codes)
    assert not torch.equal(filled["gate_up"].codes, codes["gate_up"].codes)
    none = Routed(seen.hidden, torch.full_like(seen.index, -1), seen.weights, False)
    nearest = learned(none, Experts(), 0, weights, wanted, minimum=200, iterations=10)["gate_up"]
    assert torch.equal(nearest.codes, rtn(weights["gate_up"][None], UP).codes)


def test_weights_of_tokens_count() -> None:
    seen, weights = layer(300)
    some = torch.arange(300) < 150
    wanted = dict.fromkeys(GROUPS, UP)
    weighted = Routed(seen.hidden, seen.index, seen.weights, False, token_weight=some.float())
    codes = [learned(s, Experts(), 0, weights, wanted, iterations=40) for s in (seen, weighted)]
    part = seen.only(some)
    plainly, favoured = (error(part, 0, weights, {g: dequantize(c[g])[0] for g in GROUPS}) for c in codes)
    assert favoured < plainly


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_module, "learned", partial(learned, iterations=4))
    monkeypatch.setitem(pack_module.QUANTIZERS, "signround", partial(signround, iterations=4))


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
def test_streaming_resuming_and_packing_give_the_same(
    family: str, quickly: None, tiny_model: Make, tmp_path: Path
) -> None:
    folder, calibration = tiny_model(family), killing.text(tmp_path)
    how = {"budget": "3.2bpw", "options": MIXED, "calibration": calibration, "method": "signround", "evaluated": False}
    made = quantize(folder, tmp_path / "a", **how)
    whole = observed(open_model(folder), calibration, texts=split_texts(calibration, folder)[0], gradients=False)
    again = pack_model(whole, made.precisions, tmp_path / "b", method="signround")
    assert len(made.precisions.histogram()) > 1
    assert same(stored(tmp_path / "a"), stored(tmp_path / "b"))
    assert made.fallbacks == again.fallbacks
    real, calls = writing._write, 0

    def full(path: Path, *parts: object) -> object:
        nonlocal calls
        calls += path.name.startswith("shard")
        if calls == 2:
            raise OSError(28, "no space")
        return real(path, *parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "_write", full)
        with pytest.raises(OutputError):
            quantize(folder, tmp_path / "c", **how)
    quantize(folder, tmp_path / "c", resume=True, **how)
    assert same(stored(tmp_path / "a"), stored(tmp_path / "c"))


def test_codebooks_are_refused(tiny_model: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="which signround cannot make"):
        quantize(tiny_model("olmoe"), tmp_path / "x", uniform=Precision(2, 64, codebook=True), method="signround")
