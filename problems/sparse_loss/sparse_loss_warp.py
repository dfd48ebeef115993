"""The sparse losses in Warp: a thread an edge or a triangle, atomic additions where they meet, K as one weight an edge.

What hangs on coordinates alone is launched beside the tape. Warp has no sparse solve, so LAPACK's banded Cholesky, as in
Numba, stands between the kernels, with its adjoint on the tape: a rule over the solve alone, which keeps the factor.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import warp as wp

from backends.warp_backend import record, scratch
from problems import Implementation
from problems.sparse_loss import BETA, HALF_WIDTH, T0, A, Band, band, box, cholesky, edges, slots, substitute


@cache
def build_kernels(real):
    number, field, indices = wp.array(dtype=real), wp.array2d(dtype=real), wp.array2d(dtype=wp.int32)
    one, two, half = real(1), real(2), real(0.5)

    @wp.kernel
    def cosines(x: field, ends: indices, X: field, Y: field):
        """X[i] = cos(i pi x), Y[i] = cos(i pi y) at the midpoints of the edges."""
        e = wp.tid()
        i, j = ends[e, 0], ends[e, 1]
        cx, cy = wp.cos(real(wp.pi) * half * (x[i, 0] + x[j, 0])), wp.cos(real(wp.pi) * half * (x[i, 1] + x[j, 1]))
        X[0, e] = one
        Y[0, e] = one
        if X.shape[0] > 1:
            X[1, e] = cx
            Y[1, e] = cy
        for n in range(2, X.shape[0]):
            X[n, e] = two * cx * X[n - 1, e] - X[n - 2, e]
            Y[n, e] = two * cy * Y[n - 1, e] - Y[n - 2, e]

    @wp.kernel
    def geometry(x: field, tri: indices, g: field, area: number):
        """The weights of each triangle's three edges at k = 1, and its area."""
        t = wp.tid()
        a, b, c = tri[t, 0], tri[t, 1], tri[t, 2]
        x0, y0, x1, y1 = x[c, 0] - x[b, 0], x[c, 1] - x[b, 1], x[a, 0] - x[c, 0], x[a, 1] - x[c, 1]
        x2, y2 = x[b, 0] - x[a, 0], x[b, 1] - x[a, 1]
        area[t] = half * (x0 * y1 - y0 * x1)
        f = one / (real(12.0) * area[t])  # 1 / (4 area), and a third for the mean of k
        g[t, 0] = f * (x1 * x2 + y1 * y2)
        g[t, 1] = f * (x2 * x0 + y2 * y0)
        g[t, 2] = f * (x0 * x1 + y0 * y1)

    @wp.kernel
    def log_conductivity(theta: number, X: field, Y: field, logk: number):
        """Apart from exp: what a loop has summed may be stored but not used otherwise, or its derivative is lost."""
        e = wp.tid()
        q = X.shape[0]
        total = real(0)
        for i in range(q):
            for j in range(q):
                total += theta[q * i + j] / real(1 + i * i + j * j) * (X[i, e] * Y[j, e])
        logk[e] = total

    @wp.kernel
    def conductivity(logk: number, k: number, K: number):
        e = wp.tid()
        k[e] = wp.exp(logk[e])
        K[e] = real(0)

    @wp.kernel
    def stiffness(k: number, g: field, edge: indices, K: number):
        """K_ij of every edge."""
        t = wp.tid()
        e0, e1, e2 = edge[t, 0], edge[t, 1], edge[t, 2]
        kk = k[e0] + k[e1] + k[e2]
        wp.atomic_add(K, e0, kk * g[t, 0])
        wp.atomic_add(K, e1, kk * g[t, 1])
        wp.atomic_add(K, e2, kk * g[t, 2])

    return cosines, geometry, log_conductivity, conductivity, stiffness


class Build(NamedTuple):
    kernels: tuple
    ends: wp.array  # (edges, 2) int32, like every index here
    tri: wp.array  # (triangles, 3)
    edge: wp.array  # (triangles, 3), the one opposite each vertex
    X: wp.array  # (q, edges)
    Y: wp.array
    g: wp.array  # (triangles, 3)
    area: wp.array
    logk: wp.array  # (edges), as k and K
    k: wp.array
    K: wp.array


def build(theta, x, work):
    """K_ij of every edge, in work.K."""
    cosines, geometry, log_conductivity, conductivity, stiffness = work.kernels
    n, triangles = work.K.size, work.area.size
    wp.launch(cosines, n, [x, work.ends], [work.X, work.Y], record_tape=False)
    wp.launch(geometry, triangles, [x, work.tri], [work.g, work.area], record_tape=False)
    wp.launch(log_conductivity, n, [theta, work.X, work.Y], [work.logk])
    wp.launch(conductivity, n, [work.logk], [work.k, work.K])
    wp.launch(stiffness, triangles, [work.k, work.g, work.edge], [work.K])


def prepare(structure, size):
    tri, real = structure["tri"], wp.dtype_from_numpy(structure["theta"].dtype)
    ends, edge = edges(tri)
    X, Y, g, area = (wp.zeros(shape, dtype=real) for shape in [(size.q, len(ends))] * 2 + [tri.shape, len(tri)])
    logk, k, K = (scratch(len(ends), real) for _ in range(3))
    return Build(build_kernels(real), integers(ends), integers(tri), integers(edge), X, Y, g, area, logk, k, K)


def integers(a):
    return wp.array(a, dtype=wp.int32)


# The product


@cache
def matvec_kernels(real):
    number, indices = wp.array(dtype=real), wp.array2d(dtype=wp.int32)

    @wp.kernel
    def start(b: number, r: number):
        i = wp.tid()
        r[i] = -b[i]

    @wp.kernel
    def product(K: number, ends: indices, w: number, r: number):
        """r += K w; the rows of K sum to zero."""
        e = wp.tid()
        i, j = ends[e, 0], ends[e, 1]
        flux = K[e] * (w[j] - w[i])
        wp.atomic_add(r, i, flux)
        wp.atomic_add(r, j, -flux)

    @wp.kernel
    def misfit(r: number, loss: number):
        i = wp.tid()
        wp.atomic_add(loss, 0, real(0.5) * r[i] * r[i])

    return start, product, misfit


def fem_matvec(theta, data, size, work):
    work, (start, product, misfit), r, loss = work
    loss.zero_()
    build(theta["theta"], data["x"], work)
    wp.launch(start, r.size, [data["b"]], [r])
    wp.launch(product, work.K.size, [work.K, work.ends, data["w"]], [r])
    wp.launch(misfit, r.size, [r], [loss])
    return loss


def matvec_prepare(structure, size):
    real = wp.dtype_from_numpy(structure["theta"].dtype)
    return prepare(structure, size), matvec_kernels(real), scratch(structure["b"].shape, real), scratch(1, real)


# The solve


@cache
def solve_kernels(real):
    number, indices, slots = wp.array(dtype=real), wp.array2d(dtype=wp.int32), wp.array(dtype=wp.int32)

    @wp.kernel
    def load(area: number, tri: indices, slot: slots, F: number):
        t = wp.tid()
        for s in range(3):
            wp.atomic_add(F, slot[tri[t, s]], area[t] / real(3.0))

    @wp.kernel
    def solve_vjp(lam: number, u: number, ends: indices, Kb: number):
        e = wp.tid()
        i, j = ends[e, 0], ends[e, 1]
        Kb[e] += (lam[i] - lam[j]) * (u[i] - u[j])

    @wp.kernel
    def misfit(u: number, u_star: number, slot: slots, loss: number):
        i = wp.tid()
        d = u[slot[i]] - u_star[i]
        wp.atomic_add(loss, 0, d * d / real(2 * u_star.shape[0]))

    return load, solve_vjp, misfit


class Solve(NamedTuple):
    kernels: tuple
    band: Band
    slot: wp.array  # (n) a node's place among the inner ones, one past the last on the boundary
    ends: wp.array  # (edges, 2) slots
    F: wp.array  # (inner + 1), the last one for the boundary
    u: wp.array
    lam: wp.array
    loss: wp.array


def substituted(U, b, out):
    """out = K^-1 b over the inner nodes, zero on the boundary; on the host."""
    x = b.numpy()
    out.assign(np.append(substitute(U, x[:-1]), x.dtype.type(0)))


def solve(K, work):
    """u of K u = F; the reverse of it is another substitution."""
    _, solve_vjp, _ = work.kernels
    u, lam = work.u, work.lam
    U = cholesky(K.numpy(), work.band)
    substituted(U, work.F, u)

    def backward():
        substituted(U, u.grad, lam)
        u.grad.zero_()
        wp.launch(solve_vjp, K.size, [lam, u, work.ends], [K.grad], record_tape=False)

    return backward


def fem_solve(theta, data, size, work):
    work, more = work
    load, _, misfit = more.kernels
    more.loss.zero_()
    more.F.zero_()
    build(theta["theta"], data["x"], work)
    wp.launch(load, work.area.size, [work.area, work.tri, more.slot], [more.F], record_tape=False)
    backward = solve(work.K, more)
    record(backward, [work.K, more.u])
    wp.launch(misfit, more.slot.size, [more.u, data["u_star"], more.slot], [more.loss])
    return more.loss


def solve_prepare(structure, size):
    work, inner, real = prepare(structure, size), structure["inner"], wp.dtype_from_numpy(structure["theta"].dtype)
    b = band(work.ends.numpy(), inner, *structure["u_star"].shape)
    F, lam = (wp.zeros(len(inner) + 1, dtype=real) for _ in range(2))
    u, loss = scratch(len(inner) + 1, real), scratch(1, real)
    return work, Solve(solve_kernels(real), b, integers(b.slot), integers(b.ends), F, u, lam, loss)


# The lattice


@cache
def lattice_kernels(real):
    number, field, indices = wp.array(dtype=real), wp.array2d(dtype=real), wp.array2d(dtype=wp.int32)
    a, beta, t0 = real(A), real(BETA), real(T0)

    @wp.kernel
    def hopping(x: field, bonds: wp.array2d(dtype=wp.int64), image: field, Lx: real, Ly: real, scale: real, t: number):
        e = wp.tid()
        i, j = int(bonds[e, 0]), int(bonds[e, 1])
        dx, dy = x[j, 0] - x[i, 0] + image[e, 0] * Lx, x[j, 1] - x[i, 1] + image[e, 1] * Ly
        t[e] = scale * t0 * wp.exp(-beta * (wp.sqrt(dx * dx + dy * dy) / a - real(1)))

    @wp.func
    def row_by_row(t: number, near: indices, bond: indices, x: number, i: int):
        return t[bond[i, 0]] * x[near[i, 0]] + t[bond[i, 1]] * x[near[i, 1]] + t[bond[i, 2]] * x[near[i, 2]]

    @wp.kernel
    def product(t: number, near: indices, bond: indices, x: number, y: number):
        """y = H x"""
        i = wp.tid()
        y[i] = row_by_row(t, near, bond, x, i)

    @wp.kernel
    def chebyshev_step(t: number, near: indices, bond: indices, x: number, before: number, y: number):
        i = wp.tid()
        y[i] = real(2) * row_by_row(t, near, bond, x, i) - before[i]

    @wp.kernel
    def clear(mu: number):
        """A launch, not zero_(), which would leave its gradient on the way back."""
        mu[wp.tid()] = real(0)

    @wp.kernel
    def moment(v: number, y: number, k: int, mu: number):
        i = wp.tid()
        wp.atomic_add(mu, k, v[i] * y[i])

    @wp.kernel
    def half_square(y: number, loss: number):
        i = wp.tid()
        wp.atomic_add(loss, 0, real(0.5) * y[i] * y[i])

    return hopping, product, chebyshev_step, clear, moment, half_square


class Bonds(NamedTuple):
    kernels: tuple
    near: wp.array  # (n, 3) the site at the other end of each bond of a site
    bond: wp.array  # (n, 3) which bond that is
    lengths: tuple  # of the periodic box
    t: wp.array  # (bonds)
    T: list  # of (n): H x, or T_k v for k = 1, 2, ...
    mu: wp.array  # (K)
    loss: wp.array


def tight_binding(theta, data, size, w):
    hopping, product, *_, half_square = w.kernels
    w.loss.zero_()
    wp.launch(hopping, w.t.size, [theta["positions"], data["bonds"], data["image"], *w.lengths, 1.0], [w.t])
    wp.launch(product, w.near.shape[0], [w.t, w.near, w.bond, data["x"]], [w.T[0]])
    wp.launch(half_square, w.T[0].size, [w.T[0]], [w.loss])
    return w.loss


def kpm(theta, data, size, w):
    hopping, product, chebyshev_step, clear, moment, half_square = w.kernels
    n, T = w.near.shape[0], [data["v"], *w.T]
    w.loss.zero_()
    wp.launch(hopping, w.t.size, [theta["positions"], data["bonds"], data["image"], *w.lengths, 1 / HALF_WIDTH], [w.t])
    wp.launch(product, n, [w.t, w.near, w.bond, T[0]], [T[1]])
    for k in range(2, size.K):
        wp.launch(chebyshev_step, n, [w.t, w.near, w.bond, T[k - 1], T[k - 2]], [T[k]])
    wp.launch(clear, size.K, [], [w.mu])
    for k in range(size.K):
        wp.launch(moment, n, [data["v"], T[k], k], [w.mu])
    wp.launch(half_square, size.K, [w.mu], [w.loss])
    return w.loss


def lattice_prepare(structure, size):
    (n, _), dtype = structure["positions"]
    real, bonds = wp.dtype_from_numpy(dtype), structure["bonds"]
    near, bond, *_ = slots(bonds)
    K = getattr(size, "K", 2)
    T = [scratch(n, real) for _ in range(1, K)]
    lengths, numbers = tuple(box(size)), (scratch(many, real) for many in (K, 1))
    return Bonds(lattice_kernels(real), integers(near), integers(bond), lengths, scratch(len(bonds), real), T, *numbers)


IMPLEMENTATION = {
    "fem_matvec": {"loops": Implementation(fem_matvec, matvec_prepare)},
    "fem_solve": {
        "loops": Implementation(
            fem_solve,
            solve_prepare,
            unsupported={
                "compile": "The solve is LAPACK's, called from Python, and a captured graph holds launches only "
                "(`a function in Python is on the tape`).",
            },
        ),
    },
    "tight_binding": {"loops": Implementation(tight_binding, lattice_prepare)},
    "kpm": {"loops": Implementation(kpm, lattice_prepare)},
}
