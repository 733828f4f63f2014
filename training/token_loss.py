"""Cross entropy of each trained token, without keeping any logits.

The output layer is frozen, so the gradient that a token's loss sends back is known at once, up to a factor that comes
later: a few thousand tokens' logits are in memory at a time, whatever the vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

CHUNK_FLOATS = 1 << 27
"""Logits in memory at once."""
LEAST_ROWS = 8
"""Matrix products of one to three rows take another kernel, with other roundings, than those of many."""


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, trained: Tensor, targets: Tensor, wants_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        chosen = hidden[0].index_select(0, trained)
        losses = torch.empty(len(targets), device=hidden.device)
        hits = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
        back = torch.empty_like(chosen) if wants_gradient else None
        step = max(LEAST_ROWS, CHUNK_FLOATS // weight.shape[0])
        for start in range(0, len(targets), step):
            part = slice(start, start + step)
            _fill(chosen[part], weight, targets[part], losses[part], hits[part], None if back is None else back[part])
        ctx.mark_non_differentiable(hits)
        ctx.shape = hidden.shape
        if back is not None:
            ctx.save_for_backward(back, trained)
        return losses, hits

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        back, trained = ctx.saved_tensors
        grad_hidden = back.new_zeros(ctx.shape)
        grad_hidden[0].index_copy_(0, trained, (back * grad[:, None]).to(back.dtype))
        return grad_hidden, None, None, None, None


def _fill(hidden: Tensor, weight: Tensor, targets: Tensor, losses: Tensor, hits: Tensor, back: Tensor | None) -> None:
    """Write what these tokens give: loss, whether the target is the likeliest, gradient of the loss."""
    rows = len(targets)
    if rows < LEAST_ROWS:
        hidden = torch.cat([hidden, hidden.new_zeros(LEAST_ROWS - rows, hidden.shape[1])])
    logits = linear(hidden, weight)[:rows].float()
    losses.copy_(cross_entropy(logits, targets, reduction="none"))
    hits.copy_(logits.argmax(-1) == targets)
    if back is None:
        return
    errors = torch.softmax(logits, -1)
    target = targets[:, None]
    errors.scatter_(1, target, errors.gather(1, target) - 1)
    if rows < LEAST_ROWS:
        errors = torch.cat([errors, errors.new_zeros(LEAST_ROWS - rows, errors.shape[1])])
    back.copy_((errors.to(weight.dtype) @ weight)[:rows])


def token_losses(hidden: Tensor, weight: Tensor, trained: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's loss in nats, and whether its target was the likeliest, both (trained tokens,).

    `hidden` is (1, tokens, width), `weight` (vocabulary, width); `trained` are the positions that have `targets`.
    """
    losses, hits = _TokenLoss.apply(hidden, weight, trained, targets, torch.is_grad_enabled() and hidden.requires_grad)
    return losses, hits
