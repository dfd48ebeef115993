"""The source of a way: which functions of its file it consists of, and how many lines they are. Nothing is imported."""

import ast
import re
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path

from harness import UserError
from harness.cells import Cell, form_of, implementation_file, modules, parse, tasks

NAMESPACE = re.compile(r"\b(jnp|torch|anp|ca)\.")  # one import line, not a rewriting


def source(cell: Cell) -> str:
    """The functions that the way runs, in the order of the file, as text."""
    return "\n\n\n".join(text for text, _ in _way(cell))


def lines(cell: Cell) -> int:
    """Lines of code of the way: without blank lines, comments and docstrings."""
    return sum(len(code) for _, code in _way(cell))


def changed(cell: Cell) -> int:
    """Lines of code to write or change to get from the nearest form of the statement to the way; those dropped are free.

    A library's name for NumPy's namespace is not a change: that is one import.
    """
    path = modules("problems")[cell.problem]
    own = _normal(_way(cell))
    forms = tasks(cell.problem)[cell.task].forms.values()
    return min(_written(_normal(_functions(path, (form.__name__,))), own) for form in forms)


def said(cell: Cell) -> str:
    """What the author says of the function that the way runs; nothing where he says nothing, or the file is another by now."""
    try:
        form, tree = form_of(cell), parse(implementation_file(cell.problem, cell.backend))
    except (OSError, UserError):
        return ""
    docs = {n.name: ast.get_docstring(n) or "" for n in tree.body if isinstance(n, ast.FunctionDef)}
    names = form.strategies.get(cell.strategy, ()) + form.names
    return " ".join(next((docs[name] for name in names if docs.get(name)), "").split())


def _normal(functions: tuple[tuple[str, tuple[str, ...]], ...]) -> list[str]:
    return [NAMESPACE.sub("np.", row) for _, code in functions for row in code]


def _written(old: list[str], new: list[str]) -> int:
    """Lines of `new` that `old` does not have in the same order."""
    same = SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
    return len(new) - sum(block.size for block in same)


def _way(cell: Cell) -> tuple[tuple[str, tuple[str, ...]], ...]:
    by_numpy = cell.backend == "numpy"  # which runs the statement itself
    path = modules("problems")[cell.problem] if by_numpy else implementation_file(cell.problem, cell.backend)
    form = form_of(cell)
    return _functions(path, form.names + form.strategies.get(cell.strategy, ()))


@cache
def _functions(path: Path, names: tuple[str, ...]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(text, its lines of code) of the named module-level functions and classes and all that they use of the same file."""
    text = path.read_text().splitlines()
    tree = parse(path)
    defined = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    reached, todo = set(), [n for n in names if n in defined]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += [n.id for n in ast.walk(defined[name]) if isinstance(n, ast.Name) and n.id in defined]
    return tuple((_text(text, node), _lines_of_code(text, node)) for name, node in defined.items() if name in reached)


def _first(node: ast.FunctionDef | ast.ClassDef) -> int:
    return min([node.lineno, *(d.lineno for d in node.decorator_list)])


def _text(text: list[str], node: ast.FunctionDef | ast.ClassDef) -> str:
    return "\n".join(text[_first(node) - 1 : node.end_lineno])


def _lines_of_code(text: list[str], node: ast.FunctionDef | ast.ClassDef) -> tuple[str, ...]:
    skip = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(inner, clean=False) is not None:
            doc = inner.body[0]
            skip |= set(range(doc.lineno, (doc.end_lineno or doc.lineno) + 1))
    rows = range(_first(node), (node.end_lineno or node.lineno) + 1)
    return tuple(row for k in rows if k not in skip and (row := text[k - 1].strip()) and not row.startswith("#"))
