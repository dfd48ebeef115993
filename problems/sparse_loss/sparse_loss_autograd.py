"""The sparse losses in Autograd: whole arrays on the tape, K as one weight an edge (problems.sparse_loss.edges).

x[i] goes back through np.add.at, and there is no scatter. So gathers and scatters are products with constant 0/1 matrices
of SciPy, made in prepare, in a primitive whose vjp is the product with the transpose. Nor is there a sparse solve: LAPACK's
banded Cholesky, as in Numba, JAX and PyTorch, is a primitive with a rule over the solve alone, which keeps the factor.
"""

import autograd.numpy as np
from autograd.extend import defvjp, primitive

from problems import Implementation
from problems.sparse_loss import (
    BETA,
    HALF_WIDTH,
    T0,
    A,
    band,
    box,
    cholesky,
    gather,
    incidence,
    slot_matrices,
    substitute,
)


@primitive
def times(M, a):
    """M a, M constant and sparse."""
    return M @ a


defvjp(times, lambda out, M, a: lambda outb: times(M.T, outb), argnums=(1,))


def coefficients(theta, q):
    i = np.arange(q, dtype=theta.dtype)
    return np.reshape(theta, (q, q)) / (1 + i[:, None] ** 2 + i**2)


def chebyshev(c, q):
    """cos(i pi x), i = 0..q-1, from c = cos(pi x): (q, 2, points) of (2, points)."""
    T = [np.ones_like(c), c]
    for _ in range(2, q):
        T.append(2 * c * T[-1] - T[-2])
    return np.array(T[:q])


def conductivity(theta, mid, q):
    """k at the points mid (2, points)."""
    T = chebyshev(np.cos(np.pi * mid), q)
    return np.exp(np.sum(np.dot(coefficients(theta, q).T, T[:, 0]) * T[:, 1], 0))


def geometry(x, tri):
    """The weights of each triangle's three edges at k = 1 (3, triangles), the areas; x is (2, n)."""
    p0, p1, p2 = (x[:, nodes] for nodes in tri)
    e0, e1, e2 = p2 - p1, p0 - p2, p1 - p0
    area = (e0[0] * e1[1] - e0[1] * e1[0]) / 2
    return np.stack([np.sum(e1 * e2, 0), np.sum(e2 * e0, 0), np.sum(e0 * e1, 0)]) / (4 * area), area


def stiffness(theta, x, tri, ends, gather, q):
    """K_ij of every edge; gather (3 triangles, edges) takes k to the edges of the triangles."""
    i, j = ends
    k = conductivity(theta, (x[:, i] + x[:, j]) / 2, q)
    weights, _ = geometry(x, tri)
    kbar = np.mean(np.reshape(times(gather, k), weights.shape), 0)
    return times(gather.T, np.ravel(kbar * weights))


def fem_matvec(theta, data, size, work):
    ends, gather, incidence = work
    K = stiffness(theta["theta"], data["x"].T, data["tri"].T, ends, gather, size.q)
    flux = K * times(incidence.T, data["w"])
    r = -times(incidence, flux) - data["b"]
    return np.dot(r, r) / 2


@primitive
def solve(K, F, band, factor):
    """u from K u = F over the inner nodes, K given by its edges; the last slot is the boundary's, u = 0."""
    factor.append(cholesky(K, band))
    return extend(substitute(factor[-1], F))


def extend(u):
    return np.append(u, np.zeros(1, u.dtype))


def solve_vjp(u, K, F, band, factor):
    i, j = band.ends.T

    def back(ub):
        lam = extend(substitute(factor[-1], ub[:-1]))
        return (lam[i] - lam[j]) * (u[i] - u[j])

    return back


defvjp(solve, solve_vjp, argnums=(0,))


def load(x, tri, slot, n):
    """F over the n inner nodes; what falls on the boundary goes past the last."""
    area = geometry(x, tri)[1]
    return np.bincount(slot[tri].ravel(), np.tile(area / 3, 3), n + 1)[:-1].astype(x.dtype)


def fem_solve(theta, data, size, work):
    ends, gather, band = work
    x, tri = data["x"].T, data["tri"].T
    K = stiffness(theta["theta"], x, tri, ends, gather, size.q)
    u = solve(K, load(x, tri, band.slot, len(data["inner"])), band, [])
    r = u[band.slot] - data["u_star"]
    return np.dot(r, r) / (2 * len(r))


def hopping(x, image, along, size):
    """t of every bond; along (bonds, n) takes sites to differences."""
    d = times(along, x) + image * box(size, image.dtype)
    return T0 * np.exp(-BETA * (np.sqrt(np.sum(d * d, 1)) / A - 1))


def row_by_row(H, near, x):
    """H x; near (3 n, n) takes sites to the places of H's entries, (n, 3)."""
    return np.sum(H * np.reshape(times(near, x), H.shape), 1)


def tight_binding(theta, data, size, work):
    near, number, along = work
    H = np.reshape(times(number, hopping(theta["positions"], data["image"], along, size)), (-1, 3))
    y = row_by_row(H, near, data["x"])
    return np.dot(y, y) / 2


def kpm(theta, data, size, work):
    (near, number, along), v = work, data["v"]
    H = np.reshape(times(number, hopping(theta["positions"], data["image"], along, size)), (-1, 3)) / HALF_WIDTH
    before, now = v, row_by_row(H, near, v)
    loss = np.dot(v, v) ** 2 / 2
    for _ in range(1, size.K):
        loss = loss + np.dot(v, now) ** 2 / 2
        before, now = now, 2 * row_by_row(H, near, now) - before
    return loss


def matvec_prepare(structure, size):
    ends, matrix = gather(structure)
    return ends, matrix, incidence(ends, *structure["w"].shape, structure["w"].dtype)


def solve_prepare(structure, size):
    ends, matrix = gather(structure)
    return ends, matrix, band(ends.T, structure["inner"], *structure["u_star"].shape)


def lattice_prepare(structure, size):
    return slot_matrices(structure)


IMPLEMENTATION = {
    "fem_matvec": {"array": Implementation(fem_matvec, matvec_prepare)},
    "fem_solve": {"array": Implementation(fem_solve, solve_prepare)},
    "tight_binding": {"array": Implementation(tight_binding, lattice_prepare)},
    "kpm": {"array": Implementation(kpm, lattice_prepare)},
}
