import shutil
from pathlib import Path

import pytest
import torch
from measuring import Make, case

import tiny
from mopeq.adapters import describe
from mopeq.analyze.weight_norm import hutchinson_norm_trace, inverse_norm, norm_trace
from mopeq.errors import ModelError
from mopeq.source import open_source, read_matrix


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_closed_form_is_the_trace_of_the_exact_hessian() -> None:
    w = matrix(5, 8)
    hessian = torch.autograd.functional.hessian(torch.linalg.norm, w).reshape(40, 40)
    assert norm_trace(w, normalised=False) == pytest.approx(39 / float(w.norm()), rel=1e-12)
    assert norm_trace(w, normalised=False) == pytest.approx(float(hessian.trace()), rel=1e-12)
    assert norm_trace(w) == pytest.approx(float(hessian.trace()) / 40, rel=1e-12)


@pytest.mark.parametrize("kind", ["unit", "rademacher", "gaussian"])
def test_sampling_agrees_with_the_closed_form(kind: str) -> None:
    w = matrix(24, 16, seed=1)
    mean, error = hutchinson_norm_trace(w, 200, seed=2, kind=kind)
    assert error > 0
    assert abs(mean - norm_trace(w, normalised=kind == "unit")) < 4 * error
    assert hutchinson_norm_trace(w, 200, seed=2, kind=kind) == (mean, error)


def test_at_the_size_of_an_expert_sampling_adds_nothing() -> None:
    w = matrix(1280, 896)
    mean, error = hutchinson_norm_trace(w.float(), 4)
    assert mean == pytest.approx(1 / float(w.norm()), rel=1e-4)
    assert error < 1e-5 * mean
    assert norm_trace(w, normalised=False) == pytest.approx(53526, rel=2e-3)  # weights of standard deviation 0.02


def test_probes_are_checked() -> None:
    for probes, kind in ((1, "unit"), (8, "cauchy")):
        with pytest.raises(ValueError, match=f"{probes} probes of kind '{kind}'"):
            hutchinson_norm_trace(matrix(4, 4), probes, kind=kind)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "granitemoe"])
def test_score_of_every_expert(tiny_model: Make, family: str) -> None:
    _, source, spec = case(tiny_model, family)
    found = inverse_norm(source, spec)
    for expert in spec.experts():
        matrices = [read_matrix(source, ref).double() for ref in (expert.gate, expert.up, expert.down)]
        wanted = sum(1 / float(m.square().sum().sqrt()) for m in matrices)
        assert found[expert.id.layer][expert.id.expert] == pytest.approx(wanted, rel=1e-9)


def test_a_matrix_of_zeros_is_named(tiny_model: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("olmoe"), tmp_path / "model")
    key = "model.layers.1.mlp.experts.5.up_proj.weight"
    tiny.rewrite(folder, {key: torch.zeros_like(tiny.tensors(folder)[key])})
    source = open_source(folder)
    with pytest.raises(ModelError, match=r"expert 1\.5 has a matrix of zeros"):
        inverse_norm(source, describe(source))
