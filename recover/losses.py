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
            teacher_logits = None
            if teacher is not None:
                teacher_logits = teacher[1](teacher[0][part].to(logits.dtype)).float()
            value, gradient_NV = _value_and_gradient(logits.detach(), targets_N[part], teacher_logits, objective)
            total += value
            if any(wants):
                gradient_NV.div_(count)
                gradients = torch.autograd.grad(logits, [leaf, *trained], gradient_NV.to(logits.dtype), allow_unused=True)
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


def _value_and_gradient(logits_NV: Tensor, targets_N: Tensor, teacher_NV: Tensor | None, objective: Objective) -> tuple[Tensor, Tensor]:
    """(sum of the loss over N, its gradient for the logits), float32."""
    distill, entropy = objective.weights
    logits_NV = logits_NV.float()
    gradient, value = None, torch.zeros((), dtype=torch.float64, device=logits_NV.device)
    if distill:
        if teacher_NV is None:
            raise ValueError("distillation needs a teacher; without one choose loss=cross_entropy")
        if teacher_NV.shape != logits_NV.shape:
            raise ValueError(f"the teacher's vocabulary has {teacher_NV.shape[-1]} entries, the student's {logits_NV.shape[-1]}")
        tau = objective.temperature
        student, target = _log_softmax(logits_NV, tau), _log_softmax(teacher_NV, tau)
        p_target = target.exp()
        value += tau * tau * distill * torch.dot(p_target.view(-1), target.sub_(student).view(-1)).double()
        gradient = student.exp_().sub_(p_target).mul_(distill * tau)
    if entropy:
        student = torch.log_softmax(logits_NV, -1)
        at = targets_N.unsqueeze(-1)
        value -= entropy * student.gather(-1, at).sum().double()
        part = student.exp_().scatter_add_(-1, at, torch.full_like(at, -1, dtype=student.dtype)).mul_(entropy)
        gradient = part if gradient is None else gradient.add_(part)
    assert gradient is not None
    return value, gradient


def _log_softmax(logits_NV: Tensor, tau: float) -> Tensor:
    return torch.log_softmax(logits_NV if tau == 1 else logits_NV / tau, -1)


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
        logits = head(hidden_ND[start : start + size]).float()
        total += float(torch.nn.functional.cross_entropy(logits, targets_N[start : start + size], reduction="sum").double())
        start, size = start + size, max(1, logits_at_once(hidden_ND.device) // logits.shape[-1])
    return total
