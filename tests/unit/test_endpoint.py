"""HTTP calls to engines: answers and refusals of a server in this process, mapped to typed errors."""
# ruff: noqa: S106 (tokens of these tests are no secrets)

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ckpt_core.endpoint import Endpoint, EndpointOptions
from ckpt_core.errors import CkptError, EngineError, EngineStateError, EngineUnavailable

STATUSES = {
    400: EngineError,
    401: EngineError,
    404: EngineUnavailable,
    409: EngineStateError,
    423: EngineStateError,
    500: EngineError,
    503: EngineUnavailable,
    302: EngineError,
}


class Handler(BaseHTTPRequestHandler):
    """GET /status/N answers N; POST answers what it got; /hang waits for the test; /cut closes in the middle."""

    def do_GET(self):
        self.server.seen.append((self.path, dict(self.headers)))
        if self.path == "/hang":
            self.server.released.wait(20)
            return
        if self.path == "/cut":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
            self.close_connection = True
            return
        self._answer(int(self.path.rpartition("/")[2].partition("?")[0]), b"because" * 200)

    def do_POST(self):
        self._answer(200, self.rfile.read(int(self.headers["Content-Length"])))

    def _answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments):
        """Quiet."""


class Lasting(Handler):
    """Keeps connections open."""

    protocol_version = "HTTP/1.1"

    def setup(self):
        self.server.seen.append(self.client_address)
        super().setup()


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.seen, made.released = [], threading.Event()
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.released.set()
        made.shutdown()
        thread.join()


@pytest.fixture
def connect(server):
    made = []

    def connect(url=f"http://127.0.0.1:{server.server_port}", **options):
        made.append(Endpoint(url=url, engine="toy", options=EndpointOptions(**options)))
        return made[-1]

    yield connect
    for endpoint in made:
        endpoint.close()


@pytest.mark.parametrize("status", [200, 202, 204])
def test_a_success_is_given_back(connect, status):
    assert connect().request("GET", f"/status/{status}").status_code == status


@pytest.mark.parametrize(("status", "kind"), STATUSES.items())
def test_any_other_status_is_an_error_that_says_all(connect, status, kind):
    with pytest.raises(EngineError) as caught:
        connect().request("GET", f"/status/{status}")
    assert type(caught.value) is kind
    assert f"toy at http://127.0.0.1:{connect().url.rpartition(':')[2]}: GET /status/{status} answered {status}" in str(
        caught.value
    )
    assert "because" in str(caught.value)
    assert len(str(caught.value)) < 700


def test_json_and_parameters_travel(connect, server):
    endpoint = connect()
    assert endpoint.request("POST", "/x", json={"a": [1, None]}).json() == {"a": [1, None]}
    endpoint.request("GET", "/status/200", params={"mode": "wait"})
    assert server.seen[-1][0] == "/status/200?mode=wait"


def test_the_token_is_sent_and_hidden(connect, server):
    connect(bearer_token="hush").request("GET", "/status/200")
    assert server.seen[-1][1]["Authorization"] == "Bearer hush"
    connect().request("GET", "/status/200")
    assert "Authorization" not in server.seen[-1][1]


def test_options_do_not_show_the_token(connect):
    assert "hush" not in repr(connect(bearer_token="hush"))


def test_proxies_of_the_environment_are_not_asked(connect, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert connect().request("GET", "/status/200").status_code == 200


def test_no_answer_in_time_is_unavailable(connect):
    with pytest.raises(EngineUnavailable, match=r"GET /hang got no answer \(ReadTimeout"):
        connect().request("GET", "/hang", timeout_s=0.1)
    with pytest.raises(EngineUnavailable, match="ReadTimeout"):
        connect(timeout_s=0.1).request("GET", "/hang")


def test_half_an_answer_is_unavailable(connect):
    with pytest.raises(EngineUnavailable, match="got no answer"):
        connect().request("GET", "/cut")


def test_nobody_listening_is_unavailable(server, connect):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    with pytest.raises(EngineUnavailable, match="is the server up"):
        connect(f"http://127.0.0.1:{port}").request("GET", "/status/200")


@pytest.mark.parametrize(
    "url", ["no-url", "ftp://127.0.0.1", "http://", "http://[::1", "http://127.0.0.1:99999999", "http://a b/"]
)
def test_an_address_that_is_none_is_a_typed_error(connect, url):
    with pytest.raises(CkptError):
        connect(url).request("GET", "/status/200")


@pytest.mark.parametrize(("idle_s", "connections"), [(0.0, 1), (2.0, 2)])
def test_a_connection_that_was_idle_is_not_used_again(server, connect, monkeypatch, idle_s, connections):
    server.RequestHandlerClass, endpoint = Lasting, connect()
    endpoint.request("POST", "/echo", json={})
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + idle_s)
    endpoint.request("POST", "/echo", json={})
    assert len(server.seen) == connections


def test_it_can_be_used_again_after_close(connect):
    endpoint = connect()
    for _ in range(2):
        assert endpoint.request("GET", "/status/200").status_code == 200
        endpoint.close()
        endpoint.close()
