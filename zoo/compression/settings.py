"""What to compress to, and how: every choice, and which choices exclude each other."""

from dataclasses import replace
from typing import Any, NamedTuple

from ..models.bits import BITS, check_bits
from ..models.config import Config
from .allocate import check_keep
from .choices import BUDGETS, LATENTS, REFITS, check_choice
from .keys import KEYS, TURNED, choose_keys, default_block
from .methods import METHODS, methods_that
from .moments import Needs


class Settings(NamedTuple):
    """What to compress to, and how.

    None leaves the choice to the method, unless the field says otherwise.
    """

    method: str = "fisher"
    """How to find bases and ranks: a name in `METHODS`."""
    keep: float = 0.25
    """Share of the KV bytes to keep, in (0, 1], scales included, compared with 16 bits a number."""
    error_budget: float | None = None
    """For methods that search their ranks, instead of `keep`: the relative error that the output
    of each layer may have."""
    heads_per_latent: tuple[int, int] | None = None
    """How many kv heads share a latent of keys, and of values; 0 stands for all."""
    rank_multiple: int = 8
    """Ranks are multiples of this number, or full."""
    latent: str = "separate"
    """Whether keys and values share a latent: a name in `LATENTS`."""
    keys: str = "auto"
    """What the cache holds of keys: a name in `KEYS`."""
    anchor_block: int | None = None
    """Positions in a block of anchored keys, at least 2; None leaves it to `keys.default_block`."""
    keys_reason: str | None = None
    """Why `keys="auto"` chose what it did; `fit` fills it in."""
    budget: str = "global"
    """How to share ranks among layers: a name in `BUDGETS`. For ablations."""
    damping: float | None = None
    """Damping of the Fisher metric, in units of its mean diagonal, above 0. For ablations."""
    refit: tuple[str, ...] | None = None
    """What to fit to the calibration tokens after the solve: names in `REFITS`."""
    rank_pairs: int | None = None
    """Largest number of distinct pairs of ranks (of keys, of values) over all layers; None: any.
    Fewer pairs compile faster."""
    kv_bits: tuple[int, ...] | None = None
    """Bits that a number in the cache may have, of 16, 8, 4, 3 and 2. If there are several, latents
    are cut into segments of falling bits: see `cuts`. Below 16 they are mixed: see
    `mixing.spread`. None stands for all, or for 16 where the method has a rank rule of its own."""

    def check(self) -> None:
        """Raise ValueError for settings that fit no model, before anything long begins."""
        check_choice("method", self.method, METHODS)
        check_choice("keys", self.keys, KEYS)
        check_choice("latent", self.latent, LATENTS)
        check_choice("budget", self.budget, BUDGETS)
        self._check_numbers()
        self._check_keys()
        self._check_latent()
        self._check_ranks()
        self._check_refit()

    def _check_numbers(self) -> None:
        check_keep(self.keep)
        if self.rank_multiple < 1:
            raise ValueError(f"rank multiple is {self.rank_multiple}: expected at least 1")
        if self.rank_pairs is not None and self.rank_pairs < 1:
            raise ValueError(f"rank pairs is {self.rank_pairs}: expected at least 1")
        if self.anchor_block is not None and self.anchor_block < 2:
            raise ValueError(f"anchor block is {self.anchor_block}: expected at least 2 positions")
        if self.error_budget is not None and not self.error_budget >= 0:
            raise ValueError(f"the error budget is {self.error_budget}: expected 0 or more")
        if self.damping is not None:
            others = methods_that(lambda m: m.gradients)
            if not (METHODS[self.method].gradients and self.damping > 0):
                raise ValueError(f"damping is {self.damping}: expected more than 0, and {others}")
        for bits in self.bits:
            check_bits(bits)

    def _check_keys(self) -> None:
        method = METHODS[self.method]
        if method.rebuilds and self.keys not in ("rebuild", "auto"):
            others = methods_that(lambda m: not m.rebuilds)
            raise ValueError(f"{self.method} rebuilds its keys: leave keys, or choose {others}")
        if self.keys == "pairs" and not method.pairs:
            others = methods_that(lambda m: m.pairs)
            raise ValueError(f"{self.method} cannot make pairs of its keys: choose {others}")
        if self.keys == "full" and method.merged:
            raise ValueError(f"{self.method} merges keys with values: its keys cannot stay full")

    def _check_latent(self) -> None:
        if self.latent == "joint-kv" and not METHODS[self.method].joint:
            others = methods_that(lambda m: m.joint)
            raise ValueError(f"{self.method} has no joint latents: choose {others}")
        if self.latent == "joint-kv" and self.keys == "full":
            raise ValueError("joint-kv compresses keys with values: keys cannot stay full")

    def _check_ranks(self) -> None:
        method = METHODS[self.method]
        if self.error_budget is not None and not method.searched:
            others = methods_that(lambda m: m.searched)
            raise ValueError(
                f"an error budget goes with {others}, not with {self.method}: use keep"
            )
        if self.rank_pairs is not None and method.searched:
            raise ValueError(
                f"{self.method} finds the ranks of every layer by itself: leave rank pairs out, or "
                "choose another method"
            )
        if self.budget == "uniform" and (not method.budgeted or self.keys == "full"):
            raise ValueError(
                "uniform ranks go with compressed keys and a method without a rank rule of its "
                f"own: choose {methods_that(lambda m: m.budgeted)}"
            )
        if self.rounded and (not method.budgeted or self.budget == "uniform"):
            raise ValueError(
                "fewer bits share one budget with ranks, and here those have a rule of their own: "
                "leave kv bits at 16 (generate --kv-bits still rounds), or choose another method"
            )

    def _check_refit(self) -> None:
        for name in self.refit or ():
            check_choice("refit", name, REFITS)
        if self.refit and not METHODS[self.method].data:
            raise ValueError(f"{self.method} reads no text, so there is nothing to refit to")

    def fit(self, config: Config) -> "Settings":
        """The settings with every open choice made, for a dense model.

        Raises ValueError for settings that do not fit the model, and for a compressed model.
        """
        if not config.uncompressed:
            raise ValueError("the model is compressed already: take the model it was made from")
        if self.keys == "auto":
            choice = choose_keys(config, METHODS[self.method].rebuilds)
            return self._replace(keys=choice.keys, keys_reason=choice.reason).fit(config)
        if self.keys in TURNED:
            if not config.rotary:
                raise ValueError(
                    f"nothing rotates the keys of this model, so none can be {self.keys}: expected "
                    "rebuild, full or auto"
                )
            replace(config, **self.rotary(config))  # raises if the model cannot hold keys so
        if self.latent == "joint-kv" and (config.rotary or any(config.nonlinear)):
            raise ValueError(
                "joint-kv needs keys that are linear in the layer's input: this model rotates, "
                "clips or norms them; use separate latents"
            )
        refit = METHODS[self.method].refit if self.refit is None else self.refit
        k, v = self._shared(config.num_key_value_heads)
        k = 1 if self.keys == "full" else k  # keys that stay full share no latent
        block = self.block if self.keys == "anchored" else None
        return self._replace(
            heads_per_latent=(k, v), refit=refit, kv_bits=self.bits, anchor_block=block
        )

    @property
    def block(self) -> int:
        """Positions in a block of anchored keys."""
        return self.anchor_block or default_block(self.keep, self.rounded)

    @property
    def bits(self) -> tuple[int, ...]:
        """The bits that a number in the cache may have."""
        if self.kv_bits is not None:
            return self.kv_bits
        free = METHODS[self.method].budgeted and self.budget != "uniform"
        return BITS if free else (16,)

    @property
    def rounded(self) -> bool:
        """Whether numbers may have fewer bits than the model's own."""
        return set(self.bits) != {16}

    @property
    def keys_note(self) -> str | None:
        """How `auto` decided to hold keys, and why, as one line; None if it was not asked."""
        if self.keys_reason is None:
            return None
        block = f" in blocks of {self.anchor_block}" * (self.keys == "anchored")
        return f"keys: {self.keys}{block}, since {self.keys_reason}"

    @property
    def basis_options(self) -> dict[str, Any]:
        """Arguments of the method's function beside statistics."""
        options: dict[str, Any] = {"pairs": True} if self.keys == "pairs" else {}
        return options | ({} if self.damping is None else {"damping": self.damping})

    def anchor(self, config: Config) -> int:
        """Slots of a block within which keys are turned when cached; 1 where they are not."""
        if self.keys == "rotated":
            return config.max_position_embeddings
        return self.block if self.keys == "anchored" else 1

    def rotary(self, config: Config) -> dict[str, Any]:
        """The fields about keys in the config of a model with a rotation."""
        return {"anchor": self.anchor(config), "pairs": self.keys == "pairs"}

    def _shared(self, kv_heads: int) -> tuple[int, int]:
        """Heads per latent of keys and of values. Raises ValueError for what cannot be shared."""
        method, told = METHODS[self.method], self.heads_per_latent
        if told is not None:
            told = told[0] or kv_heads, told[1] or kv_heads
        if method.searched:
            if told not in (None, (1, 1)):
                raise ValueError(
                    f"{self.method} keeps one latent a kv head: leave heads per latent at 1"
                )
            return 1, 1
        if method.merged:
            group = self._group(kv_heads)
            if told not in (None, (group, group)):
                raise ValueError(
                    f"{self.method} takes its groups from keep: leave heads per latent out"
                )
            return group, group
        if told is None:
            most = max(n for n in range(1, (method.shared or kv_heads) + 1) if kv_heads % n == 0)
            return most, most
        if self.latent == "joint-kv" and len(set(told)) > 1:
            raise ValueError("joint-kv shares its latents among as many heads of keys as of values")
        if any(n < 1 or kv_heads % n for n in told):
            raise ValueError(
                f"heads per latent is {told}: expected divisors of {kv_heads}, the number of kv "
                "heads"
            )
        return told

    def _group(self, kv_heads: int) -> int:
        """Heads that are merged into one. Raises ValueError unless `keep` says a whole number."""
        group = round(1 / self.keep)
        if kv_heads % group or abs(group * self.keep - 1) > 0.02:
            shares = [f"{1 / n:.3g}" for n in range(2, kv_heads + 1) if kv_heads % n == 0]
            raise ValueError(
                f"keep is {self.keep}: {self.method} merges whole heads, of {kv_heads} here; "
                f"expected one of {', '.join(shares) or '1 (there is but one)'}"
            )
        return group


def needs(settings: Settings, config: Config) -> Needs:
    """The statistics that `settings`, fitted to the model, are computed from."""
    method = METHODS[settings.method]
    return Needs(
        heads_per_latent=settings.heads_per_latent or (1, 1),
        gradients=method.gradients,
        queries=method.queries,
        joint=settings.latent == "joint-kv",
        anchor=settings.anchor(config),
        weights=method.weights,
        unweighted=method.unweighted,
        weighted=method.weighted,
    )
