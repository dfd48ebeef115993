"""An expensive sparse build, then one product or one solve, then a scalar: diffusion in P1 finite elements (the thread's
last question; the elements are those of Strang and Fix, An Analysis of the Finite Element Method, 1973).

    -div(k grad u) = 1 on the unit square, u = 0 on its boundary
    k(x, y) = exp(sum_ij theta_(q i + j) phi_ij), phi_ij = cos(i pi x) cos(j pi y) / (1 + i^2 + j^2), i, j = 0..q-1

Mesh: (m + 1)^2 nodes at (i/m, j/m), number i (m + 1) + j; the inner ones are shifted by 0.25/m gold(2 (m + 1)^2), first
all in x, then all in y. Each square a = (i, j), b = (i + 1, j), c = (i + 1, j + 1), d = (i, j + 1) is two triangles:
[a, b, c] of all squares, then [a, c, d] of all. A triangle p0 p1 p2 has the edges e0 = p2 - p1, e1 = p0 - p2,
e2 = p1 - p0, kbar is the mean of k at their midpoints:

    K_e = kbar (e_i . e_j) / (4 area), summed into K over all nodes;    load F_i = sum of area / 3

K is symmetric and its rows sum to zero; over the inner nodes it is positive definite. theta = gold(q^2), the data are
made at theta* = 2 gold(q^2, 101). All is dimensionless.

Tasks
    fem_matvec    |K w - b|^2 / 2 over all nodes, w = gold(n, 7), b = K(theta*) w: gradient r^T (dK) w, r = K w - b.
    fem_solve     |u - u*|^2 / (2 n), n all nodes, K u = F over the inner nodes, u* the solution at theta*: gradient
                  -lam^T (dK) u with K lam = (u - u*) / n.

What they ask of AD: sums scattered through index arrays into a sparse type that most tools do not know; whatever hangs
on coordinates or theta is computed in the call, so the tape holds the whole build. The adjoint of the solve is a second
solve with the same factors: whoever differentiates through a factorisation or through conjugate gradients pays for it.
Most libraries have no sparse solve that they can differentiate, and JAX's is slow. Outside CasADi the solve is therefore
one operation with a rule over the solve alone, whatever the strategy: reverse, tape or forward is then AD of the assembly
before it and of the loss behind it. In JAX, reverse transposes the jvp of the solve; custom_rule has its vjp written out.
"""

from typing import NamedTuple

import numpy as np
from scipy.linalg import LinAlgError, get_lapack_funcs
from scipy.sparse import coo_array, csc_array, csr_array
from scipy.sparse.linalg import splu

from problems import Task, gold


class Fem(NamedTuple):
    m: int
    q: int = 4


def mesh(m):
    """Nodes (n, 2), triangles (2 m^2, 3), the numbers of the inner nodes ((m - 1)^2)."""
    i, j = np.meshgrid(np.arange(m + 1), np.arange(m + 1), indexing="ij")
    x = np.stack([i, j], -1) / m
    shift = 0.25 / m * gold(2 * (m + 1) ** 2).reshape(2, m + 1, m + 1)
    x[1:-1, 1:-1] += np.moveaxis(shift, 0, -1)[1:-1, 1:-1]
    node = np.arange((m + 1) ** 2).reshape(m + 1, m + 1)
    a, b, c, d = node[:-1, :-1].ravel(), node[1:, :-1].ravel(), node[1:, 1:].ravel(), node[:-1, 1:].ravel()
    tri = np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])
    return x.reshape(-1, 2), tri, node[1:-1, 1:-1].ravel()


def matvec_inputs(size):
    x, tri, _ = mesh(size.m)
    w = gold(len(x), 7)
    b = stiffness(2 * gold(size.q**2, 101), x, tri, size.q) @ w
    return {"theta": gold(size.q**2)}, {"x": x, "tri": tri, "w": w, "b": b}


def solve_inputs(size):
    x, tri, inner = mesh(size.m)
    u_star = solution(2 * gold(size.q**2, 101), x, tri, inner, size.q)
    return {"theta": gold(size.q**2)}, {"x": x, "tri": tri, "inner": inner, "u_star": u_star}


def pattern(tri):
    """CSR pattern of K from the triangles alone, and the slot in it of each entry of each K_e, (triangles, 3, 3)."""
    n = tri.max() + 1
    keys = tri[:, :, None] * n + tri[:, None, :]  # row n + column
    keys, slot = np.unique(keys, return_inverse=True)
    indptr = np.searchsorted(keys, n * np.arange(n + 1))
    return indptr, keys % n, slot.reshape(len(tri), 3, 3)


def edges(tri):
    """The mesh's edges (edges, 2) and the edge opposite each vertex of each triangle (triangles, 3): integers alone.

    Implementations evaluate k once an edge, not once a triangle and edge, and hold K as a weight K_ij an edge: the rows
    of K sum to zero, so that is all of K, with (K w)_i = sum_j K_ij (w_j - w_i).
    """
    n = tri.max() + 1
    ends = np.sort(np.stack([tri[:, [1, 2, 0]], tri[:, [2, 0, 1]]], -1), -1)
    keys, edge = np.unique(ends[..., 0] * n + ends[..., 1], return_inverse=True)
    return np.stack([keys // n, keys % n], -1), edge.reshape(len(tri), 3)


def gather(structure):
    """The ends of the edges (2, edges), and the 0/1 matrix (3 triangles, edges) that takes what lies on edges to the edges
    of the triangles; its transpose scatters. For libraries that differentiate a product, and no index array."""
    ends, edge = edges(structure["tri"])
    where = edge.T.ravel()
    one = np.ones(len(where), structure["x"].dtype)
    return ends.T, csr_array((one, (np.arange(len(where)), where)), (len(where), len(ends)))


def incidence(structure, ends):
    """(n, edges): its transpose takes nodes to differences along edges."""
    (i, j), number, one = ends, np.arange(len(ends[0])), np.ones(len(ends[0]), structure["w"].dtype)
    where = np.concatenate([j, i]), np.concatenate([number, number])
    return csr_array((np.concatenate([one, -one]), where), (structure["w"].shape[0], len(number)))


class Band(NamedTuple):
    """Where K over the inner nodes lies in LAPACK's upper band storage, an (inner, width + 1) array in C order."""

    slot: np.ndarray  # (n) the place of a node among the inner ones, on the boundary one past the last
    ends: np.ndarray  # (edges, 2) in slots
    between: np.ndarray  # the edges between inner nodes
    places: np.ndarray  # where their weights lie
    width: int  # about m, because the inner nodes are numbered row by row


def band(ends, inner, n):
    """Integers alone, like edges."""
    slot = np.full(n, len(inner))
    slot[inner] = np.arange(len(inner))
    i, j = np.sort(slot[ends], 1).T
    between = np.flatnonzero(j < len(inner))
    i, j = i[between], j[between]
    width = int(max(j - i, default=0))
    return Band(slot, slot[ends], between, j * (width + 1) + width + i - j, width)


def cholesky(K, band):
    """The banded Cholesky factor, (inner, width + 1), from the weights of the edges (LAPACK's pbtrf)."""
    diagonal = -np.bincount(band.ends.ravel(), np.repeat(K, 2))[:-1]
    U = np.zeros((len(diagonal), band.width + 1), K.dtype)
    U.reshape(-1)[band.places] = K[band.between]
    U[:, band.width] = diagonal
    U, info = get_lapack_funcs("pbtrf", (U,))(U.T, overwrite_ab=True)
    if info:
        raise LinAlgError("K is not positive definite")
    return U.T


def substitute(U, b):
    """K^-1 b from the factor of K, b (inner) or (inner, many)."""
    return get_lapack_funcs("pbtrs", (U,))(U.T, b)[0]


def factorise(K):
    """Sparse LU of a symmetric positive definite matrix; it may be complex (symmetric) under complex step."""
    options = {"SymmetricMode": True, "Equil": False}
    return splu(K, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)


# array: whole arrays, functional


def conductivity(theta, x, y, q):
    """k at points of any shape. The sum is separable: q^2 products a point, but only 2 q cosines."""
    i = np.arange(q, dtype=x.dtype)
    c = theta.reshape(q, q) / (1 + i[:, None] ** 2 + i**2)
    X, Y = np.cos(np.pi * x[..., None] * i), np.cos(np.pi * y[..., None] * i)
    return np.exp(np.sum((X @ c) * Y, -1))


def geometry(x, tri):
    """Edges (triangles, 3, 2), areas (triangles), midpoints of the edges (triangles, 3, 2)."""
    p = x[tri]
    p1, p2 = p[:, [1, 2, 0]], p[:, [2, 0, 1]]
    e = p2 - p1
    return e, (e[:, 0, 0] * e[:, 1, 1] - e[:, 0, 1] * e[:, 1, 0]) / 2, (p1 + p2) / 2


def stiffness(theta, x, tri, q):
    """K over all nodes, CSR."""
    e, area, mid = geometry(x, tri)
    kbar = conductivity(theta, mid[..., 0], mid[..., 1], q).mean(1)
    Ke = (kbar / (4 * area))[:, None, None] * (e @ e.transpose(0, 2, 1))
    rows, columns = np.repeat(tri, 3, 1).ravel(), np.tile(tri, 3).ravel()
    return coo_array((Ke.ravel(), (rows, columns)), (len(x), len(x))).tocsr()


def load(x, tri):
    F = np.zeros(len(x), x.dtype)
    np.add.at(F, tri, geometry(x, tri)[1][:, None] / 3)
    return F


def solution(theta, x, tri, inner, q):
    """u at all nodes, zero on the boundary."""
    K = stiffness(theta, x, tri, q)
    u = np.zeros(len(x), K.dtype)
    u[inner] = factorise(K[inner][:, inner].tocsc()).solve(load(x, tri)[inner].astype(K.dtype))
    return u


def fem_matvec(theta, data, size):
    r = stiffness(theta["theta"], data["x"], data["tri"], size.q) @ data["w"] - data["b"]
    return np.sum(r * r) / 2


def fem_solve(theta, data, size):
    r = solution(theta["theta"], data["x"], data["tri"], data["inner"], size.q) - data["u_star"]
    return np.sum(r * r) / (2 * len(r))


# inplace: slices and buffers mutated


def stiffness_inplace(theta, x, tri, q):
    """CSR of K, its data accumulated in place; one column of edges after another."""
    indptr, indices, slot = pattern(tri)
    i = np.arange(q, dtype=x.dtype)
    c = theta.reshape(q, q) / (1 + i[:, None] ** 2 + i**2)
    e = np.empty((3, 2, len(tri)), x.dtype)
    kbar = np.zeros(len(tri), theta.dtype)
    k = np.empty(len(tri), theta.dtype)
    for s in range(3):
        p1, p2 = x[tri[:, (s + 1) % 3]], x[tri[:, (s + 2) % 3]]
        e[s] = (p2 - p1).T
        mid = np.pi * (p1 + p2) / 2
        k[:] = 0
        for a in range(q):
            X = np.cos(a * mid[:, 0])
            for b in range(q):
                k += c[a, b] * (X * np.cos(b * mid[:, 1]))
        np.exp(k, out=k)
        kbar += k
    kbar /= 3
    kbar /= 2 * (e[0, 0] * e[1, 1] - e[0, 1] * e[1, 0])  # 4 area
    values = np.zeros(len(indices), theta.dtype)
    for s in range(3):
        for t in range(3):
            np.add.at(values, slot[:, s, t], kbar * (e[s, 0] * e[t, 0] + e[s, 1] * e[t, 1]))
    return values, indices, indptr


def load_inplace(x, tri):
    F = np.zeros(len(x), x.dtype)
    p0 = x[tri[:, 0]]
    e1, e2 = p0 - x[tri[:, 2]], x[tri[:, 1]] - p0
    area = e1[:, 0] * e2[:, 1]
    area -= e1[:, 1] * e2[:, 0]
    area /= 6
    for s in range(3):
        np.add.at(F, tri[:, s], area)
    return F


def inner_columns(values, indices, indptr, inner):
    """The rows and columns of the inner nodes, CSC (K is symmetric, so its rows are its columns)."""
    K = csr_array((values, indices, indptr))[inner][:, inner]
    return csc_array((K.data, K.indices, K.indptr))


def fem_matvec_inplace(theta, data, size):
    r = csr_array(stiffness_inplace(theta["theta"], data["x"], data["tri"], size.q)) @ data["w"]
    r -= data["b"]
    r *= r
    return r.sum() / 2


def fem_solve_inplace(theta, data, size):
    x, tri, inner = data["x"], data["tri"], data["inner"]
    values, indices, indptr = stiffness_inplace(theta["theta"], x, tri, size.q)
    K = inner_columns(values, indices, indptr, inner)
    r = np.zeros(len(x), values.dtype)
    r[inner] = factorise(K).solve(load_inplace(x, tri)[inner].astype(values.dtype))
    r -= data["u_star"]
    r *= r
    return r.sum() / (2 * len(r))


# loops: scalar loops, mutated


def stiffness_loops(theta, x, tri, q):
    """CSR of K and the load F, triangle by triangle."""
    indptr, indices, slot = pattern(tri)
    values = np.zeros(len(indices), theta.dtype)
    F = np.zeros(len(x), x.dtype)
    e = np.empty((3, 2), x.dtype)
    for t in range(len(tri)):
        kbar = 0.0
        for s in range(3):
            p1, p2 = x[tri[t, (s + 1) % 3]], x[tri[t, (s + 2) % 3]]
            for d in range(2):
                e[s, d] = p2[d] - p1[d]
            px, py = np.pi * (p1[0] + p2[0]) / 2, np.pi * (p1[1] + p2[1]) / 2
            logk = 0.0
            for i in range(q):
                for j in range(q):
                    logk += theta[q * i + j] * np.cos(i * px) * np.cos(j * py) / (1 + i * i + j * j)
            kbar += np.exp(logk) / 3
        area = (e[0, 0] * e[1, 1] - e[0, 1] * e[1, 0]) / 2
        for s in range(3):
            F[tri[t, s]] += area / 3
            for r in range(3):
                values[slot[t, s, r]] += kbar * (e[s, 0] * e[r, 0] + e[s, 1] * e[r, 1]) / (4 * area)
    return values, indices, indptr, F


def fem_matvec_loops(theta, data, size):
    w, b = data["w"], data["b"]
    values, indices, indptr, _ = stiffness_loops(theta["theta"], data["x"], data["tri"], size.q)
    loss = 0.0
    for i in range(len(w)):
        r = -b[i]
        for s in range(indptr[i], indptr[i + 1]):
            r += values[s] * w[indices[s]]
        loss += r * r / 2
    return loss


def fem_solve_loops(theta, data, size):
    inner, u_star = data["inner"], data["u_star"]
    values, indices, indptr, F = stiffness_loops(theta["theta"], data["x"], data["tri"], size.q)
    u = factorise(inner_columns(values, indices, indptr, inner)).solve(F[inner].astype(values.dtype))
    loss = 0.0  # u - u* is zero on the boundary
    for k in range(len(inner)):
        r = u[k] - u_star[inner[k]]
        loss += r * r
    return loss / (2 * len(u_star))


SIZES = {"tiny": Fem(8), "small": Fem(32), "large": Fem(128)}
LOWER = {"m": 2}  # one inner node

TASKS = {
    "fem_matvec": Task(
        size=Fem,
        sizes=SIZES,
        inputs=matvec_inputs,
        forms={"array": fem_matvec, "inplace": fem_matvec_inplace, "loops": fem_matvec_loops},
        gate=1e-10,
        gate32=2e-5,
        lower=LOWER,
        axis="m",
    ),
    "fem_solve": Task(
        size=Fem,
        sizes=SIZES,
        inputs=solve_inputs,
        forms={"array": fem_solve, "inplace": fem_solve_inplace, "loops": fem_solve_loops},
        gate=1e-8,
        gate32=1e-3,
        lower=LOWER,
        axis="m",
    ),
}
