"""MoPEQ's comparison on the bundled vision-language model, and what calibrating it with or without images is worth.

For every seed most maps of ``fidelity.py`` are measured, quantized and judged with conversations with images. Then some
of them again with other calibration of about as many tokens: ``quizzes``, the same kind of questions as text alone;
``text``, the text that mopeq takes where nothing is named; conversations with images whose text and image tokens weigh
differently; and conversations where of the image tokens those alone count to which text pays most attention.
``knapsack 2.8, images' codes`` is the map of such a run quantized with the images' calibration, so that only the choice
of precisions differs. All maps are packed, loaded and judged on the held-out questions about harder images, of less
contrast and with noise: KL from the original on the tokens of the answers, and how many answers are right. As drawn,
images leave the bundled model so sure of its answers that precisions hardly differ; some maps are judged on these too
(``plain``). Every seed draws conversations of its own. The same command goes on with what it had not finished.
"""

from __future__ import annotations

import base64
import gc
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from common import ROOT, START, arguments, store
from fidelity import COST, COSTS, DRAWS, Job, noise, packed, paper_maps, short
from mopeq.allocate import allocate
from mopeq.allocate.baselines import uniform_map
from mopeq.analyze import hessian_trace
from mopeq.analyze.forward import OURS
from mopeq.data.conversations import Question, question_batches, read_questions
from mopeq.data.samples import bundled_images, bundled_vlm
from mopeq.evaluate.answers import Answers, answer_logits, judge_answers
from mopeq.load import load_original, load_processor
from mopeq.measure import Calibration, Prepared, calibrated, measure_prepared, observed, open_model
from mopeq.precision import Precision
from mopeq.stats import Stats

sys.path.insert(0, str(ROOT / "scripts"))
import reference_images as drawn

BITS, SIZE, CONVERSATIONS, WINDOW = (2, 3, 4), 32, 256, 128
BUDGET = 2.8
"""Bits a weight of a map between uniform 2 (2.56 bits in groups of 32) and uniform 3."""
KNAPSACK = f"knapsack {BUDGET}"
WEIGHT = 10.0
"""What a text token counts beside an image token, where they do not count alike."""
KEYS, KEY = "images, key image tokens alone", 0.2
"""An arm, and the share of a conversation's image tokens that count there (MODE, VEQ: those attended to most)."""
QUIZ_SEED, DRAW_SEED = 4_000_037, 8_000_009
PLAIN = ("uniform 2", "uniform 3", "uniform 4", "knapsack = uniform 3", KNAPSACK)
"""Maps that are judged on images as drawn, too."""


def main() -> None:
    parser = arguments(__doc__ or "", "vlm_study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the calibration")
    parser.add_argument("--probes", type=int, default=4, help="of hessian_trace; 0 leaves it out")
    parser.add_argument(
        "--hessian-samples", type=int, default=32, help="conversations for hessian_trace, first seed only"
    )
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    opened = open_model(bundled_vlm())
    results: dict[str, Any] = {
        "model": "bundled vision-language model",
        "expert_parameters": opened.inventory.expert_parameters,
        "parameters": opened.inventory.parameters,
        "original_bytes": sum(path.stat().st_size for path in opened.source.path.glob("*.safetensors")),
        "calibration": {"conversations": CONVERSATIONS, "seeds": asked.seeds},
        "questions": len(read_questions(bundled_images("heldout.tsv"))),
        "harder": {"contrast": drawn.CONTRAST, "noise": drawn.NOISE},
        "group_size": SIZE,
        "quantizer": "gptq",
        "runs": [],
    }
    if asked.out.exists():
        stored = json.loads(asked.out.read_text(encoding="utf-8"))["results"]
        if all(stored.get(name) == value for name, value in results.items() if name != "runs"):
            results = stored
    done = {(run["seed"], run["arm"]) for run in results["runs"]}
    hessian: dict[str, Mapping[int, Sequence[float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for seed in asked.seeds:
            images: Prepared | None = None
            for arm, calibration in _arms(seed, folder):
                started = time.perf_counter()
                if (seed, arm) in done and images is not None:
                    continue
                own = observed(opened, calibration, dtype=torch.float32)
                if (seed, arm) in done:
                    images, judges = own, judges_of(own)
                    continue
                own = _weighed(own) if arm == KEYS else own
                options = [Precision(bits, SIZE) for bits in BITS]
                stats = measure_prepared(own, ("frequency", "inverse_norm", *COSTS), options=options, seed=seed)
                if images is None:
                    images, judges = own, judges_of(own)
                    results["original"] = accuracy_of(judges["harder"](own.model))
                    results["original"]["plain"] = accuracy_of(judges["plain"](own.model))
                    if asked.probes and not hessian:
                        few = replace(calibration, samples=asked.hessian_samples, batch_size=4)
                        hessian = _hessian(own, calibrated(opened, few).batches, asked.probes, seed)
                        results["hessian_trace"] = {
                            "conversations": asked.hessian_samples, "probes": asked.probes, "seed": seed,
                            "relative_stderr": noise(hessian),
                        }  # fmt: skip
                    jobs = _all_maps(stats.with_metrics(hessian), own, seed)
                else:
                    jobs = _few_maps(stats, own, images)
                facts: dict[str, dict[str, Any]] = {}
                for quantized_by, job in jobs:
                    print(time.strftime("%H:%M:%S"), seed, arm, job.name, flush=True)
                    with tempfile.TemporaryDirectory(dir=folder) as at:
                        model = packed(quantized_by, stats, job, Path(at) / "packed", facts)
                        facts[job.name] |= judged(judges["harder"](model))
                        if arm == "images" and job.name in PLAIN:
                            facts[job.name]["plain"] = judged(judges["plain"](model))
                results["runs"].append({
                    "seed": seed, "arm": arm, "commit": START["commit"],
                    "seconds": round(time.perf_counter() - started, 1),
                    "tokens": stats.info["tokens"], "starved": stats.info["starved"], "rows": list(facts.values()),
                })  # fmt: skip
                store(asked.out, results)
                del own
                gc.collect()


def _harder(table: Sequence[Question]) -> list[Question]:
    """The same questions about images that are harder to read."""
    made = []
    for number, question in enumerate(table):
        with Image.open(io.BytesIO(base64.b64decode(str(question.images[0])))) as image:
            made.append(replace(question, images=(drawn.png(drawn.harder(image, number)),)))
    return made


def judges_of(own: Prepared, tables: Sequence[str] = ("harder", "plain")) -> dict[str, Callable[[nn.Module], Answers]]:
    """What tells how a model answers the held-out questions, and how far it is there from the original in ``own``.

    ``harder``: about images of less contrast and with noise. ``plain``: about the images as they are drawn.
    """
    plain = read_questions(bundled_images("heldout.tsv"))
    categories = [question.category for question in plain]
    processor = load_processor(own.source.path)

    def judge(table: Sequence[Question]) -> Callable[[nn.Module], Answers]:
        batches = question_batches(table, processor, 50)
        expected = answer_logits(own.model, batches)
        return lambda model: judge_answers(answer_logits(model, batches), batches, categories, expected)

    return {name: judge(plain if name == "plain" else _harder(plain)) for name in tables}


def _arms(seed: int, folder: Path) -> Iterator[tuple[str, Calibration]]:
    """What to calibrate on, about as many tokens of each; conversations with images first."""
    lines = [json.dumps(line) + "\n" for line in drawn.calibration_lines(CONVERSATIONS, DRAW_SEED + 1000 * seed)]
    conversations = folder / "conversations.jsonl"
    conversations.write_text("".join(lines), encoding="utf-8")
    images = Calibration(str(conversations), CONVERSATIONS, batch_size=16, seed=seed, cost_share=1.0)
    yield "images", images
    quizzes = folder / "quizzes.jsonl"
    first = QUIZ_SEED + 2 * CONVERSATIONS * seed
    asked = (drawn.quiz(first + number, 6) for number in range(2 * CONVERSATIONS))
    lines = [json.dumps({"text": "\n\n".join(_turn(q) for q in questions)}) + "\n" for questions in asked]
    quizzes.write_text("".join(lines), encoding="utf-8")
    yield "quizzes", Calibration(str(quizzes), CONVERSATIONS // 2, WINDOW, 16, seed, cost_share=1.0)
    yield "text", Calibration(None, CONVERSATIONS // 2, WINDOW, 16, seed, cost_share=1.0)
    yield f"images, text tokens count {WEIGHT:g}", replace(images, modality_weight=WEIGHT)
    yield KEYS, images


@torch.no_grad()
def _weighed(own: Prepared) -> Prepared:
    """What was observed, where image tokens count nothing but the share ``KEY`` of each conversation's that its text
    tokens attend to most, summed over layers and heads; tokens count 1 on average.
    """
    model = load_original(own.source.path, torch.float32, attn_implementation="eager")
    paid: list[Tensor] = []
    for name, module in model.named_modules():
        if name.endswith("self_attn") and not name.startswith("vision"):
            module.register_forward_hook(lambda module, given, out: paid.append(out[1].sum(1)))  # (batch, from, to)
    counts = []
    for batch in own.batches:
        model(**{name: value for name, value in batch.items() if name not in OURS})
        kept, image = batch["attention_mask"].bool(), batch["modality"].bool()
        text = kept & ~image
        received = (torch.stack(paid).sum(0) * text[:, :, None]).sum(1).masked_fill(~image, -1)
        paid.clear()
        wanted = (KEY * image.sum(1)).ceil().long()
        place = received.argsort(1, descending=True).argsort(1)
        counts.append((text | (image & (place < wanted[:, None])))[kept].float())
    weight = torch.cat(counts)
    weight /= weight.mean()
    return replace(own, routed={layer: replace(seen, token_weight=weight) for layer, seen in own.routed.items()})


def _turn(question: drawn.Question) -> str:
    """A question and its answer, as the model's template writes them."""
    return f"<|User|>: {question.text}\n\n<|Assistant|>: {question.answer}<｜end▁of▁sentence｜>"


def _hessian(
    own: Prepared, batches: Sequence[Mapping[str, Any]], probes: int, seed: int
) -> dict[str, Mapping[int, Sequence[float]]]:
    mean, error = hessian_trace(own.model, own.spec, batches, probes=probes, seed=seed)
    return {"hessian_trace": mean, "hessian_trace.stderr": error}


def _all_maps(stats: Stats, own: Prepared, seed: int) -> Iterator[tuple[Prepared, Job]]:
    """The maps of fidelity.py but for variants of the knapsack and controls of k-means, and one random draw."""
    left_out = ("whole experts", "output_error", "g128", "knapsack 3.0", f"random {DRAWS * seed + 1} ")
    left_out += tuple(f"{control} = k-means" for control in (f"random {DRAWS * seed}", "inverted"))
    for job in paper_maps(stats, seed, SIZE, (BUDGET, 3.0)):
        if not any(words in job.name for words in left_out):
            yield own, job


def _few_maps(stats: Stats, own: Prepared, images: Prepared) -> Iterator[tuple[Prepared, Job]]:
    """The maps that are measured with every calibration, and whose calibration quantizes them."""
    options = [Precision(bits, SIZE) for bits in BITS]
    yield own, Job("uniform 3", uniform_map(stats.model, [Precision(3, SIZE)]))
    best = allocate(stats, budget=f"{BUDGET}bpw", cost=COST, options=options)
    yield own, Job(KNAPSACK, best)
    yield images, Job(f"{KNAPSACK}, images' codes", best)


def judged(found: Answers) -> dict[str, Any]:
    """KL on the answers, over all and of each question as its share of the mean, and how many are right."""
    kl, each = found.divergence(), sum(found.tokens) / len(found.tokens)
    return {
        "kl": short(kl.value), "kl_low": short(kl.low), "kl_high": short(kl.high), **accuracy_of(found),
        "window_kl": [short(value / each) for value in found.kl],
    }  # fmt: skip


def accuracy_of(found: Answers) -> dict[str, Any]:
    shares = {category: short(value.value) for category, value in found.by_category().items()}
    whole = found.accuracy()
    return {
        "right": short(whole.value),
        "right_low": short(whole.low),
        "right_high": short(whole.high),
        "by_task": shares,
    }


if __name__ == "__main__":
    main()
