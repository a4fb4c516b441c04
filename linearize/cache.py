"""The cache of a linearized model: states, window rings and exact heads, on transformers' own Cache classes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache


class MixerCacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """What one converted layer remembers: named tensors whose first axis is the batch, updated in place by the mixer.

    Args:
        max_length: places for exact heads in a static cache; None lets them grow.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self, max_length: int | None = None) -> None:
        super().__init__()
        self.tensors: dict[str, Tensor] = {}
        self.max_length = max_length
        self.seen = 0

    def advance(self, tokens: int) -> None:
        """Count the tokens of a call, padding included.

        Raises:
            ValueError: exact heads have no place left for them.
        """
        if self.max_length is not None and "exact_k" in self.tensors and self.seen + tokens > self.max_length:
            raise ValueError(
                f"The static cache has {self.max_length} places; {self.seen} are taken, and {tokens} tokens came."
            )
        self.seen += tokens
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Return how many tokens went through, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """Return the places of a static cache, or -1."""
        return -1 if self.max_length is None else self.max_length

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (key length, key offset) as a full-attention layer would, for the masks of softmax layers."""
        return self.seen + int(query_length), 0

    def nbytes(self) -> int:
        """Return the bytes of all cached tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the mixer makes its tensors on the first call."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse: a linearized layer writes its cache itself."""
        raise TypeError("A linearized layer's cache takes no plain keys and values.")

    def reset(self) -> None:
        """Forget everything; a static cache keeps its buffers."""
        if self.max_length is None:
            self.tensors.clear()
        for tensor in self.tensors.values():
            tensor.zero_()
        self.seen = 0

    def _each(self, change: Any) -> None:
        for name, tensor in self.tensors.items():
            self.tensors[name] = change(tensor)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick rows, for beam search."""
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._each(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._each(lambda t: t[indices])

    def offload(self) -> None:
        """Move to the CPU."""
        self._each(lambda t: t.to("cpu", non_blocking=True))

    def crop(self, max_length: int) -> None:
        """Refuse: a recurrent state cannot forget its last tokens."""
        raise ValueError("A linearized model's cache cannot be cropped: recurrent states do not run backwards.")


class LinearizedCache(Cache):  # type: ignore[misc]
    """One layer per model layer: `MixerCacheLayer` where attention was replaced, the teacher's kind elsewhere.

    Args:
        config: the model's configuration; `config.linearize["layers"]` names the converted layers.
        max_length: makes the exact heads' cache static, with so many places.
    """

    def __init__(self, config: Any, max_length: int | None = None) -> None:
        converted = set(config.linearize["layers"])
        count = config.num_hidden_layers
        layers: list[Any] = [MixerCacheLayer(max_length) for _ in range(count)]
        if len(converted) < count:
            softmax = DynamicCache(config=config).layers
            layers = [layers[i] if i in converted else softmax[i] for i in range(count)]
        super().__init__(layers=layers)

    def nbytes(self) -> int:
        """Return the bytes of everything cached so far."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, MixerCacheLayer):
                total += layer.nbytes()
            elif layer.is_initialized:
                total += sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
        return total
