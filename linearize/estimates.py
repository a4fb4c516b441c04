"""Estimates of the GPU memory that a stage takes, by how it is launched.

Weights, what trains and its optimizer are counted; activations are constants times tokens, worked out from the tensors
that one layer's pass allocates (its Triton kernels included). `scripts/check_plan_memory.py` compares with a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from linearize.recipe_stages import AnyStage, Distill, Transfer

# AdamW in mixed precision: fp32 master copy, gradient and two moments for each parameter that trains.
TRAIN_BYTES = 16
INNER_SIZES = ("intermediate_size", "ffn_hidden_size", "n_inner")
# A layer's transfer, by token and hidden channel: tensors in the weights' dtype, and bytes of those in fp32.
LAYER_TENSORS, LAYER_FP32 = 6.75, 35.5
CONVOLVED = 40  # more bytes, where the memory reads convolved streams of its own
MAPPED = 1280  # more bytes, over the head dim, where feature maps train
EVALUATION = 6 * 2**25  # logits of an evaluation, which come 32 MiB at a time
LOGIT_TOKENS = 1024  # `stages.finetune.TOKENS_PER_CHUNK`, whose module is heavy
SHARDS = (2, 4, 8)
LAUNCHES = ("one GPU", "streamed", "DDP", *(f"FSDP2 x{n}" for n in SHARDS))


@dataclass(frozen=True)
class Weights:
    """The bytes of a converted model's weights.

    Attributes:
        layers: of each decoder layer, its mixer's included.
        embedding: of the input embedding.
        head: of the output embedding, tied or not.
        rest: of everything else.
        tied: embedding and head are one.
    """

    layers: tuple[int, ...]
    embedding: int
    head: int
    rest: int
    tied: bool

    @property
    def outside(self) -> int:
        """Bytes outside of the decoder's layers."""
        return self.embedding + (0 if self.tied else self.head) + self.rest

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.layers) + self.outside

    @classmethod
    def of(cls, network: Any, layers: Any) -> Weights:
        """Count a meta model's."""

        def size(parameters: Any) -> int:
            return sum(p.numel() * p.element_size() for p in parameters)

        embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
        tied = head is not None and head.weight is embedding.weight
        sizes = tuple(size(layer.parameters()) for layer in layers)
        own, last = size(embedding.parameters()), 0 if head is None else size(head.parameters())
        rest = size(network.parameters()) - sum(sizes) - own - (0 if tied else last)
        return cls(sizes, own, last, rest, tied)


def inner_size(config: Any) -> int:
    """Return the width of the MLPs."""
    found = (getattr(config, name, None) for name in INNER_SIZES)
    return int(next((size for size in found if size), 4 * config.hidden_size))


def transfer_token_bytes(config: Any, dtype: torch.dtype, mixer: Any, block: int) -> int:
    """Return the bytes that a token takes in a block's transfer, at its fullest moment.

    Args:
        config: the teacher's.
        dtype: of the weights.
        mixer: one of the model's, or None where none has parameters.
        block: layers whose graph exists at a time.
    """
    hidden, inner = config.hidden_size, inner_size(config)
    each = LAYER_TENSORS * dtype.itemsize + LAYER_FP32
    if mixer is not None and getattr(mixer, "conv", None) is not None:
        each += CONVOLVED
    q_map = getattr(mixer, "q_map", None)
    if q_map is not None and any(True for _ in q_map.parameters()):
        head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        each += MAPPED / head_dim
    teacher = (3 * inner + 5 * hidden) * dtype.itemsize  # its MLP, without a graph
    further = (block - 1) * graph_token_bytes(config, dtype)
    return int(max(each * hidden, teacher) + further)


def graph_token_bytes(config: Any, dtype: torch.dtype, compiled: bool = False) -> int:
    """Return the bytes that a token keeps in a layer for the backward pass."""
    # Vectors of the hidden size and of the MLP's, fitted to the runs of docs/training.md.
    vectors, inner = (10, 2) if compiled else (20, 4)
    return int((vectors * config.hidden_size + inner * inner_size(config)) * dtype.itemsize)


def token_bytes(stage: AnyStage, config: Any, dtype: torch.dtype, mixer: Any = None, compiled: bool = False) -> int:
    """Return the estimated bytes that one token of a micro-batch needs; `compiled` layers keep less."""
    if isinstance(stage, Transfer):
        return transfer_token_bytes(config, dtype, mixer, stage.block)
    layer = graph_token_bytes(config, dtype, compiled)
    vectors = config.num_hidden_layers * config.hidden_size * dtype.itemsize
    kept = vectors + layer if stage.gradient_checkpointing else config.num_hidden_layers * layer
    aligned = 4 * vectors if isinstance(stage, Distill) and stage.hidden else 0
    return int(kept + aligned)


def logit_bytes(stage: AnyStage, config: Any, dtype: torch.dtype, tokens: int) -> int:
    """Return the estimated bytes of the logits of a pass of so many tokens, a chunk of which exist at a time.

    They are there in the weights' dtype and in fp32 with their gradients; a distillation has the teacher's beside.
    """
    if isinstance(stage, Transfer):
        return 0
    each = 2 * dtype.itemsize + 3 * torch.float32.itemsize * (2 if isinstance(stage, Distill) else 1)
    return int(min(tokens, LOGIT_TOKENS) * config.vocab_size * each)


def stage_memory(
    stage: AnyStage,
    weights: Weights,
    trained: int,
    each_token: int,
    length: int,
    *,
    logits: int = 0,
    copied: bool,
    launch: str,
) -> int | None:
    """Return the estimated peak bytes on each GPU.

    Args:
        stage: of the recipe.
        weights: of the model.
        trained: parameters.
        each_token: from `token_bytes`.
        length: tokens a row.
        logits: from `logit_bytes`.
        copied: the teacher is there a second time.
        launch: one of `LAUNCHES`.

    Returns:
        The bytes; None where the stage is not launched so.
    """
    gpus = int(launch.rpartition("x")[2]) if launch.startswith("FSDP2") else 1
    rows = min(stage.micro_batch or stage.batch, -(-stage.batch // gpus))
    activations = rows * length * each_token
    if launch == "streamed":
        return None if not isinstance(stage, Transfer) else _streamed(stage, weights, trained, activations)
    # Evaluations keep a copy of the output embedding.
    fixed = weights.head + logits + (weights.total if copied else 0)
    if gpus == 1:
        return fixed + weights.total + trained * TRAIN_BYTES + activations
    if isinstance(stage, Transfer) and stage.block > 1:
        return None
    gathered = 2 * max(weights.layers)
    own = trained * TRAIN_BYTES // (1 if isinstance(stage, Transfer) else gpus)  # mixers train whole in transfer
    return fixed + weights.outside + sum(weights.layers) // gpus + gathered + own + activations


def _streamed(stage: Transfer, weights: Weights, trained: int, activations: int) -> int:
    """The fullest of three moments: a block trains, rows are embedded, the end is measured."""
    blocks = [sum(weights.layers[i : i + stage.block]) for i in range(0, len(weights.layers), stage.block)]
    share = trained * stage.block // len(weights.layers) * TRAIN_BYTES
    return weights.rest + max(max(blocks) + share + activations, weights.embedding, weights.head + EVALUATION)
