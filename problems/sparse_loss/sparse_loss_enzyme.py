"""The sparse losses in Numba for Enzyme: the very loops of the hand-written adjoint's primal.

The solve is a banded Cholesky of its own, for LAPACK's is no code that Enzyme sees: it is differentiated as it is written.
"""

import numpy as np
from numba import njit

from backends.enzyme_backend import differentiable, scratch
from problems import Implementation
from problems.sparse_loss import band, edges
from problems.sparse_loss.sparse_loss_numba import (
    BLOCK,
    coefficients,
    conductivity,
    fill,
    load,
    misfit,
    residual,
    stiffness,
)


@njit
def build(theta, x, ends, tri, edge, c, T, mid, k, K, g):
    bits = np.empty(BLOCK, np.int64)
    c[:] = 0
    coefficients(theta, c)
    conductivity(x, ends, c, T, bits, bits.view(np.float64), mid, k)
    stiffness(x, tri, edge, k, K, g)


def buffers(size, edges, triangles, dtype):
    Q = -(-size.q // 4) * 4
    shapes = (Q, Q), (2, Q, BLOCK), (2, edges), edges, edges, (triangles, 3)
    return tuple(scratch(shape, dtype) for shape in shapes)


# The product


@njit
def matvec_kernel(theta, x, w, b, mesh, buffers, r):
    ends, tri, edge = mesh
    c, T, mid, k, K, g = buffers
    build(theta, x, ends, tri, edge, c, T, mid, k, K, g)
    return residual(ends, K, w, b, r)


def fem_matvec(theta, data, size, mesh):
    theta, (ends, tri, _) = theta["theta"], mesh
    work, r = buffers(size, len(ends), len(tri), theta.dtype), scratch(data["b"].shape, theta.dtype)
    return differentiable(matvec_kernel)(theta, data["x"], data["w"], data["b"], mesh, work, r)


def matvec_prepare(structure, size):
    tri = structure["tri"]
    ends, edge = edges(tri)
    return tuple(a.astype(np.int32) for a in (ends, tri, edge))


# The solve


@njit(fastmath=True)
def solve(A, L, u):
    """u = K^-1 u, K in rows A (n, width + 1) up to the diagonal; L is its factor, in the same places."""
    n, d = len(A), A.shape[1] - 1
    for j in range(n):
        first, Lj = max(j - d, 0), L[j]
        y = u[j]
        for i in range(first, j):
            Li, total = L[i], A[j, d - j + i]
            for k in range(max(first, i - d), i):
                total -= Li[d - i + k] * Lj[d - j + k]
            Lj[d - j + i] = total / Li[d]
        total = A[j, d]
        for k in range(first, j):
            total -= Lj[d - j + k] * Lj[d - j + k]
            y -= Lj[d - j + k] * u[k]
        Lj[d] = np.sqrt(total)
        u[j] = y / Lj[d]
    for j in range(n - 1, -1, -1):
        u[j] /= L[j, d]
        for k in range(max(j - d, 0), j):
            u[k] -= L[j, d - j + k] * u[j]


@njit
def solve_kernel(theta, x, u_star, mesh, buffers, slots, A, L, u, lam):
    ends, tri, edge = mesh
    c, T, mid, k, K, g = buffers
    slot, slot_ends, slot_tri = slots
    build(theta, x, ends, tri, edge, c, T, mid, k, K, g)
    fill(slot_ends, K, A)
    load(x, tri, slot_tri, u)
    solve(A, L, u)
    return misfit(u, u_star, slot, lam)


def fem_solve(theta, data, size, work):
    mesh, slots, shape = work
    theta, (ends, tri, _) = theta["theta"], mesh
    fem = buffers(size, len(ends), len(tri), theta.dtype)
    A, L, u, lam = (scratch(n, theta.dtype) for n in (shape, shape, shape[0] + 1, shape[0] + 1))
    return differentiable(solve_kernel)(theta, data["x"], data["u_star"], mesh, fem, slots, A, L, u, lam)


def solve_prepare(structure, size):
    mesh, inner = matvec_prepare(structure, size), structure["inner"]
    b = band(mesh[0], inner, *structure["u_star"].shape)
    slots = tuple(a.astype(np.int32) for a in (b.slot, b.ends, b.slot[mesh[1]]))
    return mesh, slots, (len(inner), b.width + 1)


IMPLEMENTATION = {
    "fem_matvec": {"loops": Implementation(fem_matvec, matvec_prepare)},
    "fem_solve": {"loops": Implementation(fem_solve, solve_prepare)},
}
