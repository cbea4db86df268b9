"""Reads the files of a request. No more than the limits allow is kept, and nothing is decoded."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from tailtune.trainers.serving.limits import Limits

MOST_FIELDS = 10
"""Most fields of a form that are no files. They are ignored."""


class _Body:
    """The body of a request, of which only so many bytes are passed on.

    Args:
        receive: gives the next part of the body.
        most: number of bytes.
    """

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self.most, self.left, self.ended = receive, most, most, False

    async def receive(self) -> Message:
        """The next part of the body, or of the connection.

        Raises:
            HTTPException: the body has too many bytes.
        """
        message = await self._receive()
        self.ended = not message.get("more_body", False)
        self.left -= len(message.get("body", b""))
        if self.left < 0:
            raise HTTPException(413, f"the request is larger than {self.most >> 20} MiB: send fewer or smaller images")
        return message

    async def discard(self, seconds: float) -> None:
        """Read the rest and drop it, for a limited time: a client that is still sending would not see the answer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.ended:
                    self.ended = not (await self._receive()).get("more_body", False)


@asynccontextmanager
async def uploads(request: Request, limits: Limits) -> AsyncIterator[list[UploadFile]]:
    """Within the block, the files of a form are open. Large ones lie in temporary files without a name.

    Args:
        request: has a body `multipart/form-data`. The names of its fields have no meaning.
        limits: what it may cost.

    Raises:
        HTTPException: it is refused.
    """
    body = _Body(request.receive, limits.body_bytes)
    try:
        form = await _form(Request(request.scope, body.receive), limits)
    except HTTPException:
        await body.discard(limits.seconds)
        raise
    try:
        yield _files(form)
    finally:
        await form.close()


async def discard(request: Request, limits: Limits) -> None:
    """Read the body of a request that is refused, and drop it.

    Args:
        request: the request.
        limits: say how long this may take.
    """
    await _Body(request.receive, limits.body_bytes).discard(limits.seconds)


async def _form(request: Request, limits: Limits) -> FormData:
    try:
        async with asyncio.timeout(limits.seconds):
            form = await request.form(max_files=limits.files, max_fields=MOST_FIELDS)
    except TimeoutError:
        raise HTTPException(408, f"the upload took longer than {limits.seconds:g} s") from None
    except ClientDisconnect:
        raise HTTPException(400, "the upload was not complete") from None
    if not _files(form):
        raise HTTPException(400, "no file in the request: send images as multipart/form-data")
    return form


def _files(form: FormData) -> list[UploadFile]:
    return [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
