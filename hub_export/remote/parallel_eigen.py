"""Tensor parallelism: how several processes share the heads and latents of a model."""

from typing import Any

from torch import nn

TP_PLAN: dict[str, str] = {}  # transformers' parallel style for each module
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
    TP_PLAN = {
        "model.embed": "embedding_rowwise",
        "model.layers.*.attn": "latents",
        "model.layers.*.attn.q_proj": "colwise",
        "model.layers.*.attn.k_proj": "colwise",
        "model.layers.*.attn.v_proj": "colwise",
        "model.layers.*.attn.q_norm": "replicated_with_grad_allreduce",
        "model.layers.*.attn.k_norm": "replicated_with_grad_allreduce",
        "model.layers.*.attn.o_proj": "rowwise",
        "model.layers.*.mlp.gate_proj": "colwise",
        "model.layers.*.mlp.up_proj": "colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
        "model.head": "colwise_gather_output",
    }
