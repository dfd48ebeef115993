"""The Brusselator against the catalogue's reference values, against itself in other forms, and against SciPy."""

import importlib
from itertools import count
from math import ceil, comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from problems import BadSize, Diverged, brusselator, gold, structure
from problems.brusselator import Imex, Implicit, Ode, Rhs, Ude, brusselator_numba

H = 1e-20


def digits(text):
    """A printed value, and half a unit of its last digit (one whole unit: the catalogue warns of the last digit)."""
    mantissa, _, exponent = text.partition("e")
    return float(text), 1.01 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def agrees(value, text):
    expected, unit = digits(text)
    assert abs(value - expected) <= unit, f"{value!r} is not {text}"


def adjoint(task, size):
    statement, implementation = brusselator.TASKS[task], brusselator_numba.IMPLEMENTATION[task]["loops"]
    theta, data = statement.inputs(size)
    work = implementation.prepare(structure(theta, data), size)
    loss, gradient = implementation.strategies["adjoint"](theta, data, size, work)
    assert implementation.loss(theta, data, size, work) == pytest.approx(loss, rel=1e-12)
    return loss, gradient


def along(task, size, block, direction, form="array"):
    """The derivative of a form of the statement by complex step."""
    theta, data = brusselator.TASKS[task].inputs(size)
    z = theta | {block: theta[block] + 1j * H * direction}
    return np.imag(brusselator.TASKS[task].forms[form](z, data, size)) / H


@pytest.mark.parametrize(("N", "cells"), [(8, 1), (16, 7), (32, 30), (64, 127), (11, 4), (21, 12), (101, 312)])
def test_disc(N, cells):
    assert brusselator.disc(N).sum() == cells


def test_rhs_reference():
    """Of f itself by its derivative in the cotangent: v enters the loss linearly."""
    size = Rhs(8)
    theta, data = brusselator.rhs_inputs(size)

    def f(species, i, j):
        v = np.zeros((2, 8, 8))
        v[species, i, j] = 1
        return brusselator.rhs(theta, data | {"v": v}, size)

    agrees(f(0, 1, 2), "-222.51745544")
    agrees(f(1, 1, 2), "88.1085917547")
    whole = np.array([[[f(s, i, j) for j in range(8)] for i in range(8)] for s in range(2)])
    agrees(np.linalg.norm(whole), "3844.330597458")
    agrees(whole[0].sum(), "7.30682253031")
    agrees(whole[1].sum(), "-28.5018806145")
    _, gradient = adjoint("rhs", size)
    agrees(np.linalg.norm(gradient["u"]), "6287.230283321")
    agrees(gradient["u"][0, 1, 2], "-489.721900728")
    agrees(abs(gradient["A"]), "0.239156923254")  # the catalogue prints sizes here
    agrees(abs(gradient["B"]), "0.510696599781")
    agrees(abs(gradient["alpha"]), "23.1818170886")


@pytest.mark.parametrize(
    ("alpha", "loss", "A", "B", "dalpha", "along_gold", "mean"),
    [
        (10, "25544.57500365", "22842.8499903", "-8581.75788228", "3.9658685569", "-5.76789140286", "0.4367675427051"),
        (0.1, "21205.76846545", "19066.1326183", "-7405.1538107", "23762.8873575", "-14.6128223302", "0.4630494663702"),
    ],
)
def test_imex_reference(alpha, loss, A, B, dalpha, along_gold, mean):
    size = Imex(32, alpha=float(alpha))  # an integer would be compiled for itself
    value, gradient = adjoint("imex", size)
    agrees(value, loss)
    agrees(gradient["A"], A)
    agrees(gradient["B"], B)
    agrees(gradient["alpha"], dalpha)
    direction = gold(2 * 32 * 32).reshape(2, 32, 32)
    agrees(np.vdot(gradient["u0"], direction), along_gold)
    agrees(along("imex", size, "u0", direction, "inplace"), along_gold)
    *_, last = brusselator.imex_states(*brusselator.imex_inputs(size), size)
    agrees(last[0].mean(), mean)


@pytest.mark.parametrize(
    ("alpha", "loss", "A", "B", "dalpha", "along_gold", "mean"),
    [
        (10, "1634.056877135", "934.215961332", "-66.8802837954", 0.0864523601245, "-16.9576652813", "0.3616741693678"),
        (0.1, "1335.794998192", "881.881383803", "-147.727457525", 2153.82100386, "-9.5400809048", "0.3876444474339"),
    ],
)
def test_implicit_reference(alpha, loss, A, B, dalpha, along_gold, mean):
    size = Implicit(8, alpha=float(alpha))
    value, gradient = adjoint("implicit", size)
    agrees(value, loss)
    agrees(gradient["A"], A)
    agrees(gradient["B"], B)
    assert gradient["alpha"] == pytest.approx(dalpha, rel=1e-10)  # rounding in lap w is 1e-11 of it at alpha = 10
    direction = gold(2 * 8 * 8).reshape(2, 8, 8)
    agrees(np.vdot(gradient["u0"], direction), along_gold)
    agrees(along("implicit", size, "u0", direction, "inplace"), along_gold)
    *_, last = brusselator.implicit_states(*brusselator.imex_inputs(size), size)
    agrees(last[0].mean(), mean)


def test_ude_reference():
    size = Ude(16)
    value, gradient = adjoint("ude", size)
    agrees(value, "0.5468743702795")
    g = np.concatenate([np.ravel(gradient[name]) for name in ("W1", "b1", "W2", "b2")])
    agrees(np.linalg.norm(g), "1.691421454707")
    agrees(g[0], "0.020287895271")
    agrees(g[40], "0.0267864597846")
    agrees(g[64], "-0.426275476189")
    direction = gold(65, 17)
    for name, part in zip(gradient, np.split(direction, [32, 48, 64]), strict=True):
        expected = along("ude", size, name, part.reshape(np.shape(gradient[name])), "inplace")
        assert np.vdot(gradient[name], part) == pytest.approx(expected, rel=1e-10)


def test_the_network_of_ude_is_that_of_the_thread():
    """65 numbers in the order of the blocks; what it is fitted to is imex's own trajectory."""
    theta, data = brusselator.ude_inputs(Ude(5, T=0.4, save=0.2, alpha=0.1))
    assert np.array_equal(np.concatenate([block.ravel() for block in theta.values()]), gold(65))
    states = [*brusselator.imex_states(*brusselator.imex_inputs(size := Imex(5, T=0.4, save=0.2, alpha=0.1)), size)]
    assert np.array_equal(data["target"], states) and np.array_equal(data["u0"], states[0])


@pytest.mark.parametrize(
    ("size", "loss", "A", "B", "alpha", "mean"),
    [  # the scaling form, and one in which the forcing acts
        (Ode(5), 296.823653920, 134.808512257, -6.10772084923, 0.0986060193547, 0.3585197807252),
        (
            Ode(8, T=11.5, save=0.5, alpha=0.1),
            *(6816.10750214, 5445.41626564, -5185.37250144, 6615.88865496, 0.5432690568689),
        ),
    ],
)
def test_ode_reference(size, loss, A, B, alpha, mean):
    """Fields that are the same everywhere: the sums of their gradients are the gradient of the number."""
    theta, data = brusselator.ode_inputs(size)
    value, gradient = brusselator.exact(theta, data, size)
    total = {name: block.sum() for name, block in gradient.items()}
    found = value, total["A"], total["B"], total["alpha1"] + total["alpha2"]
    assert found == pytest.approx((loss, A, B, alpha), rel=1e-10)
    *_, last = brusselator.ode_states(theta, data, size)
    assert last[0].mean() == pytest.approx(mean, rel=1e-7)


@given(st.integers(1, 300), st.integers(1, 12))
def test_binomial_checkpoints(steps, slots):
    """Every step is reversed once, from a state that is there, and as many are taken as Griewank and Walther prove the least."""
    kept, left, taken = {0: 0}, steps, 0
    for n, m, a, b in brusselator_numba.binomial(steps, slots):
        assert kept[a] == n and max(a, b) <= slots
        if m > n:
            kept[b], taken = m, taken + m - n
        else:
            left -= 1
            assert left == n
    times = next(r for r in count() if comb(slots + r, slots) >= steps)
    assert left == 0 and taken == times * steps - comb(slots + times, slots + 1)


@pytest.mark.parametrize("size", [Imex(8), Imex(7, T=1.3, dt=0.01, alpha=2.5), Imex(9, T=0.3, save=0.3, dt=0.3)])
def test_checkpoints_change_nothing(size):
    theta, data = brusselator.imex_inputs(size)
    loss, gradient = adjoint("imex", size)
    for form in ("checkpoints", "binomial"):
        implementation = brusselator_numba.IMPLEMENTATION["imex"][form]
        work = implementation.prepare(structure(theta, data), size)
        value, found = implementation.strategies["adjoint"](theta, data, size, work)
        assert value == pytest.approx(loss, rel=1e-13)
        for name, block in gradient.items():
            assert found[name] == pytest.approx(block, rel=1e-9, abs=1e-9 * np.linalg.norm(block))


def test_ode_exact_against_the_variational_equations():
    """Two solvers, two equations, each block: steps of RKC reversed, its own tangents by Radau."""
    size = Ode(4, T=1.2, save=0.6, spread=0.5, k0=7, rtol=1e-9, atol=1e-9)
    theta, data = brusselator.ode_inputs(size)
    value, gradient = brusselator.exact(theta, data, size)
    assert brusselator.ode(theta, data, size) == pytest.approx(value, rel=1e-9)
    for name, block in theta.items():
        direction = gold(block.size, 17).reshape(block.shape) + 0.25
        off = np.vdot(gradient[name], direction) - along("ode", size, name, direction)
        assert abs(off) <= 1e-7 * np.linalg.norm(gradient[name]) * np.linalg.norm(direction)


def by_dop853(theta, data, size, tolerance=1e-11):
    """The gradient by the adjoint equation l' = -f'(u)^T l, to which each sample adds u - 1, of order 8."""
    A, B, shape = theta["A"], theta["B"], data["u0"].shape
    alpha, L = np.stack([theta["alpha1"], theta["alpha2"]]), brusselator.lap_matrix(size.N)

    def f(t, u, force):
        u = u.reshape(shape)
        return (brusselator.reaction(u, A, B, force) + alpha * brusselator.lap(u, size.N)).ravel()

    def back(t, y, u):
        l, (U, V) = y.reshape(6, *shape[1:])[:2], u(t).reshape(shape)
        p, d = l[0], l[0] - l[1]
        lb = np.stack([(2 * U * V - A) * d - p, U * U * d]) + (L @ (alpha * l).ravel()).reshape(shape)
        return -np.concatenate([lb, [-U * d, p], l * brusselator.lap(np.stack([U, V]), size.N)]).ravel()

    def solve(f, t, y, given, **options):
        options |= {"rtol": tolerance, "atol": tolerance, "first_step": 1e-6 * abs(t[1] - t[0])}  # u0 is off balance
        return solve_ivp(f, t, y.ravel(), "DOP853", args=(given,), **options)

    course = [
        (t, 5.0 * data["disc"] * forced, sampled) for t, forced, sampled in zip(*brusselator.pieces(size), strict=True)
    ]
    solutions, u = [], data["u0"]
    for t, force, _ in course:
        solutions.append(solve(f, (0, t), u, force, dense_output=True).sol)
        u = solutions[-1](t)
    y = np.zeros((6, *shape[1:]))
    for (t, _, sampled), u in zip(course[::-1], solutions[::-1], strict=True):
        y[:2] += sampled * (u(t).reshape(shape) - 1)
        y = solve(back, (t, 0), y, u, t_eval=[0]).y.reshape(y.shape)
    return dict(zip(theta, y[2:], strict=True))


@pytest.mark.parametrize("size", [Ode(17, spread=0.5), Ode(6, T=1.5, save=0.3, alpha=0.1, spread=0.9, k0=3)])
def test_ode_exact_against_the_adjoint_equation(size):
    theta, data = brusselator.ode_inputs(size)
    total, worst = relative(by_dop853(theta, data, size), brusselator.exact(theta, data, size)[1])
    assert total <= 1e-9 and worst <= 1e-8


def test_ode_exact_against_steps_of_the_hand_adjoint_at_32():
    size = Ode(32, spread=0.5)
    theta, data = brusselator.ode_inputs(size)
    loss, exact = brusselator.exact(theta, data, size)
    value, gradient = adjoint("ode", size._replace(rtol=1e-11, atol=1e-9))
    total, worst = relative(gradient, exact)
    assert value == pytest.approx(loss, rel=1e-8) and total <= 1e-7 and worst <= 1e-6


def relative(gradient, exact):
    """The error over all entries, and that of the worst block."""
    off, norm = (
        {name: np.linalg.norm(block - less[name]) for name, block in exact.items()}
        for less in (gradient, dict.fromkeys(exact, 0))
    )
    return np.linalg.norm([*off.values()]) / np.linalg.norm([*norm.values()]), max(
        off[name] / norm[name] for name in exact
    )


@pytest.mark.parametrize(
    ("size", "most", "most_block"),
    [
        (Ode(5), 7e-5, 1e-3),
        (Ode(2, spread=0.5), 7e-5, 1e-3),
        (Ode(3, spread=0.5, k0=8), 7e-5, 1e-3),
        (Ode(6, T=1.5, save=0.5, spread=0.5, k0=5), 7e-5, 1e-3),
        (Ode(4, T=1.2, save=0.6, spread=0.5), 7e-5, 1e-3),
        (Ode(4, T=1.2, save=0.3, alpha=0.1, spread=0.9, k0=3), 7e-5, 1e-3),
        (
            Ode(4, T=1.2, save=0.4, spread=0.5, rtol=1e-11, atol=1e-9),
            1e-8,
            1e-7,
        ),  # the adjoint is that of the steps taken
    ],
)
def test_ode_adjoint(size, most, most_block):
    theta, data = brusselator.ode_inputs(size)
    loss, exact = brusselator.exact(theta, data, size)
    value, gradient = adjoint("ode", size)
    total, worst = relative(gradient, exact)
    assert value == pytest.approx(loss, rel=most) and total <= most and worst <= most_block


def test_ode_adjoint_where_the_alphas_differ_most():
    size = Ode(5, spread=0.5)
    theta, data = brusselator.ode_inputs(size)
    theta |= {"alpha1": theta["alpha1"] / 10 + 0.5, "alpha2": theta["alpha2"] + 15}  # 1..2 and 20..30
    implementation = brusselator_numba.IMPLEMENTATION["ode"]["loops"]
    work = implementation.prepare(structure(theta, data), size)
    _, gradient = implementation.strategies["adjoint"](theta, data, size, work)
    total, worst = relative(gradient, brusselator.exact(theta, data, size)[1])
    assert total <= 7e-5 and worst <= 1e-3


def test_what_ode_counts():
    """Uniform parameters are solved by the preconditioner; others by few iterations."""
    stats = brusselator_numba.IMPLEMENTATION["ode"]["loops"].stats
    same, spread = (stats(*brusselator.ode_inputs(size), size) for size in (Ode(8), Ode(8, spread=0.5)))
    for found in (same, spread):
        assert found["linear_solves"] == 5 * (found["steps"] + found["rejected"])
        assert found["rhs_calls"] == found["linear_solves"] + found["steps"]
    assert same["cg_iterations"] == 0 < spread["cg_iterations"] <= 4 * spread["linear_solves"]


def test_what_cvodes_counts():
    """Of the program whose gradient is a cell: more of all for a smaller tolerance, and the same work at the same size."""
    casadi = pytest.importorskip("problems.brusselator.brusselator_casadi")
    stats = casadi.IMPLEMENTATION["ode"]["cvodes"].stats
    coarse, fine, again = (
        stats(*brusselator.ode_inputs(size), size)
        for size in (Ode(4, rtol=1e-4, atol=1e-4), Ode(4, rtol=1e-8, atol=1e-8), Ode(4, rtol=1e-8, atol=1e-8))
    )
    assert fine == again and all(0 <= coarse[name] <= fine[name] for name in fine)
    assert fine["rhs_calls"] >= fine["linear_solves"] >= fine["steps"] > coarse["steps"] > 10


def test_what_ode_cannot_solve(monkeypatch):
    with pytest.raises(Diverged, match="step became too small for the tolerance"):
        adjoint("ode", Ode(5, B=1e80))
    with monkeypatch.context() as patch:
        patch.setattr(brusselator_numba, "MOST_STEPS", 10)
        with pytest.raises(Diverged, match="did not get there in 100000 steps; give a larger rtol"):
            adjoint("ode", Ode(5, rtol=1e-11, atol=1e-9))

    def failed(*arguments):  # of itself it never was
        *_, counts = arguments
        counts[0] = brusselator_numba.CG_FAILED

    monkeypatch.setattr(brusselator_numba, "ode_kernel", failed)
    with pytest.raises(Diverged, match="Conjugate gradients did not converge in 100 iterations"):
        adjoint("ode", Ode(5, spread=0.5))


def test_what_ode_cannot_solve_in_torch(monkeypatch):
    """Eager code can say which."""
    torch = pytest.importorskip("torch")
    from problems.brusselator import brusselator_torch

    def solve(size):
        theta, data = ({k: torch.as_tensor(v) for k, v in x.items()} for x in brusselator.ode_inputs(size))
        return brusselator_torch.ode(theta, data, size)

    with pytest.raises(Diverged, match="step became too small for the tolerance"):
        solve(Ode(3, B=1e80))
    with monkeypatch.context() as patch:
        patch.setattr(brusselator_torch, "MOST_STEPS", 2)
        with pytest.raises(Diverged, match="did not get there in 100000 steps"):
            solve(Ode(3))
    monkeypatch.setattr(brusselator_torch, "MOST_CG", 1)
    with pytest.raises(Diverged, match="Conjugate gradients did not converge"):
        solve(Ode(brusselator_torch.DIRECT + 1, spread=0.9))


def by_jax(ode, theta, data, size):
    import jax

    jax.config.update("jax_enable_x64", True)
    return jax.grad(lambda theta: ode(theta, data, size))(theta)


def by_torch(ode, theta, data, size):
    import torch

    theta = {name: torch.tensor(block, requires_grad=True) for name, block in theta.items()}
    ode(theta, {name: torch.as_tensor(array) for name, array in data.items()}, size).backward()
    return {name: block.grad.numpy() for name, block in theta.items()}


@pytest.mark.parametrize(("library", "gradient"), [("jax", by_jax), ("torch", by_torch)])
def test_the_modes_solve_what_the_iterations_solve(library, gradient, monkeypatch):
    """Up to DIRECT one eigh a gradient, beyond it conjugate gradients: the same steps, to the tolerance of the solves."""
    pytest.importorskip(library)
    module, size = importlib.import_module(f"problems.brusselator.brusselator_{library}"), Ode(5, spread=0.5)
    given = module.ode, *brusselator.ode_inputs(size), size
    direct = gradient(*given)
    monkeypatch.setattr(module, "DIRECT", 0)
    total, worst = relative(gradient(*given), direct)
    assert 0 < total <= 1e-5 and worst <= 1e-4


def test_the_tableau():
    """Its order conditions, as Kennedy and Carpenter have them: to order 3 all, of order 4 those without coupling."""
    E, I, b, error = brusselator.kencarp4()  # noqa: E741
    c = E.sum(1)
    assert np.allclose(c, [0, 1 / 2, 83 / 250, 31 / 50, 17 / 20, 1], atol=1e-12) and np.allclose(
        I.sum(1), c, atol=1e-12
    )
    for order, weights in ((4, b), (3, b - error)):
        assert np.allclose([weights @ c**k for k in range(order)], [1 / (k + 1) for k in range(order)], atol=1e-12)
        assert np.allclose([weights @ M @ c for M in (E, I)], 1 / 6, atol=1e-12)
    for M in (E, I):
        assert np.allclose([b * c @ M @ c, b @ M @ c**2], [1 / 8, 1 / 12], atol=1e-12)
        assert np.allclose([b @ M @ K @ c for K in (E, I)], 1 / 24, atol=1e-12)


def test_the_parameters_of_ode():
    """4 N^2 of them, spread in the order of the blocks."""
    theta, data = brusselator.ode_inputs(Ode(3, A=2.9, B=1.3, alpha=0.1, spread=0.5, k0=4))
    values = np.concatenate([theta[name].ravel() for name in ("A", "B", "alpha1", "alpha2")])
    means = np.repeat([2.9, 1.3, 0.1, 0.1], 9)
    assert list(theta) == ["A", "B", "alpha1", "alpha2"] and list(data) == ["u0", "disc"]
    assert np.array_equal(values, means * (1 + gold(36, 4)))


@pytest.mark.parametrize(
    ("keys", "lengths", "forced", "sampled"),
    [
        ({"T": 0.4, "save": 0.2}, [0.2, 0.2], [0, 0], [1, 1]),
        ({"T": 1.2}, [0.1] * 12, [0] * 11 + [1], [1] * 12),  # 11 * 0.1 is not 1.1
        ({"T": 1.1, "save": 1.1}, [1.1], [0], [1]),
        ({"T": 2.0, "save": 1.0}, [1.0, 0.1, 0.9], [0, 0, 1], [1, 0, 1]),
    ],
)
def test_pieces_stop_at_samples_and_at_the_forcing(keys, lengths, forced, sampled):
    found = brusselator.pieces(Ode(5, **keys))
    assert np.allclose(found.lengths, lengths, rtol=1e-12)
    assert (found.forced.tolist(), found.sampled.tolist()) == (forced, sampled)


@pytest.mark.parametrize(
    ("task", "size"),
    [
        ("rhs", Rhs(8)),
        ("rhs", Rhs(9, alpha=0.1, t=1.0)),
        ("rhs", Rhs(3)),
        ("imex", Imex(8, T=1.2)),
        ("imex", Imex(7, alpha=0.1, dt=0.05)),
        ("imex", Imex(3, dt=0.1)),
        ("ude", Ude(8, T=1.2, dt=0.02)),
        ("ude", Ude(7, alpha=0.1, dt=0.05)),
        ("ude", Ude(3, dt=0.1)),
        ("implicit", Implicit(6, alpha=0.1, T=1.2)),
        ("implicit", Implicit(5, A=2.9, B=1.3, dt=0.1)),
        ("implicit", Implicit(3, dt=0.025, T=1.2, save=0.05)),
    ],
)
def test_forms_and_adjoint(task, size):
    """Three forms to 1e-13 in the loss, real and complex; every block of the adjoint against complex step."""
    theta, data = brusselator.TASKS[task].inputs(size)
    losses = {name: form(theta, data, size) for name, form in brusselator.TASKS[task].forms.items()}
    value, gradient = adjoint(task, size)
    for loss in [*losses.values(), value]:
        assert loss == pytest.approx(losses["array"], rel=1e-13, abs=1e-11)
    for name, block in theta.items():
        direction = gold(block.size, 17).reshape(block.shape) + 0.25
        expected = along(task, size, name, direction)
        assert np.sum(gradient[name] * direction) == pytest.approx(expected, rel=1e-10)
        assert along(task, size, name, direction, "inplace") == pytest.approx(expected, rel=1e-10)


def test_imex_loops_complex():
    size = Imex(3, T=1.2, dt=0.1)
    assert along("imex", size, "alpha", 1.0, "loops") == pytest.approx(along("imex", size, "alpha", 1.0), rel=1e-11)


@pytest.mark.parametrize("N", [3, 6])
def test_jacobian_of_a_step(N):
    """The sparse pattern: J d is the derivative of w - dt f(w) along d."""
    J, dt, A, alpha = brusselator.sparse(N), 0.05, 3.4, 0.1
    w, d = brusselator.initial(N) + 0.1, gold(2 * N * N).reshape(2, N, N)
    z = w + 1j * H * d
    f = brusselator.reaction(z, A, 1.0, 0.0) + alpha * brusselator.lap(z, N)
    values = J.one - dt * alpha * J.lap - dt * brusselator.reaction_diagonals(w, A)[J.place]
    assert np.allclose(J.matrix(values) @ d.ravel(), np.imag(z - dt * f).ravel() / H, rtol=1e-13, atol=1e-13)


def test_newton_that_does_not_converge():
    size = Implicit(4, T=200.0, dt=100.0, save=100.0, A=100.0, alpha=0.1)
    theta, data = brusselator.imex_inputs(size)
    with pytest.raises(Diverged, match="did not converge in 20 iterations; give a smaller dt"):
        brusselator.implicit(theta, data, size)
    with pytest.raises(Diverged, match="give a smaller dt"):
        adjoint("implicit", size)


def test_numba_primal_is_complex_safe():
    size = Imex(6, T=0.2)
    theta, data = brusselator.imex_inputs(size)
    theta = {name: block + 0j for name, block in theta.items()}
    theta["alpha"] = theta["alpha"] + 1j * H
    work = brusselator_numba.imex_prepare(structure(theta, data), size)
    value = brusselator_numba.imex(theta, data, size, work).imag / H
    assert value == pytest.approx(along("imex", size, "alpha", 1.0), rel=1e-10)


def test_basis_diagonalises_the_laplacian():
    for N in (3, 4, 7, 8):
        Q, lam = brusselator.fourier(N), brusselator.eigenvalues(N)
        assert np.allclose(Q.T @ Q, np.eye(N), atol=1e-14)
        u = gold(2 * N * N).reshape(2, N, N)
        assert np.allclose(
            brusselator.lap(u, N), Q @ ((Q.T @ u @ Q) * (lam[:, None] + lam)) @ Q.T, rtol=1e-12, atol=1e-11
        )


def test_imex_follows_the_ode():
    """First order in dt towards SciPy's solution, which stops and starts again where the forcing sets in."""
    N, alpha, T = 6, 0.1, 1.3

    def f(t, u, force):
        u = u.reshape(2, N, N)
        return (brusselator.reaction(u, 3.4, 1.0, force) + alpha * brusselator.lap(u, N)).ravel()

    u, on = brusselator.initial(N).ravel(), brusselator.FORCING * brusselator.disc(N)
    for t0, t1, force in ((0, 1.1, 0 * on), (1.1, T, on)):
        u = solve_ivp(f, (t0, t1), u, "LSODA", rtol=1e-9, atol=1e-9, args=(force,)).y[:, -1]
    errors = []
    for dt in (0.005, 0.0025):
        size = Imex(N, T=T, alpha=alpha, dt=dt)
        *_, last = brusselator.imex_states(*brusselator.imex_inputs(size), size)
        errors.append(np.abs(last.ravel() - u).max())
    assert errors[0] < 0.02
    assert 1.8 < errors[0] / errors[1] < 2.2


@pytest.mark.parametrize("dt", [0.005, 0.05, 0.1, 0.0275])
def test_forcing_starts_in_a_counted_step(dt):
    assert brusselator.clock(Imex(8, T=10 * dt, dt=dt, save=dt))[2] == ceil(round(1.1 / dt, 6)) == round(1.1 / dt)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"T": 1.25}, "T/save must be a whole number, T=1.25 and save=0.1"),
        ({"dt": 0.03}, "save/dt must be a whole number, save=0.1 and dt=0.03"),
        ({"dt": 0}, "dt=0.0 is not positive"),
        ({"T": -1.5, "save": -0.1, "dt": -0.005}, "T=-1.5 is not positive"),
        ({"N": 2}, "the least N is 3"),
    ],
)
def test_bad_sizes(keys, words):
    with pytest.raises(BadSize, match=words):
        brusselator.TASKS["imex"].at(**({"N": 8} | keys))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"spread": 1}, "spread=1.0 lets alpha reach 0; give spread from 0 to below 1"),
        ({"rtol": 0}, "rtol=0.0 is not positive"),
        ({"alpha": 0}, "alpha=0.0 is not positive"),
        ({"T": 1.25}, "T/save must be a whole number"),
        ({"k0": -1}, "the least k0 is 0"),
    ],
)
def test_bad_sizes_of_ode(keys, words):
    with pytest.raises(BadSize, match=words):
        brusselator.TASKS["ode"].at(**({"N": 8} | keys))
