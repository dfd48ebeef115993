"""The neural ODE in PyTorch: dense layers on the eager tape, a Python loop over time; ode by torchdiffeq, which is imported where
it is used, so that no other task pays for it.
"""

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


# ode: the batch takes steps together


def right_hand_side(theta):
    """Of torchdiffeq, which asks for a function of t and u."""
    return lambda t, u: f(u, **theta)


def save_times(u0):
    return torch.linspace(0, T, SAVES, dtype=u0.dtype, device=u0.device)


def ode(theta, data, size):
    """Chen's Dormand and Prince (torchdiffeq), whose steps are on the tape; how they were chosen is not."""
    from torchdiffeq import odeint

    u0, tolerances = data["u0"], {"rtol": size.rtol, "atol": size.atol}
    u = odeint(right_hand_side(theta), u0, save_times(u0), method="dopri5", **tolerances)
    return torch.sum((u - data["target"][:, None]) ** 2)


def ode_compile(theta, data, size):
    """In parts it is no faster than without: the right-hand side compiled takes 1.2 to 1.5 times the time of the eager one."""
    return torch.compile(ode, dynamic=False, fullgraph=True)(theta, data, size)


def ode_backsolve(theta, data, size):
    """What the weights have of the adjoint is a quadrature, and needs no error control (Kidger et al., arXiv 2009.09457)."""
    from torchdiffeq import odeint_adjoint

    u0, tolerances = data["u0"], {"rtol": size.rtol, "atol": size.atol}
    adjoint = {"adjoint_params": tuple(theta.values()), "adjoint_options": {"norm": "seminorm"}}
    u = odeint_adjoint(right_hand_side(theta), u0, save_times(u0), method="dopri5", **tolerances, **adjoint)
    return torch.sum((u - data["target"][:, None]) ** 2)


def ode_stats(theta, data, size):
    """Of the primal; the steps are those of all members together."""
    from torchdiffeq import odeint

    found = {"steps": 0, "rejected": 0, "rhs_calls": 0}

    def count(name):
        def one(t0, u0, dt):
            found[name] += 1

        return one

    def slope(t, u):
        found["rhs_calls"] += 1
        return f(u, **theta)

    slope.callback_accept_step, slope.callback_reject_step = count("steps"), count("rejected")
    odeint(slope, data["u0"], save_times(data["u0"]), method="dopri5", rtol=size.rtol, atol=size.atol)
    return found


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs)},
    "rk4": {
        "array": Implementation(rk4, strategies={"checkpoint": rk4_checkpoint, "compile": rk4_compile}),
        "inplace": Implementation(
            rk4_inplace, strategies={"checkpoint": rk4_inplace_checkpoint, "compile": rk4_inplace_compile}
        ),
    },
    "ode": {
        "torchdiffeq-dopri5": Implementation(
            ode,
            stats=ode_stats,
            strategies={"compile": ode_compile, "backsolve": ode_backsolve},
            unsupported={
                "compile": "How many steps there are depends on numbers, so the solution is no one graph "
                "(`Unsupported: Data-dependent branching`).",
                "func": "torchdiffeq sends the time of a step through an autograd.Function of the old kind, which function "
                "transformations refuse (`RuntimeError: In order to use an autograd.Function with functorch transforms`).",
                "forward": "torchdiffeq sends the time of a step through an autograd.Function of the old kind, which function "
                "transformations refuse (`RuntimeError: In order to use an autograd.Function with functorch transforms`).",
            },
        ),
    },
}
