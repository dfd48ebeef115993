"""The neural ODE in PyTorch: dense layers on the eager tape, a Python loop over time."""

from functools import partial

import torch
from torch.nn.functional import linear

from backends.torch_backend import checkpointed, compiled
from problems import Implementation
from problems.neural_ode import SAVES, T


def f(u, W1, b1, W2, b2):
    """The network, u (..., 2)."""
    return linear(torch.tanh(linear(u**3, W1, b1)), W2, b2)


def rhs(theta, data, size):
    return data["v"] @ f(**theta)


def step(u, dt, net):
    """Every operation is dispatched and taped, so a sum and its factor are one: 0.9 times the time."""
    k1 = f(u, **net)
    k2 = f(torch.add(u, k1, alpha=dt / 2), **net)
    k3 = f(torch.add(u, k2, alpha=dt / 2), **net)
    k4 = f(torch.add(u, k3, alpha=dt), **net)
    return torch.add(u, torch.add(k1 + k4, k2 + k3, alpha=2), alpha=dt / 6)


def march(u, net, target, m, step=step):
    """The state at the last save time of target (times, 2), and the misfit at all of them."""
    dt, saved = T / (SAVES - 1) / m, []
    for _ in target:
        for _ in range(m):
            u = step(u, dt, net)
        saved.append(u)
    return u, torch.sum((torch.stack(saved) - target[:, None]) ** 2)


def rk4(theta, data, size, march=march, saves=SAVES - 1):
    u, target = data["u0"], data["target"]  # (b, 2), (30, 2)
    loss = torch.sum((u - target[0]) ** 2)
    for part in target[1:].split(saves):
        u, misfit = march(u, theta, part, size.m)
        loss = loss + misfit
    return loss


def rk4_checkpoint(theta, data, size):
    """Every fifth saved state: next to every one, 0.75 to 0.9 times the time at the same memory."""
    return rk4(theta, data, size, checkpointed(march), 5)


def rk4_compile(theta, data, size):
    return rk4(theta, data, size, partial(march, step=compiled(step)))


def step_inplace(u, dt, net):
    """Stages go into a sum; u may not be overwritten, the tape needs it for u^3."""
    k = f(u, **net)
    du = dt / 6 * k
    for ahead, weight in ((dt / 2, dt / 3), (dt / 2, dt / 3), (dt, dt / 6)):
        k = f(torch.add(u, k, alpha=ahead), **net)
        du.add_(k, alpha=weight)
    return du.add_(u)


def march_inplace(u, net, target, m, step=step_inplace):
    """States go into a buffer."""
    dt = T / (SAVES - 1) / m
    saved = torch.empty(len(target), *u.shape, dtype=u.dtype, device=u.device)
    for i in range(len(target)):
        for _ in range(m):
            u = step(u, dt, net)
        saved[i] = u
    saved -= target[:, None]
    return u, saved.square().sum()


def rk4_inplace(theta, data, size):
    return rk4(theta, data, size, march_inplace)


def rk4_inplace_checkpoint(theta, data, size):
    return rk4(theta, data, size, checkpointed(march_inplace), 5)


def rk4_inplace_compile(theta, data, size):
    return rk4(theta, data, size, partial(march_inplace, step=compiled(step_inplace)))


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs)},
    "rk4": {
        "array": Implementation(rk4, strategies={"checkpoint": rk4_checkpoint, "compile": rk4_compile}),
        "inplace": Implementation(
            rk4_inplace, strategies={"checkpoint": rk4_inplace_checkpoint, "compile": rk4_inplace_compile}
        ),
    },
}
