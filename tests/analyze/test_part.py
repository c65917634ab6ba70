"""Costs on a part of the text: which part, what it stands for, and what stays exact."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from measuring import Case, Make, batches, case
from torch import Tensor

from mopeq.analyze import layer_metrics, observe
from mopeq.analyze.observe import Routed
from mopeq.analyze.part import LEAST, measured_batches, observed_in_part, parted, standing_for
from mopeq.errors import DataError
from mopeq.measure import Calibration, calibrated, measure, measure_prepared, observed, open_model
from mopeq.precision import parse_precision

COSTS = ("output_error", "fisher_error")
OPTIONS = tuple(map(parse_precision, ("2g32", "4g32")))


def test_batches_are_spread_evenly_and_have_their_share() -> None:
    data = batches(*[(2, 8)] * 8)
    assert measured_batches(data, 1.0, 0) is None
    assert measured_batches(data, 0.25, 0) == (2, 6)
    assert measured_batches(data, 0.26, 0) == (1, 4, 6)
    assert measured_batches(data, 0.01, 0) == (4,)
    assert measured_batches(data, 0.01, 33) == (1, 4, 6), "never fewer tokens than the least"
    assert measured_batches(data, 0.01) is None, "which is more than there are here"
    assert measured_batches([], 0.5) is None
    own, others = parted(data, (2, 6))
    assert [id(b) for b in own] == [id(data[2]), id(data[6])]
    assert len(others) == 6


def routed(index: list[list[int]], measured: list[bool], **fields: Tensor) -> Routed:
    """Tokens of one layer, whose inputs are their numbers, with gradients of those measured."""
    count = len(index)
    hidden = torch.arange(count)[:, None] + torch.zeros(count, 2)
    weights = 0.1 * (1 + torch.arange(count))[:, None] + torch.zeros(count, len(index[0]))
    marks = torch.tensor(measured)
    return Routed(hidden, torch.tensor(index), weights, False, gradient=2 * hidden[marks] + 1, measured=marks, **fields)


def test_an_expert_with_few_measured_tokens_gets_more_of_its_own() -> None:
    """Of experts 0 to 3: enough, one of many, none of three, and no token at all."""
    index = [[0, 1], [0, -1], *[[0, 1]] * 6, [2, 1], [2, -1], [2, -1]]
    measured = [True, True, *[False] * 9]
    seen = routed(index, measured, vision=torch.arange(11) > 3)
    part, factors = standing_for(seen, 4, least=2)
    assert part.hidden[:, 0].tolist() == [0, 1, 2, 8, 9], "the measured, then others evenly spread over each expert's"
    assert part.vision is not None
    assert part.vision.tolist() == [False, False, False, True, True]
    assert part.gradient is not None
    assert part.gradient[:2, 0].tolist() == [1, 3]
    assert torch.allclose(part.gradient[2:], torch.tensor(5.0).sqrt()), "the mean of 1 and 9, its root"

    squares = (0.1 * (1 + torch.arange(11))).square()
    for expert, rows in ((0, range(8)), (1, [0, *range(2, 9)]), (2, range(8, 11))):
        inside = [i for i in rows if i in (0, 1, 2, 8, 9)]
        wanted = squares[list(rows)].sum() / squares[inside].sum() * 5 / 11
        assert factors[expert] == pytest.approx(float(wanted), rel=1e-6)
    assert factors[3] == 1

    whole = replace(seen, measured=None)
    assert standing_for(whole, 4) == (whole, [1.0] * 4)


def test_text_that_repeats_is_measured_exactly_on_one_of_its_copies(tiny_model: Make) -> None:
    found: Case = case(tiny_model, "olmoe")
    once = batches((3, 300))
    data, layer = once * 3, found.spec.layers[0]
    module = found.model.get_submodule(layer.module)
    seen = observed_in_part(found.model, found.spec, data, (1,), gradients=True, seed=2)[layer.index]
    alone = observe(found.model, found.spec, once, gradients=True, seed=2)[layer.index]
    assert seen.gradient is not None
    assert alone.gradient is not None
    assert torch.equal(seen.gradient, alone.gradient)
    repeated = Routed(*(torch.cat([t] * 3) for t in (alone.hidden, alone.index, alone.weights)), False)
    repeated = replace(repeated, gradient=alone.gradient.repeat(3, 1))
    ours, theirs = (
        layer_metrics(found.source, layer, s, module, (*COSTS, "tokens", "gradient_norm"), options=OPTIONS)
        for s in (replace(seen, hidden=repeated.hidden), repeated)
    )
    assert ours[1] == theirs[1], "units that fell back"
    assert ours[0].keys() == theirs[0].keys()
    assert min(theirs[0]["tokens"]) >= 3 * LEAST, "no expert gets tokens whose gradients are not their own"
    for name, row in theirs[0].items():
        assert ours[0][name] == pytest.approx(row, rel=1e-4), name


def test_streamed_and_whole_measure_the_same_part_and_moments_stay_whole(tiny_model: Make, tmp_path: Path) -> None:
    folder, text = tiny_model("olmoe"), tmp_path / "text.txt"
    text.write_text(" ".join(f"{i} the quick brown fox jumps over {i * i} lazy dogs." for i in range(1000)))
    how = Calibration(str(text), samples=64, length=128, batch_size=4)
    names = ("frequency", "moment_trace", "output_peak", *COSTS)

    def measured(share: float) -> dict[str, dict[int, list[float]]]:
        calibration = replace(how, cost_share=share)
        stats = measure(folder, names, calibration=calibration, options=OPTIONS)
        again = measure_prepared(observed(open_model(folder), calibration), names, options=OPTIONS)
        assert again.metrics == stats.metrics
        assert again.info.get("cost_tokens") == stats.info.get("cost_tokens")
        assert stats.info.get("cost_tokens") == {1.0: None, 0.25: 4096, 0.75: 6144}[share]
        return {name: dict(rows) for name, rows in stats.metrics.items()}

    whole, part, more = measured(1.0), measured(0.25), measured(0.75)
    exact = [name for name in whole if not name.startswith(COSTS)]
    assert {name: part[name] for name in exact} == {name: whole[name] for name in exact}
    for name in set(whole) - set(exact):
        assert part[name] != whole[name]
        far, near = (
            sum(abs(a - b) for k, row in found[name].items() for a, b in zip(row, whole[name][k], strict=True))
            for found in (part, more)
        )
        assert near < far < 0.5 * sum(sum(row) for row in whole[name].values())


def test_a_share_that_is_none_is_refused(tiny_model: Make) -> None:
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(DataError, match="cost share"):
            calibrated(open_model(tiny_model("olmoe")), Calibration(cost_share=share), texts=["a b c " * 999])
