"""The command line: frozen options, exit codes, JSON, and one message without a traceback for every error."""
# ruff: noqa: PLR0917 (arguments are fixtures)

import json

import pytest
import torch
import typer
from safetensors.torch import save_file

from ckpt_core import cli
from ckpt_core.manifest import Manifest

OPTIONS = {
    "adopt": ["--copy-to-pool", "--endpoint", "--engine", "--json", "--version", "CHECKPOINT"],
    "agent": ["--address", "--cluster", "--count", "--nic-gb-s"],
    "cluster": ["--address", "DIRECTORY"],
    "demo": ["--cache", "--generated"],
    "engines": ["--json"],
    "export": [
        "--directory",
        "--follow",
        "--host",
        "--lease-s",
        "--library",
        "--max-rate",
        "--name",
        "--out",
        "--rdma",
        "--version",
        "CHECKPOINT",
    ],
    "inspect": ["--digest/--no-digest", "--json", "--tensors", "CHECKPOINT"],
    "join": [
        "--directory",
        "--endpoint",
        "--engine",
        "--follow",
        "--from",
        "--host",
        "--json",
        "--max-rate",
        "--version",
        "--wait-s",
    ],
    "limits": ["--json", "--seconds"],
    "owners": ["--directory", "--json"],
    "new-engine": ["--directory", "NAME"],
    "plan": [
        "--agents",
        "--bucket-mib",
        "--explain",
        "--hosts",
        "--json",
        "--lanes",
        "--ranks",
        "--ring-mib",
        "CHECKPOINT",
    ],
    "recover": ["--endpoint", "--engine"],
    "rollback": ["--endpoint", "--engine", "--json", "VERSION"],
    "verify": ["--endpoint", "--engine", "--json", "--version"],
    "versions": ["--json"],
    "ready": ["--endpoint", "--engine", "--json"],
    "serve": ["--listen", "--tls-cert", "--tls-key"],
    "timeline": ["--out", "TRACE"],
    "update": [
        "--allow-missing",
        "--allow-stale-cache",
        "--allow-unexpected",
        "--bucket-mib",
        "--cluster",
        "--copy-to-pool",
        "--endpoint",
        "--engine",
        "--fingerprint/--no-fingerprint",
        "--hosts",
        "--json",
        "--keep-versions",
        "--metrics-file",
        "--pause-mode",
        "--pause-timeout-s",
        "--pool-mib",
        "--reading",
        "--replay/--no-replay",
        "--ring-mib",
        "--timeout-s",
        "--trace",
        "--undo",
        "--verify",
        "--version",
        "CHECKPOINT",
    ],
}


@pytest.fixture
def run(monkeypatch, capfdbinary):
    """Runs the command line as a user does; exit code, standard output, standard error."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["ckpt", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        out, err = capfdbinary.readouterr()
        assert b"Traceback" not in err
        return code, out.decode(), err.decode()

    return run


@pytest.fixture
def checkpoint(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    save_file({"a.weight": torch.ones(4, 8), "b.weight": torch.zeros(3)}, directory / "model.safetensors")
    return directory


def options_of(command):
    names = []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            names.append(parameter.name.upper())
        elif "--help" not in parameter.opts:
            names.append("/".join([*parameter.opts, *parameter.secondary_opts]))
    return sorted(names)


def test_commands_and_options_are_frozen():
    commands = typer.main.get_command(cli.app).commands
    assert {name: options_of(command) for name, command in commands.items()} == OPTIONS


def test_help_states_every_exit_code(run):
    code, out, _ = run("--help")
    assert code == 0
    text = " ".join(out.replace("│", " ").split())
    for number, meaning in (
        (0, "done"),
        (1, "unexpected error"),
        (2, "wrong option"),
        (3, "unusable checkpoint"),
        (4, "no plan"),
        (5, "plugin"),
        (6, "transport"),
        (7, "engine"),
        (8, "verification"),
        (10, "aborted, nothing touched"),
        (11, "aborted, old weights restored"),
        (12, "aborted, engines poisoned"),
    ):
        assert f"{number} {meaning}" in text


@pytest.mark.parametrize("command", sorted(OPTIONS))
def test_every_command_and_option_explains_itself(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    for option in OPTIONS[command]:
        assert option.split("/")[0].removeprefix("--")[:12].casefold() in out.casefold()


def test_inspect_shows_and_writes_the_manifest(run, checkpoint, tmp_path):
    code, out, _ = run("inspect", checkpoint, "--tensors", "--json", tmp_path / "m.json")
    assert code == 0
    manifest = Manifest.load(tmp_path / "m.json")
    assert [tensor.name for tensor in manifest.tensors] == ["a.weight", "b.weight"]
    assert manifest.digest in out
    assert "a.weight" in out


def test_json_on_standard_output_is_nothing_but_json(run, checkpoint):
    code, out, _ = run("inspect", checkpoint, "--json", "-")
    assert code == 0
    assert len(json.loads(out)["tensors"]) == 2
    code, out, _ = run("plan", checkpoint, "--ranks", 2, "--json", "-")
    assert code == 0
    assert json.loads(out)["receivers"] == 2
    code, out, _ = run("engines", "--json", "-")
    assert code == 0
    assert "reference" in [info["name"] for info in json.loads(out)]


def test_inspect_without_digest_reads_no_data(run, checkpoint):
    code, out, _ = run("inspect", checkpoint, "--no-digest")
    assert code == 0
    assert "content digest" not in out


def test_cluster_writes_two_files_and_says_which(run, tmp_path):
    code, out, _ = run("cluster", tmp_path / "keys", "--address", "tcp://10.0.0.1:7000")
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "keys").iterdir()) == ["agent.json", "controller.json"]
    assert "controller.json" in out.replace("\n", "")
    assert "agent.json" in out.replace("\n", "")
    code, _, err = run("cluster", tmp_path / "keys", "--address", "tcp://10.0.0.1:7000")
    assert code == 2
    assert "another directory" in " ".join(err.split())


def test_plan_explains_every_bucket(run, checkpoint):
    code, out, _ = run("plan", checkpoint, "--ranks", 3, "--agents", 2, "--explain")
    assert code == 0
    assert "buckets in order" in out
    assert "0,1,2" in out


def test_plan_explains_the_ways_to_move_it(run, checkpoint):
    code, out, _ = run("plan", checkpoint, "--ranks", 2, "--explain", "--lanes", "pcie=10", "--lanes", "nic=5")
    assert code == 0
    text = " ".join(out.replace("│", " ").split())
    for said in ("one-host pull", "routed collective", "P2P", "pcie=10", "bottleneck"):
        assert said in text
    code, out, _ = run("plan", checkpoint, "--ranks", 4, "--explain", "--hosts", 2)
    assert code == 0
    assert "NIC into a host" in out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["plan", "{model}", "--ranks", "1", "--explain", "--hosts", "2"], 2, "at least one rank on each host"),
        (["plan", "{model}", "--ranks", "1", "--explain", "--lanes", "warp=9"], 2, "pcie, peer, nic"),
        (["plan", "{model}", "--ranks", "1", "--explain", "--lanes", "{tmp}/none"], 2, "ckpt limits --json"),
        (["inspect", "{tmp}/none"], 3, "does not exist"),
        (["plan", "{tmp}/none", "--ranks", "1"], 3, "does not exist"),
        (["inspect", "{tmp}"], 3, "ManifestError"),
        (["plan", "{model}", "--ranks", "0"], 2, "--ranks"),
        (["plan", "{model}"], 2, "--ranks"),
        (["update", "{model}"], 2, "--endpoint"),
        (
            ["update", "{model}", "--endpoint", "reference=http://127.0.0.1:1", "--cluster", "{tmp}/none"],
            2,
            "ckpt cluster DIR",
        ),
        (["update", "{model}", "--endpoint", "reference=http://127.0.0.1:1", "--reading", "never"], 2, "--reading"),
        (["update", "{model}", "--endpoint", "reference=http://127.0.0.1:1", "--hosts", "0"], 2, "--hosts"),
        (["cluster", "{tmp}/keys", "--address", "here"], 2, "tcp://host:port"),
        (["cluster", "{tmp}/keys"], 2, "--address"),
        (["agent", "--cluster", "{tmp}/none", "--address", "127.0.0.1"], 2, "ckpt cluster DIR"),
        (["agent", "--address", "127.0.0.1"], 2, "--cluster"),
        (["update", "{model}", "--endpoint", "http://127.0.0.1:1"], 2, "--engine NAME"),
        (["update", "{model}", "--engine", "nosuch", "--endpoint", "http://127.0.0.1:1"], 5, "no plugin for engine"),
        (["update", "{model}", "--endpoint", "nosuch=http://127.0.0.1:1"], 5, "no plugin for engine 'nosuch'"),
        (["update", "{tmp}/none", "--engine", "reference", "--endpoint", "http://127.0.0.1:1"], 3, "does not exist"),
        (["update", "{model}", "--engine", "reference", "--endpoint", "http://127.0.0.1:1"], 7, "is the server up"),
        (
            ["update", "{model}", "--engine", "reference", "--endpoint", "http://h", "--endpoint", "http://h/"],
            2,
            "named twice",
        ),
        (
            ["update", "{model}", "--engine", "reference", "--endpoint", "http://h", "--pause-mode", "keep"],
            2,
            "--allow-stale-cache",
        ),
        (
            ["update", "{model}", "--engine", "reference", "--endpoint", "http://h", "--pause-mode", "x"],
            2,
            "pause-mode",
        ),
        (["update", "{model}", "--engine", "reference", "--endpoint", "http://h", "--timeout-s", "0"], 2, "timeout-s"),
        (["ready", "--engine", "reference", "--endpoint", "http://127.0.0.1:1"], 7, "is the server up"),
        (["ready", "--endpoint", "http://127.0.0.1:1"], 2, "--engine NAME"),
        (["nosuch"], 2, "nosuch"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_are_one_message_and_their_exit_code(run, checkpoint, tmp_path, arguments, code, says):
    got, out, err = run(*(text.format(tmp=tmp_path, model=checkpoint) for text in arguments))
    assert got == code
    assert says in " ".join(err.replace("│", " ").split())
    assert out == ""


def test_brackets_in_names_are_no_markup(run, tmp_path):
    """A message or a table shows what a user named, whatever it looks like."""
    code, _, err = run("inspect", tmp_path / "[bold]none[/red]")
    assert code == 3
    assert "[bold]none[/red]" in err
    save_file({"a[/b]": torch.ones(1), "[bold]c": torch.ones(1)}, tmp_path / "odd.safetensors")
    code, out, _ = run("inspect", tmp_path / "odd.safetensors", "--tensors")
    assert code == 0
    assert "a[/b]" in out
    assert "[bold]c" in out


def test_a_result_that_cannot_be_written_is_told_before_the_work(run, checkpoint, tmp_path):
    code, _, err = run("inspect", checkpoint, "--json", tmp_path / "none" / "m.json")
    assert code == 2
    assert "m.json" in err


def test_the_demo_says_what_it_lacks(run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ckpt_conformance.demo", None)
    code, _, err = run("demo")
    assert code == 2
    assert "pip install" in err
