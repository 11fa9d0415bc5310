"""A language model cut in two, body and head, so that losses can take logits in chunks; and its teacher.

Knows causal language models of transformers by their structure (`base_model`, `get_output_embeddings`); not files.
Legend: B batch, T tokens, D model, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils


@dataclass(frozen=True)
class Batch:
    """ids int64 [B, T]; loss_mask bool [B, T], True where a token counts as a target (position 0 never does), None for all. `kind`: of which
    text it is; held-out losses are averaged over kinds. `generated`: the teacher wrote it, so it is imitated there and nothing else.
    Mask and `drawn` stay in host memory when ids go to a card, so that nothing has to be asked of it."""

    ids: Tensor
    loss_mask: Tensor | None = None
    kind: str = ""
    generated: bool = False
    drawn: Tensor | None = None

    @property
    def text(self) -> Tensor:
        """ids where they were drawn."""
        return self.ids if self.drawn is None else self.drawn

    def targets(self) -> Tensor:
        """Ids [N] of the tokens that count."""
        return self._counted(self.ids[:, 1:])

    def predictions(self, outputs_BTX: Tensor) -> Tensor:
        """[N, X]: what stands where these tokens are predicted, one position before each."""
        return self._counted(outputs_BTX[:, :-1])

    def _counted(self, values_BT: Tensor) -> Tensor:
        flat = values_BT.flatten(0, 1)
        if self.loss_mask is None:
            return flat
        index_N = self.loss_mask[:, 1:].reshape(-1).nonzero().squeeze(-1)
        return flat[index_N.to(flat.device)]

    def to(self, device: torch.device | str) -> "Batch":
        return replace(self, ids=self.ids.to(device), drawn=self.text)


@dataclass(frozen=True)
class Student:
    """hidden(ids [B, T]) → last hidden states [B, T, D] after the final norm; logits(hidden [..., D]) → [..., V];
    head_parameters are those that `logits` reads."""

    hidden: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor]
    head_parameters: tuple[nn.Parameter, ...] = ()


@dataclass(frozen=True)
class Teacher:
    """The same two halves, of the baseline; `hidden` is asked by batch and may answer from a cache."""

    hidden: Callable[[Batch], Tensor]
    logits: Callable[[Tensor], Tensor]


@contextmanager
def forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While open, the module's forward pass is another one."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def student_of(model: nn.Module, probe: bool = True) -> Student:
    """Body and head of a transformers causal language model. ValueError when body + head do not give the model's own logits
    (checked on a few tokens): pass a Student of your own then."""
    full: Any = model
    body, head = full.base_model, full.get_output_embeddings()
    if head is None or body is model:
        raise ValueError(f"{type(model).__name__} has no separate body and head; pass a Student")
    config = full.config

    def hidden(ids_BT: Tensor) -> Tensor:
        with whole_windows():
            return body(input_ids=ids_BT, use_cache=False)[0]

    logits = head_of(head, config)
    student = Student(hidden, logits, tuple(head.parameters()))
    if probe:
        _probe(full, student)
    return student


@contextmanager
def whole_windows() -> Iterator[None]:
    """Within, a forward pass without an attention mask takes each row as one text. transformers asks the device each time whether position
    ids begin anew inside of a row (several texts packed into one), and the host waits for the answer; they never do here."""
    asks = getattr(masking_utils, "find_packed_sequence_indices", None)
    if asks is None:  # another version of transformers, which may wait
        yield
        return
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = asks


def head_of(head: nn.Module, config: object) -> Callable[[Tensor], Tensor]:
    """The output embedding and what some families do to its logits: Gemma's soft cap, Cohere's and Granite's scales."""
    cap, factor = getattr(config, "final_logit_softcapping", None), getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)

    def logits(hidden: Tensor) -> Tensor:
        out = head(hidden)
        if factor is not None:
            out = out * factor
        if divisor is not None:
            out = out / divisor
        return out if cap is None else torch.tanh(out / cap) * cap

    return logits


@torch.no_grad()
def _probe(model: Any, student: Student) -> None:
    embeddings = model.get_input_embeddings()
    ids = torch.arange(1, 5, device=embeddings.weight.device).unsqueeze(0) % embeddings.weight.shape[0]
    training = model.training
    model.eval()
    ours, theirs = student.logits(student.hidden(ids)).float(), model(input_ids=ids, use_cache=False).logits.float()
    model.train(training)
    error = float((ours - theirs).abs().max())
    if not error <= 1e-2 * max(1.0, float(theirs.abs().max())):
        raise ValueError(f"body and head of {type(model).__name__} differ from its own logits by {error:.3g}; pass a Student")
