"""What controllers remember of each other."""

import subprocess
import sys
from secrets import token_hex
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from ckpt_core.config import Environment, UpdateConfig
from ckpt_core.errors import ConfigError, Outcome
from ckpt_core.history import History
from ckpt_core.manifest import Manifest, content_digest
from ckpt_core.source import open_checkpoint
from ckpt_core.store_records import EngineRecord, UpdateEndpoint


@pytest.fixture
def history(tmp_path):
    made = History(tmp_path / "state", tmp_path / "pool")
    yield made
    made.close()


@pytest.fixture
def content_of(tmp_path):
    def content_of(value):
        path = tmp_path / f"{value}.safetensors"
        tensor = torch.full((4, 4), float(value))
        save_file({"w": tensor}, path)
        index = open_checkpoint(path)
        manifest = Manifest.from_index(index, {"w": content_digest(tensor.numpy().tobytes())})
        return SimpleNamespace(index=index, manifest=manifest, digest=manifest.digest)

    return content_of


def engine(digest, version, instance="one"):
    return EngineRecord(
        url="http://a",
        engine="toy",
        instance_id=instance,
        digest=digest,
        version=version,
        update_id="u",
        committed_at=1.0,
    )


def commit(history, content, version, config=None):
    update_id = token_hex(4)
    history.begin(update_id, [UpdateEndpoint(url="http://a", engine="toy", instance_id="one")], content, version)
    history.committed(update_id, [engine(content.digest, version)], content, config or UpdateConfig())


def test_what_an_instance_runs_is_known_of_that_instance_only(history, content_of):
    commit(history, content_of(1), "one")
    assert history.ran("http://a", "one").version == "one"
    assert history.ran("http://a", "two") is None
    assert history.ran("http://a", "") is None
    assert history.ran("http://b", "one") is None


def test_so_many_versions_stay(history, content_of):
    for value in (1, 2, 3):
        commit(history, content_of(value), str(value), UpdateConfig(keep_versions=2))
    assert [record.label for record in history.pool.versions()] == ["3", "2"]


def test_the_version_before_is_found(history, content_of):
    for value in (1, 2):
        commit(history, content_of(value), str(value))
    running = [history.ran("http://a", "one")]
    assert history.find("", not_running=running).label == "1"
    assert history.find("2", not_running=running).label == "2"
    with pytest.raises(ConfigError):
        history.find("3", not_running=running)


def test_a_version_that_was_never_committed_is_nothing_to_go_back_to(history, content_of):
    commit(history, content_of(1), "1")
    history.begin("aborted", [], content_of(2), "2")
    history.aborted("aborted", {"http://a": Outcome.CLEAN})
    with pytest.raises(ConfigError, match="no version is warm"):
        history.find("", not_running=[history.ran("http://a", "one")])


def test_a_version_whose_file_is_gone_is_cold(history, content_of, tmp_path):
    content = content_of(1)
    commit(history, content, "1")
    assert history.warm(content.digest).label == "1"
    (tmp_path / "1.safetensors").unlink()
    assert history.warm(content.digest) is None


def test_a_copy_in_the_pool_outlives_its_file(history, content_of, tmp_path):
    content = content_of(1)
    commit(history, content, "1", UpdateConfig(copy_to_pool=True))
    (tmp_path / "1.safetensors").unlink()
    assert history.warm(content.digest) is not None


def test_a_label_is_bound_before_anything_is_paused(history, content_of):
    commit(history, content_of(1), "same")
    with pytest.raises(ConfigError, match="label 'same'"):
        history.begin("next", [], content_of(2), "same")


DEAD = """
import sys
from pathlib import Path
from ckpt_core.history import History
from ckpt_core.process import ProcessMark
from ckpt_core.store_records import UpdateEndpoint, UpdateRecord

a = UpdateEndpoint(url="http://a", engine="toy", instance_id="one")
record = UpdateRecord(update_id="theirs", state="planned", controller=ProcessMark.here(), endpoints=(a,), new_digest="0" * 32,
                      version="2", started_at=1.0)
History(Path(sys.argv[1]), Path(sys.argv[2])).store.begin_update(record)
"""


def test_a_label_is_free_again_when_its_bytes_are_gone(history, content_of, tmp_path):
    commit(history, content_of(1), "same")
    (tmp_path / "1.safetensors").unlink()
    commit(history, content_of(2), "same")
    assert history.pool.find("same").digest == content_of(2).digest


def test_another_model_may_have_a_version_of_that_name(history, content_of, tmp_path):
    commit(history, content_of(1), "step-1")
    path = tmp_path / "other.safetensors"
    save_file({"v": torch.ones(2)}, path)
    index = open_checkpoint(path)
    manifest = Manifest.from_index(index, {"v": content_digest(torch.ones(2).numpy().tobytes())})
    commit(history, SimpleNamespace(index=index, manifest=manifest, digest=manifest.digest), "step-1")
    assert history.pool.find("step-1").digest == manifest.digest


def test_only_what_a_dead_controller_left_is_left_behind(history, content_of, tmp_path):
    history.begin("mine", [], content_of(1), "1")
    assert history.left_behind() == ()
    subprocess.run(
        [sys.executable, "-c", DEAD, str(tmp_path / "state"), str(tmp_path / "pool")], check=True, timeout=60
    )
    (left,) = history.left_behind()
    assert left.update_id == "theirs"
    commit(history, content_of(3), "3")  # a later update of the same engines takes over
    assert history.left_behind() == ()


def test_without_a_place_it_lasts_as_long_as_it_is_told(tmp_path):
    nowhere = Environment(socket_root=tmp_path, memory_root=tmp_path)
    with pytest.raises(ConfigError, match="CKPT_STATE_DIR"):
        History.of(nowhere)
    History.of(nowhere, tmp_path / "short").close()
    assert (tmp_path / "short" / "state").is_dir()
