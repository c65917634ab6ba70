"""Text from a prompt, through transformers' ``generate``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mopeq.errors import InputError

__all__ = ["Generation", "Messages", "generate", "render"]

Messages = Sequence[Mapping[str, str]]
"""A conversation: ``{"role": "user" | "assistant" | "system", "content": ...}`` in order."""


@dataclass(frozen=True)
class Generation:
    """What came out: the new text, its tokens, the seconds from first to last, and the tokens of the prompt."""

    text: str
    tokens: tuple[int, ...]
    seconds: float
    prompt_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second, reading the prompt included."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0


def render(tokenizer: Any, messages: Messages) -> str:
    """A conversation as the text that the model continues.

    By the tokenizer's chat template; a model without one is no chat model and gets the contents, one a line.
    """
    if getattr(tokenizer, "chat_template", None):
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    return "".join(f"{message['content']}\n" for message in messages)


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str | Messages,
    *,
    max_new_tokens: int | None = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stream: Callable[[str], None] | None = None,
    stopped: Callable[[], bool] | None = None,
) -> Generation:
    """Continue a prompt.

    Args:
        model: a transformers model, packed or not.
        tokenizer: its tokenizer.
        prompt: text, taken as it is, or a conversation, put through :func:`render`.
        max_new_tokens: stop after so many; None: at the end of the model's positions.
        temperature: 0 takes the most likely token every time.
        top_p: sample from the smallest set of tokens with this probability.
        seed: makes sampling repeatable; the caller's random state is left alone.
        stream: called with each piece of text when it is known.
        stopped: asked after each token; True ends the generation there.

    Raises:
        InputError: an empty prompt, more tokens than the model has positions, or numbers out of range.
    """
    if (max_new_tokens is not None and max_new_tokens < 1) or not 0 <= temperature < float("inf") or not 0 < top_p <= 1:
        raise InputError(
            f"max_new_tokens {max_new_tokens}, temperature {temperature}, top_p {top_p}; "
            f"expected at least 1, at least 0, and above 0 up to 1"
        )
    templated = not isinstance(prompt, str)
    text = render(tokenizer, prompt) if not isinstance(prompt, str) else prompt
    has_template = templated and getattr(tokenizer, "chat_template", None)
    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=not has_template)
    count = encoded["input_ids"].shape[1]
    if count == 0:
        raise InputError("the prompt is empty; give at least one token")
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if max_new_tokens is None:
        if most is None:
            raise InputError("this model names no number of positions; expected max_new_tokens")
        max_new_tokens = max(most - count, 1)
    if most is not None and count + max_new_tokens > most:
        raise InputError(
            f"{count} tokens of prompt and {max_new_tokens} new ones; this model takes at most {most} in all; "
            "shorten the prompt, or ask for fewer new tokens"
        )
    device = model.get_input_embeddings().weight.device
    inputs = {k: encoded[k].to(device) for k in ("input_ids", "attention_mask")}
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        if seed is not None:
            torch.manual_seed(seed)
        output = model.generate(
            **inputs,
            generation_config=_settings(model, tokenizer, max_new_tokens, temperature, top_p),
            streamer=None if stream is None else _Pieces(tokenizer, count, stream),
            stopping_criteria=None if stopped is None else [_Stopped(stopped)],
        )
    seconds = time.perf_counter() - started
    tokens = output[0, count:].tolist()
    return Generation(tokenizer.decode(tokens, skip_special_tokens=True), tuple(tokens), seconds, count)


def _settings(model: Any, tokenizer: Any, max_new_tokens: int, temperature: float, top_p: float) -> Any:
    """Exactly what was asked for; only the special tokens are the model's."""
    from transformers import GenerationConfig

    own = model.generation_config
    stop = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    pad = own.pad_token_id if own.pad_token_id is not None else tokenizer.pad_token_id
    if pad is None:
        pad = stop[0] if isinstance(stop, list) else stop
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        eos_token_id=stop,
        pad_token_id=pad,
        bos_token_id=own.bos_token_id,
        **sampling,
    )


class _Stopped:
    """transformers' stopping criterion protocol."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.stopped(), device=input_ids.device)


class _Pieces:
    """transformers' streamer protocol: gives text on as soon as its bytes are whole."""

    def __init__(self, tokenizer: Any, prompt_tokens: int, give: Callable[[str], None]) -> None:
        self.tokenizer, self.skip, self.give = tokenizer, prompt_tokens, give
        self.tokens: list[int] = []
        self.given = ""

    def put(self, value: torch.Tensor) -> None:
        new = value.flatten().tolist()
        self.tokens += new[self.skip :]
        self.skip = max(0, self.skip - len(new))
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # an unfinished character
            self._give(text)

    def end(self) -> None:
        self._give(self.tokenizer.decode(self.tokens, skip_special_tokens=True))

    def _give(self, text: str) -> None:
        if len(text) > len(self.given):
            self.give(text[len(self.given) :])
            self.given = text
