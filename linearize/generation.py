"""A finished model writes: it continues a prompt or answers in a conversation, and says how fast and in what memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TextIteratorStreamer

from linearize import workspace
from linearize.api import check_device, load
from linearize.cache import LinearizedCache
from linearize.errors import LinearizeError
from linearize.eval.memory import format_bytes
from linearize.report.table import number
from linearize.teacher import local_folder


class Writer:
    """A finished model that writes greedily, one piece of text after the other.

    Args:
        folder: a finished folder, or a repository of the Hub.
        max_new_tokens: of one text or answer.
        device: where to run; the first GPU by default, else the CPU.

    Raises:
        LinearizeError: there is no linearized model that writes.
    """

    def __init__(self, folder: str | Path, *, max_new_tokens: int = 128, device: str | None = None) -> None:
        self.path = workspace.checkpoint_folder(local_folder(folder))
        where = check_device(device)
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.model: Any = load(self.path, dtype="auto").to(where).eval()
        if not self.model.can_generate():
            raise LinearizeError(f"{self.path} is an encoder, which fills masks and cannot continue a prompt.")
        self.max_new_tokens = max_new_tokens
        self.messages: list[dict[str, str]] = []
        self._forget()

    def text(self, prompt: str) -> Iterator[str]:
        """Yield the continuation of a text, piece by piece.

        Raises:
            LinearizeError: the prompt has no token.
        """
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        if ids.numel() == 0:
            raise LinearizeError("The prompt has no token; give at least a word to go on from.")
        self._forget()
        yield from self._write(ids)

    def answer(self, message: str) -> Iterator[str]:
        """Yield the answer to a message of the conversation so far, piece by piece.

        What the state has seen is not read again, unless the chat template changes what was said before.

        Raises:
            LinearizeError: the teacher has no chat template, or it refuses the message.
        """
        if self.tokenizer.chat_template is None:
            raise LinearizeError(
                f"{self.path} has no chat template, since its teacher is no chat model. Leave out --chat to continue "
                "a text."
            )
        messages = [*self.messages, {"role": "user", "content": message}]
        try:
            encoded = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # Jinja's, and what templates raise
            raise LinearizeError(f"The chat template refuses the conversation: {error}") from error
        ids = encoded["input_ids"]
        if ids[0, : len(self._seen)].tolist() != self._seen:
            self._forget()
        pieces = []
        for piece in self._write(ids):
            pieces.append(piece)
            yield piece
        self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]

    def report(self) -> str:
        """Return how fast the last text was written, and the bytes of the state that it left."""
        first, count = self._times[1] - self._times[0], len(self._times) - 1
        spent = self._times[-1] - self._times[1]
        speed = f", then {number((count - 1) / spent)} tokens/s" if count > 1 else ""
        words = f"{count} token{'s' if count > 1 else ''}: the first after {number(first)} s{speed}"
        return f"{words}; state {format_bytes(self._cache.nbytes())}"

    def _forget(self) -> None:
        self._cache = LinearizedCache(self.model.config)
        self._seen: list[int] = []
        self._times: list[float] = []

    def _write(self, ids: torch.Tensor) -> Iterator[str]:
        ids, self._times = ids.to(self.model.device), []
        streamer = _Timed(self.tokenizer, self._times)
        stop, found = threading.Event(), []

        def run() -> None:
            try:
                found.append(
                    self.model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        past_key_values=self._cache,
                        max_new_tokens=self.max_new_tokens,
                        do_sample=False,
                        streamer=streamer,
                        stopping_criteria=[lambda ids, *_, **__: ids.new_full(ids.shape[:1], stop.is_set()).bool()],
                    )
                )
            except Exception as error:  # raised below, where the caller is
                found.append(error)
                streamer.on_finalized_text("", stream_end=True)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            stop.set()  # a reader that left early, as Ctrl-C does
            thread.join()
        if isinstance(found[0], Exception):
            raise found[0]
        self._seen = found[0][0, : self._cache.get_seq_length()].tolist()


class _Timed(TextIteratorStreamer):  # type: ignore[misc]
    """Notes when the prompt and each token came."""

    def __init__(self, tokenizer: Any, times: list[float]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times = times

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())
        super().put(value)


def generate_text(
    folder: str | Path, prompt: str, *, max_new_tokens: int = 128, device: str | None = None
) -> Iterator[str]:
    """Yield a greedy continuation of `prompt` by the model in a finished folder, piece by piece.

    Raises:
        LinearizeError: the folder holds no linearized model, or the prompt no token.
    """
    yield from Writer(folder, max_new_tokens=max_new_tokens, device=device).text(prompt)
