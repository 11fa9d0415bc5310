"""Sources, parts without leaks, protocols, windows and batches, on the small model's tokenizer and text."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from bitmend.pipelines.errors import InputError, UsageError
from bitmend.pipelines.text.data import Documents, Parts, Windows, batch, load_text, tokenize
from bitmend.pipelines.text.splits import PARTS, normalised_hash
from pyarrow import parquet
from transformers import AutoTokenizer

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def tokenizer(small_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(small_model)


@pytest.fixture(scope="module")
def texts(small_text: Path) -> list[str]:
    return [json.loads(line)["text"] for line in small_text.read_text(encoding="utf-8").splitlines()]


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def long_lines(documents: Documents) -> set[str]:
    return {normalised_hash(line) for line in documents.text.split("\n") if len(line) >= 100}


def load_parts(calibration: str, train: str, evaluation: str) -> dict[str, Documents]:
    """Of one source a part."""
    parts = Parts([calibration], [train], evaluation)
    return {part: documents for part in PARTS for documents in parts[part].values()}


def assert_no_leak(parts: dict[str, Documents]) -> None:
    for part in ("held_out", "calibration", "train"):
        assert not long_lines(parts["evaluation"]) & long_lines(parts[part]), part
    for part in ("calibration", "train"):
        assert not long_lines(parts["held_out"]) & long_lines(parts[part]), part


# parts and leaks


def test_parts_of_one_file_are_disjoint(small_text: Path):
    source = str(small_text)
    parts = load_parts(source, source, source)
    assert list(parts) == list(PARTS)
    assert_no_leak(parts)
    assert len({parts[part].protocol["fingerprint"] for part in PARTS}) == 4
    assert sum(parts[part].protocol["documents"] for part in PARTS) == len(small_text.read_text(encoding="utf-8").splitlines())


def test_parts_without_a_shared_source_are_whole(small_text: Path, tmp_path: Path, texts: list[str]):
    own = jsonl(tmp_path / "eval.jsonl", [{"text": "A line that is nowhere else. " * 20}])
    parts = load_parts(str(small_text), str(small_text), own)
    assert parts["evaluation"].protocol["rule"] == "whole"
    assert sum(parts[part].protocol["documents"] for part in ("held_out", "calibration", "train")) == len(texts)


def test_a_document_of_the_evaluation_file_is_dropped_from_the_training_file(tmp_path: Path, texts: list[str]):
    evaluation = jsonl(tmp_path / "eval.jsonl", [{"text": text} for text in texts[:3]])
    disguised = texts[1].upper().replace(" ", "  ")
    training = jsonl(tmp_path / "train.jsonl", [{"text": text} for text in [*texts[3:], texts[0], disguised]])
    parts = load_parts(training, training, evaluation)
    assert_no_leak(parts)
    assert sum(parts[part].protocol["dropped_documents"] for part in ("held_out", "calibration", "train")) == 2
    assert sum(len(parts[part].documents) for part in ("held_out", "calibration", "train")) == len(texts) - 3


def test_evaluation_text_hidden_in_a_long_plain_file_is_cut_out(tmp_path: Path, texts: list[str]):
    (tmp_path / "eval.txt").write_text("\n\n".join(texts[:2]), encoding="utf-8")
    (tmp_path / "book.txt").write_text("\n".join([*texts[3:9], texts[0], *texts[9:15]]), encoding="utf-8")
    book = str(tmp_path / "book.txt")
    parts = load_parts(book, book, str(tmp_path / "eval.txt"))
    assert_no_leak(parts)
    lines = sum(len(line) >= 100 for line in texts[0].split("\n"))
    assert sum(parts[part].protocol["dropped_lines"] for part in ("held_out", "calibration", "train")) == lines > 0


def test_a_training_file_that_is_the_evaluation_text_leaves_nothing_and_says_so(tmp_path: Path, texts: list[str]):
    evaluation = jsonl(tmp_path / "eval.jsonl", [{"text": text} for text in texts[:12]])
    training = jsonl(tmp_path / "train.jsonl", [{"text": text} for text in texts[:12]])
    with pytest.raises(InputError, match=r"nothing is left for held_out after \d+ documents that occur in other parts"):
        load_parts(training, training, evaluation)


def test_the_same_text_gives_the_same_fingerprint_and_another_text_another(small_text: Path, tmp_path: Path, texts: list[str]):
    copy = jsonl(tmp_path / "copy.jsonl", [{"text": text} for text in texts])
    changed = jsonl(tmp_path / "changed.jsonl", [{"text": text} for text in [*texts[:-1], texts[-1] + "."]])
    prints = [load_text(source, "evaluation").protocol["fingerprint"] for source in (str(small_text), copy, changed)]
    assert prints[0] == prints[1] != prints[2]


# what a source holds


@pytest.mark.parametrize("name", ["wiki.test.txt", "wiki.test.raw"])
def test_a_text_file_used_whole_is_read_to_the_byte(tmp_path: Path, name: str):
    raw = " \n = First = \n \n Text of the first .\n \n = = Section = = \n more\n \n = Second = \n \n Text of the second .\n"
    (tmp_path / name).write_text(raw, encoding="utf-8", newline="")
    documents = load_text(str(tmp_path / name), "evaluation")
    assert documents.text == raw and len(documents.documents) == 2 and documents.join == ""


def test_separated_stories_are_documents(tmp_path: Path):
    (tmp_path / "stories.txt").write_text("One day.\n<|endoftext|>\nAnother day.\n<|endoftext|>\n", encoding="utf-8")
    documents = load_text(str(tmp_path / "stories.txt"), "evaluation")
    assert [d.text for d in documents.documents] == ["One day.", "Another day."]


def test_wikitext_rows_are_joined_as_the_papers_do(tmp_path: Path):
    rows = ["", " = Title = \n", "", " Text . \n", "", " = = Part = = \n", "", " More . \n", " = Other = \n", "", " End . \n"]
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "test.parquet")
    documents = load_text(str(tmp_path / "test.parquet"), "evaluation")
    assert documents.text == "\n\n".join(rows)
    assert len(documents.documents) == 2 and documents.protocol["join"] == "\n\n"


def test_a_directory_of_the_datasets_library_gives_its_official_splits(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    directory = tmp_path / "corpus"
    directory.mkdir()
    jsonl(directory / "train.jsonl", [{"text": text} for text in texts[:20]])
    jsonl(directory / "validation.jsonl", [{"text": text} for text in texts[20:23]])
    jsonl(directory / "test.jsonl", [{"text": text} for text in texts[23:27]])
    parts = load_parts(str(directory), str(directory), str(directory))
    assert {part: parts[part].protocol["split"] for part in PARTS} == {
        "evaluation": "test",
        "held_out": "validation",
        "calibration": "train",
        "train": "train",
    }
    assert [d.text for d in parts["evaluation"].documents] == texts[23:27]
    assert len(parts["calibration"].documents) + len(parts["train"].documents) == 20
    assert not {d.text for d in parts["calibration"].documents} & {d.text for d in parts["train"].documents}
    named = load_text(f"{directory}::validation", "evaluation")
    assert [d.text for d in named.documents] == texts[20:23]
    assert [d.text for d in load_text(f"{directory}:train[:2]", "evaluation").documents] == texts[:2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"caf\xe9", "byte 3 is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'["x"]\n', "line 1 holds a list"),
        ("a.jsonl", b'{"body": "x"}\n', "rows have body; needed is 'text'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', "row 2 has NoneType"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.parquet", b"PAR1 not really", "not a readable parquet file"),
        ("a.csv", b"text\nx\n", "unknown kind of text file '.csv'"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_text(str(tmp_path / name), "evaluation")
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_missing_file_is_not_taken_for_a_hub_id(tmp_path: Path):
    with pytest.raises(InputError, match="no such file"):
        load_text(str(tmp_path / "gone.jsonl"), "evaluation")


def test_an_unknown_part_is_named(small_text: Path):
    with pytest.raises(UsageError, match="unknown part of a text 'dev'"):
        load_text(str(small_text), "dev")


def test_a_data_set_offline_is_one_line():
    program = (
        "from bitmend.pipelines.text.data import load_text\n"
        "from bitmend.pipelines.errors import InputError\n"
        "try:\n    load_text('wikitext2', 'evaluation')\n"
        "except InputError as error:\n    print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": "/nonexistent", "PYTHONSAFEPATH": "1"}
    output = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert "Salesforce/wikitext" in output and "\n" not in output and "'demo'" in output


# answers only


def loss_text(windows: Windows, tokenizer: Any) -> str:
    assert windows.loss is not None
    return tokenizer.decode(windows.ids[windows.loss])


def test_prompts_carry_no_loss(tmp_path: Path, tokenizer: Any):
    rows = [{"prompt": f"Question {n}: what is {n} plus one?\nAnswer:", "completion": f" It is {n + 1}."} for n in range(40)]
    documents = load_text(jsonl(tmp_path / "qa.jsonl", rows), "train", tokenizer=tokenizer)
    windows = tokenize(documents, tokenizer, 16)
    used = windows.ids.numel()
    everything = "".join(row["prompt"] + row["completion"] + tokenizer.eos_token for row in rows)
    ids = tokenizer(everything, add_special_tokens=False)["input_ids"][:used]
    assert windows.ids.flatten().tolist() == ids
    answers = "".join(row["completion"] + tokenizer.eos_token for row in rows)
    assert answers.startswith(loss_text(windows, tokenizer)) and len(loss_text(windows, tokenizer)) > 0.9 * len(answers)
    assert windows.loss is not None and windows.protocol["loss_tokens"] == int(windows.loss[:, 1:].sum()) < windows.protocol["tokens"]


def test_only_assistant_messages_carry_loss(tmp_path: Path, small_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    tokenizer.chat_template = CHAT
    talk = [("user", "Where is the river?"), ("assistant", "Behind the hill."), ("user", "And the sea?"), ("assistant", "Far away.")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in talk]}] * 12
    windows = tokenize(load_text(jsonl(tmp_path / "chat.jsonl", rows), "train", tokenizer=tokenizer), tokenizer, 8)
    expected = "Behind the hill.</s>Far away.</s>" * 12
    assert expected.startswith(loss_text(windows, tokenizer)) and len(loss_text(windows, tokenizer)) > 300


def test_prompts_given_as_messages_learn_the_completion_only(tmp_path: Path, small_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    tokenizer.chat_template = CHAT
    prompt = [{"role": "assistant", "content": "How can I help?"}, {"role": "user", "content": "Say yes."}]
    rows = [{"prompt": prompt, "completion": [{"role": "assistant", "content": "Yes."}]}] * 12
    windows = tokenize(load_text(jsonl(tmp_path / "chat.jsonl", rows), "train", tokenizer=tokenizer), tokenizer, 8)
    assert ("Yes.</s>" * 12).startswith(loss_text(windows, tokenizer))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "'messages' must be a list"),
        ({"messages": [{"role": "user", "content": "Hello"}]}, "no assistant message"),
        ({"prompt": "a", "completion": ["b"]}, "must both be strings or both lists"),
    ],
)
def test_bad_conversations_are_refused(tmp_path: Path, small_model: Path, row: dict[str, Any], message: str):
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    tokenizer.chat_template = CHAT
    with pytest.raises(InputError, match=message):
        load_text(jsonl(tmp_path / "chat.jsonl", [row]), "train", tokenizer=tokenizer)


def test_a_tokenizer_without_a_template_is_named(tmp_path: Path, tokenizer: Any):
    row = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello."}]}
    with pytest.raises(InputError, match="row 1: this model's tokenizer has no chat template"):
        load_text(jsonl(tmp_path / "chat.jsonl", [row]), "train", tokenizer=tokenizer)


def test_a_template_that_drops_earlier_turns_is_refused(tmp_path: Path, small_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    row = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]}
    with pytest.raises(InputError, match="rewrites earlier turns"):
        load_text(jsonl(tmp_path / "chat.jsonl", [row]), "train", tokenizer=tokenizer)


# windows


@pytest.fixture(scope="module")
def documents(small_text: Path) -> Documents:
    return load_text(str(small_text), "evaluation", roles=PARTS)


def test_windows_are_the_joined_text_cut_once(documents: Documents, tokenizer: Any):
    ids = tokenizer("\n\n".join(d.text for d in documents.documents), add_special_tokens=False)["input_ids"]
    windows = tokenize(documents, tokenizer, 64)
    assert windows.ids.dtype == torch.int64 and windows.loss is None
    assert windows.ids.tolist() == [ids[start : start + 64] for start in range(0, len(ids) // 64 * 64, 64)]
    first = tokenize(documents, tokenizer, 64, 5)
    assert torch.equal(first.ids, windows.ids[:5])
    assert (first.protocol["windows"], first.protocol["tokens"], first.protocol["windows_available"]) == (5, 5 * 63, len(windows.ids))


def test_bytes_are_those_of_the_predicted_text(documents: Documents, tokenizer: Any):
    windows = tokenize(documents, tokenizer, 64)
    decoded = sum(len(tokenizer.decode(row[1:]).encode()) for row in windows.ids)
    assert abs(windows.protocol["bytes"] - decoded) <= 2 * len(windows.ids)  # a character cut by a window's end decodes to U+FFFD
    assert windows.protocol["bytes"] > windows.protocol["tokens"]


def test_bytes_count_wide_characters(tmp_path: Path, tokenizer: Any):
    (tmp_path / "wide.txt").write_text("aé漢😀" * 50, encoding="utf-8")
    wide = load_text(str(tmp_path / "wide.txt"), "evaluation")
    count = len(tokenizer(wide.text, add_special_tokens=False)["input_ids"])
    assert tokenize(wide, tokenizer, count).protocol["bytes"] == 50 * (1 + 2 + 3 + 4) - 1


def test_a_sample_depends_on_the_seed_alone_and_repeats_nothing(documents: Documents, tokenizer: Any):
    everything = {tuple(row) for row in tokenize(documents, tokenizer, 32).ids.tolist()}
    first, again, other = (tokenize(documents, tokenizer, 32, 20, seed=seed).ids.tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert len({tuple(row) for row in first}) == 20 and {tuple(row) for row in first} <= everything


def test_a_text_shorter_than_one_window_is_refused_with_the_numbers(tmp_path: Path, tokenizer: Any):
    (tmp_path / "short.txt").write_text("Few words.", encoding="utf-8")
    short = load_text(str(tmp_path / "short.txt"), "evaluation")
    count = len(tokenizer("Few words.", add_special_tokens=False)["input_ids"])
    with pytest.raises(InputError, match=rf"short.txt \(evaluation\): {count} tokens are fewer than one window of 512; .* at most {count}"):
        tokenize(short, tokenizer, 512)


def test_fewer_windows_than_requested_are_reported(documents: Documents, tokenizer: Any, caplog: pytest.LogCaptureFixture):
    windows = tokenize(documents, tokenizer, 64, 10_000)
    assert f"all {len(windows.ids)} windows are used, 10000 were requested" in caplog.text


def test_bos_where_it_was_asked_for(documents: Documents, tokenizer: Any):
    plain = tokenize(documents, tokenizer, 32, bos="none").ids
    assert tokenize(documents, tokenizer, 32).protocol["bos"] == "none"
    start = tokenize(documents, tokenizer, 32, bos="start")
    assert start.ids[0].tolist() == [tokenizer.bos_token_id, *plain[0, :-1].tolist()]
    assert start.ids[1, 0] == plain[0, -1]
    each = tokenize(documents, tokenizer, 33, bos="window")
    assert (each.ids[:, 0] == tokenizer.bos_token_id).all() and torch.equal(each.ids[:, 1:], plain)
    assert each.protocol["tokens"] == plain.numel() and each.protocol["bos"] == "window"
    assert abs(each.protocol["bytes"] - len(tokenizer.decode(plain.flatten()).encode())) <= 3
    assert start.protocol["tokenizer"] == each.protocol["tokenizer"]


def test_bos_follows_the_tokenizer(documents: Documents, small_model: Path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(small_model)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
    assert tokenize(documents, tokenizer, 32, 2).protocol["bos"] == "start"
    gemma = type("GemmaTokenizer", (type(tokenizer),), {})
    tokenizer.__class__ = gemma
    windows = tokenize(documents, tokenizer, 32, 2)
    assert windows.protocol["bos"] == "window" and (windows.ids[:, 0] == tokenizer.bos_token_id).all()


@pytest.mark.parametrize("arguments", [{"seq_len": 1}, {"seq_len": 16, "windows": 0}, {"seq_len": 16, "bos": "always"}])
def test_impossible_windows_are_refused(documents: Documents, tokenizer: Any, arguments: dict[str, Any]):
    with pytest.raises(UsageError):
        tokenize(documents, tokenizer, **arguments)


# batches


def test_an_epoch_shows_every_window_once(documents: Documents, tokenizer: Any):
    windows = tokenize(documents, tokenizer, 32, 30)
    seen = [tuple(row) for step in range(10) for row in batch(windows, step, 7, 3)[0].tolist()]
    assert sorted(seen) == sorted(tuple(row) for row in windows.ids.tolist())
    second = [tuple(row) for step in range(10, 20) for row in batch(windows, step, 7, 3)[0].tolist()]
    assert sorted(second) == sorted(seen) and second != seen


def test_a_batch_depends_on_step_and_seed_alone(documents: Documents, tokenizer: Any):
    windows = tokenize(documents, tokenizer, 32, 30)
    torch.manual_seed(0)
    first = batch(windows, 13, 7, 4)[0]
    torch.manual_seed(99)
    batch(windows, 2, 7, 4)
    assert torch.equal(first, batch(windows, 13, 7, 4)[0])
    assert not torch.equal(first, batch(windows, 13, 8, 4)[0])
    assert batch(windows, 0, 7, 64)[0].shape == (64, 32)


def test_a_batch_carries_the_loss_mask_of_its_windows(tmp_path: Path, tokenizer: Any):
    rows = [{"prompt": f"Question {n}:", "completion": f" answer {n}."} for n in range(60)]
    windows = tokenize(load_text(jsonl(tmp_path / "qa.jsonl", rows), "train", tokenizer=tokenizer), tokenizer, 16)
    ids, loss = batch(windows, 0, 0, 4)
    assert loss is not None and windows.loss is not None
    for row, mask in zip(ids, loss, strict=True):
        place = int((windows.ids == row).all(1).nonzero()[0])
        assert torch.equal(mask, windows.loss[place])
