"""HTTPS to engines with certificates of both sides, and servers that answer with too much, too late, or from elsewhere."""
# ruff: noqa: S106 (tokens of these tests are no secrets)

import gzip
import logging
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import trustme

from ckpt_core import endpoint as module
from ckpt_core.config import Environment
from ckpt_core.endpoint import MAX_ANSWER_BYTES, Endpoint, EndpointOptions
from ckpt_core.errors import ConfigError, EngineError, EngineUnavailable


class Handler(BaseHTTPRequestHandler):
    """/huge and /endless never stop, /drip sends a byte now and then, /gzip packs, /away redirects; else what the token was."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.seen.append(dict(self.headers))
        getattr(self, self.path.strip("/").replace("/", "_"), self.plain)()

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def plain(self):
        self.answer(b"{}")

    def huge(self):
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        try:
            while not self.server.over.is_set():
                self.wfile.write(bytes(1 << 20))
                self.server.sent += 1 << 20
        except OSError:
            pass

    def drip(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        try:
            while not self.server.over.wait(0.02):
                self.wfile.write(b"x")
        except OSError:
            pass

    def gzip(self):
        self.answer(gzip.compress(bytes(1000)), Content_Encoding="gzip")

    def away(self):
        self.answer(b"", 307, Location=self.server.elsewhere)

    def log_message(self, *_arguments):
        """Quiet."""


class Server(ThreadingHTTPServer):
    """Refused handshakes are what these tests are about: no tracebacks of them."""

    daemon_threads = True

    def handle_error(self, *_arguments):
        """Quiet."""


@pytest.fixture
def start():
    made = []

    def start(context=None):
        server = Server(("127.0.0.1", 0), Handler)
        server.seen, server.sent, server.over, server.elsewhere = [], 0, threading.Event(), ""
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        made.append((server, thread))
        server.url = f"http{'s' if context else ''}://127.0.0.1:{server.server_port}"
        return server

    yield start
    for server, thread in made:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def connect():
    made = []

    def connect(url, **options):
        made.append(Endpoint(url=url, engine="toy", options=EndpointOptions(**options)))
        return made[-1]

    yield connect
    for endpoint in made:
        endpoint.close()


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority, tmp_path_factory):
    """PEM files: whom to trust, somebody else, and a client's certificate and key."""
    folder = tmp_path_factory.mktemp("pem")
    made = {name: str(folder / f"{name}.pem") for name in ("ca", "stranger", "cert", "key", "both")}
    authority.cert_pem.write_to_path(made["ca"])
    trustme.CA().cert_pem.write_to_path(made["stranger"])
    client = authority.issue_cert("controller@cluster.test")
    client.cert_chain_pems[0].write_to_path(made["cert"])
    client.private_key_pem.write_to_path(made["key"])
    client.private_key_and_cert_chain_pem.write_to_path(made["both"])
    return made


def server_context(authority, *, asks_client=False):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    if asks_client:
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


# -- whom this side trusts -----------------------------------------------------------------------------------------
def test_a_server_that_the_bundle_vouches_for_is_trusted(start, connect, authority, files):
    server = start(server_context(authority))
    assert connect(server.url, ca_file=files["ca"], bearer_token="t").request("GET", "/").json() == {}
    assert server.seen[-1]["Authorization"] == "Bearer t"


@pytest.mark.parametrize("ca", ["stranger", None])
def test_a_server_that_nobody_vouches_for_gets_no_token(start, connect, authority, files, ca):
    server = start(server_context(authority))
    options = {"ca_file": files[ca]} if ca else {}
    with pytest.raises(EngineUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        connect(server.url, bearer_token="t", **options).request("GET", "/")
    assert server.seen == []


def test_a_certificate_for_another_name_is_refused(start, connect, authority, files):
    server = start(server_context(authority))
    url = server.url.replace("127.0.0.1", "localhost")
    with pytest.raises(EngineUnavailable, match=r"(?i)hostname mismatch"):
        connect(url, ca_file=files["ca"]).request("GET", "/")


def test_checks_can_be_given_up(start, connect, authority, files):
    server = start(server_context(authority))
    assert connect(server.url, verify_tls=False).request("GET", "/").is_success
    server = start(server_context(authority, asks_client=True))
    assert connect(server.url, verify_tls=False, client_cert=files["both"]).request("GET", "/").is_success


# -- how this side proves itself -------------------------------------------------------------------------------------
def test_a_server_that_asks_for_a_certificate_gets_it(start, connect, authority, files):
    server = start(server_context(authority, asks_client=True))
    for given in ({"client_cert": files["cert"], "client_key": files["key"]}, {"client_cert": files["both"]}):
        assert connect(server.url, ca_file=files["ca"], **given).request("GET", "/").is_success
    with pytest.raises(EngineUnavailable):
        connect(server.url, ca_file=files["ca"]).request("GET", "/")


# -- options ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ca_file": "none.pem"}, r"ca_file \(CKPT_CA_FILE\) none.pem: expected a bundle"),
        ({"ca_file": "KEY"}, "expected a bundle of certificates in PEM"),
        ({"client_cert": "none.pem"}, r"client_cert \(CKPT_CLIENT_CERT\) none.pem"),
        ({"client_cert": "CERT"}, r"client_key \(CKPT_CLIENT_KEY\) in the same file"),
        ({"client_cert": "CERT", "client_key": "CERT"}, "its unencrypted key in PEM"),
    ],
)
def test_files_that_are_of_no_use_are_told_before_a_call(connect, files, options, says):
    given = {name: files.get(value.lower(), value) for name, value in options.items()}
    with pytest.raises(ConfigError, match=says):
        connect("https://127.0.0.1:9", **given).request("GET", "/")


def test_an_encrypted_key_is_refused_and_asked_for_nothing(connect, files, tmp_path, authority):
    from cryptography.hazmat.primitives import serialization as forms

    key = forms.load_pem_private_key(authority.issue_cert("a.test").private_key_pem.bytes(), None)
    locked = forms.BestAvailableEncryption(b"word")
    path = tmp_path / "locked.pem"
    path.write_bytes(key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.TraditionalOpenSSL, locked))
    with pytest.raises(ConfigError, match="its unencrypted key"):
        connect("https://127.0.0.1:9", client_cert=files["cert"], client_key=str(path)).request("GET", "/")


def test_options_that_exclude_each_other():
    with pytest.raises(ConfigError, match="of no use without client_cert"):
        EndpointOptions(client_key="key.pem")
    with pytest.raises(ConfigError, match="trusts everybody"):
        EndpointOptions(ca_file="ca.pem", verify_tls=False)


def test_the_environment_names_the_files(monkeypatch):
    for name in ("CA_FILE", "CLIENT_CERT", "CLIENT_KEY", "BEARER_TOKEN"):
        monkeypatch.setenv(f"CKPT_{name}", name)
    assert EndpointOptions.of(Environment.read(), pause_timeout_s=7.0) == EndpointOptions(
        ca_file="CA_FILE",
        client_cert="CLIENT_CERT",
        client_key="CLIENT_KEY",
        bearer_token="BEARER_TOKEN",
        pause_timeout_s=7.0,
    )


# -- where the token goes ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_redirect_takes_the_token_nowhere(start, connect, host):
    server, other = start(), start()
    server.elsewhere = other.url.replace("127.0.0.1", host)
    with pytest.raises(EngineError, match="GET /away answered 307"):
        connect(server.url, bearer_token="t").request("GET", "/away")
    assert (len(server.seen), other.seen) == (1, [])


@pytest.mark.parametrize(
    ("url", "token", "warned"),
    [
        ("http://10.0.0.1:1", "t", True),
        ("http://engine.test:1", "t", True),
        ("http://127.0.0.1.test:1", "t", True),
        ("http://10.0.0.1:1", "", False),
        ("https://10.0.0.1:1", "t", False),
        ("http://127.0.0.1:1", "t", False),
        ("http://localhost:1", "t", False),
        ("http://[::1]:1", "t", False),
    ],
)
def test_a_token_in_the_clear_is_warned_of_once(connect, caplog, url, token, warned):
    module._warn_of_plain_http.cache_clear()
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        for _ in range(3):
            connect(url, bearer_token=token)._http()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warned
    assert all(url in text and "plain http" in text and "Bearer t" not in text for text in said)


# -- servers that mean no good -------------------------------------------------------------------------------------------
def test_an_answer_without_end_is_cut(start, connect):
    server = start()
    with pytest.raises(EngineError, match=f"GET /huge answered with more than {MAX_ANSWER_BYTES} bytes"):
        connect(server.url).request("GET", "/huge")
    assert server.sent < MAX_ANSWER_BYTES * 2


def test_an_answer_may_be_as_large_as_that(start, connect):
    server = start()
    assert connect(server.url, max_answer_bytes=2).request("GET", "/").content == b"{}"
    with pytest.raises(EngineError, match="more than 1 bytes"):
        connect(server.url, max_answer_bytes=1).request("GET", "/")


def test_an_answer_that_drips_ends_with_the_deadline(start, connect):
    began = time.monotonic()
    with pytest.raises(EngineUnavailable, match=r"not complete after 0\.3 s"):
        connect(start().url).request("GET", "/drip", timeout_s=0.3)
    assert time.monotonic() - began < 5


def test_packed_answers_are_neither_asked_for_nor_unpacked(start, connect):
    server = start()
    with pytest.raises(EngineError, match="content-encoding 'gzip', which nobody asked for"):
        connect(server.url).request("GET", "/gzip")
    assert server.seen[-1]["Accept-Encoding"] == "identity"
