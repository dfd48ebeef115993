"""The neural ODE in Autograd: dense layers on the tape, a Python loop over time."""

import autograd.numpy as np
from autograd.extend import Box

from problems import Implementation
from problems.neural_ode import MOST_STEPS, SAVES, SHORTEST, T, dopri5, endless, first_step, too_small


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


# ode: the batch takes steps together


def number(x):
    """Without its derivative."""
    while isinstance(x, Box):
        x = x._value
    return x


def ode(theta, data, size, count=None):
    """Dormand and Prince's pair. How long a step is, and whether it is taken, is no matter of the tape."""
    (A, error, P), times = dopri5(), np.linspace(0, T, SAVES)
    net = theta["W1"], theta["b1"], theta["W2"], theta["b2"]
    u, target, count = data["u0"], data["target"], {} if count is None else count
    loss, t, h, i, k0 = np.sum((u - target[0]) ** 2), 0.0, first_step(size), 1, f(u, *net)
    count |= {"steps": 0, "rejected": 0}
    while i < SAVES:
        if count["steps"] == MOST_STEPS:
            raise endless()
        if h < SHORTEST:
            raise too_small()
        dt, k = min(h, T - t), [k0]
        for s in range(1, 7):
            x = u + dt * sum(A[s, j] * k[j] for j in range(s) if A[s, j])
            k.append(f(x, *net))
        off = dt * sum(error[j] * number(k[j]) for j in range(7))
        off = off / (size.atol + size.rtol * np.maximum(np.abs(number(u)), np.abs(number(x))))
        off = np.sqrt(np.mean(off**2))
        if off <= 1:
            end = T if h >= T - t else t + dt
            first, i = i, int(np.searchsorted(times, end, "right"))
            if first < i:  # all save times in the step at once
                w = dt * ((times[first:i, None] - t) / dt) ** np.arange(1, 5) @ P.T
                saved = u + np.tensordot(w, np.stack(k), 1)  # (times, b, 2)
                loss = loss + np.sum((saved - target[first:i, None]) ** 2)
            u, t, k0 = x, end, k[6]
        count["steps" if off <= 1 else "rejected"] += 1
        h = dt * min(10.0, 0.9 * max(off, 1e-6) ** -0.2) if off < 1e3 else 0.2 * dt
    return loss


def ode_stats(theta, data, size):
    """The steps are those of all members together."""
    ode(theta, data, size, count := {})
    return count | {"rhs_calls": 6 * sum(count.values()) + 1}


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs)},
    "rk4": {"array": Implementation(rk4)},
    "ode": {"array": Implementation(ode, stats=ode_stats)},
}
