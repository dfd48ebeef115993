"""The Brusselator in PyTensor: whole arrays, symbolic; time is a scan."""

import numpy as np
import pytensor
import pytensor.tensor as pt
from pytensor.raise_op import CheckAndRaise
from pytensor.scan import until

from problems import Diverged, Implementation
from problems.brusselator import FORCING, MOST_NEWTON, T_FORCING, clock, diverged, eigenvalues, fourier, lap_matrix


def lap(u, N):
    """The periodic five-point Laplacian of the last two axes."""
    return (pt.roll(u, 1, -2) + pt.roll(u, -1, -2) + pt.roll(u, 1, -1) + pt.roll(u, -1, -1) - 4 * u) * (N - 1) ** 2


def reaction(u, A, B, force):
    """All that is not diffusion."""
    U, V = u[0], u[1]  # a variable cannot be unpacked
    U2V = U * U * V
    return pt.stack([B + U2V - (A + 1) * U + force, A * U - U2V])


def rhs(theta, data, size):
    u, A, B, alpha = theta["u"], theta["A"], theta["B"], theta["alpha"]
    force = FORCING * data["disc"] if size.t >= T_FORCING else 0.0
    du = reaction(u, A, B, force) + alpha * lap(u, size.N)
    return pt.sum(data["v"] * du)


def misfit(u):
    return pt.sum((1 - u) ** 2) / 2


def imex(theta, data, size):
    u0, A, B, alpha, dt = theta["u0"], theta["A"], theta["B"], theta["alpha"], size.dt
    saves, every, first = clock(size)
    lam, Q = (a.astype(u0.dtype) for a in (eigenvalues(size.N), fourier(size.N)))
    z = dt * alpha * (lam[:, None] + lam)
    h = z / (1 - z)  # S - 1 in the basis Q: it is 0 for the mean, so that 300 steps do not see Q^T Q = 1 + rounding

    def diffuse(r, h):
        return r + Q @ (h * (Q.T @ r @ Q)) @ Q.T

    def step(push, U, V, A, B, h, disc):
        flow = A * U - U * U * V
        return diffuse(U + dt * (B - U - flow + push * disc), h), diffuse(V + dt * flow, h)

    forces = FORCING * (np.arange(saves * every) >= first).astype(u0.dtype)
    states = pytensor.scan(
        step, forces, [u0[0], u0[1]], [A, B, h, data["disc"]], strict=True, return_updates=False
    )  # fields one by one: products of matrices are BLAS, of stacks of them are loops
    return misfit(u0) + sum(misfit(field[every - 1 :: every]) for field in states)


def newton(update, w, inputs):
    """w - update(w, *inputs) until it stands, and once more, in which the derivative of the iteration converges."""
    tolerance = np.sqrt(np.finfo(w.dtype).eps)

    def iterate(w, last, *inputs):
        dw = update(w, *inputs)
        return [w - dw, pt.max(pt.abs(dw)) <= tolerance], until(last)

    start = [w, pt.as_tensor(np.array(False))]
    w, small = pytensor.scan(iterate, None, start, inputs, n_steps=MOST_NEWTON, strict=True, return_updates=False)
    return CheckAndRaise(Diverged, str(diverged()))(w[-1], small[-2])


def implicit(theta, data, size, work):
    """The state is a vector, U before V."""
    u0, A, B, alpha, dt = theta["u0"].ravel(), theta["A"], theta["B"], theta["alpha"], size.dt
    saves, every, first = clock(size)
    L, n = work, size.N**2
    M = np.eye(2 * n, dtype=u0.dtype) - dt * alpha * L
    k = np.arange(2 * n)
    diagonals = (
        np.concatenate([k, k]),
        np.concatenate([k, (k + n) % (2 * n)]),
    )  # of J, what U and V do to themselves, to V, U

    def update(w, r, A, M):
        U, V = w[:n], w[n:]
        gain, U2 = 2 * U * V - A, U * U
        J = M[diagonals].inc(-dt * pt.concatenate([gain - 1, -U2, U2, -gain]))
        flow = A * U - U * U * V
        return pt.linalg.solve(J, M @ w - r - dt * pt.concatenate([-U - flow, flow]))

    def step(push, u, A, B, M, disc):
        source = pt.concatenate([B + push * disc, pt.zeros_like(disc)])
        return newton(update, u, [u + dt * source, A, M])

    forces = FORCING * (np.arange(1, saves * every + 1) >= first).astype(u0.dtype)
    u = pytensor.scan(step, forces, u0, [A, B, M, data["disc"].ravel()], strict=True, return_updates=False)
    return misfit(u0) + misfit(u[every - 1 :: every])


def implicit_prepare(structure, size):
    return lap_matrix(size.N).toarray().astype(structure["u0"].dtype)


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs)},
    "imex": {"array": Implementation(imex)},
    "implicit": {"array": Implementation(implicit, implicit_prepare)},
}
