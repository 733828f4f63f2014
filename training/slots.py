"""A base model whose linear layers serve several adapters at once, each on its own tokens of one line.

The layers' forward passes are replaced, and attention is told where rows begin (`layout.Line`). Every product of the
base runs once over all tokens; what belongs to one run is computed in its own shape, whoever lies beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from training.layout import Stretch

ATTENTION = "tailor_stretches"


@dataclass(frozen=True, slots=True)
class Part:
    """Adapters of one layer on tokens `start` to `stop`: (slots, width, fan_in), (slots, fan_out, width), and where
    their gradients are added. The outer halves come multiplied by the adapters' scales."""

    start: int
    stop: int
    a: Tensor
    b: Tensor
    grad_a: Tensor
    grad_b: Tensor

    def of(self, tokens: Tensor) -> Tensor:
        """(slots, tokens of each, features), a view."""
        return tokens[self.start : self.stop].view(self.a.shape[0], -1, tokens.shape[-1])


class _Adapted(torch.autograd.Function):
    """y = x W^T + b, and x A^T B^T on each part. The base gets no gradient, the adapters' are added where they lie."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, parts: Sequence[Part]
    ) -> Tensor:
        y = linear(x, weight, bias)
        flat_x, flat_y = x[0], y[0]
        inner = [torch.bmm(part.of(flat_x), part.a.transpose(1, 2)) for part in parts]
        for part, h in zip(parts, inner, strict=True):
            part.of(flat_y).baddbmm_(h, part.b.transpose(1, 2))
        ctx.save_for_backward(x, weight, *inner)
        ctx.parts = parts
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *inner = ctx.saved_tensors
        flat_x, flat_grad = x[0], grad[0].contiguous()
        grad_x = flat_grad @ weight if ctx.needs_input_grad[0] else None
        for part, h in zip(ctx.parts, inner, strict=True):
            grad_y = part.of(flat_grad)
            grad_h = torch.bmm(grad_y, part.b)
            part.grad_a.add_(torch.bmm(grad_h.transpose(1, 2), part.of(flat_x)))
            part.grad_b.add_(torch.bmm(grad_y.transpose(1, 2), h))
            if grad_x is not None:
                part.of(grad_x).baddbmm_(grad_h, part.a)
        return None if grad_x is None else grad_x[None], None, None, None, None


class AdaptedLinear(nn.Module):
    """A frozen linear layer; `parts` says which adapters it serves in this pass, none at rest."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.parts: Sequence[Part] = ()
        # autograd follows a function only if something that it is given wants a gradient
        self._anchor = torch.zeros((), requires_grad=True, device=base.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        if not self.parts:
            return linear(x, self.weight, self.bias)
        return _Adapted.apply(x, self.weight, self.bias, self._anchor, self.parts)


def adaptable(model: PreTrainedModel) -> dict[str, AdaptedLinear]:
    """Freeze the model and replace its linear layers but the output layer, which engines do not serve adapted."""
    model.requires_grad_(False)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    replaced: dict[str, AdaptedLinear] = {}
    output = model.get_output_embeddings()
    for path, part in list(model.named_modules()):
        if isinstance(part, nn.Linear) and part is not output:
            owner, _, name = path.rpartition(".")
            replaced[path] = AdaptedLinear(part)
            setattr(model.get_submodule(owner), name, replaced[path])
    AttentionInterface.register(ATTENTION, _attention)
    model.config._attn_implementation = ATTENTION  # no mask is known for this name, so the model builds none
    return replaced


def _attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, tokens, width)
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    stretches: Sequence[Stretch],
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention inside each row, as (1, tokens, heads, width)."""
    assert attention_mask is None
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.device.type == "cpu":  # the CPU's fused kernel knows no shared keys
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    outputs = []
    for stretch in stretches:
        q, k, v = (_rows_of(tensor, stretch) for tensor in (query, key, value))
        mask = stretch.mask if sliding_window is None else _windowed(stretch, q.shape[2], sliding_window, q.device)
        shared = k.shape[1] != q.shape[1]
        output = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=shared)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


def _rows_of(tensor: Tensor, stretch: Stretch) -> Tensor:
    """(1, heads, tokens, width) → (rows, heads, length, width)."""
    return tensor[0, :, stretch.start : stretch.stop].unflatten(1, (stretch.rows, -1)).transpose(0, 1)


def _windowed(stretch: Stretch, length: int, window: int, device: torch.device) -> Tensor | None:
    """The stretch's mask, without what lies `window` tokens back or more."""
    if length <= window:
        return stretch.mask
    near = torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)
    return near[None, None] if stretch.mask is None else near & stretch.mask
