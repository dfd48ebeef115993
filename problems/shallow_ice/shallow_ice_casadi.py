"""The valley glacier in CasADi: whole arrays (MX), a step is a function that is called for every glacier and step.

Fields come transposed, which the scheme does not notice: it treats x and y alike.
"""

import casadi as ca

from problems import Implementation
from problems.shallow_ice import A_MAX, A_MIN, BOX, EPS, RHO_G, steps_a_year


def avg_x(a):
    return 0.5 * (a[1:, :] + a[:-1, :])


def avg_y(a):
    return 0.5 * (a[:, 1:] + a[:, :-1])


def diff_x(a):
    return a[1:, :] - a[:-1, :]


def diff_y(a):
    return a[:, 1:] - a[:, :-1]


def cap(e, lo, hi):
    return ca.if_else(e < lo, lo, ca.if_else(e > hi, hi, e))  # fmin and fmax halve the derivative at a tie


def sia(H, B, A, dx):
    """H_t of the shallow ice approximation, (N, N); A is a number."""
    Hc = ca.if_else(H > 0, H, 0)
    S = B + Hc
    dSx, dSy = diff_x(S) / dx, diff_y(S) / dx  # (N-1, N), (N, N-1): edges
    gx, gy, Hb = avg_y(dSx), avg_x(dSy), avg_x(avg_y(Hc))  # (N-1, N-1): corners
    Hb2 = Hb * Hb
    D = (0.4 * RHO_G**3) * A * (Hb2 * Hb2 * Hb) * (gx * gx + gy * gy + EPS)
    cx, cy = Hc[:, 1:-1] / dx, Hc[1:-1, :] / dx
    ex = cap(dSx[:, 1:-1], -cx[:-1, :], cx[1:, :])  # (N-1, N-2)
    ey = cap(dSy[1:-1, :], -cy[:, :-1], cy[:, 1:])  # (N-2, N-1)
    Fx, Fy = -avg_y(D) * ex, -avg_x(D) * ey
    return pad(-(diff_x(Fx) + diff_y(Fy)) / dx)


def pad(a):
    """Nothing moves on the boundary."""
    return ca.densify(ca.diagcat(ca.MX(1, 1), a, ca.MX(1, 1)))


def rhs(theta, data, size):
    A = size.A * ca.exp(theta["lnA"])
    return ca.dot(data["v"], sia(theta["H"], data["B"], A, BOX / size.N))


def softplus(z):
    return ca.log1p(ca.exp(z))


def fluidity(theta, T):
    """A of every temperature, (1, temperatures)."""
    z = (T.T + 25) / 26
    many = z.shape[1]
    z = softplus(ca.mtimes(theta["W1"].T, z) + ca.repmat(theta["b1"], 1, many))
    z = softplus(ca.mtimes(theta["W2"].T, z) + ca.repmat(theta["b2"], 1, many))
    z = softplus(ca.mtimes(theta["W3"].T, z) + ca.repmat(theta["b3"], 1, many))
    z = ca.mtimes(theta["W4"].T, z) + ca.repmat(theta["b4"], 1, many)
    return A_MIN + (A_MAX - A_MIN) / (1 + ca.exp(-z))


def step(N, dt):
    """SSPRK3, as a function of H, B and A."""
    H, B, A, dx = ca.MX.sym("H", N, N), ca.MX.sym("B", N, N), ca.MX.sym("A"), BOX / N
    H1 = H + dt * sia(H, B, A, dx)
    H2 = 0.75 * H + 0.25 * (H1 + dt * sia(H1, B, A, dx))
    return ca.Function("step", [H, B, A], [(H + 2 * (H2 + dt * sia(H2, B, A, dx))) / 3])


def ude(theta, data, size):
    B, H0, Href = data["B"], data["H0"], ca.horzsplit(data["Href"], size.N)
    spy, loss = steps_a_year(size), 0.0
    each = step(size.N, 1 / spy)
    A = ca.horzsplit(fluidity(theta, data["T"]))
    for k in range(len(A)):
        H = H0
        for year in range(size.years):
            for _ in range(spy):
                H = each(H, B, A[k])
            loss += ca.sumsqr(H - Href[year * len(A) + k])
    return loss / (len(Href) * size.N**2)


IMPLEMENTATION = {
    "rhs": {"mx": Implementation(rhs)},
    "ude": {"mx": Implementation(ude)},
}
