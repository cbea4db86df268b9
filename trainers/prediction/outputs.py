"""`Outputs`: everything that `predict` writes. It gets its name when all of it is complete, or it is removed."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import BinaryIO

from torch import Tensor

from tailtune.configs.atomic_file import atomic_file, atomic_folder
from tailtune.configs.errors import UserError
from tailtune.trainers.prediction.class_folders import ClassFolders
from tailtune.trainers.prediction.embeddings import Embeddings
from tailtune.trainers.prediction.request import PredictRequest, check_threshold
from tailtune.trainers.prediction.tables import TABLES, UNSURE, AddRows, Row, Top


class Outputs:
    """The table, the copies and the embeddings.

    Args:
        request: what is written.
        add_rows: writes rows of the table.
        copies: writes copies of the images; None if they are not asked for.
    """

    def __init__(self, request: PredictRequest, add_rows: AddRows, copies: ClassFolders | None) -> None:
        self.request, self._add_rows, self._copies = request, add_rows, copies
        file = request.embeddings
        self.embeddings = None if file is None else Embeddings(file, len(request.paths))

    def add(self, index: Sequence[int], top: Sequence[Top]) -> None:
        """Write the predictions of images.

        Args:
            index: position of each image, [n].
            top: the most probable classes of each image with their probabilities, [n].
        """
        rows = []
        for position, classes in zip(index, top, strict=True):
            row = Row.of(self.request.paths[position], classes, self.request.threshold)
            rows.append(row)
            if self._copies is not None:
                self._copies.add(row.path, row.label)
        self._add_rows(rows)

    def add_features(self, features: Tensor) -> None:
        """Keep the features of the next images, fp32 [n, …]."""
        if self.embeddings is not None:
            self.embeddings.add(features)


@contextmanager
def open_outputs(
    request: PredictRequest, class_names: Sequence[str], stdout: BinaryIO, about: dict[str, object]
) -> Iterator[Outputs]:
    """Open what a request asks for. At the end of the block it is complete; after an exception nothing is left.

    Args:
        request: what is written.
        class_names: C names.
        stdout: receives the table if the request names no file.
        about: what the embeddings are of, for their metadata.

    Raises:
        UserError: the file system refuses to write.
        BrokenPipeError: nobody reads the table on standard output any more.
    """
    check_threshold(request.threshold, class_names)
    try:
        with ExitStack() as stack:
            file = stdout if request.out is None else stack.enter_context(atomic_file(request.out))
            copies = None
            if request.copy_into is not None:
                folder = stack.enter_context(atomic_folder(request.copy_into))
                copies = ClassFolders(folder, [*class_names, *([UNSURE] if request.threshold is not None else [])])
            with TABLES[request.kind](file, len(class_names)) as add_rows:
                outputs = Outputs(request, add_rows, copies)
                yield outputs
            if outputs.embeddings is not None:
                outputs.embeddings.write(about)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = error.filename or request.out or "standard output"
        raise UserError(f"cannot write {where}: {error.strerror}; free the space or choose another place") from error
