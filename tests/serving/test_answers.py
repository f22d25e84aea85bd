"""What vLLM answers equals what the native model answers, for every way to hold keys and values."""

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: pip install 'eigenzoo[vllm]'")

import torch
from exported import KINDS, of_kind
from served import native, prompts, served, serving, write

SEGMENTS = {
    "k_ranks": (6,) * 3,
    "k_segments": ("2x8+4x4",) * 3,
    "v_ranks": (5, 8, 3),
    "v_segments": ("", "4x8+4x4", "3x8"),
    "centered": True,
}
WHOLE = SEGMENTS | {"k_ranks": (8,) * 3, "k_segments": ("",) * 3}
JOINT = {"joint_kv": True, "k_ranks": (12, 6, 9), "v_ranks": (0,) * 3}
CASES = {  # kind, changes of the config
    "full keys, whole heads": ("full keys", {}),
    "full keys": ("full keys", WHOLE),
    "rebuilt keys": ("rebuilt keys", SEGMENTS),
    "anchored keys": ("anchored keys", SEGMENTS),
    "anchored keys, 16 slots": ("anchored keys", SEGMENTS | {"anchor": 16}),
    "rotated keys": ("anchored keys", SEGMENTS | {"anchor": 256}),
    "pairs": ("pairs", SEGMENTS),
    "windows": ("windows", SEGMENTS),
    "Mistral": ("one window", SEGMENTS),
    "Qwen3": ("normed, rebuilt keys", SEGMENTS),
    "Qwen3, anchored": ("normed, anchored keys", SEGMENTS),
    "Gemma 3": ("two rotations, rebuilt keys", SEGMENTS),
    "Gemma 3, anchored": ("two rotations, anchored keys", SEGMENTS),
    "experts": ("experts", SEGMENTS),
    "OPT": ("learned positions", SEGMENTS),
    "OPT, joint": ("learned positions", JOINT),
    "MPT": ("ALiBi", SEGMENTS),
    **{f"{kind}, 16 bits": (kind, {}) for kind in KINDS if kind not in ("longrope", "full keys")},
}


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_the_native_model(case, tmp_path):
    kind, changes = CASES[case]
    exported = of_kind(kind, **changes)
    model, texts = exported.model, prompts()
    with serving(write(exported, tmp_path)) as llm:
        want = native(model, texts)
        assert served(llm, texts) == want
        again = [text + answer[:9] for text, answer in zip(texts, want, strict=True)]
        assert served(llm, again, 15) == [answer[9:] for answer in want]  # finds its pages
        assert bytes_per_token(llm) == sum(
            latent.nbytes(torch.float32) for i in range(3) for latent in model.config.latents(i)
        )


def bytes_per_token(llm) -> int:
    """As vLLM counts them when it makes its pages."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    specs = runner.get_kv_cache_spec().values()
    return sum(spec.page_size_bytes // spec.block_size for spec in specs)
