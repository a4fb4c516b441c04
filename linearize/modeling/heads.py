"""From final hidden states to logits, as the model's own class does it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def logits_of(model: Any, states: Tensor) -> Tensor:
    """Return a model's logits from final hidden states [..., hidden]."""
    return finish_logits(model.config, logits_head(model)(states))


def logits_head(model: Any) -> nn.Module:
    """Return what turns final hidden states into logits: the output embedding, or an encoder's whole head."""
    family_head = getattr(model, "cls", None) or getattr(model, "lm_head", None)
    head: nn.Module = family_head if isinstance(family_head, nn.Module) else model.get_output_embeddings()
    return head


def finish_logits(config: Any, logits: Tensor) -> Tensor:
    """Return logits behind the output embedding as the model gives them: Granite divides them, Gemma 2 caps them."""
    logits = logits / getattr(config, "logits_scaling", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
