"""Whether a model knows the tokens of a tokenizer."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


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
