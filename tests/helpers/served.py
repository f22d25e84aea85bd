"""vLLM in this process, and what the native model answers."""

import os
from contextlib import contextmanager

os.environ |= {  # before vllm is imported
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

import tiny
from vllm import LLM, SamplingParams

from eigenzoo.kernels.install import install
from eigenzoo.zoo.inference.generate import Generator

LENGTHS = (1, 2, 15, 16, 17, 33, 70, 120)
PACKED = {  # a config whose layers have rows of different widths
    "anchor": 16,
    "k_segments": ("2x8+4x4",) * 3,
    "v_segments": ("", "4x8+4x4", "3x8"),
    "centered": True,
}
SMALL = {
    "dtype": "float32",
    "enforce_eager": True,
    "distributed_executor_backend": "uni",
    "max_model_len": 256,
    "block_size": 16,
    "num_gpu_blocks_override": 129,  # one is vLLM's own
    "max_num_seqs": 8,
    "max_num_batched_tokens": 48,  # so long prompts come in parts, beside texts that go on
}


@contextmanager
def serving(folder, **options):
    """An engine for a folder."""
    llm = LLM(str(folder), **SMALL | options)
    yield llm
    llm.llm_engine.engine_core.shutdown()


def write(model, folder):
    """Save a model of `exported` and a tokenizer."""
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def prompts(lengths=LENGTHS, seed: int = 1) -> list[list[int]]:
    """Random prompts."""
    return [tiny.tokens(1, n, seed=seed + n)[0].tolist() for n in lengths]


def served(llm, texts, count: int = 24, **sampling) -> list[list[int]]:
    """The most likely tokens after each prompt, all asked for at once."""
    how = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **sampling)
    given = [{"prompt_token_ids": text} for text in texts]
    return [[*x.outputs[0].token_ids] for x in llm.generate(given, how, use_tqdm=False)]


def native(model, texts, count: int = 24) -> list[list[int]]:
    """The same from the native model, each prompt alone."""
    install(model)
    answers = []
    for text in texts:
        generator = Generator(model, 1, len(text) + count, compile=False)
        answers.append([int(token) for token in generator.stream([text], count)])
    return answers
