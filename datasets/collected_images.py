"""`CollectedImages`: images that are put into one batch, one after another."""

from torch import Tensor


class CollectedImages:
    """Collects the images of a batch. Each is copied into the batch at once, while it is in the processor's cache."""

    def __init__(self, count: int) -> None:
        self.count, self.added = count, 0
        self.stack: Tensor | None = None
        self.images: list[Tensor] = []
        """Used as soon as the sizes differ."""

    def add(self, image: Tensor) -> None:
        """Add an image, uint8 [..., 3, H, W]."""
        if not self.added:
            self.stack = image.new_empty(self.count, *image.shape)
        if self.stack is not None and image.shape != self.stack.shape[1:]:
            self.images = [earlier.clone() for earlier in self.stack[: self.added]]
            self.stack = None
        if self.stack is not None:
            self.stack[self.added] = image
        else:
            self.images.append(image)
        self.added += 1

    def joined(self) -> Tensor | list[Tensor]:
        """One tensor if all images have the same size."""
        return self.images if self.stack is None else self.stack
