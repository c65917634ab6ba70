"""How much routed experts must know by heart until two, three or four bits cost answers.

Small decoders of one width and of experts of several widths learn numbers of several lengths that belong to names, as
text alone, in the words and with the training code of the bundled vision-language model. Each is packed with uniform
experts, everything else in 16 bits, and asked all that it learned; an answer is right if every figure is. Bits a weight
are what the table holds over the weights of the routed experts.
"""

from __future__ import annotations

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

BITS, METHODS = (2, 3, 4), ("gptq", "rtn")
HIDDEN, HEADS, BATCH = 64, 2, 72
"""Of the decoder; questions in a step."""
SEQUENCES, LENGTH = 128, 128
"""Calibration."""
RATE, WARMUP = 2e-3, 50


def main() -> None:
    parser = arguments(__doc__ or "", "facts")
    parser.add_argument("--cases", nargs="+", default=["64x4", "16x4", "16x8"], help="width of experts x figures")
    parser.add_argument("--names", type=int, default=320)
    parser.add_argument("--steps", type=int, default=800)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    results: dict[str, Any] = {
        "hidden": HIDDEN, "layers": training.LAYERS, "experts": training.EXPERTS, "names": asked.names,
        "steps": asked.steps, "batch": BATCH, "rows": [],
    }  # fmt: skip
    for case in asked.cases:
        width, figures = map(int, case.split("x"))
        results["rows"].append(_case(width, table_of(asked.names, figures), asked.steps))
        store(asked.out, results)


def table_of(names: int, figures: int) -> list[images.Question]:
    """A number of so many figures for each of so many names, as good as random and always the same."""
    pairs = [first + second for first in images.CONSONANTS for second in images.CONSONANTS + images.VOWELS]
    rng = random.Random("numbers")
    chosen = rng.sample(pairs, names)
    return [
        images.Question("number", f"Which number has {name}?", "".join(rng.choices("0123456789", k=figures)))
        for name in chosen
    ]


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
        judged = judge_answers(expected, batches, ["number"] * len(table), expected)
        known = len(table) * len(table[0].answer) * math.log2(10)
        weights = opened.inventory.expert_parameters
        row: dict[str, Any] = {
            "width": width, "figures": len(table[0].answer), "weights": weights, "bits": known / weights,
            "loss": loss, "seconds": seconds, "right": judged.accuracy().value, "uniform": [],
        }  # fmt: skip
        for method in METHODS:
            for bits in BITS:
                whole = PrecisionMap.uniform(opened.inventory.experts, Precision(bits, -1))
                packed = pack_model(own, whole, folder / f"{method}-{bits}", method=method).path
                found = answer_logits(load(packed, dtype=torch.float32), batches)
                row["uniform"].append({"method": method, "precision": bits} | compared(
                    judge_answers(found, batches, ["number"] * len(table), expected), judged
                ))  # fmt: skip
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
