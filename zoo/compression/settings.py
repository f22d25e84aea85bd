"""What to compress to, and how: every choice, and what does not go together."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from ..models.cache import check_bits
from ..models.config import Config
from .allocate import check_keep
from .keys import BLOCK, KEYS, TURNED, choose_keys
from .methods import METHODS, Method
from .moments import Needs
from .refit import REFITS

LATENTS = ("separate", "joint-kv")
BUDGETS = ("global", "uniform")


class Settings(NamedTuple):
    """What to compress to, and how.

    method: a name in `METHODS`. keep: share of the KV bytes that stay. error_budget, for `eigen`
    only: the relative output error that each layer may have, instead of `keep`.
    heads_per_latent: kv heads that share a latent of keys, and of values; None chooses.
    latent: `separate`, or `joint-kv`: one latent holds keys and values. keys: how they are held, a
    name in `KEYS`; `anchored` in blocks of `anchor_block` slots, None chooses. keys_reason: why
    `auto` chose them, filled in by `fit`. budget: `global`, spent where the error falls most, or
    `uniform`: the same ranks in all layers, for keys and values alike. damping: of the Fisher
    metric, None for the method's own. The last two are there to measure what they are worth.
    refit: names in `REFITS`, fitted to the calibration tokens after all else, None for the
    method's own. rank_pairs: at most so many distinct pairs of ranks over the layers, which then
    compile faster; None for any. kv_bits: those that a number in the cache may have, 16 (the
    model's dtype), 8 or 4; of several each layer gets its own, for keys and values. Below 16
    latents are mixed so that rounding costs least, see `quantise.spread`. `keep` counts bytes,
    scales included, beside those of 16 bits a number.
    """

    method: str = "fisher"
    keep: float = 0.6
    error_budget: float | None = None
    heads_per_latent: tuple[int, int] | None = None
    rank_multiple: int = 8
    latent: str = "separate"
    keys: str = "auto"
    anchor_block: int | None = None
    keys_reason: str | None = None
    budget: str = "global"
    damping: float | None = None
    refit: tuple[str, ...] | None = None
    rank_pairs: int | None = None
    kv_bits: tuple[int, ...] = (16,)

    def check(self) -> None:
        """Raise ValueError for settings that fit no model, before anything long begins."""
        if self.method not in METHODS:
            names = ", ".join(METHODS)
            raise ValueError(f"method {self.method!r} is unknown: expected one of {names}")
        if self.rank_multiple < 1:
            raise ValueError(f"rank multiple is {self.rank_multiple}: expected at least 1")
        if self.error_budget is not None and self.method != "eigen":
            raise ValueError(f"an error budget goes with eigen, not with {self.method}: use keep")
        if self.error_budget is not None and not self.error_budget >= 0:
            raise ValueError(f"the error budget is {self.error_budget}: expected 0 or more")
        if self.rank_pairs is not None and self.rank_pairs < 1:
            raise ValueError(f"rank pairs is {self.rank_pairs}: expected at least 1")
        if self.rank_pairs is not None and self.method == "eigen":
            raise ValueError(
                "eigen finds the ranks of every layer by itself: leave rank pairs out, or choose "
                "another method"
            )
        if self.keys not in KEYS:
            raise ValueError(f"keys {self.keys!r} is unknown: expected one of {', '.join(KEYS)}")
        if self.anchor_block is not None and self.anchor_block < 2:
            raise ValueError(f"anchor block is {self.anchor_block}: expected at least 2 slots")
        method = METHODS[self.method]
        if method.rebuilds and self.keys not in ("rebuild", "auto"):
            others = _names(lambda method: not method.rebuilds)
            raise ValueError(f"{self.method} rebuilds its keys: leave keys, or choose {others}")
        if self.keys == "pairs" and not method.pairs:
            others = _names(lambda method: method.pairs)
            raise ValueError(f"{self.method} cannot make pairs of its keys: choose {others}")
        if self.keys == "full" and self.method == "kv-heads":
            raise ValueError("kv-heads merges keys with values: its keys cannot stay full")
        if self.latent not in LATENTS:
            raise ValueError(f"latent {self.latent!r} is unknown: expected {' or '.join(LATENTS)}")
        if self.latent == "joint-kv" and not method.joint:
            others = _names(lambda method: method.joint)
            raise ValueError(f"{self.method} has no joint latents: choose {others}")
        if self.latent == "joint-kv" and self.keys == "full":
            raise ValueError("joint-kv compresses keys with values: keys cannot stay full")
        if self.budget not in BUDGETS:
            raise ValueError(f"budget {self.budget!r} is unknown: expected {' or '.join(BUDGETS)}")
        own = method.ranks is not None or self.method in ("eigen", "kv-heads")
        if self.budget == "uniform" and (own or self.keys == "full"):
            raise ValueError(
                "uniform ranks go with compressed keys and a method without a rank rule of its own"
            )
        if self.damping is not None and not (method.gradients and self.damping > 0):
            others = _names(lambda method: method.gradients)
            raise ValueError(f"damping is {self.damping}: expected more than 0, and {others}")
        for part in self.refit or ():
            if part not in REFITS:
                names = ", ".join(REFITS)
                raise ValueError(f"refit {part!r} is unknown: expected some of {names}")
        if self.refit and not method.data:
            raise ValueError(f"{self.method} reads no text, so there is nothing to refit to")
        check_keep(self.keep)
        for bits in self.kv_bits:
            check_bits(bits)
        if self.rounded and (own or self.budget == "uniform"):
            raise ValueError(
                "fewer bits share one budget with ranks, and here those have a rule of their own: "
                "leave kv bits at 16 (generate --kv-bits still rounds), or choose another method"
            )

    def fit(self, config: Config, device: str = "cpu") -> "Settings":
        """The settings with what is to be chosen filled in. Raises ValueError if they do not fit.

        device: what kind the model runs on, which `auto` keys may depend on.
        """
        if config.kv_width != config.dense_kv_width:
            raise ValueError("the model is compressed already: take the model it was made from")
        if self.keys == "auto":
            choice = choose_keys(config, device, METHODS[self.method].rebuilds)
            block = self.anchor_block or choice.block
            chosen = self._replace(keys=choice.keys, anchor_block=block, keys_reason=choice.reason)
            return chosen.fit(config, device)
        if self.keys in TURNED:
            if not config.rotary:
                raise ValueError(
                    f"nothing rotates the keys of this model, so none can be {self.keys}: expected "
                    "rebuild, full or auto"
                )
            replace(config, **self.rotary(config))  # refuses what does not fit
        if self.latent == "joint-kv" and (config.rotary or any(config.nonlinear)):
            raise ValueError(
                "joint-kv needs keys that are linear in the layer's input: this model rotates, "
                "clips or norms them; use separate latents"
            )
        own = METHODS[self.method].refit if self.refit is None else self.refit
        shared = self._shared(config.num_key_value_heads)
        return self._replace(heads_per_latent=shared, refit=own)

    @property
    def rounded(self) -> bool:
        """Whether numbers may have fewer bits than the model's own."""
        return set(self.kv_bits) != {16}

    @property
    def basis_options(self) -> dict[str, Any]:
        """What the method's bases are asked for beside statistics."""
        options: dict[str, Any] = {"pairs": True} if self.keys == "pairs" else {}
        return options | ({} if self.damping is None else {"damping": self.damping})

    def anchor(self, config: Config) -> int:
        """Slots of a block within which keys are turned when cached; 1 where they are not."""
        if self.keys == "rotated":
            return config.max_position_embeddings
        return self.anchor_block or BLOCK if self.keys == "anchored" else 1

    def rotary(self, config: Config) -> dict[str, Any]:
        """What the config of a model with a rotation says of its keys."""
        return {"anchor": self.anchor(config), "pairs": self.keys == "pairs"}

    def _shared(self, kv_heads: int) -> tuple[int, int]:
        """Heads per latent of keys and of values; keys that stay full share none."""
        k, v = self._asked(kv_heads)
        return (1 if self.keys == "full" else k), v

    def _asked(self, kv_heads: int) -> tuple[int, int]:
        if self.method == "eigen":
            if self.heads_per_latent not in (None, (1, 1)):
                raise ValueError("eigen keeps one latent a kv head: leave heads per latent at 1")
            return 1, 1
        if self.method == "kv-heads":
            merged = round(1 / self.keep)
            if kv_heads % merged or abs(merged * self.keep - 1) > 0.02:
                shares = [f"{1 / n:.3g}" for n in range(2, kv_heads + 1) if kv_heads % n == 0]
                raise ValueError(
                    f"keep is {self.keep}: kv-heads merges whole heads, of {kv_heads} here; "
                    f"expected one of {', '.join(shares) or '1 (there is but one)'}"
                )
            if self.heads_per_latent not in (None, (merged, merged)):
                raise ValueError("kv-heads takes its groups from keep: leave heads per latent out")
            return merged, merged
        if self.heads_per_latent is None:
            limit = METHODS[self.method].shared or kv_heads
            most = max(n for n in range(1, limit + 1) if kv_heads % n == 0)
            return most, most
        if self.latent == "joint-kv" and len(set(self.heads_per_latent)) > 1:
            raise ValueError("joint-kv shares its latents among as many heads of keys as of values")
        if any(n < 1 or kv_heads % n for n in self.heads_per_latent):
            raise ValueError(
                f"heads per latent is {self.heads_per_latent}: expected divisors of {kv_heads}, "
                "the number of kv heads"
            )
        return self.heads_per_latent


def _names(fits: Callable[[Method], bool]) -> str:
    """The methods that fit, for messages."""
    return " or ".join(name for name, method in METHODS.items() if fits(method))


def needs(settings: Settings, config: Config) -> Needs:
    """What `settings`, fitted to the model, read of statistics."""
    method, joint = METHODS[settings.method], settings.latent == "joint-kv"
    shared = settings.heads_per_latent or (1, 1)
    anchor = settings.anchor(config)
    sums = method.weights, method.plain, method.weighted
    return Needs(shared, method.gradients, method.queries, joint, anchor, *sums)
