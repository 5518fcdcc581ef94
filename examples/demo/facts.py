"""Measures one Python source file: what `make demo` runs as one durable job per file, each in a sandbox of its own."""

from __future__ import annotations

import ast
from pathlib import Path


def measure(path: str) -> dict[str, object]:
    """Return how many lines, functions and classes a file has, and which function is the longest."""
    source = Path(path).read_bytes()
    facts: dict[str, object] = {"path": path, "lines": source.count(b"\n")}
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:  # the library's tests hold files that are wrong on purpose
        return {**facts, "unparsable": str(error)}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    longest = max(functions, key=_length, default=None)
    return {
        **facts,
        "functions": len(functions),
        "classes": sum(isinstance(node, ast.ClassDef) for node in ast.walk(tree)),
        "documented": sum(ast.get_docstring(function) is not None for function in functions),
        "longest": longest.name if longest else None,
        "longest_lines": _length(longest) if longest else 0,
    }


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1
