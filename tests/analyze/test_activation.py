import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mopeq.analyze.activation import expert_tokens, frequency, gate_mass, usage
from mopeq.analyze.observe import Routed

SEEN = Routed(
    hidden=torch.zeros(4, 2),
    index=torch.tensor([[0, 2], [2, 0], [2, 3], [-1, 2]]),
    weights=torch.tensor([[0.5, 0.25], [0.5, 0.5], [0.75, 0.125], [0.0, 1.0]]),
    weighs_input=False,
    vision=torch.tensor([True, False, False, True]),
)


def test_by_hand() -> None:
    assert expert_tokens(SEEN, 5).tolist() == [2, 0, 4, 1, 0]
    assert frequency(SEEN, 5).tolist() == [2 / 7, 0, 4 / 7, 1 / 7, 0]
    assert gate_mass(SEEN, 5).tolist() == [1.0, 0, 2.5, 0.125, 0]


def test_image_and_text_tokens_apart() -> None:
    found = usage({3: SEEN}, {3: 5}, ("tokens", "frequency", "gate_mass"))
    assert set(found) == {f"{n}{s}" for n in ("tokens", "frequency", "gate_mass") for s in ("", ".vision", ".text")}
    assert found["tokens.vision"][3] == [1, 0, 2, 0, 0]
    assert found["tokens.text"][3] == [1, 0, 2, 1, 0]
    assert found["frequency.vision"][3] == [1 / 3, 0, 2 / 3, 0, 0]
    assert found["gate_mass.text"][3] == [0.5, 0, 1.25, 0.125, 0]


def test_no_tokens_are_zeros_and_not_nan() -> None:
    nothing = Routed(torch.zeros(0, 2), torch.zeros(0, 2).long(), torch.zeros(0, 2), False)
    assert frequency(nothing, 3).tolist() == [0, 0, 0]
    assert gate_mass(nothing, 3).tolist() == [0, 0, 0]


@given(st.integers(1, 40), st.integers(1, 4), st.integers(4, 9), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_shares_sum_to_one_and_mass_is_kept(tokens: int, k: int, experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, experts, generator=generator).topk(k).indices
    weights = torch.rand(tokens, k, generator=generator)
    seen = Routed(torch.zeros(tokens, 2), index, weights, False)
    assert abs(float(frequency(seen, experts).sum()) - 1) < 1e-12
    assert int(expert_tokens(seen, experts).sum()) == tokens * k
    torch.testing.assert_close(gate_mass(seen, experts).sum(), weights.double().sum())
