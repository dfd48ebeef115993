"""The valley glacier in Numba: scalar loops, and the discrete adjoint by hand.

All lengths and constants go into two numbers. With h the sum of the four thicknesses around a corner and a, b the sums
of two differences of S across it, K = c h^5 (a^2 + b^2 + eps) is D / (2 dx^2), and H_t the sum of (K + K') e over the
four edges of a node, e the capped difference of S. The adjoint goes by corners, as one assembles finite elements: each
hands something to its four nodes. What goes to the next row is kept in a row of scratch, what goes to the next column
in a scalar, which LLVM turns into a shuffle: one pass over the fields, and the inner loops are SIMD. For that they say
min and max, not if (1.4 times faster): a tie of min and max has no derivative to halve here, and the adjoint says if.

The network is pulled out: A is one number a temperature, so the long loop returns dL/dlnA, and the weights come after.

The semi-implicit step has the same K, no caps, and a banded Cholesky in loops: LAPACK's pbtrf takes 1.7 times as long at
such widths (30 at N = 64). The factors of all steps are kept for the adjoint's solves.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from backends.numba_backend import LANES, by_chunks
from backends.numba_math import copy
from problems import Implementation, seconds, structure
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
    LAYERS,
    PLATE,
    PLATE_RHO_G,
    RHO_G,
    YEARS,
    diverged,
    halfar_dx,
    most_iterations,
    pseudo_transient_stats,
    steps_a_year,
)


def scales(size, dtype):
    return units(BOX / size.N, RHO_G, dtype)


def units(dx, rho_g, dtype):
    """c / A a year, and eps, of the module's docstring."""
    return dtype.type(0.4 * rho_g**3 / (4**5 * 4 * dx**2 * 2 * dx**2)), dtype.type(4 * dx**2 * EPS)


@njit(fastmath=True)
def sia(X, B, c, eps, p, P, q, out, Ks, Fs):
    """out = p P + q X + H_t at X; Ks and Fs (N) are scratch."""
    N = X.shape[0]
    zero = X.dtype.type(0)
    for j in range(N):
        Ks[j] = Fs[j] = zero
    for i in range(N - 1):
        X0, X1, B0, B1, P0, out0 = X[i], X[i + 1], B[i], B[i + 1], P[i], out[i]
        K, Fy = zero, zero
        for j in range(N - 1):
            h00, h01, h10, h11 = max(zero, X0[j]), max(zero, X0[j + 1]), max(zero, X1[j]), max(zero, X1[j + 1])
            S00, S01, S10, S11 = B0[j] + h00, B0[j + 1] + h01, B1[j] + h10, B1[j + 1] + h11
            x, y = S10 - S00, S01 - S00
            a, b, h = x + (S11 - S01), y + (S11 - S10), (h00 + h10) + (h01 + h11)
            h2 = h * h
            west, K = K, c * (h2 * h2) * h * (a * a + b * b + eps)
            Fx = (west + K) * max(min(x, h10), -h00)
            south, Fy = Fy, (Ks[j] + K) * max(min(y, h01), -h00)
            out0[j] = p * P0[j] + q * X0[j] + ((Fx - Fs[j]) + (Fy - south))
            Ks[j] = K
            Fs[j] = Fx
        out0[0] = p * P0[0] + q * X0[0]  # nothing moves on the boundary
        out0[N - 1] = p * P0[N - 1] + q * X0[N - 1]
    for i in (0, N - 1):
        for j in range(N):
            out[i, j] = p * P[i, j] + q * X[i, j]


@njit(fastmath=True)
def sia_vjp(X, B, w, c, eps, q, out, ws, rest):
    """out = q w + J^T w and <w, H_t> at X, J the Jacobian of H_t; ws (2, N) and rest (N) are scratch."""
    N = X.shape[0]
    zero, five = X.dtype.type(0), X.dtype.type(5)
    value = zero
    for j in range(N):
        ws[0, j] = ws[1, j] = rest[j] = zero
    for i in range(N - 1):
        X0, X1, B0, B1, wi, out0 = X[i], X[i + 1], B[i], B[i + 1], w[i], out[i]
        w0, w1 = ws[i % 2], ws[1 - i % 2]  # w inside, 0 on the boundary
        for j in range(1, N - 1):
            w1[j] = w[i + 1, j] if i + 2 < N else zero
        west01, west11 = zero, zero
        for j in range(N - 1):
            h00, h01, h10, h11 = max(X0[j], zero), max(X0[j + 1], zero), max(X1[j], zero), max(X1[j + 1], zero)
            S00, S01, S10, S11 = B0[j] + h00, B0[j + 1] + h01, B1[j] + h10, B1[j + 1] + h11
            x0, x1, y0, y1 = S10 - S00, S11 - S01, S01 - S00, S11 - S10
            wx0, wx1, wy0, wy1 = w0[j] - w1[j], w0[j + 1] - w1[j + 1], w0[j] - w0[j + 1], w1[j] - w1[j + 1]
            a, b, h = x0 + x1, y0 + y1, (h00 + h10) + (h01 + h11)
            g, h2 = a * a + b * b + eps, h * h
            ch4 = c * (h2 * h2)
            K = ch4 * h * g
            Kb = wx0 * max(-h00, min(x0, h10)) + wx1 * max(-h01, min(x1, h11))
            Kb += wy0 * max(-h00, min(y0, h01)) + wy1 * max(-h10, min(y1, h11))
            value += Kb * K
            Kbch4 = Kb * ch4
            hb, t = five * g * Kbch4, (h + h) * Kbch4
            ab, bb = t * a, t * b
            # an edge hands K w to either end, except to the one that a binding cap has cut off
            r00 = hb - ab - bb - K * ((zero if x0 > h10 else wx0) + (zero if y0 > h01 else wy0))
            r10 = hb + ab - bb + K * ((zero if x0 < -h00 else wx0) - (zero if y1 > h11 else wy1))
            r01 = hb - ab + bb + K * ((zero if y0 < -h00 else wy0) - (zero if x1 > h11 else wx1))
            r11 = hb + ab + bb + K * ((zero if x1 < -h01 else wx1) + (zero if y1 < -h10 else wy1))
            Xb = rest[j] + r00 + west01
            out0[j] = q * wi[j] + (Xb if h00 > 0 else zero)
            rest[j] = r10 + west11
            west01, west11 = r01, r11
        out0[N - 1] = q * wi[N - 1] + (rest[N - 1] + west01 if X0[N - 1] > 0 else zero)
        rest[N - 1] = west11
    for j in range(N):
        out[N - 1, j] = q * w[N - 1, j] + (rest[j] if X[N - 1, j] > 0 else zero)
    return value


# rhs


class RhsWork(NamedTuple):
    c: float  # at lnA = 0
    eps: float
    dH: np.ndarray  # (N, N)
    Hb: np.ndarray  # (N, N): its own, so that a primal call leaves the gradient alone
    rows: np.ndarray  # (3, N)


def rhs_prepare(structure, size):
    N, dtype = size.N, structure["H"].dtype
    unit, eps = scales(size, dtype)
    return RhsWork(dtype.type(unit * size.A), eps, *(np.empty(shape, dtype) for shape in ((N, N), (N, N), (3, N))))


@njit(fastmath=True)
def rhs_kernel(H, lnA, B, v, c, eps, dH, rows):
    zero = H.dtype.type(0)
    sia(H, B, c * np.exp(lnA[()]), eps, zero, H, zero, dH, rows[0], rows[1])
    loss = zero
    for i in range(len(H)):
        for j in range(len(H)):
            loss += v[i, j] * dH[i, j]
    return loss


@njit(fastmath=True)
def rhs_vjp_kernel(H, lnA, B, v, c, eps, Hb, rows):
    return sia_vjp(H, B, v, c * np.exp(lnA[()]), eps, H.dtype.type(0), Hb, rows[:2], rows[2])


@njit(fastmath=True)
def capped(x, lo, hi):
    """max(min(x, hi), -lo), and whether lo and hi count in its derivative, dx being dhi - dlo."""
    zero, one = x * 0, x * 0 + 1
    return max(min(x, hi), -lo), zero if x > hi else one, zero if x < -lo else one


@njit(fastmath=True)
def rhs_duals_kernel(H, dH, lnA, dlnA, B, v, c, eps, dloss):
    """The loss corner by corner, and its tangents into dloss."""
    N, zero, one = len(H), H.dtype.type(0), H.dtype.type(1)
    c, loss = c * np.exp(lnA[()]), zero
    dloss[:] = 0
    for i in range(N - 1):
        w0, w1 = one if i > 0 else zero, one if i + 2 < N else zero  # nothing moves on the boundary
        for j in range(N - 1):
            m0, m1 = one if j > 0 else zero, one if j + 2 < N else zero
            v00, v01, v10, v11 = (
                w0 * m0 * v[i, j],
                w0 * m1 * v[i, j + 1],
                w1 * m0 * v[i + 1, j],
                w1 * m1 * v[i + 1, j + 1],
            )
            h00, h01, h10, h11 = (
                max(H[i, j], zero),
                max(H[i, j + 1], zero),
                max(H[i + 1, j], zero),
                max(H[i + 1, j + 1], zero),
            )
            S00, S01, S10, S11 = B[i, j] + h00, B[i, j + 1] + h01, B[i + 1, j] + h10, B[i + 1, j + 1] + h11
            x0, lo_x0, hi_x0 = capped(S10 - S00, h00, h10)
            x1, lo_x1, hi_x1 = capped(S11 - S01, h01, h11)
            y0, lo_y0, hi_y0 = capped(S01 - S00, h00, h01)
            y1, lo_y1, hi_y1 = capped(S11 - S10, h10, h11)
            a, b, h = S10 - S00 + S11 - S01, S01 - S00 + S11 - S10, h00 + h01 + h10 + h11
            g, ch4 = a * a + b * b + eps, c * h * h * h * h
            K, flow = ch4 * h * g, (v00 - v10) * x0 + (v01 - v11) * x1 + (v00 - v01) * y0 + (v10 - v11) * y1
            loss += flow * K
            for k in range(LANES):
                d00 = dH[i, j, k] if H[i, j] > 0 else zero
                d01 = dH[i, j + 1, k] if H[i, j + 1] > 0 else zero
                d10 = dH[i + 1, j, k] if H[i + 1, j] > 0 else zero
                d11 = dH[i + 1, j + 1, k] if H[i + 1, j + 1] > 0 else zero
                dflow = (v00 - v10) * (hi_x0 * d10 - lo_x0 * d00) + (v01 - v11) * (hi_x1 * d11 - lo_x1 * d01)
                dflow += (v00 - v01) * (hi_y0 * d01 - lo_y0 * d00) + (v10 - v11) * (hi_y1 * d11 - lo_y1 * d10)
                da, db, dh = d10 - d00 + d11 - d01, d01 - d00 + d11 - d10, d00 + d01 + d10 + d11
                dK = ch4 * (5 * g * dh + 2 * h * (a * da + b * db)) + K * dlnA[k]
                dloss[k] += dflow * K + flow * dK
    return loss


def rhs(theta, data, size, work):
    return rhs_kernel(theta["H"], theta["lnA"], data["B"], data["v"], work.c, work.eps, work.dH, work.rows)


def rhs_adjoint(theta, data, size, work):
    loss = rhs_vjp_kernel(theta["H"], theta["lnA"], data["B"], data["v"], work.c, work.eps, work.Hb, work.rows)
    return loss, {"H": work.Hb, "lnA": loss}  # H_t is linear in A


def rhs_duals(theta, data, size, work):
    H, lnA, B, v = theta["H"], theta["lnA"], data["B"], data["v"]
    return by_chunks(theta, lambda d, out: rhs_duals_kernel(H, d["H"], lnA, d["lnA"], B, v, work.c, work.eps, out))


# ude


@njit(fastmath=True)
def dense(W, b, x, y):
    for o in range(W.shape[0]):
        y[o] = b[o]
        for i in range(W.shape[1]):
            y[o] += W[o, i] * x[i]


@njit(fastmath=True)
def dense_vjp(W, x, yb, Wb, bb, xb):
    """Adds to Wb and bb, sets xb."""
    xb[:] = 0
    for o in range(W.shape[0]):
        bb[o] += yb[o]
        for i in range(W.shape[1]):
            Wb[o, i] += yb[o] * x[i]
            xb[i] += yb[o] * W[o, i]


@njit(fastmath=True)
def softplus(z):
    for i in range(len(z)):
        z[i] = np.log1p(np.exp(z[i]))


@njit(fastmath=True)
def softplus_vjp(y, yb):
    """From the value y alone: the derivative is 1 - exp(-y)."""
    for i in range(len(y)):
        yb[i] *= -np.expm1(-y[i])


@njit(fastmath=True)
def network(theta, T, z):
    """z[4] = sigmoid of the last layer; z[0], ..., z[4] are the values of all layers."""
    W1, b1, W2, b2, W3, b3, W4, b4 = theta
    z[0][0] = (T + 25) / 26
    dense(W1, b1, z[0], z[1])
    softplus(z[1])
    dense(W2, b2, z[1], z[2])
    softplus(z[2])
    dense(W3, b3, z[2], z[3])
    softplus(z[3])
    dense(W4, b4, z[3], z[4])
    z[4][0] = 1 / (1 + np.exp(-z[4][0]))
    return z[4][0]


@njit(fastmath=True)
def network_vjp(theta, z, zb, thetab):
    """Adds to thetab; zb[4] is the cotangent of the output."""
    W1, b1, W2, b2, W3, b3, W4, b4 = theta
    W1b, b1b, W2b, b2b, W3b, b3b, W4b, b4b = thetab
    zb[4][0] *= z[4][0] * (1 - z[4][0])
    dense_vjp(W4, z[3], zb[4], W4b, b4b, zb[3])
    softplus_vjp(z[3], zb[3])
    dense_vjp(W3, z[2], zb[3], W3b, b3b, zb[2])
    softplus_vjp(z[2], zb[2])
    dense_vjp(W2, z[1], zb[2], W2b, b2b, zb[1])
    softplus_vjp(z[1], zb[1])
    dense_vjp(W1, z[0], zb[1], W1b, b1b, zb[0])


SSPRK3 = [[0, 1], [3 / 4, 1 / 4], [1 / 3, 2 / 3]]  # stage s: X[s + 1] = p X[0] + q (X[s] + dt H_t(X[s]))


class UdeWork(NamedTuple):
    unit: float
    eps: float
    A_span: np.ndarray  # A_MIN, A_MAX - A_MIN
    ssp: np.ndarray  # (3, 2)
    X: np.ndarray  # (stages + 1, N, N): one temperature's trajectory
    L: np.ndarray  # (4, N, N): one step's states, or what the loss changes by with each of them
    rows: np.ndarray  # (3, N)
    z: tuple  # the values in the network
    zb: tuple
    flat: np.ndarray  # (83,): the gradient
    thetab: tuple  # its blocks


def ude_prepare(structure, size):
    """All stages of one temperature's trajectory are stored, 24 MB at N = 64. Storing steps only, and computing their
    stages again on the way back, takes a third of that and 1.15 to 1.27 times the time."""
    N, spy, names = size.N, steps_a_year(size), [f"{kind}{layer}" for layer in range(1, len(LAYERS)) for kind in "Wb"]
    shapes, dtype = [structure[name].shape for name in names], structure["W1"].dtype
    unit, eps = scales(size, dtype)
    X, L, rows = (np.empty(shape, dtype) for shape in ((3 * size.years * spy + 1, N, N), (4, N, N), (3, N)))
    z, zb = (tuple(np.empty(n, dtype) for n in LAYERS) for _ in range(2))
    ends = np.cumsum([np.prod(shape) for shape in shapes])
    flat = np.empty(ends[-1], dtype)
    thetab = tuple(block.reshape(shape) for block, shape in zip(np.split(flat, ends[:-1]), shapes, strict=True))
    A_span, ssp = np.array([A_MIN, A_MAX - A_MIN], dtype), np.array(SSPRK3, dtype)
    return UdeWork(dtype.type(unit / spy), eps, A_span, ssp, X, L, rows, z, zb, flat, thetab)


@njit(fastmath=True)
def misfit(H, Href):
    total = H.dtype.type(0)
    for i in range(H.shape[0]):
        for j in range(H.shape[1]):
            total += (H[i, j] - Href[i, j]) ** 2
    return total


@njit(fastmath=True)
def ssprk3(L, B, c, eps, ssp, rows):
    """L[0] a step later; the others are its stages."""
    for s in range(3):
        p, q = ssp[s]
        sia(L[s], B, q * c, eps, p, L[0], q, L[s + 1], rows[0], rows[1])
    copy(L[3], L[0])


@njit(fastmath=True)
def ude_kernel(theta, B, H0, Href, T, unit, eps, A_span, ssp, X, L, rows, z, zb, flat, thetab):
    spy, loss = len(X) // 3 // len(Href), X.dtype.type(0)
    for k in range(len(T)):
        A = A_span[0] + A_span[1] * network(theta, T[k], z)
        copy(H0, L[0])
        for year in range(len(Href)):
            for _ in range(spy):
                ssprk3(L, B, A * unit, eps, ssp, rows)
            loss += misfit(L[0], Href[year, k])
    return loss / Href.size


@njit(fastmath=True)
def trajectory(X, B, c, eps, ssp, rows):
    """From X[0] to X[-1], all stages."""
    for n in range(0, len(X) - 1, 3):
        for s in range(3):
            p, q = ssp[s]
            sia(X[n + s], B, q * c, eps, p, X[n], q, X[n + s + 1], rows[0], rows[1])


@njit(fastmath=True)
def trajectory_vjp(X, B, Href, c, eps, ssp, L, rows):
    """The misfit to Href (years, N, N) summed over the years, and its derivative by ln c; that by X[0] is left in L[3]."""
    every = (len(X) - 1) // len(Href)
    loss = lncb = X.dtype.type(0)
    L0, L2, L3 = L[0], L[2], L[3]
    L3[:] = 0
    for n in range(len(X) - 1, 0, -3):
        if n % every == 0:
            H, H_ref = X[n], Href[n // every - 1]
            loss += misfit(H, H_ref)
            for i in range(len(B)):
                for j in range(len(B)):
                    d = H[i, j] - H_ref[i, j]
                    L3[i, j] += d + d
        for s in range(2, -1, -1):
            q = ssp[s, 1]
            lncb += sia_vjp(X[n - 3 + s], B, L[s + 1], q * c, eps, q, L[s], rows[:2], rows[2])
        for i in range(len(B)):
            for j in range(len(B)):
                L3[i, j] = L0[i, j] + ssp[1, 0] * L2[i, j] + ssp[2, 0] * L3[i, j]
    return loss, lncb


@njit(fastmath=True)
def ude_vjp_kernel(theta, B, H0, Href, T, unit, eps, A_span, ssp, X, L, rows, z, zb, flat, thetab):
    loss = X.dtype.type(0)
    flat[:] = 0
    for k in range(len(T)):
        A = A_span[0] + A_span[1] * network(theta, T[k], z)
        copy(H0, X[0])
        trajectory(X, B, A * unit, eps, ssp, rows)
        part, lnAb = trajectory_vjp(X, B, Href[:, k], A * unit, eps, ssp, L, rows)
        loss += part
        zb[4][0] = lnAb / A * A_span[1] / Href.size
        network_vjp(theta, z, zb, thetab)
    return loss / Href.size


@njit(fastmath=True)
def dense_duals(W, dW, db, x, dx, dy):
    for o in range(W.shape[0]):
        for k in range(LANES):
            dy[o, k] = db[o, k]
        for i in range(W.shape[1]):
            for k in range(LANES):
                dy[o, k] += dW[o, i, k] * x[i] + W[o, i] * dx[i, k]


@njit(fastmath=True)
def softplus_duals(y, dy):
    for i in range(len(y)):
        for k in range(LANES):
            dy[i, k] *= -np.expm1(-y[i])


@njit(fastmath=True)
def network_duals(theta, dtheta, z, dz):
    """The tangents dz of the values z."""
    W1, _, W2, _, W3, _, W4, _ = theta
    dW1, db1, dW2, db2, dW3, db3, dW4, db4 = dtheta
    dz[0][:] = 0
    dense_duals(W1, dW1, db1, z[0], dz[0], dz[1])
    softplus_duals(z[1], dz[1])
    dense_duals(W2, dW2, db2, z[1], dz[1], dz[2])
    softplus_duals(z[2], dz[2])
    dense_duals(W3, dW3, db3, z[2], dz[2], dz[3])
    softplus_duals(z[3], dz[3])
    dense_duals(W4, dW4, db4, z[3], dz[3], dz[4])
    for k in range(LANES):
        dz[4][0, k] *= z[4][0] * (1 - z[4][0])


@njit(fastmath=True)
def sia_jvp(X, dX, B, c, dlnc, eps, p, dP, q, dout, Ks, dKs, dFs):
    """The tangent of out in sia, dlnc that of ln c: one at a time, so that the inner loop is SIMD as there."""
    N = X.shape[0]
    zero, five = X.dtype.type(0), X.dtype.type(5)
    for j in range(N):
        Ks[j] = dKs[j] = dFs[j] = zero
    for i in range(N - 1):
        X0, X1, B0, B1, D0, D1, P0, out0 = X[i], X[i + 1], B[i], B[i + 1], dX[i], dX[i + 1], dP[i], dout[i]
        K, dK, dFy = zero, zero, zero
        for j in range(N - 1):
            h00, h01, h10, h11 = max(zero, X0[j]), max(zero, X0[j + 1]), max(zero, X1[j]), max(zero, X1[j + 1])
            d00, d01 = D0[j] if h00 > 0 else zero, D0[j + 1] if h01 > 0 else zero
            d10, d11 = D1[j] if h10 > 0 else zero, D1[j + 1] if h11 > 0 else zero
            S00, S01, S10, S11 = B0[j] + h00, B0[j + 1] + h01, B1[j] + h10, B1[j + 1] + h11
            x, y, dx, dy = S10 - S00, S01 - S00, d10 - d00, d01 - d00
            a, b, h = x + (S11 - S01), y + (S11 - S10), (h00 + h10) + (h01 + h11)
            da, db, dh = dx + (d11 - d01), dy + (d11 - d10), (d00 + d10) + (d01 + d11)
            h2, g = h * h, a * a + b * b + eps
            ch4 = c * (h2 * h2)
            west, dwest = K, dK
            K = ch4 * h * g
            dK = ch4 * (five * g * dh + (h + h) * (a * da + b * db)) + K * dlnc
            dx = d10 if x > h10 else (-d00 if x < -h00 else dx)
            dy = d01 if y > h01 else (-d00 if y < -h00 else dy)
            dFx = (dwest + dK) * max(min(x, h10), -h00) + (west + K) * dx
            south, dFy = dFy, (dKs[j] + dK) * max(min(y, h01), -h00) + (Ks[j] + K) * dy
            out0[j] = p * P0[j] + q * D0[j] + ((dFx - dFs[j]) + (dFy - south))
            Ks[j] = K
            dKs[j] = dK
            dFs[j] = dFx
        out0[0] = p * P0[0] + q * D0[0]
        out0[N - 1] = p * P0[N - 1] + q * D0[N - 1]
    for i in (0, N - 1):
        for j in range(N):
            dout[i, j] = p * dP[i, j] + q * dX[i, j]


@njit(fastmath=True)
def misfit_jvp(H, dH, Href):
    total = H.dtype.type(0)
    for i in range(H.shape[0]):
        for j in range(H.shape[1]):
            total += 2 * (H[i, j] - Href[i, j]) * dH[i, j]
    return total


@njit(fastmath=True)
def ude_duals_kernel(theta, dtheta, B, H0, Href, T, unit, eps, A_span, ssp, spy, L, dL, rows, z, dz, dloss):
    """The loss, and its tangents into dloss."""
    loss = B.dtype.type(0)
    dloss[:] = 0
    for k in range(len(T)):
        A = A_span[0] + A_span[1] * network(theta, T[k], z)
        network_duals(theta, dtheta, z, dz)
        copy(H0, L[0])
        for lane in range(LANES):
            dL[lane, 0] = 0
        for year in range(len(Href)):
            for _ in range(spy):
                for s in range(3):
                    p, q = ssp[s]
                    c = q * A * unit
                    for lane in range(LANES):
                        d, dlnA = dL[lane], dz[4][0, lane] * A_span[1] / A
                        sia_jvp(L[s], d[s], B, c, dlnA, eps, p, d[0], q, d[s + 1], rows[0], rows[1], rows[2])
                    sia(L[s], B, c, eps, p, L[0], q, L[s + 1], rows[0], rows[1])
                copy(L[3], L[0])
                for lane in range(LANES):
                    copy(dL[lane, 3], dL[lane, 0])
            loss += misfit(L[0], Href[year, k])
            for lane in range(LANES):
                dloss[lane] += misfit_jvp(L[0], dL[lane, 0], Href[year, k])
    for lane in range(LANES):
        dloss[lane] /= Href.size
    return loss / Href.size


def ude_arguments(theta, data):
    return tuple(theta.values()), data["B"], data["H0"], data["Href"], data["T"]


def ude(theta, data, size, work):
    return ude_kernel(*ude_arguments(theta, data), *work)


def ude_adjoint(theta, data, size, work):
    loss = ude_vjp_kernel(*ude_arguments(theta, data), *work)
    return loss, dict(zip(theta, work.thetab, strict=True))


def ude_duals(theta, data, size, work):
    """All tangents go through the ice. That they meet in A, one number a temperature, would take one tangent, not 83; but to
    gather them there is to know the program, as the adjoint does."""
    dL = np.empty((LANES, *work.L.shape), work.L.dtype)
    dz = tuple(np.empty((n, LANES), work.L.dtype) for n in LAYERS)
    fixed = work.unit, work.eps, work.A_span, work.ssp, steps_a_year(size), work.L, dL, work.rows, work.z, dz
    blocks, *arrays = ude_arguments(theta, data)

    def dual(d, out):
        return ude_duals_kernel(blocks, tuple(d.values()), *arrays, *fixed, out)

    return by_chunks(theta, dual)


# semi_implicit


class SemiImplicitWork(NamedTuple):
    c: float  # at lnA = 0
    eps: float
    X: np.ndarray  # (nst + 1, N, N): S' - B, of which H' is the positive part; X[0] = H0
    K: np.ndarray  # (N-1, N-1) on corners
    D: np.ndarray  # (3, (N-2)^2): the matrix's entries of a node with itself, the next, that of the next row
    r: np.ndarray  # (1, (N-2)^2): right-hand side, then solution
    box: np.ndarray  # (nst, 4): first and last row and column of the nodes around the ice
    A: np.ndarray  # (nst, (N-2)^2 (N-1)): the factors, as far as their boxes reach


class Cotangents(NamedTuple):
    X: np.ndarray  # (N, N): of X[n]; at last of H0
    lam: np.ndarray  # (N, N), 0 on the boundary
    rest: np.ndarray  # (N)


def semi_implicit_prepare(structure, size):
    N, nst, dtype = size.N, size.nst, structure["H0"].dtype
    unit, eps = scales(size, dtype)
    inner = (N - 2) ** 2
    shapes = (nst + 1, N, N), (N - 1, N - 1), (3, inner), (1, inner), (nst, inner * (N - 1))
    X, K, D, r, A = (np.empty(shape, dtype) for shape in shapes)
    box = np.empty((nst, 4), np.int64)
    cotangents = Cotangents(np.empty((N, N), dtype), np.zeros((N, N), dtype), np.empty(N, dtype))
    return SemiImplicitWork(dtype.type(unit * size.A * YEARS / nst), eps, X, K, D, r, box, A), cotangents


@njit(fastmath=True)
def corners(X, B, c, eps, K):
    zero = X.dtype.type(0)
    for i in range(len(K)):
        X0, X1, B0, B1 = X[i], X[i + 1], B[i], B[i + 1]
        for j in range(len(K)):
            h00, h01, h10, h11 = max(zero, X0[j]), max(zero, X0[j + 1]), max(zero, X1[j]), max(zero, X1[j + 1])
            S00, S01, S10, S11 = B0[j] + h00, B0[j + 1] + h01, B1[j] + h10, B1[j + 1] + h11
            x, y = S10 - S00, S01 - S00
            a, b, h = x + (S11 - S01), y + (S11 - S10), (h00 + h10) + (h01 + h11)
            h2 = h * h
            K[i, j] = c * (h2 * h2) * h * (a * a + b * b + eps)


@njit
def around(K, box):
    """The box of inner nodes that have ice around. Outside, nothing flows, and the matrix is the identity."""
    N = len(K) + 1
    box[::2], box[1::2] = N - 2, 1
    for i in range(N - 1):
        for j in range(N - 1):
            if K[i, j] > 0:
                box[0], box[1] = min(box[0], max(i, 1)), max(box[1], min(i + 1, N - 2))
                box[2], box[3] = min(box[2], max(j, 1)), max(box[3], min(j + 1, N - 2))
    if box[0] > box[1] or box[2] > box[3]:
        box[:] = 1


@njit(fastmath=True)
def assemble(X, B, K, box, D, r):
    """The matrix in the box, which is symmetric, and the right-hand side."""
    zero, one, k = X.dtype.type(0), X.dtype.type(1), 0
    i0, i1, j0, j1 = box
    for i in range(i0, i1 + 1):
        for j in range(j0, j1 + 1):
            north, south = K[i - 1, j - 1] + K[i - 1, j], K[i, j - 1] + K[i, j]
            west, east = K[i - 1, j - 1] + K[i, j - 1], K[i - 1, j] + K[i, j]
            D[0, k] = one + ((north + south) + (west + east))
            D[1, k] = -east if j < j1 else zero
            D[2, k] = -south
            S = B[i, j] + max(zero, X[i, j])
            r[k] = (
                north * (B[i - 1, j] + max(zero, X[i - 1, j]) - S)
                + south * (B[i + 1, j] + max(zero, X[i + 1, j]) - S)
                + west * (B[i, j - 1] + max(zero, X[i, j - 1]) - S)
                + east * (B[i, j + 1] + max(zero, X[i, j + 1]) - S)
            )
            k += 1


@njit(fastmath=True)
def cholesky(A):
    """A = L with A[k, m] its entry (k + m, k), but the inverse on the diagonal. By columns: the inner loop is SIMD."""
    n, width = A.shape[0], A.shape[1] - 1
    for k in range(n):
        Ak, below = A[k], min(width, n - 1 - k)
        Ak[0] = 1 / np.sqrt(Ak[0])
        for m in range(1, below + 1):
            Ak[m] *= Ak[0]
        for p in range(1, below + 1):
            Ap, f = A[k + p], Ak[p]
            for m in range(below + 1 - p):
                Ap[m] -= f * Ak[p + m]


@njit(fastmath=True)
def substitute(L, r):
    n, width = L.shape[0], L.shape[1] - 1
    for k in range(n):
        r[k] *= L[k, 0]
        for m in range(1, min(width, n - 1 - k) + 1):
            r[k + m] -= r[k] * L[k, m]
    for k in range(n - 1, -1, -1):
        total = r[k]
        for m in range(1, min(width, n - 1 - k) + 1):
            total -= L[k, m] * r[k + m]
        r[k] = total * L[k, 0]


@njit
def matrix(box, A):
    """A's part that belongs to the box, (nodes, columns + 1)."""
    columns = box[3] - box[2] + 1
    nodes = (box[1] - box[0] + 1) * columns
    return A[: nodes * (columns + 1)].reshape(nodes, columns + 1)


@njit
def solve_box(D, box, A, r):
    """r becomes the solution in the box; A[k, m], the matrix's entry (k + m, k), becomes its factor."""
    L = matrix(box, A)
    columns = L.shape[1] - 1
    for k in range(len(L)):
        for m in range(columns + 1):
            L[k, m] = 0
        L[k, 0], L[k, 1] = D[0, k], D[1, k]
        L[k, columns] = D[2, k]
    cholesky(L)
    substitute(L, r)


@njit
def solve_box_again(box, A, r):
    """By the factor that is in A."""
    substitute(matrix(box, A), r)


@njit(fastmath=True)
def step(X, B, c, eps, K, D, r, box, A, out):
    zero = X.dtype.type(0)
    corners(X, B, c, eps, K)
    around(K, box)
    assemble(X, B, K, box, D, r)
    solve_box(D, box, A, r)
    for i in range(len(X)):
        for j in range(len(X)):
            out[i, j] = max(zero, X[i, j])
    k = 0
    for i in range(box[0], box[1] + 1):
        for j in range(box[2], box[3] + 1):
            out[i, j] += r[k]
            k += 1


@njit(fastmath=True)
def flow_vjp(X, Xn, B, c, eps, lam, Xb, rest):
    """Adds to Xb the gradient by X of <lam, flow(K, S)>, where S' stands for S as far as K is differentiated, and cuts it
    where there is no ice; returns the derivative by ln c. sia_vjp without caps."""
    N = X.shape[0]
    zero, five = X.dtype.type(0), X.dtype.type(5)
    value = zero
    rest[:] = zero
    for i in range(N - 1):
        X0, X1, B0, B1, lam0, lam1, Xb0 = X[i], X[i + 1], B[i], B[i + 1], lam[i], lam[i + 1], Xb[i]
        west01, west11 = zero, zero
        for j in range(N - 1):
            h00, h01, h10, h11 = max(X0[j], zero), max(X0[j + 1], zero), max(X1[j], zero), max(X1[j + 1], zero)
            S00, S01, S10, S11 = B0[j] + h00, B0[j + 1] + h01, B1[j] + h10, B1[j + 1] + h11
            x, y = S10 - S00, S01 - S00
            a, b, h = x + (S11 - S01), y + (S11 - S10), (h00 + h10) + (h01 + h11)
            lx0, lx1, ly0, ly1 = (
                lam0[j] - lam1[j],
                lam0[j + 1] - lam1[j + 1],
                lam0[j] - lam0[j + 1],
                lam1[j] - lam1[j + 1],
            )
            g, h2 = a * a + b * b + eps, h * h
            ch4 = c * (h2 * h2)
            K = ch4 * h * g
            S00, S01, S10, S11 = (
                B0[j] + Xn[i, j],
                B0[j + 1] + Xn[i, j + 1],
                B1[j] + Xn[i + 1, j],
                B1[j + 1] + Xn[i + 1, j + 1],
            )
            Kb = lx0 * (S10 - S00) + lx1 * (S11 - S01) + ly0 * (S01 - S00) + ly1 * (S11 - S10)
            value += Kb * K
            Kbch4 = Kb * ch4
            hb, t = five * g * Kbch4, (h + h) * Kbch4
            ab, bb = t * a, t * b
            r00 = hb - ab - bb - K * (lx0 + ly0)
            r10 = hb + ab - bb + K * (lx0 - ly1)
            r01 = hb - ab + bb + K * (ly0 - lx1)
            r11 = hb + ab + bb + K * (lx1 + ly1)
            total = Xb0[j] + (rest[j] + r00 + west01)
            Xb0[j] = total if h00 > 0 else zero
            rest[j] = r10 + west11
            west01, west11 = r01, r11
        total = Xb0[N - 1] + (rest[N - 1] + west01)
        Xb0[N - 1] = total if X0[N - 1] > 0 else zero
        rest[N - 1] = west11
    for j in range(N):
        total = Xb[N - 1, j] + rest[j]
        Xb[N - 1, j] = total if X[N - 1, j] > 0 else zero
    return value


@njit(fastmath=True)
def step_vjp(X, Xn, B, c, eps, r, box, A, Xb, lam, rest):
    """Xb from the cotangent of Xn to that of X. From M (S' - S) = flow(K, S), M = 1 - flow(K, .), and with M lam = Xb
    inside, lam = 0 on the boundary: <Xb, dS'> = <Xb, dS> + <lam, flow(K, dS) + flow(dK, S')>."""
    for i in range(1, len(X) - 1):
        for j in range(1, len(X) - 1):
            lam[i, j] = Xb[i, j]
    k = 0
    for i in range(box[0], box[1] + 1):
        for j in range(box[2], box[3] + 1):
            r[k] = Xb[i, j]
            k += 1
    solve_box_again(box, A, r)
    k = 0
    for i in range(box[0], box[1] + 1):
        for j in range(box[2], box[3] + 1):
            lam[i, j] = r[k]
            k += 1
    return flow_vjp(X, Xn, B, c, eps, lam, Xb, rest)


@njit(fastmath=True)
def semi_implicit_kernel(lnA, H0, B, c, eps, X, K, D, r, box, A):
    """r, box and A have room for the solves of all steps, or of one."""
    c, loss = c * np.exp(lnA[()]), H0.dtype.type(0)
    copy(H0, X[0])
    for n in range(len(X) - 1):
        step(X[n], B, c, eps, K, D, r[n % len(r)], box[n % len(A)], A[n % len(A)], X[n + 1])
    for i in range(len(B)):
        for j in range(len(B)):
            loss += (max(H0.dtype.type(0), X[-1, i, j]) - H0[i, j]) ** 2
    return loss / H0.size


@njit(fastmath=True)
def semi_implicit_vjp_kernel(lnA, H0, B, c, eps, X, K, D, r, box, A, Xb, lam, rest):
    """Leaves the gradient by H0 in Xb; returns the loss and its derivative by lnA."""
    loss = semi_implicit_kernel(lnA, H0, B, c, eps, X, K, D, r, box, A)
    c, zero, lnAb, N = c * np.exp(lnA[()]), H0.dtype.type(0), H0.dtype.type(0), len(B)
    scale = H0.dtype.type(2 / N**2)
    for i in range(N):
        for j in range(N):
            Xb[i, j] = scale * (X[-1, i, j] - H0[i, j]) if X[-1, i, j] > 0 else zero
    for n in range(len(X) - 2, -1, -1):
        lnAb += step_vjp(X[n], X[n + 1], B, c, eps, r[0], box[n], A[n], Xb, lam, rest)
    for i in range(N):
        for j in range(N):
            Xb[i, j] -= scale * (max(zero, X[-1, i, j]) - H0[i, j])
    return loss, lnAb


def semi_implicit(theta, data, size, work):
    work, _ = work
    return semi_implicit_kernel(theta["lnA"], theta["H0"], data["B"], *work[:-1], work.A[:1])


def semi_implicit_adjoint(theta, data, size, work):
    """The matrix becomes its factor in place, buffers are overwritten; the reverse sweep goes by the factors that are left."""
    work, cotangents = work
    loss, lnAb = semi_implicit_vjp_kernel(theta["lnA"], theta["H0"], data["B"], *work, *cotangents)
    return loss, {"lnA": lnAb, "H0": cotangents.X}


def box_stats(theta, data, size, solve=solve_box, again=solve_box_again):
    """Of the gradient, and the seconds of its solves alone."""
    theta, data = ({name: np.asarray(a) for name, a in arrays.items()} for arrays in (theta, data))
    work, systems = semi_implicit_prepare(structure(theta, data), size)[0], []
    semi_implicit(theta, data, size, (work, None))
    c = work.c * np.exp(theta["lnA"])
    for n in range(size.nst):
        corners(work.X[n], data["B"], c, work.eps, work.K)
        around(work.K, work.box[n])
        assemble(work.X[n], data["B"], work.K, work.box[n], work.D, work.r[0])
        systems.append((work.D.copy(), work.box[n], work.A[n], work.r[0].copy()))

    def solves():
        for D, *system in systems:
            solve(D, *system)
            again(*system)

    return {"steps": size.nst, "factorisations": size.nst, "solves": 2 * size.nst, "solves_s": seconds(solves)}


# Flat ground and no caps, of halfar and pseudo_transient: a row of nodes at a time, so that each does with it what it wants


@njit(fastmath=True)
def clear(a):
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            a[i, j] = 0


@njit(fastmath=True)
def flow_row(X, i, c, eps, Ks, Fs, f, m):
    """H_t of the nodes (i, 0 to N-2) into f, half the sum of K over their corners into m, where one is wanted. Ks and Fs
    hold the K and fluxes of the row before, at first zeros."""
    zero, half = X.dtype.type(0), X.dtype.type(0.5)
    X0, X1 = X[i], X[i + 1]
    K, Fy, K00 = zero, zero, zero
    for j in range(len(X) - 1):
        h00, h01, h10, h11 = X0[j], X0[j + 1], X1[j], X1[j + 1]
        x, y = h10 - h00, h01 - h00
        a, b, h = x + (h11 - h01), y + (h11 - h10), (h00 + h10) + (h01 + h11)
        h2 = h * h
        K10, K01, K = K, Ks[j], c * (h2 * h2) * h * (a * a + b * b + eps)
        Fx = (K10 + K) * x
        south, Fy = Fy, (K01 + K) * y
        f[j] = (Fx - Fs[j]) + (Fy - south)
        if m is not None:
            m[j] = half * ((K00 + K10) + (K01 + K))
            K00 = K01
        Ks[j] = K
        Fs[j] = Fx


@njit(fastmath=True)
def flow_row_jvp(X, dX, i, c, eps, dlnc, Ks, dKs, dFs, df, m, dm):
    """m of flow_row, and the tangents of f and m, dlnc that of ln c."""
    zero, half, five = X.dtype.type(0), X.dtype.type(0.5), X.dtype.type(5)
    X0, X1, D0, D1 = X[i], X[i + 1], dX[i], dX[i + 1]
    K, K00, dK, dFy, dK00 = zero, zero, zero, zero, zero
    for j in range(len(X) - 1):
        h00, h01, h10, h11 = X0[j], X0[j + 1], X1[j], X1[j + 1]
        d00, d01, d10, d11 = D0[j], D0[j + 1], D1[j], D1[j + 1]
        x, y, dx, dy = h10 - h00, h01 - h00, d10 - d00, d01 - d00
        a, b, h = x + (h11 - h01), y + (h11 - h10), (h00 + h10) + (h01 + h11)
        da, db, dh = dx + (d11 - d01), dy + (d11 - d10), (d00 + d10) + (d01 + d11)
        h2, g = h * h, a * a + b * b + eps
        ch4 = c * (h2 * h2)
        K10, K01, dK10, dK01 = K, Ks[j], dK, dKs[j]
        K = ch4 * h * g
        dK = ch4 * (five * g * dh + (h + h) * (a * da + b * db)) + K * dlnc
        dFx = (dK10 + dK) * x + (K10 + K) * dx
        south, dFy = dFy, (dK01 + dK) * y + (K01 + K) * dy
        df[j] = (dFx - dFs[j]) + (dFy - south)
        if m is not None:
            m[j], dm[j] = half * ((K00 + K10) + (K01 + K)), half * ((dK00 + dK10) + (dK01 + dK))
            K00, dK00 = K01, dK01
        Ks[j] = K
        dKs[j] = dK
        dFs[j] = dFx


@njit(fastmath=True)
def flow_rows_vjp(X, w, m, c, eps, Xb, rest):
    """Adds to Xb the gradient by X of <w, f> + <m, m of flow_row>; w and m are 0 on the boundary. Returns the derivative by
    ln c. sia_vjp on flat ground, without caps."""
    N = X.shape[0]
    zero, half, five = X.dtype.type(0), X.dtype.type(0.5), X.dtype.type(5)
    value = zero
    for j in range(N):
        rest[j] = zero
    for i in range(N - 1):
        X0, X1, w0, w1, Xb0 = X[i], X[i + 1], w[i], w[i + 1], Xb[i]
        west01, west11 = zero, zero
        for j in range(N - 1):
            h00, h01, h10, h11 = X0[j], X0[j + 1], X1[j], X1[j + 1]
            x0, x1, y0, y1 = h10 - h00, h11 - h01, h01 - h00, h11 - h10
            wx0, wx1, wy0, wy1 = w0[j] - w1[j], w0[j + 1] - w1[j + 1], w0[j] - w0[j + 1], w1[j] - w1[j + 1]
            a, b, h = x0 + x1, y0 + y1, (h00 + h10) + (h01 + h11)
            g, h2 = a * a + b * b + eps, h * h
            ch4 = c * (h2 * h2)
            K = ch4 * h * g
            Kb = (wx0 * x0 + wx1 * x1) + (wy0 * y0 + wy1 * y1)
            if m is not None:
                Kb += half * ((m[i, j] + m[i, j + 1]) + (m[i + 1, j] + m[i + 1, j + 1]))
            value += Kb * K
            Kbch4 = Kb * ch4
            hb, t = five * g * Kbch4, (h + h) * Kbch4
            ab, bb = t * a, t * b
            r00 = hb - ab - bb - K * (wx0 + wy0)
            r10 = hb + ab - bb + K * (wx0 - wy1)
            r01 = hb - ab + bb + K * (wy0 - wx1)
            r11 = hb + ab + bb + K * (wx1 + wy1)
            Xb0[j] += rest[j] + r00 + west01
            rest[j] = r10 + west11
            west01, west11 = r01, r11
        Xb0[N - 1] += rest[N - 1] + west01
        rest[N - 1] = west11
    for j in range(N):
        Xb[N - 1, j] += rest[j]
    return value


# halfar


class HalfarWork(NamedTuple):
    c: float  # a year at lnA = 0
    eps: float
    X: np.ndarray  # (ns + 1, N, N): the trajectory
    w: np.ndarray  # (2, N, N)
    rows: np.ndarray  # (4, N)


def halfar_prepare(structure, size):
    N, dtype = size.N, structure["H0"].dtype
    unit, eps = units(halfar_dx(size), HALFAR_RHO_G, dtype)
    X, w, rows = np.empty((size.ns + 1, N, N), dtype), np.zeros((2, N, N), dtype), np.empty((4, N), dtype)
    return HalfarWork(dtype.type(unit * HALFAR_A), eps, X, w, rows)


@njit(fastmath=True)
def spread(X, c, eps, out, rows):
    """out = max(X + H_t, 0)."""
    N, zero, Ks, Fs, f = len(X), X.dtype.type(0), rows[0], rows[1], rows[2]
    for j in range(N):
        Ks[j] = Fs[j] = zero
        out[0, j], out[N - 1, j] = max(X[0, j], zero), max(X[N - 1, j], zero)
    for i in range(N - 1):
        flow_row(X, i, c, eps, Ks, Fs, f, None)
        if i > 0:
            for j in range(N - 1):
                out[i, j] = max(X[i, j] + f[j], zero)
            out[i, 0], out[i, N - 1] = max(X[i, 0], zero), max(X[i, N - 1], zero)  # nothing moves on the boundary


@njit(fastmath=True)
def spread_jvp(X, out, dX, c, eps, dlnc, dout, rows):
    N, zero, Ks, dKs, dFs, df = len(X), X.dtype.type(0), rows[0], rows[1], rows[2], rows[3]
    for j in range(N):
        Ks[j] = dKs[j] = dFs[j] = zero
        dout[0, j], dout[N - 1, j] = zero, zero
    for i in range(N - 1):
        flow_row_jvp(X, dX, i, c, eps, dlnc, Ks, dKs, dFs, df, None, None)
        if i > 0:
            for j in range(N - 1):
                dout[i, j] = dX[i, j] + df[j] if out[i, j] > 0 else zero
            dout[i, 0], dout[i, N - 1] = zero, zero


@njit(fastmath=True)
def halfar_kernel(H0, lnA, dt, c, eps, X, w, rows):
    """X has room for all states, or for two."""
    c, last, N = c * np.exp(lnA[()]), len(X), len(H0)
    copy(H0, X[0])
    for k in range(len(dt)):
        spread(X[k % last], c * dt[k], eps, X[(k + 1) % last], rows)
    return X[len(dt) % last, N // 2, N // 2]


@njit(fastmath=True)
def halfar_vjp_kernel(H0, lnA, dt, c, eps, X, w, rows):
    """The loss and its derivative by lnA."""
    loss = halfar_kernel(H0, lnA, dt, c, eps, X, w, rows)
    zero, N, c, lnAb, Xb, wk = H0.dtype.type(0), len(H0), c * np.exp(lnA[()]), H0.dtype.type(0), w[0], w[1]
    clear(Xb)
    Xb[N // 2, N // 2] = H0.dtype.type(1)
    for k in range(len(dt) - 1, -1, -1):
        for i in range(1, N - 1):
            out, Xbi, wi = X[k + 1, i], Xb[i], wk[i]
            for j in range(1, N - 1):
                x = Xbi[j]
                wi[j] = x if out[j] > 0 else zero
                Xbi[j] = wi[j]
        lnAb += flow_rows_vjp(X[k], wk, None, c * dt[k], eps, Xb, rows[0])
    return loss, lnAb


@njit(fastmath=True)
def halfar_duals_kernel(H0, lnA, dt, c, eps, X, dX, rows):
    """The loss and its derivative by lnA: one tangent."""
    one, N, c = H0.dtype.type(1), len(H0), c * np.exp(lnA[()])
    copy(H0, X[0])
    clear(dX[0])
    for k in range(len(dt)):
        now, then = k % 2, (k + 1) % 2
        spread(X[now], c * dt[k], eps, X[then], rows)
        spread_jvp(X[now], X[then], dX[now], c * dt[k], eps, one, dX[then], rows)
    end = len(dt) % 2
    return X[end, N // 2, N // 2], dX[end, N // 2, N // 2]


def halfar(theta, data, size, work):
    return halfar_kernel(data["H0"], theta["lnA"], data["dt"], work.c, work.eps, work.X[:2], work.w, work.rows)


def halfar_adjoint(theta, data, size, work):
    loss, lnAb = halfar_vjp_kernel(data["H0"], theta["lnA"], data["dt"], *work)
    return loss, {"lnA": lnAb}


def halfar_duals(theta, data, size, work):
    loss, slope = halfar_duals_kernel(
        data["H0"], theta["lnA"], data["dt"], work.c, work.eps, work.X[:2], work.w, work.rows
    )
    return loss, {"lnA": slope}


# pseudo_transient


class PseudoTransientWork(NamedTuple):
    c: float  # a year and at A = 1
    eps: float
    numbers: np.ndarray  # 1 / dt, damping, 1 / CFL, D_MIN / dx^2, tol
    X: np.ndarray  # (iterations + 1, N, N): T after each
    V: np.ndarray  # (N, N)
    w: np.ndarray  # (4, N, N)
    rows: np.ndarray  # (6, N)
    ends: np.ndarray  # (steps + 1): where in X each step ends


def relaxation(size, dtype):
    """The numbers of `relax`: 1 / dt, damping, 1 / CFL, D_MIN / dx^2 and where the loop ends."""
    return np.array([1 / DT, DAMPING, 1 / CFL, D_MIN / (PLATE / size.N) ** 2, size.tol], dtype)


def pseudo_transient_prepare(structure, size):
    """X has room for as many iterations as there may be, of which fewer than half are used: memory that nobody touches."""
    N, dtype = size.N, structure["T0"].dtype
    shapes = (size.steps * most_iterations(size) + 1, N, N), (N, N), (4, N, N), (6, N)
    X, V, w, rows = (np.empty(shape, dtype) for shape in shapes)
    w[:] = 0
    return PseudoTransientWork(
        *units(PLATE / N, PLATE_RHO_G, dtype),
        relaxation(size, dtype),
        X,
        V,
        w,
        rows,
        np.empty(size.steps + 1, np.int64),
    )


@njit(fastmath=True)
def relax(T, T0, c, eps, numbers, V, out, rows):
    """One iteration, T to out and V in place; returns max|out - T|."""
    N, zero, third, Ks, Fs, f, m = len(T), T.dtype.type(0), T.dtype.type(1 / 3), rows[0], rows[1], rows[2], rows[3]
    per_dt, damping, per_cfl, m_min, off = numbers[0], numbers[1], numbers[2], numbers[3], zero
    for j in range(N):
        Ks[j] = Fs[j] = zero
        out[0, j], out[N - 1, j] = max(T[0, j], zero), max(T[N - 1, j], zero)
    for i in range(N - 1):
        flow_row(T, i, c, eps, Ks, Fs, f, m)
        if i > 0:
            Ti, T0i, Vi, out0 = T[i], T0[i], V[i], out[i]
            for j in range(1, N - 1):
                Vi[j] = damping * Vi[j] + (f[j] - (Ti[j] - T0i[j]) * per_dt)
                out0[j] = max(Ti[j] + Vi[j] * third / (per_dt + (m_min + m[j]) * per_cfl), zero)
                off = max(off, abs(out0[j] - Ti[j]))
            out0[0], out0[N - 1] = max(Ti[0], zero), max(Ti[N - 1], zero)
    return off


@njit(fastmath=True)
def relax_vjp(T, out, c, eps, numbers, Tb, T0b, Vb, w, mb, rows):
    """Tb from the cotangent of out to that of T, Vb from that of V after the iteration to that before; adds to T0b, returns
    the derivative by ln c. V itself need not be kept: dtau V = out - T, or out is 0 and hands nothing on."""
    N, zero, third, Ks, Fs, f, m = len(T), T.dtype.type(0), T.dtype.type(1 / 3), rows[0], rows[1], rows[2], rows[3]
    per_dt, damping, per_cfl, m_min = numbers[0], numbers[1], numbers[2], numbers[3]
    for j in range(N):
        Ks[j] = Fs[j] = zero
    for i in range(N - 1):
        flow_row(T, i, c, eps, Ks, Fs, f, m)
        if i > 0:
            for j in range(1, N - 1):
                Tbij = Tb[i, j] if out[i, j] > 0 else zero
                rate = per_dt + (m_min + m[j]) * per_cfl  # dtau = 1 / 3 rate
                w[i, j] = Vb[i, j] + Tbij * third / rate
                mb[i, j] = -per_cfl * Tbij * (out[i, j] - T[i, j]) / rate
                Vb[i, j] = damping * w[i, j]
                T0b[i, j] += w[i, j] * per_dt
                Tb[i, j] = Tbij - w[i, j] * per_dt
    return flow_rows_vjp(T, w, mb, c, eps, Tb, rows[4])


@njit(fastmath=True)
def relax_jvp(T, dT, dT0, V, out, c, eps, dlnc, numbers, dV, dout, rows):
    """The tangents of out and V, which are those after the iteration."""
    N, zero, third = len(T), T.dtype.type(0), T.dtype.type(1 / 3)
    Ks, dKs, dFs, df, m, dm = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5]
    per_dt, damping, per_cfl, m_min = numbers[0], numbers[1], numbers[2], numbers[3]
    for j in range(N):
        Ks[j] = dKs[j] = dFs[j] = zero
    for i in range(N - 1):
        flow_row_jvp(T, dT, i, c, eps, dlnc, Ks, dKs, dFs, df, m, dm)
        if i > 0:
            for j in range(1, N - 1):
                dV[i, j] = damping * dV[i, j] + (df[j] - (dT[i, j] - dT0[i, j]) * per_dt)
                dtau = third / (per_dt + (m_min + m[j]) * per_cfl)
                dout[i, j] = dT[i, j] + dtau * (dV[i, j] - 3 * dtau * per_cfl * dm[j] * V[i, j])
                if out[i, j] <= 0:
                    dout[i, j] = zero


@njit(fastmath=True)
def pseudo_transient_kernel(T0, lnA, A, c, eps, numbers, most, X, V, w, rows, ends):
    """X has room for all iterations, or for two. The loss, and how many there were, 0 where a step did not end."""
    N, zero, room, k, start = len(T0), T0.dtype.type(0), len(X), 0, w[0]
    copy(T0, X[0])
    ends[0] = 0
    for n in range(len(A)):
        cn, off = c * A[n] * np.exp(lnA[()]), numbers[4]
        copy(X[k % room], start)
        clear(V)
        while off >= numbers[4]:
            if k - ends[n] == most:
                return zero, 0
            off = relax(X[k % room], start, cn, eps, numbers, V, X[(k + 1) % room], rows)
            k += 1
        ends[n + 1] = k
    loss, T = zero, X[k % room]
    for i in range(N):
        for j in range(N):
            loss += T[i, j] * T[i, j]
    return loss / (2 * T0.size), k


@njit(fastmath=True)
def pseudo_transient_vjp_kernel(T0, lnA, A, c, eps, numbers, most, X, V, w, rows, ends):
    """The loss, its derivative by lnA, and the number of iterations."""
    loss, iterations = pseudo_transient_kernel(T0, lnA, A, c, eps, numbers, most, X, V, w, rows, ends)
    N, lnAb, Tb, T0b, wk, mb = len(T0), T0.dtype.type(0), w[0], w[1], w[2], w[3]
    scale = T0.dtype.type(1 / N**2)
    if iterations == 0:
        return loss, lnAb, iterations
    for i in range(N):
        for j in range(N):
            Tb[i, j] = scale * X[iterations, i, j]
    for n in range(len(A) - 1, -1, -1):
        cn = c * A[n] * np.exp(lnA[()])
        clear(V)
        clear(T0b)
        for k in range(ends[n + 1] - 1, ends[n] - 1, -1):
            lnAb += relax_vjp(X[k], X[k + 1], cn, eps, numbers, Tb, T0b, V, wk, mb, rows)
        for i in range(1, N - 1):
            for j in range(1, N - 1):
                Tb[i, j] += T0b[i, j]
    return loss, lnAb, iterations


@njit(fastmath=True)
def pseudo_transient_duals_kernel(T0, lnA, A, c, eps, numbers, most, X, V, w, rows, ends):
    """As the adjoint's, by one tangent; of X three states are used."""
    zero, one, k, loss, slope = T0.dtype.type(0), T0.dtype.type(1), 0, T0.dtype.type(0), T0.dtype.type(0)
    start, dstart, dV = X[2], w[2], w[3]
    copy(T0, X[0])
    clear(w[0])
    clear(w[1])
    for n in range(len(A)):
        cn, off, end = c * A[n] * np.exp(lnA[()]), numbers[4], k + most
        copy(X[k % 2], start)
        copy(w[k % 2], dstart)
        clear(V)
        clear(dV)
        while off >= numbers[4]:
            if k == end:
                return zero, zero, 0
            T, out, dT, dout = X[k % 2], X[(k + 1) % 2], w[k % 2], w[(k + 1) % 2]
            off = relax(T, start, cn, eps, numbers, V, out, rows)
            relax_jvp(T, dT, dstart, V, out, cn, eps, one, numbers, dV, dout, rows)
            k += 1
    T, dT = X[k % 2], w[k % 2]
    for i in range(len(T)):
        for j in range(len(T)):
            loss += T[i, j] * T[i, j]
            slope += T[i, j] * dT[i, j]
    return loss / (2 * T0.size), slope / T0.size, k


def pseudo_transient_run(kernel, theta, data, size, work, room):
    c, eps, numbers, X, *others = work
    arguments = data["T0"], theta["lnA"], data["A"], c, eps, numbers, most_iterations(size), X[:room], *others
    *found, iterations = kernel(*arguments)
    if not iterations:
        raise diverged(size)
    return *found, iterations


def pseudo_transient(theta, data, size, work):
    return pseudo_transient_run(pseudo_transient_kernel, theta, data, size, work, 2)[0]


def pseudo_transient_adjoint(theta, data, size, work):
    loss, lnAb, _ = pseudo_transient_run(pseudo_transient_vjp_kernel, theta, data, size, work, None)
    return loss, {"lnA": lnAb}


def pseudo_transient_duals(theta, data, size, work):
    loss, slope, _ = pseudo_transient_run(pseudo_transient_duals_kernel, theta, data, size, work, 3)
    return loss, {"lnA": slope}


IMPLEMENTATION = {
    "rhs": {"loops": Implementation(rhs, rhs_prepare, strategies={"adjoint": rhs_adjoint, "duals": rhs_duals})},
    "ude": {"loops": Implementation(ude, ude_prepare, strategies={"adjoint": ude_adjoint, "duals": ude_duals})},
    "semi_implicit": {
        "loops": Implementation(
            semi_implicit,
            semi_implicit_prepare,
            stats=box_stats,
            strategies={"adjoint": semi_implicit_adjoint},
        ),
    },
    "halfar": {
        "loops": Implementation(halfar, halfar_prepare, strategies={"adjoint": halfar_adjoint, "duals": halfar_duals}),
    },
    "pseudo_transient": {
        "loops": Implementation(
            pseudo_transient,
            pseudo_transient_prepare,
            stats=pseudo_transient_stats,
            strategies={"adjoint": pseudo_transient_adjoint, "duals": pseudo_transient_duals},
        ),
    },
}
