"""What each choice of the method is worth in few bits, on the texts of `rivals.py`.

    python benchmarks/ablations.py MODEL --wiki FILE --speech FILE --cache FOLDER
        [--keep 0.16 --keep 0.12] [--only NAME]
        [--minutes 30] [--lr 5e-5] [--precision bfloat16]

Prints a line for every variant and share: the increase of perplexity in % over the uncompressed
model, on four texts, their mean and worst. A variant is the default in blocks of 16, in all but one
choice.
Calibration is that of `rivals.py`, kept in FOLDER; `more tokens` takes twice as many of the same
sources. `drawn labels` is the true Fisher information: gradients of the loss at tokens drawn from
the model, where the default takes those of the text (arXiv 1905.12558). `refined` is trained for
some minutes after the refit, on 128 x 512 tokens of the same sources.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rival_bench import SAMPLES, Bench, arguments
from rivals import figures
from torch import Tensor

from eigenzoo.zoo.compression.choices import PRECISIONS
from eigenzoo.zoo.compression.compress import compress, gather
from eigenzoo.zoo.compression.moments import Statistics
from eigenzoo.zoo.compression.refine import refine
from eigenzoo.zoo.compression.schedule import RefineSettings
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.measure.calibrator import pack
from eigenzoo.zoo.models.bits import BITS
from eigenzoo.zoo.models.config import kv_bytes

PLAIN = Settings(kv_bits=BITS, refit=(), anchor_block=16)
REFIT = PLAIN._replace(refit=None)


class Variant(NamedTuple):
    """Settings, and what they are calibrated on."""

    settings: Settings = PLAIN
    drawn: bool = False
    samples: int = SAMPLES
    refined: bool = False


VARIANTS = {
    "no refit": Variant(),
    "refit": Variant(REFIT),
    "refined": Variant(REFIT, refined=True),
    "no refit, refined": Variant(refined=True),
    "damping 0.1": Variant(PLAIN._replace(damping=0.1)),
    "damping 1": Variant(PLAIN._replace(damping=1.0)),
    "damping 3": Variant(PLAIN._replace(damping=3.0)),
    "drawn labels": Variant(drawn=True),
    "drawn labels, damping 0.1": Variant(PLAIN._replace(damping=0.1), drawn=True),
    "more tokens": Variant(samples=2 * SAMPLES),
    "no 3 bits": Variant(PLAIN._replace(kv_bits=(16, 8, 4, 2))),
    "blocks of 32": Variant(PLAIN._replace(keys="anchored", anchor_block=32)),
    "blocks of 64": Variant(PLAIN._replace(keys="anchored", anchor_block=64)),
    "one block": Variant(PLAIN._replace(keys="rotated")),
}


@contextmanager
def drawn_labels() -> Iterator[None]:
    """The loss is that at tokens drawn from the model."""
    known, random = F.cross_entropy, torch.Generator().manual_seed(0)

    def drawn(logits: Tensor, target: Tensor, reduction: str) -> Tensor:
        shares = logits.detach().softmax(-1)
        return known(logits, shares.multinomial(1, generator=random)[:, 0], reduction=reduction)

    with patch.object(F, "cross_entropy", drawn):
        yield


def statistics(bench: Bench, variant: Variant, rows: Tensor) -> list[Statistics]:
    """The statistics of a variant, kept in the folder of the bench."""
    settings = variant.settings.fit(bench.model.config)
    if not variant.drawn and variant.samples == SAMPLES:
        return bench.statistics(settings)

    def make() -> dict[str, Tensor]:
        with drawn_labels() if variant.drawn else nullcontext():
            return pack(gather(bench.model, rows, settings))

    name = f"statistics-{variant.drawn}-{variant.samples}"
    return bench.layers(bench.kept(name, make))


def main() -> None:
    """Measure and print, a JSON object a line."""
    parser = arguments(__doc__)
    parser.add_argument("--keep", type=float, action="append", help="again for more; else 0.16")
    parser.add_argument("--minutes", type=float, default=30.0, help="of refinement")
    parser.add_argument("--lr", type=float, default=RefineSettings().lr, help="of refinement")
    parser.add_argument("--precision", choices=PRECISIONS, default="bfloat16")
    parser.add_argument("--only", action="append", choices=VARIANTS, help="again for more")
    args = parser.parse_args()

    bench = Bench(args)
    training = RefineSettings(
        *(10_000, 2, args.lr),
        every=20,
        patience=10_000,
        minutes=args.minutes,
        precision=args.precision,
    )
    for name in args.only or VARIANTS:
        variant = VARIANTS[name]
        rows = bench.mixed(variant.samples)
        for keep in args.keep or [0.16]:
            settings = variant.settings._replace(keep=keep)
            seen = statistics(bench, variant._replace(settings=settings), rows)
            low = compress(bench.model, rows, settings, seen).model
            if variant.refined:
                mixed = bench.mixed(64).unflatten(0, (4, -1)).transpose(0, 1)  # source by source
                low = refine(bench.model, low, mixed.reshape(-1, 512), training).model
            losses = bench.losses(low)
            row = {"variant": name, "keep": keep, "share": kv_bytes(low.config)["kv_share"]}
            print(json.dumps(row | figures(losses, bench.dense)), flush=True)


if __name__ == "__main__":
    main()
