"""Text from a prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from mopeq.errors import InputError
from mopeq.runtime.decode import Sampling, decode
from mopeq.runtime.scores import Score, scores

__all__ = ["Generation", "Messages", "generate", "generate_many", "render", "text_ids"]

UNUSED = ("attention_mask", "token_type_ids")
"""What a tokenizer or processor gives and one sequence does not need."""
KINDS = ("mm_token_type_ids", "moe_mm_token_type_ids")
"""Of which kind each token is, which processors say of text too."""
MISUSE = (ValueError, IndexError, KeyError, TypeError, TemplateError)
"""What processors raise where texts, images and template do not go together."""
Messages = Sequence[Mapping[str, Any]]
"""A conversation: ``{"role": "user" | "assistant" | "system", "content": ...}`` in order."""


@dataclass(frozen=True)
class Generation:
    """What came out: the new text, its tokens, the seconds from first to last, and the tokens of the prompt.

    ``scores`` are those asked for: of every token of prompt and answer but the first.
    """

    text: str
    tokens: tuple[int, ...]
    seconds: float
    prompt_tokens: int
    scores: tuple[Score, ...] = ()

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


def text_ids(reader: Any, text: str) -> Tensor:
    """The token ids int64 (n,) of a text taken as it is, which a processor would take for a conversation.

    Raises :class:`InputError` where it has the place of an image.
    """
    try:
        ids: Tensor = reader(text=text, return_tensors="pt")["input_ids"][0]
    except MISUSE as error:
        raise InputError(f"the model's processor cannot use this text: {error}") from error
    return ids.long()  # of no tokens, float


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str | Messages | Tensor,
    *,
    max_new_tokens: int | None = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stream: Callable[[str], None] | None = None,
    stopped: Callable[[], bool] | None = None,
    likeliest: int | None = None,
) -> Generation:
    """Continue a prompt.

    Args:
        model: a transformers model, packed or not.
        tokenizer: its tokenizer, or the processor of a model that takes images.
        prompt: text, taken as it is, or a conversation, put through :func:`render`; a processor's prompts are
            conversations, and their contents may be lists of parts with images. Or token ids int64 (n,).
        max_new_tokens: stop after so many; None: at the end of the model's positions.
        temperature: 0 takes the most likely token every time.
        top_p: sample from the smallest set of tokens with this probability.
        top_k: sample from so many of the likeliest tokens; 0 takes all.
        seed: makes sampling repeatable; the caller's random state is left alone.
        stream: called with each piece of text when it is known.
        stopped: asked after each token; True ends the generation there.
        likeliest: score every token, and so many of the likeliest in its place, whatever the temperature.

    Raises:
        InputError: an empty prompt, one that the tokenizer or processor cannot use, more tokens than the model has
            positions, or numbers out of range.
    """
    _check(max_new_tokens, temperature, top_p, top_k)
    encoded = _encoded(model, tokenizer, prompt)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    given: list[int] = encoded["input_ids"][0].tolist()
    count = len(given)
    max_new_tokens = _room(model, count, max_new_tokens)
    device = model.get_input_embeddings().weight.device
    inputs = {name: value.to(device) for name, value in encoded.items() if name not in UNUSED}
    sampling, stops = Sampling(temperature, top_p, top_k), _stops(model, tokenizer)
    pieces, tokens = _Pieces(tokenizer, stream or (lambda piece: None)), list[int]()
    logits, scored = list[Tensor](), list[Score]()
    heard = None if likeliest is None else logits.append
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        if seed is not None:
            torch.manual_seed(seed)
        for token in decode(model, inputs.pop("input_ids"), max_new_tokens, stops, sampling, inputs, heard):
            tokens.append(token)
            if likeliest is not None:
                scored += scores(logits.pop(), [*given[1:], token] if len(tokens) == 1 else [token], likeliest)
            if stream is not None:
                pieces.show(tokens)
            if stopped is not None and stopped():
                break
    seconds = time.perf_counter() - started
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    pieces.give(text)
    return Generation(text, tuple(tokens), seconds, count, tuple(scored))


def _encoded(model: Any, tokenizer: Any, prompt: str | Messages | Tensor) -> Mapping[str, Tensor]:
    """The model's inputs, one sequence."""
    made: Mapping[str, Tensor]
    if isinstance(prompt, Tensor):
        rows = model.config.get_text_config().vocab_size
        wrong = prompt[(prompt < 0) | (prompt >= rows)]
        if len(wrong):
            raise InputError(f"token {int(wrong[0])}; expected 0 to {rows - 1}, this model's vocabulary")
        made = {"input_ids": prompt.view(1, -1)}
    elif hasattr(tokenizer, "tokenizer"):
        said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        try:
            made = tokenizer.apply_chat_template(
                said, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
            )
        except MISUSE as error:
            raise InputError(f"the model's processor cannot use these messages: {error}") from error
    else:
        return _encoded_text(tokenizer, prompt)
    own = (getattr(tokenizer, "image_token_id", None), *(getattr(tokenizer, "image_token_ids", None) or ()))
    marks = torch.tensor([token for token in own if token is not None], dtype=torch.int64)
    if set(made) <= {*UNUSED, "input_ids", *KINDS} and torch.isin(made["input_ids"], marks).any():
        raise InputError("the text has the model's image token and there is no image; take it out, or give one")
    return made


def _encoded_text(tokenizer: Any, prompt: str | Messages) -> Mapping[str, Tensor]:
    made: Mapping[str, Tensor]
    try:
        text = prompt if isinstance(prompt, str) else render(tokenizer, prompt)
    except TemplateError as error:  # templates refuse roles, or their order
        raise InputError(f"the model's chat template refuses the messages: {error}") from error
    has_template = not isinstance(prompt, str) and getattr(tokenizer, "chat_template", None)
    made = tokenizer(text, return_tensors="pt", add_special_tokens=not has_template)
    return made


def generate_many(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int | None = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
) -> list[Generation]:
    """Continue prompts of token ids int64 (n,) together, padded on the left, through transformers' ``generate``.

    Arguments and errors as :func:`generate`. ``seconds`` is the batch's; what is sampled is not what each prompt would
    get by itself.
    """
    from transformers import GenerationConfig

    _check(max_new_tokens, temperature, top_p, top_k)
    longest = max(len(prompt) for prompt in prompts)
    most = min(_room(model, len(prompt), max_new_tokens) for prompt in prompts)
    device = model.get_input_embeddings().weight.device
    stops = sorted(_stops(model, tokenizer))
    own = (model.generation_config.pad_token_id, tokenizer.pad_token_id, *stops)
    pad = next((token for token in own if token is not None), 0)
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature > 0 else {}
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=most, do_sample=temperature > 0, eos_token_id=stops or None, pad_token_id=pad, **sampling
    )
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        if seed is not None:
            torch.manual_seed(seed)
        output = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings)
    seconds = time.perf_counter() - started
    made = []
    for prompt, row in zip(prompts, output[:, longest:].tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))  # what follows is padding
        text = tokenizer.decode(row[:end], skip_special_tokens=True)
        made.append(Generation(text, tuple(row[:end]), seconds, len(prompt)))
    return made


def _check(max_new_tokens: int | None, temperature: float, top_p: float, top_k: int) -> None:
    least = 1 if max_new_tokens is None else max_new_tokens
    if least < 1 or not 0 <= temperature < float("inf") or not 0 < top_p <= 1 or top_k < 0:
        raise InputError(
            f"max_new_tokens {max_new_tokens}, temperature {temperature}, top_p {top_p}, top_k {top_k}; "
            f"expected at least 1, at least 0, above 0 up to 1, and at least 0"
        )


def _room(model: Any, count: int, max_new_tokens: int | None) -> int:
    """New tokens that a prompt of ``count`` may get, which the model's positions bound."""
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
    return max_new_tokens


def _stops(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: the model's, else the tokenizer's."""
    own = model.generation_config.eos_token_id
    found = own if own is not None else tokenizer.eos_token_id
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])


class _Pieces:
    """Gives text on as soon as its bytes are whole."""

    def __init__(self, tokenizer: Any, stream: Callable[[str], None]) -> None:
        self.tokenizer, self.stream, self.given = tokenizer, stream, 0

    def show(self, tokens: list[int]) -> None:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # an unfinished character
            self.give(text)

    def give(self, text: str) -> None:
        if len(text) > self.given:
            self.stream(text[self.given :])
            self.given = len(text)
