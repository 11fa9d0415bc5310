import pytest
import torch
from bitmend.recover import losses
from bitmend.recover.losses import Objective, negative_log_likelihood, token_loss
from torch import nn
from torch.testing import assert_close

N, D, V = 37, 8, 50


def setting(seed=0):
    torch.manual_seed(seed)
    head, teacher_head = nn.Linear(D, V), nn.Linear(D, V)
    return torch.randn(N, D), torch.randn(N, D), head, teacher_head, torch.randint(V, (N,))


def plain(hidden, teacher_hidden, head, teacher_head, targets, objective):
    """The same loss with all logits at once, by autograd."""
    logits, t = head(hidden), objective.temperature
    entropy = nn.functional.cross_entropy(logits, targets)
    p = torch.log_softmax(teacher_head(teacher_hidden) / t, -1)
    q = torch.log_softmax(logits / t, -1)
    distill = t * t * (p.exp() * (p - q)).sum(-1).mean()
    a, b = objective.weights
    return a * distill + b * entropy


@pytest.mark.parametrize("chunk", [60, 400, 10**6])
@pytest.mark.parametrize(
    "objective", [Objective("distill"), Objective("cross_entropy"), Objective("both"), Objective("distill", 2.0), Objective("both", 0.5)]
)
def test_value_and_gradients_are_those_of_the_plain_loss(objective, chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk)
    monkeypatch.setattr(losses, "TILE_LOGITS", chunk // 2)
    hidden, teacher_hidden, head, teacher_head, targets = setting()
    hidden.requires_grad_(True)
    trained = list(head.parameters())
    with torch.no_grad():
        guide = (teacher_hidden, teacher_head)
    ours = token_loss(hidden, head, targets, guide, objective, trained)
    truth = plain(hidden, teacher_hidden, head, teacher_head, targets, objective)
    assert_close(ours, truth, atol=1e-6, rtol=1e-5)
    actual = torch.autograd.grad(3 * ours, [hidden, *trained])
    for a, b in zip(actual, torch.autograd.grad(3 * truth, [hidden, *trained]), strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_a_card_takes_more_logits_at_once_whatever_is_free(monkeypatch):
    card, gib = torch.device("cuda"), 1 << 30
    assert losses.logits_at_once(torch.device("cpu")) == losses.CHUNK_LOGITS
    for total, expected in ((2 * gib, losses.CHUNK_LOGITS), (80 * gib, 80 * gib // (64 * 24))):
        for free in (1, total):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, sizes=(free, total): sizes)
            assert losses.logits_at_once(card) == expected
    assert expected > 6 * losses.CHUNK_LOGITS


def test_a_head_that_is_not_trained_costs_nothing():
    hidden, teacher_hidden, head, teacher_head, targets = setting()
    head.requires_grad_(False)
    hidden.requires_grad_(True)
    token_loss(hidden, head, targets, (teacher_hidden, teacher_head), Objective("distill")).backward()
    assert hidden.grad is not None and head.weight.grad is None


def test_a_student_that_is_its_teacher_loses_nothing():
    hidden, _, head, _, targets = setting()
    assert abs(float(token_loss(hidden, head, targets, (hidden, head), Objective("distill")))) < 1e-6


def test_a_capped_head_is_differentiated_through():
    hidden, teacher_hidden, head, teacher_head, targets = setting()
    hidden.requires_grad_(True)

    def capped(h):
        return torch.tanh(head(h) / 2) * 2

    ours = torch.autograd.grad(token_loss(hidden, capped, targets, (teacher_hidden, teacher_head), Objective("both")), hidden)[0]
    truth = torch.autograd.grad(plain(hidden, teacher_hidden, capped, teacher_head, targets, Objective("both")), hidden)[0]
    assert_close(ours, truth, atol=1e-6, rtol=1e-4)


def test_negative_log_likelihood_sums_over_tokens():
    hidden, _, head, _, targets = setting()
    assert negative_log_likelihood(hidden, head, targets) == pytest.approx(
        float(nn.functional.cross_entropy(head(hidden), targets, reduction="sum")), rel=1e-6
    )
