"""Losses from last hidden states, in chunks of tokens: logits [N, V] never exist for all tokens at once.

The gradient of a chunk's logits is written down by hand and pulled through the head at once, in forward, so that backward
needs neither the logits nor a second pass. Legend: N counted tokens, D model, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Head = Callable[[Tensor], Tensor]
LossName = Literal["distill", "cross_entropy", "both"]
CHUNK_LOGITS = 1 << 23  # logits alive at once: 128 tokens at a vocabulary of 65,536
CARD_SHARE = 64
"""On a card as many more as take this part of its memory, all of it and not what is free: a resumed run must cut its tokens in the same places."""
TILE_LOGITS = 1 << 18
"""Float32 logits that a CPU core works on at once: a megabyte, which stays in its cache."""
LOGIT_BYTES = 24
"""Of a logit in float32 with its teacher's, their logarithms and the gradient."""


@dataclass(frozen=True)
class Objective:
    """`both` weighs the two equally. With a temperature τ, the distillation term is τ²·KL(teacher/τ ‖ student/τ)."""

    loss: LossName = "distill"
    temperature: float = 1.0

    @property
    def weights(self) -> tuple[float, float]:
        """(of the distillation, of the cross-entropy)."""
        return {"distill": (1.0, 0.0), "cross_entropy": (0.0, 1.0), "both": (0.5, 0.5)}[self.loss]


class _Kept(Protocol):
    """What forward leaves for backward."""

    saved_tensors: tuple[Tensor | None, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Kept,
        hidden_ND: Tensor,
        head: Head,
        targets_N: Tensor,
        teacher: tuple[Tensor, Head] | None,
        objective: Objective,
        *trained: Tensor,
    ) -> Tensor:
        """Mean loss over N tokens; `trained` are the head's parameters that want a gradient."""
        count, total = len(targets_N), torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
        wants = [hidden_ND.requires_grad, *(p.requires_grad for p in trained)]
        hidden_gradient = torch.zeros_like(hidden_ND) if wants[0] else None
        result = [torch.zeros_like(p) for p in trained]
        for part, logits, leaf in _chunks(head, hidden_ND):
            teacher_logits = None if teacher is None else teacher[1](teacher[0][part].to(logits.dtype))
            value, gradient_NV = _in_tiles(logits.detach(), targets_N[part], teacher_logits, objective, 1 / count)
            total += value
            if any(wants):
                gradients = torch.autograd.grad(logits, [leaf, *trained], gradient_NV, allow_unused=True)
                if hidden_gradient is not None:
                    hidden_gradient[part] = gradients[0]
                for sum_, g in zip(result, gradients[1:], strict=True):
                    sum_ += 0 if g is None else g
        ctx.save_for_backward(hidden_gradient, *result)
        return (total / count).float()

    @staticmethod
    def backward(ctx: _Kept, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, *result = ctx.saved_tensors
        scale = gradients[0]
        return (
            None if hidden_gradient is None else hidden_gradient * scale,
            None,
            None,
            None,
            None,
            *(g * scale for g in result if g is not None),
        )


def logits_at_once(device: torch.device) -> int:
    """How many logits a chunk of tokens may have."""
    if device.type != "cuda":
        return CHUNK_LOGITS
    _, total_bytes = torch.cuda.mem_get_info(device)
    return max(CHUNK_LOGITS, total_bytes // (CARD_SHARE * LOGIT_BYTES))


def _chunks(head: Head, hidden_ND: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    size, start, count = 16, 0, len(hidden_ND)
    while start < count:
        part = slice(start, min(start + size, count))
        with torch.enable_grad():
            leaf = hidden_ND[part].detach().requires_grad_(True)
            logits = head(leaf)
        yield part, logits, leaf
        start += size
        size = max(1, logits_at_once(hidden_ND.device) // logits.shape[-1])


def tiles(logits_NV: Tensor) -> Iterator[slice]:
    """Rows whose elementwise work stays in a CPU's cache; all of them on a card."""
    count, vocabulary = logits_NV.shape
    size = max(1, TILE_LOGITS // vocabulary) if logits_NV.device.type == "cpu" else max(1, count)
    for start in range(0, count, size):
        yield slice(start, start + size)


def _in_tiles(
    logits_NV: Tensor, targets_N: Tensor, teacher_NV: Tensor | None, objective: Objective, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(sum of the loss over N, its gradient for the logits times `scale`, in their dtype)."""
    if objective.weights[0] and teacher_NV is None:
        raise ValueError("distillation needs a teacher; without one choose loss=cross_entropy")
    if teacher_NV is not None and teacher_NV.shape != logits_NV.shape:
        raise ValueError(f"the teacher's vocabulary has {teacher_NV.shape[-1]} entries, the student's {logits_NV.shape[-1]}")
    total, gradient_NV = torch.zeros((), dtype=torch.float64, device=logits_NV.device), torch.empty_like(logits_NV)
    for rows in tiles(logits_NV):
        taught = None if teacher_NV is None else teacher_NV[rows].float()
        value, gradient = _value_and_gradient(logits_NV[rows].float(), targets_N[rows], taught, objective)
        total += value
        gradient_NV[rows] = gradient.mul_(scale)
    return total, gradient_NV


def _value_and_gradient(logits_NV: Tensor, targets_N: Tensor, teacher_NV: Tensor | None, objective: Objective) -> tuple[Tensor, Tensor]:
    """(sum of the loss over N, its gradient for the logits), float32.

    Of p and q, the student's and the teacher's probabilities of logits s and t (over τ): KL(q ‖ p) = Σ q·(t − s) + log Σ exp s − log Σ exp t,
    its gradient for s is p − q, and that of the cross-entropy p − 1 at the target. One exponential for each logit, and a second with τ."""
    distill, entropy = objective.weights
    tau, at = objective.temperature, targets_N.unsqueeze(-1)
    gradient, value = None, torch.zeros((), dtype=torch.float64, device=logits_NV.device)
    s, t = (logits_NV, teacher_NV) if tau == 1 or teacher_NV is None else (logits_NV / tau, teacher_NV / tau)
    p, log_sum_N = _softmax(s)
    if distill:
        assert t is not None
        q, teacher_log_sum_N = _softmax(t)
        value += tau * tau * distill * (torch.dot(q.view(-1), (t - s).view(-1)).double() + (log_sum_N - teacher_log_sum_N).double().sum())
        gradient = torch.sub(p, q, out=q).mul_(distill * tau)
    if entropy:
        if s is not logits_NV:
            p, log_sum_N = _softmax(logits_NV)
        value += entropy * (log_sum_N - logits_NV.gather(-1, at).squeeze(-1)).double().sum()
        gradient = p.mul_(entropy) if gradient is None else gradient.add_(p, alpha=entropy)
        gradient.scatter_add_(-1, at, torch.full_like(at, -entropy, dtype=gradient.dtype))
    assert gradient is not None
    return value, gradient


def _softmax(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """(probabilities [N, V], log Σ exp [N]): the greatest probability is exp of the greatest logit over that sum."""
    p = torch.softmax(logits_NV, -1)
    return p, logits_NV.amax(-1) - p.amax(-1).log()


def token_loss(
    hidden_ND: Tensor,
    head: Head,
    targets_N: Tensor,
    teacher: tuple[Tensor, Head] | None,
    objective: Objective,
    trained: Sequence[Tensor] = (),
) -> Tensor:
    """Differentiable mean loss. ValueError when distillation is asked without a teacher or the vocabularies differ."""
    loss = ChunkedLoss.apply(hidden_ND, head, targets_N, teacher if objective.weights[0] else None, objective, *trained)
    assert isinstance(loss, Tensor)
    return loss


@torch.no_grad()
def negative_log_likelihood(hidden_ND: Tensor, head: Head, targets_N: Tensor) -> float:
    """Sum over the tokens, in float64."""
    total, size, start = 0.0, 16, 0
    while start < len(targets_N):
        logits, targets = head(hidden_ND[start : start + size]), targets_N[start : start + size]
        for rows in tiles(logits):
            total += float(torch.nn.functional.cross_entropy(logits[rows].float(), targets[rows], reduction="sum").double())
        start, size = start + size, max(1, logits_at_once(hidden_ND.device) // logits.shape[-1])
    return total
