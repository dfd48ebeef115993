"""The neural ODE in Tangent: the batch is an axis. Weights go by name: through f(u, **net) their gradient is silently zero.

In forward mode du is the tangent of u, so no variable may be called so; and it has no tangents for globals, only for
attributes, so constants are those of their module.
"""

import numpy as np

from problems import Implementation, neural_ode


def f(u, W1, b1, W2, b2):
    """The network, u (..., 2)."""
    z = np.tanh(np.dot(u * u * u, np.transpose(W1)) + b1)
    return np.dot(z, np.transpose(W2)) + b2


def rhs(theta, data, size):
    ut = f(theta["u"], theta["W1"], theta["b1"], theta["W2"], theta["b2"])
    return np.sum(data["v"] * ut)


def rk4(theta, data, size):
    W1, b1, W2, b2 = theta["W1"], theta["b1"], theta["W2"], theta["b2"]
    u, target, dt = data["u0"], data["target"], neural_ode.T / (neural_ode.SAVES - 1) / size.m
    loss = np.sum((u - target[0]) ** 2)
    for i in range(1, neural_ode.SAVES):
        for _ in range(size.m):
            k1 = f(u, W1, b1, W2, b2)
            k2 = f(u + dt / 2 * k1, W1, b1, W2, b2)
            k3 = f(u + dt / 2 * k2, W1, b1, W2, b2)
            k4 = f(u + dt * k3, W1, b1, W2, b2)
            u = u + dt / 6 * (k1 + 2 * (k2 + k3) + k4)
        loss = loss + np.sum((u - target[i]) ** 2)
    return loss


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs)},
    "rk4": {"array": Implementation(rk4)},
}
