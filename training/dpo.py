"""Direct preference optimisation: the loss of Rafailov et al. 2023 (arXiv:2305.18290), in its sigmoid form.

The reference is what the run began as: the frozen base, or the adapter that it goes on from. No second model is kept.
Equal to TRL 1.16's `DPOTrainer` with `loss_type="sigmoid"`.
"""

import torch
from torch import Tensor

from training.dataset import IGNORED


def loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """The loss of each pair (pairs,), from its answers' `log_probabilities` under policy and reference.

    The reference's must carry no gradient: compute them once.
    """
    gain = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return -torch.nn.functional.logsigmoid(beta * gain)


def log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the trained tokens of each row of the logarithm of its probability, in nats; (rows,).

    `logits` are (rows, seq, vocabulary), `labels` (rows, seq) as `dataset.as_tensors` gives them: the label at a
    position is that position's own token, told by the logits before it.
    """
    targets = labels[:, 1:]
    trained = targets != IGNORED
    told = -torch.nn.functional.cross_entropy(logits[:, :-1][trained].float(), targets[trained], reduction="none")
    rows = trained.nonzero()[:, 0]
    return torch.zeros(len(labels), device=told.device, dtype=told.dtype).index_add(0, rows, told)
