"""A set at work: choices from the prompt alone, batches in groups, few variants in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sets import CODE, PROSE, calibrated, random_router, write_texts
from torch import nn

from mopeq import moqe
from mopeq.errors import DataError, InputError
from mopeq.evaluate import resident_bytes
from mopeq.load import load
from mopeq.moqe.judging import Scores, compare, ensemble_losses, measure_latency
from mopeq.moqe.language import check_unseen, prompted_windows, prompts_of, variant_losses
from mopeq.moqe.pool import Pool
from mopeq.moqe.training import Settings
from mopeq.runtime.generate import generate

Make = Callable[..., Path]
PROMPTS = [CODE, PROSE, "x", "The answer to everything is 42, they said.", "import os", CODE + PROSE, "zzz", "!?"]


@pytest.fixture(scope="module")
def folder(tiny_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("routed")
    variants = ["rtn-2g32", "rtn-3g32", "gptq-4g32"]
    made = moqe.build(tiny_model("olmoe"), variants, tmp / "set", calibration=calibrated(tmp))
    random_router(made, seed=4)
    return made.path


@pytest.fixture
def opened(folder: Path) -> moqe.Moqe:
    return moqe.load(folder, dtype=torch.float32)


def test_the_choice_sees_the_prompt_alone(opened: moqe.Moqe) -> None:
    """Tokens that are scored change nothing; the published router reads them."""
    ids = torch.stack([opened.encode((CODE * 3)[:40]), opened.encode((PROSE * 3)[:40])])
    changed = ids.clone()
    changed[:, 10:] = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))
    pool = opened.pool
    first, second = (opened.logits(x, prompt_tokens=10) for x in (ids, changed))
    torch.testing.assert_close(first[:, :10], second[:, :10], msg="the same variants ran, and they are causal")
    assert pool.loads <= 2
    routes = [opened.route(list(x[:, :10])) for x in (ids, changed)]
    assert routes[0] == routes[1]
    assert len(set(opened.route([opened.encode(p) for p in PROMPTS]))) > 1, "it does look at the prompt"


def test_groups_of_a_batch_give_what_each_gets_alone(opened: moqe.Moqe, folder: Path) -> None:
    prompts = [opened.encode(prompt) for prompt in PROMPTS]
    longest = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), longest, dtype=torch.int64), torch.zeros(len(prompts), longest)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    got = opened.logits(ids, mask.long())
    for row, (prompt, name) in enumerate(zip(prompts, opened.route(prompts), strict=True)):
        with torch.no_grad():
            want = load(folder / "variants" / name, torch.float32)(input_ids=prompt[None]).logits[0]
        torch.testing.assert_close(got[row, : len(prompt)], want, rtol=1e-3, atol=1e-3)


def test_generating_in_a_batch_and_alone(opened: moqe.Moqe, folder: Path) -> None:
    together = opened.generate(PROMPTS, max_new_tokens=6)
    assert [made.prompt_tokens for made in together] == [len(opened.encode(prompt)) for prompt in PROMPTS]
    for prompt, made, name in zip(PROMPTS, together, opened.route([opened.encode(p) for p in PROMPTS]), strict=True):
        model = load(folder / "variants" / name, torch.float32)
        assert made.tokens == generate(model, opened.tokenizer, prompt, max_new_tokens=6).tokens
        assert opened.generate(prompt, max_new_tokens=6).tokens == made.tokens
    chat = ({"role": "user", "content": "hello"},)
    assert len(opened.generate(chat, max_new_tokens=3, stream=lambda text: None).tokens) <= 3


def test_few_variants_in_memory(folder: Path) -> None:
    small, large = moqe.load(folder, resident=1), moqe.load(folder)
    for one in (small, large):
        one.generate(PROMPTS, max_new_tokens=1)
        one.generate(PROMPTS[:4], max_new_tokens=1)
    used = set(large.route([large.encode(prompt) for prompt in PROMPTS]))
    assert large.pool.loads == len(used) > 1
    assert large.pool.evictions == 0
    assert small.pool.evictions == small.pool.loads - 1 > 0
    assert small.pool.bytes < large.pool.bytes
    apart = sum(resident_bytes(load(folder / "variants" / name)) for name in used)
    assert large.pool.bytes < apart, "embeddings, norms and the head are in memory once"
    tables = {large.pool(name).get_input_embeddings().weight.data_ptr() for name in used}
    assert tables == {large.table.data_ptr()}


def test_the_least_recently_used_goes() -> None:
    loaded: list[str] = []

    def loader(path: Path) -> nn.Module:
        loaded.append(path.name)
        return nn.Linear(2, 2)

    pool = Pool({name: Path(name) for name in "abc"}, loader, resident=2)
    for name in "ababcac":
        pool(name)
    assert loaded == ["a", "b", "c", "a"], "b made room for nothing; a was older than b when c came"
    assert (pool.loads, pool.hits, pool.evictions) == (4, 3, 2)
    assert pool.ordered(["b", "c", "b", "a"]) == ["c", "a", "b"], "what is in memory first"
    with pytest.raises(InputError, match="expected at least 1"):
        Pool({}, loader, resident=0)


def test_an_empty_prompt(opened: moqe.Moqe) -> None:
    with pytest.raises(InputError, match="prompt is empty"):
        opened.generate("")
    assert opened.generate([]) == []


# -- training and judging


def test_windows_stay_in_their_document(opened: moqe.Moqe) -> None:
    windows = prompted_windows(["a" * 25, "b" * 9, "c" * 21], opened.tokenizer, 4, 10)
    assert [opened.tokenizer.decode(window.ids) for window in windows] == ["a" * 10] * 2 + ["c" * 10] * 2
    assert {len(prompt) for prompt in prompts_of(windows)} == {4}
    with pytest.raises(DataError, match="no document has 30 tokens"):
        prompted_windows(["short"], opened.tokenizer, 4, 30)
    with pytest.raises(DataError, match="fewer than the window"):
        prompted_windows(["short"], opened.tokenizer, 10, 10)


def test_losses_are_those_of_the_continuation(opened: moqe.Moqe) -> None:
    windows = prompted_windows([CODE * 4, PROSE * 4], opened.tokenizer, 8, 32)
    found = variant_losses(opened, windows)
    mean = ensemble_losses(opened, windows)
    for row, window in enumerate(windows):
        every = []
        for column, name in enumerate(opened.made.names):
            with torch.no_grad():
                logits = opened.pool(name)(input_ids=window.ids[None]).logits[0, 7:-1]
            every.append(logits)
            want = nn.functional.cross_entropy(logits, window.ids[8:]).item()
            assert found[row, column].item() == pytest.approx(want, rel=1e-4)
        want = nn.functional.cross_entropy(torch.stack(every).mean(0), window.ids[8:]).item()
        assert mean[row].item() == pytest.approx(want, rel=1e-4)


def test_train_and_judge(folder: Path, tmp_path: Path) -> None:
    text = write_texts(tmp_path / "learn.jsonl", *(f"{i} {CODE * 6}{PROSE * 6}" for i in range(6)))
    settings = Settings(epochs=2, batch_size=8)
    again = tmp_path / "set"
    shutil.copytree(folder, again)
    found = moqe.train(again, text, prompt=8, length=32, settings=settings)
    assert found.inputs > found.validation_inputs > 1
    assert not (again / "router" / "training.safetensors").exists()
    texts = {"code": [CODE * 9], "prose": [PROSE * 9]}
    beside = {"full": again / "variants" / "gptq-4g32"}
    judged = moqe.judge(moqe.load(again), texts, prompt=8, length=32, beside=beside, pairs=2)
    rows = {row.name: row.loss.value for row in judged.rows["all"]}
    names = moqe.read_set(again).names
    assert rows["full"] == pytest.approx(rows["gptq-4g32"])
    assert rows["oracle"] <= rows["best per domain"] <= min(rows[name] for name in names)
    assert rows["random"] == pytest.approx(sum(rows[name] for name in names) / 3)
    assert set(judged.rows) == {"all", "code", "prose"}
    assert judged.latency[0].router_seconds > 0
    assert judged.bytes["routed"] > moqe.read_set(again).bytes


def test_text_that_calibrated_a_variant_is_refused(opened: moqe.Moqe, folder: Path) -> None:
    with pytest.raises(DataError, match="1 of 2 documents calibrated a variant"):
        check_unseen(opened.made, ["new", CODE * 20])


def scores() -> Scores:
    source = torch.Generator().manual_seed(0)
    losses = 1 + torch.rand(40, 2, generator=source, dtype=torch.float64)
    routes = torch.randint(0, 2, (40,), generator=source)
    weights = torch.randint(1, 9, (40,), generator=source).double()
    return Scores(("a", "b"), losses, routes, weights, ("x",) * 15 + ("y",) * 25, {"original": losses.amin(1) - 0.5})


def test_the_table_by_hand() -> None:
    given = scores()
    found = compare(given, {})
    w = (given.weights / given.weights.sum()).numpy()
    losses, routes = given.variants.numpy(), given.routes.numpy()
    rows = {row.name: row.loss.value for row in found.rows["all"]}
    assert rows["a"] == pytest.approx((w * losses[:, 0]).sum())
    assert rows["routed"] == pytest.approx(sum(w[i] * losses[i, routes[i]] for i in range(40)))
    assert rows["oracle"] == pytest.approx((w * losses.min(1)).sum())
    best = min("ab", key=lambda name: rows[name])
    assert found.best["all"] == best
    gap = found.differences["all"]["routed - best single"]
    assert gap.value == pytest.approx(rows["routed"] - rows[best])
    assert gap.low < gap.value < gap.high
    assert found.usage["all"][1] == pytest.approx(routes.mean())
    assert found.inputs == {"all": 40, "x": 15, "y": 25}


def test_the_sentence_is_true() -> None:
    noise = 0.1 * torch.randn(40, generator=torch.Generator().manual_seed(1)).double()
    halves = torch.arange(40) % 2

    def said(losses: torch.Tensor, routes: torch.Tensor) -> str:
        return compare(Scores(("a", "b"), losses, routes, torch.ones(40), ("x",) * 40, {}), {}).sentence

    suited = torch.stack((2 + noise + 0.5 * halves, 2.01 + noise + 0.5 * (1 - halves)), 1)
    assert said(suited, halves).startswith("Routing beats a")
    assert said(suited, 1 - halves).startswith("Routing is worse than a alone")
    alike = torch.stack((2 + noise, 2 + noise.roll(1)), 1)
    assert "does not differ" in said(alike, halves)


def test_latency_is_paired(opened: moqe.Moqe) -> None:
    found = measure_latency(opened, [opened.encode(PROSE)], 3, pairs=3)
    assert found.pairs == 3
    assert found.alone_seconds > 0
    assert -0.9 < found.overhead < 20
