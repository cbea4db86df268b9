"""Small pictures of test images, for the page of a report."""

import base64
import io

from PIL import Image

from tailtune.configs.errors import UserError
from tailtune.trainers.report.subject import EvaluatedImages

SIDE = 96
"""Longest side of a thumbnail, in pixels. Smaller images keep their size."""


def thumbnail(images: EvaluatedImages, position: int) -> str | None:
    """An image as a small JPEG in a `data:` address.

    Args:
        images: the images.
        position: position of the image.

    Returns:
        The address; None if the image is not there or cannot be read.
    """
    if images.source is None or images.indices is None:
        return None
    try:
        image = images.source.load(int(images.indices[position]))
    except UserError:
        return None
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, format="JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
