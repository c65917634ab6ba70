"""Train the bundled reference language model, a small OLMoE with really trained experts, on one CPU thread.

The parameters are those of ``transformers.OlmoeForCausalLM``; the training step runs its own lean forward
pass over them (bfloat16 matrix products, tokens sorted by expert, gathers instead of scatters), which is
several times faster on a CPU than the model's own. ``--check`` compares the two. The learning rate follows
a trapezoid (warm-up, constant, linear decay to zero), so a run can be resumed with another ``--steps`` while
it is in its constant part. The last steps use windows as long as the model's context.

    python scripts/reference_corpus.py --work build/reference-lm --text src/mopeq/assets/text
    python scripts/train_reference_lm.py --work build/reference-lm --text src/mopeq/assets/text \
        --out src/mopeq/assets/olmoe-tiny

The checkpoint in the ``--work`` folder is replaced atomically; ``--resume`` goes on from it.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
DOMAINS = ("code", "docs")
#: Rows of an expert's group are filled up to a multiple of this.
GROUP = 64
#: Query rows attended to at once.
BLOCK = 128


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of the training run."""

    steps: int = 5_750
    batch_tokens: int = 4_096
    window: int = 256
    long_window: int = 1_024
    long_fraction: float = 0.08
    learning_rate: float = 5e-3
    warmup_steps: int = 150
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    balance_early: float = 0.015
    balance_early_steps: int = 1_000
    balance: float = 0.006
    seed: int = 0


# ------------------------------------------------------------------------------------------
# Tokenizer and token stream


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer with the end-of-text and padding tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def read_corpus(work: Path) -> list[dict[str, str]]:
    """The training documents that ``reference_corpus.py`` wrote."""
    with (work / "train.jsonl").open(encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def prepare(work: Path, settings: Settings, vocabulary: int) -> tuple[Tokenizer, np.ndarray]:
    """The tokenizer and the token stream of the corpus, made on first use and kept in ``work``."""
    vocabulary_file, stream_file = work / "tokenizer.json", work / "tokens.npy"
    if vocabulary_file.exists() and stream_file.exists():
        return Tokenizer.from_file(str(vocabulary_file)), np.load(stream_file)
    documents = read_corpus(work)
    # A seeded fifth of the corpus is plenty for 2048 merges; the documents are already shuffled.
    sample = (document["text"] for index, document in enumerate(documents) if index % 5 == 0)
    tokenizer = train_tokenizer(sample, vocabulary)
    end = tokenizer.token_to_id(END_OF_TEXT)
    pieces: list[np.ndarray] = []
    for start in range(0, len(documents), 256):
        chunk = documents[start : start + 256]
        encoded = tokenizer.encode_batch([document["text"] for document in chunk])
        pieces.extend(np.asarray([*encoding.ids, end], dtype=np.uint16) for encoding in encoded)
    order = np.random.default_rng(settings.seed).permutation(len(pieces))
    stream = np.concatenate([pieces[index] for index in order])
    np.save(stream_file, stream)
    tokenizer.save(str(vocabulary_file))
    return tokenizer, stream


class Windows:
    """Windows of the token stream in a shuffled order that depends only on the seed and the position."""

    def __init__(self, stream: np.ndarray, seed: int) -> None:
        self.stream = stream
        self.seed = seed
        self.used = 0
        self._order: tuple[tuple[int, int], np.ndarray] | None = None

    def batch(self, rows: int, window: int) -> tuple[Tensor, Tensor]:
        """The next ``rows`` windows as inputs and targets."""
        count = (len(self.stream) - 1) // window
        picked = np.empty((rows, window + 1), dtype=np.int64)
        for row in range(rows):
            epoch, place = divmod(self.used // window, count)
            if self._order is None or self._order[0] != (epoch, window):
                generator = np.random.default_rng((self.seed, epoch, window))
                self._order = ((epoch, window), generator.permutation(count))
            start = int(self._order[1][place]) * window
            picked[row] = self.stream[start : start + window + 1]
            self.used += window
        tensor = torch.from_numpy(picked)
        return tensor[:, :-1].contiguous(), tensor[:, 1:].contiguous()


# ------------------------------------------------------------------------------------------
# Lean forward pass


class _Spread(torch.autograd.Function):
    """Rows of tokens at the places of their experts; the gradient is a gather, not a scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.tokens = x.shape[0]
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return grad.index_select(0, place).view(ctx.tokens, -1, grad.shape[1]).sum(1), None, None


class _Collect(torch.autograd.Function):
    """Rows back in the order of the tokens; rows that only fill a group up get no gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.shape = y.shape
        return y.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(0, place, grad), None


class _GroupedLinear(torch.autograd.Function):
    """A linear layer per group of consecutive rows, each with a weight matrix of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        out = x.new_empty(x.shape[0], weight.shape[1])
        start = 0
        for group, count in enumerate(counts):
            if count:
                torch.mm(x[start : start + count], weight[group].t(), out=out[start : start + count])
            start += count
        out[start:].zero_()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        start = 0
        for group, count in enumerate(ctx.counts):
            if count:
                rows = slice(start, start + count)
                torch.mm(grad[rows], weight[group], out=grad_x[rows])
                torch.mm(grad[rows].t(), x[rows], out=grad_weight[group])
            start += count
        grad_x[start:].zero_()
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def norm_and_rotate(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Query or key: normalised over all heads together, then rotated; (rows, heads, window, head size)."""
    rows, window, width = x.shape
    x = rms_norm(x, weight, eps).view(rows, window, heads, width // heads).transpose(1, 2).float()
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).bfloat16()


def swiglu(x: Tensor) -> Tensor:
    """The gated activation of the experts."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def log_sum_exp(logits: Tensor) -> Tensor:
    """Logarithm of the sum of exponentials of each row."""
    return logits.float().logsumexp(-1)


def probabilities_over(logits: Tensor, total: Tensor, scale: float) -> Tensor:
    """Softmax of the rows, given their :func:`log_sum_exp`, times ``scale``."""
    return ((logits.float() - total[:, None]).exp() * scale).to(logits.dtype)


class _CrossEntropy(torch.autograd.Function):
    """Mean negative log-likelihood in nats; the gradient is computed straight from the probabilities."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, pieces: tuple[Callable[..., Tensor], Callable[..., Tensor]]
    ) -> Tensor:
        total = pieces[0](logits)
        ctx.save_for_backward(logits, targets, total)
        ctx.softmax = pieces[1]
        return (total - logits.gather(1, targets[:, None])[:, 0].float()).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, total = ctx.saved_tensors
        out = ctx.softmax(logits, total, 1.0 / len(targets))
        rows = torch.arange(len(targets))
        hot = (logits[rows, targets].float() - total).exp() - 1.0
        out[rows, targets] = (hot / len(targets)).to(out.dtype)
        return out * grad.to(out.dtype) if float(grad) != 1.0 else out, None, None


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Causal softmax of attention scores; ``mask`` is added."""
    return (scores.float() + mask).softmax(-1).to(scores.dtype)


def combine(y: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the outputs of a token's experts."""
    tokens, chosen = weights.shape
    return (y.view(tokens, chosen, -1).float() * weights[..., None]).sum(1).to(y.dtype)


class LeanForward:
    """The loss of an ``OlmoeForCausalLM`` for training, computed from its own parameters."""

    def __init__(self, model: OlmoeForCausalLM, compile_pieces: bool) -> None:
        self.model = model
        self.config = model.config
        pieces: list[Callable[..., Tensor]] = [
            rms_norm,
            norm_and_rotate,
            swiglu,
            combine,
            masked_softmax,
            log_sum_exp,
            probabilities_over,
        ]
        if compile_pieces:
            # Attention meets one shape per block of query rows, in windows of both lengths.
            torch._dynamo.config.recompile_limit = 64
            pieces = [torch.compile(piece, dynamic=False) for piece in pieces]
        self.rms_norm, self.norm_and_rotate, self.swiglu, self.combine, self.masked_softmax = pieces[:5]
        self.cross_entropy_pieces = (pieces[5], pieces[6])
        self._tables: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def tables(self, window: int) -> tuple[Tensor, Tensor, Tensor]:
        """Cosines and sines of the rotary positions, and the causal mask."""
        if window not in self._tables:
            size = self.config.hidden_size // self.config.num_attention_heads
            theta = float(self.config.to_dict()["rope_parameters"]["rope_theta"])
            frequencies = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
            angles = torch.arange(window, dtype=torch.float64)[:, None] * frequencies
            angles = torch.cat((angles, angles), dim=-1)
            mask = torch.full((window, window), -math.inf).triu(1)
            self._tables[window] = (angles.cos().float(), angles.sin().float(), mask)
        return self._tables[window]

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Causal attention in blocks of query rows, so that what lies right of the diagonal costs little."""
        window, size = q.shape[2], q.shape[3]
        q = q * size**-0.5
        parts = []
        for start in range(0, window, BLOCK):
            stop = min(start + BLOCK, window)
            scores = q[:, :, start:stop] @ k[:, :, :stop].transpose(2, 3)
            parts.append(self.masked_softmax(scores, mask[start:stop, :stop]) @ v[:, :, :stop])
        return torch.cat(parts, dim=2)

    def experts(self, x: Tensor, layer: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Output of the mixture, its balance loss, and how many tokens went to each expert."""
        config, mixture = self.config, layer.mlp
        probabilities = F.linear(x.float(), mixture.gate.weight).softmax(-1)
        weights, chosen = probabilities.topk(config.num_experts_per_tok, dim=-1)
        if config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        flat = chosen.reshape(-1)
        order = flat.argsort(stable=True)
        load = torch.bincount(flat, minlength=config.num_experts)
        # Groups are filled up to a multiple of GROUP rows: with few distinct shapes the matrix products find
        # their kernels in oneDNN's cache instead of compiling new ones at every step.
        padded = (load + GROUP - 1) // GROUP * GROUP
        counts = padded.tolist()
        shift = (padded.cumsum(0) - padded) - (load.cumsum(0) - load)
        target = torch.arange(order.numel()) + shift[flat[order]]
        place = torch.empty_like(order).index_copy_(0, order, target)
        source = order.new_zeros(order.numel() + GROUP * config.num_experts)
        source.index_copy_(0, target, order // config.num_experts_per_tok)
        sorted_x = _Spread.apply(x, source, place)
        hidden = _GroupedLinear.apply(sorted_x, mixture.experts.gate_up_proj.bfloat16(), counts)
        y = _GroupedLinear.apply(self.swiglu(hidden), mixture.experts.down_proj.bfloat16(), counts)
        out = self.combine(_Collect.apply(y, place), weights)
        balance = config.num_experts * (load / load.sum() * probabilities.mean(0)).sum()
        return out, balance, load

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Language-model loss, balance loss (1 when even), and the load (layers x experts)."""
        config, body = self.config, self.model.model
        rows, window = inputs.shape
        heads, eps = config.num_attention_heads, config.rms_norm_eps
        cos, sin, mask = self.tables(window)
        x = body.embed_tokens.weight.bfloat16()[inputs]
        balances, loads = [], []
        for layer in body.layers:
            attention = layer.self_attn
            h = self.rms_norm(x, layer.input_layernorm.weight, eps)
            projections = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
            q, k, v = F.linear(h, torch.cat(projections).bfloat16()).chunk(3, dim=-1)
            q = self.norm_and_rotate(q, attention.q_norm.weight, eps, cos, sin, heads)
            k = self.norm_and_rotate(k, attention.k_norm.weight, eps, cos, sin, heads)
            h = self.attention(q, k, v.view(rows, window, heads, -1).transpose(1, 2), mask)
            h = h.transpose(1, 2).reshape(rows, window, -1)
            x = x + F.linear(h, attention.o_proj.weight.bfloat16())
            h = self.rms_norm(x, layer.post_attention_layernorm.weight, eps)
            out, balance, load = self.experts(h.view(rows * window, -1), layer)
            x = x + out.view_as(x)
            balances.append(balance)
            loads.append(load)
        x = self.rms_norm(x, body.norm.weight, eps).view(rows * window, -1)
        logits = F.linear(x, self.model.lm_head.weight.bfloat16())
        loss = _CrossEntropy.apply(logits, targets.reshape(-1), self.cross_entropy_pieces)
        return loss, torch.stack(balances).mean(), torch.stack(loads)


# ------------------------------------------------------------------------------------------
# Model, optimiser, checkpoint


def build_model(tokenizer: Tokenizer, norm_topk: bool, settings: Settings) -> OlmoeForCausalLM:
    """The untrained model."""
    torch.manual_seed(settings.seed)
    config = OlmoeConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        norm_topk_prob=norm_topk,
        # The loss of transformers counts every choice of a token: it is this one times the choices.
        router_aux_loss_coef=settings.balance / 2,
        tie_word_embeddings=False,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END_OF_TEXT),
        pad_token_id=tokenizer.token_to_id(PADDING),
    )
    model = OlmoeForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.experts.down_proj):
                weight.mul_((2 * config.num_hidden_layers) ** -0.5)
    return model


def build_optimizer(model: OlmoeForCausalLM, settings: Settings) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)


def decay_start(settings: Settings) -> int:
    """First step of the decay part."""
    return settings.steps - round(settings.steps * settings.decay_fraction)


def rate(step: int, settings: Settings) -> float:
    """Learning rate at ``step``: warm-up, constant, linear decay to zero."""
    start = decay_start(settings)
    warm = min(1.0, (step + 1) / settings.warmup_steps)
    cool = 1.0 if step < start else (settings.steps - step) / (settings.steps - start)
    return settings.learning_rate * warm * cool


def window_length(step: int, settings: Settings) -> int:
    """Tokens per window at ``step``: the last part of the run uses windows as long as the context."""
    long_start = settings.steps - round(settings.steps * settings.long_fraction)
    return settings.window if step < long_start else settings.long_window


def balance_weight(step: int, settings: Settings) -> float:
    """Weight of the balance loss: higher at first, so that no expert dies before it has learned something."""
    return settings.balance_early if step < settings.balance_early_steps else settings.balance


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that a reader never sees half of one."""
    scratch = path.with_suffix(".partial")
    torch.save(state, scratch)
    os.replace(scratch, path)


# ------------------------------------------------------------------------------------------
# Evaluation and export


def heldout_ids(tokenizer: Tokenizer, text_dir: Path) -> dict[str, Tensor]:
    """Token ids of the held-out text by domain."""
    return {
        domain: torch.tensor(tokenizer.encode((text_dir / f"heldout_{domain}.txt").read_text("utf-8")).ids)
        for domain in DOMAINS
    }


@torch.no_grad()
def perplexity(model: OlmoeForCausalLM, ids: Tensor, window: int = 512) -> float:
    """Perplexity over consecutive windows, every token but a window's first predicted."""
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        piece = ids[start : start + window][None]
        if piece.shape[1] < 2:
            continue
        logits = model(piece).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, piece[0, 1:], reduction="sum"))
        count += piece.shape[1] - 1
    return math.exp(total / count)


def unigram_perplexity(stream: np.ndarray, ids: Tensor, vocabulary: int) -> float:
    """Perplexity of a unigram model with add-one smoothing fitted on the training tokens."""
    counts = np.bincount(stream, minlength=vocabulary) + 1.0
    nats = -np.log(counts / counts.sum())
    return float(np.exp(nats[ids.numpy()].mean()))


@torch.no_grad()
def load_shares(model: OlmoeForCausalLM, ids: Tensor, window: int = 512) -> list[list[float]]:
    """Share of the routed tokens per expert, by layer."""
    config = model.config
    counts = torch.zeros(config.num_hidden_layers, config.num_experts)
    for start in range(0, len(ids) - 1, window):
        outputs = model(ids[start : start + window][None], output_router_logits=True)
        for layer, logits in enumerate(outputs.router_logits):
            chosen = logits.reshape(-1, config.num_experts).topk(config.num_experts_per_tok, dim=-1).indices
            counts[layer] += torch.bincount(chosen.reshape(-1), minlength=config.num_experts)
    shares = counts / counts.sum(1, keepdim=True)
    return [[round(float(value), 5) for value in row] for row in shares]


def export(
    model: OlmoeForCausalLM,
    tokenizer: Tokenizer,
    out: Path,
    text_dir: Path,
    stream: np.ndarray,
    settings: Settings,
    log: dict[str, Any],
) -> dict[str, Any]:
    """Write the model in bfloat16, the tokenizer and ``training.json``; return the latter."""
    out.mkdir(parents=True, exist_ok=True)
    halved = OlmoeForCausalLM(model.config)
    halved.load_state_dict(model.state_dict())
    halved = halved.bfloat16()
    halved.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, out, model.config.max_position_embeddings)
    reloaded = OlmoeForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    untrained = build_model(tokenizer, model.config.norm_topk_prob, settings).eval()
    held = heldout_ids(tokenizer, text_dir)
    vocabulary = tokenizer.get_vocab_size()
    log = dict(log)
    log["heldout_perplexity"] = {
        domain: {
            "tokens": len(ids),
            "model": round(perplexity(reloaded, ids), 4),
            "unigram_add_one": round(unigram_perplexity(stream, ids, vocabulary), 2),
            "untrained_model": round(perplexity(untrained, ids), 2),
        }
        for domain, ids in held.items()
    }
    everything = {**held, "all": torch.cat(list(held.values()))}
    log["expert_load_on_heldout"] = {domain: load_shares(reloaded, ids) for domain, ids in everything.items()}
    log["expert_load_max_over_min"] = [
        round(max(row) / max(min(row), 1e-9), 2) for row in log["expert_load_on_heldout"]["all"]
    ]
    (out / "training.json").write_text(to_json(log), encoding="utf-8")
    return log


def to_json(value: dict[str, Any]) -> str:
    """JSON with one line per innermost list."""
    import re

    text = json.dumps(value, indent=1)
    return re.sub(r"\[[^\[\]{}]*\]", lambda match: re.sub(r"\s+", " ", match.group()), text) + "\n"


def check(model: OlmoeForCausalLM, stream: np.ndarray) -> None:
    """Compare the lean loss with that of the model's own forward pass."""
    inputs, targets = Windows(stream, 0).batch(4, 256)
    with torch.no_grad():
        lean, _, _ = LeanForward(model, compile_pieces=False)(inputs, targets)
        logits = model.eval()(inputs).logits
        own = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
    print(f"lean bfloat16 loss {lean:.5f}, float32 loss of the model {own:.5f}", flush=True)
    if abs(float(lean) - float(own)) > 0.02:
        raise SystemExit("the two forward passes disagree")


# ------------------------------------------------------------------------------------------


def train(arguments: argparse.Namespace, settings: Settings) -> None:
    """Run the training and write the model."""
    torch.set_num_threads(arguments.threads)
    work: Path = arguments.work
    tokenizer, stream = prepare(work, settings, arguments.vocabulary)
    model = build_model(tokenizer, arguments.norm_topk_prob, settings)
    optimizer = build_optimizer(model, settings)
    windows = Windows(stream, settings.seed)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(stream):,} training tokens", flush=True)
    checkpoint = work / "checkpoint.pt"
    step, curve, seconds = 0, [], 0.0
    if arguments.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, curve, seconds, windows.used = state["step"], state["curve"], state["seconds"], state["used"]
        print(f"resumed at step {step}", flush=True)
    if arguments.check:
        check(model, stream)
        return
    lean = LeanForward(model, compile_pieces=not arguments.no_compile)
    held = heldout_ids(tokenizer, arguments.text)
    smooth: list[float] = []
    loads = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    tick = time.perf_counter()

    def snapshot() -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "curve": curve,
            "seconds": seconds,
            "used": windows.used,
        }

    while step < settings.steps:
        window = window_length(step, settings)
        inputs, targets = windows.batch(settings.batch_tokens // window, window)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, settings)
        loss, balance, load = lean(inputs, targets)
        (loss + balance_weight(step, settings) * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        value = float(loss.detach())
        if not math.isfinite(value):
            raise SystemExit(f"loss is {value} at step {step}")
        smooth.append(value)
        loads += load
        if step % arguments.log_every == 0 or step == settings.steps:
            now = time.perf_counter()
            seconds += now - tick
            speed = len(smooth) * settings.batch_tokens / (now - tick)
            tick = now
            mean = sum(smooth) / len(smooth)
            curve.append([step, round(mean, 4)])
            shares = loads / loads.sum(1, keepdim=True)
            spread = [f"{float(row.max()):.2f}/{float(row.min()):.3f}" for row in shares]
            print(
                f"step {step} loss {mean:.4f} balance {float(balance.detach()):.3f} norm {float(norm):.2f} "
                f"lr {rate(step - 1, settings):.2e} {speed:,.0f} tokens/s load {' '.join(spread)}",
                flush=True,
            )
            smooth.clear()
            loads.zero_()
        if step % arguments.save_every == 0 and step < settings.steps:
            save_atomically(snapshot(), checkpoint)
        if step % arguments.eval_every == 0 or step == settings.steps:
            model.eval()
            scores = {domain: round(perplexity(model, ids[:16_384]), 3) for domain, ids in held.items()}
            print(f"step {step} held-out perplexity {scores}", flush=True)
            model.train()
            tick = time.perf_counter()

    save_atomically(snapshot(), work / "final.pt")
    every = max(1, len(curve) // 100)
    log = {
        "command": "python scripts/train_reference_lm.py --work WORK --text TEXT --out OUT",
        "settings": asdict(settings),
        "norm_topk_prob": arguments.norm_topk_prob,
        "parameters": parameters,
        "corpus_tokens": len(stream),
        "tokens_seen": step * settings.batch_tokens,
        "tokens_per_parameter": round(step * settings.batch_tokens / parameters, 2),
        "threads": arguments.threads,
        "training_seconds": round(seconds),
        "tokens_per_second": round(step * settings.batch_tokens / max(seconds, 1e-9)),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "loss_curve_columns": ["step", "mean training loss in nats since the last entry"],
        "loss_curve": [entry for index, entry in enumerate(curve) if (index + 1) % every == 0],
        "corpus": json.loads((work / "corpus.json").read_text("utf-8")),
    }
    if arguments.out:
        log = export(model, tokenizer, arguments.out, arguments.text, stream, settings, log)
        print(
            json.dumps({key: log[key] for key in ("heldout_perplexity", "expert_load_max_over_min")}),
            flush=True,
        )


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with train.jsonl; holds the checkpoint")
    parser.add_argument("--text", type=Path, required=True, help="folder with the held-out text")
    parser.add_argument("--out", type=Path, help="folder for the finished model")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument(
        "--balance",
        type=float,
        default=Settings.balance,
        help="weight of the balance loss, after the first steps",
    )
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--norm-topk-prob", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=25)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--eval-every", type=int, default=500)
    parser.add_argument("--no-compile", action="store_true", help="do not compile the element-wise pieces")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the work folder")
    parser.add_argument("--check", action="store_true", help="only compare the two forward passes")
    arguments = parser.parse_args()
    settings = Settings(
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        balance=arguments.balance,
        seed=arguments.seed,
    )
    train(arguments, settings)


if __name__ == "__main__":
    main()
