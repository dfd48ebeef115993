"""The Brusselator in PyTorch: whole arrays on the eager tape."""

import torch

from problems import Implementation
from problems.brusselator import FORCING, T_FORCING


def lap(u, N):
    """The periodic five-point Laplacian of the last two axes."""
    return (u.roll(1, -2) + u.roll(-1, -2) + u.roll(1, -1) + u.roll(-1, -1) - 4 * u) * (N - 1) ** 2


def reaction(u, A, B, force):
    """All that is not diffusion."""
    U, V = u
    U2V = U * U * V
    return torch.stack([B + U2V - (A + 1) * U + force, A * U - U2V])


def rhs(theta, data, size):
    u, A, B, alpha = theta["u"], theta["A"], theta["B"], theta["alpha"]
    force = FORCING * data["disc"] if size.t >= T_FORCING else 0.0
    du = reaction(u, A, B, force) + alpha * lap(u, size.N)
    return torch.sum(data["v"] * du)


def rhs_inplace(theta, data, size):
    u, A, B, alpha = theta["u"], theta["A"], theta["B"], theta["alpha"]
    du = -4 * u
    du[:, 1:] += u[:, :-1]
    du[:, 0] += u[:, -1]
    du[:, :-1] += u[:, 1:]
    du[:, -1] += u[:, 0]
    du[:, :, 1:] += u[:, :, :-1]
    du[:, :, 0] += u[:, :, -1]
    du[:, :, :-1] += u[:, :, 1:]
    du[:, :, -1] += u[:, :, 0]
    du *= alpha * (size.N - 1) ** 2
    U, V = u
    U2V = U * U * V
    du[0] += B + U2V - (A + 1) * U
    du[1] += A * U - U2V
    if size.t >= T_FORCING:
        du[0] += FORCING * data["disc"]
    du *= data["v"]
    return du.sum()


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs), "inplace": Implementation(rhs_inplace)},
}
