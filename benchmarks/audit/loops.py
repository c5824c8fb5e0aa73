"""Which turns of a kernel's loop have to be run for all of them to be counted."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from triton.runtime.interpreter import ASTTransformer

from tilewright.benchmarks.audit.issue import Counts, Issued, difference


class LoopRewriter(ASTTransformer):  # type: ignore[misc]
    """Makes ``for i in range(…)`` ask `turns` which of its turns are to be run.

    Loops that may end early, or are unrolled (``tl.static_range``), stay as they are.
    """

    def visit_For(self, loop: ast.For) -> ast.For:
        """`loop`, and the loops inside it, with ``range(…)`` in ``interpreter_builder.turns(range(…), carried)``."""
        carried = sorted(_carried(loop.body))
        self.generic_visit(loop)
        if _is_range(loop.iter) and not any(isinstance(x, (ast.Break, ast.Return)) for x in ast.walk(loop)):
            turns_of = ast.Attribute(ast.Name("interpreter_builder", ast.Load()), "turns", ast.Load())
            names = ast.Tuple([ast.Constant(name) for name in carried], ast.Load())
            loop.iter = ast.Call(turns_of, [loop.iter, names], [])
        return loop


def turns(issued: Issued, steps: Sequence[int], carried: tuple[str, ...]) -> Iterator[int]:
    """The turns of a loop to run; what those left out would issue is counted in their stead.

    All are run where one depends on another through integers (`carried` names a variable that is not a block of
    floating-point numbers), or reads or writes integers in memory.

    Args:
        issued: what has been counted, which the turns that are run add to.
        steps: the loop's range.
        carried: the variables that one turn may leave for the next.
    """
    variables = sys._getframe(1).f_locals  # the kernel's, which asks for the first turn
    if not all(_is_float_block(variables[name]) for name in carried if name in variables):
        yield from steps
        return
    counts: dict[int, Counts] = {}
    stretches = [(0, len(steps) - 1)] if steps else []
    while stretches:
        first, last = stretches.pop()
        middle = (first + last) // 2
        for turn in (first, middle, last):
            if turn not in counts:
                before = issued.counts
                yield steps[turn]
                counts[turn] = difference(issued.counts, before)
        if last - first < 3:
            continue
        if counts[first] == counts[middle] == counts[last] and not counts[first][-1]:
            issued.add(counts[first], last - first - 2)
        else:
            stretches += [(first, middle), (middle, last)]


def _is_float_block(x: Any) -> bool:
    return hasattr(x, "dtype") and hasattr(x, "handle") and bool(x.dtype.is_floating())


def _is_range(iterator: ast.expr) -> bool:
    if not isinstance(iterator, ast.Call):
        return False
    called = iterator.func
    return (called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")) == "range"


def _carried(body: list[ast.stmt]) -> set[str]:
    """The variables that one turn may leave for the next: set in the body, and read there before they surely are."""
    stored = {
        x.id
        for statement in body
        for x in ast.walk(statement)
        if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)
    }
    return stored & _read_first(body, set())


def _read_first(body: list[ast.stmt], surely_set: set[str]) -> set[str]:
    """The variables that are read while they are not in `surely_set`, which grows along the body."""
    read: set[str] = set()
    for statement in body:
        if isinstance(statement, (ast.For, ast.While, ast.If)):
            heads: list[ast.AST] = [statement.iter if isinstance(statement, ast.For) else statement.test]
            inside = set(surely_set)
            if isinstance(statement, ast.For):
                inside |= _names(statement.target)
            read |= _read_first(statement.body, inside) | _read_first(statement.orelse, set(surely_set))
        else:
            heads = [statement]
        read |= {name for head in heads for name in _names(head, ast.Load)} - surely_set
        if isinstance(statement, ast.AugAssign):
            read |= _names(statement.target) - surely_set
        if isinstance(statement, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            surely_set |= _names(statement, ast.Store)
    return read


def _names(node: ast.AST, context: type[ast.expr_context] = ast.Store) -> set[str]:
    return {x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, context)}
