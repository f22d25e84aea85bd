"""What `evaluate` measures of a checkpoint on a text: perplexity, and what it alone hides."""

from collections.abc import Sequence
from typing import NamedTuple, cast

from ..inference.checkpoint import Checkpoint, stop_tokens
from ..inference.data import read_tokens
from ..inference.perplexity import mean_perplexity, token_losses
from ..inference.texts import Text
from ..models.config import kv_bytes
from ..utils.records import EvaluationResult, PositionRecord, RetrievalRecord
from . import probe
from .domains import check_unseen
from .ruler import ruler

LENGTHS = (256, 512, 1024, 2048)  # tokens of a text with a fact in it, unless told
RULER_LENGTH = 4096


class Probes(NamedTuple):
    """What to measure.

    perplexity: on `windows` windows of `window` tokens; 0 windows are all of the text, None is
    2048 tokens, or as many as the model can read. by_position: also by the number of tokens
    before. retrieval: ask for planted facts, `facts` for each length and depth; lengths: tokens of
    a text with a fact in it; none are those of `LENGTHS` that the model can read. seed: of the
    facts. bits: of a number in the cache, None as the model's config says. ruler: ask `samples`
    questions of every task of `ruler_tasks`, `batch` at once, at the same lengths; none are
    `RULER_LENGTH`, or what the model can read. keep: the most tokens of what comes before an answer
    that stay in the cache; None: all.
    """

    perplexity: bool = True
    window: int | None = None
    windows: int = 0
    by_position: bool = False
    retrieval: bool = False
    lengths: Sequence[int] = ()
    facts: int = 5
    seed: int = 0
    bits: int | None = None
    ruler: bool = False
    samples: int = 20
    batch: int = 1
    keep: int | None = None


def measure(source: str, checkpoint: Checkpoint, text: Text, probes: Probes) -> EvaluationResult:
    """Measure a checkpoint on a text, and the bytes of its cache.

    source: its name in the result. Raises ValueError for windows and lengths that do not fit the
    model or the text, and for perplexity on a text that the checkpoint was calibrated on.
    """
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    longest = model.config.max_position_embeddings
    result: EvaluationResult = {"model": source, **kv_bytes(model.config, probes.bits)}
    if probes.perplexity or probes.by_position:
        check_unseen(source, checkpoint, [text])
        window = probes.window or min(2048, longest)
        tokens = read_tokens(tokenizer, text, model.config.vocab_size).to(model.device)
        losses = token_losses(model, tokens, window, probes.windows, probes.bits)
        quality = mean_perplexity(losses)
        result["perplexity"], result["tokens"] = quality.perplexity, quality.tokens
        result["text"], result["window"] = text.name, window
        if probes.by_position:
            buckets = [x._asdict() for x in probe.by_position(losses)]
            result["by_position"] = cast(list[PositionRecord], buckets)
    if probes.keep is not None:
        result["keep_tokens"] = probes.keep
    if probes.retrieval:
        lengths = probes.lengths or [n for n in LENGTHS if n <= longest] or [longest]
        how = probe.DEPTHS, probes.facts, probes.seed, probes.bits, probes.keep
        rows = probe.retrieval(model, tokenizer, text, lengths, *how)
        result["text"] = text.name
        result["retrieval"] = cast(list[RetrievalRecord], [x._asdict() for x in rows])
    if probes.ruler:
        lengths = probes.lengths or [min(RULER_LENGTH, longest)]
        sizes = probes.samples, probes.seed, stop_tokens(checkpoint), probes.batch
        result["ruler"] = ruler(model, tokenizer, lengths, *sizes, probes.bits, probes.keep)
    return result
