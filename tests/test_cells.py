"""Addresses, patterns, and what the user hears when a part of one is wrong."""

import ast
import json
import subprocess
import sys
from fnmatch import fnmatchcase

import pytest
from conftest import PLAIN, ROOT, is_refusal, is_sentence
from hypothesis import given
from hypothesis import strategies as st

from backends import STRATEGIES
from harness import UserError, cells, run
from harness.cells import RESERVED, SIZES, cell, known_status, outline, size_of
from harness.environments import python

ALL = list(cells.cells())
RHS = "brusselator.rhs/jax/reverse"


# What there is


def test_the_cross_product_is_full_and_every_cell_once():
    addresses = [c.address for c in ALL]
    assert len(set(addresses)) == len(addresses)
    for problem in cells.problems():
        for task in cells.tasks(problem):
            for library in cells.backends():
                for strategy in cells.backend(library).strategies():
                    ways = {
                        (c.size, c.natural)
                        for c in ALL
                        if (c.name, c.backend, c.strategy) == (f"{problem}.{task}", library, strategy)
                    }
                    sizes = SIZES[:2] if strategy in ("complex_step", "difference") else SIZES
                    assert {size for size, natural in ways if natural} == set(sizes), (problem, task, library, strategy)


def test_a_status_known_without_running_has_its_sentence():
    for c in ALL:
        status, reason = known_status(c)
        assert status in ("", "missing", "unsupported", "unavailable")
        assert not reason if not status else is_sentence(reason)


def test_strategies_are_a_closed_vocabulary():
    for library in cells.backends():
        cls = cells.backend(library)
        public = {name for name, value in vars(cls).items() if callable(value) and not name.startswith("_")}
        helpers = {
            "put",
            "get",
            "wait",
            "primal",
            "environ",
            "device_memory",
            "versions",
            "where",
            "as_is",
            "keep_compiled",
        } | {f"{name}_{what}" for name in STRATEGIES for what in ("primal", "given")}
        assert public - helpers <= set(STRATEGIES), f"{library} has a strategy that STRATEGIES does not know"
        assert cls.strategies() == tuple(name for name in vars(cls) if name in public & set(STRATEGIES))
    for problem in cells.problems():
        for library in cells.backends():
            for forms in outline(problem, library).values():
                for form in forms.values():
                    assert {*form.strategies, *form.unsupported} <= set(cells.backend(library).strategies())
    for strategy in STRATEGIES.values():
        assert is_sentence(strategy.sentence) and strategy.reference


def test_the_natural_form_comes_first_and_goes_unnamed(tree):
    for problem in cells.problems():
        for library in cells.backends():
            for task, forms in outline(problem, library).items():
                ways = {c.form: c.way for c in ALL if (c.name, c.backend) == (f"{problem}.{task}", library)}
                first = next(iter(forms))
                assert {form: "." in way.partition("/")[0] for form, way in ways.items()} == {
                    f: f != first for f in forms
                }
    tree.write("backends/plain_backend.py", PLAIN)
    tree.write(
        "problems/brusselator/brusselator_plain.py",
        "IMPLEMENTATION = {'rhs': {'b': Implementation(f), 'a': Implementation(f)}}",
    )
    done = tree.adphys("list", "brusselator.rhs/plain/forward@tiny", "--json")
    assert [c["cell"] for c in json.loads(done.stdout)] == ["brusselator.rhs/plain/forward@tiny"]
    done = tree.adphys("list", "brusselator.rhs/plain*/forward@tiny", "--json")
    assert [c["cell"] for c in json.loads(done.stdout)] == [
        f"brusselator.rhs/plain{form}/forward@tiny" for form in ("", ".a")
    ]
    code = "from harness.cells import cell; print(cell('brusselator.rhs/plain/forward@tiny').form)"
    assert tree.python("-c", code).stdout.strip() == "b"


def test_what_is_read_from_the_syntax_tree_is_what_the_module_says():
    """A subprocess a library: the harness never imports them, and neither does pytest."""
    for library in cells.backends():
        files = [(p, cells.implementation_file(p, library)) for p in cells.problems()]
        problems = [p for p, file in files if file.is_file()]
        code = f"""
import importlib, json, sys
sys.path.insert(0, {str(ROOT)!r})
found = {{}}
for problem in {problems}:
    module = importlib.import_module(f"problems.{{problem}}.{{problem}}_{library}")
    found[problem] = {{t: {{f: [i.loss.__name__, sorted(i.strategies), dict(i.unsupported)] for f, i in forms.items()}}
                      for t, forms in module.IMPLEMENTATION.items()}}
print(json.dumps(found))
"""
        if not problems or known_status(next(c for c in ALL if c.backend == library and c.form))[0] == "unavailable":
            continue
        words = [python(cells.backend(library)), "-c", code]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        for problem in problems:
            read = outline(problem, library)
            assert {t: list(forms) for t, forms in read.items()} == {
                t: list(forms) for t, forms in said[problem].items()
            }
            assert set(read) <= set(cells.tasks(problem)), (
                f"{problem}_{library} writes a task that the statement does not have"
            )
            for task, forms in read.items():
                for name, form in forms.items():
                    loss, strategies, unsupported = said[problem][task][name]
                    assert (form.names[0], sorted(form.strategies), form.unsupported) == (loss, strategies, unsupported)


# Addresses


@given(st.sampled_from(ALL))
def test_every_address_names_its_cell_and_no_other(c):
    assert cell(c.address) == c
    assert list(cells.cells(c.address)) == [c]


numbers = st.floats(0.1, 50.0).map(repr) | st.integers(1, 50).map(str)


@given(
    N=st.integers(3, 400),
    keys=st.dictionaries(st.sampled_from(["alpha", "A", "B", "t"]), numbers),
    threads=st.integers(1, 64),
    dtype=st.sampled_from(cells.DTYPES),
    device=st.sampled_from(["cpu", "cuda"]),
    last=st.booleans(),
)
def test_a_users_size_round_trips_with_the_reserved_keys(N, keys, threads, dtype, device, last):
    own = ",".join(f"{k}={v}" for k, v in {"N": N, **keys}.items())
    reserved = f"threads={threads},dtype={dtype},device={device}"
    c = cell(f"{RHS}@{own},{reserved}" if last else f"{RHS}@{reserved},{own}")
    assert (c.size, c.threads, c.dtype, c.device) == (own, threads, dtype, device)
    assert cell(c.address) == c
    assert size_of(c)._asdict() == {"alpha": 10.0, "A": 3.4, "B": 1.0, "t": 2.0} | {
        k: float(v) for k, v in keys.items()
    } | {"N": N}
    for key, default in RESERVED.items():  # a default goes unnamed
        assert (f"{key}=" in c.address) == (str(getattr(c, key)) != default)


def test_a_named_size_takes_reserved_keys():
    c = cell(f"{RHS}@small,threads=2,dtype=float32")
    assert (c.size, c.threads, c.dtype) == ("small", 2, "float32") and size_of(c) == size_of(cell(f"{RHS}@small"))


# Patterns


def names(pattern):
    return [c.address for c in cells.cells(pattern)]


def test_missing_parts_match_all():
    everything = [c.address for c in ALL]
    assert names("*") == names("@*") == names("*@*") == everything
    assert names("@tiny") == [a for a in everything if a.endswith("@tiny")]
    assert names("brusselator") == [a for a in everything if a.startswith("brusselator.")]
    assert names("brusselator.rhs") == [a for a in everything if a.startswith("brusselator.rhs/")]
    torch = [a for a in everything if a.startswith(("brusselator.rhs/torch/", "brusselator.rhs/torch."))]
    assert names("brusselator.rhs/torch") == torch and any("torch.inplace" in a for a in torch)
    assert names(RHS) == [f"{RHS}@{size}" for size in SIZES]


@given(st.sampled_from(ALL), st.data())
def test_a_star_crosses_the_slash(c, data):
    text = c.address.partition("@")[0]
    i = data.draw(st.integers(0, len(text)))
    j = data.draw(st.integers(i, len(text)))
    pattern = f"{text[:i]}*{text[j:]}"
    found = list(cells.cells(f"{pattern}@{c.size}"))
    assert c in found and {f.size for f in found} == {c.size}
    assert all(any(fnmatchcase(f"{f.name}/{f.way}", pattern + end) for end in ("", "/*", ".*")) for f in found)
    assert names("*/reverse@tiny") == [a.address for a in ALL if a.size == "tiny" and a.strategy == "reverse"]


def test_text_with_an_equals_sign_is_a_size_and_no_glob():
    found = list(cells.cells("brusselator.rhs/jax@N=64,alpha=0.1"))
    assert found and {c.size for c in found} == {"N=64,alpha=0.1"} and {size_of(c).N for c in found} == {64}
    assert all(size_of(c).N == 5 for c in cells.cells("*@N=5"))  # a task without N is left out
    with pytest.raises(UserError):
        names("brusselator.rhs/jax@N=6*")
    assert names("brusselator.rhs/jax/reverse@[st]*") == [f"{RHS}@tiny", f"{RHS}@small"]


# User errors


WRONG = {  # address -> what the sentence must name
    "brusselater.rhs/jax/reverse@tiny": ["brusselater.rhs", "brusselator.rhs"],
    "brusselator.rsh/jax/reverse@tiny": ["brusselator.rsh", "brusselator.rhs"],
    "brusselator/jax/reverse@tiny": ["brusselator"],
    "brusselator.rhs/jaxx/reverse@tiny": ["jaxx", "jax"],
    "brusselator.rhs/jax/revers@tiny": ["revers", "reverse"],
    "brusselator.rhs/jax/adjoint@tiny": ["brusselator.rhs/jax/adjoint@tiny"],
    "brusselator.rhs/jax.cpp/reverse@tiny": ["jax.cpp"],
    f"{RHS}@M=8": ["'M'", "N, alpha, A, B, t"],
    f"{RHS}@self=8": ["'self'"],
    f"{RHS}@alpha=8": ["N", "N=32"],
    f"{RHS}@N=0": ["N=0", "3"],
    f"{RHS}@N=2": ["N=2", "3"],
    f"{RHS}@N=-5": ["N=-5", "3"],
    f"{RHS}@N=many": ["N=many", "number"],
    f"{RHS}@N=": ["N="],
    f"{RHS}@N=8.5": ["N=8.5", "whole"],
    f"{RHS}@N=nan": ["N=nan"],
    f"{RHS}@N=8,alpha=inf": ["alpha=inf"],
    f"{RHS}@N=8,": ["N=8,"],
    f"{RHS}@N=8,N=9": ["N=8,N=9"],
    f"{RHS}@small,N=9": ["small,N=9"],
    f"{RHS}@N=9,small": ["N=9,small"],
    f"{RHS}@8": ["'8'", "tiny"],
    f"{RHS}@huge": ["'huge'", "tiny, small, large"],
    f"{RHS}": [RHS, "@"],
    f"{RHS}@": [RHS],
    f"{RHS}@*": [RHS],
    "*@tiny": ["*@tiny"],
    "": ["''"],
    f"{RHS}@threads=2": ["threads=2"],
    f"{RHS}@tiny,threads=0": ["threads=0"],
    f"{RHS}@tiny,threads=two": ["threads=two"],
    f"{RHS}@tiny,dtype=float16": ["float16", "float64"],
    f"{RHS}@tiny,device=tpu": ["tpu", "cpu"],
    "brusselator.rhs/numpy/complex_step@large": ["complex_step", "small"],
    "brusselator.rhs/numba/difference@large": ["difference", "small"],
    "brusselator.imex/jax/reverse@N=8,T=1.25": ["T=1.25", "save=0.1", "whole"],
    "brusselator.imex/jax/reverse@N=8,dt=0.03": ["dt=0.03", "save=0.1", "whole"],
    "brusselator.imex/jax/reverse@N=8,dt=0": ["dt=0"],
    "brusselator.imex/jax/reverse@N=8,T=-1": ["T=-1"],
}


@pytest.mark.parametrize("address", WRONG, ids=lambda address: address or "nothing")
def test_a_wrong_address_is_one_sentence_that_names_the_part(address):
    with pytest.raises(UserError) as raised:
        cell(address)
    said = is_sentence(str(raised.value))
    for part in WRONG[address]:
        assert part in said


@given(st.text(max_size=30) | st.text("abjxNT=.,/*@[]0123456789-", max_size=30).map(lambda s: f"{RHS}@{s}"))
def test_any_text_is_a_cell_or_one_sentence(text):
    try:
        cell(text)
    except UserError as e:
        assert not str(e).endswith("..") and str(e).endswith(".") and "\n" not in str(e).replace(text, "")


def test_every_integer_key_of_every_task_has_a_least_value():
    """N = 0 and negative numbers never reach an array."""
    for problem in cells.problems():
        for name, task in cells.tasks(problem).items():
            full = task.sizes["small"]._asdict()
            for key, kind in task.size.__annotations__.items():
                for value in ("-1", "x", "nan"):
                    if kind is int or value != "-1":
                        text = ",".join(f"{k}={v}" for k, v in (full | {key: value}).items())
                        with pytest.raises(UserError, match=f"{key}={value}"):
                            size_of(cell(f"{problem}.{name}/numpy/difference@{text}"))


def test_a_pattern_at_a_number_of_threads():
    found = {c.address: c for c in cells.cells("*/jax@large,threads=2")}
    assert "brusselator.rhs/jax/reverse@large,threads=2" in found
    assert {(c.backend, c.size, c.threads) for c in found.values()} == {("jax", "large", 2)}
    assert [c.address for c in cells.cells(f"{RHS}@N=256,threads=2")] == [f"{RHS}@N=256,threads=2"]


def test_a_full_run_has_the_main_ways_on_all_cores(monkeypatch):
    monkeypatch.setattr(run, "everywhere", lambda: [0, 1, 2])
    planned = {c.way for c in run.plan(["brusselator.rhs"], "full", "cpu") if (c.size, c.threads) == ("large", 3)}
    assert planned == {"jax/reverse", "torch/reverse", "numba/adjoint"}
    assert all(c.threads == 1 for c in run.plan([], "default", "cpu"))
    monkeypatch.setattr(run, "everywhere", lambda: [0])
    assert all(c.threads == 1 for c in run.plan(["brusselator.rhs"], "full", "cpu"))


def test_a_pattern_that_matches_nothing_is_one_sentence():
    for pattern, part in {
        "brusselator.rhs/jax@huge": "huge",
        "nothing*": "nothing*",
        "*/nothing": "nothing",
        "*@Q=3": "Q",
    }.items():
        with pytest.raises(UserError) as raised:
            names(pattern)
        assert part in is_sentence(str(raised.value))


# Broken files


@pytest.mark.parametrize(
    "text, why",
    [
        ("def f(:\n", "broken"),
        ("IMPLEMENTATION = {}\nIMPLEMENTATION |= f()\nx = (", "broken"),
        ('"""No end."""\n', "IMPLEMENTATION"),
        ("IMPLEMENTATION = made()\n", "IMPLEMENTATION"),
        ("IMPLEMENTATION = {**more}\n", "IMPLEMENTATION"),
        ("\0", "broken"),
    ],
    ids=["syntax", "syntax-after", "absent", "call", "unpacked", "null-byte"],
)
def test_a_broken_implementation_concerns_only_what_touches_it(tree, text, why):
    broken = "problems/brusselator/brusselator_torch.py"
    tree.write(broken, text)
    for words in (["list"], ["gradient", "brusselator.rhs/torch/reverse@tiny"]):
        said = is_refusal(tree.adphys(*words))
        assert broken in said and why in said
    code = """
from harness.cells import cell, cells, task
task("brusselator.rhs"), cell("brusselator.rhs/jax/reverse@tiny"), list(cells("brusselator.rhs/numba@N=9"))
"""
    done = tree.python("-c", code)
    assert done.returncode == 0, done.stderr


def test_a_broken_statement_concerns_only_what_touches_it(tree):
    tree.write("problems/other.py", "raise ValueError('two\\nlines')")
    assert tree.adphys("list", "brusselator.rhs/jax").returncode == 0
    assert tree.python("-c", f"from harness.cells import cell; cell('{RHS}@tiny')").returncode == 0
    said = is_refusal(tree.adphys("list"))
    assert "problems/other.py" in said and "ValueError: two lines" in said


def test_a_broken_backend_file_is_one_sentence(tree):
    tree.write("backends/other_backend.py", "import no_such_library_at_all")
    assert "backends/other_backend.py" in is_refusal(tree.adphys("list"))
    assert tree.adphys("list", "brusselator.rhs/jax").returncode == 0


def test_a_missing_library_keeps_its_rows(tree):
    tree.write("backends/plain_backend.py", PLAIN.replace('("numpy",)', '("no_such_library",)'))
    tree.write(
        "problems/brusselator/brusselator_plain.py",
        "import no_such_library\nIMPLEMENTATION = {'rhs': {'array': Implementation(rhs)}}",
    )
    found = json.loads(tree.adphys("list", "brusselator.rhs/plain/forward", "--json").stdout)
    assert [f["status"] for f in found] == ["unavailable"] * 3
    assert "no_such_library" in is_sentence(found[0]["reason"])


# Imports run one way


def loaded(tree, code):
    """Top-level modules that are in memory after this code."""
    done = tree.python("-c", f"import sys\n{code}\nprint(' '.join({{m.partition('.')[0] for m in sys.modules}}))")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


LIBRARIES = {"jax", "jaxlib", "numba", "llvmlite", "torch"}


@pytest.mark.parametrize(
    "code",
    [
        "import harness.cli",
        "from harness.cells import *; [known_status(c) for c in cells()]",
        *(f"import backends.{name}_backend" for name in cells.backends()),
    ],
)
def test_reading_and_listing_import_no_library(module_tree, code):
    assert not loaded(module_tree, code) & LIBRARIES


@pytest.mark.parametrize("problem", cells.problems())
def test_a_statement_imports_numpy_and_scipy_alone(problem):
    allowed = {"numpy", "scipy", "problems"} | sys.stdlib_module_names
    for file in {cells.modules("problems")[problem], ROOT / "problems" / "__init__.py"}:
        for node in ast.walk(cells.parse(file)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                found = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert {name.partition(".")[0] for name in found} <= allowed, f"{file.name}:{node.lineno}"


def test_the_worker_needs_numpy_and_the_standard_library_only(module_tree):
    """So that it runs in the interpreter of any backend's environment."""
    before = loaded(module_tree, "import numpy")
    after = loaded(module_tree, "import numpy, harness.worker, harness.cell_protocol")
    assert after - before - sys.stdlib_module_names <= {"harness", "problems", "backends"}


def test_what_was_rewritten_is_counted_against_the_nearest_form(tree):
    tree.write("backends/plain_backend.py", PLAIN)
    code = '''
from problems import Implementation
from problems.brusselator import FORCING, T_FORCING
import numpy as jnp

def lap(u, N):
    """The periodic five-point Laplacian of the last two axes."""
    return (jnp.roll(u, 1, -2) + jnp.roll(u, -1, -2) + jnp.roll(u, 1, -1) + jnp.roll(u, -1, -1) - 4 * u) * (N - 1) ** 2

def reaction(u, A, B, force):
    # a comment costs nothing
    U, V = u
    U2V = U * U * V
    return jnp.stack([B + U2V - (A + 1) * U + force, A * U - U2V])

def rhs(theta, data, size):
    u, A, B, alpha = theta["u"], theta["A"], theta["B"], theta["alpha"]
    force = FORCING * data["disc"] if size.t >= T_FORCING else 0.0
    du = reaction(u, A, B, force) + alpha * lap(u, size.N)
    return jnp.vdot(data["v"], du)

IMPLEMENTATION = {"rhs": {"array": Implementation(rhs)}}
'''
    tree.write("problems/brusselator/brusselator_plain.py", code)
    script = """
from harness.cells import cell
from harness.source import changed
print([changed(cell(f"brusselator.rhs/{way}@tiny")) for way in ("numpy/difference", "plain/forward")])
"""
    done = tree.python("-c", script)
    assert done.stdout.strip() == "[0, 1]", done.stdout + done.stderr
