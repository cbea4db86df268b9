"""`data prepare`: only whole files with the published checksum get their names, whatever server and disk do."""

import hashlib
import io
import os
import re
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tailtune import main
from tailtune.datasets.commands import download as downloading
from tailtune.datasets.commands import prepare as preparing
from tailtune.datasets.commands.published_files import PUBLISHED_SETS, PublishedFile
from tailtune.datasets.sources.published_lists import PUBLISHED, blob_id

LIST = b"".join(b"train/n%08d/image_%d.JPEG %d\n" % (i % 7, i, i % 7) for i in range(2000))
Prepare = Callable[..., tuple[int, str, str]]


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def tar(*members: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    """A compressed archive."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return content.getvalue()


ARCHIVE = tar(("batches/one", b"1" * 5000), ("batches/two", b"2" * 300), ("batches/readme.html", b"not needed"))
MEMBERS = {"batches/one": md5(b"1" * 5000), "batches/two": md5(b"2" * 300)}


class Server:
    """Serves bytes by their names, as a test says."""

    def __init__(self) -> None:
        self.files = {"list.txt": LIST, "batches.tar.gz": ARCHIVE}
        self.cut_at: list[int] = []
        """The next answers end after so many bytes of their content, although more are announced."""
        self.ranges: list[str | None] = []
        """The header `Range` of each request."""
        self.knows_ranges, self.says_length = True, True
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        content = self.files.get(request.path.rpartition("/")[2])
        wanted = request.headers["Range"]
        self.ranges.append(wanted)
        if content is None:
            return request.send_error(404)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.knows_ranges else 0
        if start and start >= len(content):
            return request.send_error(416)
        request.send_response(206 if start else 200)
        if self.says_length:
            request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        end = start + self.cut_at.pop(0) if self.cut_at else len(content)
        request.wfile.write(content[start:end])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server with a list and an archive, which are the published files of `small`."""
    server = Server()
    files = (
        PublishedFile("list.txt", f"{server.url}/list.txt", "git blob", (blob_id(LIST),), ("other.txt",)),
        PublishedFile("batches.tar.gz", f"{server.url}/batches.tar.gz", "md5", (md5(ARCHIVE),), (), MEMBERS),
    )
    monkeypatch.setattr(preparing, "PUBLISHED_SETS", {"small": files})
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Prepare:
    """Runs `data prepare small --root root …` → exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str, name: str = "small") -> tuple[int, str, str]:
        capsys.readouterr()
        code = main.main(["data", "prepare", name, "--root", "root", *words])
        return code, *capsys.readouterr()

    return call


def files(folder: str = "root") -> dict[str, bytes]:
    """Everything below a folder, hidden files too."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


WHOLE = {
    "list.txt": LIST,
    "batches.tar.gz": ARCHIVE,
    "batches/one": b"1" * 5000,
    "batches/two": b"2" * 300,
}


def test_files_are_downloaded_checked_and_unpacked(server: Server, prepare: Prepare) -> None:
    code, text, error = prepare()
    assert (code, error) == (0, "") and files() == WHOLE
    assert "list.txt: downloaded" in text and "batches.tar.gz: downloaded, unpacked" in text
    assert "data verify small root root" in text
    requests = len(server.ranges)
    code, text, _ = prepare()
    assert code == 0 and text.count("was there already") == 2 and len(server.ranges) == requests


def test_unpacked_files_need_no_archive(server: Server, prepare: Prepare) -> None:
    prepare()
    Path("root/batches.tar.gz").unlink()
    assert prepare()[0] == 0 and not Path("root/batches.tar.gz").exists()
    Path("root/batches/two").write_text("damaged")
    code, _, error = prepare()
    assert code == 2 and "batches/two has other content than the published file: move it away" in error


def test_a_dropped_connection_is_continued(server: Server, prepare: Prepare) -> None:
    server.cut_at = [10_000, 5_000]
    code, _, error = prepare("--only", "list.txt")
    assert (code, error) == (0, "") and files() == {"list.txt": LIST}
    assert server.ranges == [None, "bytes=10000-", "bytes=15000-"]


def test_a_later_command_continues(server: Server, prepare: Prepare) -> None:
    server.cut_at = [10_000, 0, 0]
    code, _, error = prepare("--only", "list.txt")
    assert code == 2 and len(error.splitlines()) == 1
    assert f"the connection broke 3 times (10,000 of {len(LIST):,} bytes were received); the same command" in error
    assert files() == {".list.txt.part": LIST[:10_000]}
    server.ranges.clear()
    assert prepare("--only", "list.txt")[0] == 0 and files() == {"list.txt": LIST}
    assert server.ranges == ["bytes=10000-"]


@pytest.mark.parametrize("part", [b"of another file", LIST, LIST + b"more"])
def test_a_wrong_part_is_thrown_away(server: Server, prepare: Prepare, part: bytes) -> None:
    Path("root").mkdir()
    Path("root/.list.txt.part").write_bytes(part)
    assert prepare("--only", "list.txt")[0] == 0 and files() == {"list.txt": LIST}


def test_a_server_without_ranges_starts_again(server: Server, prepare: Prepare) -> None:
    server.knows_ranges, server.cut_at = False, [10_000]
    assert prepare("--only", "list.txt")[0] == 0 and files() == {"list.txt": LIST}


@pytest.mark.parametrize("name", ["list.txt", "batches.tar.gz"])
def test_a_flipped_byte_is_refused(server: Server, prepare: Prepare, name: str) -> None:
    content = bytearray(server.files[name])
    content[len(content) // 2] ^= 1
    server.files[name] = bytes(content)
    code, _, error = prepare("--only", name)
    assert code == 2 and len(error.splitlines()) == 1 and files() == {}
    assert re.search(f"{name}: the [0-9,]+ bytes that were received do not have the published (git blob|md5) ", error)


def test_a_truncated_file_is_refused(server: Server, prepare: Prepare) -> None:
    server.files["list.txt"] = LIST[:-100]
    assert prepare("--only", "list.txt")[0] == 2 and files() == {}
    server.files["list.txt"], server.says_length, server.cut_at = LIST, False, [1000]
    assert prepare("--only", "list.txt")[0] == 2 and files() == {}


def test_a_file_that_never_ends_is_refused(server: Server, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloading, "MAX_BYTES", 1 << 20)
    server.files["list.txt"] = b"x" * (3 << 20)
    code, _, error = prepare("--only", "list.txt")
    assert code == 2 and "more than 1 MiB; this is not the published file" in error and files() == {}


def test_no_network_and_no_file(server: Server, prepare: Prepare) -> None:
    server.files.clear()
    code, _, error = prepare()
    assert code == 2 and "list.txt (404 Not Found): try again, or give a folder with copies by --from" in error
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        code, _, error = prepare("--mirror", f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert code == 2 and "Connection refused" in error and len(error.splitlines()) == 1 and files() == {}
    code, _, error = prepare("--mirror", "file:///etc")
    assert code == 2 and "give an address that begins with http:// or https://" in error


def test_a_full_disk_leaves_nothing(server: Server, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    code, _, error = prepare("--only", "list.txt")
    assert code == 2 and "cannot write" in error and "No space left on device" in error and files() == {}
    Path("copies").mkdir()
    Path("copies/list.txt").write_bytes(LIST)
    code, _, error = prepare("--from", "copies", "--only", "list.txt")
    assert code == 2 and "No space left on device" in error and files() == {}


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "batches/../../out", "..\\out"])
def test_a_member_that_would_leave_the_folder(
    server: Server, prepare: Prepare, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    refused(server, prepare, monkeypatch, tar(("batches/one", b"1" * 5000), (name, b"x")), "would be written outside")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_a_member_that_is_a_link_or_a_device(
    server: Server, prepare: Prepare, monkeypatch: pytest.MonkeyPatch, kind: bytes
) -> None:
    member = tarfile.TarInfo("batches/two")
    member.type, member.linkname = kind, "/etc/passwd"
    refused(server, prepare, monkeypatch, tar(("batches/one", b"1" * 5000), member), "is a link or a device")


@pytest.mark.parametrize(
    ("archive", "says"),
    [
        (tar(("batches/one", b"1" * 5000)), "the file batches/two is not in this archive"),
        (tar(("batches/two", b"2"), ("batches/one", b"1" * 5000)), "its member batches/two has MD5"),
        (ARCHIVE[:-40], "is damaged"),
        (b"no archive", "is damaged"),
    ],
)
def test_an_archive_with_other_content(
    server: Server, prepare: Prepare, monkeypatch: pytest.MonkeyPatch, archive: bytes, says: str
) -> None:
    refused(server, prepare, monkeypatch, archive, says)


def refused(server: Server, prepare: Prepare, monkeypatch: pytest.MonkeyPatch, archive: bytes, says: str) -> None:
    """Publish an archive with its right checksum, and expect that nothing else than the archive is written."""
    entry = PublishedFile("batches.tar.gz", f"{server.url}/batches.tar.gz", "md5", (md5(archive),), (), MEMBERS)
    monkeypatch.setattr(preparing, "PUBLISHED_SETS", {"small": (entry,)})
    server.files["batches.tar.gz"] = archive
    code, _, error = prepare()
    assert code == 2 and says in error and len(error.splitlines()) == 1, error
    left = {name for name in files() if name != "batches/one"}
    assert left == {"batches.tar.gz"} and sorted(os.listdir()) == ["root"]
    assert "would" not in says or not Path("root/batches").exists()


def test_a_link_that_leads_out_of_the_root(server: Server, prepare: Prepare) -> None:
    Path("root").mkdir()
    Path("elsewhere").mkdir()
    Path("root/batches").symlink_to("../elsewhere")
    code, _, error = prepare("--only", "batches.tar.gz")
    assert code == 2 and "outside of --root" in error and not os.listdir("elsewhere")


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_a_part_that_is_no_file(server: Server, prepare: Prepare, kind: str) -> None:
    Path("root").mkdir()
    Path("mine.txt").write_text("mine")
    make = {"link": lambda part: part.symlink_to("../mine.txt"), "fifo": os.mkfifo, "folder": Path.mkdir}[kind]
    make(Path("root/.list.txt.part"))
    code, _, error = prepare("--only", "list.txt")
    assert code == 2 and "is a link or no regular file: remove it" in error and Path("mine.txt").read_text() == "mine"


def test_local_copies(server: Server, prepare: Prepare) -> None:
    Path("copies/deep").mkdir(parents=True)
    Path("copies/list.txt").write_text("another list")
    Path("copies/deep/other.txt").write_bytes(LIST)
    os.mkfifo("copies/deep/list.txt")
    Path("copies/loop").symlink_to(".")
    code, text, error = prepare("--from", "copies")
    assert code == 2 and "list.txt: copied from copies/deep/other.txt" in text
    assert "--from copies holds no copy of batches.tar.gz with the published checksum" in error
    assert files() == {"list.txt": LIST}
    Path("copies/batches.tar.gz").write_bytes(ARCHIVE)
    assert prepare("--from", "copies")[0] == 0 and files() == WHOLE and server.ranges == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "nothing*"], "--only nothing* fits no file of small; its files are list.txt, batches.tar.gz"),
        (["--from", "nowhere"], "--from nowhere is not a folder"),
        (["--from", ".", "--mirror", "http://x"], "not allowed with argument --from"),
    ],
)
def test_wrong_input(server: Server, prepare: Prepare, words: list[str], message: str) -> None:
    code, _, error = prepare(*words)
    assert code == 2 and message in error and not Path("root").exists()


def test_a_file_of_the_user_is_not_replaced(server: Server, prepare: Prepare) -> None:
    Path("root").mkdir()
    Path("root/list.txt").write_text("mine")
    code, _, error = prepare()
    assert code == 2 and "has other content than the published file: move it away" in error
    assert files() == {"list.txt": b"mine"}
    assert "unknown published data set 'smal'; did you mean 'small'?" in prepare(name="smal")[2]
    Path("file").touch()
    assert "cannot write" in prepare("--root", "file")[2]


# --- the table and the layouts ---------------------------------------------------------------------------------------


def test_the_table_has_the_lists_that_the_configs_name() -> None:
    names = {name: {file.name for file in files} for name, files in PUBLISHED_SETS.items()}
    for name, prefix in (("imagenet_lt", "ImageNet_LT"), ("places_lt", "Places_LT"), ("inat2018", "iNaturalist18")):
        assert {each for each in PUBLISHED if each.startswith(f"{prefix}_")} <= names[name] | {
            "ImageNet_LT_uniform.txt"
        }
        assert f"{prefix}_train.txt" in names[name]
    assert "categories.json" in names["inat2018"] and "descriptors_imagenet.json" in names["imagenet_lt"]
    for file in (file for files in PUBLISHED_SETS.values() for file in files):
        assert file.url.startswith("https://")
        assert all(len(each) == {"md5": 32, "git blob": 40}[file.kind] for each in file.checksums)
        assert "githubusercontent" not in file.url or re.search("/[0-9a-f]{40}/", file.url), "a commit is fixed"


@pytest.mark.parametrize(
    ("name", "folders", "says", "missing"),
    [
        ("imagenet_lt", ["train/n01440764", "val/n01440764"], "val/ has class folders", ""),
        ("imagenet_lt", ["train/n01440764", "val/ILSVRC2012_val_00000001.JPEG"], "val/ is one folder", ""),
        ("imagenet_lt", ["train/n01440764.tar"], "are still packed", "val/ of the images is missing"),
        ("places_lt", ["train/abbey", "val/abbey"], "train/ has class folders", ""),
        ("places_lt", ["data_256/a", "val_256"], "data_256/ has the small images", ""),
        ("places_lt", ["train/apartment_building/outdoor", "val"], "scenes in train/ are nested", ""),
        ("places_lt", [], "", "train/ or data_256/ or data_large/, val/ or val_256/ or val_large/ of the images"),
        ("inat2018", [], "", "train_val2018/ of the images is missing"),
    ],
)
def test_what_remains_to_be_done(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch, name: str, folders: list[str], says: str, missing: str
) -> None:
    entry = PublishedFile("list.txt", "https://unused", "git blob", (blob_id(LIST),))
    monkeypatch.setattr(preparing, "PUBLISHED_SETS", {name: (entry,)})
    for folder in ["copies", *(f"root/{folder}" for folder in folders)]:
        Path(folder).mkdir(parents=True)
    Path("copies/list.txt").write_bytes(LIST)
    code, text, _ = prepare("--from", "copies", name=name)
    assert code == 0 and says in text and missing in text
    assert ("by hand:" in text) == bool(missing) and ("root/\n" in text) == bool(missing)
