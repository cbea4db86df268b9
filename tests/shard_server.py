"""An HTTP server for tests that answers range requests, and misbehaves as a test says."""

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class ShardServer:
    """Serves the files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.knows_ranges, self.is_down = True, False
        self.answers_left: int | None = None
        """After so many parts of files, the server closes every connection without an answer; None: never."""
        self.parts: list[tuple[str, int, int]] = []
        """Name, start and stop of each range that was asked for."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.answer(self, with_content=True)

            def do_HEAD(self) -> None:
                server.answer(self, with_content=False)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler, with_content: bool) -> None:
        if self.is_down:
            request.close_connection = True
            return
        name = request.path.rpartition("/")[2]
        path = self.folder / name
        content = path.read_bytes() if path.is_file() else None
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers["Range"] or "")
        if wanted and with_content:
            if self.answers_left is not None:
                if self.answers_left <= 0:
                    request.close_connection = True
                    return
                self.answers_left -= 1
            self.parts.append((name, int(wanted[1]), int(wanted[2]) + 1))
        if content is None:
            request.send_error(404)
            return
        if wanted and self.knows_ranges:
            content = content[int(wanted[1]) : int(wanted[2]) + 1]
        request.send_response(206 if wanted and self.knows_ranges else 200)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if with_content:
            request.wfile.write(content)

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
