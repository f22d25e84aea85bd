"""A native model, dense or compressed, behind lm-evaluation-harness's interface (extra `eval`).

It scores and generates the same tokens as lm-eval's own HFLM, truncated in the same way.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import chunks, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..inference.chat import Chat, render
from ..inference.data import check_ids
from ..inference.generate import Generator
from ..inference.perplexity import rounding_cache
from ..inference.sampling import Sampling
from ..models.model import Model

log = logging.getLogger(__name__)


class NativeLM(TemplateLM):
    """The interface that lm-eval requires of a model.

    stop: tokens that end a text, beside the tokenizer's own. bits: of the cache, by default as the
    config says.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 1,
        stop: Sequence[int] = (),
        bits: int | None = None,
    ):
        super().__init__()
        self.model, self.batch_size, self.bits = model, batch_size, bits
        self.tokenizer: Any = tokenizer
        self.stop = [token for token in (*stop, self.eot_token_id) if token is not None]
        self.max_length = model.config.max_position_embeddings
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token to put before a text without context. Raises ValueError if there is none."""
        for token in (self.tokenizer.bos_token_id, self.eot_token_id):
            if token is not None:
                check_ids([token], self.tokenizer, self.model.config.vocab_size, "every text")
                return token
        raise ValueError("the tokenizer has no first and no end token: expected one, for tasks")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, unless they are there already."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        check_ids(ids, self.tokenizer, self.model.config.vocab_size, "a text of a task")
        return ids

    @property
    def tokenizer_name(self) -> str:
        """Of the tokenizer, by which lm-eval tells requests that it keeps."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: Chat, add_generation_prompt: bool = True) -> str:
        """A chat as text, as HFLM has it: without its system message if the template takes none.

        add_generation_prompt: whether an answer begins; if not, the last message goes on.
        """
        open_end = {"begun": add_generation_prompt, "continued": not add_generation_prompt}
        try:
            return render(self.tokenizer, chat_history, **open_end)
        except ValueError as error:
            without = [message for message in chat_history if message["role"] != "system"]
            if without == chat_history:
                raise
            log.warning("%s: trying without the system message", error)
            return render(self.tokenizer, without, **open_end)

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation of a context, and whether it is the greedy one."""
        same = defaultdict(list)  # answers of one token to one question share a forward pass
        for i, (_name, context, continuation) in enumerate(requests):
            self._check_length(len(continuation))
            same[tuple((context + continuation)[-self.max_length - 1 : -1])].append(i)
        scores: dict[int, tuple[float, bool]] = {}
        with tqdm(desc="scoring", total=len(requests), disable=None, leave=False) as bar:
            for batch in chunks(sorted(same, key=len, reverse=True), self.batch_size):
                tokens = torch.zeros(len(batch), len(batch[0]), dtype=torch.long)
                for row, text in zip(tokens, batch, strict=True):
                    row[: len(text)] = torch.tensor(
                        text
                    )  # attention is causal: padding behind it has no effect
                cache = rounding_cache(self.model, len(tokens), tokens.size(1), self.bits)
                hidden = self.model.hidden(tokens.to(self.device), cache=cache)
                for x, text in zip(hidden, batch, strict=True):
                    for i in same[text]:
                        scores[i] = self._score(x[: len(text)], requests[i][2])
                        bar.update()
        return [scores[i] for i in range(len(requests))]

    def _score(self, hidden: Tensor, continuation: list[int]) -> tuple[float, bool]:
        """hidden: (T, width) of context and continuation without its last token."""
        target = torch.tensor(continuation, device=self.device)
        logs = self.model.head(hidden[len(hidden) - len(target) :]).float().log_softmax(-1)
        greedy = bool((logs.argmax(-1) == target).all())
        return logs.gather(1, target[:, None]).sum().item(), greedy

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts: each token is predicted once, with context."""
        owners, windows = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                owners.append(owner)
                windows.append((None, *make_disjoint_window(pair)))
        sums = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += score
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to one of its stop strings, over the static cache.

        Raises ValueError for generation settings that are not supported.
        """
        alike = defaultdict(list)
        for i, request in enumerate(requests):
            alike[json.dumps(request.args[1])].append(i)
        outputs: dict[int, str] = {}
        with tqdm(desc="generating", total=len(requests), disable=None, leave=False) as bar:
            for settings, members in alike.items():
                members.sort(key=lambda i: len(requests[i].args[0]), reverse=True)
                for batch in chunks(members, self.batch_size):
                    wanted = wanted_of(json.loads(settings), seed=batch[0])
                    texts = self._generate([requests[i].args[0] for i in batch], wanted)
                    outputs.update(zip(batch, texts, strict=True))
                    bar.update(len(batch))
        return [outputs[i] for i in range(len(requests))]

    def _generate(self, contexts: list[str], wanted: "Wanted") -> list[str]:
        until, new, sampling = wanted
        self._check_length(new + 1)
        prompts = [
            self.tok_encode(x)[-(self.max_length - new) :] or [self.prefix_token_id]
            for x in contexts
        ]
        slots = max(len(prompt) for prompt in prompts) + new
        generator = Generator(self.model, len(prompts), slots, compile=False, bits=self.bits)
        rows: list[list[int]] = [[] for _ in prompts]
        texts, live = [""] * len(prompts), [True] * len(prompts)
        for tokens in generator.stream(prompts, new, sampling, self.stop):
            for i, token in enumerate(tokens.tolist()):
                if live[i] and token not in self.stop:
                    rows[i].append(token)
                    texts[i] = self.tokenizer.decode(rows[i], skip_special_tokens=True)
                live[i] &= token not in self.stop and not any(x in texts[i] for x in until)
            if not any(live):
                break
        return [postprocess_generated_text(text, until, None) for text in texts]

    def _check_length(self, new: int) -> None:
        if new > self.max_length:
            raise ValueError(
                f"a continuation of {new} tokens does not fit the {self.max_length} positions of "
                "the model: choose other tasks"
            )


class Wanted(NamedTuple):
    """How a task generates: up to one of `until`, at most `new_tokens`."""

    until: list[str]
    new_tokens: int
    sampling: Sampling


def wanted_of(settings: dict[str, Any], seed: int = 0) -> Wanted:
    """A task's generation settings. Raises ValueError for those that are not supported."""
    try:
        known: dict[str, Any] = dict(normalize_gen_kwargs(settings))
    except (TypeError, ValueError) as error:
        raise ValueError(f"a task cannot generate with {settings}: {error}") from None
    until, new = [x for x in known.pop("until") if x], known.pop("max_gen_toks")
    del known["do_sample"]  # the temperature is 0 where nothing is drawn
    drawn = {name: known.pop(name) for name in ("temperature", "top_k", "top_p") if name in known}
    if known.pop("num_beams", 1) != 1 or known:
        raise ValueError(
            f"a task generates with {settings}: expected until, max_gen_toks, do_sample, "
            "temperature, top_k and top_p only; choose other tasks"
        )
    numbers = all(isinstance(x, (int, float)) for x in drawn.values())
    if not numbers or new < 1 or not all(isinstance(x, str) for x in until):
        raise ValueError(
            f"a task cannot generate with {settings}: expected strings in until, max_gen_toks of "
            "1 or more, and numbers"
        )
    sampling = Sampling(**drawn, seed=seed)
    sampling.check()
    return Wanted(until, new, sampling)
