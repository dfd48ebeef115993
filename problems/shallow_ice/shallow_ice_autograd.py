"""The valley glacier in Autograd: whole arrays on the tape; the temperatures are a leading axis.

There is no sparse solve: LAPACK's banded Cholesky is a primitive with a rule over the semi-implicit step's solve alone,
which keeps the factor.
"""

import autograd.numpy as np
from autograd.extend import defvjp_argnums, primitive
from autograd.tracer import getval

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
    YEARS,
    cholesky,
    diverged,
    halfar_dx,
    most_iterations,
    pseudo_transient_stats,
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
    return np.where(e < lo, lo, np.where(e > hi, hi, e))  # np.clip has no derivative in its bounds here


def diffusivity(Hc, dSx, dSy, A, rho_g=RHO_G):
    """D on corners, (N-1, N-1)."""
    gx, gy, Hb = avg_y(dSx), avg_x(dSy), avg_x(avg_y(Hc))
    Hb2 = Hb * Hb
    return (0.4 * rho_g**3) * A * (Hb2 * Hb2 * Hb) * (gx * gx + gy * gy + EPS)


def sia(H, B, A, dx):
    """H_t of the shallow ice approximation, (..., N, N); A is a number or (..., 1, 1)."""
    Hc = np.where(H > 0, H, 0.0)
    S = B + Hc
    dSx, dSy = diff_x(S) / dx, diff_y(S) / dx  # (N-1, N), (N, N-1): edges
    D = diffusivity(Hc, dSx, dSy, A)
    cx, cy = Hc[..., 1:-1] / dx, Hc[..., 1:-1, :] / dx
    ex = cap(dSx[..., 1:-1], -cx[..., :-1, :], cx[..., 1:, :])  # (N-1, N-2)
    ey = cap(dSy[..., 1:-1, :], -cy[..., :-1], cy[..., 1:])  # (N-2, N-1)
    Fx, Fy = -avg_y(D) * ex, -avg_x(D) * ey
    return pad(-(diff_x(Fx) + diff_y(Fy)) / dx)


def pad(a):
    """Nothing moves on the boundary."""
    return np.pad(a, [(0, 0)] * (a.ndim - 2) + [(1, 1), (1, 1)], "constant")


def rhs(theta, data, size):
    A = size.A * np.exp(theta["lnA"])
    return np.sum(data["v"] * sia(theta["H"], data["B"], A, BOX / size.N))


def softplus(z):
    return np.logaddexp(0, z)


def fluidity(theta, T):
    """A of every temperature."""
    z = ((T + 25) / 26)[None]  # (1, temperatures)
    z = softplus(np.dot(theta["W1"], z) + theta["b1"][:, None])
    z = softplus(np.dot(theta["W2"], z) + theta["b2"][:, None])
    z = softplus(np.dot(theta["W3"], z) + theta["b3"][:, None])
    z = np.dot(theta["W4"], z) + theta["b4"][:, None]
    return A_MIN + (A_MAX - A_MIN) / (1 + np.exp(-z[0]))


def step(H, B, A, dx, dt):
    """SSPRK3."""
    H1 = H + dt * sia(H, B, A, dx)
    H2 = 0.75 * H + 0.25 * (H1 + dt * sia(H1, B, A, dx))
    return (H + 2 * (H2 + dt * sia(H2, B, A, dx))) / 3


def ude(theta, data, size):
    B, H0, Href = data["B"], data["H0"], data["Href"]
    A = fluidity(theta, data["T"])[:, None, None]
    H = np.broadcast_to(H0, Href.shape[1:])  # (temperatures, N, N)
    spy, loss = steps_a_year(size), 0.0
    for year in range(size.years):
        for _ in range(spy):
            H = step(H, B, A, BOX / size.N, 1 / spy)
        loss = loss + np.sum((H - Href[year]) ** 2)
    return loss / Href.size


def conductance(H, B, A, dx, dt, rho_g=RHO_G):
    """dt D / dx^2 on edges, (N-1, N-2) and (N-2, N-1)."""
    S = B + H
    D = dt / dx**2 * diffusivity(H, diff_x(S) / dx, diff_y(S) / dx, A, rho_g)
    return avg_y(D), avg_x(D)


def flow(Kx, Ky, S):
    """dt div(D grad S) inside, (N-2, N-2)."""
    return diff_x(Kx * diff_x(S[..., 1:-1])) + diff_y(Ky * diff_y(S[..., 1:-1, :]))


@primitive
def solve(Kx, Ky, b, factor):
    """x inside from x - flow(x) = b, x = 0 on the boundary."""
    factor.append(cholesky(Kx, Ky))
    return substitute(factor[-1], b)


def solve_vjp(argnums, x, args, kwargs):
    """Of Kx, Ky and b together: one solve."""
    factor, x0 = args[3][-1], pad(x)

    def back(xb):
        lam = substitute(factor, xb)
        lam0 = pad(lam)
        Kxb = -diff_x(lam0[:, 1:-1]) * diff_x(x0[:, 1:-1])
        return Kxb, -diff_y(lam0[1:-1]) * diff_y(x0[1:-1]), lam

    return back


defvjp_argnums(solve, solve_vjp)


def semi_implicit(theta, data, size):
    """The solve is a primitive around LAPACK, whose vjp keeps the factor."""
    B, H0, A = data["B"], theta["H0"], size.A * np.exp(theta["lnA"])
    H = np.where(H0 > 0, H0, 0.0)
    for _ in range(size.nst):
        Kx, Ky = conductance(H, B, A, BOX / size.N, YEARS / size.nst)
        H = H + pad(solve(Kx, Ky, flow(Kx, Ky, B + H), []))
        H = np.where(H > 0, H, 0.0)
    return np.mean((H - H0) ** 2)


def halfar(theta, data, size):
    H, A, dx = data["H0"], HALFAR_A * np.exp(theta["lnA"]), halfar_dx(size)
    for dt in data["dt"]:
        H = H + pad(flow(*conductance(H, 0.0, A, dx, dt, HALFAR_RHO_G), H))
        H = np.where(H > 0, H, 0.0)
    return H[size.N // 2, size.N // 2]


def relax(T0, A, size):
    """T at the step's end."""
    dx = PLATE / size.N
    T, V = T0, 0.0
    for _ in range(most_iterations(size)):
        Kx, Ky = conductance(T, 0.0, A, dx, 1.0, PLATE_RHO_G)
        V = DAMPING * V + (flow(Kx, Ky, T) - (T - T0)[1:-1, 1:-1] / DT)
        last, T = T, T + pad(V / (1 / DT + (D_MIN / dx**2 + avg_x(Kx)) / CFL) / 3)
        T = np.where(T > 0, T, 0.0)
        if np.max(np.abs(getval(T) - getval(last))) < size.tol:
            return T
    raise diverged(size)


def pseudo_transient(theta, data, size):
    T, A = data["T0"], data["A"] * np.exp(theta["lnA"])
    for n in range(size.steps):
        T = relax(T, A[n], size)
    return np.mean(T * T) / 2


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs)},
    "ude": {"array": Implementation(ude)},
    "semi_implicit": {"array": Implementation(semi_implicit)},
    "halfar": {"array": Implementation(halfar)},
    "pseudo_transient": {"array": Implementation(pseudo_transient, stats=pseudo_transient_stats)},
}
