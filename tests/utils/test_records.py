"""TypedDicts of rows and records have the fields of the classes that fill them."""

import json
from pathlib import Path

from eigenzoo.zoo.compression.schedule import RefineSettings
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.inference.perplexity import Perplexity
from eigenzoo.zoo.measure.calibrator import Calibration
from eigenzoo.zoo.measure.evaluate import Evaluation
from eigenzoo.zoo.measure.probe import Bucket, Retrieval
from eigenzoo.zoo.models.config import kv_bytes
from eigenzoo.zoo.utils import records

OLDEST = Path(__file__).parents[1] / "fixtures" / "format-0"


def fields(record) -> set[str]:
    return {*record.__annotations__}


def test_records_have_the_fields_of_what_they_are_made_from():
    assert fields(records.SettingsRecord) == {*Settings._fields}
    assert fields(records.RefineRecord) > {*RefineSettings._fields}
    assert fields(records.PerplexityRecord) == {*Perplexity._fields}
    assert fields(records.PositionRecord) == {*Bucket._fields}
    assert fields(records.RetrievalRecord) == {*Retrieval._fields}
    assert fields(records.CalibrationText) == {*Calibration._fields, "digest"}
    read = {*Evaluation._fields} - {"domains"}  # its texts are in `text` and in the digest
    assert fields(records.EvaluationText) == read | {"digest"}


def test_sizes_have_the_fields_that_the_config_counts(dense):
    assert {*kv_bytes(dense.model.config)} == fields(records.KvBytes)


def test_the_earliest_checkpoints_have_what_is_required():
    record = json.loads((OLDEST / "config.json").read_text())["compression"]
    assert record == load(str(OLDEST)).config["compression"]
    assert records.CompressionRecord.__required_keys__ <= record.keys()
    assert record.keys() <= fields(records.CompressionRecord)


def test_fields_that_came_later_are_not_required():
    later = {"keys", "anchor_block", "keys_reason", "budget", "damping", "refit", "rank_pairs"}
    later |= {"kv_bits"}
    assert later == records.SettingsRecord.__optional_keys__
    assert {
        "processor",
        "versions",
        "weights",
        "contestants",
        "code",
    } == records.BenchOrigin.__optional_keys__
