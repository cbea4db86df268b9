"""Writes `infer.py`: a program beside an export that classifies images without TailTune."""

import ast
import sys
from pathlib import Path
from typing import Any

from tailtune.trainers.storage.atomic_io import write_bytes

SCRIPT = "infer.py"
TEMPLATE = '''"""Classifies images with the model in this folder. It needs {needs}; TailTune is not needed.

    python infer.py IMAGE [IMAGE ...]             the most probable classes of each image
    python infer.py --logits IMAGE [IMAGE ...]    one line of JSON for each image, with the logits of all classes

As a module it has `prepare(image)`, from an image of Pillow to the input of the network, and `predict(images)`, from
a batch of inputs to logits [images, classes].
"""

import argparse
import json
import os
import struct
import sys

before = os.getcwd()
os.chdir(os.path.dirname(os.path.abspath(__file__)))
with open("facts.json", encoding="utf-8") as file:
    FACTS = json.load(file)
{prepare}
{load}
os.chdir(before)


UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for a file that it cannot read."""


def logits_of(path):
    """Logits [classes] of an image file."""
    with Image.open(path) as image:
        if image.mode[0] in "IF":
            raise ValueError("grey pictures with more than 8 bits for each pixel have to be converted to 8 bits first")
        prepared = prepare(image)
    return numpy.asarray(predict(prepared[None]), dtype="float64")[0]


def probabilities(logits):
    """Probabilities [classes], with the temperature that was fitted on validation images, if there is one."""
    scaled = logits / (FACTS["temperature"] or 1.0)
    exponentials = numpy.exp(scaled - scaled.max())
    return exponentials / exponentials.sum()


def main():
    parser = argparse.ArgumentParser(description="Classify images.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image file")
    parser.add_argument("--logits", action="store_true", help="print the logits of all classes, as JSON")
    parser.add_argument("--top", type=int, default=5, help="number of classes that are printed")
    arguments = parser.parse_args()
    if arguments.top < 1:
        parser.error("argument --top: it must be at least 1")
    if sys.stdout.errors == "strict":  # a name may have letters that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    for path in arguments.images:
        try:
            logits = logits_of(path)
        except UNREADABLE as error:
            sys.exit(f"error: {{path}}: {{error}}")
        if arguments.logits:
            print(json.dumps({{"path": path, "logits": logits.tolist()}}))
            continue
        shares = probabilities(logits)
        best = (-shares).argsort(kind="stable")[: arguments.top]
        print(path, *(f"{{FACTS['class_names'][label]}} {{shares[label]:.4f}}" for label in best), sep="\\t")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # of `| head`; Python writes to standard output once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
'''


def write_script(folder: Path, facts: dict[str, Any]) -> None:
    """Write `infer.py` into the folder of an export.

    Args:
        folder: the folder.
        facts: the content of its facts.json, with the code `how_to_prepare` and `how_to_load`.
    """
    prepare, load = facts["how_to_prepare"], facts["how_to_load"]
    text = TEMPLATE.format(needs=_packages(f"{prepare}\n{load}"), prepare=prepare, load=load)
    write_bytes(folder / SCRIPT, text.encode())


def _packages(code: str) -> str:
    """The packages that code imports, in words."""
    names = set()
    for node in ast.parse(code).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
    tops = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    return ", ".join(sorted(tops - {"PIL"}, key=str.lower)) + " and Pillow"
