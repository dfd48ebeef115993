"""The neural ODE in CasADi: dense matrices (MX), time is a mapaccum."""

import casadi as ca

from problems import Implementation
from problems.neural_ode import SAVES, T


def f(u, W1, b1, W2, b2):
    """The network, u (2, b)."""
    many = u.shape[1]
    z = ca.tanh(ca.mtimes(W1, u * u * u) + ca.repmat(b1, 1, many))
    return ca.mtimes(W2, z) + ca.repmat(b2, 1, many)


def rhs(theta, data, size):
    return ca.dot(data["v"], f(theta["u"], theta["W1"].T, theta["b1"], theta["W2"].T, theta["b2"]))


def step(dt, net, b):
    """The step as a function that can be repeated: its inputs are the state and the weights."""
    u = ca.MX.sym("u", 2, b)
    net = [ca.MX.sym("net", *block.shape) for block in net]
    k1 = f(u, *net)
    k2 = f(u + dt / 2 * k1, *net)
    k3 = f(u + dt / 2 * k2, *net)
    k4 = f(u + dt * k3, *net)
    return ca.Function("step", [u, *net], [u + dt / 6 * (k1 + 2 * (k2 + k3) + k4)])


def rk4(theta, data, size):
    u0, target = data["u0"], data["target"]  # (2, b), (2, 30)
    net = theta["W1"].T, theta["b1"], theta["W2"].T, theta["b2"]
    steps = (SAVES - 1) * size.m
    each = step(T / (SAVES - 1) / size.m, net, size.b)
    u = each.mapaccum(steps)(u0, *(ca.repmat(block, 1, steps) for block in net))  # (2, b steps)
    saved = [u0, *ca.horzsplit(u, size.b)[size.m - 1 :: size.m]]
    return ca.sumsqr(ca.horzcat(*saved) - ca.kron(target, ca.DM.ones(1, size.b)))


IMPLEMENTATION = {
    "rhs": {"mx": Implementation(rhs)},
    "rk4": {"mx": Implementation(rk4)},
}
