"""The valley glacier in Tangent: whole arrays, functional; the right-hand side."""

import numpy as np

from problems import Implementation
from problems.shallow_ice import BOX, EPS, RHO_G


def avg_x(a):
    return 0.5 * (a[1:] + a[:-1])


def avg_y(a):
    return 0.5 * (a[:, 1:] + a[:, :-1])


def diff_x(a):
    return a[1:] - a[:-1]


def diff_y(a):
    return a[:, 1:] - a[:, :-1]


def cap(e, lo, hi):
    return np.where(e < lo, lo, np.where(e > hi, hi, e))


def sia(H, B, A, dx):
    """H_t of the shallow ice approximation inside, (N-2, N-2)."""
    Hc = np.where(H > 0, H, 0.0)
    S = B + Hc
    dSx = diff_x(S) / dx
    dSy = diff_y(S) / dx
    gx = avg_y(dSx)
    gy = avg_x(dSy)
    Hb = avg_x(avg_y(Hc))
    D = (0.4 * RHO_G**3) * A * Hb**5 * (gx * gx + gy * gy + EPS)
    cx = Hc[:, 1:-1] / dx
    cy = Hc[1:-1] / dx
    ex = cap(dSx[:, 1:-1], -cx[:-1], cx[1:])
    ey = cap(dSy[1:-1], -cy[:, :-1], cy[:, 1:])
    return (diff_x(avg_y(D) * ex) + diff_y(avg_x(D) * ey)) / dx


def rhs(theta, data, size):
    """The arguments of sia are names: as theta["H"] it has a cotangent of the wrong shape."""
    H, B, v, lnA = theta["H"], data["B"], data["v"], theta["lnA"]
    A = size.A * np.exp(lnA)
    dx = BOX / size.N
    dH = sia(H, B, A, dx)
    return np.sum(v[1:-1, 1:-1] * dH)


IMPLEMENTATION = {"rhs": {"array": Implementation(rhs)}}
