import pytest
import tiny
import torch


@pytest.mark.parametrize("tokens", [1, 8, 30])  # compiled, few read only the matrices they need
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_compiled_experts_give_what_they_give_one_after_another(family, tokens):
    torch.compiler.reset()
    mixture, x = tiny.native(family).layers[1].mlp, torch.randn(1, tokens, 64)
    compiled = torch.compile(mixture, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(x), mixture(x))


def test_gradients_pass_through_experts():
    mixture, x = tiny.native("mixtral").layers[0].mlp.double(), torch.randn(1, 5, 64).double()
    assert torch.autograd.gradcheck(mixture, x.requires_grad_())
