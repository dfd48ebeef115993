"""The neural ODE against the catalogue's values, and its hand adjoint against complex step."""

import numpy as np
import pytest
from numpy.linalg import norm

from backends.numba_math import tanh
from backends.numpy_backend import NumPy
from problems import BadSize, Diverged, gold, neural_ode, structure
from problems.neural_ode import TASKS, Ode, Rhs, Rk4, neural_ode_numba
from problems.neural_ode.neural_ode_numba import IMPLEMENTATION


def hand(task, size, theta=None):
    """The inputs, the loss and the gradient by the hand adjoint."""
    start, data = TASKS[task].inputs(size)
    theta = theta or start
    implementation = IMPLEMENTATION[task]["loops"]
    work = implementation.prepare(structure(theta, data), size)
    loss, gradient = implementation.strategies["adjoint"](theta, data, size, work)
    assert np.isclose(implementation.loss(theta, data, size, work), loss, rtol=1e-13, atol=0)
    return theta, data, loss, gradient


def flat(gradient):
    return np.concatenate([np.ravel(gradient[name]) for name in ("W1", "b1", "W2", "b2")])


@pytest.fixture(scope="module")
def continuous():
    """m = 40 is the ODE's solution to 1e-13."""
    return flat(hand("rk4", Rk4(50, 40))[3])


def test_data():
    data = neural_ode.truth()
    assert data.shape == (30, 2)
    assert np.allclose(data[1], (1.946503022766, 0.7988308300774), rtol=0, atol=1e-12)
    assert np.allclose(data[29], (1.291991562977, 0.9725860744344), rtol=0, atol=1e-12)
    assert np.isclose(data.sum(), 6.400217048623, rtol=0, atol=1e-12)


def test_weights():
    net, g = neural_ode.weights(50), 0.1 * np.sqrt(12) * gold(252)
    assert net["W1"][3, 1] == g[7] and net["W2"][1, 4] == g[150 + 54] and not net["b1"].any() and not net["b2"].any()
    assert sum(block.size for block in net.values()) == 252


def test_tanh():
    for x in np.concatenate([np.linspace(-25, 25, 5001), gold(1000) / 10, [0.0, 1e300, -1e300]]):
        assert abs(tanh(x) - np.tanh(x)) < 4e-16


def test_rhs_values():
    theta, data, loss, gradient = hand("rhs", Rhs(50))
    value = neural_ode.f(**theta)
    assert np.allclose(value, (1.1955887, 0.62621681), rtol=0, atol=1e-8)
    assert np.allclose(gradient["u"], (0.73571461, 0), rtol=0, atol=1e-8)
    assert np.isclose(loss, value[0] - 0.5 * value[1], rtol=1e-13)


def test_rk4_values():
    _, _, loss, gradient = hand("rk4", Rk4(50))
    assert np.isclose(loss, 390.0306919508, rtol=0, atol=1e-10)
    assert np.isclose(norm(flat(gradient)), 1522.546612136, rtol=0, atol=1e-9)


def test_continuous_values(continuous):
    """m = 10 is within 2.8e-11 of the ODE's gradient, m = 40 nearer than the printed digits."""
    _, _, loss, g = hand("rk4", Rk4(50, 10))
    for blocks, rtol in ((g, 1e-10), (hand("rk4", Rk4(50, 40))[3], 1e-11)):
        norms = [norm(blocks[name]) for name in ("W1", "b1", "W2", "b2")]
        assert np.allclose(norms, (1153.84578065, 61.0964610978, 976.244215997, 173.215875628), rtol=rtol, atol=0)
        assert np.allclose(blocks["b2"], (163.344050419, 57.6407907849), rtol=rtol, atol=0)
        assert np.allclose(blocks["W1"][0], (-133.571226794, -0.497346510506), rtol=rtol * 10, atol=0)
    assert np.isclose(loss, 390.0307093599, rtol=1e-11)
    assert np.isclose(norm(continuous), 1522.547001547, rtol=0, atol=1e-9)


def test_ode_reference(continuous):
    """The adjoint equation against the catalogue's variational equations, and against the discrete adjoint of tiny steps."""
    loss, gradient = neural_ode.exact(*TASKS["ode"].inputs(Ode(50)), Ode(50))
    assert loss == pytest.approx(390.0307093599, abs=1e-10)
    assert norm(flat(gradient)) == pytest.approx(1522.547001547, abs=1e-9)
    norms = [norm(block) for block in gradient.values()]
    assert norms == pytest.approx((1153.84578065, 61.0964610978, 976.244215997, 173.215875628), rel=1e-11)
    assert gradient["b2"] == pytest.approx((163.344050419, 57.6407907849), rel=1e-11)
    assert gradient["W1"][0] == pytest.approx((-133.571226794, -0.497346510506), rel=1e-11)
    assert norm(flat(gradient) - continuous) <= 1e-12 * norm(continuous)


@pytest.mark.parametrize("size", [Ode(7, 1e-10, 1e-10, 3), Ode(1, 1e-10, 1e-12)])
def test_ode_exact_against_the_variational_equations(size):
    """Two equations, each block, away from the start."""
    theta, data = moved("ode", size)
    loss, exact = neural_ode.exact(theta, data, size)
    value, tangents = NumPy("cpu").complex_step(lambda th, da: neural_ode.ode(th, da, size))(theta, data)
    assert value == pytest.approx(loss, rel=1e-9)
    for name in exact:
        assert norm(tangents[name] - exact[name]) <= 1e-8 * norm(exact[name]), name


def along_steps(theta, data, dts):
    """The loss of one trajectory by steps of these lengths, in NumPy, for complex step."""
    A, _, P = neural_ode.dopri5()
    u, t, loss = data["u0"][0], 0.0, np.sum((data["u0"][0] - data["target"][0]) ** 2)
    times, i = np.linspace(0, neural_ode.T, neural_ode.SAVES), 1
    for dt in dts:
        k = np.zeros((7, 2), complex)
        for s in range(7):
            stage = u + dt * A[s] @ k
            k[s] = neural_ode.f(stage, **theta)
        while i < len(times) and times[i] <= t + dt + 1e-9:
            x = ((times[i] - t) / dt) ** np.arange(1, 5)
            loss += np.sum((u + dt * (P @ x) @ k - data["target"][i]) ** 2)
            i += 1
        u, t = stage, t + dt
    assert i == len(times)
    return loss


@pytest.mark.parametrize("size", [Ode(7, 1e-4, 1e-4), Ode(8, 1e-9, 1e-9), Ode(3, 1e-12, 1e-12)])
def test_ode_adjoint_is_that_of_the_steps(size):
    """To rounding; and of the solution to what interpolation of order 4 leaves of the tolerance."""
    theta, data = moved("ode", size)
    implementation = IMPLEMENTATION["ode"]["loops"]
    work = implementation.prepare(structure(theta, data), size)
    loss, gradient = implementation.strategies["adjoint"](theta, data, size, work)
    dts = work.kept[2][: implementation.stats(theta, data, size)["steps"], 0]
    value, exact = NumPy("cpu").complex_step(lambda th, da: along_steps(th, da, dts))(theta, data)
    assert loss == pytest.approx(value, rel=1e-13) and implementation.loss(theta, data, size, work) == loss
    solution = neural_ode.exact(theta, data, size)[1]
    for name in exact:
        assert norm(gradient[name] - exact[name]) <= 1e-12 * norm(exact[name]), name
        assert norm(gradient[name] - solution[name]) <= 10 * size.rtol**0.8 * norm(exact[name]), name


def test_what_ode_counts():
    """Fewer steps for less, all members' together; each stage but the first is one right-hand side."""
    stats = IMPLEMENTATION["ode"]["loops"].stats
    coarse, fine, three = (stats(*moved("ode", size), size) for size in (Ode(8, 1e-4), Ode(8), Ode(8, b=3)))
    assert coarse["steps"] < fine["steps"] < three["steps"]
    for found, members in ((coarse, 1), (fine, 1), (three, 3)):
        assert found["rhs_calls"] == 6 * (found["steps"] + found["rejected"]) + members


def test_what_ode_cannot_solve(monkeypatch):
    theta, data = moved("ode", Ode(8))
    nowhere = theta | {"b2": np.array([np.nan, 0.0])}
    implementation = IMPLEMENTATION["ode"]["loops"]
    for loss in (implementation.loss, implementation.strategies["adjoint"]):
        work = implementation.prepare(structure(theta, data), Ode(8))
        with pytest.raises(Diverged, match="step became too small for the tolerance; give a larger rtol"):
            loss(nowhere, data, Ode(8), work)
    work = implementation.prepare(structure(theta, data), Ode(8))
    work.kept[:] = neural_ode_numba.room(2, 8, np.dtype(float))
    with monkeypatch.context() as patch:
        patch.setattr(neural_ode_numba, "MOST_STEPS", 2)
        with pytest.raises(Diverged, match="did not get there in 100000 steps; give a larger rtol"):
            implementation.loss(theta, data, Ode(8), work)
    loss = implementation.loss(theta, data, Ode(8), work)  # makes room
    assert len(work.kept[2]) == 8 and loss == pytest.approx(neural_ode.exact(theta, data, Ode(8))[0], rel=1e-7)


def test_the_pair():
    """Its order conditions: of the weights to order 4, of the interpolation to order 3 inside the step; its ends fit."""
    A, error, P = neural_ode.dopri5()
    c, b = A.sum(1), A[6]
    assert np.allclose(c, [0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1], atol=1e-14) and np.allclose(P.sum(1), b, atol=1e-14)
    assert np.allclose(P[:, 0], np.eye(7)[0], atol=1e-14)  # the slope at the start
    assert np.allclose(P @ [1, 2, 3, 4], np.eye(7)[6], atol=1e-13)  # and at the end
    for weights, x in ((b, 1), (b - error, 1), (P @ 0.3 ** np.arange(1, 5), 0.3)):
        found = weights.sum(), weights @ c, weights @ c**2, weights @ A @ c, weights @ c**3, weights @ A @ c**2
        assert np.allclose(found, [x, x**2 / 2, x**3 / 3, x**3 / 6, x**4 / 4, x**4 / 12], atol=1e-13)
    assert np.isclose(b @ c**4, 1 / 5, atol=1e-14) and not np.isclose((b - error) @ c**4, 1 / 5, atol=1e-4)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"H": 0}, "the least H is 1"),
        ({"rtol": 1e-15}, "rtol=1e-15 is below what rounding allows; give rtol of at least 1e-13"),
        ({"atol": 0}, "atol=0.0 is not positive; give atol above 0"),
    ],
)
def test_bad_sizes_of_ode(keys, words):
    with pytest.raises(BadSize, match=words):
        TASKS["ode"].at(**keys)


@pytest.mark.parametrize("m, error", [(1, 2.7e-7), (2, 1.7e-8), (10, 2.8e-11)])
def test_convergence(continuous, m, error):
    g = flat(hand("rk4", Rk4(50, m))[3])
    assert np.isclose(norm(g - continuous) / norm(continuous), error, rtol=0.04)


def test_batch():
    """The first member is the trajectory from (2, 0), and the others add to its loss."""
    data = TASKS["rk4"].inputs(Rk4(5, 2, 3))[1]
    assert np.array_equal(data["u0"], np.array([2, 0]) + np.array([[0], [1], [1]]) * gold(6, 7).reshape(3, 2))
    theta = neural_ode.weights(5)
    alone = sum(neural_ode.rk4(theta, data | {"u0": data["u0"][k : k + 1]}, Rk4(5, 2)) for k in range(3))
    assert np.isclose(neural_ode.rk4(theta, data, Rk4(5, 2, 3)), alone, rtol=1e-13)


CASES = [("rhs", Rhs(10)), ("rhs", Rhs(37)), ("rk4", Rk4(10)), ("rk4", Rk4(1)), ("rk4", Rk4(7, 3, 5))]


def moved(task, size):
    """Inputs away from the start, where the biases and u[1] are 0."""
    theta, data = TASKS[task].inputs(size)
    return {
        name: block + gold(block.size, k).reshape(block.shape) for k, (name, block) in enumerate(theta.items())
    }, data


@pytest.mark.parametrize("task, size", CASES)
def test_forms_are_equal(task, size):
    for theta, data in (TASKS[task].inputs(size), moved(task, size)):
        z = {name: block + 1e-20j * gold(block.size).reshape(block.shape) for name, block in theta.items()}
        for inputs in (theta, z):
            array, *others = (form(inputs, data, size) for form in TASKS[task].forms.values())
            for other in others:
                assert np.isclose(other.real, array.real, rtol=1e-13, atol=0)
                assert np.isclose(other.imag, array.imag, rtol=1e-12, atol=0)


@pytest.mark.parametrize("task, size", CASES)
def test_hand_adjoint(task, size):
    array = TASKS[task].forms["array"]
    for theta, data in (TASKS[task].inputs(size), moved(task, size)):
        before = {name: block.copy() for name, block in theta.items()}
        exact_loss, exact = NumPy("cpu").complex_step(lambda th, da: array(th, da, size))(theta, data)
        _, _, loss, gradient = hand(task, size, theta)
        assert np.isclose(loss, exact_loss, rtol=1e-13, atol=0)
        for name in exact:
            assert gradient[name].shape == exact[name].shape and np.array_equal(theta[name], before[name])
            assert norm(gradient[name] - exact[name]) <= 1e-12 * norm(exact[name]), name


def test_rhs_tangent():
    """<v, J w> by complex step is <J^T v, w>."""
    theta, data = moved("rhs", Rhs(50))
    gradient = hand("rhs", Rhs(50), theta)[3]
    w = {name: gold(block.size, 3).reshape(block.shape) for name, block in theta.items()}
    tangent = neural_ode.rhs({name: theta[name] + 1e-20j * w[name] for name in theta}, data, Rhs(50)).imag / 1e-20
    assert np.isclose(tangent, sum(np.sum(gradient[name] * w[name]) for name in w), rtol=1e-12)
