"""A base model whose linear layers serve several adapters at once, each on its own tokens of one line.

The layers' forward passes are replaced, and attention is told where rows begin (`layout.Line`). Every product of the
base runs once over all tokens; what belongs to one run is computed in its own shape, whoever lies beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from training.layout import Stretch

ATTENTION = "tailor_stretches"
Weight = Callable[[], Tensor]
"""Of a frozen layer, (fan_out, fan_in), as a product takes it: kept as it is, or unpacked for each."""


@dataclass(frozen=True, slots=True)
class Part:
    """Adapters of one layer on the tokens from `start` on, `rows` for each.

    `a` is (slots, width, fan_in), `b` (slots, width, fan_out): turned, and multiplied by the adapters' scales. What the
    layer's backward pass finds is put into `gradients`, the group's, under `number` and the number of its outer half.
    """

    start: int
    rows: int
    a: Tensor
    b: Tensor
    gradients: list[Tensor | None]
    number: tuple[int, int]

    def of(self, tokens: Tensor) -> Tensor:
        """(slots, rows, features), a view of (1, tokens, features)."""
        slots, rows, features = self.a.shape[0], self.rows, tokens.shape[-1]
        begin = tokens.storage_offset() + self.start * features
        return tokens.as_strided((slots, rows, features), (rows * features, features, 1), begin)


class _Adapted(torch.autograd.Function):
    """y = x W^T + b, and x A^T B^T on each part. The base gets no gradient, the adapters' are added where they lie."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, anchor: Tensor, parts: Sequence[Part]
    ) -> Tensor:
        x, y = x.contiguous(), linear(x, weight(), bias)
        inner = [torch.bmm(part.a, part.of(x).transpose(1, 2)) for part in parts]
        for part, h in zip(parts, inner, strict=True):
            part.of(y).baddbmm_(h.transpose(1, 2), part.b)
        ctx.save_for_backward(x, *inner)
        ctx.weight, ctx.parts = weight, parts
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *inner = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad @ ctx.weight() if ctx.needs_input_grad[0] else None
        for part, h in zip(ctx.parts, inner, strict=True):
            grad_y = part.of(grad)
            grad_h = torch.bmm(part.b, grad_y.transpose(1, 2))
            _add(part.gradients, part.number[0], torch.bmm(grad_h, part.of(x)))
            _add(part.gradients, part.number[1], torch.bmm(h, grad_y))
            if grad_x is not None:
                part.of(grad_x).baddbmm_(grad_h.transpose(1, 2), part.a)
        return grad_x, None, None, None, None


def _add(gradients: list[Tensor | None], number: int, found: Tensor) -> None:
    before = gradients[number]
    gradients[number] = found if before is None else before + found  # a base may use a layer more than once


class AdaptedLinear(nn.Module):
    """A frozen linear layer; `serving.parts` says which adapters it serves in this pass, none at rest.

    With `pack` its weight is kept only as that gives it back.
    """

    def __init__(self, base: nn.Linear, pack: Callable[[Tensor], Weight] | None = None) -> None:
        super().__init__()
        self.bias = base.bias
        self.fan_out, self.fan_in = base.weight.shape
        if pack is None:
            self.weight = weight = base.weight
        anchor = torch.zeros((), requires_grad=True, device=base.weight.device)
        self.serving = Serving((lambda: weight) if pack is None else pack(base.weight.data), base.bias, anchor)

    def forward(self, x: Tensor) -> Tensor:
        now = self.serving
        if not now.parts:
            return linear(x, now.weight(), now.bias)
        return _Adapted.apply(x, now.weight, now.bias, now.anchor, now.parts)


@dataclass(slots=True)
class Serving:
    """What a layer's pass needs, within quick reach: torch looks up a module's parameters by detours.

    autograd follows a function only if something that it is given wants a gradient, which is what the anchor is for.
    """

    weight: Weight
    bias: Tensor | None
    anchor: Tensor
    parts: Sequence[Part] = ()


def adaptable(model: PreTrainedModel, pack: Callable[[Tensor], Weight] | None = None) -> dict[str, AdaptedLinear]:
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
            replaced[path] = AdaptedLinear(part, pack)
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
    sizes = [stretch.stop - stretch.start for stretch in stretches]
    outputs = []
    for stretch, *each in zip(stretches, *(tensor[0].split(sizes, 1) for tensor in (query, key, value)), strict=True):
        q, k, v = (tensor.unflatten(1, (stretch.rows, -1)).transpose(0, 1) for tensor in each)
        mask = stretch.mask if sliding_window is None else _windowed(stretch, q.shape[2], sliding_window, q.device)
        shared = k.shape[1] != q.shape[1]
        output = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=shared)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


def _windowed(stretch: Stretch, length: int, window: int, device: torch.device) -> Tensor | None:
    """The stretch's mask, without what lies `window` tokens back or more."""
    if length <= window:
        return stretch.mask
    near = torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)
    return near[None, None] if stretch.mask is None else near & stretch.mask
