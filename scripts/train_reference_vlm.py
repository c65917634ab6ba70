"""Train the bundled vision-language model, a small DeepSeek-VL2 with really trained experts, on one CPU thread.

The model is mopeq's own ``DeepseekVL2ForConditionalGeneration`` with a published-style configuration, its inputs come
from the package's processor, and its lessons from ``reference_images.py``: every step draws new scenes, with up to
four questions each, and quizzes without an image, and learns the answers alone.

    python scripts/reference_images.py --out src/mopeq/assets/vlm
    python scripts/train_reference_vlm.py --work build/reference-vlm --data src/mopeq/assets/vlm \
        --out src/mopeq/assets/deepseek-vl2-tiny

The checkpoint in the ``--work`` folder is replaced atomically; ``--resume`` goes on from it, with the same settings.
Every random choice depends on the seed and the step alone, so that a resumed run is the run that was not stopped.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import string
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import mopeq.models.register  # noqa: F401  (the published tensors' names)
import reference_images as images
from mopeq.models.configuration import DeepseekVL2Config
from mopeq.models.deepseek_vl2 import DeepseekVL2ForConditionalGeneration
from mopeq.models.processing_deepseek_vl2 import DeepseekVLV2Processor, tiles_of

BEGIN, END, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
TILE, PATCH, TOWER, WIDTH, EXPERT, LAYERS, EXPERTS, TOP_K = images.SIDE, 12, 128, 64, 32, 3, 16, 2
HEAD = 32
"""Width of a head of attention in the decoder."""
SCALE = EXPERTS / TOP_K
"""Factor of the routing weights, which are not renormalised: evenly routed, a token's experts then weigh one each."""
RESOLUTIONS = [[TILE, TILE], [TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]
MOST_QUIZZES = 12
"""In a step of any phase."""
WIDE = "word"
"""The kind of scene whose images are two tiles wide."""


SHARES = {kind: share for kind, (_, share) in images.KINDS.items()}


@dataclass(frozen=True)
class Phase:
    """Some steps at a learning rate that rises linearly over ``warmup`` steps and falls to zero over ``decay``.

    shares: of the kinds of scene. quizzes: conversations without an image in a step.
    """

    steps: int
    warmup: int
    decay: int
    learning_rate: float
    shares: Mapping[str, float]
    quizzes: int = 0

    def rate(self, step: int) -> float:
        """Learning rate at a step of the phase."""
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, (self.steps - step) / self.decay)


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of the training run."""

    tower: Phase = Phase(400, 100, 200, 3e-3, SHARES)
    tower_scenes: int = 64
    phases: tuple[Phase, ...] = (
        Phase(800, 100, 300, 2e-3, SHARES, quizzes=12),
        Phase(600, 20, 400, 2e-3, {"digit": 0.1, "shapes": 0.5, "word": 0.02, "name": 0.05, "chart": 0.33}, quizzes=4),
        Phase(400, 20, 300, 2e-3, {"digit": 0.06, "shapes": 0.5, "word": 0.04, "name": 0.05, "chart": 0.35}, quizzes=4),
    )
    shared_dropout: float = 0.5
    scenes: int = 24
    questions: int = 4
    quiz_questions: int = 6
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    balance: float = 0.005
    seed: int = 0

    def at(self, step: int) -> tuple[Phase, int]:
        """The phase of a step, and the step in it."""
        for phase in self.phases:
            if step < phase.steps:
                return phase, step
            step -= phase.steps
        raise ValueError(f"step {step} beyond the last phase")


def build_tokenizer(most: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the questions' and answers' words, with DeepSeek-VL2's special tokens.

    Every byte is a token, and words of capitals and numbers are not merged, so that they are spelled.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=most,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    spelled = string.ascii_uppercase + string.digits
    asked = [q for kind in images.KINDS for seed in range(400) for q in images.scene(seed, kind, most=99).questions]
    texts = [f"{q.text}\n\n" for q in asked] + [q.answer.strip(spelled) for q in asked]
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_processor(work: Path) -> DeepseekVLV2Processor:
    """The processor, which completes the tokenizer; made on first use and kept in ``work``."""
    if not (work / "processor_config.json").exists():
        tokenizer = build_tokenizer(640)
        DeepseekVLV2Processor(tokenizer, candidate_resolutions=RESOLUTIONS, patch_size=PATCH).save_pretrained(work)
    return DeepseekVLV2Processor.from_pretrained(work)


def configuration(vocabulary: int) -> dict[str, Any]:
    """``config.json`` as DeepSeek publishes its own."""
    return {
        "model_type": "deepseek_vl_v2",
        "tile_tag": "2D",
        "global_view_pos": "head",
        "candidate_resolutions": RESOLUTIONS,
        "torch_dtype": "bfloat16",
        "language_config": {
            "model_type": "deepseek_v2",
            "architectures": ["DeepseekV2ForCausalLM"],
            "vocab_size": vocabulary,
            "hidden_size": WIDTH,
            "intermediate_size": 3 * WIDTH,
            "moe_intermediate_size": EXPERT,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": WIDTH // HEAD,
            "num_key_value_heads": WIDTH // HEAD,
            "n_shared_experts": 1,
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "first_k_dense_replace": 0,
            "moe_layer_freq": 1,
            "max_position_embeddings": 512,
            "routed_scaling_factor": SCALE,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "use_mla": False,
            "q_lora_rank": None,
            "kv_lora_rank": None,
            "qk_nope_head_dim": 0,
            "qk_rope_head_dim": 0,
            "v_head_dim": 0,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.05,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "torch_dtype": "bfloat16",
        },
        "projector_config": {
            "model_type": "mlp_projector",
            "projector_type": "downsample_mlp_gelu",
            "input_dim": TOWER,
            "n_embed": WIDTH,
            "depth": 2,
            "mlp_ratio": 1,
            "downsample_ratio": 2,
        },
        "vision_config": {
            "model_type": "vision",
            "model_name": "siglip_so400m_patch14_384",
            "image_size": TILE,
            "patch_size": PATCH,
            "width": TOWER,
            "layers": 3,
            "heads": 4,
            "mlp_ratio": 4,
        },
    }


def build_model(config: dict[str, Any], seed: int) -> DeepseekVL2ForConditionalGeneration:
    """The untrained model."""
    torch.manual_seed(seed)
    model = DeepseekVL2ForConditionalGeneration(DeepseekVL2Config(**config))
    model.language.model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, weight in model.language.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                weight.mul_((2 * LAYERS) ** -0.5)
    return model


def build_optimizers(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the hidden layers' matrices, AdamW for the rest; weight decay on matrices only."""
    hidden, matrices, vectors = [], [], []
    for name, weight in model.named_parameters():
        inner = "layers." in name and weight.ndim == 2 and not name.endswith("mlp.gate.weight")
        (hidden if inner else matrices if weight.ndim > 1 else vectors).append(weight)
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(hidden, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, betas=settings.betas, fused=True),
    ]


# ------------------------------------------------------------------------------------------
# Lessons


class Lessons:
    """Batches of scenes of one size, in an order that depends only on the seed and the step."""

    def __init__(self, processor: DeepseekVLV2Processor, settings: Settings) -> None:
        self.processor, self.settings = processor, settings

    def quizzes(self, step: int) -> dict[str, Tensor]:
        """What is asked without an image in a step."""
        phase, _ = self.settings.at(step)
        first = (self.settings.seed * 10_000_000) + step * MOST_QUIZZES + 3_000_017
        asked = [images.quiz(first + n, self.settings.quiz_questions) for n in range(phase.quizzes)]
        return inputs_of(self.processor, [images.conversation(questions) for questions in asked])

    def scenes(self, step: int) -> dict[str, Tensor]:
        """What is asked about images in a step."""
        rng = random.Random(f"{self.settings.seed} {step}")
        first = (self.settings.seed * 10_000_000) + step * self.settings.scenes + 3_000_017
        shares = self.settings.at(step)[0].shares
        wide = rng.random() < shares[WIDE]
        kinds = [kind for kind in shares if (kind == WIDE) == wide]
        drawn = rng.choices(kinds, [shares[kind] for kind in kinds], k=self.settings.scenes)
        scenes = [images.scene(first + number, kind, most=self.settings.questions) for number, kind in enumerate(drawn)]
        return inputs_of(self.processor, [conversation(made) for made in scenes])


def conversation(made: images.Scene) -> list[dict[str, Any]]:
    """A scene as messages, with its image in them."""
    messages: list[dict[str, Any]] = list(images.conversation(made.questions, "<image>\n"))
    messages[0] = {**messages[0], "images": [made.image]}
    return messages


def inputs_of(processor: DeepseekVLV2Processor, conversations: Sequence[Any]) -> dict[str, Tensor]:
    """The model's inputs, and ``labels``: -100 everywhere but at answers."""
    made = processor.apply_chat_template(
        list(conversations), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    inputs = dict(made)
    answers = inputs.pop("assistant_masks").bool()
    inputs["labels"] = torch.where(answers, inputs["input_ids"], -100)
    return inputs


class OneTile:
    """While it is on, the tower runs once for an image of one tile, whose global view is the same picture."""

    def __init__(self, tower: nn.Module) -> None:
        self.on = False
        tower.register_forward_pre_hook(self._first)
        tower.register_forward_hook(self._twice)

    def _first(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (arguments[0][::2], *arguments[1:]) if self.on else None

    def _twice(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        if self.on:
            output.last_hidden_state = output.last_hidden_state.repeat_interleave(2, dim=0)
        return output


class SharedDropout:
    """Leaves a layer's shared expert out of some steps, so that the routed ones learn to do without it."""

    def __init__(self, model: nn.Module, share: float) -> None:
        self.share, self.rng = share, random.Random()
        for name, module in model.named_modules():
            if name.endswith("mlp.shared_experts"):
                module.register_forward_hook(self._drop)

    def _drop(self, module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        return output * (0.0 if self.rng.random() < self.share else 1 / (1 - self.share))


class Routers:
    """What the routers say in a forward pass, and how much it counts."""

    def __init__(self, model: nn.Module) -> None:
        self.logits: list[Tensor] = []
        for name, module in model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(lambda _m, _a, output: self.logits.append(output[0]))

    def balance(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """The balance loss, 1 where even, and the load (layers, experts); the logits are let go."""
        losses, loads = [], []
        for logits in self.logits:
            probabilities = logits[keep].softmax(-1)
            load = torch.bincount(probabilities.topk(TOP_K).indices.flatten(), minlength=EXPERTS).float()
            losses.append(EXPERTS * (load / load.sum() * probabilities.mean(0)).sum())
            loads.append(load)
        self.logits.clear()
        return torch.stack(losses).mean(), torch.stack(loads)


# ------------------------------------------------------------------------------------------
# The tower alone


def seen(step: int, settings: Settings, processor: DeepseekVLV2Processor) -> tuple[Tensor, Tensor]:
    """Tiles (tiles, 3, side, side), and what is in their quarters: (tiles, 4, marks), 1 or 0."""
    rng = random.Random(f"tower {settings.seed} {step}")
    shares = settings.tower.shares
    drawn = rng.choices(list(shares), list(shares.values()), k=settings.tower_scenes)
    tiles, marks = [], []
    for number, kind in enumerate(drawn):
        made = images.scene(settings.seed * 10_000_000 + step * settings.tower_scenes + number + 6_000_011, kind)
        width = made.image.width
        views = tiles_of(made.image, (width, TILE), TILE, processor.image_mean, processor.image_std)
        tiles.append(torch.from_numpy(views[1:]))
        grid = torch.zeros(2, width // images.CELL, len(images.MARKS))
        for place, names in enumerate(made.marks):
            for name in names:
                grid[place // grid.shape[1], place % grid.shape[1], images.MARKS.index(name)] = 1
        marks.append(torch.stack([part.flatten(0, 1) for part in grid.split(2, dim=1)]))
    return torch.cat(tiles), torch.cat(marks)


def train_tower(
    model: DeepseekVL2ForConditionalGeneration, processor: DeepseekVLV2Processor, settings: Settings
) -> list[list[float]]:
    """Teach tower and projector to tell what is in each quarter of a tile, by a linear head that is thrown away.

    The published models start from a trained tower as well. Returns the curve: step, loss in nats a quarter.
    """
    torch.manual_seed(settings.seed)
    for layer in model.projector.modules():  # drawn again, so that nothing here depends on the decoder
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    head = nn.Linear(WIDTH, len(images.MARKS))
    together = nn.ModuleDict({"vision": model.vision, "projector": model.projector, "head": head})
    optimizers = build_optimizers(together, settings)
    curve, losses = [], []
    for step in range(settings.tower.steps):
        tiles, marks = seen(step, settings, processor)
        found = head(model.projector(model.vision(tiles).last_hidden_state).flatten(1, 2))
        loss = F.binary_cross_entropy_with_logits(found, marks, reduction="sum") / found[..., 0].numel()
        loss.backward()
        advance(optimizers, together, settings.tower.rate(step), settings.clip)
        losses.append(float(loss.detach()))
        if (step + 1) % 25 == 0:
            curve.append([step + 1, round(sum(losses) / len(losses), 4)])
            right = ((found > 0) == marks.bool()).all(-1).float().mean()
            print(
                f"tower step {step + 1} loss {curve[-1][1]:.4f}, {float(right):.2f} of the quarters right", flush=True
            )
            losses.clear()
    return curve


def advance(optimizers: list[torch.optim.Optimizer], model: nn.Module, learning_rate: float, clip: float) -> None:
    """One step of the optimizers."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


# ------------------------------------------------------------------------------------------
# Judging


def heldout(folder: Path) -> list[dict[str, str]]:
    """The held-out questions."""
    with (folder / "heldout.tsv").open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle, delimiter="\t"))


def chunks(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive pieces."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


@torch.no_grad()
def accuracy(
    model: DeepseekVL2ForConditionalGeneration, processor: DeepseekVLV2Processor, rows: Sequence[dict[str, str]]
) -> dict[str, float]:
    """Share of the answers, of each category, that greedy decoding would give exactly.

    It gives an answer exactly if and only if each of its tokens is the likeliest after those before it.
    """
    right: dict[str, list[bool]] = {}
    for part in chunks(rows, 50):
        asked = [
            [
                {"role": "user", "content": "<image>\n" + row["question"],
                 "images": [f"data:image/png;base64,{row['image']}"]},
                {"role": "assistant", "content": row["answer"]},
            ]
            for row in part
        ]  # fmt: skip
        inputs = inputs_of(processor, asked)
        labels = inputs.pop("labels")[:, 1:]
        best = model(**inputs, use_cache=False).logits[:, :-1].argmax(-1)
        for row, good in zip(part, ((best == labels) | (labels == -100)).all(1).tolist(), strict=True):
            right.setdefault(row["category"], []).append(good)
    return {category: sum(found) / len(found) for category, found in right.items()}


def chance(rows: Sequence[dict[str, str]]) -> dict[str, float]:
    """Share of the answers, of each category, that the category's most frequent one gets."""
    answers: dict[str, list[str]] = {}
    for row in rows:
        answers.setdefault(row["category"], []).append(row["answer"])
    return {category: max(map(found.count, found)) / len(found) for category, found in answers.items()}


# ------------------------------------------------------------------------------------------


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that a reader never sees half of one."""
    scratch = path.with_suffix(".partial")
    torch.save(state, scratch)
    os.replace(scratch, path)


def export(
    model: DeepseekVL2ForConditionalGeneration,
    processor: DeepseekVLV2Processor,
    config: dict[str, Any],
    out: Path,
    log: dict[str, Any],
    rows: Sequence[dict[str, str]],
) -> None:
    """Write the model in bfloat16 under the published names, its processor and ``training.json``."""
    out.mkdir(parents=True, exist_ok=True)
    halved = DeepseekVL2ForConditionalGeneration(DeepseekVL2Config(**config))
    halved.load_state_dict(model.state_dict())
    halved.bfloat16().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    processor.save_pretrained(out)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    again = DeepseekVL2ForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    processor = DeepseekVLV2Processor.from_pretrained(out)
    log["heldout_accuracy"] = accuracy(again, processor, rows)
    log["heldout_most_frequent_answer"] = chance(rows)
    with torch.no_grad():
        for name, weight in again.named_parameters():
            if ".mlp.experts." in name:
                weight.zero_()
    log["heldout_accuracy_without_routed_experts"] = accuracy(again, processor, rows)
    (out / "training.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: log[name] for name in log if name.startswith("heldout")}, indent=1), flush=True)


def train(arguments: argparse.Namespace, settings: Settings) -> None:
    """Run the training and write the model."""
    torch.set_num_threads(1)
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    processor = build_processor(work)
    config = configuration(len(processor.tokenizer))
    model = build_model(config, settings.seed)
    optimizers = build_optimizers(model, settings)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(processor.tokenizer)} tokens", flush=True)
    rows = heldout(arguments.data)
    lessons, routers, once = Lessons(processor, settings), Routers(model), OneTile(model.vision)
    dropout = SharedDropout(model, settings.shared_dropout)
    checkpoint = work / "checkpoint.pt"
    step, curve, tower, seconds = 0, [], [], 0.0
    tick = time.process_time()
    if arguments.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False)
        if state["settings"] != asdict(settings):
            raise SystemExit(f"{checkpoint} is of a run with other settings; give the same ones, or leave out --resume")
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        step, curve, tower, seconds = (state[name] for name in ("step", "curve", "tower", "seconds"))
        print(f"resumed at step {step}", flush=True)
    else:
        tower = train_tower(model, processor, settings)
        now = time.process_time()
        seconds, tick = now - tick, now
    losses: dict[str, list[float]] = {"scenes": [], "quizzes": []}
    loads = torch.zeros(LAYERS, EXPERTS)

    def save() -> None:
        parts = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        logged = {"step": step, "curve": curve, "tower": tower, "seconds": seconds, "settings": asdict(settings)}
        save_atomically({**parts, **logged}, checkpoint)

    if step == 0:
        save()
    last = sum(phase.steps for phase in settings.phases)
    while step < last:
        dropout.rng.seed(f"shared {settings.seed} {step}")
        for kind, inputs in (("scenes", lessons.scenes(step)), ("quizzes", lessons.quizzes(step))):
            labels = inputs.pop("labels")[:, 1:]
            once.on = "images" in inputs and inputs["images"].shape[1] == 2
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            asked = labels != -100
            loss = F.cross_entropy(logits[asked], labels[asked])
            balance, load = routers.balance(inputs["attention_mask"].flatten().bool())
            (loss + settings.balance * balance).backward()
            loads += load
            losses[kind].append(float(loss.detach()))
            if not math.isfinite(losses[kind][-1]):
                raise SystemExit(f"loss is {losses[kind][-1]} at step {step}")
        phase, at = settings.at(step)
        advance(optimizers, model, phase.rate(at), settings.clip)
        step += 1
        if step % arguments.log_every == 0 or step == last:
            now = time.process_time()
            seconds, tick = seconds + now - tick, now
            means = [round(sum(found) / len(found), 4) for found in losses.values()]
            curve.append([step, *means])
            shares = loads / loads.sum(1, keepdim=True)
            spread = " ".join(f"{float(row.max()):.2f}/{float(row.min()):.3f}" for row in shares)
            print(f"step {step} loss {means} balance {float(balance.detach()):.3f} {seconds:.0f} s load {spread}",
                  flush=True)  # fmt: skip
            for found in losses.values():
                found.clear()
            loads.zero_()
        if step % arguments.eval_every == 0 or step == last:
            once.on = False
            model.eval()
            scores = accuracy(model, processor, rows[:: arguments.eval_every_row])
            print(f"step {step} held-out { ({k: round(v, 2) for k, v in scores.items()}) }", flush=True)
            model.train()
            routers.logits.clear()
            tick = time.process_time()
        if step % arguments.save_every == 0 or step == last:
            save()
    log = {
        "command": "python scripts/train_reference_vlm.py --work WORK --data DATA --out OUT",
        "settings": asdict(settings),
        "parameters": parameters,
        "training_cpu_seconds": round(seconds),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "loss_curve_columns": [
            "step",
            *(f"nats a token of the answers of {kind} since the last entry" for kind in losses),
        ],
        "loss_curve": curve,
        "tower_curve_columns": ["step", "mean loss in nats a quarter of a tile since the last entry"],
        "tower_curve": tower,
    }
    if arguments.out:
        export(model.eval(), processor, config, arguments.out, log, rows)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder with heldout.tsv")
    parser.add_argument("--out", type=Path, help="folder for the finished model")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--eval-every", type=int, default=400)
    parser.add_argument("--save-every", type=int, default=50, help="a multiple of --log-every")
    parser.add_argument("--eval-every-row", type=int, default=4, help="judge by every so-manieth held-out question")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the work folder")
    arguments = parser.parse_args()
    settings = Settings(seed=arguments.seed)
    train(arguments, settings)


if __name__ == "__main__":
    main()
