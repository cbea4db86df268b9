"""Parses lists of layers: `3`, `[1, 2]`, `range(3)`. The text is read, and never evaluated as code."""

import ast
from typing import Any

EXPECTED = "a number of last layers such as 3, a list such as [0,1,11], or a range such as range(0,12,2)"
MOST_CHARACTERS = 1000
MOST_LAYERS = 1000


def as_layers(value: Any) -> int | list[int]:
    """A number k for the last k layers, or the indices of layers; −1 is the last layer.

    Indices are written as in Python: lists, tuples, `range(…)`, `list(range(…))`, and sums of these.

    Raises:
        ValueError: anything else, or an index that is there twice.
    """
    try:
        read = _read(_parsed(value)) if isinstance(value, str) else value
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        read = None
    if type(read) is int and read >= 0:
        return read
    if (
        not isinstance(read, (list, tuple, range))
        or len(read) > MOST_LAYERS
        or any(type(each) is not int for each in read)
    ):
        raise ValueError(EXPECTED)
    if len(set(read)) < len(read):
        raise ValueError("a list in which each layer is once")
    return list(read)


def _parsed(text: str) -> ast.expr:
    if len(text) > MOST_CHARACTERS:
        raise ValueError
    return ast.parse(text.strip(), mode="eval").body


def _read(node: ast.expr) -> Any:
    """The value of one of the expressions that are allowed. Raises ValueError or TypeError for any other."""
    match node:
        case ast.Constant(value=int()):
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as number)):
            return -number
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_read(each) for each in elements]
        case ast.Call(func=ast.Name(id="range"), args=arguments, keywords=[]):
            return range(*map(_read, arguments))
        case ast.Call(func=ast.Name(id="list"), args=[argument], keywords=[]):
            return [*_short(_read(argument))]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return [*_short(_read(left)), *_short(_read(right))]
    raise ValueError


def _short(layers: Any) -> Any:
    """A list or range that is not too long to be read."""
    if len(layers) > MOST_LAYERS:
        raise ValueError
    return layers
