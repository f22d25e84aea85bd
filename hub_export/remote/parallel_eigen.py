"""Tensor parallelism: how several processes share the heads and latents of a model."""

from typing import Any

from torch import nn

WAYS = {  # how several processes split each module, named as transformers' parallel styles
    "embed": "embedding_rowwise",
    "layers.*.attn": "latents",
    **{f"layers.*.attn.{x}_proj": "colwise" for x in "qkv"},
    **{f"layers.*.attn.{x}_norm": "replicated_with_grad_allreduce" for x in "qk"},
    "layers.*.attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
    "head": "colwise_gather_output",
}
TP_PLAN: dict[str, str] = {}  # the same for transformers, if it can
try:  # since transformers 5.23
    from torch.distributed.tensor import Shard, distribute_tensor
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
    from transformers.distributed.tensor_parallel import LocalParamsParallel
except ImportError:
    pass
else:

    class LatentParallel(LocalParamsParallel):
        """Attention whose heads and latents are split; its parameters have one row per latent."""

        def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
            """Replace a parameter by this process's part of it."""
            whole = module._parameters[param]
            if whole is not None:
                parts = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
                module._parameters[param] = nn.Parameter(parts, whole.requires_grad)

        def install_forward(self, module: Any, mesh: Any) -> nn.Module:
            """Tell the attention its part. Raises ValueError if its latents cannot be split."""
            module.split(mesh.get_local_rank(), mesh.size())
            return super().install_forward(module, mesh)

    ALL_PARALLEL_STYLES.register("latents", LatentParallel())  # type: ignore[arg-type]
    TP_PLAN = {f"model.{name}": way for name, way in WAYS.items()}
