"""The plugins of GPUs are thin: lines of code, without blanks, comments and docstrings."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parents[2]
SILENT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER,
}  # fmt: skip


def code_lines(source):
    """Line numbers that hold code."""
    held = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            held |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            held -= set(range(node.lineno, node.end_lineno + 1))
    return held


def test_docstrings_comments_and_blanks_do_not_count():
    assert code_lines('"""What."""\n\n# why\nx = [\n    1,\n]\n') == {4, 5, 6}


@pytest.mark.parametrize(
    ("package", "most"), [("cuda/tokenry_cuda", 600), ("rocm/tokenry_rocm", 250)]
)
def test_a_plugin_is_thin(package, most):
    files = sorted((PLUGINS / package).rglob("*.py"))
    lines = sum(len(code_lines(path.read_text())) for path in files)
    print(f"\n{package}: {lines} lines of code in {len(files)} files")
    assert 100 < lines < most
