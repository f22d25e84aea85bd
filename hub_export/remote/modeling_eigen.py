"""transformers' classes around the native models with a compressed KV cache.

Travels with the checkpoint, beside the native files, and needs torch and transformers only. Where
eigenzoo is installed, its fused ops decode; `from_pretrained(..., ops="reference")` does without.
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

from ...zoo.models.cache import SCALE, Buffer, Latent, Packed, pack
from ...zoo.models.config import Config
from ...zoo.models.families import FAMILIES
from ...zoo.models.model import Model
from .configuration_eigen import EigenConfig

try:
    from eigenzoo.kernels.install import install
except ImportError:
    install = None

logger = logging.get_logger(__name__)

TP_PLAN: dict[str, str] = {}  # how processes share a model, by transformers' names of the ways
try:  # since transformers 5.23
    from torch.distributed.tensor import Shard, distribute_tensor
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
    from transformers.distributed.tensor_parallel import LocalParamsParallel
except ImportError:
    pass
else:

    class LatentParallel(LocalParamsParallel):
        """Attention with its heads and latents split: its own parameters have a row a latent."""

        def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
            """Split one of them."""
            whole = module._parameters[param]
            if whole is not None:
                parts = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
                module._parameters[param] = nn.Parameter(parts, whole.requires_grad)

        def install_forward(self, module: Any, mesh: Any) -> nn.Module:
            """Tell the module which part it is given. Raises ValueError where there is none."""
            module.split(mesh.get_local_rank(), mesh.size())
            return super().install_forward(module, mesh)

    ALL_PARALLEL_STYLES.register("latents", LatentParallel())  # type: ignore[arg-type]
    TP_PLAN = {
        "model.embed": "embedding_rowwise",
        "model.layers.*.attn": "latents",
        "model.layers.*.attn.q_proj": "colwise",
        "model.layers.*.attn.k_proj": "colwise",
        "model.layers.*.attn.v_proj": "colwise",
        "model.layers.*.attn.o_proj": "rowwise",
        "model.layers.*.mlp.gate_proj": "colwise",
        "model.layers.*.mlp.up_proj": "colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
        "model.head": "colwise_gather_output",
    }


class LatentCache:
    """What the native model asks of a cache, kept in one of transformers' caches."""

    def __init__(self, cache: Cache, slots: int, config: Config):
        self.cache, self.slots, self.config = cache, slots, config

    def check(self, tokens: Tensor, pos: Tensor) -> None:
        """Transformers' caches check their own bounds."""

    def layer(self, index: int) -> "LatentLayer":
        """That of one layer."""
        return LatentLayer(self.cache, index, self.config.latents(index))


class LatentLayer:
    """What one layer asks of its cache.

    Transformers' caches want as many heads of values as of keys: where latents are shared by
    different numbers of heads, all latents of a token lie side by side in one head. Where numbers
    have fewer than 16 bits, a latent is a row of bytes there, which any cache takes that does no
    arithmetic on what it holds: its scale, its codes, and one byte more where they are odd.
    """

    def __init__(self, cache: Cache, index: int, latents: tuple[Latent, Latent]):
        self.cache, self.index, self.latents = cache, index, latents

    def update(self, pos: Tensor, k: Tensor, v: Tensor) -> tuple[Buffer, Buffer]:
        """Append k and v (B, heads, T, width); return all slots of the layer."""
        bits = [latent.bits for latent in self.latents]
        packed, dtype = min(bits) < 16, k.dtype
        if packed:
            k, v = (_bytes(x, n) for x, n in zip((k, v), bits, strict=True))
        heads, alike = (k.size(1), v.size(1)), k.size(1) == v.size(1)
        if not alike:
            k, v = (x.transpose(1, 2).flatten(2)[:, None] for x in (k, v))
        found = self.cache.update(k, v, self.index)
        if not alike:
            sides = zip(found, heads, strict=True)
            found = tuple(x[:, 0].unflatten(-1, (n, -1)).transpose(1, 2) for x, n in sides)
        if not packed:
            return found
        k, v = (
            _numbers(x, latent.width, n, dtype)
            for x, latent, n in zip(found, self.latents, bits, strict=True)
        )
        return k, v


def _bytes(x: Tensor, bits: int) -> Tensor:
    """Vectors (B, heads, T, width) as rows of bytes."""
    if not x.size(-1):
        return x
    if bits == 16:
        return x.contiguous().view(torch.uint8)
    codes, scale = pack(x, bits)
    row = torch.cat((scale.view(torch.uint8), codes.view(torch.uint8)), dim=-1)
    return F.pad(row, (0, row.size(-1) % 2))  # scales lie at even bytes


def _numbers(row: Tensor, width: int, bits: int, dtype: torch.dtype) -> Buffer:
    """What `_bytes` was given, as it would be found in eigenzoo's cache."""
    if not width:
        return row
    if bits == 16:
        return row.view(dtype)
    codes = row[..., 2 : 2 + width * bits // 8]
    return Packed(codes.view(torch.int8) if bits == 8 else codes, row[..., :2].view(SCALE))


class EigenPreTrainedModel(PreTrainedModel):
    """What the model with and without a language modelling head share."""

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
        # if embedding and head are one, transformers says so again once it has split both
        self.model.head.weight = nn.Parameter(self.model.head.weight)
        self.post_init()
        parts = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in self.named_modules()}
        self._tp_plan = {name: way for name, way in TP_PLAN.items() if name in parts}

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers does; then decoding goes over to the fused ops."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._fuse()
        return loaded

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)
        self._fuse()  # on another device they are others
        return self

    def _fuse(self) -> None:
        """Decode by eigenzoo's fused ops, where it is installed and `ops` does not forbid it."""
        if install is None or self.config.ops == "reference":
            return
        try:
            install(self)
        except ValueError as error:
            logger.warning_once(f"decoding by the reference ops: {error}")

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Model):  # from_pretrained builds on meta: buffers come back empty
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
        """Normed output of the last layer, and the cache that now holds the tokens."""
        if self.gradient_checkpointing and self.training:
            return self._recomputed(input_ids, attention_mask, position_ids), None
        few = self.model.config.least_bits < 16
        if use_cache is None:  # what is rounded has no gradient
            use_cache = self.config.use_cache and not (few and self.training)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if few and cache is not None and any("Quantized" in type(x).__name__ for x in cache.layers):
            raise ValueError(
                "the cache of this model has fewer bits already, by its config: leave "
                "transformers' quantized cache out"
            )
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
        # a growing cache ends with the new tokens, and that is faster to know
        return self.model.hidden(input_ids, pos if fixed else None, native, valid), cache

    def _recomputed(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        """The same without a cache, of which backward keeps nothing but each layer's input."""
        valid = _valid_slots(attention_mask, input_ids.size(1))
        x, pos, attn_metadata = self.model.begin(input_ids, None, None, valid)
        if position_ids is not None:
            _check_positions(position_ids, valid, pos)
        for layer in self.model.layers:
            x = self._gradient_checkpointing_func(layer, x, pos, attn_metadata, None)
        return self.model.finish(x)


def _valid_slots(mask: Tensor | None, slots: int) -> Tensor | None:
    """(B, slots), false at padding, from a mask of 2 dimensions, or the 4 of a static cache."""
    if mask is None:
        return None
    if mask.ndim == 4:  # (B, 1, T, slots): the last token sees whatever is no padding
        mask = mask[:, 0, -1]
        mask = mask if mask.dtype == torch.bool else mask == 0
    valid = mask.bool()[:, :slots]
    return F.pad(valid, (0, slots - valid.size(1)))


def _refuse(asked: dict[str, object]) -> None:
    """What other models give on request and this one cannot is refused, not ignored."""
    unknown = ("inputs_embeds", "output_attentions", "output_hidden_states")
    for name in unknown:
        if asked.get(name) is not None and asked[name] is not False:
            raise ValueError(f"{name} is not supported by this model: leave it out")


def _given(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache by either name: transformers 5.24 renamed past_key_values, in outputs too."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one input: give one")
    return past_key_values if cache is None else cache


def _check_positions(position_ids: Tensor, valid: Tensor | None, pos: Tensor) -> None:
    """Positions are counted from the mask: others would be ignored, so they are refused."""
    counted = pos[None] if valid is None else (valid.cumsum(1) - 1)[:, pos]
    seen = torch.ones_like(counted, dtype=torch.bool) if valid is None else valid[:, pos]
    if ((position_ids != counted) & seen).any():
        raise ValueError(
            "position_ids differ from those that attention_mask gives: this model counts positions "
            "from attention_mask and cannot take others"
        )


class EigenModel(EigenPreTrainedModel):
    """The model as an encoder of text: hidden states, no logits."""

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
        _refuse(kwargs)
        cache = _given(cache, past_key_values)
        x, cache = self._hidden(input_ids, attention_mask, position_ids, cache, use_cache)
        return BaseModelOutputWithPast(x, cache)  # by position, as names differ: see _given


class EigenForCausalLM(EigenPreTrainedModel, GenerationMixin):
    """The language model."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: its pages hold keys and values of one width."""
        raise ValueError(
            "continuous batching keeps keys and values of one width in its pages, and here they "
            "differ: use generate with a batch"
        )

    generate_batch = continuous_batching_context_manager = init_continuous_batching

    def _get_static_cache_init_shape(self) -> None:
        """None: latents differ in width, so a static cache learns it from the first tokens."""

    def get_output_embeddings(self) -> nn.Module:
        """The language modelling head."""
        return self.model.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the language modelling head."""
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

        attention_mask: (B, S), 0 at padding, as transformers' models take it. Raises ValueError
        for position_ids that differ from the mask's own.
        """
        _refuse(kwargs)
        cache = _given(cache, past_key_values)
        x, cache = self._hidden(input_ids, attention_mask, position_ids, cache, use_cache)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(x[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(loss, logits, cache)  # by position: see _given
