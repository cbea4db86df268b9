"""`serve`: answers over HTTP that are those of `predict`, limits of uploads, and how the server starts and ends."""

import asyncio
import http.client
import json
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import ROOT, Cli, offline
from PIL import Image
from test_data_verify import picture
from test_startup import modules_after

import tailtune
from tailtune.configs.errors import UserError
from tailtune.datasets.sources.image_sources import FileSource
from tailtune.datasets.sources.named_source import BadImage
from tailtune.datasets.sources.uploaded_images import UploadedImages
from tailtune.trainers.serving.app import make_app
from tailtune.trainers.serving.limits import Limits

Json = dict[str, Any]
File = tuple[str, bytes]
BOUNDARY = "between-the-files"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and images."""
    folder = tmp_path_factory.mktemp("serve")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tailtune.train("fake_lt", "tiny_clip_peft", max_steps=1, num_workers=0, output_dir="run")
    (folder / "photos").mkdir()
    for number in range(3):
        picture(number).resize((48, 40 + number)).save(folder / "photos" / f"{number}.png")
    picture(3).convert("RGB").save(folder / "photos" / "3.jpg")
    (folder / "prior.json").write_text(json.dumps({f"class {label}": 1 + 999 * (label == 4) for label in range(10)}))
    return folder


class Server(NamedTuple):
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    started: list[str]
    """The lines that it has printed until it was ready."""
    port: int

    def request(self, method: str, path: str, body: bytes = b"", headers: Json | None = None) -> tuple[int, Json, Json]:
        """The status, the headers and the body of an answer."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            client.request(method, path, body, headers or {})
            answer = client.getresponse()
            text = answer.read()
            kind = answer.headers["Content-Type"]
            return answer.status, dict(answer.headers), json.loads(text) if "json" in kind else {"text": text.decode()}
        finally:
            client.close()

    def predict(self, *files: File) -> tuple[int, Json]:
        status, _, found = self.request("POST", "/predict", form(*files), multipart())
        return status, found

    def stop(self, number: signal.Signals) -> tuple[int, str]:
        """Send a signal: exit code and the rest of the output."""
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=30)
        return self.process.returncode, rest


@contextmanager
def serving(home: Path, *words: str) -> Iterator[Server]:
    command = [sys.executable, str(ROOT / "main.py"), "serve", "run", "--port", "0", *words]
    process = subprocess.Popen(
        command, cwd=home, env=offline(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if " is ready" in line:
                break
        assert lines and " is ready" in lines[-1], "".join(lines)
        yield Server(process, lines, int(lines[-1].split()[0].rpartition(":")[2]))
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Server]:
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    with serving(home, "--max-files", "3", "--max-mib", "1") as server:
        yield server
        code, rest = server.stop(signal.SIGTERM)
        assert (code, rest.splitlines()[-1]) == (0, "stopped") and "Traceback" not in rest
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before, "nothing is written"


def multipart() -> Json:
    return {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def form(*files: File) -> bytes:
    """The body of an upload."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename='
    parts = [f'{head}"{name}"\r\n\r\n'.encode() + data + b"\r\n" for name, data in files]
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def photos(home: Path, *names: str) -> list[File]:
    return [(name, (home / "photos" / name).read_bytes()) for name in names]


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# --- answers ---------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_predict(server: Server, home: Path, launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    names = ["2.png", "0.png", "3.jpg"]
    done = launch("predict run", *[f"photos/{name}" for name in names], "--format jsonl")
    assert done.returncode == 0, done.stderr
    expected = [json.loads(line) for line in done.stdout.splitlines()]
    status, found = server.predict(*photos(home, *names))
    assert status == 200 and [row["path"] for row in found["results"]] == names
    assert [row | {"path": ""} for row in found["results"]] == [row | {"path": ""} for row in expected]
    assert [len(row["top"]) for row in expected] == [5] * 3


def test_errors_are_of_single_files(server: Server, home: Path) -> None:
    ((name, good),) = photos(home, "1.png")
    _, alone = server.predict((name, good))
    for wrong, says in (
        (b"text", "in none of the formats that are read"),
        (b"", "an empty file"),
        (good[:200], ""),
        (bytes(1 << 20) + good, "larger than 1 MiB"),
        (bomb(10_000), "10000 × 10000, more than 89,478,485 pixels"),
        (bomb(30_000), "more than 89,478,485 pixels"),
    ):
        status, found = server.predict(("<b>wrong</b>.png", wrong), (name, good))
        bad, row = found["results"]
        assert status == 200 and bad["path"] == "<b>wrong</b>.png" and says in bad["error"] and bad["error"]
        assert "/" not in bad["error"], "no path of the server"
        assert row["path"] == name and row["label"] == alone["results"][0]["label"]


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("body", "headers", "status", "says"),
    [
        (form(*[("a.png", b"a")] * 4), multipart(), 400, "Too many files. Maximum number of files is 3."),
        (form(("a.png", bytes(8 << 20))), multipart(), 413, "the request is larger than 3 MiB"),
        (form(), multipart(), 400, "no file in the request"),
        (b"", {}, 400, "no file in the request"),
        (b"\x89PNG", {"Content-Type": "image/png"}, 400, "no file in the request"),
        (b"files=1", {"Content-Type": "application/x-www-form-urlencoded"}, 400, "no file in the request"),
        (b"nonsense", multipart(), 400, "Invalid multipart data"),
        (form(("a.png", b"a")), {"Content-Type": "multipart/form-data"}, 400, "Missing boundary"),
    ],
)
def test_a_request_that_is_refused(body: bytes, headers: Json, status: int, says: str, server: Server) -> None:
    found, _, answer = server.request("POST", "/predict", body, headers)
    assert found == status and answer["error"].startswith(says), answer


def test_a_turned_image(server: Server) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = picture(7).convert("RGB").resize((60, 40))
    turned = encoded(upright.rotate(90, expand=True), exif=exif)
    ((_, a), (_, b)) = (server.predict(("a", data)) for data in (encoded(upright), turned))
    assert a == b


def test_requests_at_the_same_time(server: Server, home: Path) -> None:
    """Each answer is the one that the same request gets alone."""
    requests = [photos(home, *names) for names in (["0.png"], ["1.png", "2.png"], ["3.jpg", "0.png", "1.png"])] * 4
    alone = [server.predict(*files) for files in requests[:3]]
    with ThreadPoolExecutor(len(requests)) as threads:
        assert [*threads.map(lambda files: server.predict(*files), requests)] == alone * 4


def test_too_many_requests_at_the_same_time(server: Server, home: Path) -> None:
    """Uploads that do not end take every place. The server answers others nevertheless, and forgets closed ones."""
    headers = {"Host": "a", **multipart(), "Content-Length": "999"}
    head = "".join(["POST /predict HTTP/1.1\r\n", *(f"{name}: {value}\r\n" for name, value in headers.items()), "\r\n"])
    files, end = photos(home, "0.png"), time.monotonic() + 20
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(Limits.places)]
    for connection in slow:
        connection.sendall(head.encode())
    while (answer := server.request("POST", "/predict", form(*files), multipart()))[0] != 503:
        assert time.monotonic() < end
    assert answer[1]["retry-after"] == "1" and answer[2]["error"].startswith("too many requests")
    assert server.request("GET", "/health")[0] == 200
    for connection in slow:
        connection.close()
    while server.predict(*files)[0] != 200:
        assert time.monotonic() < end


def test_health_and_the_first_lines(server: Server) -> None:
    status, _, found = server.request("GET", "/health")
    limits = {"max_files": 3, "max_bytes": 1 << 20}
    assert status == 200
    assert found == {"status": "ok", "run": "run", "backbone": "TinyCLIP", "classes": 10, "limits": limits}
    assert server.started[-2].startswith("run: TinyCLIP on cpu, 10 classes (class 0, class 1")
    assert f"http://127.0.0.1:{server.port} is ready" in server.started[-1]
    for method, path, expected in (("GET", "/nothing", 404), ("GET", "/predict", 405), ("GET", "/docs", 404)):
        status, _, found = server.request(method, path)
        assert status == expected and found["error"]


def test_the_page_loads_nothing_from_elsewhere(server: Server) -> None:
    status, headers, found = server.request("GET", "/")
    assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in headers["content-security-policy"]
    for word in ("://", "innerHTML", "insertAdjacentHTML", "document.write"):
        assert word not in found["text"]


def test_a_threshold_a_prior_and_the_end_by_ctrl_c(home: Path) -> None:
    words = ["--threshold", "1", "--target-prior", "prior.json", "--tte", "--option", "tte_mode", "tencrop"]
    with serving(home, *words) as server:
        _, found = server.predict(*photos(home, "0.png", "1.png"))
        assert [row["label"] for row in found["results"]] == ["unsure"] * 2
        assert [row["top"][0]["label"] for row in found["results"]] == ["class 4"] * 2, "nearly all images are of it"
        code, rest = server.stop(signal.SIGINT)
    assert code == 0
    assert rest.splitlines() == [rest.splitlines()[0], "stopped"] and "POST /predict: images 2, unreadable 0" in rest


# --- the parts -------------------------------------------------------------------------------------------------------


def test_uploads_have_the_pixels_of_files(home: Path) -> None:
    names = ["0.png", "3.jpg"]
    files = FileSource(home / "photos", names, [0, 0])
    uploaded = UploadedImages([BytesIO(data) for _, data in photos(home, *names)] + [BytesIO(b"text")])
    for index in range(2):
        assert uploaded.load(index) == files.load(index)
        assert uploaded.pixels(index, uploaded.open(index)).equal(files.pixels(index, files.open(index)))
    assert len(uploaded) == 3 and len({uploaded.stamp(index) for index in (0, 0, 1)}) == 2
    for read in (uploaded.load, lambda index: uploaded.pixels(index, uploaded.open(index))):
        with pytest.raises(BadImage, match="^in none of the formats"):
            read(2)


def asked(label: Any, messages: Sequence[Json], limits: Limits = Limits()) -> tuple[int, Json]:  # noqa: B008
    """The answer to messages of a connection, which then stays silent."""
    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "http_version": "1.1"}
    scope["headers"] = [(name.lower().encode(), value.encode()) for name, value in multipart().items()]
    coming, sent = [*messages], []

    async def receive() -> Json:
        if not coming:
            await asyncio.sleep(60)
        return coming.pop(0)

    async def send(message: Json) -> None:
        sent.append(message)

    with suppress(ZeroDivisionError):  # uvicorn catches it
        asyncio.run(make_app(label, {}, limits)(scope, receive, send))
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent))


def test_uploads_that_stop_and_a_model_that_fails() -> None:
    def fails(*_: object) -> Any:
        raise UserError("the logits are not finite")

    body = form(("a.png", b"a"))
    part = {"type": "http.request", "body": body[:60], "more_body": True}
    rest = {"type": "http.request", "body": body[60:], "more_body": False}
    assert asked(fails, [part], Limits(seconds=0.05)) == (408, {"error": "the upload took longer than 0.05 s"})
    assert asked(fails, [part, {"type": "http.disconnect"}]) == (400, {"error": "the upload was not complete"})
    assert asked(fails, [part, rest]) == (500, {"error": "the logits are not finite"})
    status, answer = asked(lambda *_: 1 / 0, [part, rest])
    assert status == 500 and answer["error"].startswith("an error of the server")
    odd = {"path": "a.png", "label": "\udce9"}  # the folder of a class had a name that was no UTF-8
    assert asked(lambda *_: [odd], [part, rest]) == (200, {"results": [odd]})


# --- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "the following arguments are required: RUN"),
        ("nowhere", "serve: nowhere holds no checkpoint"),
        ("run --threshold 2", "--threshold must be a probability from 0 to 1, not 2"),
        ("run --port 65536", "--port must be from 0 (a free port) to 65535, not 65536"),
        ("run --port http", "argument --port: invalid int value: 'http'"),
        ("run --host no.such.host.invalid", "--host no.such.host.invalid: there is no such address"),
        ("run --host 192.0.2.1", "cannot listen on port 8000 of 192.0.2.1 (Cannot assign requested address)"),
        ("run --max-files 0", "--max-files must be at least 1, not 0"),
        ("run --max-mib -1", "--max-mib must be at least 1, not -1"),
        ("run --port 0 --option num_workers 2", "num_workers: serve decodes images in its own process"),
        ("run --port 0 --target-prior estimate", "target_prior estimate reads all images"),
        ("run --port 0 --target-prior known", "target_prior known reads labels"),
        ("run --port 0 --option report none", "serve: report changes nothing in the labels of images"),
        ("run --port 0 --option lr 0.1", "lr belongs to the training"),
    ],
)
def test_wrong_input_is_one_line(
    words: str, says: str, home: Path, launch: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    done = launch("serve", words)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert says in done.stderr, done.stderr


def test_what_is_missing_or_in_use_is_found_before_torch(
    home: Path, launch: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        done = launch("serve run --port", port)
        codes, modules = modules_after(home, f"serve run --port {port}", "serve nowhere", "serve run --threshold 2")
    choose = "choose another --port (0 is a free one) or --host"
    assert done.stderr == f"error: cannot listen on port {port} of 127.0.0.1 (Address already in use): {choose}\n"
    assert codes == [2] * 3 and not modules & {"torch", "torchvision", "timm", "open_clip", "accelerate", "sklearn"}
    for module, package in (("fastapi", "fastapi"), ("python_multipart", "python-multipart")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            done = launch("serve run")
        remedy = 'pip install "tailtune[serve]"'
        assert (done.returncode, done.stderr) == (2, f"error: serve needs the package {package}: {remedy}\n")
