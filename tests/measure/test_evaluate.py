import pytest
import tiny

from eigenzoo.zoo.compression.compress import compress
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.domains import Domain
from eigenzoo.zoo.inference.perplexity import perplexity
from eigenzoo.zoo.measure.evaluate import compare


def test_comparison_measures_what_is_allocated():
    dense = tiny.native()
    low = compress(dense, tiny.tokens(8, 64), Settings(keep=0.5, kv_bits=(16,))).model
    domains = [Domain(name, name, tiny.tokens(1, 128, seed)) for seed, name in enumerate("xy")]
    rows = compare({"a": dense, "b": low}, domains, 64, [3, 4], [1], False)
    share = low.config.kv_width / low.config.dense_kv_width
    assert share <= 0.5
    assert rows["a"]["kv_bytes_per_token"] * 2 * 64 == rows["a"]["cache_bytes"]  # float32
    assert rows["b"]["cache_bytes"] == pytest.approx(share * rows["a"]["cache_bytes"])
    assert all(row["decode_tokens_per_second"] > 0 for row in rows.values())
    for x, y in zip(domains, rows["b"]["domains"]["texts"], strict=True):
        before, after = (perplexity(m, x.rows[0], 128).perplexity for m in (dense, low))
        assert (y["dense_perplexity"], y["perplexity"]) == pytest.approx((before, after))
        assert y["increase"] == pytest.approx(after / before - 1)
    assert "increase" not in rows["a"]["domains"]
