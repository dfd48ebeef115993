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

The second matrix is a Hamiltonian: tight binding on graphene (Castro Neto et al., Rev. Mod. Phys. 81, 109, 2009), one
orbital a site, with a hopping that decays with the length of a bond (Pereira et al., Phys. Rev. B 80, 045401, 2009), in
units of Angstrom and eV. The sites are displaced; bonds are those of the ideal lattice, periodic:

    H_ij = t(|x_j - x_i|) of each bond,    t(r) = -2.7 exp(-3.37 (r / a - 1)),    a = 1.42

Lattice: nx x ny cells of 3 a by sqrt(3) a (first index slow), 4 sites each, 3 bonds a site; site k of n = 4 nx ny is
displaced by 0.1 a gold(2 n).reshape(n, 2)[k]. The gradient is that of all positions; it sums to zero.

Tasks
    fem_matvec    |K w - b|^2 / 2 over all nodes, w = gold(n, 7), b = K(theta*) w: gradient r^T (dK) w, r = K w - b.
    fem_solve     |u - u*|^2 / (2 n), n all nodes, K u = F over the inner nodes, u* the solution at theta*: gradient
                  -lam^T (dK) u with K lam = (u - u*) / n.
    tight_binding |H x|^2 / 2, x = gold(n, 29): gradient y^T (dH) x, y = H x.
    kpm           sum_k mu_k^2 / 2 of the moments mu_k = v . T_k(H / 9) v, k < K, of the kernel polynomial method (Weisse et
                  al., Rev. Mod. Phys. 78, 275, 2006), v = gold(n, 3) / |gold(n, 3)|, T_k the Chebyshev polynomials by
                  their recurrence: K - 1 products and, for the gradient, as many back.

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

A = 1.42  # length of a bond of the ideal lattice, Angstrom
T0, BETA = -2.7, 3.37  # hopping at that length, eV, and its decay
CELL = np.array([3 * A, 3**0.5 * A])
BASIS = np.array([[0, 0], [A, 0], [1.5 * A, 3**0.5 * A / 2], [2.5 * A, 3**0.5 * A / 2]])
BONDS = (
    (0, 1, 0, 0),
    (1, 2, 0, 0),
    (1, 2, 0, -1),
    (2, 3, 0, 0),
    (3, 0, 1, 0),
    (3, 0, 1, 1),
)  # sites of a cell, of which cell
HALF_WIDTH = 9.0  # H / 9 has its spectrum in [-1, 1]: 3 x 2.7 eV, and what the displacements add


class Fem(NamedTuple):
    m: int
    q: int = 4


class Lattice(NamedTuple):
    nx: int
    ny: int


class Moments(NamedTuple):
    nx: int
    ny: int
    K: int = 64


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


def lattice(size):
    """Displaced sites (n, 2), bonds (3 n / 2, 2) and in which image of the box the second end of each lies, (3 n / 2, 2), whole
    numbers in float64, which multiply lengths."""
    nx, ny = size.nx, size.ny
    cell = np.stack(np.meshgrid(np.arange(nx), np.arange(ny), indexing="ij"), -1).reshape(-1, 2)
    site = (cell[:, None] * CELL + BASIS).reshape(-1, 2)
    bonds, image = [], []
    for i, j, *shift in BONDS:
        there = cell + shift
        image.append(there // (nx, ny))
        x, y = (there % (nx, ny)).T
        bonds.append(np.stack([4 * np.arange(len(cell)) + i, 4 * (ny * x + y) + j], 1))
    return (
        site + 0.1 * A * gold(site.size).reshape(site.shape),
        np.concatenate(bonds),
        np.concatenate(image).astype(float),
    )


def box(size, dtype=float):
    """The lengths of the periodic box, (2), Angstrom."""
    return (CELL * (size.nx, size.ny)).astype(dtype)


def tight_binding_inputs(size):
    x, bonds, image = lattice(size)
    return {"positions": x}, {"bonds": bonds, "image": image, "x": gold(len(x), 29)}


def kpm_inputs(size):
    x, bonds, image = lattice(size)
    v = gold(len(x), 3)
    return {"positions": x}, {"bonds": bonds, "image": image, "v": v / np.sqrt(v @ v)}


def slots(bonds):
    """The three bonds of every site: the site at the other end of each (n, 3), its number (n, 3), whether it ends here (1)
    or begins here (-1), (n, 3); and of every bond its two places in these, as flat indices (2, bonds). Integers alone.

    Implementations hold H by its three numbers a row, so that a product gathers and scatters nothing.
    """
    ends = bonds.T.ravel()
    order = np.argsort(ends, kind="stable")  # site by site, three of each
    number, sign = order % len(bonds), np.repeat([-1, 1], len(bonds))[order]
    near = np.concatenate([bonds[:, 1], bonds[:, 0]])[order]
    place = np.empty(len(ends), int)
    place[order] = np.arange(len(ends))
    return *(a.reshape(-1, 3) for a in (near, number, sign)), place.reshape(2, -1)


def slot_matrices(structure):
    """The 0/1 matrices (3 n, n) and (3 n, bonds) that take sites and bonds to the places of H's entries row by row, and the one
    (bonds, n) that takes sites to differences along bonds, for libraries as in `gather`."""
    bonds, ((n, _), dtype) = structure["bonds"], structure["positions"]
    near, number = (a.ravel() for a in slots(bonds)[:2])
    places, one = np.arange(near.size), np.ones(near.size, dtype)
    take = (csr_array((one, (places, where)), (near.size, many)) for where, many in ((near, n), (number, len(bonds))))
    return *take, incidence(bonds.T, n, dtype).T.tocsr()


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


def incidence(ends, n, dtype):
    """(n, edges): its transpose takes nodes to differences along edges."""
    (i, j), number, one = ends, np.arange(len(ends[0])), np.ones(len(ends[0]), dtype)
    where = np.concatenate([j, i]), np.concatenate([number, number])
    return csr_array((np.concatenate([one, -one]), where), (n, len(number)))


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


def hopping(x, bonds, image, size):
    """t of every bond."""
    i, j = bonds.T
    d = x[j] - x[i] + image * box(size, image.dtype)
    return T0 * np.exp(-BETA * (np.sqrt(np.sum(d * d, 1)) / A - 1))


def hamiltonian(positions, bonds, image, size):
    """H, CSR."""
    (i, j), t = bonds.T, hopping(positions, bonds, image, size)
    both = np.concatenate([t, t]), (np.concatenate([i, j]), np.concatenate([j, i]))
    return coo_array(both, (len(positions), len(positions))).tocsr()


def tight_binding(theta, data, size):
    y = hamiltonian(theta["positions"], data["bonds"], data["image"], size) @ data["x"]
    return np.sum(y * y) / 2


def kpm(theta, data, size):
    H, v = hamiltonian(theta["positions"], data["bonds"], data["image"], size) * (1 / HALF_WIDTH), data["v"]
    before, now = v, H @ v
    loss = (v @ before) ** 2 / 2
    for _ in range(1, size.K):
        loss += (v @ now) ** 2 / 2
        before, now = now, 2 * (H @ now) - before
    return loss


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


def hopping_inplace(x, bonds, image, size):
    i, j = bonds.T
    d = x[j]
    d -= x[i]
    d += image * box(size, image.dtype)
    d *= d
    t = d[:, 0]
    t += d[:, 1]
    np.sqrt(t, out=t)
    t /= A
    t -= 1
    t *= -BETA
    np.exp(t, out=t)
    t *= T0
    return t


def product_inplace(t, bonds, x, y):
    """y = H x."""
    i, j = bonds.T
    y[:] = 0
    np.add.at(y, i, t * x[j])
    np.add.at(y, j, t * x[i])


def tight_binding_inplace(theta, data, size):
    t = hopping_inplace(theta["positions"], data["bonds"], data["image"], size)
    y = np.empty(len(data["x"]), t.dtype)
    product_inplace(t, data["bonds"], data["x"], y)
    y *= y
    return y.sum() / 2


def kpm_inplace(theta, data, size):
    t, v = hopping_inplace(theta["positions"], data["bonds"], data["image"], size), data["v"]
    t /= HALF_WIDTH
    before, now, y = v.astype(t.dtype), *np.empty((2, len(v)), t.dtype)
    product_inplace(t, data["bonds"], v, now)
    loss = (v @ before) ** 2 / 2
    for _ in range(1, size.K):
        loss += (v @ now) ** 2 / 2
        product_inplace(t, data["bonds"], now, y)
        y *= 2
        y -= before
        before, now, y = now, y, before
    return loss


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


def hopping_loops(x, bonds, image, size):
    t = np.empty(len(bonds), x.dtype)
    Lx, Ly = box(size, image.dtype)
    for e in range(len(bonds)):
        i, j = bonds[e]
        dx, dy = x[j, 0] - x[i, 0] + image[e, 0] * Lx, x[j, 1] - x[i, 1] + image[e, 1] * Ly
        t[e] = T0 * np.exp(-BETA * (np.sqrt(dx * dx + dy * dy) / A - 1))
    return t


def product_loops(t, bonds, x, y):
    y[:] = 0
    for e in range(len(bonds)):
        i, j = bonds[e]
        y[i] += t[e] * x[j]
        y[j] += t[e] * x[i]


def tight_binding_loops(theta, data, size):
    t = hopping_loops(theta["positions"], data["bonds"], data["image"], size)
    y = np.empty(len(data["x"]), t.dtype)
    product_loops(t, data["bonds"], data["x"], y)
    loss = 0.0
    for i in range(len(y)):
        loss += y[i] * y[i]
    return loss / 2


def kpm_loops(theta, data, size):
    t, v = hopping_loops(theta["positions"], data["bonds"], data["image"], size) / HALF_WIDTH, data["v"]
    T = np.empty((size.K, len(v)), t.dtype)
    T[0] = v
    loss = 0.0
    for k in range(size.K):
        if k > 0:
            product_loops(t, data["bonds"], T[k - 1], T[k])
        if k > 1:
            for i in range(len(v)):
                T[k, i] = 2 * T[k, i] - T[k - 2, i]
        mu = 0.0
        for i in range(len(v)):
            mu += v[i] * T[k, i]
        loss += mu * mu / 2
    return loss


SIZES = {"tiny": Fem(8), "small": Fem(32), "large": Fem(128)}
LOWER = {"m": 2}  # one inner node
SMALLEST = {"nx": 2, "ny": 2}  # else two bonds join the same two sites

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
    "tight_binding": Task(
        size=Lattice,
        sizes={"tiny": Lattice(4, 4), "small": Lattice(16, 16), "large": Lattice(64, 64)},
        inputs=tight_binding_inputs,
        forms={"array": tight_binding, "inplace": tight_binding_inplace, "loops": tight_binding_loops},
        gate=1e-10,
        gate32=5e-4,
        lower=SMALLEST,
        axis="nx",
    ),
    "kpm": Task(
        size=Moments,
        sizes={"tiny": Moments(4, 4), "small": Moments(16, 16), "large": Moments(64, 64)},
        inputs=kpm_inputs,
        forms={"array": kpm, "inplace": kpm_inplace, "loops": kpm_loops},
        gate=1e-10,
        gate32=2e-3,
        lower=SMALLEST | {"K": 2},  # mu_0 = 1
        axis="nx",
    ),
}
