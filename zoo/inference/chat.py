"""Chats as text, by the chat template that comes with a tokenizer."""

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..utils.escape import told

Chat = Sequence[dict[str, Any]]  # messages, each with `role` and `content`
ASKED, ANSWERED = "what the user asks", "what the model answers"  # stand for what they say


def render(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, begun: bool = False, continued: bool = False
) -> str:
    """A chat as one text, special tokens included.

    begun: end with the beginning of an answer. continued: leave the last message open. Templates
    take the content of a message as a string or as a list of parts, {"type": "text", "text": ...};
    the form is taken in which what the user says is in the text. Raises ValueError if there is no
    template, or it fails in both forms.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template, so it cannot read chats")
    reasons = []
    for form in _forms(chat):
        try:
            text = tokenizer.apply_chat_template(
                form,
                tokenize=False,
                add_generation_prompt=begun,
                continue_final_message=continued,
            )
        except Exception as error:  # a template is foreign code: it may raise anything
            reasons.append(told(error))
            continue
        if isinstance(text, str) and _holds(text, chat):
            return text
        reasons.append("its text does not hold what the user says")
    raise ValueError(f"the chat template of the tokenizer fails: {reasons[0]}")


def frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """What a template puts before a user's message, between it and the answer, and behind that.

    Raises ValueError if there is no template, or it fails, or puts nothing in one of the first two.
    """
    chat = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]
    before, _, rest = render(tokenizer, chat).partition(ASKED)
    between, answered, behind = rest.partition(ANSWERED)
    if not (before and between and answered):
        raise ValueError("the chat template of the tokenizer does not mark where messages begin")
    return before, between, behind


def joined(content: Any) -> Any:
    """The content of a message, parts of text as one string; any other content as it is.

    Raises ValueError for parts that are not text.
    """
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        raise ValueError("a message has parts that are not text: expected text only")
    return "".join(part["text"] for part in content)


def _forms(chat: Chat) -> Iterator[list[dict[str, Any]]]:
    """The chat with strings as contents, then with parts."""
    plain = [{**message, "content": joined(message.get("content"))} for message in chat]
    yield plain
    yield [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message["content"], str)
        else message
        for message in plain
    ]


def _holds(text: str, chat: Chat) -> bool:
    """Whether something that the user says is in the text, or nothing was said."""
    said = [joined(m.get("content")) for m in chat if m.get("role") == "user"]
    words = [x.strip() for x in said if isinstance(x, str)]
    return not words or any(x in text for x in words)
