"""The sparse losses in CasADi: whole arrays (MX), K as one weight an edge (problems.sparse_loss.edges).

With C the incidence of nodes and edges, 1 at one end and -1 at the other, K = -C diag(K_ij) C^T: a product of sparse
matrices, as it stands here. The assembly is gathers alone, whose adjoints CasADi scatters: an edge takes from its one or
two triangles. A gather by a list is 6 times as fast as one by a sparse matrix.
"""

from typing import NamedTuple

import casadi as ca
import numpy as np

from problems import Implementation
from problems.sparse_loss import BETA, HALF_WIDTH, T0, A, box, edges, slots


class Work(NamedTuple):
    ends: list  # the two ends of every edge, each a list
    tri: list  # the vertices of every triangle, three lists
    edge: list  # the edges opposite them
    sides: list  # where an edge's two weights lie among those of the triangles (3 triangles), or one past the last
    C: ca.DM  # (n, edges)
    at: ca.DM  # (n, triangles), 1 at a triangle's vertices
    inner: list


def chebyshev(c, q):
    """cos(i pi x), i = 0..q-1, from c = cos(pi x): (points, q)."""
    T = [ca.MX.ones(*c.shape), c]
    for _ in range(2, q):
        T.append(2 * c * T[-1] - T[-2])
    return ca.horzcat(*T[:q])


def conductivity(theta, x, y, q):
    """k at points."""
    i = np.arange(q)
    c = ca.reshape(theta, q, q).T / ca.DM(1 + i[:, None] ** 2 + i**2)
    X, Y = chebyshev(ca.cos(np.pi * x), q), chebyshev(ca.cos(np.pi * y), q)
    return ca.exp(ca.sum2(ca.mtimes(X, c) * Y))


def geometry(x, y, tri):
    """The weights of each triangle's three edges at k = 1, the areas."""
    (x0, x1, x2), (y0, y1, y2) = ([a[nodes] for nodes in tri] for a in (x, y))
    e0, e1, e2 = (x2 - x1, y2 - y1), (x0 - x2, y0 - y2), (x1 - x0, y1 - y0)
    area = (e0[0] * e1[1] - e0[1] * e1[0]) / 2
    return [(a[0] * b[0] + a[1] * b[1]) / (4 * area) for a, b in ((e1, e2), (e2, e0), (e0, e1))], area


def stiffness(theta, x, y, g, work, q):
    """K_ij of every edge."""
    i, j = work.ends
    k = conductivity(theta, (x[i] + x[j]) / 2, (y[i] + y[j]) / 2, q)
    kbar = (k[work.edge[0]] + k[work.edge[1]] + k[work.edge[2]]) / 3
    weights = ca.vertcat(*(kbar * each for each in g), ca.MX.zeros(1))
    return weights[work.sides[0]] + weights[work.sides[1]]


def fem_matvec(theta, data, size, work):
    x, y = data["x"][0, :].T, data["x"][1, :].T
    g, _ = geometry(x, y, work.tri)
    K = stiffness(theta["theta"], x, y, g, work, size.q)
    r = -ca.mtimes(work.C, K * ca.mtimes(work.C.T, data["w"])) - data["b"]
    return ca.sumsqr(r) / 2


def solve(K, F, C):
    """u from K u = F, by a sparse L D L^T."""
    return ca.solve(-ca.mtimes(C, ca.mtimes(ca.diag(K), C.T)), F, "ldl")


def newton(K, F, C):
    """The same as the root of a residual, which is linear: one Newton step. The adjoint is one more solve, then a product
    with the residual's derivative, where that of ca.solve is an outer product onto the pattern of K that runs through all
    n^2 entries: the gradient is 3.6 times as fast at m = 128, 1.2 at 32, 0.6 at 8. CasADi cannot write it as C."""
    n, many = C.shape
    u, k, f = ca.MX.sym("u", n), ca.MX.sym("k", many), ca.MX.sym("f", n)
    residual = ca.mtimes(C, k * ca.mtimes(C.T, u)) + f
    problem = {"x": u, "p": ca.vertcat(k, f), "g": residual}
    return ca.rootfinder("root", "newton", problem, {"linear_solver": "ldl"})(ca.MX.zeros(n), ca.vertcat(K, F))


def fem_solve(theta, data, size, work, solve=solve):
    x, y = data["x"][0, :].T, data["x"][1, :].T
    g, area = geometry(x, y, work.tri)
    K = stiffness(theta["theta"], x, y, g, work, size.q)
    u = solve(K, ca.mtimes(work.at, area) / 3, work.C)
    return ca.sumsqr(u - data["u_star"][work.inner]) / (2 * data["u_star"].numel())  # u - u* is zero on the boundary


def fem_solve_newton(theta, data, size, work):
    return fem_solve(theta, data, size, work, newton)


def hamiltonian(positions, image, size, work):
    """Its three numbers a row, by columns."""
    i, j, _, number = work
    (x, y), (Lx, Ly), (cx, cy) = ca.horzsplit(positions.T), box(size), ca.horzsplit(image.T)
    dx, dy = x[j] - x[i] + cx * Lx, y[j] - y[i] + cy * Ly
    t = T0 * ca.exp(-BETA * (ca.sqrt(dx * dx + dy * dy) / A - 1))
    return [t[bond] for bond in number]


def row_by_row(H, near, x):
    """H x. As a sparse matrix H has the adjoint of ca.solve: 150 times the time at 16,384 sites."""
    return H[0] * x[near[0]] + H[1] * x[near[1]] + H[2] * x[near[2]]


def tight_binding(theta, data, size, work):
    return ca.sumsqr(row_by_row(hamiltonian(theta["positions"], data["image"], size, work), work.near, data["x"])) / 2


def kpm(theta, data, size, work):
    H, v = [h / HALF_WIDTH for h in hamiltonian(theta["positions"], data["image"], size, work)], data["v"]
    x, y, *h = (ca.MX.sym(name, v.numel()) for name in ("x", "y", "h0", "h1", "h2"))
    step = ca.Function(
        "step", [x, y, *h], [2 * row_by_row(h, work.near, x) - y]
    )  # a call is compiled once, an expression 63 times
    before, now = v, row_by_row(H, work.near, v)
    loss = ca.dot(v, v) ** 2 / 2
    for _ in range(1, size.K):
        loss += ca.dot(v, now) ** 2 / 2
        before, now = now, step(now, before, *H)
    return loss


class Bonds(NamedTuple):
    i: list  # the first end of every bond
    j: list  # the second
    near: list  # (3, n) the site at the other end of each bond of a site
    number: list  # (3, n) which bond that is


def lattice_prepare(structure, size):
    (i, j), (near, number, *_) = structure["bonds"].T, slots(structure["bonds"])
    return Bonds(i.tolist(), j.tolist(), near.T.tolist(), number.T.tolist())


def prepare(structure, size):
    tri, n = structure["tri"], structure["x"].shape[0]
    ends, edge = edges(tri)
    sides = np.full((2, len(ends)), edge.size)
    order = np.argsort(edge.T, axis=None)  # the weights, edge by edge
    first = np.searchsorted(edge.T.ravel()[order], np.arange(len(ends)))
    sides[0] = order[first]
    second = np.delete(order, first)
    sides[1, edge.T.ravel()[second]] = second
    inner = structure.get("inner", np.arange(n)).tolist()
    C, at = sparse(ends.T, [1.0, -1.0], n), sparse(tri.T, [1.0, 1.0, 1.0], n)
    return Work(*(a.tolist() for a in (ends.T, tri.T, edge.T, sides)), C[inner, :], at[inner, :], inner)


def sparse(rows, values, n):
    """(n, columns) with values[s] at rows[s] of every column."""
    many = rows.shape[1]
    return ca.DM.triplet(rows.ravel().tolist(), list(range(many)) * len(rows), ca.DM(np.repeat(values, many)), n, many)


IMPLEMENTATION = {
    "fem_matvec": {"mx": Implementation(fem_matvec, prepare)},
    "fem_solve": {"mx": Implementation(fem_solve, prepare, strategies={"tape": fem_solve_newton})},
    "tight_binding": {"mx": Implementation(tight_binding, lattice_prepare)},
    "kpm": {"mx": Implementation(kpm, lattice_prepare)},
}
