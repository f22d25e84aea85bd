"""transformers' model classes for models with a compressed KV cache, around the native models.

This file travels with the checkpoint and needs only torch, transformers and the files beside it. If
eigenzoo is installed, its fused ops decode, unless `from_pretrained(..., ops="reference")` is used.
"""

import re
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from ...zoo.models.families import FAMILIES
from ...zoo.models.model import Model
from .cache_eigen import LatentCache, check_not_quantized
from .configuration_eigen import EigenConfig
from .parallel_eigen import TP_PLAN

try:
    from eigenzoo.kernels.install import install
except ImportError:
    install = None

OLD_NAMES = {rf"\.{x}_proj\.norm\.": f".{x}_bound.norm." for x in "qk"}  # of MPT's qk_ln
logger = logging.get_logger(__name__)


class EigenPreTrainedModel(PreTrainedModel):
    """Base class of the models with and without a language modeling head."""

    config: EigenConfig
    config_class = EigenConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _tied_weights_keys = {"model.head.weight": "model.embed.weight"}  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = False  # keys and values differ in width
    _can_compile_fullgraph = True
    supports_gradient_checkpointing = True
    gradient_checkpointing = False

    def __init__(self, config: EigenConfig):
        super().__init__(config)
        family = FAMILIES[config.family]
        values = {f.name: getattr(config, f.name) for f in fields(family.config)}
        self.model = family.model(family.config(**values))
        # untie: for tied weights, transformers ties them again after it has split both
        self.model.head.weight = nn.Parameter(self.model.head.weight)
        self.post_init()
        parts = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in self.named_modules()}
        self._tp_plan = {name: way for name, way in TP_PLAN.items() if name in parts}

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; then install the fused ops."""
        kwargs.setdefault("key_mapping", OLD_NAMES)
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._fuse()
        return loaded

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)
        self._fuse()  # each kind of device has its own ops
        return self

    def _fuse(self) -> None:
        """Install eigenzoo's fused ops for decoding, if it is there and `ops` allows them."""
        if install is None or self.config.ops == "reference":
            return
        try:
            install(self)
        except ValueError as error:
            logger.warning_once(f"decoding with the reference ops: {error}")

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Model):  # from_pretrained builds on meta, which loses buffers
            module.reset_buffers()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.model.embed = value

    def _hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        use_cache: bool | None,
    ) -> tuple[Tensor, Cache | None]:
        """The input of the head, (B, T, width), and the cache that now holds the tokens."""
        if self.gradient_checkpointing and self.training:
            return self._recomputed(input_ids, attention_mask, position_ids), None
        quantized = self.model.config.least_bits < 16
        if use_cache is None:  # quantized keys and values have no gradient
            use_cache = self.config.use_cache and not (quantized and self.training)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if quantized and cache is not None:
            check_not_quantized(cache)
        count = input_ids.size(1)
        past = 0 if cache is None else cache.get_seq_length()
        slots = past + count
        fixed = cache is not None and cache.is_compileable
        if cache is not None and fixed:
            slots = cache.get_max_length()
        pos = torch.arange(count, device=input_ids.device) + past
        valid = _valid_slots(attention_mask, slots)
        if position_ids is not None and not torch.compiler.is_compiling():
            _check_positions(position_ids, valid, pos)
        native = None if cache is None else LatentCache(cache, slots, self.model.config)
        # pos None means the last slots, which is faster; that is true for a growing cache
        return self.model.hidden(input_ids, pos if fixed else None, native, valid), cache

    def _recomputed(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        """As `_hidden`, without a cache; backward recomputes each layer from its input."""
        valid = _valid_slots(attention_mask, input_ids.size(1))
        x, pos, attn_metadata = self.model.begin(input_ids, None, None, valid)
        if position_ids is not None:
            _check_positions(position_ids, valid, pos)
        for layer in self.model.layers:
            x = self._gradient_checkpointing_func(layer, x, pos, attn_metadata, None)
        return self.model.finish(x)


def _valid_slots(mask: Tensor | None, slots: int) -> Tensor | None:
    """(B, slots), false at padding, from a mask (B, S), or the 4-D mask of a static cache."""
    if mask is None:
        return None
    if mask.ndim == 4:  # (B, 1, T, slots): the last token attends to all slots but padding
        mask = mask[:, 0, -1]
        mask = mask if mask.dtype == torch.bool else mask == 0
    valid = mask.bool()[:, :slots]
    return F.pad(valid, (0, slots - valid.size(1)))


def _check_supported(options: dict[str, object]) -> None:
    """Raise ValueError for options of other models' `forward` that this one does not have."""
    for name in ("inputs_embeds", "output_attentions", "output_hidden_states"):
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"{name} is not supported by this model: omit it")


def _one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache under either name: transformers 5.24 renamed past_key_values, in outputs too."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one input: pass only one")
    return past_key_values if cache is None else cache


def _check_positions(position_ids: Tensor, valid: Tensor | None, pos: Tensor) -> None:
    """Raise ValueError for positions other than those counted from the mask, which are used."""
    counted = pos[None] if valid is None else (valid.cumsum(1) - 1)[:, pos]
    real = torch.ones_like(counted, dtype=torch.bool) if valid is None else valid[:, pos]
    if ((position_ids != counted) & real).any():
        raise ValueError(
            "position_ids differ from the positions that this model counts from attention_mask: "
            "omit them"
        )


class EigenModel(EigenPreTrainedModel):
    """The model without its head: it returns hidden states."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPast:
        """input_ids (B, T) -> last_hidden_state (B, T, hidden_size)."""
        _check_supported(kwargs)
        cache = _one_cache(cache, past_key_values)
        x, cache = self._hidden(input_ids, attention_mask, position_ids, cache, use_cache)
        return BaseModelOutputWithPast(x, cache)  # by position, as names differ: see _one_cache


class EigenForCausalLM(EigenPreTrainedModel, GenerationMixin):
    """The language model."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raise ValueError: its pages hold keys and values of one width."""
        raise ValueError(
            "continuous batching keeps keys and values of one width in its pages, but this model's "
            "widths differ: use generate with a batch"
        )

    generate_batch = continuous_batching_context_manager = init_continuous_batching

    def _get_static_cache_init_shape(self) -> None:
        """Return None: widths differ, so a static cache takes them from the first tokens."""

    def get_output_embeddings(self) -> nn.Module:
        """The language modeling head."""
        return self.model.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the language modeling head."""
        self.model.head = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """input_ids (B, T) -> logits (B, T or logits_to_keep, vocabulary).

        attention_mask: (B, S), 0 at padding, as in transformers' models. labels: (B, T), as in
        transformers, for `loss`. Raises ValueError for position_ids that differ from those counted
        from the mask, for unsupported options, and for two caches.
        """
        _check_supported(kwargs)
        cache = _one_cache(cache, past_key_values)
        x, cache = self._hidden(input_ids, attention_mask, position_ids, cache, use_cache)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.linear(self.model.head, x[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(loss, logits, cache)  # by position: see _one_cache
