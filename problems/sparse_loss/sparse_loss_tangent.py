"""The sparse losses in Tangent: whole arrays, K as one weight an edge (problems.sparse_loss.edges).

Gathers and scatters are products with constant 0/1 matrices of SciPy, as in Autograd: x[i] goes back wrong where i
repeats, and np.take goes back through np.add.at. Their rule is over the product alone. Nor is there a sparse solve: LAPACK's
banded Cholesky has a rule over the solve alone, which keeps the factor. What hangs on x alone Tangent leaves as it is.
"""

import numpy as np
import tangent
from scipy.sparse import sparray

from problems import Implementation, sparse_loss
from problems.sparse_loss import band, box, cholesky, gather, incidence, slot_matrices, substitute

tangent.utils.register_init_grad(sparray, lambda M: 0.0)  # forward mode wants a tangent of every argument


def constant(function):
    """A function of data alone, which forward mode does not enter."""
    tangent.custom_vjp(function).defjvp(lambda out, *_: tangent.init_grad(out))
    return function


@tangent.custom_vjp
def times(M, a):
    """M a, M constant and sparse."""
    return M @ a


@times.defvjp
def times_vjp(outb, out, M, a):
    return 0.0, M.T @ outb


@times.defjvp
def times_jvp(out, M, a, dM, da):
    return M @ da


def chebyshev(c, q):
    """cos(i pi x), i = 0..q-1, from c = cos(pi x): (q, 2, points) of (2, points)."""
    T = [np.ones_like(c), c]
    for _ in range(2, q):
        T.append(2 * c * T[-1] - T[-2])
    return np.stack(T[:q])


@constant
def basis(x, ends, q):
    """phi at the midpoints of the edges: its factors in x and in y, (q, edges) each."""
    i = np.arange(q, dtype=x.dtype)
    X, Y = np.moveaxis(chebyshev(np.cos(np.pi * (x[:, ends[0]] + x[:, ends[1]]) / 2), q), 1, 0)
    return X, Y, 1 + i[:, None] ** 2 + i**2


@constant
def geometry(x, tri):
    """The weights of each triangle's three edges at k = 1 (3, triangles), the areas; x is (2, n)."""
    p0, p1, p2 = (x[:, nodes] for nodes in tri)
    e0, e1, e2 = p2 - p1, p0 - p2, p1 - p0
    area = (e0[0] * e1[1] - e0[1] * e1[0]) / 2
    return np.stack([np.sum(e1 * e2, 0), np.sum(e2 * e0, 0), np.sum(e0 * e1, 0)]) / (4 * area), area


def stiffness(theta, phi, weights, gather):
    """K_ij of every edge; gather (3 triangles, edges) takes k to the edges of the triangles."""
    X, Y, scale = phi[0], phi[1], phi[2]
    c = np.reshape(theta, np.shape(scale)) / scale
    k = np.exp(np.sum(np.dot(np.transpose(c), X) * Y, 0))
    kbar = np.sum(np.reshape(times(gather, k), np.shape(weights)), 0) / 3
    return times(gather.T, np.ravel(kbar * weights))


def fem_matvec(theta, data, size, work):
    ends, gather, incidence = work[0], work[1], work[2]
    x, tri, w, b = np.transpose(data["x"]), np.transpose(data["tri"]), data["w"], data["b"]
    phi = basis(x, ends, size.q)
    weights, _ = geometry(x, tri)
    K = stiffness(theta["theta"], phi, weights, gather)
    flux = K * times(incidence.T, w)
    r = -times(incidence, flux) - b
    return np.dot(r, r) / 2


@tangent.custom_vjp
def solve(K, F, band, factor):
    """u from K u = F over the inner nodes, K given by its edges; the last slot is the boundary's, u = 0."""
    factor[:] = [cholesky(K, band)]
    return extend(substitute(factor[0], F))


def extend(u):
    return np.append(u, np.zeros(1, u.dtype))


@solve.defvjp
def solve_vjp(ub, u, K, F, band, factor):
    lam = extend(substitute(factor[0], ub[:-1]))
    i, j = band.ends.T
    return (lam[i] - lam[j]) * (u[i] - u[j]), lam[:-1], 0.0, 0.0


@solve.defjvp
def solve_jvp(u, K, F, band, factor, dK, dF, *_):
    i, j = band.ends.T
    flux = dK * (u[j] - u[i])
    dKu = np.bincount(i, flux, len(u)) - np.bincount(j, flux, len(u))
    return extend(substitute(factor[0], dF - dKu[:-1].astype(u.dtype)))


@constant
def load(x, tri, slot, n):
    """F over the n inner nodes; what falls on the boundary goes past the last."""
    _, area = geometry(x, tri)
    return np.bincount(np.ravel(slot[tri]), np.tile(area / 3, 3), n + 1)[:-1].astype(x.dtype)


def fem_solve(theta, data, size, work):
    ends, gather, band, factor = work[0], work[1], work[2], work[3]
    x, tri, inner, u_star = np.transpose(data["x"]), np.transpose(data["tri"]), data["inner"], data["u_star"]
    phi = basis(x, ends, size.q)
    weights, _ = geometry(x, tri)
    slot = band.slot
    K = stiffness(theta["theta"], phi, weights, gather)
    F = load(x, tri, slot, len(inner))  # nested in solve's call it would be assigned to a variable `load`
    u = solve(K, F, band, factor)
    r = u[slot] - u_star  # on the way back the boundary's nodes share one slot, which the solve does not read
    return np.dot(r, r) / (2 * len(r))


def hopping(x, image, along, lengths):
    """t of every bond; along (bonds, n) takes sites to differences."""
    d = times(along, x) + image * lengths
    r = np.sqrt(np.sum(d * d, 1))
    return sparse_loss.T0 * np.exp(-sparse_loss.BETA * (r / sparse_loss.A - 1))


def row_by_row(H, near, x):
    """H x; near (3 n, n) takes sites to the places of H's entries, (n, 3)."""
    return np.sum(H * np.reshape(times(near, x), np.shape(H)), 1)


def tight_binding(theta, data, size, work):
    near, number, along, lengths, x = work[0], work[1], work[2], work[3], data["x"]
    t = hopping(theta["positions"], data["image"], along, lengths)
    H = np.reshape(times(number, t), (len(x), 3))
    y = row_by_row(H, near, x)
    return np.dot(y, y) / 2


def kpm(theta, data, size, work):
    near, number, along, lengths, v = work[0], work[1], work[2], work[3], data["v"]
    t = hopping(theta["positions"], data["image"], along, lengths)
    H = np.reshape(times(number, t), (len(v), 3)) / sparse_loss.HALF_WIDTH
    before = v
    now = row_by_row(H, near, v)
    loss = np.dot(v, v) ** 2 / 2
    for _ in range(1, size.K):
        loss = loss + np.dot(v, now) ** 2 / 2
        after = 2 * row_by_row(H, near, now) - before
        before = now
        now = after
    return loss


def matvec_prepare(structure, size):
    ends, matrix = gather(structure)
    return ends, matrix, incidence(ends, *structure["w"].shape, structure["w"].dtype)


def solve_prepare(structure, size):
    ends, matrix = gather(structure)
    return ends, matrix, band(ends.T, structure["inner"], *structure["u_star"].shape), []


def lattice_prepare(structure, size):
    return *slot_matrices(structure), box(size, structure["positions"].dtype)


IMPLEMENTATION = {
    "fem_matvec": {"array": Implementation(fem_matvec, matvec_prepare)},
    "fem_solve": {"array": Implementation(fem_solve, solve_prepare)},
    "tight_binding": {"array": Implementation(tight_binding, lattice_prepare)},
    "kpm": {"array": Implementation(kpm, lattice_prepare)},
}
