"""The valley glacier in PyTensor: whole arrays, symbolic."""

import pytensor.tensor as pt

from problems import Implementation
from problems.shallow_ice import BOX, EPS, RHO_G


def avg_x(a):
    return 0.5 * (a[1:, :] + a[:-1, :])


def avg_y(a):
    return 0.5 * (a[:, 1:] + a[:, :-1])


def diff_x(a):
    return a[1:, :] - a[:-1, :]


def diff_y(a):
    return a[:, 1:] - a[:, :-1]


def cap(e, lo, hi):
    return pt.switch(e < lo, lo, pt.switch(e > hi, hi, e))


def sia(H, B, A, dx):
    """H_t of the shallow ice approximation inside the boundary, (N-2, N-2)."""
    Hc = pt.switch(H > 0, H, 0)
    S = B + Hc
    dSx, dSy = diff_x(S) / dx, diff_y(S) / dx  # (N-1, N), (N, N-1): edges
    gx, gy, Hb = avg_y(dSx), avg_x(dSy), avg_x(avg_y(Hc))  # (N-1, N-1): corners
    D = (0.4 * RHO_G**3) * A * Hb**5 * (gx * gx + gy * gy + EPS)
    cx, cy = Hc[:, 1:-1] / dx, Hc[1:-1, :] / dx
    ex = cap(dSx[:, 1:-1], -cx[:-1, :], cx[1:, :])  # (N-1, N-2)
    ey = cap(dSy[1:-1, :], -cy[:, :-1], cy[:, 1:])  # (N-2, N-1)
    Fx, Fy = -avg_y(D) * ex, -avg_x(D) * ey
    return -(diff_x(Fx) + diff_y(Fy)) / dx


def rhs(theta, data, size):
    A = size.A * pt.exp(theta["lnA"])
    return pt.sum(data["v"][1:-1, 1:-1] * sia(theta["H"], data["B"], A, BOX / size.N))  # nothing moves on the boundary


IMPLEMENTATION = {"rhs": {"array": Implementation(rhs)}}
