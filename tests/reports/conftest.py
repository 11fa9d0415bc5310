"""A run with every field filled by numbers that are all different, so that each can be looked for."""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from bitmend.reports.record import LayerRecord, Protocol, RunRecord, StageRecord, TextRecord, derive

ROLES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
WAY = (
    ("baseline", None, 28.6912, {}),
    ("prune", "wanda", 33.1273, {"sparsity": 0.3, "pattern": "unstructured"}),
    ("quantize", "gptq", 43.4021, {"bits": 3, "group_size": 64}),
    ("decompose", "qera_exact", 38.5316, {"rank": 8}),
    ("recover", "lora", 31.2148, {"steps": 48}),
    ("fuse", "triton", 31.2151, {}),
)


def layers(seed: int, blocks: int = 3) -> tuple[LayerRecord, ...]:
    draw = random.Random(seed)
    return tuple(
        LayerRecord(
            f"model.layers.{block}.{role}",
            relative_output_error=draw.uniform(0.05, 0.1) * (3 if role == "mlp.down_proj" else 1),
            bits_per_weight=draw.uniform(2, 5),
            rank=draw.randrange(1, 999),
            sparsity=draw.uniform(0.1, 0.9),
            metrics={"predicted_loss": draw.uniform(1, 2), "measured_loss": draw.uniform(1, 2)},
        )
        for block in range(blocks)
        for role in ROLES
    )


def text(draw: random.Random, index: int) -> TextRecord:
    error = None if index == 0 else draw.uniform(0.001, 0.009)
    return TextRecord(
        perplexity=draw.uniform(11, 19),
        bits_per_byte=draw.uniform(1.0, 1.5),
        nll_difference=None if index == 0 else draw.uniform(0.1, 0.5),
        nll_difference_stderr=error,
        kl_to_baseline=draw.uniform(0.1, 0.5),
        top1_agreement=draw.uniform(0.6, 0.9),
    )


def stages(blocks: int = 3) -> tuple[StageRecord, ...]:
    made = []
    for index, (stage, method, perplexity, settings) in enumerate(WAY):
        draw = random.Random(f"{stage}{index}")
        before = WAY[max(0, index - 1)][2]
        made.append(
            StageRecord(
                stage,
                method,
                perplexity,
                bits_per_byte=draw.uniform(1.0, 1.5),
                nll_difference=math.log(perplexity / WAY[0][2]),
                nll_difference_stderr=draw.uniform(0.001, 0.009),
                nll_difference_previous=math.log(perplexity / before),
                nll_difference_previous_stderr=draw.uniform(0.001, 0.009),
                kl_to_baseline=draw.uniform(0.1, 0.5),
                top1_agreement=draw.uniform(0.6, 0.9),
                total_bytes=draw.randrange(10**7, 10**9),
                bits_per_weight=draw.uniform(3, 16),
                sparsity=draw.uniform(0.1, 0.6),
                seconds=draw.uniform(10, 9000),
                peak_bytes=draw.randrange(10**8, 10**10),
                trainable_parameters=draw.randrange(10**4, 10**7),
                tokens_per_second=draw.uniform(5, 60),
                notes=(f"a note <of> {stage} & more",),
                settings=settings,
                metrics={"history": [{"step": step, "loss": draw.uniform(1, 2)} for step in range(4)], "best_step": 2}
                if stage == "recover"
                else {"held_out": {"best": draw.uniform(3, 4), "best_step": draw.randrange(1000)}},
                layers=layers(index, blocks) if index in (1, 2, 3) else (),
                texts={name: text(draw, index) for name in ("news", "code")},
            )
        )
    return derive(made)


@pytest.fixture(scope="session")
def full_run() -> RunRecord:
    protocol = Protocol("wikitext2", "test", "9d1c0e7a", "SmolLM2", "\n\n", False, 512, 40, 20440, {"domain": "encyclopaedia"})
    texts = {"news": replace(protocol, dataset="papers", fingerprint="77aa"), "code": replace(protocol, dataset="programs")}
    return RunRecord("three bits", "demo & <model>", protocol, stages(), {"torch": "2.13.0", "threads": 2}, texts)


@pytest.fixture(scope="session")
def long_run() -> Callable[[], RunRecord]:
    return lambda: RunRecord("long", "big", Protocol(dataset="wikitext2"), stages(blocks=50))
