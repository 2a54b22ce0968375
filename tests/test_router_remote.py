"""Experts behind an address: the same results as beside us, and every way a server can be bad."""

import contextlib
import http.server
import json
import threading

import numpy as np
import pytest

from umm_jax.errors import ConfigError, DataError
from umm_jax.router import wire
from umm_jax.router.classical import Edit, Segment
from umm_jax.router.conformance import failures, request, sample
from umm_jax.router.experts import ExpertError, Medium, Request, Result, Spec
from umm_jax.router.remote import Remote, server


@contextlib.contextmanager
def running(made):
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_port}"
    finally:
        made.shutdown()
        made.server_close()


def fake(reply):
    """A server that answers every request with what `reply(handler)` gives: (status, headers, bytes)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, data = reply(self)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(data)

        do_GET = do_POST = answer

        def log_message(self, *args):
            pass

    return http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)


SPEC = json.dumps({"name": "far", "version": "2", "tasks": ["image_edit", "image_gen"]}).encode()


def with_spec(run):
    return lambda handler: (200, {}, SPEC) if handler.command == "GET" else run(handler)


@pytest.mark.parametrize("expert", [Edit(), Segment()], ids=lambda e: e.spec.name)
def test_the_same_far_and_near(expert):
    with running(server(expert)) as url:
        remote = Remote(url)
        assert remote.spec.name == expert.spec.name and remote.spec.degraded
        assert failures(remote) == []
        (task,) = expert.spec.tasks
        near, far = (e.run(request(task)).media[0] for e in (expert, remote))
        np.testing.assert_array_equal(near.value, far.value)


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
def test_media_over_the_wire(kind):
    medium = sample(kind)
    back = wire.medium_from_json(json.loads(json.dumps(wire.medium_to_json(medium))))
    assert back.kind == kind and back.value.shape == medium.value.shape
    np.testing.assert_allclose(back.value, medium.value, atol=1 / 32767 if kind == "audio" else 0)


def test_masks_tracks_and_boxes_over_the_wire():
    rng = np.random.default_rng(0)
    for medium in (
        Medium("mask", rng.random((7, 9)) > 0.5),
        Medium("track", rng.random((3, 7, 9)) > 0.5),
        Medium("boxes", ((0.1, 0.2, 0.3, 0.4),)),
    ):
        back = wire.medium_from_json(wire.medium_to_json(medium))
        assert back.kind == medium.kind
        np.testing.assert_array_equal(back.value, medium.value)


def test_requests_over_the_wire():
    asked = Request(
        "layout_gen", "a table", (), ((0.1, 0.5),), (("a jug", ((0.1, 0.2, 0.3, 0.4),)),), None, None, 7
    )
    assert wire.request_from_json(json.loads(json.dumps(wire.request_to_json(asked)))) == asked


@pytest.mark.parametrize(
    "found, problem",
    [
        ([], "an object with a kind"),
        ({"kind": "image"}, "without b64"),
        ({"kind": "image", "uri": "http://169.254.169.254/"}, "not fetched"),
        ({"kind": "image", "b64": "###"}, "cannot be decoded"),
        ({"kind": "image", "b64": "AAAA"}, "cannot be decoded"),
        ({"kind": "audio", "b64": "AAAA"}, "cannot be decoded"),
        ({"kind": "boxes", "boxes": [[1, 2]]}, "four numbers"),
        ({"kind": "boxes", "boxes": [[0, 0, 5, 1]]}, "four shares"),
    ],
)
def test_what_is_no_medium(found, problem):
    with pytest.raises(DataError, match=problem):
        wire.medium_from_json(found)


def test_a_bomb_is_not_unpacked():
    import io

    import PIL.Image

    buffer = io.BytesIO()
    PIL.Image.new("1", (9000, 9000)).save(buffer, "PNG")
    import base64

    data = base64.b64encode(buffer.getvalue()).decode()
    assert len(data) < 100_000
    with pytest.raises(DataError, match="too many"):
        wire.medium_from_json({"kind": "image", "b64": data})


def test_nobody_there():
    with pytest.raises(ConfigError, match="1 tries|refused"):
        Remote("http://127.0.0.1:9", tries=1, seconds=2)
    with pytest.raises(ConfigError, match="http or https"):
        Remote("ftp://example.org")
    for odd in ("http://[::1", "http://localhost:84OO", "http://localhost:99999"):
        with pytest.raises(ConfigError, match="http or https"):
            Remote(odd)
    for said in (b"[]", b'{"version": "1", "tasks": ["image_gen"]}'):
        with running(fake(lambda handler, said=said: (200, {}, said))) as url:
            with pytest.raises(ConfigError, match="does not say its name"):
                Remote(url)
    with running(fake(lambda handler: (200, {}, b"<html>"))) as url:
        with pytest.raises(ConfigError, match="no JSON"):
            Remote(url)
    with running(fake(lambda handler: (200, {}, b'{"name": "x", "version": "1", "tasks": ["fly"]}'))) as url:
        with pytest.raises(ConfigError, match="no tasks fly"):
            Remote(url)


def test_a_redirect_is_not_followed():
    gone = []

    def reply(handler):
        gone.append(handler.path)
        return 302, {"Location": "/elsewhere"}, b""

    with running(fake(with_spec(reply))) as url:
        with pytest.raises(ExpertError, match="302"):
            Remote(url).run(request("image_gen"))
    assert gone == ["/v1/run"]


def test_a_server_that_fails_is_asked_again_with_the_same_key():
    keys = []

    def reply(handler):
        keys.append(handler.headers["Idempotency-Key"])
        if len(keys) < 3:
            return 503, {}, b""
        return 200, {}, json.dumps(wire.result_to_json(Result((sample("image"),)))).encode()

    with running(fake(with_spec(reply))) as url:
        remote = Remote(url, pause=0.01)
        assert remote.run(request("image_gen")).media[0].kind == "image"
    assert len(keys) == 3 and len(set(keys)) == 1 and len(keys[0]) == 64


@pytest.mark.parametrize(
    "status, data, problem",
    [
        (500, b'{"error": "boom"}', r"boom \(2 tries\)"),
        (422, b'{"error": "cannot do that"}', "^cannot do that$"),
        (404, b"gone", "answered 404"),
        (200, b"[]", "has outputs"),
        (200, b'{"outputs": [{"kind": "image", "uri": "file:///etc/passwd"}]}', "not fetched"),
        (200, b"\xff\xfe", "no JSON"),
    ],
)
def test_bad_answers(status, data, problem):
    with running(fake(with_spec(lambda handler: (status, {}, data)))) as url:
        with pytest.raises(ExpertError, match=problem):
            Remote(url, tries=2, pause=0.01).run(request("image_gen"))


def test_one_that_hangs_is_given_up():
    hold = threading.Event()

    def reply(handler):
        hold.wait(5)
        return 200, {}, b"{}"

    with running(fake(with_spec(reply))) as url:
        remote = Remote(url, seconds=0.3, tries=1)
        with pytest.raises(ExpertError, match="timed out"):
            remote.run(request("image_gen"))
        hold.set()


class Broken:
    spec = Spec("broken", "1", frozenset({"image_gen"}))

    def run(self, request):
        if request.prompt == "crash":
            raise KeyError("x")
        raise ExpertError("will not")

    def close(self):
        """Holds nothing."""


def test_the_server_goes_on():
    with running(server(Broken())) as url:
        remote = Remote(url, tries=1)
        with pytest.raises(ExpertError, match="^will not$"):
            remote.run(request("image_gen"))
        with pytest.raises(ExpertError, match="KeyError"):
            remote.run(Request("image_gen", "crash"))
        with pytest.raises(ExpertError, match="does no image_seg"):
            remote.run(request("image_seg"))
        with pytest.raises(ExpertError, match="^will not$"):
            remote.run(request("image_gen"))


def test_umm_serves_an_expert_and_asks_it(tmp_path, monkeypatch, capsys):
    """`umm experts --serve` in a process of its own, `umm route --expert` here."""
    import io
    import subprocess
    import sys

    from umm_jax import cli
    from umm_jax.conversation import Conversation, Image, ImageData, Text, Turn

    command = [sys.executable, "-m", "umm_jax.cli", "experts", "--serve=classical.edit", "--port=0"]
    serving = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = serving.stdout.readline()
        url = line.split(" at ")[1].split(";")[0]
        turns = (Turn("user", (Image("a"), Text("make it blue"))),)
        picture = ImageData.from_array(sample("image").value)
        (tmp_path / "chat.json").write_text(Conversation("c", turns, {"a": picture}).to_json())
        said = io.TextIOWrapper(io.BytesIO(b"<image_edit>make the circle blue</image_edit>"))
        monkeypatch.setattr("sys.stdin", said)
        words = [
            "route",
            "--json",
            f"--expert={url}",
            f"--conversation={tmp_path}/chat.json",
            f"--out={tmp_path}/o",
        ]
        assert cli.main(words) == 0
        (call,) = json.loads(capsys.readouterr().out)["calls"]
        assert call["status"] == "degraded" and call["expert"] == "classical.edit"
        assert (tmp_path / "o" / "step0-0.png").exists()
    finally:
        serving.terminate()
        serving.wait(10)
