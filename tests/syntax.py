"""Syntax trees of Python source, for the tests that read code."""

import ast
import gc
from functools import cache


@cache
def syntax_tree(source: str) -> ast.Module:
    """Parse source.

    The garbage collector waits meanwhile. Python 3.11 may run it inside the parser, and the end of an object may parse
    too: asyncio logs an error that nobody retrieved, and the traceback parses its lines. The parse then fails with
    `SystemError: AST constructor recursion depth mismatch` (cpython#106905).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        if was_enabled:
            gc.enable()
