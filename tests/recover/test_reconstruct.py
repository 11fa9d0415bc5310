"""Reconstruction of one block: never worse, masks and grids untouched, attention and MLP apart or together."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from bitmend.compress.weights import to_tensors
from bitmend.recover.compressed_model import compressed_linears, install
from bitmend.recover.merge import audit
from bitmend.recover.peers import Peers
from bitmend.recover.reconstruct import TRAINS, Block, Reconstruct, block_error, reconstruct, resolved
from bitmend.recover.recovery_methods import attach, refusal
from bitmend.recover.site import kinds

from .conftest import batch, compress, compressed, llama

QUICK = {"steps": 60, "rank": 8, "norms": False}


def problem(kind: str = "2:4", config: Reconstruct | None = None, stop: Any = None) -> Block:
    """The first block of a tiny model, compressed, and what the dense one makes of the same inputs."""
    model, dense = compressed(kind), llama()
    config = config or Reconstruct()
    hidden = dense.model.embed_tokens(torch.cat([batch(i).ids for i in range(6)])).detach()
    positions = dense.model.rotary_emb(hidden, torch.arange(hidden.shape[1]).unsqueeze(0))

    def run(of: Any, x: torch.Tensor) -> torch.Tensor:
        out = of.model.layers[0](x, position_embeddings=positions)
        return out[0] if isinstance(out, tuple) else out

    with torch.no_grad():
        pairs = [(x, run(dense, x)) for x in hidden.split(4)]
    names = frozenset(n for n in compressed_linears(model) if ".0." in n)
    for name in set(compressed_linears(model)) - names:  # only this block is loaded
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, torch.nn.Identity())

    def attached(targets: tuple[str, ...]) -> Any:
        return attach("reconstruct", model, replace(config, targets=targets, layers=(0,)))

    return Block(
        model,
        lambda x: run(model, x),
        dict(enumerate(pairs[:-1])),
        [[number] for number in range(len(pairs) - 1)],
        dict(enumerate(pairs[-1:])),
        {n: dense.get_submodule(n) for n in names},
        names,
        attached,
        0,
        stop or (lambda: False),
    )


def records(block: Block) -> Any:
    return {n: lin.to_stored()[0] for n, lin in compressed_linears(block.model).items()}


CASES = [("mask_lora", "2:4"), ("weights", "pruned"), ("norms", "2:4"), ("biases", "3-bit"), ("scales", "2:4+4-bit"), ("lora", "3-bit")]  # fmt: skip


@pytest.mark.parametrize("window", ["block", "split"])
@pytest.mark.parametrize(("train", "kind"), CASES)
def test_the_error_falls_and_what_must_hold_holds(train: Any, kind: str, window: Any) -> None:
    config = Reconstruct(train=train, window=window, **QUICK)
    given = problem(kind, config)
    before, started = records(given), block_error(given)
    fitted = reconstruct(given, config)
    assert fitted.error_before == started and fitted.improved and not fitted.diverged
    assert fitted.error_after < (0.97 if train in ("norms", "scales") else 0.9) * started
    after = records(given)
    assert audit(before, after) == []
    twin = problem(kind, config)
    install(twin.model, after)
    for name, linear in compressed_linears(given.model).items():
        compressed_linears(twin.model)[name].bias = linear.bias
    for name in fitted.plain:
        twin.model.get_parameter(name).data.copy_(given.model.get_parameter(name).data)
    assert block_error(twin) == pytest.approx(fitted.error_after, rel=1e-3), "what is stored does what was promised"
    assert (fitted.plain != {}) == (train == "norms")


def test_every_trainable_part_has_a_case_and_auto_is_one_of_them() -> None:
    assert {train for train, _ in CASES} == set(TRAINS)
    for kind, train in (("2:4", "mask_lora"), ("3-bit", "scales"), ("nf4-nested", "scales"), ("lq", "scales")):
        assert resolved(Reconstruct(), kinds(compress(torch.randn(16, 32), kind))).train == train
        assert refusal("reconstruct", [kinds(compress(torch.randn(16, 32), kind))], {}) is None


def test_the_same_seed_gives_the_same_bits_and_the_windows_differ() -> None:
    actual = []
    for window in ("split", "split", "block"):
        given = problem("2:4", config := Reconstruct(window=window, **QUICK))  # type: ignore[arg-type]
        reconstruct(given, config)
        actual.append(torch.cat([r.base.weight.view(-1) for r in records(given).values()]))
    assert torch.equal(actual[0], actual[1]) and not torch.equal(actual[0], actual[2])


@pytest.mark.parametrize(("train", "kind"), [("mask_lora", "2:4"), ("scales", "3-bit")])
def test_the_bits_do_not_depend_on_the_number_of_processes(train: Any, kind: str, side_by_side: Any) -> None:
    """A step's four windows are of four slots; each process has its own, one of eight none."""
    config = Reconstruct(train=train, window="split", steps=4, rank=4)

    def share(peers: Peers) -> Block:
        given = problem(kind, config)
        windows = [(batch[0][slot : slot + 1], batch[1][slot : slot + 1]) for _, batch in sorted(given.pairs.items()) for slot in range(4)]
        given.pairs = {number: pair for number, pair in enumerate(windows) if number % 4 % peers.size == peers.rank}
        given.batches = [[*range(number, number + 4)] for number in range(0, len(windows), 4)]
        given.checks = {number: pair for number, pair in given.checks.items() if number % peers.size == peers.rank}
        given.peers = peers
        return given

    def fitted(given: Block) -> Any:
        return reconstruct(given, config), {f"{n}.{k}": t for n, r in records(given).items() for k, t in to_tensors(r).items()}

    expected, tensors = fitted(share(Peers()))
    assert expected.improved
    for size in (2, 8):
        shares = [share(Peers(rank, size)) for rank in range(size)]  # models come of one generator of random numbers

        def work(together: Any, shares: list[Block] = shares) -> Any:
            given = shares[together.rank]
            given.peers = replace(given.peers, gathered=together.gathered, ordered_sum=together.ordered_sum)
            return fitted(given)

        for actual, others in side_by_side(size, work):
            assert actual == expected and all(torch.equal(others[name], tensor) for name, tensor in tensors.items())


def test_norms_of_a_window_train_in_the_window_of_the_linear_that_follows() -> None:
    config = Reconstruct(window="split", steps=60, rank=8)
    given = problem("2:4", config)
    norms = ("model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight")
    seen: list[tuple[str, ...]] = []
    plain = given.attach

    def watched(targets: tuple[str, ...]) -> Any:
        seen.append(targets)
        return plain(targets)

    fitted = reconstruct(replace(given, attach=watched), config)
    assert [any("q_proj" in t for t in targets) for targets in seen] == [True, False]
    assert set(fitted.plain) == set(norms) and fitted.improved
    for name in norms:
        assert not torch.equal(given.model.get_parameter(name), llama().get_parameter(name))


def test_a_rate_that_only_destroys_leaves_everything_as_it_was() -> None:
    config = Reconstruct(steps=5, learning_rate=100.0)
    given = problem("2:4", config)
    before = records(given)
    fitted = reconstruct(given, config)
    assert not fitted.improved and fitted.error_after == fitted.error_before == block_error(given)
    assert all(torch.equal(r.base.weight, before[n].base.weight) for n, r in records(given).items())


def test_what_turns_non_finite_is_rolled_back_once_and_then_ends() -> None:
    config = Reconstruct(train="scales", norms=False, window="block", steps=40, learning_rate=1e30)
    given = problem("3-bit", config)
    fitted = reconstruct(given, config)
    assert len(fitted.diverged) == 2 and "scale" in fitted.diverged[0]
    assert block_error(given) == fitted.error_after == fitted.error_before


def test_it_stops_when_asked() -> None:
    calls = iter(range(100))
    with pytest.raises(KeyboardInterrupt):
        reconstruct(problem(stop=lambda: next(calls) == 3), Reconstruct())


def test_only_the_chosen_linears_move() -> None:
    config = Reconstruct(**QUICK)
    given = problem("2:4", config)
    chosen = frozenset(n for n in given.chosen if n.endswith("down_proj"))
    before = records(given)
    assert reconstruct(replace(given, chosen=chosen), config).improved
    moved = {n for n, r in records(given).items() if not torch.equal(r.base.weight, before[n].base.weight)}
    assert moved == chosen


@pytest.mark.parametrize(("train", "kind", "words"), [
    ("weights", "3-bit", "choose train=scales or lora"), ("mask_lora", "nf4", "mask_lora merges into dense weights"), ("scales", "2:4", "quantize first"),
])  # fmt: skip
def test_refusals(train: str, kind: str, words: str) -> None:
    reason = refusal("reconstruct", [kinds(compress(torch.randn(16, 32), kind))], {"train": train})
    assert reason is not None and words in reason
