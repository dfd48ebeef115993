"""The valley glacier in PyTensor: whole arrays, symbolic; the temperatures are a leading axis, time is a scan.

There is no banded solve that can be differentiated: LAPACK's banded Cholesky is an Op with a rule over the semi-implicit
step's solve alone. A scan goes back through its steps from the states that it kept, so the factors are made again.
"""

import numpy as np
import pytensor
import pytensor.tensor as pt
from pytensor.graph import Apply, Op

from problems import Implementation
from problems.shallow_ice import (
    A_MAX,
    A_MIN,
    BOX,
    EPS,
    RHO_G,
    YEARS,
    cholesky,
    semi_implicit_stats,
    steps_a_year,
    substitute,
)


def avg_x(a):
    return 0.5 * (a[..., 1:, :] + a[..., :-1, :])


def avg_y(a):
    return 0.5 * (a[..., 1:] + a[..., :-1])


def diff_x(a):
    return a[..., 1:, :] - a[..., :-1, :]


def diff_y(a):
    return a[..., 1:] - a[..., :-1]


def cap(e, lo, hi):
    return pt.switch(e < lo, lo, pt.switch(e > hi, hi, e))


def diffusivity(Hc, dSx, dSy, A):
    """D on corners, (N-1, N-1)."""
    gx, gy, Hb = avg_y(dSx), avg_x(dSy), avg_x(avg_y(Hc))
    Hb2 = Hb * Hb
    return (0.4 * RHO_G**3) * A * (Hb2 * Hb2 * Hb) * (gx * gx + gy * gy + EPS)


def sia(H, B, A, dx):
    """H_t of the shallow ice approximation inside the boundary, (..., N-2, N-2); A is a number or (..., 1, 1)."""
    Hc = pt.switch(H > 0, H, 0)
    S = B + Hc
    dSx, dSy = diff_x(S) / dx, diff_y(S) / dx  # (N-1, N), (N, N-1): edges
    D = diffusivity(Hc, dSx, dSy, A)
    cx, cy = Hc[..., 1:-1] / dx, Hc[..., 1:-1, :] / dx
    ex = cap(dSx[..., 1:-1], -cx[..., :-1, :], cx[..., 1:, :])  # (N-1, N-2)
    ey = cap(dSy[..., 1:-1, :], -cy[..., :-1], cy[..., 1:])  # (N-2, N-1)
    Fx, Fy = -avg_y(D) * ex, -avg_x(D) * ey
    return -(diff_x(Fx) + diff_y(Fy)) / dx


def rhs(theta, data, size):
    A = size.A * pt.exp(theta["lnA"])
    return pt.sum(data["v"][1:-1, 1:-1] * sia(theta["H"], data["B"], A, BOX / size.N))  # nothing moves on the boundary


def fluidity(theta, T):
    """A of every temperature."""
    z = ((T + 25) / 26)[None]  # (1, temperatures)
    z = pt.softplus(theta["W1"] @ z + theta["b1"][:, None])
    z = pt.softplus(theta["W2"] @ z + theta["b2"][:, None])
    z = pt.softplus(theta["W3"] @ z + theta["b3"][:, None])
    z = theta["W4"] @ z + theta["b4"][:, None]
    return A_MIN + (A_MAX - A_MIN) * pt.sigmoid(z[0])


def step(H, B, A, dx, dt):
    """SSPRK3. What it makes of H, and nothing moves on the boundary, so H keeps it."""
    H1 = inside(H).inc(dt * sia(H, B, A, dx))
    H2 = 0.75 * H + 0.25 * inside(H1).inc(dt * sia(H1, B, A, dx))
    return (H + 2 * inside(H2).inc(dt * sia(H2, B, A, dx))) / 3


def inside(a):
    return a[..., 1:-1, 1:-1]


def ude(theta, data, size):
    B, H0, Href = data["B"], data["H0"], data["Href"]
    A, spy = fluidity(theta, data["T"])[:, None, None], steps_a_year(size)
    H = pytensor.scan(
        lambda H, B, A: step(H, B, A, BOX / size.N, 1 / spy),
        outputs_info=pt.broadcast_to(H0, Href.shape[1:]),  # (temperatures, N, N)
        non_sequences=[B, A],
        n_steps=size.years * spy,
        strict=True,
        return_updates=False,
    )
    return pt.mean((H[spy - 1 :: spy] - Href) ** 2)


def conductance(H, B, A, dx, dt):
    """dt D / dx^2 on edges, (N-1, N-2) and (N-2, N-1)."""
    S = B + H
    D = dt / dx**2 * diffusivity(H, diff_x(S) / dx, diff_y(S) / dx, A)
    return avg_y(D), avg_x(D)


def flow(Kx, Ky, S):
    """dt div(D grad S) inside, (N-2, N-2)."""
    return diff_x(Kx * diff_x(S[:, 1:-1])) + diff_y(Ky * diff_y(S[1:-1]))


class Solve(Op):
    """x inside from x - flow(x) = b, x = 0 on the boundary."""

    __props__ = ()

    def make_node(self, Kx, Ky, *b):
        return Apply(self, [Kx, Ky, *b], [a.type() for a in b])

    def perform(self, node, inputs, outputs):
        Kx, Ky, *b = inputs
        for storage, x in zip(outputs, substitute(cholesky(Kx, Ky), np.stack(b)), strict=True):
            storage[0] = x

    def pullback(self, inputs, outputs, cotangents):
        """x again and lam, with one factor."""
        (Kx, Ky, b), (xb,) = inputs, cotangents
        x, lam = self(Kx, Ky, b, xb)
        x0, lam0 = pt.pad(x, 1), pt.pad(lam, 1)
        return -diff_x(lam0[:, 1:-1]) * diff_x(x0[:, 1:-1]), -diff_y(lam0[1:-1]) * diff_y(x0[1:-1]), lam


solve = Solve()


def semi_implicit(theta, data, size):
    """The solve is an Op around LAPACK; its pullback keeps no factor, so it factorises again, and has x and lam by one."""
    B, H0, A = data["B"], theta["H0"], size.A * pt.exp(theta["lnA"])

    def step(H, B, A):
        Kx, Ky = conductance(H, B, A, BOX / size.N, YEARS / size.nst)
        H = inside(H).inc(solve(Kx, Ky, flow(Kx, Ky, B + H)))
        return pt.switch(H > 0, H, 0)

    H = pytensor.scan(
        step,
        outputs_info=pt.switch(H0 > 0, H0, 0),
        non_sequences=[B, A],
        n_steps=size.nst,
        strict=True,
        return_updates=False,
    )
    return pt.mean((H[-1] - H0) ** 2)


def again(theta, data, size):
    return semi_implicit_stats(theta, data, size, factorisations=2, solves=3)


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs)},
    "ude": {"array": Implementation(ude)},
    "semi_implicit": {"array": Implementation(semi_implicit, stats=again)},
}
