"""Commands that fetch shards: what they write, how they end, and how long anybody waits for them."""

import shutil
import socket
import threading
import time

import pytest

from dissect_clip.data.formats import download
from dissect_clip.data.formats.download import open_stream


def test_the_output_of_a_command_is_read_whole():
    with open_stream("pipe:seq 1 100000") as stream:
        assert stream.read().split() == [b"%d" % i for i in range(1, 100001)]


def test_a_command_that_fails_says_so_at_its_end():
    with open_stream("pipe:echo some; exit 3") as stream:
        assert stream.read(4) == b"some"
        with pytest.raises(OSError, match="ended with exit 3"):
            stream.read()


def test_a_command_that_stalls_is_ended_with_all_its_processes(tmp_path):
    command = f"pipe:echo some; (sleep 1.5; touch {tmp_path}/alive) | cat; true"
    with open_stream(command, timeout=0.3) as stream:
        assert stream.read(5) == b"some\n"
        with pytest.raises(TimeoutError, match=r"nothing came for 0\.3 seconds"):
            stream.read(1)
    time.sleep(1.7)
    assert not (tmp_path / "alive").exists()


def test_a_command_that_closes_its_output_and_goes_on_is_ended():
    with open_stream("pipe:exec >&-; sleep 600", timeout=0.3) as stream, pytest.raises(TimeoutError):
        stream.read()


@pytest.mark.parametrize("command", ["yes", "sleep 600", "trap '' PIPE; sleep 600"])
def test_closing_waits_for_nobody(command, monkeypatch):
    monkeypatch.setattr(download, "_GRACE", 0.3)
    begun = time.monotonic()
    stream = open_stream(f"pipe:{command}")
    stream.close()
    assert time.monotonic() - begun < 5


def test_an_unknown_scheme_is_an_error():
    with pytest.raises(OSError, match=r"no gopen handler defined; give a command .* pipe:"):
        open_stream("gopher://host/0.tar")


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads http with curl")
def test_a_server_that_stalls_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nsome")
                released.wait(60)

        released = threading.Event()
        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/0.tar"
        try:
            with open_stream(url, timeout=1.0) as stream, pytest.raises(TimeoutError):
                stream.read()
        finally:
            released.set()
            thread.join()
