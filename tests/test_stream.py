"""A model run layer by layer sees what the whole model sees: every family, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mopeq.adapters import describe
from mopeq.analyze import Batch, Routed, observe, observed_in_part
from mopeq.errors import DataError, ModelError
from mopeq.journal import Journal
from mopeq.load import load_original
from mopeq.source import open_source
from mopeq.stream import Shell, Store, backward, forward
from tiny import FAMILIES, rewrite, tensors

Make = Callable[..., Path]


def batches(words: int = 256) -> list[dict[str, Tensor]]:
    """Two batches; the second has padding."""
    draw = torch.Generator().manual_seed(0)
    made = [{"input_ids": torch.randint(0, words, shape, generator=draw)} for shape in ((2, 17), (2, 9))]
    masks = [torch.ones_like(batch["input_ids"]) for batch in made]
    masks[1][0, 6:] = 0
    return [{**batch, "attention_mask": mask} for batch, mask in zip(made, masks, strict=True)]


def opened(folder: Path, **options: Any) -> Shell:
    source = open_source(folder)
    return Shell(source, describe(source), **options)


def seen(sweep: Any) -> dict[int, Routed]:
    return {layer.index: routed for layer, _, routed in sweep}


def equal(found: Routed, wanted: Routed) -> bool:
    names = ("hidden", "index", "weights", "gradient", "measured")
    pairs = [(getattr(found, name), getattr(wanted, name)) for name in names]
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_equals_the_whole_model(family: str, dtype: torch.dtype, tiny_model: Make) -> None:
    """docs/numerics.md: bit for bit, gradients included, in the type of the checkpoint."""
    folder = tiny_model(family, dtype=dtype)
    shell, data = opened(folder), batches()
    model = load_original(folder)
    for gradients, found in (
        (False, seen(forward(shell, data, Store()))),
        (True, seen(backward(shell, data, Store(), seed=3))),
    ):
        wanted = observe(model, shell.spec, data, gradients=gradients, seed=3)
        assert found.keys() == wanted.keys()
        assert [layer for layer in wanted if not equal(found[layer], wanted[layer])] == []


@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": True}, {"hub_layout": False}, {"output_router_logits": True}]
)
def test_tied_heads_fused_files_balance_losses(changes: dict[str, Any], tiny_model: Make) -> None:
    folder = tiny_model("qwen2_moe", **changes)
    shell = opened(folder)
    found = seen(backward(shell, batches(), Store()))
    wanted = observe(load_original(folder), shell.spec, batches(), gradients=True)
    assert all(equal(found[layer], wanted[layer]) for layer in wanted)


def test_another_type_than_the_checkpoints(tiny_model: Make) -> None:
    folder = tiny_model("olmoe", dtype=torch.bfloat16)
    shell = opened(folder, dtype=torch.float32)
    found = seen(forward(shell, batches(), Store()))
    wanted = observe(load_original(folder, dtype=torch.float32), shell.spec, batches())
    assert all(equal(found[layer], wanted[layer]) for layer in wanted)


def test_one_layer_has_weights_at_a_time(tiny_model: Make) -> None:
    shell = opened(tiny_model("glm4_moe"))

    def resident() -> set[int]:
        parameters = ((i, p) for i, layer in enumerate(shell.layers) for p in layer.parameters())
        return {i for i, p in parameters if not p.is_meta}

    assert resident() == set()
    for layer, module, _ in forward(shell, batches(), Store()):
        assert resident() == {layer.index}
        assert all(p.is_meta or p.ndim < 3 for p in module.parameters()), "the experts have run and are let go"
    assert resident() == set()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("direction", [forward, backward])
def test_what_is_outside_the_layers_is_there_while_it_is_needed(direction: Any, tied: bool, tiny_model: Make) -> None:
    """An embedding and a head that are a hundred times as large as a layer."""
    folder = tiny_model("mixtral", vocab_size=50_000, tie_word_embeddings=tied)
    shell, data = opened(folder), batches()

    def resident() -> int:
        return sum(p.nbytes for p in shell.model.parameters() if not p.is_meta)

    nothing, large = resident(), shell.model.get_input_embeddings().weight.nbytes
    turns: list[tuple[int, bool]] = []
    begin = shell._begin

    def watched(number: int, batch: Batch, given: Tensor | None) -> None:
        turns.append((number, resident() > large))
        begin(number, batch, given)

    shell._begin = watched  # type: ignore[method-assign]
    for _ in direction(shell, data, Store()):
        assert resident() < large / 20
    assert resident() == nothing < large / 20
    last = len(shell.layers)
    assert [number for number, _ in turns[:2]] == [-1, -1]
    assert all(there == (number in (-1, last)) for number, there in turns)
    assert (last in dict(turns)) == (direction is backward)


@pytest.mark.parametrize("direction", [forward, backward])
@pytest.mark.parametrize("lost", ["", "hidden 0", "hidden 1", "hidden 2", "hidden 3", "gradient 2"])
def test_a_sweep_goes_on_from_what_is_stored(direction: Any, lost: str, tiny_model: Make, tmp_path: Path) -> None:
    """Stopped after its first layer and begun again by another process, with a file lost or without."""
    folder = tiny_model("qwen3_moe", num_hidden_layers=4)
    whole = seen(direction(opened(folder), batches(), Store()))
    ran: list[int] = []
    with Journal(tmp_path, {}) as journal:
        sweep = direction(opened(folder), batches(), Store(journal))
        first = next(sweep)[0].index
        sweep.close()
    with Journal(tmp_path, {}) as journal:
        store, shell = Store(journal), opened(folder)
        if lost in journal.steps:
            (tmp_path / next(iter(journal.files(lost)))).unlink()
        load = shell.layer
        shell.layer = lambda number, then: (ran.append(number), load(number, then))[1]  # type: ignore[method-assign, func-returns-value]
        until = first + 1 if direction is forward else first
        found = seen(direction(shell, batches(), store, until=until))
    assert found.keys() == whole.keys() - {first}
    assert all(equal(found[layer], whole[layer]) for layer in found)
    if not lost:
        assert ran == ([1, 2, 3] if direction is forward else [2, 1, 0])


@pytest.mark.parametrize("family", ["olmoe", "llama4_text", "mixtral"])
def test_gradients_of_some_batches(family: str, tiny_model: Make) -> None:
    """The others are seen alike; the gradients are those of the measured batches alone."""
    folder, data, measured = tiny_model(family), [*batches(), *batches(99)], (1, 2)
    shell, model = opened(folder), load_original(folder)
    found = seen(backward(shell, data, Store(), measured=measured, seed=3))
    wanted = observed_in_part(model, shell.spec, data, measured, gradients=True, seed=3)
    plain = observe(model, shell.spec, data)
    alone = observe(model, shell.spec, data[1:3], gradients=True, seed=3)
    assert found.keys() == plain.keys()
    for layer, routed in found.items():
        assert equal(routed, wanted[layer])
        assert routed.measured is not None
        assert equal(routed.part(), alone[layer])
        for name in ("hidden", "index", "weights"):
            assert torch.equal(getattr(routed, name), getattr(plain[layer], name))


@pytest.mark.parametrize("at", ["others 0", "seen 0", "others 2", "seen 2", "hidden 3", "gradient 3", "gradient 0"])
@pytest.mark.parametrize("lost", ["", "seen 1"])
def test_a_sweep_of_some_batches_goes_on(
    at: str, lost: str, tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before something is stored, and begun again, with a file lost or without."""
    folder = tiny_model("qwen3_moe", num_hidden_layers=4)
    whole = seen(backward(opened(folder), batches(), Store(), measured=(1,)))
    given: dict[int, Routed] = {}
    with Journal(tmp_path, {}) as journal, monkeypatch.context() as patch:
        put = Store.put

        def killed(store: Store, name: str, tensors: Any) -> None:
            if name == at:
                raise KeyboardInterrupt
            put(store, name, tensors)

        patch.setattr(Store, "put", killed)
        with suppress(KeyboardInterrupt):
            for layer, _, routed in backward(opened(folder), batches(), Store(journal), measured=(1,)):
                given[layer.index] = routed
    assert len(given) == (3 if at == "gradient 0" else 0)
    with Journal(tmp_path, {}) as journal:
        if lost in journal.steps:
            (tmp_path / next(iter(journal.files(lost)))).unlink()
        until = min(given) if given else None
        found = given | seen(backward(opened(folder), batches(), Store(journal), measured=(1,), until=until))
    assert found.keys() == whole.keys()
    assert all(equal(found[layer], whole[layer]) for layer in whole)


def test_what_is_wrong_is_said(tiny_model: Make, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model("olmoe").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    shell = opened(folder)
    with pytest.raises(DataError, match="no calibration tokens"):
        next(forward(shell, [], Store()))
    bad = tensors(folder)["model.layers.1.self_attn.q_proj.weight"].clone().fill_(torch.nan)
    rewrite(folder, {"model.layers.1.self_attn.q_proj.weight": bad})
    with pytest.raises(ModelError, match=r"layer 1: NaN or infinite values enter model\.layers\.1"):
        list(forward(opened(folder), batches(), Store()))
