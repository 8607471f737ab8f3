"""`python -m ckpt_conformance.reference MODEL_DIR`: start an engine; one JSON line on stdout says where, once it is ready."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn

from ckpt_conformance.reference.config import ModelConfig, read_config
from ckpt_conformance.reference.engine import Engine
from ckpt_conformance.reference.options import DEFAULT_PLUGIN, RankPoolOptions, WorkerOptions
from ckpt_conformance.reference.ranks import RankPool
from ckpt_conformance.reference.scheduler import Scheduler
from ckpt_conformance.reference.server import Server
from ckpt_conformance.reference.text import TextCodec
from ckpt_core.contract import DeviceKind
from ckpt_core.errors import CkptError, ConfigError

_HTTP_STOP_TIMEOUT_S = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT. Exit code 0, or that of the error (see ckpt_core.errors)."""
    options = _parser().parse_args(argv)
    try:
        return _serve(options, read_config(options.model_dir, dtype=options.dtype))
    except CkptError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code


def _serve(options: argparse.Namespace, config: ModelConfig) -> int:
    config.check_tp(options.tp)
    if options.nodes < 1 or options.tp % options.nodes:
        raise ConfigError(f"--tp {options.tp} ranks cannot be on --nodes {options.nodes} evenly")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if options.exit_with_stdin:
        threading.Thread(target=_stop_at_end_of_stdin, args=(stop,), daemon=True).start()
    codec = TextCodec(Path(options.model_dir), config)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))
        # in this thread, which lives to the end: the kernel kills ranks when the thread that made them ends
        pool = RankPool(_pool_options(options))
        engine = Engine(
            pool,
            Scheduler(max_running=options.max_running, max_waiting=options.max_waiting),
            device_kind=DeviceKind(options.device.partition(":")[0]),
            version=options.version,
        )
        web = _Web(Server(engine, codec).app(options.bearer_token), listener)
        engine.ready.add_done_callback(lambda _: stop.set() if engine.ready.exception() else _announce(pool, web))
        engine.start()
        web.start()
        stop.wait()
        engine.stop()
        web.stop()
    if error := engine.ready.exception():
        raise error
    return 0


class _Web:
    """uvicorn in a thread of its own, so that signals are ours."""

    def __init__(self, app: Any, listener: socket.socket) -> None:
        host, port = listener.getsockname()[:2]
        self.url = f"http://{host}:{port}"
        config = uvicorn.Config(
            app, log_level="warning", lifespan="off", timeout_graceful_shutdown=_HTTP_STOP_TIMEOUT_S
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, name="http", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(2 * _HTTP_STOP_TIMEOUT_S)


def _announce(pool: RankPool, web: _Web) -> None:
    line = {"url": web.url, "pid": os.getpid(), "instance_id": pool.options.instance_id, "rank_pids": pool.pids}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _stop_at_end_of_stdin(stop: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    stop.set()


def _pool_options(options: argparse.Namespace) -> RankPoolOptions:
    worker = WorkerOptions(
        load_format=options.load_format,
        quantise=options.quantize == "int8",
        dtype=options.dtype,
        device=options.device,
        seed=options.seed,
        wait_for_weights=options.wait_for_weights,
        prefix_blocks=options.prefix_blocks,
    )
    return RankPoolOptions(
        model_dir=str(options.model_dir),
        tp_size=options.tp,
        instance_id=uuid.uuid4().hex,
        worker=worker,
        plugin=options.plugin,
        threads=options.threads,
        start_timeout_s=options.start_timeout_s,
        step_timeout_s=options.step_timeout_s,
        nodes=options.nodes,
        node_address=options.host if options.nodes > 1 else "127.0.0.1",
        node_port=options.nodes_port,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ckpt_conformance.reference", description=__doc__)
    add = parser.add_argument
    add("model_dir", type=Path, help="directory with config.json, and tokenizer.json for text")
    add("--tp", type=int, default=1, help="tensor parallel degree: one rank process each")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=0, help="0 takes a free one")
    add("--nodes", type=int, default=1, help="hosts that the ranks are on; see ckpt_conformance.reference.nodes")
    add("--nodes-port", type=int, default=0, help="where nodes of the other hosts connect to, at --host")
    add("--load-format", choices=("auto", "dummy"), default="auto", help="dummy: random weights, no file is read")
    add("--wait-for-weights", action="store_true", help="no token before the first committed update")
    add("--seed", type=int, default=0, help="of dummy weights")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    add("--device", default="cpu")
    add("--quantize", choices=("none", "int8"), default="none", help="int8: linears are quantised after loading")
    add("--version", default="", help="label of the weights it starts with")
    add("--bearer-token", default="", help="required of every request but /health")
    add("--max-running", type=int, default=16, help="requests in one step")
    add("--max-waiting", type=int, default=256, help="queued requests, also while paused")
    add("--prefix-blocks", type=int, default=512, help="bound of the prefix cache")
    add("--threads", type=int, default=1, help="torch threads of a rank")
    add("--start-timeout-s", type=float, default=300.0)
    add("--step-timeout-s", type=float, default=120.0)
    add("--plugin", default=DEFAULT_PLUGIN, help="module with the hooks that attach calls in the ranks")
    add("--exit-with-stdin", action="store_true", help="end when standard input ends (the parent went away)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
