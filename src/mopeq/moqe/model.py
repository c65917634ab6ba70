"""Language variants behind their router: choose for each prompt, run each variant once on its part of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopeq.errors import CheckpointError, InputError
from mopeq.load import load_tokenizer
from mopeq.moqe.pool import Pool, embedding_key, load_variant
from mopeq.moqe.router import PromptRouter, read_router
from mopeq.moqe.store import VariantSet, read_set, tensor_files, tensor_of
from mopeq.runtime.generate import Generation, Messages, generate, generate_many, render

__all__ = ["Moqe", "load", "open_language"]

Prompt = str | Messages


class Moqe:
    """A router and its variants. ``made``: the set; ``pool``: the variants in memory; ``tokenizer``: theirs."""

    def __init__(self, made: VariantSet, pool: Pool, table: Tensor, tokenizer: Any, dtype: torch.dtype | None) -> None:
        self.made, self.pool, self.table, self.tokenizer = made, pool, table, tokenizer
        self.dtype = dtype
        self._router: PromptRouter | None = None

    @property
    def router(self) -> PromptRouter:
        """The router; :class:`InputError` where none is trained yet."""
        if self._router is None:
            router = read_router(self.made)[0]
            if not isinstance(router, PromptRouter):
                raise CheckpointError(f"the router of {self.made.path} is for images; train it again")
            self._router = router.to(self.table.device)
        return self._router

    def router_inputs(self, prompts: Sequence[Tensor], tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """Embedded last tokens (batch, tokens, H) of prompts int64 (n,), and which are there, bool (batch, tokens)."""
        most = tokens or self.router.shape.tokens
        ends = [prompt[-most:] for prompt in prompts]
        longest = max(len(end) for end in ends)
        ids = torch.zeros(len(ends), longest, dtype=torch.int64, device=self.table.device)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, end in enumerate(ends):
            ids[row, : len(end)] = end
            mask[row, : len(end)] = True
        return self.table[ids].float(), mask

    def route(self, prompts: Sequence[Tensor]) -> list[str]:
        """The variant for each prompt int64 (n,), from the prompt alone."""
        if any(len(prompt) == 0 for prompt in prompts):
            raise InputError("the prompt is empty; give at least one token")
        with torch.inference_mode():
            chosen = self.router(*self.router_inputs(prompts)).argmax(1).tolist()
        return [self.made.names[i] for i in chosen]

    def logits(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, prompt_tokens: int | None = None
    ) -> Tensor:
        """Logits (batch, tokens, vocabulary) of sequences int64 (batch, tokens), each through its own variant.

        ``prompt_tokens``: only so many tokens of each are known when the choice is made; None takes all, which is
        right for the logits of what comes next and wrong for scoring the sequence itself.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [row[kept.bool()][:prompt_tokens] for row, kept in zip(input_ids, mask, strict=True)]
        result: Tensor | None = None
        for name, rows in self.grouped(self.route(prompts)).items():
            with torch.inference_mode():
                part = self.pool(name)(input_ids=input_ids[rows], attention_mask=mask[rows], use_cache=False).logits
            if result is None:
                result = part.new_empty(len(input_ids), *part.shape[1:])
            result[rows] = part
        assert result is not None
        return result

    def grouped(self, routes: Sequence[str]) -> dict[str, list[int]]:
        """Rows of a batch by variant, what is in memory first."""
        return {name: [i for i, route in enumerate(routes) if route == name] for name in self.pool.ordered(routes)}

    def generate(
        self,
        prompt: str | tuple[Mapping[str, str], ...] | list[str],
        *,
        max_new_tokens: int | None = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stream: Callable[[str], None] | None = None,
    ) -> Any:
        """Continue a text or a conversation, a tuple of messages (a :class:`Generation`), or a list of texts (a list).

        Arguments as :func:`mopeq.runtime.generate.generate`; only a single prompt can be streamed. The variant is
        chosen once, so that one cache of keys and values is enough.
        """
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed
        }  # fmt: skip
        if isinstance(prompt, list):
            if stream is not None:
                raise InputError("a list of prompts cannot be streamed; give one prompt, or leave out stream")
            return self._generate_many([self.encode(text) for text in prompt], options)
        (name,) = self.route([self.encode(prompt)])
        return generate(self.pool(name), self.tokenizer, prompt, stream=stream, **options)

    def _generate_many(self, prompts: list[Tensor], options: dict[str, Any]) -> list[Generation]:
        if not prompts:
            return []
        made: list[Generation | None] = [None] * len(prompts)
        for name, rows in self.grouped(self.route(prompts)).items():
            done = generate_many(self.pool(name), self.tokenizer, [prompts[i] for i in rows], **options)
            for row, generation in zip(rows, done, strict=True):
                made[row] = generation
        return [generation for generation in made if generation is not None]

    def encode(self, prompt: Prompt) -> Tensor:
        """Token ids int64 (n,) of a prompt or a conversation, as :func:`mopeq.runtime.generate.generate` makes them."""
        text = prompt if isinstance(prompt, str) else render(self.tokenizer, prompt)
        special = isinstance(prompt, str) or not getattr(self.tokenizer, "chat_template", None)
        ids: Tensor = self.tokenizer(text, return_tensors="pt", add_special_tokens=special)["input_ids"][0]
        return ids


def open_language(
    path: str | Path, resident: int | None = None, dtype: torch.dtype | None = None, device: str | None = None
) -> Moqe:
    """A set without asking for its router, which is read when it is first needed."""
    made = read_set(path)
    if made.kind != "language":
        raise InputError(f"{path} is a set of {made.kind} variants; expected language models; see mopeq.moqe.vision")
    key, table = _embedding(made)
    table = table if device is None else table.to(device)
    folders = {name: made.folder(name) for name in made.names}
    pool = Pool(folders, partial(load_variant, dtype=dtype, device=device), resident, {key: table})
    return Moqe(made, pool, table, load_tokenizer(made.folder(made.names[0])), dtype)


def load(
    path: str | Path, *, resident: int | None = None, dtype: torch.dtype | None = None, device: str | None = None
) -> Moqe:
    """A set of language variants with its router: :meth:`Moqe.generate` and :meth:`Moqe.logits`.

    Args:
        path: folder that ``mopeq moqe build`` made and ``mopeq moqe train`` gave a router.
        resident: most variants in memory at a time; the least recently used one is dropped. None keeps all.
        dtype: type of activations and of what is not packed; None takes the checkpoints'.
        device: where to; None is the CPU.

    Raises:
        ModelError: there is no such set.
        InputError: it has no router, or another set's.
        CheckpointError: a file is missing or damaged.
    """
    opened = open_language(path, resident, dtype, device)
    opened.router.eval()
    return opened


def _embedding(made: VariantSet) -> tuple[str, Tensor]:
    """Name and values of the input embedding, from the first variant that stores it openly."""
    for name in made.names:
        files = tensor_files(made.folder(name))
        key = embedding_key(files)
        if key is not None:
            return key, tensor_of(files[key], key).clone()
    raise CheckpointError(
        f"no variant in {made.path} stores its input embedding under a known name; the router reads it; "
        "add one variant in safetensors"
    )
