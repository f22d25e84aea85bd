"""What vLLM's worker processes hold; vLLM adds `Sizes` to its workers."""


class Sizes:
    """Measurements of one worker."""

    def sizes(self) -> tuple[int, int]:
        """Bytes of a token in the cache, and of all weights."""
        specs = self.get_kv_cache_spec().values()
        weights = {x.data_ptr(): x.nbytes for x in self.get_model().parameters()}
        return sum(x.page_size_bytes // x.block_size for x in specs), sum(weights.values())
