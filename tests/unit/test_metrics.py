"""Reports as JSON and Prometheus text."""

import json
from dataclasses import replace

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ckpt_core.errors import Outcome
from ckpt_core.in_flight import Fate, InFlight
from ckpt_core.metrics import Stage, Stopwatch, UpdateReport

REPORT = UpdateReport(
    update_id="u1",
    version='v"1\\\n2',
    digest="0" * 32,
    outcome=Outcome.COMMITTED,
    size_bytes=123456789012,
    tensors=3,
    seconds=2.5,
    pause_s=1.25,
    stages={"prepare": 1.0, "transfer": 0.5},
    transfer_gb_s=9.75,
    digest_s=0.1,
    locked_bytes=0,
    lock_s=0.0,
    ring_bytes=1 << 24,
    verified="arrival",
    in_flight=tuple(
        InFlight(endpoint=url, engine="e", requests=count, fate=Fate.KEPT, old_version="a", new_version="b")
        for url, count in (("http://1", 2), ("http://2", None), ("http://3", 3))
    ),
    ranks=(),
    agents=(),
)


def samples(path):
    return {
        (sample.name, sample.labels.get("stage", "")): sample
        for family in text_string_to_metric_families(path.read_text())
        for sample in family.samples
    }


def test_the_text_file_says_what_the_report_says(tmp_path):
    REPORT.write_metrics(tmp_path / "ckpt.prom")
    got = samples(tmp_path / "ckpt.prom")
    values = {key: sample.value for key, sample in got.items()}
    assert values.pop(("ckpt_update_finished_timestamp_seconds", "")) > 1e9
    assert values == {
        ("ckpt_update_bytes", ""): 123456789012.0,
        ("ckpt_update_seconds", ""): 2.5,
        ("ckpt_update_pause_seconds", ""): 1.25,
        ("ckpt_update_transfer_gigabytes_per_second", ""): 9.75,
        ("ckpt_update_stage_seconds", "prepare"): 1.0,
        ("ckpt_update_stage_seconds", "transfer"): 0.5,
    }


def test_labels_survive_any_version(tmp_path):
    REPORT.write_metrics(tmp_path / "ckpt.prom")
    for sample in samples(tmp_path / "ckpt.prom").values():
        assert sample.labels["version"] == REPORT.version
        assert sample.labels["outcome"] == "committed"


def test_every_family_has_help(tmp_path):
    REPORT.write_metrics(tmp_path / "ckpt.prom")
    families = list(text_string_to_metric_families((tmp_path / "ckpt.prom").read_text()))
    assert all(family.documentation and family.type == "gauge" for family in families)


def test_a_second_write_replaces_the_first(tmp_path):
    for seconds in (1.0, 3.0):
        changed = msgspec.convert(msgspec.to_builtins(REPORT) | {"seconds": seconds}, UpdateReport)
        changed.write_metrics(tmp_path / "ckpt.prom")
    assert samples(tmp_path / "ckpt.prom")["ckpt_update_seconds", ""].value == 3.0
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.prom"]


def test_json_can_be_read_back():
    assert msgspec.json.decode(REPORT.to_json(), type=UpdateReport) == REPORT
    assert REPORT.to_json().endswith(b"}\n")
    assert b'"outcome": "committed"' in REPORT.to_json()


def test_a_stopwatch_adds_up_and_counts_failures():
    watch = Stopwatch()
    with watch.stage(Stage.PLAN):
        pass
    first = watch.seconds["plan"]
    with pytest.raises(ValueError, match="no"), watch.stage(Stage.PLAN):
        raise ValueError("no")
    assert watch.seconds["plan"] > first > 0
    assert list(watch.seconds) == ["plan"]


def test_stages_are_in_the_order_of_an_update():
    assert [stage.value for stage in Stage] == [
        "prepare",
        "pause",
        "attach",
        "layout",
        "plan",
        "transfer",
        "commit",
        "detach",
        "flush",
        "resume",
    ]


def test_requests_are_added_up_over_engines_that_tell():
    assert REPORT.requests_in_flight == 5
    assert replace(REPORT, in_flight=REPORT.in_flight[1:2]).requests_in_flight is None


def test_json_says_which_weights_made_the_tokens_of_requests_in_flight():
    (first, *_) = json.loads(REPORT.to_json())["in_flight"]
    assert first["requests"] == 2
    assert (first["old_version"], first["new_version"]) == ("a", "b")
    assert first["fate"].startswith("went on")
