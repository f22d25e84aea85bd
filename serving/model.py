"""vLLM's model class around the native models: their layers run, vLLM keeps their cache.

T new tokens, of all texts in a step.
"""

from collections.abc import Iterable

from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import make_empty_intermediate_tensors_factory
from vllm.sequence import IntermediateTensors

from ..kernels.install import install
from ..zoo.inference.weights import fill
from .native import native_config
from .pages import PagedLayer
from .parallel import Share, all_logits, allocate, native_weights, new_part, stage_of

BETWEEN = "hidden_states"  # the name of what one process gives to the next


@support_torch_compile
class EigenModel(nn.Module):
    """The layers of a native model: this process's part of them."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.share = Share.own(native_config(vllm_config.model_config.hf_config))
        self.last = get_pp_group().is_last_rank
        self.native = install(allocate(stage_of(new_part(self.share), get_pp_group())))
        for module in self.native.modules():
            if "linear_decode" in vars(module):  # it knows how many tokens a step has, vLLM's
                module.rows = None  # compiler does not
        self.caches = [
            PagedLayer(
                self.native, layer.attn, f"{prefix}.layers.{layer.attn.layer}.attn", vllm_config
            )
            for layer in self.native.layers
        ]

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
    ) -> Tensor | IntermediateTensors:
        """Ids and positions (T,), and what the layer before gives, to what comes of it.

        From the last layer on that is the input of the head (T, width).
        """
        model, position = self.native, positions[None]
        if intermediate_tensors is None:
            x = model.start(input_ids[None], position)
        else:
            x = intermediate_tensors[BETWEEN][None]
        attn_metadata = model.encoding_metadata(position)
        for layer, cache in zip(model.layers, self.caches, strict=True):
            x = layer(x, positions, attn_metadata, cache)
        return model.finish(x)[0] if self.last else IntermediateTensors({BETWEEN: x[0]})


class EigenForCausalLM(nn.Module, SupportsPP):
    """The language model, as vLLM calls it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.model = EigenModel(vllm_config=vllm_config, prefix=prefix or "model")
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            [BETWEEN], self.model.share.config.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The embeddings (T, width) of ids (T,)."""
        return self.model.native.embed(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """As `EigenModel`. Raises ValueError for embeddings."""
        if inputs_embeds is not None:
            raise ValueError("embeddings in place of tokens are not served: give tokens")
        return self.model(input_ids, positions, intermediate_tensors)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """The input of the head (N, width) -> logits (N, vocabulary)."""
        native = self.model.native
        return all_logits(native.linear(native.head, hidden_states[None])[0], native.config)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy weights as they are read; returns the names of all. Errors as in `fill`."""
        native, share = self.model.native, self.model.share
        fill(share.config, native_weights(native), weights, share.of)
        return {name for name, _ in self.named_parameters()}
