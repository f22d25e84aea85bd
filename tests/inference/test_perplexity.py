import math

import pytest
import tiny
import torch

from eigenzoo.zoo.inference.perplexity import (
    cut,
    mean_perplexity,
    perplexity,
    token_losses,
    window_losses,
)


@pytest.mark.parametrize("windows", [0, 2])
def test_perplexity_is_the_papers_protocol(windows):
    theirs, ours = tiny.hf(), tiny.native()
    x = tiny.tokens(1, 100)[0]
    rows = x[:96].view(3, 32)[: windows or 3]
    losses = [float(theirs(row[None], labels=row[None]).loss) for row in rows]
    got = perplexity(ours, x, 32, windows)
    assert got.tokens == 31 * len(rows)
    assert got.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_windows_of_gemma_3_all_begin_with_the_first_token():
    model, x = tiny.native("gemma3_text"), tiny.tokens(1, 100)[0]
    rows = torch.cat((x[:1].expand(3, 1), x[1:94].view(3, 31)), 1)
    assert torch.equal(cut(x, 32, begun=True), rows)
    assert torch.equal(token_losses(model, x, 32), window_losses(model, rows))
    for windows, length, count in ((2, 100, 2), (0, 95, 3), (0, 93, 2), (0, 32, 1)):
        assert len(cut(x[:length], 32, windows, begun=True)) == count
    assert cut(x[:2], 2, begun=True).tolist() == [x[:2].tolist()]
    with pytest.raises(ValueError, match="31 tokens: expected at least one window of 32"):
        cut(x[:31], 32, begun=True)


@pytest.mark.parametrize("family", ["llama", "mpt"])
def test_losses_are_of_every_token_though_logits_come_in_pieces(family):
    model = tiny.native(family, max_position_embeddings=1200)
    rows = tiny.tokens(1, 2 * 1100)[0].view(2, 1100)
    logs = model(rows[:, :-1]).log_softmax(-1)
    want = -logs.gather(2, rows[:, 1:, None])[..., 0]
    got = token_losses(model, rows.flatten(), 1100)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert mean_perplexity(got) == perplexity(model, rows.flatten(), 1100)


@pytest.mark.parametrize(("length", "window"), [(31, 32), (40, 1)])
def test_a_text_shorter_than_a_window_is_refused(length, window):
    with pytest.raises(ValueError, match="window"):
        perplexity(tiny.native(), tiny.tokens(1, length)[0], window)


def test_a_loss_beyond_floating_point_is_infinite_perplexity():
    assert mean_perplexity(torch.full((2, 3), 1e3)).perplexity == math.inf
