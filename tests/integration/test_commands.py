"""The command line as a user runs it: a process of its own, exit codes, JSON, reports."""

import json
import subprocess
import sys

import msgspec
import pytest
from safetensors.torch import save_file

from ckpt_core import Manifest, UpdateReport

CKPT = [sys.executable, "-c", "from ckpt_core.cli import main; main()"]


def ckpt(*arguments, code=0):
    done = subprocess.run([*CKPT, *map(str, arguments)], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def server(start_server, checkpoint_of):
    return start_server(checkpoint_of(which="a"), tp=2)


def test_update_reports_to_people_and_machines(server, checkpoint_of, tmp_path):
    report_file, metrics_file = tmp_path / "report.json", tmp_path / "ckpt.prom"
    done = ckpt(
        "update",
        checkpoint_of(which="b"),
        "--engine",
        "reference",
        "--endpoint",
        server.url,
        "--version",
        "step-7",
        "--json",
        report_file,
        "--metrics-file",
        metrics_file,
    )
    report = msgspec.json.decode(report_file.read_bytes(), type=UpdateReport)
    assert (report.version, report.verified, len(report.ranks), len(report.agents)) == ("step-7", "arrival", 2, 2)
    assert 0 < report.pause_s <= report.seconds
    assert report.transfer_gb_s > 0
    for text in ("step-7", report.digest, "GB/s", "transfer", report.ranks[0].fingerprint[:12]):
        assert text in done.stdout
    assert 'version="step-7"' in metrics_file.read_text()
    assert server.status()["version"] == "step-7"


def test_a_trace_shows_every_bucket_of_every_agent_and_rank(server, checkpoint_of, tmp_path):
    trace = tmp_path / "update.json"
    ckpt("update", checkpoint_of(which="a"), "--endpoint", f"reference={server.url}", "--trace", trace)
    events = json.loads(trace.read_bytes())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert {"controller", "agent 0", "agent 1", f"rank 0 of reference at {server.url}"} <= names
    spans = [event for event in events if event["ph"] == "X"]
    filled = [event["args"]["bucket"] for event in spans if event["name"] == "fill"]
    loaded = [event["args"]["bucket"] for event in spans if event["name"] == "load"]
    assert sorted(filled) == list(range(len(filled)))
    assert sorted(loaded) == sorted(2 * filled)  # by both ranks
    page = ckpt("timeline", trace).stdout.strip()
    assert page == str(tmp_path / "update.html")
    text = (tmp_path / "update.html").read_text()
    assert "<svg" in text
    assert "agent 1" in text


def test_update_by_name_and_url_writes_json_to_standard_output(server, checkpoint_of):
    done = ckpt("update", checkpoint_of(which="a"), "--endpoint", f"reference={server.url}", "--json", "-")
    report = json.loads(done.stdout)
    assert report["outcome"] == "committed"
    assert report["version"] == report["digest"][:12] == server.status()["version"]
    (warning,) = done.stderr.splitlines()  # nobody knows what it ran
    assert "this update cannot be undone" in warning


def test_ready_tells_a_router(server):
    done = ckpt("ready", "--engine", "reference", "--endpoint", server.url, "--json", "-")
    (status,) = json.loads(done.stdout)
    assert (status["state"], status["world_size"]) == ("serving", 2)
    assert server.post("/pause", mode="abort").is_success
    try:
        assert "paused" in ckpt("ready", "--engine", "reference", "--endpoint", server.url, code=7).stdout
    finally:
        assert server.client.post("/resume", json={}).is_success
    ckpt("ready", "--engine", "reference", "--endpoint", server.url)


def test_inspect_plan_and_engines(checkpoint_of, tmp_path):
    ckpt("inspect", checkpoint_of(), "--json", tmp_path / "m.json")
    manifest = Manifest.load(tmp_path / "m.json")
    assert manifest.has_content
    done = ckpt("plan", checkpoint_of(), "--ranks", 2, "--explain", "--ring-mib", 1, "--bucket-mib", 1)
    assert "needed by ranks" in done.stdout
    made = json.loads(ckpt("plan", checkpoint_of(), "--ranks", 2, "--json", "-").stdout)
    assert made["structure_digest"] == manifest.structure_digest
    assert "reference" in ckpt("engines").stdout


def test_an_update_that_is_refused_ends_with_ten_and_touches_nothing(server, tensors_of, checkpoint_of, tmp_path):
    before = server.live_digests()
    tensors = tensors_of(checkpoint_of(which="b"))
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    arguments = ["update", tmp_path, "--engine", "reference", "--endpoint", server.url]
    done = ckpt(*arguments, code=10)
    assert "aborted, clean" in done.stderr
    assert "model.norm.weight" in done.stderr
    assert f"{server.url}: clean" in done.stderr
    assert server.live_digests() == before
    assert server.status()["state"] == "serving"
    ckpt(*arguments, "--allow-missing")
    ckpt("update", checkpoint_of(which="a"), "--engine", "reference", "--endpoint", server.url)
    assert server.live_digests() == before


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--engine", "nosuch"], 5),
        (["--engine", "reference", "--pause-mode", "keep"], 2),
        (["--engine", "reference", "--timeout-s", "-1"], 2),
        ([], 2),
    ],
)
def test_wrong_options_end_before_the_engine_is_asked(server, checkpoint_of, arguments, code):
    ckpt("update", checkpoint_of(which="b"), "--endpoint", server.url, *arguments, code=code)
    assert server.status()["state"] == "serving"


def test_a_missing_checkpoint_ends_with_three(server, tmp_path):
    done = ckpt("update", tmp_path / "none", "--engine", "reference", "--endpoint", server.url, code=3)
    assert "does not exist" in done.stderr
    assert done.stdout == ""
