"""Pages of documents, used again behind other texts: a KV connector of vLLM, off by default.

vLLM's prefix cache finds a page only behind the tokens it was computed behind. Where rows do not
tell in which block they stand (`zoo.inference.moved`), a page may stand elsewhere too. It was
computed with attention to what preceded it there, so answers are approximate. A request asks for
this by naming its documents, and needs a cache salt, so that no other request reads its pages:

    {"kv_transfer_params": {"documents": [64, 320, 512]}, "cache_salt": "approximate", ...}

says that tokens 64 to 319 and 320 to 511 of the prompt are documents. All are multiples of the page
size, and above 0: a document that begins a text holds an attention sink, and loses more elsewhere.
What a document's pages are known by is the salt and the document's tokens up to their end.

vLLM computes what follows the first token that it lacks. So documents are used again only as far as
the prompt before them is in the prefix cache, and each document before is there or used again too.
"""

from array import array
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import pairwise
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)
from vllm.logger import init_logger

from ..zoo.inference.moved import shift_step
from ..zoo.models.config import Config

NAME = "MovedPages"  # as --kv-transfer-config names it
log = init_logger(__name__)


def check(config: Config, options: VllmConfig) -> None:
    """Raise ValueError if pages of the model cannot be moved."""
    step, cache = shift_step(config), options.cache_config
    if cache.block_size % step:
        raise ValueError(
            f"pages of {cache.block_size} slots cannot be moved, because keys are anchored in "
            f"blocks of {step}: pass --block-size {step}, or a multiple of it"
        )
    if not cache.enable_prefix_caching:
        raise ValueError("pages are moved from the prefix cache: omit --no-enable-prefix-caching")


@dataclass
class Copies(KVConnectorMetadata):
    """Before a step, page sources[i] is copied to page targets[i], in all layers."""

    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)


class MovedPages(KVConnectorBase_V1, SupportsHMA):
    """One object in the scheduler, which chooses pages, and one in each worker, which copies."""

    def __init__(self, vllm_config: VllmConfig, role: Any, kv_cache_config: Any):
        super().__init__(vllm_config, role, kv_cache_config)
        self.page = vllm_config.cache_config.block_size
        self.caches: list[Tensor] = []
        self.pool: Any = None  # of vLLM's pages
        self.copies = Copies()
        self.known: dict[bytes, tuple[int, Any]] = {}  # by key a page, and vLLM's hash of it
        self.keys: dict[int, bytes] = {}  # by page the key under which it is known
        self.plans: dict[str, tuple[int, list[int]]] = {}  # first page of a prompt, its sources

    # in the scheduler

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """The pages, of which each knows its hash while it holds what was computed."""
        self.pool = gpu_block_pool

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """How many tokens behind those of the prefix cache have pages that can be copied."""
        first, keys = num_computed_tokens // self.page, self._keys(request)
        sources: list[int] = []
        # one token at least is computed, for its logits
        while (first + len(sources) + 1) * self.page < request.num_tokens:
            source = self._held(keys.get(first + len(sources)))
            if source is None:
                break
            sources.append(source)
        self.plans[request.request_id] = first, sources
        return len(sources) * self.page, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plan the copies to the pages that vLLM has given to a request."""
        first, sources = self.plans.pop(request.request_id, (0, []))
        count = num_external_tokens // self.page
        self.copies.sources += sources[:count]
        self.copies.targets += blocks.get_block_ids()[0][first : first + count]

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """The copies before this step."""
        copies, self.copies = self.copies, Copies()
        return copies

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Know the pages of documents that a request has computed, as long as vLLM keeps them."""
        self.plans.pop(request.request_id, None)
        keys = self._keys(request)
        for index, page in enumerate(block_ids[0]):
            key, held = keys.get(index), self.pool.blocks[page].block_hash
            if key is None or held is None or self._held(key) is not None:
                continue
            former = self.keys.get(page)
            if former is not None and self.known[former][0] == page:
                del self.known[former]
            self.known[key], self.keys[page] = (page, held), key
        return False, None

    def _held(self, key: bytes | None) -> int | None:
        """The page that is known by a key, if it still holds the same."""
        page, held = self.known.get(key, (None, None)) if key else (None, None)
        same = page is not None and self.pool.blocks[page].block_hash == held
        return page if same else None

    def _keys(self, request: Any) -> dict[int, bytes]:
        """The key of each page of a prompt that a document fills, by the page's index in it."""
        borders = (request.kv_transfer_params or {}).get("documents")
        if not borders:
            return {}
        tokens = request.prompt_token_ids or []
        if not (request.cache_salt and _rising(borders, self.page, len(tokens))):
            log.warning_once(
                "documents of requests are computed: expected rising multiples of %d, above 0 and "
                "within the prompt, and a cache_salt",
                self.page,
            )
            return {}
        keys = {}
        for start, stop in pairwise(borders):
            key = request.cache_salt.encode()
            for at in range(start, stop, self.page):
                key = sha256(key + array("q", tokens[at : at + self.page]).tobytes()).digest()
                keys[at // self.page] = key
        return keys

    # in a worker

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """The pages of every layer, (pages, ...)."""
        self.caches = [*kv_caches.values()]

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Copy. All sources are read before a target is written, as a page may be both."""
        copies = self._get_connector_metadata()
        assert isinstance(copies, Copies)
        for cache in self.caches if copies.sources else ():
            cache[copies.targets] = cache[copies.sources]

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Copies are made before the step."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **_: Any) -> None:
        """vLLM's pages are all that is kept."""

    def wait_for_save(self) -> None:
        """As in `save_kv_layer`."""


def _rising(borders: Any, page: int, tokens: int) -> bool:
    """Whether borders of documents are what a request may name."""
    if not isinstance(borders, list) or not all(type(x) is int for x in borders):
        return False
    inside = all(x % page == 0 and 0 < x <= tokens for x in borders)
    return inside and all(x < y for x, y in pairwise(borders))
