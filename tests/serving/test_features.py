"""What vLLM offers works with a compressed cache: each answer equals the native model's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: pip install 'eigenzoo[vllm]'")

import torch
from exported import of_kind
from safetensors.torch import load_file, save_file
from served import PACKED, native, prompts, served, serving, write
from vllm import SamplingParams
from vllm.sampling_params import BeamSearchParams

from eigenzoo.serving import register
from eigenzoo.zoo.models.config import kv_bytes

TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


@pytest.fixture(scope="module")
def exported():
    return of_kind("anchored keys", **PACKED)


@pytest.fixture(scope="module")
def folder(exported, tmp_path_factory):
    return write(exported, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(folder):
    """Pages of 32, of which the prompts need more than there are."""
    with serving(folder, block_size=32, num_gpu_blocks_override=10, disable_log_stats=False) as x:
        yield x


def logprobs(model, tokens) -> torch.Tensor:
    """What the native model gives each next token, (len(tokens), vocabulary)."""
    cache = model.new_cache(1, len(tokens))  # without one, it would not round
    return model(torch.tensor([tokens]), None, cache)[0].log_softmax(-1)


def counted(llm, name: str) -> int:
    return sum(x.value for x in llm.get_metrics() if x.name == f"vllm:{name}")


def test_texts_that_lose_their_pages_are_answered_the_same(llm, exported):
    texts = prompts()
    assert served(llm, texts) == native(exported.model, texts)
    assert counted(llm, "num_preemptions") > 0


def test_pages_are_shared_between_texts_that_begin_alike(llm, exported):
    (start,) = prompts([130])
    texts = [start[:100] + rest for rest in prompts([5, 1, 28])]
    served(llm, [start], 1)
    before = counted(llm, "prefix_cache_hits")
    assert served(llm, texts) == native(exported.model, texts)
    assert counted(llm, "prefix_cache_hits") - before >= 3 * 96


def test_several_samples_of_a_prompt_have_the_probabilities_of_the_native_model(llm, exported):
    (text,) = prompts([45])
    how = SamplingParams(n=3, temperature=1.0, max_tokens=12, ignore_eos=True, logprobs=0)
    samples = llm.generate([{"prompt_token_ids": text}], how, use_tqdm=False)[0].outputs
    assert len({tuple(x.token_ids) for x in samples}) == 3
    for sample in samples:
        tokens = [*sample.token_ids]
        want = logprobs(exported.model, text + tokens)[len(text) - 1 :]
        for i, token in enumerate(tokens):
            assert sample.logprobs[i][token].logprob == pytest.approx(
                float(want[i, token]), abs=1e-3
            )


def test_beams_have_the_probabilities_of_the_native_model(llm, exported):
    (text,) = prompts([40])
    how = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)
    beams = llm.beam_search([{"prompt_token_ids": text}], how)[0].sequences
    assert len(beams) == 3
    for beam in beams:
        tokens = [*beam.tokens]
        want = logprobs(exported.model, tokens)[len(text) - 1 : -1]
        total = want.gather(1, torch.tensor(tokens[len(text) :])[:, None]).sum()
        assert beam.cum_logprob == pytest.approx(float(total), abs=1e-3)


def test_logprobs_are_those_of_the_native_model(llm, exported):
    (text,) = prompts([50])
    how = SamplingParams(temperature=0, max_tokens=5, logprobs=5, prompt_logprobs=3)
    answer = llm.generate([{"prompt_token_ids": text}], how, use_tqdm=False)[0]
    want = logprobs(exported.model, [*text, *answer.outputs[0].token_ids])
    rows = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
    for row, theirs in zip(rows, want[: len(rows)], strict=True):
        for token, given in row.items():
            assert given.logprob == pytest.approx(float(theirs[token]), abs=1e-3)


@pytest.mark.parametrize("kind", ["anchored keys", "windows"])
def test_drafts_from_the_prompt_change_no_answer(kind, tmp_path):
    # in a process of its own: vLLM starts no second engine where Numba, which finds these drafts,
    # has been imported
    script = Path(__file__).with_name("drafted.py")
    about = os.environ | {"PYTHONPATH": str(script.parents[1] / "helpers")}
    command = sys.executable, script, kind, tmp_path
    done = subprocess.run(command, env=about, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_compiled_layers_answer_the_same(folder, exported):
    texts = prompts()
    with serving(folder, enforce_eager=False) as llm:
        assert served(llm, texts) == native(exported.model, texts)


def test_a_token_takes_the_bytes_that_the_card_promises(folder, exported):
    with serving(folder, dtype="bfloat16") as llm:
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        specs = runner.get_kv_cache_spec().values()
        assert len({spec.page_size_bytes for spec in specs}) > 1
        given = sum(spec.page_size_bytes for spec in specs)
        assert given == 16 * kv_bytes(exported.model.config)["kv_bytes_per_token"]
        cached = runner.kv_cache_config
        # layers share one allocation, which each entry names
        assert {x.size for x in cached.kv_cache_tensors} == {given * cached.num_blocks}
        assert len(served(llm, prompts())) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_lora": True}, "LoRA"),
        (TWO | {"decode_context_parallel_size": 2}, "decode_context_parallel_size 2"),
        ({"quantization": "fp8"}, "quantization 'fp8'"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype 'fp8'"),
    ],
)
def test_what_is_not_served_is_refused_by_name(folder, options, message):
    with pytest.raises(ValueError, match=f"not served with {message}"), serving(folder, **options):
        pass


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_text_is_served_up_to_the_length_where_angles_change(kind, tmp_path):
    exported = of_kind(kind)
    write(exported, tmp_path)
    refused = pytest.raises(ValueError, match="pass --max-model-len 64")
    with refused, serving(tmp_path):
        pass
    texts = prompts([5, 30])
    with serving(tmp_path, max_model_len=64) as llm:
        assert served(llm, texts) == native(exported.model, texts)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model.layers.1.attn.k_up", None, "lacks 1 weights, first layers.1.attn.k_up"),
        (None, "model.layers.1.attn.q_up", "weight model.layers.1.attn.q_up has shape"),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, tmp_path, old, new, message):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    if new:
        weights[new] = weights["model.norm.weight"].clone()
    weights.pop(old, None)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message), serving(tmp_path):
        pass


def test_another_version_of_vllm_is_refused(monkeypatch):
    monkeypatch.setattr("vllm.version.__version__", "0.27.1")
    with pytest.raises(ValueError, match=r"vLLM 0\.32 to 0\.32, given 0\.27\.1"):
        register.register()
