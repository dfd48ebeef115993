"""The sparse losses in PyTensor: whole arrays, symbolic, K as one weight an edge (problems.sparse_loss.edges), summed by `inc`.

There is no sparse solve: LAPACK's banded Cholesky, as in Numba, JAX and PyTorch, is an Op with a rule over the solve
alone; the factor is its second output.
"""

import numpy as np
import pytensor.tensor as pt
from pytensor.graph import Apply, Op

from problems import Implementation
from problems.sparse_loss import band, cholesky, edges, substitute


def chebyshev(c, q):
    """cos(i pi x), i = 0..q-1, from c = cos(pi x): (q, 2, points) of (2, points)."""
    T = [pt.ones_like(c), c]
    for _ in range(2, q):
        T.append(2 * c * T[-1] - T[-2])
    return pt.stack(T[:q])


def conductivity(theta, mid, q):
    """k at the points mid (2, points)."""
    i = np.arange(q, dtype=theta.dtype)
    c = theta.reshape((q, q)) / (1 + i[:, None] ** 2 + i**2)
    T = chebyshev(pt.cos(np.pi * mid), q)
    return pt.exp(pt.sum((c.T @ T[:, 0]) * T[:, 1], 0))


def geometry(x, tri):
    """The weights of each triangle's three edges at k = 1 (3, triangles), the areas; x is (2, n)."""
    p0, p1, p2 = (x[:, tri[s]] for s in range(3))
    e0, e1, e2 = p2 - p1, p0 - p2, p1 - p0
    area = (e0[0] * e1[1] - e0[1] * e1[0]) / 2
    return pt.stack([pt.sum(e1 * e2, 0), pt.sum(e2 * e0, 0), pt.sum(e0 * e1, 0)]) / (4 * area), area


def stiffness(theta, x, tri, ends, edge, q):
    """K_ij of every edge; edge (3, triangles) are the edges of the triangles."""
    i, j = ends
    k = conductivity(theta, (x[:, i] + x[:, j]) / 2, q)
    weights, _ = geometry(x, tri)
    kbar = pt.mean(k[edge], 0)
    return pt.zeros_like(k)[edge].inc(kbar * weights)


def product(K, ends, w):
    """K w; its rows sum to zero."""
    i, j = ends
    flux = K * (w[j] - w[i])
    return pt.zeros_like(w)[i].inc(flux)[j].inc(-flux)


def fem_matvec(theta, data, size, work):
    ends, edge = work
    K = stiffness(theta["theta"], data["x"].T, data["tri"].T, ends, edge, size.q)
    r = product(K, ends, data["w"]) - data["b"]
    return r @ r / 2


class Substitute(Op):
    """U^-1 U^-T b, U the banded factor (inner, width + 1)."""

    __props__ = ()

    def make_node(self, U, b):
        return Apply(self, [U, b], [b.type()])

    def perform(self, node, inputs, outputs):
        outputs[0][0] = substitute(*inputs)


class Solve(Op):
    """u from K u = F over the inner nodes, K given by its edges; and the factor of K, for whoever solves again."""

    def __init__(self, band):
        self.band = band

    def make_node(self, K, F):
        return Apply(self, [K, F], [F.type(), pt.matrix(dtype=K.dtype)])

    def perform(self, node, inputs, outputs):
        K, F = inputs
        U = cholesky(K, self.band)
        outputs[0][0], outputs[1][0] = substitute(U, F), U

    def pullback(self, inputs, outputs, cotangents):
        (u, U), (i, j) = outputs, self.band.ends.T
        lam = Substitute()(U, cotangents[0])
        u0, lam0 = extend(u), extend(lam)
        return (lam0[i] - lam0[j]) * (u0[i] - u0[j]), lam


def extend(u):
    """With a slot for the boundary, where u = 0."""
    return pt.concatenate([u, pt.zeros(1, u.dtype)])


def load(x, tri, slot, n):
    """F over the n inner nodes; what falls on the boundary goes past the last."""
    area = geometry(x, tri)[1]
    return pt.zeros(n + 1, x.dtype)[pt.as_tensor(slot)[tri]].inc(area / 3)[:-1]


def fem_solve(theta, data, size, work):
    ends, edge, band = work
    x, tri = data["x"].T, data["tri"].T
    K = stiffness(theta["theta"], x, tri, ends, edge, size.q)
    u, _ = Solve(band)(K, load(x, tri, band.slot, data["inner"].type.shape[0]))
    r = extend(u)[band.slot] - data["u_star"]
    return r @ r / (2 * r.type.shape[0])


def matvec_prepare(structure, size):
    ends, edge = edges(structure["tri"])
    return ends.T, edge.T


def solve_prepare(structure, size):
    ends, edge = matvec_prepare(structure, size)
    return ends, edge, band(ends.T, structure["inner"], *structure["u_star"].shape)


IMPLEMENTATION = {
    "fem_matvec": {"array": Implementation(fem_matvec, matvec_prepare)},
    "fem_solve": {"array": Implementation(fem_solve, solve_prepare)},
}
