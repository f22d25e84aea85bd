"""Launch the kernels as for a GPU that is not there: Triton compiles what the launchers pass.

`test_aot.py` runs this in a process of its own. It prints the name of each kernel that compiled.
"""

from itertools import chain

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from eigenzoo.kernels import anchored_decode, latent_decode, rotary_decode, split
from eigenzoo.zoo.models.bits import parse_segments
from eigenzoo.zoo.models.packing import Latent, pack

SLOTS = 48  # an odd multiple of 16: the stride from one sequence to the next has few factors
SPAN, BF16 = torch.tensor([[0, SLOTS]]), torch.bfloat16


class Absent:
    """What the compiler asks the driver of a GPU."""

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """In place of a kernel: compiles it as for a GPU, and runs nothing."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def call(*given, **constants):
            rows = {name: constants[name]._replace(ptx=True) for name in "KV"}
            constants |= rows | {"UPCAST": False}
            code = self.kernel.warmup(*given, grid=grid, **constants).asm["ptx"]
            assert "cp.async" in code  # rows are seen to be aligned
            print(self.kernel.__module__.split(".")[-1].removesuffix("_decode"))

        return call


def kept(width: int, segments: str) -> tuple[torch.Tensor, list[int]]:
    """Rows of two latents and their layout."""
    latent = Latent(2, width, parse_segments(segments))
    return pack(torch.randn(2, 2, SLOTS, width), latent).rows, [2, *chain(*latent.segments)]


driver.set_active(Absent())
split.Parts.merge = lambda parts: parts.out
for module in (latent_decode, anchored_decode, rotary_decode):
    module.kernel = Compiled(module.kernel)
k, k_layout = kept(80, "16x16+16x8+32x4+16x2")
v, v_layout = kept(96, "64x4+32x3")
layouts = [None, k_layout, v_layout]
q, up = torch.randn(2, 8, 1, 128, dtype=BF16), torch.randn(2, 80, 128, dtype=BF16)
angles = [torch.rand(1, 1, SLOTS, 64)] * 2
ahead = [x[:, :, ::32] for x in angles]
for table in (
    None,
    torch.zeros(2, 3, dtype=torch.int32),
):  # without pages, and as if in pages of 48
    rest = *layouts, table
    latent_decode.launch(torch.randn(2, 8, 1, 80, dtype=BF16), k, v, SPAN, 0.1, None, *rest)
    anchored_decode.launch(q, k, v, SPAN, 0.1, *ahead, up, None, 32, None, *rest)
    rotary_decode.launch(q, k, v, SPAN, 0.1, *angles, up, None, *rest)
