"""The valley glacier in Tangent: whole arrays, functional; the temperatures are a leading axis."""

from typing import NamedTuple

import numpy as np

from problems import Implementation
from problems.shallow_ice import (
    A_MAX,
    A_MIN,
    BOX,
    CFL,
    D_MIN,
    DAMPING,
    DT,
    EPS,
    HALFAR_A,
    HALFAR_RHO_G,
    PLATE,
    PLATE_RHO_G,
    RHO_G,
    halfar_dx,
    most_iterations,
    steps_a_year,
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


def diffusivity(dHx, dHy, H, A, rho_g):
    """D on corners, (N-1, N-1)."""
    gx = avg_y(dHx)
    gy = avg_x(dHy)
    Hb = avg_x(avg_y(H))
    Hb2 = Hb * Hb
    return (0.4 * rho_g**3) * A * (Hb2 * Hb2 * Hb) * (gx * gx + gy * gy + EPS)


def spread(H, A, dx):
    """H after a step of dt in ice of the fluidity A / dt; nothing moves on the boundary."""
    dHx = diff_x(H) / dx
    dHy = diff_y(H) / dx
    D = diffusivity(dHx, dHy, H, A, HALFAR_RHO_G)
    dH = (diff_x(avg_y(D) * dHx[:, 1:-1]) + diff_y(avg_x(D) * dHy[1:-1])) / dx
    Hn = H + np.pad(dH, ((1, 1), (1, 1)))
    return np.where(Hn > 0, Hn, 0.0)


class HalfarWork(NamedTuple):
    dx: float
    middle: int


def halfar(theta, data, size, work):
    lnA, H, dt = theta["lnA"], data["H0"], data["dt"]
    A = HALFAR_A * np.exp(lnA)
    for n in range(size.ns):
        a = A * dt[n]
        H = spread(H, a, work.dx)
    return H[work.middle, work.middle]


def halfar_prepare(structure, size):
    return HalfarWork(halfar_dx(size), size.N // 2)


class PlateWork(NamedTuple):
    dx: float
    least: float  # 1 / 3 dtau where nothing diffuses
    per_D: float
    most: int  # iterations
    zero: np.ndarray  # (N-2, N-2): V at first


def pseudo_transient(theta, data, size, work):
    lnA, T, A0 = theta["lnA"], data["T0"], data["A"]
    A = A0 * np.exp(lnA)
    for n in range(size.steps):
        An = A[n]
        T0 = T
        V = work.zero
        off = 1.0
        k = 0
        while off >= size.tol and k < work.most:
            dTx = diff_x(T) / work.dx
            dTy = diff_y(T) / work.dx
            D = diffusivity(dTx, dTy, T, An, PLATE_RHO_G)
            F = (diff_x(avg_y(D) * dTx[:, 1:-1]) + diff_y(avg_x(D) * dTy[1:-1])) / work.dx
            dT = T - T0
            V = DAMPING * V + (F - dT[1:-1, 1:-1] / DT)
            rate = work.least + work.per_D * avg_x(avg_y(D))
            Tn = T + np.pad(V / (3 * rate), ((1, 1), (1, 1)))
            last = T
            T = np.where(Tn > 0, Tn, 0.0)
            off = np.max(np.abs(T - last))
            k = k + 1
        if off >= size.tol:
            T = np.nan * T
    return np.mean(T * T) / 2


def pseudo_transient_prepare(structure, size):
    dx = PLATE / size.N
    zero = np.zeros((size.N - 2, size.N - 2), structure["T0"].dtype)
    return PlateWork(dx, 1 / DT + D_MIN / dx**2 / CFL, 1 / dx**2 / CFL, most_iterations(size), zero)


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
    "halfar": {
        "array": Implementation(
            halfar,
            halfar_prepare,
            unsupported={
                "forward": 'Tangent\'s forward mode takes no slice beside another index (`has no annotation "func"`).'
            },
        )
    },
    "pseudo_transient": {
        "array": Implementation(
            pseudo_transient,
            pseudo_transient_prepare,
            unsupported={
                "forward": 'Tangent\'s forward mode takes no slice beside another index (`has no annotation "func"`).'
            },
        )
    },
}
