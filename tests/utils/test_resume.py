"""State that differs in anything from what was written is refused, and says how to go on."""

import pytest
import torch

from eigenzoo.zoo.utils.provenance import fingerprint, work
from eigenzoo.zoo.utils.resume import (
    KeptFiles,
    check_same,
    read_state,
    sealed,
    unsealed,
    write_state,
)

DAMAGES = {
    "a tail of zeros": lambda x: x[:-3] + bytes(3),
    "cut": lambda x: x[: len(x) // 2],
    "empty": lambda x: b"",
    "zeros": lambda x: bytes(len(x)),
    "longer": lambda x: x + bytes(8),
    "a flipped bit": lambda x: x[:-9] + bytes([x[-9] ^ 1]) + x[-8:],
    "something else": lambda x: b"my notes",
}


@pytest.fixture
def tensors():
    return {"a": torch.arange(1.0, 9), "b": torch.ones(3, dtype=torch.bfloat16)}


def test_a_state_is_read_as_it_was_written(tmp_path, tensors):
    write_state(tmp_path / "x", tensors, {"step": 3})
    got, facts = read_state(tmp_path / "x")
    assert facts == {"step": 3}
    assert all(torch.equal(got[name], x) for name, x in tensors.items())
    assert [x.name for x in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_of_any_kind_is_noticed(tmp_path, tensors, name):
    kept = KeptFiles(tmp_path)
    kept.write("kept", tensors)
    kept.check()
    write_state(tmp_path / "state", tensors, {"step": 3})
    for path in (tmp_path / "state", kept.path("kept")):
        path.write_bytes(DAMAGES[name](path.read_bytes()))
    with pytest.raises(ValueError, match=r"state is damaged .*: delete it to start again"):
        read_state(tmp_path / "state")
    with pytest.raises(ValueError, match=r"kept.safetensors is damaged: .* delete .* to start"):
        kept.check()
    kept.path("kept").unlink()
    with pytest.raises(ValueError, match=r"kept.safetensors is missing"):
        kept.check()


def test_every_bit_of_a_state_counts(tmp_path, tensors):
    write_state(tmp_path / "x", tensors, {"step": 3})
    whole = (tmp_path / "x").read_bytes()
    for place in range(len(whole)):
        (tmp_path / "x").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        if whole[place : place + 1] == b" ":  # of the header, after its end
            continue
        with pytest.raises(ValueError, match="is damaged"):
            read_state(tmp_path / "x")


@pytest.mark.parametrize("read", [[1], None, 3, {}, {"done": 3}, {"done": 3, "checksum": None}])
def test_json_that_was_not_sealed_is_refused(read):
    facts = {"done": 3, "files": {"a": "b"}}
    assert unsealed(sealed(facts)) == facts
    with pytest.raises(ValueError, match=r"checksum|no JSON object"):
        unsealed(read)
    with pytest.raises(ValueError, match="checksum"):
        unsealed(sealed(facts) | {"done": 4})


def test_what_differs_is_named_with_both_values_and_the_way_on_fits_it(tmp_path):
    facts = work(torch.device("cpu"), keep=0.6, refit=("output",), weights="a")
    check_same(tmp_path, facts, facts)
    with pytest.raises(ValueError, match=r"other work \(keep 0.6, given 0.5\): repeat its command"):
        check_same(tmp_path, facts | {"keep": 0.5}, facts)
    for name in ("eigenzoo", "torch", "transformers", "code"):
        with pytest.raises(ValueError, match=rf"versions \({name} .* given 'new'\): go on with"):
            check_same(tmp_path, facts | {name: "new"}, facts)
    older = {name: value for name, value in facts.items() if name != "refit"}
    with pytest.raises(ValueError, match=r"\(refit None, given \['output'\]\)"):
        check_same(tmp_path, facts, older)


def test_a_fingerprint_covers_all_bytes_of_files_and_where_one_ends(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(bytes(range(100)))
    two.write_bytes(b"x")
    whole = fingerprint(one, two)
    assert fingerprint(one, two) == whole != fingerprint(two, one)
    one.write_bytes(bytes(range(99)))
    two.write_bytes(b"cx")
    assert fingerprint(one, two) != whole
