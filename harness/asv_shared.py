"""What the export to asv and the suite that asv runs have in common: when numbers are comparable, and what a skip is."""

import ast
import hashlib

SKIPPED = ("unsupported", "missing", "unavailable")  # nothing was tried; every other status but ok is a failure
# of a Task: no number depends on them
BESIDE_THE_POINT = ("gate", "gate32", "lower", "check", "axis", "sweep", "floor")


def version(protocol: int, statement: str, task: str) -> str:
    """Of a benchmark: protocol version and revision of the physics. asv compares numbers of one version only."""
    return f"{protocol}-{_revision(statement, task)}"


def _revision(statement: str, task: str) -> str:
    """Hash of all that the task uses of its statement's file, as code: comments, docstrings and layout do not count.

    So a task that joins a problem leaves the histories of the others whole.
    """
    tree = ast.parse(statement)
    defined = {name: node for node in tree.body for name in _defines(node)}
    entry = _entry(defined.pop("TASKS", None), task)
    # where TASKS is not the plain literal that problems/__init__.py asks for, the whole file counts
    reached: list[ast.AST] = [entry] if entry else list(tree.body)
    todo = list(reached)
    while todo:
        for name in (n.id for n in ast.walk(todo.pop()) if isinstance(n, ast.Name)):
            if (node := defined.get(name)) is not None and node not in reached:
                reached.append(node)
                todo.append(node)
    text = sorted(ast.unparse(_without_docstrings(node)) for node in reached)
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:10]


def _defines(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]


def _entry(tasks: ast.stmt | None, task: str) -> ast.expr | None:
    """The Task(...) of this name in TASKS = {name: Task(...)}, without what no number depends on."""
    literal = getattr(tasks, "value", None)
    if isinstance(literal, ast.Dict):
        for key, value in zip(literal.keys, literal.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == task and isinstance(value, ast.Call):
                value.keywords = [k for k in value.keywords if k.arg not in BESIDE_THE_POINT]
                return value
    return None


def _without_docstrings(node: ast.AST) -> ast.AST:
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(inner) is not None:
            inner.body = inner.body[1:] or [ast.Pass()]
    return node
