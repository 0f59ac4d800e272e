"""Text from a model, one token at a time, in constant memory."""

import codecs
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from momkit.errors import InputError
from momkit.models.lm import LMState, MoMLM

PROMPT_CHUNK = 2048


@dataclass
class Codec:
    """Prompt to tokens and back: bytes of UTF-8 for the `bytes` task, numbers apart by spaces for any other."""

    task: str
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def encode(self, prompt: str) -> list[int]:
        if self.task == "bytes":
            return list(prompt.encode())
        try:
            return [int(word) for word in prompt.split()]
        except ValueError as fault:
            raise InputError(
                f"prompt = {prompt!r}; allowed for {self.task}: numbers of tokens, as in '3 17 4'"
            ) from fault

    def decode(self, token: int) -> str:
        """The text that one more token completes: nothing inside a character of several bytes."""
        return self.decoder.decode(bytes([token])) if self.task == "bytes" else f" {token}"


@torch.no_grad()
def generate(
    model: MoMLM,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yield `max_tokens` tokens that follow a prompt; the same seed gives the same tokens.

    temperature 0 takes the likeliest token. top_k: draw from the k likeliest only. Memory does not grow with the number
    of tokens, unless the model has attention layers.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature = {temperature}; allowed: 0 or more")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed = {seed}; allowed: 0 to 2^63 - 1")
    if top_k is not None and not 1 <= top_k <= model.spec.vocab_size:
        raise InputError(f"top_k = {top_k}; allowed: 1 to {model.spec.vocab_size}")
    if max_tokens < 0:
        raise InputError(f"max_tokens = {max_tokens}; allowed: 0 or more")
    if not prompt:
        raise InputError("prompt is empty; allowed: one token or more")
    if not 0 <= min(prompt) <= max(prompt) < model.spec.vocab_size:
        raise InputError(f"prompt holds {min(prompt)} to {max(prompt)}; allowed: 0 to {model.spec.vocab_size - 1}")
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    logits, state = read_prompt(model, prompt)
    for i in range(max_tokens):
        token = choose(logits, temperature, top_k, generator)
        yield token
        if i + 1 < max_tokens:
            logits = model.step(torch.tensor([token], device=logits.device), state)[0]


def read_prompt(model: MoMLM, prompt: Sequence[int]) -> tuple[Tensor, LMState]:
    """Logits `[V]` of what follows a prompt, and the state behind it; a long one goes in piece by piece."""
    state = model.initial_state(1)
    tokens = torch.tensor(prompt, dtype=torch.long, device=model.embedding.weight.device)
    for piece in tokens.split(PROMPT_CHUNK):
        out = model(piece, state)
        hidden, state = out.hidden_states, out.state
    return model.logits(hidden[-1]), state


def choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One token from logits `[V]`."""
    logits = logits.double().cpu()
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial(((logits - logits.max()) / temperature).softmax(-1), 1, generator=generator))
