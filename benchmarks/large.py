"""Time and memory of `compress --stream` for a large model; checks that the result generates.

    python benchmarks/large.py --shape llama-2-7b --layers 4 FOLDER

Random weights of a published shape, cut in depth, are written to FOLDER and compressed there.
Prints one JSON object: seconds per layer of each sweep, and seconds outside of layers; hours
for the whole depth at the same amount of text; bytes read and kept; and the peak of memory above
that of the loaded libraries.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from eigenzoo.hub_export import stream as hub
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.compression.stream import Stream
from eigenzoo.zoo.inference.checkpoint import open_layers
from eigenzoo.zoo.inference.python_texts import python_help
from eigenzoo.zoo.measure.shapes import SHAPES, shaped
from eigenzoo.zoo.utils.memory import peak, reset_peak
from eigenzoo.zoo.utils.provenance import device_name, versions

CPU = torch.device("cpu")


class Timed(Stream):
    """Records the seconds and the peak of memory of every step, by the sweep it belongs to."""

    seconds: dict[str, list[float]] = {}  # noqa: RUF012
    peaks: dict[str, int] = {}  # noqa: RUF012
    most = 0  # bytes of the files at any time

    def _steps(self):
        def timed(step):
            def take():
                sweep = step.name.split(", ")[-1]
                reset_peak(CPU)
                start = time.perf_counter()
                stale = step.take()
                self.peaks[sweep] = max(self.peaks.get(sweep, 0), peak(CPU))
                self.seconds.setdefault(sweep, []).append(time.perf_counter() - start)
                size = sum(x.stat().st_size for x in self.kept.folder.glob("*.safetensors"))
                type(self).most = max(self.most, size)
                return stale

            return step._replace(take=take)

        return [timed(step) for step in super()._steps()]


def write(folder: Path, shape: str, layers: int) -> None:
    """A checkpoint of random weights with a file for every layer, as large ones have."""
    config = shaped(shape, layers)
    config.dtype, config.architectures = "bfloat16", ["LlamaForCausalLM"]
    width, hidden, d = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    random = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16).normal_(std=0.02, generator=random)

    def layer() -> dict[str, torch.Tensor]:
        sizes = {"q": (heads, width), "k": (kv, width), "v": (kv, width), "o": (width, heads)}
        weights = {f"self_attn.{name}_proj.weight": draw(*size) for name, size in sizes.items()}
        weights |= {f"mlp.{name}_proj.weight": draw(hidden, width) for name in ("gate", "up")}
        weights["mlp.down_proj.weight"] = draw(width, hidden)
        for name in ("input", "post_attention"):
            weights[f"{name}_layernorm.weight"] = torch.ones(width, dtype=torch.bfloat16)
        return weights

    outside = {"model.embed_tokens.weight": draw(config.vocab_size, width)}
    outside["model.norm.weight"] = torch.ones(width, dtype=torch.bfloat16)
    if not config.tie_word_embeddings:
        outside["lm_head.weight"] = draw(config.vocab_size, width)
    files = {}
    for i in range(layers + 1):
        weights = (
            {f"model.layers.{i}.{k}": x for k, x in layer().items()} if i < layers else outside
        )
        name = f"model-{i + 1:05}-of-{layers + 1:05}.safetensors"
        save_file(weights, folder / name, {"format": "pt"})
        files |= dict.fromkeys(weights, name)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    bpe.train_from_iterator([python_help(held_out=False)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Write the model, compress it, and print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    names = [name for name, make in SHAPES.items() if isinstance(make(), LlamaConfig)]
    parser.add_argument("--shape", default="llama-2-7b", choices=names)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--method", default="fisher")
    parser.add_argument("--keep", type=float, default=0.5)
    given = parser.parse_args()
    source, out, text = (given.folder / name for name in ("model", "low", "text.txt"))
    source.mkdir(parents=True)
    write(source, given.shape, given.layers)
    text.write_text(python_help(held_out=False))

    hub.Stream = Timed
    reset_peak(CPU)
    before = peak(CPU)
    settings = Settings(given.method, given.keep, kv_bits=(16,))
    original, files = open_layers(str(source))
    amount = given.samples, given.seq_len
    record = hub.stream_checkpoint(original, files, out, settings, str(text), *amount)
    used = {name: x - before for name, x in Timed.peaks.items()}
    sizes = [path.stat().st_size for path in sorted(source.glob("model-*"))]
    seen = given.samples * given.seq_len * original.model.config.hidden_size * 2
    whole = SHAPES[given.shape]().num_hidden_layers
    taken = {name: sum(x) / len(x) for name, x in Timed.seconds.items()}
    once = {name: taken.pop(name) for name in ("embedding", "loss", "measuring")}
    hours = (sum(taken.values()) * whole + sum(once.values())) / 3600
    command = [sys.executable, "-c", "from eigenzoo.zoo.cli import main; main()", "generate", out]
    made = subprocess.run(
        [*command, "--prompt", "The", "--max-new-tokens", "8", "--json", "--no-compile"],
        check=True,
        capture_output=True,
        text=True,
    )
    row = {
        "shape": given.shape,
        "layers": given.layers,
        "method": given.method,
        "text": f"{given.samples} x {given.seq_len} tokens",
        "seconds_per_layer": {name: round(x, 1) for name, x in taken.items()},
        "seconds_once": {name: round(x, 1) for name, x in once.items()},
        "hours_of_all_layers": round(hours, 2),
        "layer_bytes": sizes[0],
        "outside_bytes": sizes[-1],
        "hidden_state_bytes": seen,
        "disk_bytes": Timed.most,
        "peak_above_start": used,
        "share": record["share"],
        "generated": json.loads(made.stdout),
        "processor": device_name(CPU),
        "versions": versions(),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
