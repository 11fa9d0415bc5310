"""The training loop: AdamW, warm-up and cosine, clipping, held-out evaluation, and the promise never to end worse than it began.

Bit-identical when resumed at any step on one machine: batches come from their number, noise from (seed, step), and the state is
values + moments + best + history. Knows a Student, trainables and batches; not files, data sets or the CLI.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..compress.precision import matmuls
from .adamw import AdamW, TrainState
from .compressed_model import compressed_linears, steady
from .losses import Objective, negative_log_likelihood, token_loss
from .peers import ALONE, Peers, SharedGradients
from .rate_search import Tried, found, next_factor, try_steps
from .selection import decoder_blocks
from .sharded import clip_, is_part, replicated
from .stored_values import as_stored, beyond_limits, extremes
from .student import Batch, Student, Teacher, forward_of, student_of
from .trainable import Attached
from .training_run import TrainConfig, TrainingRun, learning_rate, rates

ROLLBACK_FACTOR = 0.3
RESTORED_FACTOR = 0.5
READ_SECONDS = 1.0
"""How long a GPU may go on before what came of its steps is read, since to read is to wait. When is of no consequence for the result."""


@dataclass(frozen=True)
class Progress:
    step: int
    steps: int
    loss: float
    held_out_perplexity: float
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class TrainResult:
    """Losses are mean negative log-likelihoods on the held-out batches. The model holds the best values (best_step 0: the start)
    when finished, the last ones when stopped."""

    finished: bool
    step: int
    start_loss: float
    best_loss: float
    best_step: int
    history: list[dict[str, float]]
    rollbacks: list[str]
    restored: list[str]
    tried: list[Tried]
    tokens: int

    @property
    def improved(self) -> bool:
        return self.best_step > 0


@dataclass(frozen=True)
class TrainingText:
    """`batches(i)`: the i-th micro-batch (update s uses s·accumulation …); held-out batches, by which values are judged; who is imitated."""

    batches: Callable[[int], Batch]
    held_out: Sequence[Batch]
    teacher: Teacher | None = None


@dataclass(frozen=True)
class Hooks:
    """What others want of a training run: its state every so many steps and when it is stopped, news (`tried`: of a rate, by its
    factor and held-out loss), and a say in whether it goes on. Where `peers` train with it, all have the same hooks but for what they do, and answer `stop` alike."""

    save: Callable[[TrainState], None] | None = None
    save_every: int = 20
    progress: Callable[[Progress], None] | None = None
    tried: Callable[[float, float], None] | None = None
    stop: Callable[[], bool] | None = None
    peers: Peers = ALONE


class TrainingDiverged(RuntimeError):
    """Training became non-finite twice; the trainables hold their best values."""


@contextmanager
def checkpointed(model: nn.Module, active: bool) -> Iterator[None]:
    """Recompute each decoder block in backward. Done here, since transformers' own switch only works in training mode, dropout included."""
    with ExitStack() as stack:
        for block in decoder_blocks(model)[1] if active else ():
            stack.enter_context(forward_of(block, partial(checkpoint, block.forward, use_reentrant=False)))
        yield


@torch.no_grad()
def held_out_loss(student: Student, held_out: Sequence[Batch], peers: Peers = ALONE) -> float:
    """Mean over kinds of the mean negative log-likelihood of their tokens."""
    judged: dict[int, tuple[str, float, int]] = {}
    for number in peers.rounds(len(held_out)):
        if number is not None:
            batch = held_out[number]
            targets = batch.targets()
            loss = negative_log_likelihood(batch.predictions(student.hidden(batch.ids)), student.logits, targets)
            judged[number] = (batch.kind, loss, len(targets))
        elif peers.even:
            student.hidden(held_out[0].ids)
    sums: dict[str, tuple[float, int]] = {}
    for kind, loss, tokens in peers.in_order(judged):
        total, count = sums.get(kind, (0.0, 0))
        sums[kind] = (total + loss, count + tokens)
    return sum(total / max(1, count) for total, count in sums.values()) / max(1, len(sums))


def train(
    model: nn.Module,
    attached: Attached,
    text: TrainingText,
    config: TrainConfig,
    *,
    main: str | None = None,
    student: Student | None = None,
    resume: TrainState | None = None,
    hooks: Hooks | None = None,
) -> TrainResult:
    """Train `attached.trainables` for config.steps updates.

    `main` is the kind that config.learning_rate means. Ends with the best held-out values in the model, the start among the candidates. Raises TrainingDiverged when the loss,
    the gradient or a trained scale becomes unusable twice; ReplicasDiffer when peers no longer hold the same values; ValueError when nothing is
    to be trained.
    """
    if not attached.trainables:
        raise ValueError("no trainable parameter is left by targets and layers")
    model.eval()
    hooks = hooks or Hooks()
    run = TrainingRun(
        student or attached.run or student_of(model), attached, AdamW(attached.trainables), rates(attached.trainables, config, main), config,
        list(compressed_linears(model).values()),
    )  # fmt: skip
    device = next(iter(attached.trainables.values())).parameter.device
    with checkpointed(model, config.gradient_checkpointing is True):
        if resume is None:
            _begin(run, text.held_out, hooks.peers)
        else:
            run.load(resume)
        finished = (config.learning_rate != "search" or _search(run, text, hooks, device)) and _loop(run, text, hooks, device)
    hooks.peers.check(replicated(run.best))
    if finished:
        run.restore(run.best)
        if attached.stored_form is not None:
            attached.stored_form(True)
        if attached.starts_without is not None:
            attached.starts_without(run.best_step == 0)
    return TrainResult(finished, run.step, run.start_loss, run.best_loss, run.best_step, run.history, run.rollbacks, run.restored, run.tried, run.tokens)


def _begin(run: TrainingRun, held_out: Sequence[Batch], peers: Peers) -> None:
    """The start counts as a candidate: the model as it is stored, before any step (virtual tokens: without them)."""
    without = run.attached.starts_without
    if without is not None:
        without(True)
    run.start_loss = run.best_loss = run.held_out = _judged(run, held_out, peers)
    if without is not None:
        without(False)
    run.best = run.good = run.snapshot()
    run.history.append({"step": 0, "held_out_loss": run.start_loss})


def _search(run: TrainingRun, text: TrainingText, hooks: Hooks, device: torch.device) -> bool:
    """Try rates from the start, whose values and moments are there again behind each try, and take the best. False when it was stopped: what
    was tried is saved."""
    full = run.rates
    while (factor := next_factor(run.tried)) is not None:
        loss = _try(run, {name: rate * factor for name, rate in full.items()}, text, hooks, device)
        run.restore(run.best)
        run.optimizer.reset()
        if loss is None:
            return False
        run.tried.append((factor, loss))
        if hooks.tried is not None:
            hooks.tried(factor, loss)
        if hooks.save is not None:
            hooks.save(run.state())
    run.rates = {name: rate * found(run.tried) for name, rate in full.items()}
    return True


def _try(run: TrainingRun, full: dict[str, float], text: TrainingText, hooks: Hooks, device: torch.device) -> float | None:
    """The held-out loss behind a short run with a schedule of its own; infinite when it broke down, None when it was stopped."""
    config = replace(run.config, steps=try_steps(run.config.steps))
    short = TrainingRun(run.student, run.attached, run.optimizer, full, config, run.linears)
    while short.step < config.steps:
        if (hooks.stop or (lambda: False))():
            return None
        _update(short, text, device, hooks.peers)
    if _read(short) is not None:
        return math.inf
    with as_stored(run.attached):
        loss = _judged(run, text.held_out, hooks.peers)
    return loss if math.isfinite(loss) else math.inf


def _loop(run: TrainingRun, text: TrainingText, hooks: Hooks, device: torch.device) -> bool:
    save, progress, stop, peers = hooks.save, hooks.progress, hooks.stop or (lambda: False), hooks.peers
    config, began, first_step, first_tokens = run.config, time.perf_counter(), run.step, run.tokens
    every, read = config.eval_every or max(1, config.steps // 5), began
    while run.step < config.steps:
        stopped = stop()
        if not stopped:
            _update(run, text, device, peers)
        judged = not stopped and (run.step % every == 0 or run.step == config.steps)
        saved = save is not None and (stopped or (run.step % hooks.save_every == 0 and run.step < config.steps))
        if not (stopped or judged or saved or peers.agree(overdue(device, read))):
            continue
        problem, read = _read(run), time.perf_counter()
        if problem is None and judged:
            problem = _evaluate(run, text.held_out, peers)
        if problem is not None:
            _roll_back(run, problem)
            first_step, began, first_tokens = run.step, time.perf_counter(), run.tokens
        if save is not None and saved and (stopped or problem is None):
            peers.check(replicated(run.snapshot()))
            save(run.state())
        if stopped:
            return False
        if progress is not None and problem is None:
            seconds, loss = time.perf_counter() - began, _last_loss(run)
            left = seconds / (run.step - first_step) * (config.steps - run.step)
            progress(Progress(run.step, config.steps, loss, math.exp(min(run.held_out, 700)), (run.tokens - first_tokens) / seconds, left))
    return True


def overdue(device: torch.device, read: float) -> bool:
    """Whether steps that were last read at `read` (of the performance counter) should be read now."""
    return device.type == "cpu" or time.perf_counter() - read >= READ_SECONDS


def _update(run: TrainingRun, text: TrainingText, device: torch.device, peers: Peers = ALONE) -> None:
    """One optimizer step, without waiting for the device: what came of it is noted in `run.unread`. Of its micro-batches each process takes its
    own; the step is that of all."""
    config, attached, step = run.config, run.attached, run.step
    if attached.before_step is not None:
        run.optimizer.forget(attached.before_step(step) or {})
    parameters = [t.parameter for t in run.trainables.values()]
    for parameter in parameters:
        parameter.grad = None
    total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    shared = None if peers.size == 1 else SharedGradients(peers, [p for p in parameters if not is_part(p)], device)
    with steady(run.linears):
        for k in peers.rounds(config.accumulation):
            loss = None
            if k is not None:
                batch = text.batches(step * config.accumulation + k).to(device)
                objective = Objective("distill" if batch.generated else config.loss, config.temperature)
                with matmuls(config.matmul):
                    loss = batch_loss(run.student, batch, text.teacher, objective) / config.accumulation
                    if attached.penalty is not None:
                        loss = loss + attached.penalty() / config.accumulation
                    torch.autograd.backward(loss)
                total += loss.detach()
                tokens += batch.ids.numel()
            elif peers.even:
                _for_nothing(run, text, device)
            if shared is not None:
                shared.add(None if loss is None else loss.detach())
    if shared is not None:
        total, tokens = shared.settle(tokens)
    run.tokens += tokens
    norm = clip_(parameters, config.clip)
    run.step += 1
    share = learning_rate(step, config) * run.factor
    run.optimizer.step({name: rate * share for name, rate in run.rates.items()}, step / config.steps)
    run.unread.append((run.step, run.tokens, torch.cat([total.view(1), norm.view(1), *extremes(run.trainables)])))


def _for_nothing(run: TrainingRun, text: TrainingText, device: torch.device) -> None:
    """Forward and backward along with the other processes, adding nothing to their gradients."""
    batch, parameters = text.batches(run.step * run.config.accumulation).to(device), [t.parameter for t in run.trainables.values()]
    kept = [p.grad for p in parameters]
    torch.autograd.backward(batch_loss(run.student, batch, None, Objective("cross_entropy", 1.0)) * 0.0)
    for parameter, gradient in zip(parameters, kept, strict=True):
        if not is_part(parameter):
            parameter.grad = gradient


def _read(run: TrainingRun) -> str | None:
    """Take the unread steps into the history, with one wait for the device; what went wrong in the first of them that failed, or None. Those
    behind it do not count: the caller rolls back."""
    unread, run.unread = run.unread, []
    if not unread:
        return None
    for (step, tokens, _), (loss, norm, *reached) in zip(unread, torch.stack([n for *_, n in unread]).tolist(), strict=True):
        problem = None
        if not math.isfinite(loss) or not math.isfinite(norm):
            problem = f"step {step}: the {'loss' if not math.isfinite(loss) else 'gradient'} is not finite"
        else:
            run.history.append({"step": step, "loss": loss})
            problem = beyond_limits(run.trainables, reached)
        if problem is not None:
            run.step, run.tokens = step, tokens
            return problem
    return None


def _last_loss(run: TrainingRun) -> float:
    return next(entry["loss"] for entry in reversed(run.history) if "loss" in entry)


def batch_loss(student: Student, batch: Batch, teacher: Teacher | None, objective: Objective) -> Tensor:
    """Differentiable mean loss over a batch's counted tokens. ValueError when none counts."""
    targets = batch.targets()
    if not len(targets):
        raise ValueError("a batch without a single token that counts in the loss; check the loss mask and seq_len")
    hidden = batch.predictions(student.hidden(batch.ids))
    guide = None
    if teacher is not None and objective.weights[0]:
        with torch.no_grad(), matmuls("highest"):  # its states are kept, and other stages read them
            guide = (batch.predictions(teacher.hidden(batch)), teacher.logits)
    return token_loss(hidden, student.logits, targets, guide, objective, [p for p in student.head_parameters if p.requires_grad])


def _judged(run: TrainingRun, held_out: Sequence[Batch], peers: Peers) -> float:
    with steady(run.linears):
        return held_out_loss(run.student, held_out, peers)


def _evaluate(run: TrainingRun, held_out: Sequence[Batch], peers: Peers) -> str | None:
    with as_stored(run.attached):
        loss = _judged(run, held_out, peers)
    if not math.isfinite(loss):
        return f"step {run.step}: the held-out loss is not finite"
    run.held_out = loss
    run.history.append({"step": run.step, "held_out_loss": loss})
    run.good, run.good_step = run.snapshot(), run.step
    if loss < run.best_loss:
        run.best, run.best_loss, run.best_step = run.good, loss, run.step
    elif loss > run.best_loss and run.config.when_worse == "restore" and run.step < run.config.steps:
        run.restored.append(f"step {run.step}: held-out loss {loss:.4f}, above {run.best_loss:.4f} at step {run.best_step}")
        run.restore(run.best)
        run.good = run.best
        run.optimizer.stand_still()
        run.factor *= RESTORED_FACTOR
    return None


def _roll_back(run: TrainingRun, problem: str) -> None:
    """Once: back to the last evaluated values with a smaller rate and fresh moments. The second time: stop, best values in place."""
    if run.rollbacks:
        run.restore(run.best)
        raise TrainingDiverged(f"{problem}, after rolling back once ({run.rollbacks[0]}); try a learning rate below the method's default")
    run.rollbacks.append(problem)
    run.restore(run.good)
    run.optimizer.reset()
    run.step, run.factor = run.good_step, run.factor * ROLLBACK_FACTOR
