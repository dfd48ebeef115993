"""The neural ODE against the catalogue's values, and its hand adjoint against complex step."""

import numpy as np
import pytest
from numpy.linalg import norm

from backends.numpy_backend import NumPy
from problems import gold, neural_ode, structure
from problems.neural_ode import TASKS, Rhs, Rk4
from problems.neural_ode.neural_ode_numba import IMPLEMENTATION, tanh


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
