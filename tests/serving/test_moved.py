"""Documents that a request names are read from pages computed behind another text, if asked for."""

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: pip install 'eigenzoo[vllm]'")

import torch
from exported import of_kind
from served import PACKED, native, prompts, serving, write
from vllm import SamplingParams

from eigenzoo.zoo.inference.generate import Generator
from eigenzoo.zoo.inference.moved import move

ON = {
    "kv_transfer_config": {
        "kv_connector": "MovedPages",
        "kv_connector_module_path": "eigenzoo.serving.moved",
        "kv_role": "kv_both",
    },
    "disable_log_stats": False,
}
NEAR, FAR, ONE, TWO, ASKED = prompts([32, 80, 48, 64, 9])
COUNT = 16


@pytest.fixture(scope="module")
def exported():
    return of_kind("anchored keys", **PACKED)


@pytest.fixture(scope="module")
def folder(exported, tmp_path_factory):
    return write(exported, tmp_path_factory.mktemp("model"))


@pytest.fixture
def llm(folder):
    with serving(folder, **ON) as x:
        yield x


def asked(llm, text, borders=None, salt="approximate") -> list[int]:
    """The most likely tokens after a prompt that names its documents."""
    extra = {"kv_transfer_params": {"documents": borders}} if borders else None
    how = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, extra_args=extra)
    prompt = {"prompt_token_ids": text} | ({"cache_salt": salt} if salt else {})
    return [*llm.generate([prompt], how, use_tqdm=False)[0].outputs[0].token_ids]


def copied(llm) -> int:
    """Tokens whose pages were copied so far."""
    name = "vllm:external_prefix_cache_hits"
    return sum(x.value for x in llm.get_metrics() if x.name == name)


def spliced(model, begin, documents, tail) -> list[int]:
    """The same natively: documents are (tokens, what was before them when they were computed)."""
    generator = Generator(model, 1, 256, compile=False)
    generator.advance(torch.tensor([begin]), 0)
    at = len(begin)
    for document, before in documents:
        source = Generator(model, 1, 256, compile=False)
        source.advance(torch.tensor([before]), 0)
        source.advance(torch.tensor([document]), len(before))
        move(source.cache, len(before), generator.cache, at, len(document))
        at += len(document)
    token, answer = generator.advance(torch.tensor([tail]), at).argmax(-1), []
    for slot in range(at + len(tail), at + len(tail) + COUNT):
        answer.append(int(token))
        token = generator.advance(token[None], slot).argmax(-1)
    return answer


def test_documents_are_read_from_the_pages_that_another_text_left(llm, exported):
    near, far = len(NEAR), len(FAR)
    asked(llm, NEAR + ONE + ASKED, [near, near + 48])
    asked(llm, NEAR + TWO + ASKED, [near, near + 64])
    asked(llm, FAR)
    assert copied(llm) == 0
    answer = asked(llm, FAR + TWO + ONE + ASKED, [far, far + 64, far + 112])
    assert copied(llm) == 64 + 48
    want = spliced(exported.model, FAR, [(TWO, NEAR), (ONE, NEAR)], ASKED)
    exact = native(exported.model, [FAR + TWO + ONE + ASKED], COUNT)[0]
    assert answer == want != exact
    assert asked(llm, FAR + TWO + ONE + ASKED, salt=None) == exact  # others are answered exactly
    assert copied(llm) == 64 + 48


def test_a_document_without_its_beginning_in_the_prefix_cache_is_computed(llm, exported):
    near, far = len(NEAR), len(FAR)
    asked(llm, NEAR + ONE + ASKED, [near, near + 48])
    exact = native(exported.model, [FAR + ONE + ASKED], COUNT)[0]
    assert asked(llm, FAR + ONE + ASKED, [far, far + 48]) == exact
    assert copied(llm) == 0


@pytest.mark.parametrize("borders", [[80, 129], [81, 128], [128, 80], [80, 512], [80, "128"], 80])
def test_borders_that_are_not_rising_multiples_of_a_page_name_no_document(llm, exported, borders):
    asked(llm, NEAR + ONE + ASKED, [32, 80])
    asked(llm, FAR)
    exact = native(exported.model, [FAR + ONE + ASKED], COUNT)[0]
    assert asked(llm, FAR + ONE + ASKED, borders) == exact
    assert copied(llm) == 0


def test_a_document_that_began_a_text_is_not_used_elsewhere(llm, exported):
    asked(llm, ONE + ASKED, [0, 48])
    asked(llm, FAR)
    exact = native(exported.model, [FAR + ONE + ASKED], COUNT)[0]
    assert asked(llm, FAR + ONE + ASKED, [80, 128]) == exact
    assert copied(llm) == 0


def test_another_salt_or_none_finds_no_page(llm, exported):
    asked(llm, NEAR + ONE + ASKED, [32, 80])
    exact = native(exported.model, [FAR + ONE + ASKED], COUNT)[0]
    for salt in ("another", None):
        asked(llm, FAR, salt=salt)
        assert asked(llm, FAR + ONE + ASKED, [80, 128], salt) == exact
    assert copied(llm) == 0


def test_pages_that_were_given_to_another_text_are_not_read(folder, exported):
    with serving(folder, **ON | {"num_gpu_blocks_override": 18}) as llm:
        asked(llm, NEAR + ONE + ASKED, [32, 80])
        for text in prompts([200, 210]):
            asked(llm, text)
        asked(llm, FAR)
        exact = native(exported.model, [FAR + ONE + ASKED], COUNT)[0]
        assert asked(llm, FAR + ONE + ASKED, [80, 128]) == exact
        assert copied(llm) == 0


def test_pages_are_copied_before_the_prompt_itself_takes_them(folder, exported):
    few = {"num_gpu_blocks_override": 12, "max_model_len": 176}  # it takes what it copies
    with serving(folder, **ON | few) as llm:
        asked(llm, NEAR + ONE + ASKED, [32, 80])
        asked(llm, FAR)
        want = spliced(exported.model, FAR, [(ONE, NEAR)], ASKED)
        assert asked(llm, FAR + ONE + ASKED, [80, 128]) == want
        assert copied(llm) == 48


def test_without_the_option_documents_are_computed(folder, exported):
    with serving(folder, disable_log_stats=False) as llm:
        asked(llm, NEAR + ONE + ASKED, [32, 80])
        asked(llm, FAR)
        exact = native(exported.model, [FAR + ONE + ASKED], COUNT)[0]
        assert asked(llm, FAR + ONE + ASKED, [80, 128]) == exact


@pytest.mark.parametrize(
    ("kind", "changes", "options", "message"),
    [
        ("pairs", {}, {}, "pairs are keys that are rotated by their position"),
        ("learned positions", {}, {}, "adds learned positions"),
        ("anchored keys", {"anchor": 32}, {}, "pass --block-size 32"),
        ("anchored keys", {}, {"enable_prefix_caching": False}, "--no-enable-prefix-caching"),
    ],
)
def test_models_and_options_that_do_not_fit_are_refused(kind, changes, options, message, tmp_path):
    write(of_kind(kind, **changes), tmp_path)
    with pytest.raises(ValueError, match=message), serving(tmp_path, **ON | options):
        pass
