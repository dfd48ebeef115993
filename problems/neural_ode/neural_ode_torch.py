"""The neural ODE in PyTorch: dense layers on the eager tape, a Python loop over time."""

from functools import partial

import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from problems import Implementation
from problems.neural_ode import SAVES, T

kept = partial(
    partial, checkpoint, use_reentrant=False, preserve_rng_state=False
)  # kept(step) tapes its arguments alone


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


def rk4(theta, data, size, step=step):
    u, target = data["u0"], data["target"]  # (b, 2), (30, 2)
    dt = T / (SAVES - 1) / size.m
    saved = [u]
    for _ in range(SAVES - 1):
        for _ in range(size.m):
            u = step(u, dt, theta)
        saved.append(u)
    return torch.sum((torch.stack(saved) - target[:, None]) ** 2)


def rk4_checkpoint(theta, data, size):
    return rk4(theta, data, size, kept(step))


def step_inplace(u, dt, net):
    """Stages go into a sum; u may not be overwritten, the tape needs it for u^3."""
    k = f(u, **net)
    du = dt / 6 * k
    for ahead, weight in ((dt / 2, dt / 3), (dt / 2, dt / 3), (dt, dt / 6)):
        k = f(torch.add(u, k, alpha=ahead), **net)
        du.add_(k, alpha=weight)
    return du.add_(u)


def rk4_inplace(theta, data, size, step=step_inplace):
    """States go into a buffer."""
    u, target = data["u0"], data["target"]
    dt = T / (SAVES - 1) / size.m
    saved = torch.empty(SAVES, *u.shape, dtype=u.dtype, device=u.device)
    saved[0] = u
    for i in range(1, SAVES):
        for _ in range(size.m):
            u = step(u, dt, theta)
        saved[i] = u
    saved -= target[:, None]
    return saved.square().sum()


def rk4_inplace_checkpoint(theta, data, size):
    return rk4_inplace(theta, data, size, kept(step_inplace))


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs)},
    "rk4": {
        "array": Implementation(rk4, strategies={"checkpoint": rk4_checkpoint}),
        "inplace": Implementation(rk4_inplace, strategies={"checkpoint": rk4_inplace_checkpoint}),
    },
}
