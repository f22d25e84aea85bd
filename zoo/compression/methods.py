"""The methods by name: bases, rank rule, statistics, and what each goes with."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..models.model import Model
from .basis import (
    LayerBasis,
    attention,
    eigen,
    fisher,
    fisher_plain,
    kq_svd,
    kv_heads,
    lorc,
    lorc_weights,
    palu,
    palu_weights,
    pca,
)
from .moments import Statistics


class Method(NamedTuple):
    """A way to choose bases, where it comes from, what it needs and what it goes with."""

    basis: Callable[..., LayerBasis]  # of a model, the attention of a layer and its statistics
    source: str
    gradients: bool = False  # statistics of gradients, of queries, of the gradients of weights
    queries: bool = False
    weights: bool = False
    plain: bool = True  # of the sums of gradients those where all tokens are alike
    weighted: bool = True  # and those where they are weighed
    data: bool = True  # without, nothing is calibrated
    shared: int = 4  # so many kv heads at most share a latent unless told; 0: all
    joint: bool = False  # one latent may hold keys and values
    pairs: bool = False  # keys may be compressed frequency by frequency
    rebuilds: bool = False  # with RoPE its keys are those before the rotation, nothing else
    refit: tuple[str, ...] = ()  # what is fitted to text after the solve: names in `REFITS`
    # what its ranks are in proportion to; without, the global budget goes where errors fall most
    ranks: Callable[[Model, list[Statistics]], list[tuple[float, float]]] | None = None

    def bases(
        self, model: Model, statistics: Sequence[Statistics], **options: Any
    ) -> list[LayerBasis]:
        """Those of all layers of a model; each depends on its own statistics only."""
        layers = zip(model.layers, statistics, strict=True)
        return [self.basis(model, block.attn, s, **options) for block, s in layers]


METHODS = {
    "fisher": Method(
        fisher,
        "latents under the Fisher metric (eigenzoo)",
        gradients=True,
        plain=False,
        joint=True,
        pairs=True,
        refit=("output",),
    ),
    "fisher-plain": Method(
        fisher_plain,
        "fisher without token weights (eigenzoo)",
        gradients=True,
        weighted=False,
        joint=True,
        pairs=True,
    ),
    "attention": Method(
        attention,
        "latents under the attention metric (eigenzoo)",
        queries=True,
        joint=True,
        pairs=True,
    ),
    "pca": Method(pca, "principal components of keys and values"),
    "kv-heads": Method(kv_heads, "Effectively Compress KV Heads (Yu et al., arXiv 2406.07056)"),
    "eigen": Method(
        eigen,
        "Eigen Attention (Saxena et al., arXiv 2408.05646)",
        queries=True,
        shared=1,
        rebuilds=True,
    ),
    "palu": Method(
        palu,
        "Palu (Chang et al., arXiv 2407.21118)",
        weights=True,
        rebuilds=True,
        ranks=palu_weights,
    ),
    "lorc": Method(
        lorc,
        "LoRC (Zhang et al., arXiv 2410.03111)",
        data=False,
        shared=0,
        rebuilds=True,
        ranks=lorc_weights,
    ),
    "kq-svd": Method(kq_svd, "KQ-SVD (Lesens et al., arXiv 2512.05916)", queries=True, shared=1),
}
