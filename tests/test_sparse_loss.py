"""Sparse losses: the catalogue's numbers (P4a), the convergence of the elements, three NumPy forms and one adjoint."""

import numpy as np
import pytest

from harness import processes
from harness.cells import backend, cell, size_of
from harness.reference import inputs
from problems import BadSize, gold, sparse_loss, structure
from problems.sparse_loss import TASKS, factorise, geometry, lattice, mesh, slots, solution, stiffness

FEM = ("fem_matvec", "fem_solve")
SIZES = [dict(m=8), dict(m=5, q=3), dict(m=2), dict(m=3, q=8), dict(m=4, q=1)]


def adjoint(task, size):
    """Loss and gradient by hand; the primal must agree with the pass that also differentiates."""
    from problems.sparse_loss.sparse_loss_numba import IMPLEMENTATION

    way = IMPLEMENTATION[task]["loops"]
    theta, data = TASKS[task].inputs(size)
    work = way.prepare(structure(theta, data), size)
    loss, gradient = way.strategies["adjoint"](theta, data, size, work)
    gradient = gradient["theta"].copy()
    assert way.loss(theta, data, size, work) == loss
    return loss, gradient


def complex_step(task, size, direction):
    """The loss and its derivative along the direction, from the statement."""
    theta, data = TASKS[task].inputs(size)
    loss = TASKS[task].forms["array"]
    return loss(theta, data, size), np.imag(loss({"theta": theta["theta"] + 1e-20j * direction}, data, size)) / 1e-20


def printed(value, text):
    """Whether value rounds to what the catalogue prints: to one unit of its last digit."""
    mantissa, _, exponent = text.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(value - float(text)) <= unit


MATRIX = {8: (81, 128, 497, 289, "1587.367911643"), 32: (1089, 2048, 7361, 6481, "28390.92244307")}
GRADIENTS = [
    ("fem_matvec", 8, "24.03694521900", "60.12362527374", "50.0417180373", "4.60591871573"),
    ("fem_matvec", 32, "447.8514987911", "1152.768132735", "966.072222551", "108.957456817"),
    ("fem_solve", 8, "1.110943155468e-4", "3.215636130508e-4", "3.15659848451e-4", "-4.75368672195e-7"),
    ("fem_solve", 32, "1.363611644372e-4", "3.908003669498e-4", "3.83435331105e-4", "-1.90672170828e-6"),
]


@pytest.mark.parametrize("m", MATRIX)
def test_matrix_of_the_catalogue(m):
    x, tri, inner = mesh(m)
    K = stiffness(gold(16), x, tri, 4)
    nodes, triangles, nnz, nnz_inner, square = MATRIX[m]
    assert (len(x), len(tri), K.nnz, K[inner][:, inner].nnz) == (nodes, triangles, nnz, nnz_inner)
    assert printed(np.sum(K.data**2), square)
    assert printed(solution(gold(16), x, tri, inner, 4).max(), {8: ".06554453633844", 32: ".06688575805982"}[m])


@pytest.mark.parametrize(("task", "m", "loss", "norm", "first", "sixth"), GRADIENTS)
def test_gradients_of_the_catalogue(task, m, loss, norm, first, sixth):
    value, gradient = adjoint(task, TASKS[task].at(m=m))
    assert printed(value, loss)
    assert printed(np.linalg.norm(gradient), norm)
    assert printed(gradient[0], first)
    assert printed(gradient[5], sixth)


def test_second_order_convergence():
    """k = 1, f = 2 pi^2 sin sin, its load by the midpoints of the edges: the catalogue's nodal errors."""
    for m, error in (8, "1.47e-2"), (16, "3.94e-3"), (32, "8.6e-4"), (64, "2.8e-4"):
        x, tri, inner = mesh(m)
        _, area, mid = geometry(x, tri)
        f = 2 * np.pi**2 * np.prod(np.sin(np.pi * mid), -1)  # (triangles, 3)
        F = np.zeros(len(x))
        np.add.at(F, tri, area[:, None] / 6 * (f[:, [1, 2, 0]] + f[:, [2, 0, 1]]))
        K = stiffness(np.zeros(16), x, tri, 4)[inner][:, inner].tocsc()
        exact = np.prod(np.sin(np.pi * x[inner]), -1)
        assert printed(np.max(np.abs(factorise(K).solve(F[inner]) - exact)), error)


def test_mesh_and_matrix():
    x, tri, _ = mesh(7)
    _, area, _ = geometry(x, tri)
    assert area.min() > 0
    assert area.sum() == pytest.approx(1, abs=1e-14)
    K = stiffness(gold(9), x, tri, 3)
    assert np.abs(K @ np.ones(len(x))).max() < 1e-14
    assert np.abs((K - K.T).toarray()).max() < 1e-14


@pytest.mark.parametrize("task", FEM)
@pytest.mark.parametrize("keys", SIZES, ids=str)
def test_numpy_forms_agree(task, keys):
    size = TASKS[task].at(**keys)
    theta, data = TASKS[task].inputs(size)
    for shift in 0, 0.01j * gold(size.q**2, 3):
        losses = {name: form({"theta": theta["theta"] + shift}, data, size) for name, form in TASKS[task].forms.items()}
        for name in "inplace", "loops":
            assert abs(losses[name] - losses["array"]) <= 1e-13 * abs(losses["array"]), name


@pytest.mark.parametrize("task", FEM)
@pytest.mark.parametrize("keys", [*SIZES, dict(m=23, q=3), dict(m=12, q=9)], ids=str)
def test_adjoint_is_the_complex_step(task, keys):
    size = TASKS[task].at(**keys)
    loss, gradient = adjoint(task, size)
    parts = [complex_step(task, size, e) for e in np.eye(size.q**2)]
    reference = np.array([g for _, g in parts])
    assert abs(loss - parts[0][0]) <= 1e-12 * loss
    assert np.linalg.norm(gradient - reference) <= 1e-12 * np.linalg.norm(reference)


@pytest.mark.parametrize("task", FEM)
def test_adjoint_along_a_direction(task):
    size = TASKS[task].at(m=48, q=5)
    direction = gold(25, 11)
    _, along = complex_step(task, size, direction)
    assert adjoint(task, size)[1] @ direction == pytest.approx(along, rel=1e-11)


@pytest.mark.parametrize("task", TASKS)
def test_float32_stays_float32(task):
    size = TASKS[task].sizes["tiny"]
    theta, data = TASKS[task].inputs(size)
    loss = TASKS[task].forms["array"](theta, data, size)
    theta, data = ({k: a.astype("f4") if a.dtype.kind == "f" else a for k, a in d.items()} for d in (theta, data))
    for form in TASKS[task].forms.values():
        single = form(theta, data, size)
        assert single.dtype == np.float32
        assert single == pytest.approx(loss, rel=1e-4)


def test_banded_cholesky_is_the_sparse_lu():
    x, tri, inner = mesh(6)
    ends, edge = sparse_loss.edges(tri)
    band = sparse_loss.band(ends, inner, len(x))
    K = stiffness(gold(16), x, tri, 4)
    U = sparse_loss.cholesky(np.asarray(K[ends[:, 0], ends[:, 1]]), band)
    b = gold(2 * len(inner)).reshape(2, -1).T
    expected = factorise(K[inner][:, inner].tocsc()).solve(b)
    assert band.width == 6
    assert np.abs(sparse_loss.substitute(U, b) - expected).max() < 1e-14
    assert np.all(np.sort(np.stack([tri[:, [1, 2, 0]], tri[:, [2, 0, 1]]], -1), -1) == ends[edge])


# The lattice

HAMILTONIAN = [
    ("tight_binding", 4, "35.51501377575", "-2.780219787208", "42.73909183886"),
    ("tight_binding", 16, "555.4590844681", "142.2026643705", "159.5351241901"),
    ("kpm", 4, "2.725149144101", "-11.84726479189", None),
    ("kpm", 16, "2.657265428395", "-3.666705564716", None),
]


def adjoint_of_positions(task, size):
    from problems.sparse_loss.sparse_loss_numba import IMPLEMENTATION

    way = IMPLEMENTATION[task]["loops"]
    theta, data = TASKS[task].inputs(size)
    work = way.prepare(structure(theta, data), size)
    loss, gradient = way.strategies["adjoint"](theta, data, size, work)
    assert way.loss(theta, data, size, work) == pytest.approx(loss, rel=1e-15)
    return loss, gradient["positions"].copy()


@pytest.mark.parametrize(("task", "cells", "loss", "along", "norm"), HAMILTONIAN)
def test_hamiltonian_of_the_catalogue(task, cells, loss, along, norm):
    size = TASKS[task].at(nx=cells, ny=cells)
    value, gradient = adjoint_of_positions(task, size)
    assert printed(value, loss)
    assert printed(np.sum(gradient * gold(gradient.size, 17).reshape(-1, 2)), along)
    assert norm is None or printed(np.linalg.norm(gradient), norm)
    assert np.abs(gradient.sum(0)).max() < 1e-12 * np.linalg.norm(gradient)


@pytest.mark.parametrize("task", ["tight_binding", "kpm"])
@pytest.mark.parametrize("keys", [dict(nx=2, ny=2), dict(nx=3, ny=5)], ids=str)
def test_forms_and_adjoint_of_the_lattice(task, keys):
    size = TASKS[task].at(**keys)
    theta, data = TASKS[task].inputs(size)
    loss, gradient = adjoint_of_positions(task, size)
    direction = gold(gradient.size, 3).reshape(gradient.shape)
    for form in TASKS[task].forms.values():
        value = form({"positions": theta["positions"] + 1e-20j * direction}, data, size)
        assert np.real(value) == pytest.approx(loss, rel=1e-13)
        assert np.imag(value) / 1e-20 == pytest.approx(np.sum(gradient * direction), rel=1e-12)


@pytest.mark.parametrize("keys", [dict(nx=2, ny=2), dict(nx=2, ny=5), dict(nx=4, ny=3)], ids=str)
def test_bonds(keys):
    """Three a site, no two between the same sites, all of the ideal length before the sites are displaced."""
    size = TASKS["tight_binding"].at(**keys)
    x, bonds, image = lattice(size)
    n = len(x)
    assert n == 4 * size.nx * size.ny and bonds.shape == image.shape == (3 * n // 2, 2)
    assert np.all(np.bincount(bonds.ravel()) == 3)
    assert len({frozenset(b) for b in bonds.tolist()}) == len(bonds)
    ideal = x - 0.1 * sparse_loss.A * gold(2 * n).reshape(n, 2)
    d = ideal[bonds[:, 1]] - ideal[bonds[:, 0]] + image * sparse_loss.box(size)
    assert np.linalg.norm(d, axis=1) == pytest.approx(sparse_loss.A, rel=1e-12)
    near, number, sign, place = slots(bonds)
    here = np.arange(n)[:, None]
    assert np.all(bonds[number, np.where(sign > 0, 1, 0)] == here)
    assert np.all(bonds[number, np.where(sign > 0, 0, 1)] == near)
    assert np.all(number.ravel()[place] == np.arange(len(bonds)))


def test_no_inner_node_is_a_user_error():
    with pytest.raises(BadSize, match="m=1 is too small; the least m is 2"):
        TASKS["fem_solve"].at(m=1)


def test_a_callback_runs_while_inputs_are_still_on_their_way(tmp_path):
    """XLA then runs the program on its pool, where a callback that copies large arrays needs a second thread."""
    pytest.importorskip("jax")
    c = cell("sparse_loss.fem_solve/jax/reverse@large")
    job = {"size": size_of(c)._asdict(), "inputs": inputs(c, size_of(c)), "save": str(tmp_path / "out.npz")}
    spec = {"problem": c.problem, "task": c.task, "dtype": "float64", "device": "cpu"}
    spec |= {"backend": "jax", "form": c.form, "strategy": "reverse", "sizes": [job], "code": str(tmp_path)}
    said = processes.run("gradient", spec, backend("jax").environ(1), 1, 60.0)
    assert said["status"] == "ok", said["reason"]
