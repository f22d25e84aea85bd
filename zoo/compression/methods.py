"""The methods by name. A line says everything that depends on the method.

Nothing here imports torch: the command line makes its choices from this table. A method's
functions, in `basis.py` and `basis_published.py`, are imported when they are first used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from .choices import listed

if TYPE_CHECKING:
    from ..models.model import LatentAttention, Model
    from .basis import LayerBasis
    from .moments import Statistics


class RankRule(Enum):
    """How a method chooses the ranks of all layers."""

    GLOBAL = "one budget of bytes, spent where the error falls most per byte"
    PROPORTIONAL = "one budget, in proportion to weights that the method gives keys and values"
    SEARCHED = "an error budget for every layer's output, met by measuring layers"
    MERGED = "every group of heads becomes one head; keep says how many make a group"


class Method(NamedTuple):
    """A way to choose bases: its functions, where it comes from, what it needs, what it allows.

    function: in `basis.py` or `basis_published.py`, from a model, a layer's attention and its
    statistics to a `LayerBasis`. With proportional ranks a second one, named `..._weights`, gives
    the weights of keys and of values, a pair a layer, from a model and the statistics of all
    layers.
    """

    function: str
    source: str  # as cards print it
    ranks: RankRule = RankRule.GLOBAL
    # statistics: of gradients, of queries, of the gradients of weights
    gradients: bool = False
    queries: bool = False
    weights: bool = False
    # sums of gradients: with all tokens alike, and weighted by their importance
    unweighted: bool = True
    weighted: bool = True
    data: bool = True  # without, nothing is calibrated
    shared: int = 4  # kv heads that share a latent, at most, unless told; 0: all
    joint: bool = False  # one latent may hold keys and values
    pairs: bool = False  # keys may be compressed frequency by frequency
    rebuilds: bool = False  # with a rotation, keys can only be rebuilt
    refit: tuple[str, ...] = ()  # fitted to the text afterwards unless told: names in `REFITS`

    @property
    def budgeted(self) -> bool:
        """Ranks follow one global budget, so they may also be uniform, or share it with bits."""
        return self.ranks is RankRule.GLOBAL

    @property
    def searched(self) -> bool:
        """Ranks come from an error budget, measured with one latent a kv head."""
        return self.ranks is RankRule.SEARCHED

    @property
    def merged(self) -> bool:
        """Groups of heads become one head: an ordinary checkpoint with fewer kv heads holds it."""
        return self.ranks is RankRule.MERGED

    @property
    def streamed(self) -> bool:
        """Ranks need nothing but spectra, so a model can be compressed layer by layer."""
        return self.ranks in (RankRule.GLOBAL, RankRule.MERGED)

    def basis(
        self, model: Model, attn: LatentAttention, statistics: Statistics, **options: Any
    ) -> LayerBasis:
        """The bases of one layer."""
        return _function(self.function)(model, attn, statistics, **options)

    def bases(
        self, model: Model, statistics: Sequence[Statistics], **options: Any
    ) -> list[LayerBasis]:
        """The bases of all layers of a model; each depends on its own statistics only."""
        layers = zip(model.layers, statistics, strict=True)
        return [self.basis(model, block.attn, s, **options) for block, s in layers]

    def rank_weights(
        self, model: Model, statistics: Sequence[Statistics]
    ) -> list[tuple[float, float]] | None:
        """What the ranks of keys and values are in proportion to, a pair a layer; else None."""
        if self.ranks is not RankRule.PROPORTIONAL:
            return None
        return _function(f"{self.function}_weights")(model, statistics)


def _function(name: str) -> Callable[..., Any]:
    from . import basis, basis_published

    return getattr(basis if hasattr(basis, name) else basis_published, name)


METHODS = {
    "fisher": Method(
        "fisher",
        "latents under the Fisher metric (eigenzoo)",
        gradients=True,
        unweighted=False,
        joint=True,
        pairs=True,
        refit=("output",),
    ),
    "fisher-plain": Method(
        "fisher_plain",
        "fisher without token weights (eigenzoo)",
        gradients=True,
        weighted=False,
        joint=True,
        pairs=True,
    ),
    "attention": Method(
        "attention",
        "latents under the attention metric (eigenzoo)",
        queries=True,
        joint=True,
        pairs=True,
    ),
    "pca": Method("pca", "principal components of keys and values"),
    "kv-heads": Method(
        "kv_heads",
        "Effectively Compress KV Heads (Yu et al., arXiv 2406.07056)",
        RankRule.MERGED,
    ),
    "eigen": Method(
        "eigen",
        "Eigen Attention (Saxena et al., arXiv 2408.05646)",
        RankRule.SEARCHED,
        queries=True,
        shared=1,
        rebuilds=True,
    ),
    "palu": Method(
        "palu",
        "Palu (Chang et al., arXiv 2407.21118)",
        RankRule.PROPORTIONAL,
        weights=True,
        rebuilds=True,
    ),
    "lorc": Method(
        "lorc",
        "LoRC (Zhang et al., arXiv 2410.03111)",
        RankRule.PROPORTIONAL,
        data=False,
        shared=0,
        rebuilds=True,
    ),
    "clover": Method(
        "clover",
        "CLOVER (Meng et al., arXiv 2411.17426)",
        RankRule.PROPORTIONAL,
        data=False,
        shared=1,
        rebuilds=True,
    ),
    "kq-svd": Method("kq_svd", "KQ-SVD (Lesens et al., arXiv 2512.05916)", queries=True, shared=1),
}


def methods_that(fits: Callable[[Method], bool]) -> str:
    """The names of the methods that fit, for messages and help."""
    return listed(name for name, method in METHODS.items() if fits(method))
