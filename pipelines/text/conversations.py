"""Rows of instruction data as documents whose answers alone carry loss.

Knows the two usual shapes (`prompt`/`completion`, `messages`) and chat templates. Does not know where rows come from.
"""

from typing import TYPE_CHECKING, Any

from ..errors import InputError, as_input_error
from .splits import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REWRITES = "the chat template rewrites earlier turns, so the answers cannot be located; give 'prompt' and 'completion' as strings"


def render(row: dict[str, Any], number: int, name: str, tokenizer: Any) -> Document:
    """One row as text; loss lies on the completion, or on every assistant message with the end mark its template writes.

    `prompt` and `completion` may be strings (an end-of-text mark is added) or lists of messages.
    """
    where = f"{name}: row {number}"
    if tokenizer is None:
        raise InputError(f"{where}: prompts and messages need a model's tokenizer and serve for calibration and training only with one")
    if "messages" in row:
        return _conversation(row["messages"], 0, where, tokenizer)
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation(prompt + completion, len(prompt), where, tokenizer)
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise InputError(f"{where}: 'prompt' and 'completion' must both be strings or both lists of messages")
    text = prompt + completion + (tokenizer.eos_token or "")
    return Document(text, ((len(prompt), len(text)),))


def _conversation(messages: object, first_answer: int, where: str, tokenizer: "PreTrainedTokenizerBase") -> Document:
    if not isinstance(messages, list) or not all(isinstance(message, dict) and "role" in message for message in messages) or not messages:
        raise InputError(f"{where}: 'messages' must be a list of objects with 'role' and 'content'")
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{where}: this model's tokenizer has no chat template; give rows with 'text' or 'prompt' and 'completion'")
    spans, done = [], ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < first_answer:
            continue
        prompted = _templated(messages[:index], True, where, tokenizer)
        answered = _templated(messages[: index + 1], False, where, tokenizer)
        if not (prompted.startswith(done) and answered.startswith(prompted)):
            raise InputError(f"{where}: {REWRITES}")
        spans.append((len(prompted), len(answered)))
        done = answered
    if not spans:
        raise InputError(f"{where}: has no assistant message to learn from")
    text = _templated(messages, False, where, tokenizer)
    if not text.startswith(done):
        raise InputError(f"{where}: {REWRITES}")
    return Document(text, tuple(spans))


def _templated(messages: list[dict[str, Any]], ask: bool, where: str, tokenizer: Any) -> str:
    with as_input_error(f"{where}: the chat template refuses it"):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
