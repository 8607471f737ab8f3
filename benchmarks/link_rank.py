"""One host's end of a ring of TCP streams: what a link carries while it is used both ways. Started by several_hosts.py.

Arguments: own address, the next host's, bytes. Says "ready", waits for a line, prints seconds.
"""

from __future__ import annotations

import socket
import sys
import threading
import time

_PORT = 5000
_CHUNK_BYTES = 1 << 20


def main() -> None:
    """Send and receive at once."""
    mine, following, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with socket.create_server((mine, _PORT)) as listening, _connected(following) as out:
        before, _ = listening.accept()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        sys.stdin.readline()
        start = time.perf_counter()
        receiver = threading.Thread(target=_receive, args=(before, size))
        receiver.start()
        chunk = bytes(_CHUNK_BYTES)
        for _ in range(size // _CHUNK_BYTES):
            out.sendall(chunk)
        receiver.join()
        sys.stdout.write(f"{time.perf_counter() - start}\n")


def _receive(connection: socket.socket, size: int) -> None:
    buffer = bytearray(_CHUNK_BYTES)
    got = 0
    while got < size and (count := connection.recv_into(buffer)):
        got += count


def _connected(address: str) -> socket.socket:
    deadline = time.monotonic() + 20.0
    while True:
        try:
            return socket.create_connection((address, _PORT))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


if __name__ == "__main__":
    main()
