"""The valley glacier in Tangent: whole arrays, functional; the temperatures are a leading axis."""

import numpy as np

from problems import Implementation
from problems.shallow_ice import A_MAX, A_MIN, BOX, EPS, RHO_G, steps_a_year


def avg_x(a):
    return 0.5 * (a[..., 1:, :] + a[..., :-1, :])


def avg_y(a):
    return 0.5 * (a[..., 1:] + a[..., :-1])


def diff_x(a):
    return a[..., 1:, :] - a[..., :-1, :]


def diff_y(a):
    return a[..., 1:] - a[..., :-1]


def cap(e, lo, hi):
    return np.where(e < lo, lo, np.where(e > hi, hi, e))


def sia(H, B, A, dx):
    """H_t of the shallow ice approximation inside, (..., N-2, N-2); A is a number or (..., 1, 1)."""
    Hc = np.where(H > 0, H, 0.0)
    S = B + Hc
    dSx = diff_x(S) / dx
    dSy = diff_y(S) / dx
    gx = avg_y(dSx)
    gy = avg_x(dSy)
    Hb = avg_x(avg_y(Hc))
    Hb2 = Hb * Hb
    D = (0.4 * RHO_G**3) * A * (Hb2 * Hb2 * Hb) * (gx * gx + gy * gy + EPS)
    cx = Hc[..., 1:-1] / dx
    cy = Hc[..., 1:-1, :] / dx
    ex = cap(dSx[..., 1:-1], -cx[..., :-1, :], cx[..., 1:, :])
    ey = cap(dSy[..., 1:-1, :], -cy[..., :-1], cy[..., 1:])
    return (diff_x(avg_y(D) * ex) + diff_y(avg_x(D) * ey)) / dx


def rhs(theta, data, size):
    """The arguments of sia are names: as theta["H"] it has a cotangent of the wrong shape."""
    H, B, v, lnA = theta["H"], data["B"], data["v"], theta["lnA"]
    A = size.A * np.exp(lnA)
    dx = BOX / size.N
    dH = sia(H, B, A, dx)
    return np.sum(v[1:-1, 1:-1] * dH)


def softplus(z):
    return np.log1p(np.exp(z))


def fluidity(theta, T):
    """A of every temperature."""
    z0 = np.reshape((T + 25) / 26, (1, -1))  # (1, temperatures)
    z1 = softplus(np.dot(theta["W1"], z0) + theta["b1"][:, None])
    z2 = softplus(np.dot(theta["W2"], z1) + theta["b2"][:, None])
    z3 = softplus(np.dot(theta["W3"], z2) + theta["b3"][:, None])
    z4 = np.dot(theta["W4"], z3) + theta["b4"][:, None]
    return A_MIN + (A_MAX - A_MIN) / (1 + np.exp(-z4[0]))


def move(H, B, A, dx, dt):
    """dt H_t; nothing moves on the boundary."""
    return np.pad(dt * sia(H, B, A, dx), ((0, 0), (1, 1), (1, 1)))


def step(H, B, A, dx, dt):
    """SSPRK3."""
    H1 = H + move(H, B, A, dx, dt)
    H2 = 0.75 * H + 0.25 * (H1 + move(H1, B, A, dx, dt))
    return (H + 2 * (H2 + move(H2, B, A, dx, dt))) / 3


def ude(theta, data, size, spy):
    B, H0, Href, T = data["B"], data["H0"], data["Href"], data["T"]
    A = np.reshape(fluidity(theta, T), (-1, 1, 1))
    dx = BOX / size.N
    dt = 1 / spy
    H = np.broadcast_to(H0, Href.shape[1:])  # (temperatures, N, N)
    loss = 0.0
    for year in range(size.years):
        for _ in range(spy):
            H = step(H, B, A, dx, dt)
        loss = loss + np.sum((H - Href[year]) ** 2)
    return loss / Href.size


def ude_prepare(structure, size):
    return steps_a_year(size)


IMPLEMENTATION = {
    "rhs": {
        "array": Implementation(
            rhs,
            unsupported={
                "forward": 'Tangent\'s forward mode takes no slice beside another index (`has no annotation "func"`).'
            },
        )
    },
    "ude": {
        "array": Implementation(
            ude,
            ude_prepare,
            unsupported={
                "forward": 'Tangent\'s forward mode takes no slice beside another index (`has no annotation "func"`).'
            },
        )
    },
}
