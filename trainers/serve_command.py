"""`serve …` on the command line. Wrong words, paths and addresses are refused before torch is imported."""

import argparse
import logging
import socket
from collections.abc import Callable, Sequence
from importlib import import_module
from ipaddress import ip_address

from tailtune.configs import Schema
from tailtune.configs.errors import UserError
from tailtune.configs.program import Parser, program
from tailtune.trainers.prediction.arguments import add_model_arguments, model_fields
from tailtune.trainers.prediction.request import ModelRequest
from tailtune.trainers.processes.console_log import console_restored, start_console
from tailtune.trainers.processes.slow_start import loading_shown
from tailtune.trainers.runs.run_folder import find_checkpoint
from tailtune.trainers.serving.limits import Limits, check_limits

PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "python_multipart": "python-multipart"}
"""Module → package of the extra `serve`."""
EPILOG = """
POST /predict takes images as multipart/form-data, GET /health says what is served, and / is a page to drop images on.
There is no authentication.

examples:
  {program} serve birds_run
  {program} serve birds_run --port 0 --threshold 0.8
  curl -F files=@owl.jpg -F files=@wren.jpg http://127.0.0.1:8000/predict

exit codes: 0 stopped by Ctrl-C or SIGTERM, 2 wrong input"""

log = logging.getLogger("tailtune")


def run_serve(argv: Sequence[str], load_schema: Callable[[], Schema]) -> int:
    """Serve the model of a finished run over HTTP until a signal comes.

    Args:
        argv: the words that follow `serve`.
        load_schema: gives the schema of all options.

    Returns:
        The exit code 0.

    Raises:
        UserError: wrong input, a package is missing, or the address cannot be used.
    """
    args = _parser().parse_args(list(argv))
    _check_packages()
    find_checkpoint(args.run, "serve:")
    request, limits = ModelRequest(**model_fields(args)), Limits(args.max_files, args.max_mib)
    check_limits(limits, args.port)
    if "num_workers" in request.options[::2]:
        raise UserError("num_workers: serve decodes images in its own process; leave it out")
    with _listener(args.host, args.port) as listener, console_restored():
        start_console(main=True)
        with loading_shown():
            from tailtune.trainers.serve import serve_run
        host, port = listener.getsockname()[:2]
        if not ip_address(host.partition("%")[0]).is_loopback:
            log.warning("warning: who can reach %s can use this server: it has no authentication", host)
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        serve_run(request, limits, listener, address, load_schema())
    return 0


def _check_packages() -> None:
    for module, package in PACKAGES.items():
        try:
            import_module(module)
        except ImportError:
            raise UserError(f'serve needs the package {package}: pip install "tailtune[serve]"') from None


def _listener(host: str, port: int) -> socket.socket:
    """A socket that listens, before the model is loaded: a port in use is found at once, and early clients wait."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        if isinstance(error, socket.gaierror):
            raise UserError(f"--host {host}: there is no such address ({error.strerror})") from None
        reason = str(error.strerror).partition(" (while")[0]
        raise UserError(
            f"cannot listen on port {port} of {host} ({reason}): choose another --port (0 is a free one) or --host"
        ) from None
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else a short answer may wait 40 ms
    return listener


def _parser() -> Parser:
    parser = Parser(
        prog=f"{program()} serve",
        description="Answer requests over HTTP with the model of a finished run.",
        epilog=EPILOG.format(program=program()),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser, "uniform, train, or a JSON file by class name")
    parser.add_argument("--host", metavar="HOST", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", metavar="PORT", type=int, default=8000, help="default: 8000; 0 is a free port")
    parser.add_argument("--max-files", metavar="N", type=int, default=Limits.files, help="most images in a request")
    parser.add_argument("--max-mib", metavar="N", type=int, default=Limits.mebibytes, help="most MiB of an image")
    return parser
