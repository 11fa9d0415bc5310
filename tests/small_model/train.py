"""Make the tests' model and text: a small Llama trained on the demo text's training articles, and excerpts it has never seen.

    python tests/small_model/train.py [--steps 2000]        about six minutes of one core; see README.md in this directory
    python tests/small_model/train.py --width 256 --steps 1500 --output DIR    another model alone: widths of whole super-blocks of GGUF's k-quants

The random numbers come from one seed; a different CPU or torch build rounds differently and ends in a slightly different model.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from bitmend.pipelines.demo.imported import demo_text
from bitmend.pipelines.text.splits import PARTS, Document, split_documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
SEED = 20241124
VOCABULARY = 1024
SEQ_LEN = 256
BATCH = 8
PEAK_LEARNING_RATE = 5e-3
WARMUP_STEPS = 50
EXCERPT_CHARACTERS = 10_000
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)


def write_excerpts(rows: list[dict[str, str]], path: Path) -> None:
    """The beginning of each article, whole paragraphs up to 10,000 characters, one JSON object a line."""
    with path.open("w", encoding="utf-8") as sink:
        for row in rows:
            text = row["text"]
            if len(text) > EXCERPT_CHARACTERS:
                text = text[: text.rfind("\n", 0, EXCERPT_CHARACTERS)].rstrip()
            sink.write(json.dumps({"title": row["title"], "url": row["url"], "text": text}, ensure_ascii=False) + "\n")


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text has a tokenization and no token stands for the unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end, model_max_length=512)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    return torch.tensor(tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"])


def train(ids: Tensor, steps: int, config: LlamaConfig) -> LlamaForCausalLM:
    """Adam with warm-up and cosine decay over windows drawn at random offsets; the rate falls as the width grows."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(SEED)
    peak = PEAK_LEARNING_RATE * CONFIG.hidden_size / config.hidden_size
    started = time.process_time()
    for step in range(steps):
        rate = peak * min((step + 1) / WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts_B = torch.randint(len(ids) - SEQ_LEN, (BATCH,), generator=generator)
        batch_BT = torch.stack([ids[start : start + SEQ_LEN] for start in starts_B.tolist()])
        loss = functional.cross_entropy(model(batch_BT).logits[:, :-1].flatten(0, 1), batch_BT[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.process_time() - started:.0f} s of CPU", flush=True)
    return model.eval()


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, ids: Tensor) -> float:
    """Over non-overlapping windows of SEQ_LEN, SEQ_LEN − 1 predicted tokens each."""
    windows_NT = ids[: len(ids) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)
    logits = torch.cat([model(batch_BT).logits[:, :-1] for batch_BT in windows_NT.split(BATCH)])
    return math.exp(functional.cross_entropy(logits.flatten(0, 1), windows_NT[:, 1:].flatten()).item())


def unigram_perplexity(train_ids: Tensor, ids: Tensor) -> float:
    """What knowing only the frequencies of the training text gives."""
    counts = torch.bincount(train_ids, minlength=VOCABULARY).double() + 1
    return math.exp(-(counts / counts.sum()).log()[ids].mean().item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--width", type=int, default=CONFIG.hidden_size, help="of the model; its MLP is twice as wide")
    parser.add_argument("--output", type=Path, help="a directory for model and tokenizer; the excerpts stay as they are")
    given = parser.parse_args()
    config = LlamaConfig(**{**CONFIG.to_dict(), "hidden_size": given.width, "intermediate_size": 2 * given.width, "head_dim": given.width // 4})
    rows = [json.loads(line) for line in demo_text().read_text(encoding="utf-8").splitlines()]
    parts, _ = split_documents([Document(row["text"]) for row in rows], PARTS)
    seen = [document.text for document in parts["train"]]
    if given.output is None:
        write_excerpts([row for row in rows if row["text"] not in set(seen)], HERE / "text.jsonl")
    tokenizer = make_tokenizer(seen)
    ids = encode(tokenizer, seen)
    print(f"{len(seen)} articles, {len(ids)} tokens", flush=True)
    model = train(ids, given.steps, config)
    model.save_pretrained(given.output or HERE / "model")
    tokenizer.save_pretrained(given.output or HERE / "model")
    excerpts = [Document(json.loads(line)["text"]) for line in (HERE / "text.jsonl").read_text(encoding="utf-8").splitlines()]
    unseen, _ = split_documents(excerpts, PARTS)
    evaluation = encode(tokenizer, [document.text for document in unseen["evaluation"]])
    print(f"evaluation part of text.jsonl: {len(evaluation)} tokens, perplexity {perplexity(model, evaluation):.2f}")
    print(f"unigram {unigram_perplexity(ids, evaluation):.1f}, parameters {sum(p.numel() for p in model.parameters())}")


if __name__ == "__main__":
    main()
