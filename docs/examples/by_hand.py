"""Prune, quantize, decompose and recover one model with `bitmend.compress` and `bitmend.recover` alone: no recipe, no run, no artifact.

    python docs/examples/by_hand.py tests/small_model/model tests/small_model/text.jsonl

The pipeline does the same block by block, on the inputs that the compressed blocks below give, and resumes. Here all statistics come from
the dense model, which fits into memory. Legend: O out, I in, B batch, T tokens.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bitmend.compress.methods import DECOMPOSE, PRUNE, QUANTIZE
from bitmend.compress.statistics import InputStatistics, LayerStatistics
from bitmend.compress.weights import DenseWeight, StoredWeight
from bitmend.recover.compressed_model import install
from bitmend.recover.recovery_methods import RECOVER, attach, config_of
from bitmend.recover.student import Batch, Teacher, student_of
from bitmend.recover.train import TrainingText, held_out_loss, train
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

STAGES = (
    ("prune", PRUNE["wanda"], {"sparsity": 0.3}),
    ("quantize", QUANTIZE["gptq"], {"bits": 3, "group_size": 32}),
    ("decompose", DECOMPOSE["qera_exact"], {"rank": 4}),
)
TRAINING = {"steps": 12, "batch_size": 2, "loss": "distill", "norms": True, "scales": "auto"}
SEQ_LEN = 64


def windows(tokenizer: Any, text: Path) -> Tensor:
    """Token ids int64 [windows, SEQ_LEN] of the `text` fields of a jsonl file."""
    joined = "\n\n".join(json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()[:8])
    ids = tokenizer(joined, return_tensors="pt", verbose=False).input_ids[0]
    return ids[: len(ids) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)


def statistics_of(model: nn.Module, linears: Mapping[str, nn.Linear], ids_BT: Tensor) -> dict[str, LayerStatistics]:
    """What the methods ask of the inputs of each linear: sums over all tokens, gathered by forward hooks."""
    statistics = {name: InputStatistics(linear.in_features, frozenset({"norms", "second_moment"})) for name, linear in linears.items()}
    hooks = [
        linear.register_forward_pre_hook(lambda module, inputs, sums=statistics[name]: sums.update(inputs[0]))
        for name, linear in linears.items()
    ]
    with torch.no_grad():
        model(input_ids=ids_BT, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: LayerStatistics(sums) for name, sums in statistics.items()}


def compressed(linear: nn.Linear, statistics: LayerStatistics) -> list[StoredWeight]:
    """The record of a linear after each stage: a stage starts from the record before it and imitates the dense weight."""
    target_OI = linear.weight.detach().float()
    records = [StoredWeight(DenseWeight(target_OI))]
    for _, method, settings in STAGES:
        stored, _metrics = method.function(records[-1], target_OI, statistics, method.config(**{**method.defaults, **settings}))
        records.append(stored)
    return records[1:]


def perplexity(model: nn.Module, held_out: Sequence[Batch]) -> float:
    return math.exp(held_out_loss(student_of(model), held_out))


def main(directory: Path, text: Path) -> dict[str, float]:
    """Perplexity of the dense model and after every stage, on windows that neither calibrate nor train."""
    torch.manual_seed(0)
    ids = windows(AutoTokenizer.from_pretrained(directory), text)
    measured, chosen_by, calibration, training = ([Batch(part) for part in p.split(2)] for p in ids.split([16, 4, 32, len(ids) - 52]))
    dense, model = (AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False) for _ in range(2))
    linears = {name: module for name, module in dense.model.named_modules(prefix="model") if isinstance(module, nn.Linear)}
    scores = {"dense": perplexity(dense, measured)}
    statistics = statistics_of(dense, linears, torch.cat([batch.ids for batch in calibration]))
    records = {name: compressed(linear, statistics[name]) for name, linear in linears.items()}
    for number, (stage, _, _) in enumerate(STAGES):
        install(model, {name: chain[number] for name, chain in records.items()})
        scores[stage] = perplexity(model, measured)
    config, guide = RECOVER["lora"].config(**TRAINING), student_of(dense)
    attached = attach("lora", model, config)
    teacher = Teacher(lambda batch: guide.hidden(batch.ids), guide.logits)
    lessons = TrainingText(lambda index: training[index % len(training)], chosen_by, teacher)
    train(model, attached, lessons, config_of("lora", config))
    return scores | {"recover": perplexity(model, measured)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    given = parser.parse_args()
    for stage, score in main(given.model, given.text).items():
        print(f"{stage:<10} perplexity {score:.2f}")
