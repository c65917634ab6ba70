"""What routing between quantized variants is worth: for text with general and with specialised variants, for images."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from common import ROOT, arguments, store
from mopeq import moqe
from mopeq.data.text import read_texts
from mopeq.measure import Calibration, open_model
from mopeq.moqe.language import prompted_windows, prompts_of
from mopeq.moqe.vision import build_images, judge_images, load_images, train_images
from mopeq.quantize import quantize

sys.path.insert(0, str(ROOT / "scripts"))
PIECE = 3000
"""Characters of a document that a long text is cut into."""
SHARES = {"calibrate": 0.4, "learn": 0.3, "judge": 0.3}
"""Of each domain's text, in order: for variants, for the router, held out."""
GENERAL = ("rtn-3bit", "gptq-3bit", "awq-like-3bit", "mixed-2.5")


def main() -> None:
    parser = arguments(__doc__ or "", "moqe")
    parser.add_argument("--model", required=True, help="folder of the original")
    parser.add_argument("--label", default="", help="how results call it")
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="unseen text, one file a domain")
    parser.add_argument("--recipe", default="mixed-2.5", help="of the specialised variants")
    parser.add_argument("--windows", type=int, default=40, help="held-out windows of each domain")
    parser.add_argument("--pairs", type=int, default=31, help="pairs of runs that time the router")
    parser.add_argument("--studies", nargs="+", default=["general", "specialised", "images"])
    parser.add_argument("--work", type=Path, help="folder for the sets; what an earlier run left there is used")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        label = asked.label or Path(asked.model).name
        results: dict[str, Any] = {"model": label, "recipe": asked.recipe, "studies": {}}
        if asked.work and asked.out.exists():
            results = json.loads(asked.out.read_text(encoding="utf-8"))["results"]
        asked.done = set(results["studies"])
        text = Text(work, asked.text)
        for study in asked.studies:
            for name, found in STUDIES[study](asked, text, work):
                results["studies"][name] = found
                store(asked.out, results)
                print(name, found["sentence"], flush=True)


class Text:
    """Every domain's text cut in three, as files."""

    def __init__(self, work: Path, files: Sequence[Path]) -> None:
        self.work = work
        self.parts: dict[str, dict[str, list[str]]] = {part: {} for part in SHARES}
        for file in files:
            whole = "\n\n".join(read_texts(file))
            pieces = [whole[i : i + PIECE] for i in range(0, len(whole), PIECE)]
            start = 0.0
            for part, share in SHARES.items():
                ends = (round(len(pieces) * start), round(len(pieces) * (start + share)))
                self.parts[part][file.stem.removeprefix("eval_").removeprefix("heldout_")] = pieces[slice(*ends)]
                start += share
        self.domains = list(self.parts["judge"])

    def file(self, part: str, domain: str | None = None) -> Path:
        """A part of one domain, or of all, as JSONL."""
        path = self.work / f"{part}-{domain or 'all'}.jsonl"
        texts = [t for name, found in self.parts[part].items() if domain in (None, name) for t in found]
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
        return path


def calibration(text: Text, domain: str | None = None) -> Calibration:
    return Calibration(str(text.file("calibrate", domain)), samples=32, length=256, batch_size=8, cost_share=1.0)


def general(asked: Any, text: Text, work: Path) -> Any:
    """Variants of general quantizers, all calibrated on all domains."""
    folder = work / "general"
    started = time.perf_counter()
    if not folder.exists():
        moqe.build(asked.model, GENERAL, folder, calibration=calibration(text))
    yield "general", judged(asked, text, folder, {"original": asked.model}, time.perf_counter() - started)


def specialised(asked: Any, text: Text, work: Path) -> Any:
    """Variants of one recipe, each calibrated on one domain: all of them, and the first two and three."""
    folder = work / "specialised"
    started = time.perf_counter()
    recipes = [f"{domain}={asked.recipe}@{text.file('calibrate', domain)}" for domain in text.domains]
    if not folder.exists():
        moqe.build(asked.model, recipes, folder, calibration=calibration(text))
    made = moqe.read_set(folder)
    seconds = time.perf_counter() - started
    beside: dict[str, str | Path] = {"original": asked.model}
    inventory = open_model(asked.model).inventory
    for name, budget, bits in (
        ("one calibrated on all", f"{asked.recipe.removeprefix('mixed-')}bpw", (2, 3, 4)),
        ("one of the set's bytes", f"{made.bytes}B", (2, 3, 4, 5, 6)),
    ):
        beside[name] = one = work / name.replace(" ", "-")
        options = inventory.precisions(bits)
        if not one.exists():
            quantize(asked.model, one, budget=budget, options=options, calibration=calibration(text), evaluated=False)
    for count in sorted({2, 3, len(recipes)}):
        part = folder
        if count < len(recipes):
            part = work / f"specialised-{count}"
            existing = [f"{name}={made.folder(name)}" for name in made.names[:count]]
            if not part.exists():
                moqe.build(asked.model, existing, part)
        name = f"specialised, {count} variants"
        if name not in asked.done:
            yield name, judged(asked, text, part, beside, seconds)


def judged(asked: Any, text: Text, folder: Path, beside: Mapping[str, str | Path], seconds: float) -> dict[str, Any]:
    """Train the router of a set, judge it, and serve a mixed stream with less memory than all variants need."""
    started = time.perf_counter()
    trained = moqe.train(folder, text.file("learn"))
    training = time.perf_counter() - started
    opened = moqe.load(folder)
    found = moqe.judge(opened, text.parts["judge"], limit=asked.windows, beside=beside, pairs=asked.pairs)
    made = opened.made
    return {
        "variants": list(made.names), "recipes": [Path(variant.recipe.split("@")[0]).name for variant in made.variants],
        "bytes_once": made.bytes, "bytes_apart": made.separate_bytes, "router": router_record(folder),
        "trained": asdict(trained), "build_seconds": round(seconds, 1), "train_seconds": round(training, 1),
        "judged": found.to_json(), "sentence": found.sentence, "residency": residency(opened, text, folder),
    }  # fmt: skip


def router_record(folder: Path) -> dict[str, Any]:
    """What the router's file says, but for the command, which names folders."""
    record: dict[str, Any] = json.loads((folder / "router" / "router.json").read_text(encoding="utf-8"))
    return {key: record[key] for key in ("shape", "parameters", "share", "settings")}


def residency(opened: moqe.Moqe, text: Text, folder: Path) -> list[dict[str, Any]]:
    """48 prompts of mixed domains in batches of 8, 16 new tokens each, with 1, 2 ... variants in memory."""
    windows = [prompted_windows(found, opened.tokenizer, 64, 192)[:10] for found in text.parts["judge"].values()]
    mixed = [window for group in zip(*windows, strict=True) for window in group][:48]
    prompts = [opened.tokenizer.decode(ids) for ids in prompts_of(mixed)]
    rows = []
    for resident in range(1, len(opened.made.names) + 1):
        again = moqe.load(folder, resident=resident)
        started = time.perf_counter()
        most = 0
        for i in range(0, len(prompts), 8):
            again.generate(prompts[i : i + 8], max_new_tokens=16)
            most = max(most, again.pool.bytes)
        rows.append({
            "resident": resident, "seconds": round(time.perf_counter() - started, 3), "loads": again.pool.loads,
            "load_seconds": round(again.pool.load_seconds, 3), "bytes": most,
        })  # fmt: skip
    return rows


def images(asked: Any, text: Text, work: Path) -> Any:
    """A ResNet on scikit-learn's digits as they are, as negatives and with noise."""
    from reference_digits import DOMAINS, digits, save_digits, shown, train_resnet

    pixels, labels = digits()
    ends = {"base": (0, 800), "calibrate": (800, 1000), "learn": (1000, 1300), "judge": (1300, len(labels))}
    parts = {part: slice(*found) for part, found in ends.items()}
    model = train_resnet(work / "resnet", pixels[parts["base"]], labels[parts["base"]], epochs=30)
    for seed, (part, rows) in enumerate(parts.items()):
        for domain in DOMAINS if part != "base" else ():
            save_digits(work / part / domain, shown(pixels[rows], domain, seed), labels[rows], domain)
            save_digits(work / part / "all", shown(pixels[rows], domain, seed), labels[rows], domain)
    everything = work / "calibrate" / "all"
    for name, recipes in {
        "images, general": ["rtn-4bit", "rtn-mse-4bit", "gptq-4bit"],
        "images, specialised at 3 bits": [f"{d}=gptq-3bit@{work / 'calibrate' / d}" for d in DOMAINS],
        "images, specialised at 2 bits": [f"{d}=gptq-2bit@{work / 'calibrate' / d}" for d in DOMAINS],
    }.items():
        folder = work / name.replace(", ", "-").replace(" ", "-")
        made = build_images(model, [*recipes, "int8=rtn-8bit"] if "general" in name else recipes, folder, everything)
        bits = recipes[0].split("@")[0].rpartition("-")[2]
        if "general" not in name:
            build_images(model, [f"gptq-{bits}", f"rtn-{bits}"], folder.with_suffix(".one"), everything)
        trained = train_images(folder, work / "learn" / "all")
        beside = {"original": model}
        if "general" not in name:
            beside["one calibrated on all"] = folder.with_suffix(".one") / "variants" / f"gptq-{bits}"
        loss, wrong = judge_images(load_images(folder), {d: work / "judge" / d for d in DOMAINS}, beside=beside)
        yield name, {
            "variants": list(made.names), "bytes_once": made.bytes, "bytes_apart": made.separate_bytes,
            "router": router_record(folder), "trained": asdict(trained),
            "judged": loss.to_json(), "wrong": wrong.to_json(), "sentence": loss.sentence,
        }  # fmt: skip


STUDIES = {"general": general, "specialised": specialised, "images": images}

if __name__ == "__main__":
    main()
