"""Whether a model knows the tokens of a tokenizer, or of another model."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from .checkpoint import vocabulary


def check_ids(
    ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, vocabulary: int | None, name: str
) -> None:
    """Raise ValueError for a token that the model has no embedding for. name: of the text."""
    highest = max(ids, default=0)
    if vocabulary is not None and highest >= vocabulary:
        raise ValueError(
            f"{name} has token {highest}, {tokenizer.convert_ids_to_tokens(highest)!r}, of the "
            f"tokenizer's {len(tokenizer)}, but the model knows {vocabulary}: use the tokenizer "
            "that belongs to the model"
        )


def check_same_vocabulary(
    source: str, draft: str, revision: str | None = None, trust_remote_code: bool = False
) -> None:
    """Raise ValueError unless a draft model has the tokens of the model. No weights are read.

    source, revision: of the model, as of `checkpoint.load`, and so is trust_remote_code, for both.
    """
    (known, tokens), (drafted, others) = (
        vocabulary(source, revision, trust_remote_code),
        vocabulary(draft, None, trust_remote_code),
    )
    if known != drafted or tokens != others:
        raise ValueError(
            f"{draft} knows {drafted} tokens, and {source} {known}"
            + (", which are not the same" if known == drafted else "")
            + ": expected a draft model with the same tokenizer and the same number of tokens"
        )
