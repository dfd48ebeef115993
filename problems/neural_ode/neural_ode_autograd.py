"""The neural ODE in Autograd: dense layers on the tape, a Python loop over time."""

import autograd.numpy as np

from problems import Implementation
from problems.neural_ode import SAVES, T


def f(u, W1, b1, W2, b2):
    """The network, u (..., 2)."""
    return np.dot(np.tanh(np.dot(u**3, W1.T) + b1), W2.T) + b2


def rhs(theta, data, size):
    return np.dot(data["v"], f(theta["u"], theta["W1"], theta["b1"], theta["W2"], theta["b2"]))


def step(u, dt, net):
    k1 = f(u, *net)
    k2 = f(u + dt / 2 * k1, *net)
    k3 = f(u + dt / 2 * k2, *net)
    k4 = f(u + dt * k3, *net)
    return u + dt / 6 * (k1 + 2 * (k2 + k3) + k4)


def rk4(theta, data, size):
    """The weights are taken out of the dict once: each time is an operation on the tape."""
    u, target = data["u0"], data["target"]  # (b, 2), (30, 2)
    dt = T / (SAVES - 1) / size.m
    net = theta["W1"], theta["b1"], theta["W2"], theta["b2"]
    loss = np.sum((u - target[0]) ** 2)
    for i in range(1, SAVES):
        for _ in range(size.m):
            u = step(u, dt, net)
        loss = loss + np.sum((u - target[i]) ** 2)
    return loss


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs)},
    "rk4": {"array": Implementation(rk4)},
}
