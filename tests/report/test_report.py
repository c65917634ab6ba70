"""The page: whole, safe, self-contained."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fakes
import pytest

from mopeq.errors import InputError, MapError, OutputError
from mopeq.precision import GROUPS
from mopeq.report import render
from mopeq.stats import write_json

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Tree(HTMLParser):
    """Checks that every tag is closed in order; gathers tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.titles: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "title":
            self.titles.append(data)
        elif "style" not in self.open and "script" not in self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def read(path: Path) -> Tree:
    tree = Tree()
    tree.feed(path.read_text(encoding="utf-8"))
    tree.close()
    assert tree.open == []
    return tree


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fakes.write_all(tmp_path / "packed")


def test_all_sections_and_numbers_are_there(folder: Path) -> None:
    out = render(folder)
    assert out == folder / "mopeq" / "report.html"
    tree = read(out)
    assert [a["id"] for t, a in tree.tags if t == "section"] == ["experts", "quality", "coverage", "reproduce"]
    bits = fakes.inventory().expert_bits(fakes.precisions())
    for text in (
        "some/olmoe", "3 MoE layers of 8 experts, 2 for each token", "from 0.9 MB: 3.60 times smaller", f"{bits:.3f}",
        "0.0123", "95 % interval 0.0117 to 0.0130", "90.00 %", "44.700", "original 44.100",
        "Bits of gate and up", "Bits of down", "Sensitivity of down", "fisher_error of each expert alone at 2g64",
        "Frequency",
        "Size against quality", "Predicted against measured loss", "Spearman rank correlation 1.00", "mixed 2.5",
        "Calibration tokens of an expert", "1 expert with too few tokens", "0.1.down", "Where the bytes are", "colours",
        "mopeq quantize some/olmoe -o out --budget 3.0bpw", "mopeq eval 'a b'", "torch", "2.13.0", "x86_64, 2 cores",
        "4.0",
        "knapsack", "heldout.txt",
    ):  # fmt: skip
        assert text in tree.words, text
    assert 'class="missing"' not in out.read_text()


def test_every_expert_has_a_cell_with_its_value(folder: Path) -> None:
    tree = read(render(folder))
    cells = [t for t in tree.titles if re.match(r"\d+\.\d+: ", t)]
    assert len(cells) == 5 * 3 * 8
    chosen = fakes.precisions()
    assert f"2.7: {chosen.of(2, 7, 'down').bits} bits ({chosen.of(2, 7, 'down')})" in cells
    tokens = fakes.stats().metrics["tokens"]
    assert any(t.startswith("1.3: ") and t.endswith(f" %, {tokens[1][3]:,.0f} tokens") for t in cells)
    assert "0.1: 0 %, 0 tokens" in cells


def test_text_and_image_tokens_have_maps_of_their_own(folder: Path) -> None:
    stats = fakes.stats()
    vision = {layer: row[::-1] for layer, row in stats.metrics["frequency"].items()}
    counts = {layer: [7 + layer + expert for expert in range(8)] for layer in vision}
    more = {"frequency.text": stats.metrics["frequency"], "frequency.vision": vision, "tokens.vision": counts}
    write_json(folder / "mopeq" / "stats.json", stats.with_metrics(more).to_json())
    tree = read(render(folder))
    assert "Frequency of text tokens" in tree.words
    assert "Frequency of image tokens" in tree.words
    assert any(t.startswith("1.3: ") and t.endswith(f" %, {counts[1][3]} tokens") for t in tree.titles)


def test_predicted_loss_is_the_sum_of_the_chosen_costs(folder: Path) -> None:
    stats, chosen = fakes.stats(), fakes.precisions()
    total = sum(
        stats.metrics[f"fisher_error/{g}/{chosen.of(i, e, g)}"][i][e]
        for g in GROUPS
        for i in range(3)
        for e in range(8)
    )
    words = read(render(folder)).words
    shown = re.search(r"predicted loss \(fisher_error\) (\S+)", words)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(total, rel=5e-3)


def test_super_experts_are_named(folder: Path) -> None:
    assert "super-expert" not in read(render(folder, folder / "page.html")).words
    peaks = {0: [1.0] * 8, 1: [1.0, 90.0, *[1.0] * 6], 2: [2.0] * 8}
    write_json(folder / "mopeq" / "stats.json", fakes.stats().with_metrics({"output_peak": peaks}).to_json())
    assert (
        "1 super-expert by the peak of their output: 1.1 (90 times the median)"
        in read(render(folder, folder / "page.html")).words
    )


def test_sizes_add_up(folder: Path) -> None:
    from mopeq.report.inputs import read_inputs
    from mopeq.report.tables import size_table

    inputs = read_inputs(folder)
    table = size_table(inputs.inventory, inputs.precisions)
    assert table is not None
    *parts, whole = [float(row[-2].split()[0]) for row in table.rows]
    assert sum(parts) == pytest.approx(whole, abs=0.05 * len(parts) + 0.05)


def test_nothing_comes_from_outside(folder: Path) -> None:
    text = render(folder).read_text()
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert "@import" not in text
    tags = read(folder / "mopeq" / "report.html").tags
    assert not [a for _, a in tags if {"src", "href", "xlink:href", "srcset"} & set(a)]
    assert not [t for t, _ in tags if t in {"link", "iframe", "object", "embed", "img"}]
    policy = next(a["content"] for t, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_a_hostile_name_stays_text(folder: Path) -> None:
    bad = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    inner = folder / "mopeq"
    write_json(
        inner / "run.json", fakes.run(model=bad, commands=[bad], versions={bad: bad}, fallbacks=[bad], machine=bad)
    )
    write_json(inner / "frontier.json", {"points": [{**p, "name": bad + p["name"]} for p in fakes.points()]})
    chosen = json.loads((inner / "precision.json").read_text())
    chosen["note"] = {bad: bad}
    write_json(inner / "precision.json", chosen)
    judged = fakes.evaluation()
    judged["tasks"][0]["task"] = judged["info"]["text"] = bad
    write_json(inner / "evaluation.json", judged)
    measured = json.loads((inner / "stats.json").read_text())
    measured["info"]["starved"] = {bad: bad}
    write_json(inner / "stats.json", measured)
    tree = read(render(folder))
    assert sum(t == "script" for t, _ in tree.tags) == 1
    assert not [t for t, _ in tree.tags if t == "img"]
    assert not [a for _, a in tree.tags if "onerror" in a]
    assert bad in tree.words


@pytest.mark.parametrize(
    ("name", "gone", "command"),
    [
        ("stats.json", "Sensitivity of", "mopeq analyze MODEL --metrics frequency,fisher_error"),
        ("precision.json", "Bits of", "mopeq allocate DIR/mopeq/stats.json"),
        ("evaluation.json", "KL to the original 0.0123", "mopeq eval DIR --against MODEL"),
        ("run.json", "2.13.0", "mopeq quantize MODEL -o DIR"),
        ("frontier.json", "Size against quality", "mopeq quickstart"),
    ],
)
def test_an_absent_file_leaves_its_part_out_and_says_how_to_make_it(
    folder: Path, name: str, gone: str, command: str
) -> None:
    assert gone in read(render(folder)).words
    (folder / "mopeq" / name).unlink()
    words = read(render(folder)).words
    assert gone not in words
    assert f"No {name} here" in words
    assert command in words


@pytest.mark.parametrize("name", ["stats.json", "precision.json", "evaluation.json", "run.json", "frontier.json"])
def test_one_file_alone_makes_a_page(folder: Path, name: str) -> None:
    for file in (folder / "mopeq").glob("*.json"):
        if file.name != name:
            file.unlink()
    words = read(render(folder)).words
    assert f"No {name} here" not in words
    assert words.count(" here, so ") >= 4


def test_scores_stand_in_for_costs(folder: Path) -> None:
    measured = fakes.stats()
    plain = {"inverse_norm": {i: [0.1 + e for e in range(8)] for i in range(3)}}
    only = type(measured)(measured.model, {}, {}).with_metrics(plain)
    write_json(folder / "mopeq" / "stats.json", only.to_json())
    tree = read(render(folder))
    assert "inverse_norm" in tree.words
    assert "2.7: 7.10" in tree.titles
    assert "No tokens in stats.json" in tree.words


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("stats.json", {"format": "x"}, "stats.json: not a statistics file"),
        ("precision.json", [], "precision.json: not a precision map"),
        ("evaluation.json", {"format": "mopeq-evaluation", "version": 9}, "evaluation.json is malformed"),
        ("evaluation.json", {**fakes.evaluation(), "divergence": {"kl": {"low": 1}}}, "evaluation.json is malformed"),
        ("run.json", {"commands": "mopeq"}, "run.json is malformed.*expected a list"),
        ("run.json", {"bytes": "many"}, "run.json is malformed"),
        ("frontier.json", [{"name": "a"}], "frontier.json is malformed"),
        ("frontier.json", [{"name": "a", "kind": "b"}], "expected original, uniform, mixed"),
        ("frontier.json", [{"name": "a", "kind": "mixed", "kl": True}], "not a finite number"),
    ],
)
def test_a_malformed_file_is_named(folder: Path, name: str, content: Any, message: str) -> None:
    (folder / "mopeq" / name).write_text(json.dumps(content))
    with pytest.raises(MapError, match=message):
        render(folder)


def test_not_a_number_is_refused(folder: Path) -> None:
    (folder / "mopeq" / "frontier.json").write_text('[{"name": "a", "kind": "mixed", "kl": NaN}]')
    with pytest.raises(MapError, match="not a finite number"):
        render(folder)


def test_a_map_of_another_model_is_refused(folder: Path) -> None:
    write_json(folder / "mopeq" / "precision.json", fakes.precisions(layers=2).to_json())
    with pytest.raises(MapError, match="precision map is for another model"):
        render(folder)


def test_a_folder_with_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has none of stats.json, .*; expected a folder made by mopeq quantize"):
        render(tmp_path)


def test_a_page_that_cannot_be_written_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*absent"):
        render(folder, tmp_path / "absent" / "page.html")
    with pytest.raises(OutputError, match="cannot write"):
        render(folder, folder / "mopeq" / "run.json" / "page.html")
    assert not list(tmp_path.rglob("*.partial"))


def test_out_is_replaced_and_repeatable(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text("old")
    assert render(folder, out) == out
    first = out.read_text()
    render(folder, out)
    assert out.read_text() == first


@pytest.mark.parametrize("experts", [8, 256])
def test_maps_scroll_in_their_own_box(tmp_path: Path, experts: int) -> None:
    tree = read(render(fakes.write_all(tmp_path / "packed", layers=12, experts=experts)))
    neighbours = zip(tree.tags, tree.tags[1:], strict=False)
    parents = [(a.get("class"), b) for (_, a), (t, b) in neighbours if t == "svg" and "map" in (b.get("class") or "")]
    assert len(parents) == 5
    assert {p for p, _ in parents} == {"scroll"}
    assert all(float(b["width"] or 0) <= 1100 for _, b in parents)
    assert all(b["role"] == "img" and b["aria-labelledby"] for _, b in parents)


def test_the_report_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from mopeq.report import render; render(sys.argv[1]);"
        "assert not {'torch', 'transformers', 'mopeq.evaluate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=60)


def test_starved_layers_come_by_number() -> None:
    from mopeq.report.page import _by_number

    assert sorted(["2.vision", "10", "3", "other"], key=_by_number) == ["3", "10", "other", "2.vision"]
