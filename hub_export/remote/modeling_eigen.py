"""transformers' model classes for models with a compressed KV cache, around the native models.

This file travels with the checkpoint and needs only torch, transformers and the files beside it. If
eigenzoo is installed, its fused ops decode, unless `from_pretrained(..., ops="reference")` is used.
"""

import re
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from ...zoo.models.families import FAMILIES
from ...zoo.models.model import Model
from ...zoo.models.mpt import OLD_NAMES
from .cache_eigen import LatentCache, check_not_quantized
from .configuration_eigen import EigenConfig
from .inputs_eigen import call_of, check_options, one_cache, one_input, slot_positions
from .masks_eigen import mask_of_call, packed_matrix, read_mask
from .parallel_eigen import TP_PLAN

try:
    from eigenzoo.kernels.install import install
except ImportError:
    install = None

logger = logging.get_logger(__name__)
LOSS = ("num_items_in_batch", "shift_labels", "ignore_index")  # keywords of transformers' loss


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
        """Install eigenzoo's fused ops for decoding, if it is there and `ops` allows them.

        A model that is wholly on disk keeps the reference ops: which device computes is not known.
        """
        on_disk = all(p.is_meta for p in self.parameters())
        if install is None or self.config.ops == "reference" or on_disk:
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

    def _run(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        use_cache: bool | None,
        output_hidden_states: bool | None,
    ) -> tuple[Tensor, Cache | None, tuple[Tensor, ...] | None]:
        """The input of the head, (B, T, width), the cache, and if asked the inputs of all layers.

        tokens: ids (B, T) or their embeddings. With gradient checkpointing there is no cache, and
        backward recomputes each layer from its input.
        """
        again = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        keep = self._keeps_states(output_hidden_states)
        cache = self._cache(cache, use_cache, again)
        call = call_of(tokens, cache)
        attn, config = self.model.layers[0].attn, self.model.config
        valid, mask = read_mask(attention_mask, call, attn.heads)
        if attention_mask is None and cache is None:
            mask = packed_matrix(position_ids, call)
        places = (position_ids, cache, valid, mask)
        position = slot_positions(*places, call, config.learned_positions)
        how = (mask, valid, position, cache, call, getattr(config, "anchor", 1))
        mask = mask_of_call(*how)
        native = None if cache is None else LatentCache(cache, call.slots, config)
        # pos None means the last slots, which is faster; that is true for a growing cache
        pos = call.pos if call.fixed else None
        x, pos, attn_metadata = self.model.begin(tokens, pos, native, valid, position, mask)
        states: tuple[Tensor, ...] = (x,)
        for i, layer in enumerate(self.model.layers):
            inputs = (x, pos, attn_metadata, None if native is None else native.layer(i))
            x = self._gradient_checkpointing_func(layer, *inputs) if again else layer(*inputs)
            states = (*states, x) if keep else (x,)
        x = self.model.finish(x)
        return x, cache, (*states[:-1], x) if keep else None

    def _keeps_states(self, asked: bool | None) -> bool:
        """Whether to return hidden states, by the argument or else by the config."""
        keep = (self.config.output_hidden_states or False) if asked is None else asked
        if not isinstance(keep, bool):
            raise ValueError(f"output_hidden_states is {keep!r}: expected True for all, or False")
        return keep

    def _cache(self, cache: Cache | None, use_cache: bool | None, again: bool) -> Cache | None:
        """The cache to use; a new one if it is to be used and none is given."""
        if again:
            if cache is not None:
                raise ValueError("gradient checkpointing works without a cache: omit it")
            if use_cache:
                logger.warning_once("gradient checkpointing works without a cache: none is made")
            return None
        quantized = self.model.config.least_bits < 16
        if use_cache is None:  # quantized keys and values have no gradient
            use_cache = self.config.use_cache and not (quantized and self.training)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if cache is not None and not isinstance(cache, Cache):
            raise ValueError(f"the cache is a {type(cache).__name__}: expected transformers' Cache")
        if quantized and cache is not None:
            check_not_quantized(cache)
        return cache


class EigenModel(EigenPreTrainedModel):
    """The model without its head: it returns hidden states."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPast:
        """input_ids (B, T) -> last_hidden_state (B, T, hidden_size). Others as with a head."""
        check_options(kwargs, self.config)
        cache, tokens = one_cache(cache, past_key_values), one_input(input_ids, inputs_embeds)
        how = (attention_mask, position_ids, cache, use_cache, output_hidden_states)
        return BaseModelOutputWithPast(*self._run(tokens, *how))  # by position: see one_cache


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

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, whose prompt lookup drafts past the end of its own static cache."""
        if drafted := generation_config.prompt_lookup_num_tokens:
            length = generation_config.max_length + drafted
            given = getattr(generation_config, "max_cache_len", None) or 0
            generation_config.max_cache_len = max(length, given)
        prepare: Any = super()._prepare_cache_for_generation  # type: ignore[misc]
        return prepare(generation_config, *args, **kwargs)

    def get_output_embeddings(self) -> nn.Module:
        """The language modeling head."""
        return self.model.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the language modeling head."""
        self.model.head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """input_ids (B, T), or inputs_embeds (B, T, width) -> logits (B, T, vocabulary).

        attention_mask: (B, S), 0 at padding, or (B, 1, T, S): see `read_mask`. position_ids: (B,
        T), by default counted from a 2-D mask; if they restart without a mask and a cache, the
        texts do not see one another. labels: (B, T), for `loss`, as in transformers; so are
        shift_labels, num_items_in_batch and ignore_index. logits_to_keep: how many of the last
        tokens, or which, get logits; 0: all. output_hidden_states: return the inputs of all layers
        and of the head. Raises ValueError for what it cannot do, and for unknown keywords.
        """
        of_loss: dict[str, Any] = {name: kwargs.pop(name) for name in LOSS if name in kwargs}
        check_options(kwargs, self.config)
        cache, tokens = one_cache(cache, past_key_values), one_input(input_ids, inputs_embeds)
        how = (attention_mask, position_ids, cache, use_cache, output_hidden_states)
        x, cache, states = self._run(tokens, *how)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.linear(self.model.head, x[:, keep])
        loss = None
        if labels is not None or of_loss.get("shift_labels") is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **of_loss
            )
        return CausalLMOutputWithPast(loss, logits, cache, states)  # by position: see one_cache
