"""How much routed experts must know by heart until two, three or four bits cost answers.

Decoders half as wide as that of the bundled vision-language model, with experts of several widths, learn its kinds of
facts about more names, as text alone and with its training code. Each is packed with uniform experts, the rest in its
usual bits, and asked all that it learned. Bits a weight are what the facts hold over the weights of the routed experts.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from common import ROOT, arguments, estimate, store
from mopeq.evaluate.answers import Answers, answer_logits, judge_answers
from mopeq.load import load
from mopeq.measure import Calibration, observed, open_model
from mopeq.pack import pack_model
from mopeq.precision import Precision, PrecisionMap

sys.path.insert(0, str(ROOT / "scripts"))
import reference_images as images
import train_reference_vlm as training

BITS = (2, 3, 4)
HIDDEN, HEADS, BATCH = 64, 2, 72
"""Of the decoder; questions in a step."""
SEQUENCES, LENGTH = 128, 128
"""Calibration."""
RATE, WARMUP = 2e-3, 50


def main() -> None:
    parser = arguments(__doc__ or "", "facts")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64], help="of an expert")
    parser.add_argument("--names", type=int, default=420)
    parser.add_argument("--steps", type=int, default=700)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    results: dict[str, Any] = {
        "hidden": HIDDEN, "layers": training.LAYERS, "experts": training.EXPERTS, "names": asked.names,
        "steps": asked.steps, "batch": BATCH, "rows": [],
    }  # fmt: skip
    for width in asked.widths:
        results["rows"].append(_case(width, table_of(asked.names), asked.steps))
        store(asked.out, results)


def table_of(names: int) -> list[images.Question]:
    """All facts about so many names."""
    pairs = ["".join(pair) for pair in itertools.permutations(images.CONSONANTS + images.VOWELS, 2)]
    chosen = random.Random("more names").sample(pairs, names)
    return [images.fact(name, relation, name) for name in chosen for relation in images.RELATIONS]


def _case(width: int, table: Sequence[images.Question], steps: int) -> dict[str, Any]:
    """Train a decoder on a table and see what it still knows at few bits."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        started = time.process_time()
        loss = trained(folder / "model", width, table, steps)
        seconds = time.process_time() - started
        text = folder / "text.jsonl"
        rng = random.Random("calibration")
        lines = ("\n\n".join(_turn(q) for q in rng.choices(table, k=8)) for _ in range(2 * SEQUENCES))
        text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
        opened = open_model(folder / "model")
        own = observed(opened, Calibration(str(text), SEQUENCES, LENGTH, 16), dtype=torch.float32)
        processor = training.DeepseekVLV2Processor.from_pretrained(folder / "model")
        batches = [
            training.inputs_of(processor, [images.conversation((q,)) for q in part])
            for part in training.chunks(table, 100)
        ]
        expected = answer_logits(own.model, batches)
        categories = [question.category for question in table]
        judged = judge_answers(expected, batches, categories, expected)
        known = sum(math.log2(len(images.RELATIONS[relation][1].split())) for relation in images.RELATIONS)
        weights = opened.inventory.expert_parameters
        row: dict[str, Any] = {
            "width": width, "facts": len(table), "weights": weights, "loss": loss, "seconds": seconds,
            "bits": known * len(table) / len(images.RELATIONS) / weights,
            "right": judged.accuracy().value, "uniform": [],
        }  # fmt: skip
        for bits in BITS:
            whole = PrecisionMap.uniform(opened.inventory.experts, Precision(bits, -1))
            packed = pack_model(own, whole, folder / f"packed-{bits}").path
            found = judge_answers(
                answer_logits(load(packed, dtype=torch.float32), batches), batches, categories, expected
            )
            row["uniform"].append({"precision": bits, **compared(found, judged)})
        print(time.strftime("%H:%M:%S"), json.dumps(row), flush=True)
        return row


def trained(out: Path, width: int, table: Sequence[images.Question], steps: int) -> float:
    """A decoder that was asked random lines of the table, written to ``out``; nats a token of its last 50 steps."""
    out.mkdir()
    processor = training.build_processor(out)
    config = training.configuration(len(processor.tokenizer))
    config["language_config"] |= {
        "hidden_size": HIDDEN, "moe_intermediate_size": width, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
    }  # fmt: skip
    config["projector_config"]["n_embed"] = HIDDEN
    model = training.build_model(config, 0)
    settings = training.Settings()
    optimizers = training.build_optimizers(model, settings)
    dropout, routers = training.SharedDropout(model, settings.shared_dropout), training.Routers(model)
    losses = []
    for step in range(steps):
        dropout.rng.seed(f"shared {step}")
        drawn = random.Random(f"facts {step}").choices(table, k=BATCH)
        inputs = training.inputs_of(processor, [images.conversation(tuple(part)) for part in training.chunks(drawn, 6)])
        labels = inputs.pop("labels")[:, 1:]
        asked = labels != -100
        loss = F.cross_entropy(model(**inputs, use_cache=False).logits[:, :-1][asked], labels[asked])
        balance, _ = routers.balance(inputs["attention_mask"].flatten().bool())
        (loss + settings.balance * balance).backward()
        rate = RATE * min(1.0, (step + 1) / WARMUP, (steps - step) / (steps / 2))
        training.advance(optimizers, model, rate, settings.clip)
        losses = [*losses[-49:], float(loss.detach())]
    _written(model, config, out)
    return sum(losses) / len(losses)


def _written(model: nn.Module, config: dict[str, Any], out: Path) -> None:
    """In bfloat16 under the published names."""
    halved = training.DeepseekVL2ForConditionalGeneration(training.DeepseekVL2Config(**config))
    halved.load_state_dict(model.state_dict())
    halved.bfloat16().save_pretrained(out)
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")


def compared(found: Answers, original: Answers) -> dict[str, Any]:
    """How many answers are right, the difference from the original on the same questions, and KL."""
    gap = estimate([a - b for a, b in zip(found.right, original.right, strict=True)])
    return {"right": found.accuracy().value, "gap": gap.value, "gap_low": gap.low, "gap_high": gap.high,
            "kl": found.divergence().value}  # fmt: skip


def _turn(question: images.Question) -> str:
    """A question and its answer, as the model's template writes them."""
    return f"<|User|>: {question.text}\n\n<|Assistant|>: {question.answer}{training.END}"


if __name__ == "__main__":
    main()
