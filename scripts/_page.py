"""What the scripts that write a page of the documentation share."""

import argparse
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def write_page(file: Path, render: Callable[[], str], description: str | None) -> None:
    """The main function of such a script: parse the command line, which has no option but `--help`, and write the page.

    Args:
        file: the page, below `ROOT`.
        render: gives its text.
        description: of the script, for `--help`.
    """
    argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    file.write_text(render(), encoding="utf-8")
    print(f"wrote {file.relative_to(ROOT)}")
