import json
from importlib.util import find_spec

import pytest
import tiny
import torch
from damage import change_config
from safetensors.torch import save_file

from eigenzoo.hub_export.compress import compress_checkpoint
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference import checkpoint
from eigenzoo.zoo.inference.checkpoint import inspect, load, locate


def test_shards_and_one_file_hold_the_same_model(tmp_path, dense):
    theirs = tiny.hf(head_dim=16, attention_bias=True)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    tiny.tokenizer().save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    shards = load(str(tmp_path / "shards")).model.state_dict()
    assert all(torch.equal(x, shards[name]) for name, x in dense.model.state_dict().items())


def test_tied_embeddings_are_one_tensor(tmp_path):
    tiny.save(tmp_path, tie_word_embeddings=True)
    model = load(str(tmp_path)).model
    assert model.head.weight is model.embed.weight


def test_dtype_is_the_checkpoint_s_own_unless_asked(tmp_path):
    tiny.hf().to(torch.bfloat16).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert load(str(tmp_path)).model.norm.weight.dtype == torch.bfloat16
    assert load(str(tmp_path), torch.float32).model.norm.weight.dtype == torch.float32


def test_inspect_tells_bytes_without_reading_weights(folder):
    (folder / "model.safetensors").unlink()
    info = inspect(str(folder))
    assert info["kv_bytes_per_token"] == info["kv_bytes_per_token_dense"] == 3 * 2 * 4 * 16 * 2
    assert info["kv_share"] == 1
    assert info["compression"] is None


def test_a_hub_id_is_downloaded_at_its_revision(monkeypatch, dense_folder):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(dense_folder)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert locate("org/model", "v1") == dense_folder
    assert (asked["name"], asked["revision"]) == ("org/model", "v1")
    assert not any("bin" in p or "*.py" in p for p in asked["allow_patterns"])


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_opt_is_read_from_pytorch_bin_files(tmp_path, shards, prefix):
    theirs = tiny.save(tmp_path, "opt")
    (tmp_path / "model.safetensors").unlink()
    weights = {
        prefix + key.removeprefix("model."): x
        for key, x in theirs.state_dict().items()
        if key != "lm_head.weight"
    }
    if shards:
        names = sorted(weights)
        halves = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
        for file, keys in halves.items():
            torch.save({key: weights[key] for key in keys}, tmp_path / file)
        weight_map = {key: file for file, keys in halves.items() for key in keys}
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(weights, tmp_path / "pytorch_model.bin")
    x = tiny.tokens(2, 20)
    got = load(str(tmp_path)).model(x)
    torch.testing.assert_close(got, theirs(x).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_there_is_used_or_known_to_be_tied(tmp_path, tied):
    theirs = tiny.save(tmp_path, "opt", tie_word_embeddings=tied)
    weights = {k: x.clone() for k, x in theirs.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    model, x = load(str(tmp_path)).model, tiny.tokens(2, 20)
    torch.testing.assert_close(model(x), theirs(x).logits, atol=1e-4, rtol=0)
    assert (model.head.weight is model.embed.weight) == tied


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return print, ("the trap has sprung",)


def test_a_bin_file_that_holds_code_is_refused_before_it_runs(tmp_path, capsys):
    tiny.save(tmp_path, "opt")
    (tmp_path / "model.safetensors").unlink()
    torch.save({"x": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is damaged, or holds more"):
        load(str(tmp_path))
    assert "sprung" not in capsys.readouterr().out
    (tmp_path / "pytorch_model.bin").write_bytes(b"no tensors at all")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is damaged, or holds more"):
        load(str(tmp_path))


def test_a_hub_repository_without_safetensors_gives_its_bin_files(monkeypatch, tmp_path):
    asked = []

    def download(name, **options):
        asked.append(options["allow_patterns"])
        return str(tmp_path)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    locate("org/model")
    assert asked == [checkpoint.FILES, checkpoint.PICKLED]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "architecture 'gpt2' is not supported"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers is 'three': expected an integer"),
        ({"model_type": "eigen", "family": "llama"}, r"config.json lacks .*k_ranks"),
        ({"model_type": None}, "architecture None"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "the weights are quantized by 'gptq'",
        ),
        (
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "factor": 2.0}},
            "proportional",
        ),
        ({"vocab_size": 100}, r"weight has shape \(320, 64\).* expects \(100, 64\)"),
        ({"num_hidden_layers": 4}, "lacks 13 weights, first layers.3"),
        ({"num_hidden_layers": 2}, "no such weight"),
        ({"num_key_value_heads": 3}, "expected|kv heads"),
    ],
)
def test_an_unsupported_field_raises_an_error_that_names_it(folder, changes, named):
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=named):
        load(str(folder))


def test_ranks_that_do_not_fit_the_weights_are_refused(folder, dense, tmp_path):
    out = tmp_path / "low"
    compress_checkpoint(dense, out, Settings(keep=0.5, kv_bits=(16,)), samples=4, seq_len=32)
    change_config(out, k_ranks=[24, 24, 24])
    with pytest.raises(ValueError, match=r"attn\.k_\w+ has shape .* config.json expects"):
        load(str(out))


def test_the_hub_s_cache_of_links_is_read(folder, tmp_path, dense):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(folder.iterdir()):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    found = load(str(snapshot)).model.state_dict()
    assert all(torch.equal(x, found[name]) for name, x in dense.model.state_dict().items())


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_packages_that_a_tokenizer_needs_are_named(folder):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(ValueError, match="pip install sentencepiece"):
        load(str(folder))


@pytest.mark.parametrize("source", ["~nobody-here/model", "x" * 5000, "a/" + "b" * 300])
def test_a_name_that_cannot_be_is_one_error(source):
    with pytest.raises(ValueError, match=r"cannot be read|does not exist|not a Hub id"):
        load(source)


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "a/b/c", "nowhere"])
def test_a_missing_folder_raises_an_error_that_names_it(source):
    with pytest.raises(ValueError, match=f"{source} does not exist"):
        load(source)


def test_a_folder_without_a_model_raises_an_error_that_says_what_it_lacks(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load(str(tmp_path))
