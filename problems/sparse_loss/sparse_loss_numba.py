"""The sparse losses in Numba: loops, and the adjoint by hand.

K is one weight an edge, K_ij = sum of kbar (e_i . e_j) / (4 area) over the edge's one or two triangles; the rows of K sum
to zero, so this is the whole matrix. Both tasks share one reverse pass: with lam = -r, v = w for the product and lam,
v = u of the two solves, the cotangent of K_ij is (lam_i - lam_j) (v_i - v_j).

The solve is LAPACK's banded Cholesky, factorised once and used for u and for lam. SciPy's SuperLU (minimum degree,
symmetric mode) takes 10, 5 and 2.5 times as long at m = 8, 32, 128.

H is three numbers a row, so that a product only gathers. The moments' adjoint is the recurrence of their own polynomials
run backward, b_k = mu_k v + 2 H b_(k+1) - b_(k+2), and what each step adds to the cotangent of H is summed beside it.
"""

from math import factorial, pi
from typing import NamedTuple

import numpy as np
from numba import njit
from scipy.linalg import LinAlgError, get_lapack_funcs

from backends.numba_backend import LANES, by_chunks
from problems import Implementation
from problems.sparse_loss import BETA, HALF_WIDTH, T0, A, band, box, edges, slots

BLOCK = 128  # edges at a time: their 2 q cosines stay in the first cache, and the inner loops are SIMD
SIN = tuple((-1) ** n * pi ** (2 * n + 1) / factorial(2 * n + 1) for n in range(11))
EXP = tuple(1 / factorial(n) for n in range(14))
LOG2E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.6931471803691238, 1.9082149292705877e-10


class Work(NamedTuple):
    ends: np.ndarray  # (edges, 2) int32, like every index here
    tri: np.ndarray  # (triangles, 3)
    edge: np.ndarray  # (triangles, 3), the one opposite each vertex
    c: np.ndarray  # (2, Q, Q) theta_ij / (1 + i^2 + j^2) and its cotangent, Q = q and zeros up to a multiple of four
    T: np.ndarray  # (2, Q, BLOCK) cos i pi x, cos j pi y
    bits: np.ndarray  # (BLOCK) 2^n as an integer
    power: np.ndarray  # (BLOCK) the same memory as a float
    mid: np.ndarray  # (2, edges) cos pi x, cos pi y at the midpoints
    k: np.ndarray  # (2, edges) k and its cotangent
    K: np.ndarray  # (2, edges) K_ij and its cotangent
    g: np.ndarray  # (triangles, 3) what a triangle adds to K_ij, over the sum of k


# Cosine and exponential as polynomials, because the C library's are scalar: 1.0 and 2.4 ns a point, not 9.1 and 5.0.


@njit(fastmath=True)
def cospi(x):
    """x = cos(pi x), as the sine of the distance to 1/2."""
    for e in range(len(x)):
        t = 0.5 - abs(x[e] - 2 * np.floor(0.5 * x[e] + 0.5))
        s = t * t
        p = SIN[10]
        for n in range(9, -1, -1):
            p = p * s + SIN[n]
        x[e] = t * p


@njit(fastmath=True)
def exp(x, bits, power):
    """x = exp(x) = 2^n exp(r), |r| <= ln(2) / 2; bits and power are one buffer."""
    for e in range(len(x)):
        z = min(max(x[e], -708.0), 709.0)
        n = np.floor(LOG2E * z + 0.5)
        r = (z - LN2_HIGH * n) - LN2_LOW * n
        p = EXP[13]
        for i in range(12, -1, -1):
            p = p * r + EXP[i]
        x[e] = p
        bits[e] = (np.int64(n) + 1023) << 52
    for e in range(len(x)):
        x[e] *= power[e]


@njit(fastmath=True)
def chebyshev(c, T):
    """T[i] = cos(i pi x) from c = cos(pi x)."""
    B = len(c)
    one, first = T[0], T[1]
    for e in range(B):
        one[e] = 1.0
        first[e] = c[e]
    for i in range(2, len(T)):
        a, b, d = T[i], T[i - 1], T[i - 2]
        for e in range(B):
            a[e] = 2 * c[e] * b[e] - d[e]


@njit(fastmath=True)
def bilinear(c, X, Y, s):
    """s = sum_ij c_ij X_i Y_j."""
    for e in range(len(s)):
        s[e] = 0.0
    for i in range(len(c)):
        Xi = X[i]
        for j in range(0, len(c), 4):
            c0, c1, c2, c3 = c[i, j], c[i, j + 1], c[i, j + 2], c[i, j + 3]
            Y0, Y1, Y2, Y3 = Y[j], Y[j + 1], Y[j + 2], Y[j + 3]
            for e in range(len(s)):
                s[e] += Xi[e] * (c0 * Y0[e] + c1 * Y1[e] + c2 * Y2[e] + c3 * Y3[e])


@njit(fastmath=True)
def bilinear_vjp(X, Y, sb, cb):
    for i in range(len(cb)):
        Xi = X[i]
        for j in range(0, len(cb), 4):
            Y0, Y1, Y2, Y3 = Y[j], Y[j + 1], Y[j + 2], Y[j + 3]
            c0 = c1 = c2 = c3 = 0.0
            for e in range(len(sb)):
                z = Xi[e] * sb[e]
                c0 += z * Y0[e]
                c1 += z * Y1[e]
                c2 += z * Y2[e]
                c3 += z * Y3[e]
            cb[i, j] += c0
            cb[i, j + 1] += c1
            cb[i, j + 2] += c2
            cb[i, j + 3] += c3


@njit(fastmath=True)
def conductivity(x, ends, c, T, bits, power, mid, k):
    """k at the midpoints of the edges."""
    X, Y = T[0], T[1]
    for start in range(0, len(k), BLOCK):
        end = min(start + BLOCK, len(k))
        pair, px, py, s = ends[start:end], mid[0, start:end], mid[1, start:end], k[start:end]
        for e in range(len(pair)):
            i, j = pair[e, 0], pair[e, 1]
            px[e] = 0.5 * (x[i, 0] + x[j, 0])
            py[e] = 0.5 * (x[i, 1] + x[j, 1])
        cospi(px)
        cospi(py)
        chebyshev(px, X)
        chebyshev(py, Y)
        bilinear(c, X, Y, s)
        exp(s, bits, power)


@njit(fastmath=True)
def conductivity_vjp(mid, k, kb, T, cb):
    """cb, the cotangent of c, from that of k, which is overwritten."""
    X, Y = T[0], T[1]
    cb[:] = 0.0
    for start in range(0, len(k), BLOCK):
        end = min(start + BLOCK, len(k))
        s, sb = k[start:end], kb[start:end]
        for e in range(len(s)):
            sb[e] *= s[e]
        chebyshev(mid[0, start:end], X)
        chebyshev(mid[1, start:end], Y)
        bilinear_vjp(X, Y, sb, cb)


@njit(fastmath=True)
def stiffness(x, tri, edge, k, K, g):
    """K_ij of every edge."""
    K[:] = 0.0
    for t in range(len(tri)):
        a, b, c = tri[t, 0], tri[t, 1], tri[t, 2]
        xa, ya, xb, yb, xc, yc = x[a, 0], x[a, 1], x[b, 0], x[b, 1], x[c, 0], x[c, 1]
        x0, y0, x1, y1, x2, y2 = xc - xb, yc - yb, xa - xc, ya - yc, xb - xa, yb - ya
        f = 1 / (6 * (x0 * y1 - y0 * x1))  # 1 / (4 area), and a third for the mean of k
        g0, g1, g2 = f * (x1 * x2 + y1 * y2), f * (x2 * x0 + y2 * y0), f * (x0 * x1 + y0 * y1)
        e0, e1, e2 = edge[t, 0], edge[t, 1], edge[t, 2]
        kk = k[e0] + k[e1] + k[e2]
        K[e0] += kk * g0
        K[e1] += kk * g1
        K[e2] += kk * g2
        g[t, 0], g[t, 1], g[t, 2] = g0, g1, g2


@njit(fastmath=True)
def stiffness_vjp(ends, edge, g, lam, v, Kb, kb):
    """kb, the cotangent of k at every edge."""
    for e in range(len(ends)):
        i, j = ends[e, 0], ends[e, 1]
        Kb[e] = (lam[i] - lam[j]) * (v[i] - v[j])
        kb[e] = 0.0
    for t in range(len(edge)):
        e0, e1, e2 = edge[t, 0], edge[t, 1], edge[t, 2]
        z = g[t, 0] * Kb[e0] + g[t, 1] * Kb[e1] + g[t, 2] * Kb[e2]
        kb[e0] += z
        kb[e1] += z
        kb[e2] += z


@njit(fastmath=True)
def coefficients(theta, c):
    q = int(np.sqrt(len(theta)) + 0.5)
    for i in range(q):
        for j in range(q):
            c[i, j] = theta[q * i + j] / (1 + i * i + j * j)


@njit(fastmath=True)
def coefficients_vjp(cb, thetab):
    q = int(np.sqrt(len(thetab)) + 0.5)
    for i in range(q):
        for j in range(q):
            thetab[q * i + j] = cb[i, j] / (1 + i * i + j * j)


@njit(fastmath=True)
def residual(ends, K, w, b, r):
    """-r, r = K w - b; the loss."""
    for i in range(len(b)):
        r[i] = b[i]
    for e in range(len(ends)):
        i, j = ends[e, 0], ends[e, 1]
        flux = K[e] * (w[j] - w[i])
        r[i] -= flux
        r[j] += flux
    loss = 0.0
    for i in range(len(r)):
        loss += r[i] * r[i]
    return 0.5 * loss


@njit
def build(theta, x, work):
    coefficients(theta, work.c[0])
    conductivity(x, work.ends, work.c[0], work.T, work.bits, work.power, work.mid, work.k[0])
    stiffness(x, work.tri, work.edge, work.k[0], work.K[0], work.g)


@njit
def build_vjp(ends, lam, v, work, thetab):
    """The gradient of -lam^T K v."""
    stiffness_vjp(ends, work.edge, work.g, lam, v, work.K[1], work.k[1])
    conductivity_vjp(work.mid, work.k[0], work.k[1], work.T, work.c[1])
    coefficients_vjp(work.c[1], thetab)


# Duals: each number a comes with its tangents da (..., LANES)


@njit(fastmath=True)
def conductivity_duals(dtheta, mid, k, T, Z, dk):
    """dk = k sum_ij dc_ij X_i Y_j: for a block of edges one product of matrices, with Z (BLOCK, q^2)."""
    X, Y = T[0], T[1]
    q = int(np.sqrt(len(dtheta)) + 0.5)
    for start in range(0, len(k), BLOCK):
        end = min(start + BLOCK, len(k))
        chebyshev(mid[0, start:end], X)
        chebyshev(mid[1, start:end], Y)
        for i in range(q):
            for j in range(q):
                scale = 1 + i * i + j * j
                for e in range(end - start):
                    Z[e, q * i + j] = k[start + e] * X[i, e] * Y[j, e] / scale
        np.dot(Z[: end - start], dtheta, dk[start:end])


@njit(fastmath=True)
def stiffness_duals(edge, g, dk, dK):
    dK[:] = 0.0
    for t in range(len(edge)):
        e0, e1, e2 = edge[t, 0], edge[t, 1], edge[t, 2]
        for k in range(LANES):
            dkk = dk[e0, k] + dk[e1, k] + dk[e2, k]
            dK[e0, k] += dkk * g[t, 0]
            dK[e1, k] += dkk * g[t, 1]
            dK[e2, k] += dkk * g[t, 2]


@njit(fastmath=True)
def product_duals(ends, dK, v, dr):
    """dr = -dK v."""
    dr[:] = 0.0
    for e in range(len(ends)):
        i, j = ends[e, 0], ends[e, 1]
        dv = v[j] - v[i]
        for k in range(LANES):
            dr[i, k] -= dK[e, k] * dv
            dr[j, k] += dK[e, k] * dv


class Tangents(NamedTuple):
    Z: np.ndarray  # (BLOCK, q^2)
    k: np.ndarray  # (edges, LANES), as K
    K: np.ndarray
    r: np.ndarray  # (nodes, or slots; LANES)


def tangents(theta, work, r):
    shapes = (BLOCK, len(theta)), *((n, LANES) for n in (len(work.ends), len(work.ends), len(r)))
    return Tangents(*(np.empty(shape, theta.dtype) for shape in shapes))


@njit
def residual_duals(dtheta, work, ends, v, d):
    """The tangents of -K v, after `build`."""
    conductivity_duals(dtheta, work.mid, work.k[0], work.T, d.Z, d.k)
    stiffness_duals(work.edge, work.g, d.k, d.K)
    product_duals(ends, d.K, v, d.r)


def prepare(structure, size):
    tri, dtype = structure["tri"], structure["theta"].dtype
    ends, edge = edges(tri)
    Q = -(-size.q // 4) * 4
    bits = np.empty(BLOCK, np.int64)
    return Work(
        *(a.astype(np.int32) for a in (ends, tri, edge)),
        c=np.zeros((2, Q, Q), dtype),
        T=np.empty((2, Q, BLOCK), dtype),
        bits=bits,
        power=bits.view(float),
        mid=np.empty((2, len(ends)), dtype),
        k=np.empty((2, len(ends)), dtype),
        K=np.empty((2, len(ends)), dtype),
        g=np.empty(tri.shape, dtype),
    )


# The product


@njit
def matvec_kernel(theta, x, w, b, work, r, thetab):
    """The loss, and where thetab has entries the gradient: one function, to compile the build once."""
    build(theta, x, work)
    loss = residual(work.ends, work.K[0], w, b, r)
    if len(thetab):
        build_vjp(work.ends, r, w, work, thetab)
    return loss


def fem_matvec(theta, data, size, work):
    work, r, thetab = work
    return matvec_kernel(theta["theta"], data["x"], data["w"], data["b"], work, r, thetab[:0])


def fem_matvec_adjoint(theta, data, size, work):
    work, r, thetab = work
    return matvec_kernel(theta["theta"], data["x"], data["w"], data["b"], work, r, thetab), {"theta": thetab}


def fem_matvec_duals(theta, data, size, work):
    assembly, r, _ = work
    tangent = tangents(theta["theta"], assembly, r)

    def dual(d, out):
        loss = fem_matvec(theta, data, size, work)
        residual_duals(d["theta"], assembly, assembly.ends, data["w"], tangent)
        np.dot(r, tangent.r, out)
        return loss

    return by_chunks(theta, dual)


def matvec_prepare(structure, size):
    r, thetab = (np.empty(structure[name].shape, structure["theta"].dtype) for name in ("b", "theta"))
    return prepare(structure, size), r, thetab


# The solve


class Solve(NamedTuple):
    slot: np.ndarray  # (n) a node's place among the inner ones, one past the last on the boundary, int32 as below
    ends: np.ndarray  # (edges, 2) slots
    tri: np.ndarray  # (triangles, 3) slots
    A: np.ndarray  # (inner, width + 1) the upper band of K
    u: np.ndarray  # (inner + 1) F, then u, then zero
    lam: np.ndarray  # (inner + 1) the cotangent of u, then lam, then zero


@njit(fastmath=True)
def load(x, tri, slots, F):
    F[:] = 0.0
    for t in range(len(tri)):
        a, b, c = tri[t, 0], tri[t, 1], tri[t, 2]
        area2 = (x[b, 0] - x[a, 0]) * (x[c, 1] - x[a, 1]) - (x[b, 1] - x[a, 1]) * (x[c, 0] - x[a, 0])
        for s in range(3):
            F[slots[t, s]] += area2 / 6
    F[-1] = 0.0


@njit(fastmath=True)
def fill(ends, K, A):
    A[:] = 0.0
    n, d = len(A), A.shape[1] - 1
    for e in range(len(ends)):
        i, j = min(ends[e, 0], ends[e, 1]), max(ends[e, 0], ends[e, 1])
        if i < n:
            A[i, d] -= K[e]
        if j < n:
            A[j, d] -= K[e]
            A[j, d + i - j] = K[e]


@njit(fastmath=True)
def misfit(u, u_star, slot, lam):
    """The loss and the cotangent of u."""
    n = len(slot)
    loss = 0.0
    for i in range(n):
        r = u[slot[i]] - u_star[i]
        lam[slot[i]] = r / n
        loss += r * r
    lam[-1] = 0.0
    return loss / (2 * n)


@njit
def system(theta, x, work, solve):
    build(theta, x, work)
    fill(solve.ends, work.K[0], solve.A)
    load(x, work.tri, solve.tri, solve.u)


def solution(theta, data, work, solve, lapack):
    """u in place of F; returns the factor."""
    pbtrf, pbtrs = lapack
    system(theta["theta"], data["x"], work, solve)
    U, info = pbtrf(solve.A.T, overwrite_ab=True)
    if info:
        raise LinAlgError("K is not positive definite")
    pbtrs(U, solve.u[:-1], overwrite_b=True)
    return U


def fem_solve(theta, data, size, work):
    work, solve, lapack, _ = work
    solution(theta, data, work, solve, lapack)
    return misfit(solve.u, data["u_star"], solve.slot, solve.lam)


def fem_solve_adjoint(theta, data, size, work):
    work, solve, lapack, thetab = work
    U = solution(theta, data, work, solve, lapack)
    loss = misfit(solve.u, data["u_star"], solve.slot, solve.lam)
    lapack[1](U, solve.lam[:-1], overwrite_b=True)
    build_vjp(solve.ends, solve.lam, solve.u, work, thetab)
    return loss, {"theta": thetab}


def fem_solve_duals(theta, data, size, work):
    """K du = -dK u, with the factor that u was solved with."""
    work, solve, lapack, _ = work
    tangent = tangents(theta["theta"], work, solve.u)

    def dual(d, out):
        U = solution(theta, data, work, solve, lapack)
        loss = misfit(solve.u, data["u_star"], solve.slot, solve.lam)
        residual_duals(d["theta"], work, solve.ends, solve.u, tangent)
        du, _ = lapack[1](U, tangent.r[:-1])
        np.dot(solve.lam[:-1], du, out)
        return loss

    return by_chunks(theta, dual)


def solve_prepare(structure, size):
    work, inner, dtype = prepare(structure, size), structure["inner"], structure["theta"].dtype
    b = band(work.ends, inner, *structure["u_star"].shape)
    slot, ends, tri = (a.astype(np.int32) for a in (b.slot, b.ends, b.slot[work.tri]))
    A, (u, lam) = np.empty((len(inner), b.width + 1), dtype), np.empty((2, len(inner) + 1), dtype)
    solve = Solve(slot, ends, tri, A, u, lam)
    return work, solve, get_lapack_funcs(("pbtrf", "pbtrs"), dtype=dtype), np.empty(structure["theta"].shape, dtype)


# The lattice


class Bonds(NamedTuple):
    lengths: tuple  # of the periodic box
    near: np.ndarray  # (n, 3) the site at the other end of each bond of a site, int32 as all indices here
    number: np.ndarray  # (n, 3) which bond that is
    sign: np.ndarray  # (n, 3) whether it ends here, 1, or begins here, -1
    place: np.ndarray  # (2, bonds) where a bond's ends lie in (n, 3), flat
    bits: np.ndarray  # (BLOCK) 2^n as an integer
    power: np.ndarray  # (BLOCK) the same memory as a float
    d: np.ndarray  # (2, bonds) x_j - x_i, then the force along it
    r: np.ndarray  # (bonds) its length
    t: np.ndarray  # (bonds), scaled
    H: np.ndarray  # (n, 3)
    Hb: np.ndarray  # (n, 3) the cotangent of H at each end by itself


@njit(fastmath=True)
def hopping(x, bonds, image, Lx, Ly, scale, place, bits, power, d, r, t, H):
    """t of every bond, and scale t at both its ends in H, which is flat."""
    for start in range(0, len(bonds), BLOCK):
        end = min(start + BLOCK, len(bonds))
        pair, cells, dx, dy = bonds[start:end], image[start:end], d[0, start:end], d[1, start:end]
        length, s = r[start:end], t[start:end]
        for e in range(len(pair)):
            i, j = pair[e, 0], pair[e, 1]
            dx[e] = x[j, 0] - x[i, 0] + cells[e, 0] * Lx
            dy[e] = x[j, 1] - x[i, 1] + cells[e, 1] * Ly
        for e in range(len(pair)):
            length[e] = np.sqrt(dx[e] * dx[e] + dy[e] * dy[e])
            s[e] = BETA - BETA / A * length[e]
        exp(s, bits, power)
    for e in range(len(bonds)):
        t[e] *= scale * T0
        H[place[0, e]] = H[place[1, e]] = t[e]


@njit(fastmath=True)
def hopping_vjp(number, sign, place, d, r, t, Hb, xb):
    """The cotangent of the positions from that of H, which Hb, flat, holds at each end by itself."""
    fx, fy = d
    for e in range(len(t)):
        f = -BETA / A * (Hb[place[0, e]] + Hb[place[1, e]]) * t[e] / r[e]
        fx[e] *= f
        fy[e] *= f
    for i in range(len(xb)):
        x = y = 0.0
        for s in range(3):
            x += sign[i, s] * fx[number[i, s]]
            y += sign[i, s] * fy[number[i, s]]
        xb[i, 0], xb[i, 1] = x, y


@njit(fastmath=True)
def product(near, H, x, y):
    """y = H x; returns |y|^2 / 2."""
    total = 0.0 * x[0]
    for i in range(len(x)):
        y[i] = H[i, 0] * x[near[i, 0]] + H[i, 1] * x[near[i, 1]] + H[i, 2] * x[near[i, 2]]
        total += y[i] * y[i]
    return total / 2


@njit(fastmath=True)
def product_vjp(near, x, y, Hb):
    for i in range(len(x)):
        for s in range(3):
            Hb[i, s] = y[i] * x[near[i, s]]


@njit(fastmath=True)
def chebyshev_step(near, H, x, before, v, y):
    """y = 2 H x - before; returns <v, y>."""
    total = 0.0 * x[0]
    for i in range(len(x)):
        z = 2 * (H[i, 0] * x[near[i, 0]] + H[i, 1] * x[near[i, 1]] + H[i, 2] * x[near[i, 2]]) - before[i]
        y[i] = z
        total += v[i] * z
    return total


@njit(fastmath=True)
def chebyshev_vjp(near, H, x, b, mu, v, after, Hb):
    """after = mu v + 2 H b - after, which is b of the step before; and what this one, y = 2 H x - .., adds to Hb."""
    for i in range(len(x)):
        j, k, l, c = near[i, 0], near[i, 1], near[i, 2], 2 * b[i]
        after[i] = mu * v[i] + 2 * (H[i, 0] * b[j] + H[i, 1] * b[k] + H[i, 2] * b[l]) - after[i]
        Hb[i, 0] += c * x[j]
        Hb[i, 1] += c * x[k]
        Hb[i, 2] += c * x[l]


@njit(fastmath=True)
def dot(x, y):
    total = 0.0 * x[0]
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


@njit
def moments(near, H, v, T, mu):
    """T_k v of all k, or of the latest three where T has no more, and the moments; returns the loss."""
    m = len(T)
    for i in range(len(v)):
        T[0, i] = v[i]
    product(near, H, v, T[1])
    mu[0], mu[1] = dot(v, v), dot(v, T[1])
    for k in range(2, len(mu)):
        mu[k] = chebyshev_step(near, H, T[(k - 1) % m], T[(k - 2) % m], v, T[k % m])
    return dot(mu, mu) / 2


@njit
def moments_vjp(near, H, v, T, mu, b, after, Hb):
    """The cotangent of H at each end by itself."""
    Hb[:] = 0.0
    for i in range(len(v)):
        b[i], after[i] = mu[-1] * v[i], 0.0
    for k in range(len(mu) - 1, 1, -1):
        chebyshev_vjp(near, H, T[k - 1], b, mu[k - 1], v, after, Hb)
        b, after = after, b
    for i in range(len(v)):
        for s in range(3):
            Hb[i, s] += b[i] * v[near[i, s]]


def build_hamiltonian(theta, data, scale, w):
    x, bonds, image, buffers = theta["positions"], data["bonds"], data["image"], (w.bits, w.power, w.d, w.r, w.t)
    hopping(x, bonds, image, *w.lengths, scale, w.place, *buffers, w.H.reshape(-1))


def build_hamiltonian_vjp(w, xb):
    hopping_vjp(w.number, w.sign, w.place, w.d, w.r, w.t, w.Hb.reshape(-1), xb)
    return {"positions": xb}


def tight_binding(theta, data, size, work):
    w, y, _ = work
    build_hamiltonian(theta, data, 1.0, w)
    return product(w.near, w.H, data["x"], y)


def tight_binding_adjoint(theta, data, size, work):
    w, y, xb = work
    loss = tight_binding(theta, data, size, work)
    product_vjp(w.near, data["x"], y, w.Hb)
    return loss, build_hamiltonian_vjp(w, xb)


def kpm(theta, data, size, work):
    w, T, mu, _, _ = work
    build_hamiltonian(theta, data, 1 / HALF_WIDTH, w)
    return moments(w.near, w.H, data["v"], T[:3], mu)


def kpm_adjoint(theta, data, size, work):
    w, T, mu, (b, after), xb = work
    build_hamiltonian(theta, data, 1 / HALF_WIDTH, w)
    loss = moments(w.near, w.H, data["v"], T, mu)
    moments_vjp(w.near, w.H, data["v"], T, mu, b, after, w.Hb)
    return loss, build_hamiltonian_vjp(w, xb)


def lattice_prepare(structure, size):
    dtype, bonds = structure["positions"].dtype, structure["bonds"]
    near, number, sign, place = slots(bonds)
    bits, many = np.empty(BLOCK, np.int64), len(bonds)
    H, Hb = np.empty((2, *near.shape), dtype)
    return Bonds(
        tuple(box(size).tolist()),
        *(a.astype(np.int32) for a in (near, number)),
        sign=sign.astype(dtype),
        place=place.astype(np.int32),
        bits=bits,
        power=bits.view(float),
        d=np.empty((2, many), dtype),
        r=np.empty(many, dtype),
        t=np.empty(many, dtype),
        H=H,
        Hb=Hb,
    )


def tight_binding_prepare(structure, size):
    shape, dtype = structure["positions"]
    return lattice_prepare(structure, size), np.empty(shape[0], dtype), np.empty(shape, dtype)


def kpm_prepare(structure, size):
    shape, dtype = structure["positions"]
    T, b = (np.empty((many, shape[0]), dtype) for many in (max(size.K, 3), 2))
    return lattice_prepare(structure, size), T, np.empty(size.K, dtype), b, np.empty(shape, dtype)


IMPLEMENTATION = {
    "fem_matvec": {
        "loops": Implementation(
            fem_matvec, matvec_prepare, strategies={"adjoint": fem_matvec_adjoint, "duals": fem_matvec_duals}
        ),
    },
    "fem_solve": {
        "loops": Implementation(
            fem_solve, solve_prepare, strategies={"adjoint": fem_solve_adjoint, "duals": fem_solve_duals}
        ),
    },
    "tight_binding": {
        "loops": Implementation(tight_binding, tight_binding_prepare, strategies={"adjoint": tight_binding_adjoint})
    },
    "kpm": {"loops": Implementation(kpm, kpm_prepare, strategies={"adjoint": kpm_adjoint})},
}
