"""The valley glacier in CasADi: whole arrays (MX); a stage is a function, mapped over the glaciers and called in time.

Fields come transposed, which the scheme does not notice: it treats x and y alike.
"""

import casadi as ca
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
    YEARS,
    halfar_dx,
    most_iterations,
    pseudo_transient_stats,
    steps_a_year,
)


def diff_x(a):
    return a[1:, :] - a[:-1, :]


def diff_y(a):
    return a[:, 1:] - a[:, :-1]


def sum_x(a):
    return a[1:, :] + a[:-1, :]


def sum_y(a):
    return a[:, 1:] + a[:, :-1]


def cap(e, lo, hi):
    return ca.if_else(e < lo, lo, ca.if_else(e > hi, hi, e))  # fmin and fmax halve the derivative at a tie


def diffusivity(Hc, dSx, dSy, A, dx, rho_g=RHO_G):
    """D / (2 dx^2) on corners, (N-1, N-1). Sums and differences are whole: what they would be divided by goes into one
    number, because every operation is a pass over the field (1.2 times faster)."""
    gx, gy, Hb = sum_y(dSx), sum_x(dSy), sum_y(sum_x(Hc))
    Hb2 = Hb * Hb
    c = 0.4 * rho_g**3 / (4**5 * 4 * dx**2 * 2 * dx**2)
    return c * A * (Hb2 * Hb2 * Hb * (gx * gx + gy * gy + 4 * dx**2 * EPS))


def sia(H, B, A, dx):
    """H_t of the shallow ice approximation, (N, N); A is a number."""
    Hc = ca.if_else(H > 0, H, 0)
    S = B + Hc
    dSx, dSy = diff_x(S), diff_y(S)  # (N-1, N), (N, N-1): edges
    D = diffusivity(Hc, dSx, dSy, A, dx)
    cx, cy = Hc[:, 1:-1], Hc[1:-1, :]
    Fx = sum_y(D) * cap(dSx[:, 1:-1], -cx[:-1, :], cx[1:, :])  # (N-1, N-2)
    Fy = sum_x(D) * cap(dSy[1:-1, :], -cy[:, :-1], cy[:, 1:])  # (N-2, N-1)
    return pad(diff_x(Fx) + diff_y(Fy))


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


def euler(N, dt):
    """H + dt H_t of one glacier, as a function: it is compiled once, and the reverse pass keeps its arguments only."""
    H, B, A = ca.MX.sym("H", N, N), ca.MX.sym("B", N, N), ca.MX.sym("A")
    return ca.Function("euler", [H, B, A], [H + dt * sia(H, B, A, BOX / N)])


def glaciers(one, many):
    """A function of one glacier, mapped over (N, many N); the bed is common to all."""
    return one.map("glaciers", "serial", many, [1], [])


def advance(H, B, A, stage, steps):
    """SSPRK3."""
    for _ in range(steps):
        H2 = 0.75 * H + 0.25 * stage(stage(H, B, A), B, A)
        H = (H + 2 * stage(H2, B, A)) / 3
    return H


def misfit(year, A, data, size):
    B, H0, Href = data["B"], data["H0"], data["Href"]
    H, snapshots = ca.repmat(H0, 1, A.shape[1]), []
    for _ in range(size.years):
        H = year(H, B, A)
        snapshots.append(H)
    return ca.sumsqr(ca.horzcat(*snapshots) - Href) / Href.numel()


def ude(theta, data, size):
    A, spy = fluidity(theta, data["T"]), steps_a_year(size)
    stage = glaciers(euler(size.N, 1 / spy), A.shape[1])
    return misfit(lambda H, B, A: advance(H, B, A, stage, spy), A, data, size)


def ude_compile(theta, data, size):
    """One year of one glacier is a function too, which the reverse pass runs again: 1.3 times as slow at N = 32, but at
    N = 64 the C code of all stages in a row takes minutes to compile, and this 14 s."""
    N, A, spy = size.N, fluidity(theta, data["T"]), steps_a_year(size)
    one = ca.MX.sym("H", N, N), ca.MX.sym("B", N, N), ca.MX.sym("A")
    year = ca.Function("year", [*one], [advance(*one, euler(N, 1 / spy), spy)])
    return misfit(glaciers(year, A.shape[1]), A, data, size)


def conductance(H, B, A, dx, dt):
    """dt D / dx^2 on edges, (N-1, N-2) and (N-2, N-1)."""
    S = B + H
    D = diffusivity(H, diff_x(S), diff_y(S), dt * A, dx)
    return sum_y(D), sum_x(D)


def flow(Kx, Ky, S):
    """dt div(D grad S) inside, (N-2, N-2)."""
    return diff_x(Kx * diff_x(S[:, 1:-1])) + diff_y(Ky * diff_y(S[1:-1, :]))


def solve(Kx, Ky, b, C):
    """x inside from x - flow(x) = b, x = 0 on the boundary, by a sparse L D L^T: flow(x) = -C diag(K) C^T x."""
    K = ca.vertcat(ca.vec(Kx), ca.vec(Ky))
    M = ca.DM.eye(C.shape[0]) + ca.mtimes(C, ca.mtimes(ca.diag(K), C.T))
    return ca.reshape(ca.solve(M, ca.vec(b), "ldl"), *b.shape)


def implicit_step(N, dt, C):
    """H' of one glacier, as a function, like euler."""
    H, B, A = ca.MX.sym("H", N, N), ca.MX.sym("B", N, N), ca.MX.sym("A")
    Kx, Ky = conductance(H, B, A, BOX / N, dt)
    Hn = H + pad(solve(Kx, Ky, flow(Kx, Ky, B + H), C))
    return ca.Function("step", [H, B, A], [ca.if_else(Hn > 0, Hn, 0)])


def semi_implicit(theta, data, size, work):
    """The solve is a node of the graph, a sparse L D L^T of the whole grid, and its rule CasADi's own."""
    H0, A = theta["H0"], size.A * ca.exp(theta["lnA"])
    step, H = implicit_step(size.N, YEARS / size.nst, work), ca.if_else(H0 > 0, H0, 0)
    for _ in range(size.nst):
        H = step(H, data["B"], A)
    return ca.sumsqr(H - H0) / size.N**2


def semi_implicit_prepare(structure, size):
    """C, the incidence of inner nodes and edges, (N-2)^2 by 2 (N-1) (N-2): of nodes in a row, n and n - 1 share edge n."""
    n = size.N - 2
    row, one = ca.DM(np.eye(n, n + 1) - np.eye(n, n + 1, 1)), ca.DM.eye(n)
    return ca.sparsify(ca.horzcat(ca.kron(one, row), ca.kron(row, one)))


def spread(H, A, dx, rho_g):
    """H_t inside, (N-2, N-2), and D / (2 dx^2) on corners."""
    dHx, dHy = diff_x(H), diff_y(H)
    K = diffusivity(H, dHx, dHy, A, dx, rho_g)
    return diff_x(sum_y(K) * dHx[:, 1:-1]) + diff_y(sum_x(K) * dHy[1:-1, :]), K


def halfar(theta, data, size):
    N, ns, A = size.N, size.ns, HALFAR_A * ca.exp(theta["lnA"])
    H, a = ca.MX.sym("H", N, N), ca.MX.sym("a")  # a = A dt
    Hn = H + pad(spread(H, a, halfar_dx(size), HALFAR_RHO_G)[0])
    step = ca.Function("step", [H, a], [ca.if_else(Hn > 0, Hn, 0)])
    return step.fold(ns)(data["H0"], A * data["dt"].T)[N // 2, N // 2]


def iteration(size):
    """T and V after one more, and max|T' - T|, as a function; once that is below tol, the same again, which costs no
    arithmetic: a graph has no loops whose length depends on numbers."""
    N, dx = size.N, PLATE / size.N
    T, V, off, T0, A = (ca.MX.sym("x", n, n) for n in (N, N - 2, 1, N, 1))
    F, K = spread(T, A, dx, PLATE_RHO_G)
    Vn = DAMPING * V + (F - (T - T0)[1:-1, 1:-1] / DT)
    Tn = T + pad(Vn / (3 * (1 / DT + (D_MIN / dx**2 + sum_x(sum_y(K)) / 2) / CFL)))
    Tn = ca.if_else(Tn > 0, Tn, 0)
    go = ca.Function("go", [T, V, off, T0, A], [Tn, Vn, ca.norm_inf(Tn - T)])
    stay = ca.Function("stay", [T, V, off, T0, A], [T, V, off])
    again = ca.Function.if_else("again", go, stay)
    return ca.Function("iteration", [T, V, off, T0, A], again(off >= size.tol, T, V, off, T0, A))


def relax(size):
    """T at the step's end, as a function; NaN if it takes too many iterations."""
    N, once = size.N, iteration(size)
    T0, A = ca.MX.sym("T0", N, N), ca.MX.sym("A")
    T, V, off = T0, ca.MX.zeros(N - 2, N - 2), ca.MX.inf(1, 1)
    for _ in range(most_iterations(size)):
        T, V, off = once(T, V, off, T0, A)
    return ca.Function("relax", [T0, A], [T + ca.if_else(off < size.tol, 0, np.nan)])


def root(size):
    """CasADi's own Newton, which it differentiates by the implicit function theorem. T stays positive."""
    N = size.N
    x, T0, A = ca.MX.sym("x", (N - 2) ** 2), ca.MX.sym("T0", N, N), ca.MX.sym("A")
    T = T0 - pad(T0[1:-1, 1:-1]) + pad(ca.reshape(x, N - 2, N - 2))
    F, _ = spread(T, DT * A, PLATE / N, PLATE_RHO_G)
    problem = {"x": x, "p": ca.vertcat(ca.vec(T0), A), "g": x - ca.vec(T0[1:-1, 1:-1] + F)}
    find = ca.rootfinder("find", "newton", problem, {"linear_solver": "qr"})
    x = ca.reshape(find(ca.vec(T0[1:-1, 1:-1]), problem["p"]), N - 2, N - 2)
    return ca.Function("root", [T0, A], [T0 + pad(x - T0[1:-1, 1:-1])])


def pseudo_transient(theta, data, size, relax=relax):
    T = relax(size).fold(size.steps)(data["T0"], (data["A"] * ca.exp(theta["lnA"])).T)
    return ca.sumsqr(T) / (2 * size.N**2)


def pseudo_transient_root(theta, data, size):
    return pseudo_transient(theta, data, size, root)


IMPLEMENTATION = {
    "rhs": {"mx": Implementation(rhs)},
    "ude": {"mx": Implementation(ude, strategies={"compile": ude_compile})},
    "semi_implicit": {"mx": Implementation(semi_implicit, semi_implicit_prepare)},
    "halfar": {"mx": Implementation(halfar)},
    "pseudo_transient": {
        "mx": Implementation(
            pseudo_transient, stats=pseudo_transient_stats, strategies={"implicit": pseudo_transient_root}
        ),
    },
}
