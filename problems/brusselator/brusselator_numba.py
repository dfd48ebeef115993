"""The Brusselator in Numba: scalar loops, and the discrete adjoint by hand.

The periodic Laplacian is self-adjoint, so its adjoint is a gather of the cotangent, not a scatter: one pass over (u, v)
gives the loss and every block of the gradient, with <v, alpha lap u> = alpha <lap v, u>.
"""

import numpy as np
from numba import njit

from problems import Implementation
from problems.brusselator import FORCING, T_FORCING


@njit(fastmath=True)
def rhs_kernel(u, A, B, c, force, disc, v):
    N = disc.shape[0]
    loss = 0.0 * A
    for i in range(N):
        im = i - 1 if i > 0 else N - 1
        ip = i + 1 if i < N - 1 else 0
        for j in range(N):
            jm = j - 1 if j > 0 else N - 1
            jp = j + 1 if j < N - 1 else 0
            U, V = u[0, i, j], u[1, i, j]
            lapU = u[0, im, j] + u[0, ip, j] + u[0, i, jm] + u[0, i, jp] - 4 * U
            lapV = u[1, im, j] + u[1, ip, j] + u[1, i, jm] + u[1, i, jp] - 4 * V
            U2V = U * U * V
            loss += v[0, i, j] * (B + U2V - (A + 1) * U + c * lapU + force * disc[i, j])
            loss += v[1, i, j] * (A * U - U2V + c * lapV)
    return loss


@njit(fastmath=True)
def rhs_vjp_kernel(u, A, B, c, force, disc, v, ub):
    """ub = J^T v; returns the loss and the cotangents of A, B, c."""
    N = disc.shape[0]
    loss = Ab = Bb = cb = 0.0
    for i in range(N):
        im = i - 1 if i > 0 else N - 1
        ip = i + 1 if i < N - 1 else 0
        for j in range(N):
            jm = j - 1 if j > 0 else N - 1
            jp = j + 1 if j < N - 1 else 0
            U, V, p, q = u[0, i, j], u[1, i, j], v[0, i, j], v[1, i, j]
            lapp = v[0, im, j] + v[0, ip, j] + v[0, i, jm] + v[0, i, jp] - 4 * p
            lapq = v[1, im, j] + v[1, ip, j] + v[1, i, jm] + v[1, i, jp] - 4 * q
            UV, UU, d = U * V, U * U, p - q
            ub[0, i, j] = 2 * UV * d - (A + 1) * p + A * q + c * lapp
            ub[1, i, j] = UU * d + c * lapq
            Ab -= U * d
            Bb += p
            cb += lapp * U + lapq * V
            loss += UU * V * d - p * U + p * force * disc[i, j]
    return loss + A * Ab + B * Bb + c * cb, Ab, Bb, cb


def arguments(theta, data, size):
    force = FORCING if size.t >= T_FORCING else 0.0
    c = theta["alpha"][()] * (size.N - 1) ** 2
    return theta["u"], theta["A"][()], theta["B"][()], c, force, data["disc"], data["v"]


def rhs(theta, data, size, ub):
    return rhs_kernel(*arguments(theta, data, size))


def rhs_adjoint(theta, data, size, ub):
    loss, Ab, Bb, cb = rhs_vjp_kernel(*arguments(theta, data, size), ub)
    return loss, {"u": ub, "A": Ab, "B": Bb, "alpha": cb * (size.N - 1) ** 2}


def prepare(structure, size):
    return np.empty((2, size.N, size.N), structure["u"].dtype)


IMPLEMENTATION = {
    "rhs": {"loops": Implementation(rhs, prepare, strategies={"adjoint": rhs_adjoint})},
}
