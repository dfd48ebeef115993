"""The neural ODE in PyTensor: whole arrays, symbolic; the batch is an axis, time is a scan."""

import pytensor
import pytensor.tensor as pt

from problems import Implementation
from problems.neural_ode import SAVES, T


def f(u, W1, b1, W2, b2):
    """The network, u (..., 2)."""
    return pt.tanh(u * u * u @ W1.T + b1) @ W2.T + b2


def rhs(theta, data, size):
    return data["v"] @ f(**theta)


def step(u, dt, net):
    k1 = f(u, *net)
    k2 = f(u + dt / 2 * k1, *net)
    k3 = f(u + dt / 2 * k2, *net)
    k4 = f(u + dt * k3, *net)
    return u + dt / 6 * (k1 + 2 * (k2 + k3) + k4)


def rk4(theta, data, size):
    u0, target, m = data["u0"], data["target"], size.m  # (b, 2), (30, 2)
    dt, net = T / (SAVES - 1) / m, [theta[name] for name in ("W1", "b1", "W2", "b2")]
    u = pytensor.scan(
        lambda u, *net: step(u, dt, net),
        outputs_info=u0,
        non_sequences=net,
        n_steps=(SAVES - 1) * m,
        strict=True,
        return_updates=False,
    )
    return pt.sum((u0 - target[0]) ** 2) + pt.sum((u[m - 1 :: m] - target[1:, None]) ** 2)


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs)},
    "rk4": {"array": Implementation(rk4)},
}
