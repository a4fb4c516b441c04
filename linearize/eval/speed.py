"""Speed and memory by context and batch: time to first token, prefill and decode tokens/s, cache bytes, peak memory."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from linearize.errors import memory_full
from linearize.eval.logits import evaluation_mode, language_model
from linearize.eval.memory import tensor_bytes


@dataclass(frozen=True)
class SpeedRow:
    """One context and batch.

    Attributes:
        context: tokens of the prompt.
        batch: rows.
        first_token: seconds from the prompt to the first token's logits, median; None where it does not fit.
        prefill: prompt tokens a second, all rows together.
        decode: tokens a second behind that context, all rows together.
        cache_bytes: of the cache after decoding.
        peak_bytes: largest allocation on the GPU during the whole measurement, weights included; None on a CPU.
        note: why there are no numbers.
    """

    context: int
    batch: int
    first_token: float | None = None
    prefill: float | None = None
    decode: float | None = None
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    note: str = ""

    def row(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


def measure_speed(model: Any, context: int, batch: int, *, new_tokens: int = 32, repeats: int = 3) -> SpeedRow:
    """Time a prompt of random tokens and greedy decode steps behind it, in eager mode, the same loop for any model.

    Args:
        model: a causal language model of transformers, on its device.
        context: tokens of the prompt.
        batch: rows.
        new_tokens: decode steps that are timed; one more warms up.
        repeats: prefills that are timed; one more warms up.

    Returns:
        Medians; no numbers and a note where the GPU's memory does not suffice.
    """
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(language_model(model).config.vocab_size, (batch, context), generator=generator).to(device)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with evaluation_mode(model):
            times: list[float] = []
            cache: Any = None
            for _ in range(repeats + 1):
                cache = None  # the one before goes first, or two would be held at once
                start = _now(device)
                cache, token = _prefill(model, ids)
                times.append(_now(device) - start)
            seconds = _decode(model, cache, token, new_tokens, device)
    except RuntimeError as error:
        if memory_full(error) is None:
            raise
        torch.cuda.empty_cache()
        return SpeedRow(context, batch, note="out of memory")
    first = median(times[1:])
    return SpeedRow(
        context,
        batch,
        first_token=first,
        prefill=batch * context / first,
        decode=batch * new_tokens / seconds,
        cache_bytes=tensor_bytes(cache),
        peak_bytes=torch.cuda.max_memory_allocated(device) if cuda else None,
    )


def _prefill(model: Any, ids: Tensor) -> tuple[Any, Tensor]:
    out = model(ids, use_cache=True, logits_to_keep=1)
    return out.past_key_values, out.logits[:, -1:].argmax(-1)


def _decode(model: Any, cache: Any, token: Tensor, steps: int, device: torch.device) -> float:
    start = 0.0
    for step in range(steps + 1):
        if step == 1:
            start = _now(device)
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    return _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
