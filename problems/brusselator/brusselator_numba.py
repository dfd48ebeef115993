"""The Brusselator in Numba: scalar loops, and the discrete adjoint by hand.

The periodic Laplacian is self-adjoint, so its adjoint is a gather of the cotangent, not a scatter: one pass over (u, v)
gives the loss and every block of the gradient, with <v, alpha lap u> = alpha <lap v, u>. So is S, the solve of imex: the
reverse sweep runs the same `diffuse`, and dS/dalpha = S dt lap S needs no more than the states that the sweep reads anyway.
Of implicit the reverse sweep solves with J^T once a step, by the factors of J at the step's end. That of ode takes the steps
as they were taken, their lengths no variables: each stage is one solve with the adjoint of diffusion, by the same iteration.
"""

from math import comb
from typing import NamedTuple

import numpy as np
from numba import njit

from backends.numba_backend import LANES, by_chunks
from backends.numba_math import copy, flat, rows, tanh
from problems import Implementation, structure
from problems.brusselator import (
    A_UDE,
    B_UDE,
    FIRST,
    FORCING,
    HIDDEN,
    MOST_CG,
    MOST_NEWTON,
    MOST_STEPS,
    SHORTEST,
    SMOOTH,
    T_FORCING,
    ark_tolerances,
    clock,
    diverged,
    eigenvalues,
    endless,
    fourier,
    kencarp4,
    pieces,
    stiff,
    unsolved,
)

# all but that numbers are finite: by that ode refuses a step that is too long
FAST = {"reassoc", "contract", "arcp", "nsz", "afn"}


@njit(fastmath=True)
def rhs_kernel(u, A, B, c, force, disc, v):
    """Rows as 1-D views and the wrap peeled off, for SIMD: 1.8 times faster than one loop with branches (N = 256). c times a
    row's sum, not c in the sum: Enzyme's reverse pass then makes no lap u again, which is all that dloss/dc needs."""
    N = disc.shape[0]
    loss = 0.0 * A
    for i in range(N):
        im = i - 1 if i > 0 else N - 1
        ip = i + 1 if i < N - 1 else 0
        U, V, f, p, q = u[0, i], u[1, i], disc[i], v[0, i], v[1, i]
        Um, Up, Vm, Vp = u[0, im], u[0, ip], u[1, im], u[1, ip]
        row = 0.0 * A
        for j in range(1, N - 1):
            row += p[j] * (Um[j] + Up[j] + U[j - 1] + U[j + 1] - 4 * U[j])
            row += q[j] * (Vm[j] + Vp[j] + V[j - 1] + V[j + 1] - 4 * V[j])
            flow = A * U[j] - U[j] * U[j] * V[j]
            loss += p[j] * (B - U[j] - flow + force * f[j]) + q[j] * flow
        for j, jm, jp in ((0, N - 1, 1), (N - 1, N - 2, 0)):
            row += p[j] * (Um[j] + Up[j] + U[jm] + U[jp] - 4 * U[j])
            row += q[j] * (Vm[j] + Vp[j] + V[jm] + V[jp] - 4 * V[j])
            flow = A * U[j] - U[j] * U[j] * V[j]
            loss += p[j] * (B - U[j] - flow + force * f[j]) + q[j] * flow
        loss += c * row
    return loss


@njit(fastmath=True)
def rhs_vjp_kernel(u, A, B, c, force, disc, v, ub):
    """ub = J^T v; returns the loss and the cotangents of A, B, c.

    Rows as 1-D views, the wrap peeled off, all loads of a cell before its stores and one sum for each line: so LLVM proves
    its SIMD loop, 2.7 times faster than one loop with branches (N = 256). cb is summed by rows: one long sum costs it a digit.
    """
    N = disc.shape[0]
    loss = Ab = Bb = cb = 0.0
    for i in range(N):
        U, V, f, p, q, pb, qb = u[0, i], u[1, i], disc[i], v[0, i], v[1, i], ub[0, i], ub[1, i]
        pm, pp, qm, qp = v[0, i - 1], v[0, i + 1 - N], v[1, i - 1], v[1, i + 1 - N]
        row = 0.0
        for j in range(1, N - 1):
            U1, V1, f1, p1, q1 = U[j], V[j], f[j], p[j], q[j]
            lapp = pm[j] + pp[j] + p[j - 1] + p[j + 1] - 4 * p1
            lapq = qm[j] + qp[j] + q[j - 1] + q[j + 1] - 4 * q1
            Ud = U1 * (p1 - q1)
            row += lapp * U1 + lapq * V1
            Ab -= Ud
            Bb += p1
            loss += U1 * (V1 * Ud - p1) + force * p1 * f1
            pb[j] = 2 * V1 * Ud - A * (p1 - q1) - p1 + c * lapp
            qb[j] = U1 * Ud + c * lapq
        for j, jm, jp in ((0, N - 1, 1), (N - 1, N - 2, 0)):
            lapp = pm[j] + pp[j] + p[jm] + p[jp] - 4 * p[j]
            lapq = qm[j] + qp[j] + q[jm] + q[jp] - 4 * q[j]
            Ud = U[j] * (p[j] - q[j])
            row += lapp * U[j] + lapq * V[j]
            Ab -= Ud
            Bb += p[j]
            loss += U[j] * (V[j] * Ud - p[j]) + force * p[j] * f[j]
            pb[j] = 2 * V[j] * Ud - A * (p[j] - q[j]) - p[j] + c * lapp
            qb[j] = U[j] * Ud + c * lapq
        cb += row
    return loss + A * Ab + B * Bb + c * cb, Ab, Bb, cb


@njit(fastmath=True)
def rhs_duals_kernel(u, du, A, dA, B, dB, c, dc, force, disc, v, dloss):
    """The loss, and its tangents into dloss."""
    N = disc.shape[0]
    loss = 0.0 * A
    dloss[:] = 0
    for i in range(N):
        im = i - 1 if i > 0 else N - 1
        ip = i + 1 if i < N - 1 else 0
        for j in range(N):
            jm = j - 1 if j > 0 else N - 1
            jp = j + 1 if j < N - 1 else 0
            U, V, p, q = u[0, i, j], u[1, i, j], v[0, i, j], v[1, i, j]
            lapU = u[0, im, j] + u[0, ip, j] + u[0, i, jm] + u[0, i, jp] - 4 * U
            lapV = u[1, im, j] + u[1, ip, j] + u[1, i, jm] + u[1, i, jp] - 4 * V
            flow = A * U - U * U * V
            loss += p * (B - flow - U + c * lapU + force * disc[i, j]) + q * (flow + c * lapV)
            for k in range(LANES):
                dU, dV = du[0, i, j, k], du[1, i, j, k]
                dlapU = du[0, im, j, k] + du[0, ip, j, k] + du[0, i, jm, k] + du[0, i, jp, k] - 4 * dU
                dlapV = du[1, im, j, k] + du[1, ip, j, k] + du[1, i, jm, k] + du[1, i, jp, k] - 4 * dV
                dflow = dA[k] * U + A * dU - 2 * U * V * dU - U * U * dV
                dloss[k] += p * (dB[k] - dflow - dU + dc[k] * lapU + c * dlapU) + q * (dflow + dc[k] * lapV + c * dlapV)
    return loss


def arguments(theta, data, size):
    force = FORCING if size.t >= T_FORCING else 0.0
    c = theta["alpha"][()] * (size.N - 1) ** 2
    return theta["u"], theta["A"][()], theta["B"][()], c, force, data["disc"], data["v"]


def rhs(theta, data, size, ub):
    return rhs_kernel(*arguments(theta, data, size))


def rhs_adjoint(theta, data, size, ub):
    loss, Ab, Bb, cb = rhs_vjp_kernel(*arguments(theta, data, size), ub)
    return loss, {"u": ub, "A": Ab, "B": Bb, "alpha": cb * (size.N - 1) ** 2}


def rhs_duals(theta, data, size, ub):
    u, A, B, c, force, disc, v = arguments(theta, data, size)

    def dual(d, out):
        dc = d["alpha"] * (size.N - 1) ** 2
        return rhs_duals_kernel(u, d["u"], A, d["A"], B, d["B"], c, dc, force, disc, v, out)

    return by_chunks(theta, dual)


def rhs_prepare(structure, size):
    return np.empty((2, size.N, size.N), structure["u"].dtype)


# imex: both fields in one matrix (2N, N), U in rows 0..N-1, V below


class Work(NamedTuple):
    basis: tuple
    states: np.ndarray  # (steps+1, 2N, N)
    r: np.ndarray  # (2N, N + pad), as all that follow
    waves: np.ndarray
    w: np.ndarray
    u0b: np.ndarray  # (2N, N)
    kept: np.ndarray  # (checkpoints, 2N, N)
    schedule: np.ndarray  # (actions, 4) of `binomial`


def imex_prepare(structure, size, states=None, kept=0, schedule=()):
    """States of all steps, unless it is said how many."""
    N, (saves, every, _) = size.N, clock(size)
    dtype = np.result_type(*(structure[name].dtype for name in ("u0", "A", "B", "alpha")))
    basis, pad = imex_basis(N, dtype)
    fields = (np.zeros((2 * N, N + pad), dtype) for _ in range(3))
    states, kept = (np.empty((n, 2 * N, N), dtype) for n in (states or saves * every + 1, kept))
    return Work(basis, states, *fields, np.empty((2 * N, N), dtype), kept, np.array(schedule))


def imex_checkpoints_prepare(structure, size):
    """States of one stretch between checkpoints, as many samples long as makes the sum of both small."""
    saves, every, _ = clock(size)
    steps = saves * every
    stretch = every * max(1, round(steps**0.5 / every))
    return imex_prepare(structure, size, stretch + 1, -(-steps // stretch))


def imex_binomial_prepare(structure, size):
    """As few checkpoints as let no step be taken more than four times, and one state that is none."""
    saves, every, _ = clock(size)
    steps, slots = saves * every, 1
    while comb(slots + 3, 3) < steps:
        slots += 1
    return imex_prepare(structure, size, 4, slots + 1, binomial(steps, slots))


def binomial(steps, slots):
    """The fewest steps that reverse so many from so few checkpoints (Griewank and Walther, ACM TOMS 26 (2000) 19, Algorithm
    799): rows (n, m, a, b) that take the state of step n in slot a to that of step m in slot b, or, where m is n, reverse
    step n."""

    def back(n, m, slot):
        free, length, times = slots - slot, m - n, 0
        if length == 1 or free == 0:
            yield n, n, slot, slot
            return
        while comb(free + times, free) < length:  # what so many slots reverse, no step taken more often
            times += 1
        k = n + min(comb(free + times - 1, free), length - comb(free + times - 2, free - 1))
        yield n, k, slot, slot + 1
        yield from back(k, m, slot + 1)
        yield from back(n, k, slot)

    return [*back(0, steps, 0)]


def imex_basis(N, dtype, fft=True):
    """How waves along an axis are had: fast, by `fft`, where N is a power of 2 times a small odd number, else by Q (which is
    all that Enzyme asks for). Then how many numbers a row is longer than N: were it a power of 2, a column would share few
    sets of the cache, and `turn` take twice the time."""
    odd, Q, angle, natural = N // (N & -N), fourier(N), 2 * np.pi / N * np.arange(N), np.arange(N)
    fast, order = fft and odd < 10, natural[:odd]
    while fast and order.size < N:
        order = (order[:, None] + order.size * natural[: 4 if N // order.size % 4 == 0 else 2]).ravel()
    real = np.zeros(0, dtype).real.dtype
    roots = np.cos(angle).astype(real), -np.sin(angle).astype(real)
    Q, Qt = (np.ascontiguousarray(x, dtype) for x in (Q, Q.T))
    return (fast, Q, Qt, roots, order if fast else natural, natural), 4 * fast


def solver(alpha, size, basis):
    """S for `diffuse`. Wave k along an axis leaves (1 + 2 c + dt alpha mu_k, -c, -c) on a ring along the other one,
    c = dt alpha / dx^2, which is (1 - a shift)(1 - a shift^T) / g^2: two recurrences. g is had from a and the sum of the
    row, so that rounding in a does not drain the mean."""
    c, mu = size.dt * alpha * (size.N - 1) ** 2, -size.dt * alpha * eigenvalues(size.N)
    d = 1 + 2 * c + mu
    a = 2 * c / (d + np.sqrt(d * d - 4 * c * c))
    g = (1 - a) / np.sqrt((1 + mu) * (size.N if basis[0] else 1))  # there and back, `fft` makes N of 1
    return *basis, tuple(np.ascontiguousarray(x, basis[1].dtype) for x in (a, g, 1 / (1 - a**size.N), np.empty_like(a)))


@njit(fastmath=True)
def radix4(x, z, n, roots):
    """Every n rows of x + i z become the first step of their FFT: four parts, where waves 4 k + 0, 1, 2, 3 come from.
    As in `rhs_vjp_kernel` all loads of a cell before its stores, and rows as 1-D views: SIMD along them."""
    (cos, sin), N, m = roots, x.shape[0], n // 4
    for first in range(0, N, n):
        for i in range(first, first + m):
            k = (i - first) * (N // n)
            bc, bs, cc, cs, dc, ds = cos[k], sin[k], cos[2 * k], sin[2 * k], cos[3 * k], sin[3 * k]
            ax, bx, cx, dx = x[i], x[i + m], x[i + 2 * m], x[i + 3 * m]
            az, bz, cz, dz = z[i], z[i + m], z[i + 2 * m], z[i + 3 * m]
            for j in range(N):
                px, pz, qx, qz = ax[j] + cx[j], az[j] + cz[j], ax[j] - cx[j], az[j] - cz[j]
                rx, rz, sx, sz = bx[j] + dx[j], bz[j] + dz[j], bx[j] - dx[j], bz[j] - dz[j]
                ax[j], az[j] = px + rx, pz + rz
                bx[j], bz[j] = (qx + sz) * bc - (qz - sx) * bs, (qx + sz) * bs + (qz - sx) * bc
                cx[j], cz[j] = (px - rx) * cc - (pz - rz) * cs, (px - rx) * cs + (pz - rz) * cc
                dx[j], dz[j] = (qx - sz) * dc - (qz + sx) * ds, (qx - sz) * ds + (qz + sx) * dc


@njit(fastmath=True)
def radix2(x, z):
    """The last step, of 2 rows each."""
    for i in range(0, x.shape[0], 2):
        ax, bx, az, bz = x[i], x[i + 1], z[i], z[i + 1]
        for j in range(x.shape[0]):
            px, pz, qx, qz = ax[j], az[j], bx[j], bz[j]
            ax[j], az[j], bx[j], bz[j] = px + qx, pz + qz, px - qx, pz - qz


@njit(fastmath=True)
def radix(p, x, z, roots, y, v):
    """The first step where p, the odd factor of N, is not 1."""
    (cos, sin), N, m = roots, x.shape[0], x.shape[0] // p
    for i in range(N):
        ax, az = y[i], v[i]
        ax[:] = az[:] = 0
        for t in range(i % m, N, m):
            c, s, bx, bz = cos[i // m * t % N], sin[i // m * t % N], x[t], z[t]
            for j in range(N):
                ax[j] += bx[j] * c - bz[j] * s
                az[j] += bx[j] * s + bz[j] * c
    for i in range(N):  # not x[:] = y, whose check of shapes takes Numba as long to compile as all of this
        for j in range(N):
            x[i, j], z[i, j] = y[i, j], v[i, j]


@njit(fastmath=True)
def fft(x, z, roots, y, v):
    """The FFT of x + i z along the columns, in place, of z + i x the FFT back; y + i v is scratch."""
    n = x.shape[0] & -x.shape[0]
    if n < x.shape[0]:
        radix(x.shape[0] // n, x, z, roots, y, v)
    while n > 2:
        radix4(x, z, n, roots)
        n //= 4
    if n == 2:
        radix2(x, z)


@njit(fastmath=True)
def turn(x, order, out):
    """Both fields transposed; row i becomes column order[i]."""
    N = order.size
    for s in (0, N):
        for i in range(N):
            z, k = x[s + i], order[i]
            for j in range(N):
                out[s + j, k] = z[j]


@njit(fastmath=FAST)
def ring(waves, a, g, around, y):
    """y_n = a y_{n-1} + r_n forward, then backward: once around for the y that the ring closes with, once for all."""
    N, width = len(waves), a.size
    for first, way in ((0, 1), (N - 1, -1)):
        y[:] = 0
        for n in range(N):
            w = waves[first + way * n]
            for k in range(width):
                y[k] = a[k] * y[k] + w[k]
        for k in range(width):
            y[k] *= around[k]
        for n in range(N):
            w = waves[first + way * n]
            for k in range(width):
                y[k] = a[k] * y[k] + w[k]
                w[k] = g[k] * y[k]


@njit(fastmath=True)
def diffuse(r, dU, dV, S, waves, out):
    """out = S r + (dU, dV), and r is spent: one complex FFT of U + i V along x and two recurrences along y. Two products
    with Q in place of the FFTs make a primal of 1.5 times the time at N = 32, 2.1 times at N = 64."""
    fast, Q, Qt, roots, order, natural, (a, g, around, y) = S
    N = a.size
    U, V, P, R = r[:N], r[N:], waves[:N], waves[N:]
    if fast:
        fft(U, V, roots, P, R)
        turn(r, order, waves)
    else:
        np.dot(r, Q, waves)
    for half in (P, R):
        ring(half, a, g, around, y)
    if fast:
        turn(waves, natural, r)
        fft(V, U, roots, P, R)
    else:
        np.dot(waves, Qt, r)
    for s, d in ((0, dU), (N, dV)):
        for i in range(N):  # what `turn` sorts of the waves, the FFT back leaves as unsorted of the rows
            x, z = r[s + i], out[s + order[i]]
            for j in range(N):
                z[j] = x[j] + d


@njit(fastmath=True)
def react(u, A, B, force, disc, dt, r):
    """r = u + dt R(u), less the numbers that it returns: S leaves a constant as it is, and rounding acts on the rest only."""
    N = disc.shape[0]
    U0, V0 = u[0, 0], u[N, 0]
    for i in range(N):
        U, V, f, p, q = u[i], u[N + i], disc[i], r[i], r[N + i]
        for j in range(N):
            flow = A * U[j] - U[j] * U[j] * V[j]
            p[j] = U[j] - U0 + dt * (B - U[j] - flow + force * f[j])
            q[j] = V[j] - V0 + dt * flow
    return U0, V0


@njit(fastmath=True)
def misfit(u, total):
    """total + sum (1 - u)^2 / 2"""
    for i in range(u.shape[0]):
        x = u[i]
        for j in range(u.shape[1]):
            total += (1 - x[j]) ** 2 / 2
    return total


@njit(fastmath=True)
def imex_kernel(states, A, B, disc, S, dt, steps, every, first, r, waves):
    """The loss; state n stays in states[n], as far as they reach."""
    loss = misfit(states[0], 0 * A)
    for n in range(steps):
        U0, V0 = react(states[n % len(states)], A, B, FORCING if n >= first else 0.0, disc, dt, r)
        new = states[(n + 1) % len(states)]
        diffuse(r, U0, V0, S, waves, new)
        if (n + 1) % every == 0:
            loss = misfit(new, loss)
    return loss


@njit(fastmath=True)
def react_vjp(u, A, dt, sampled, w):
    """w = (1 + dt R'(u))^T w, plus u - 1 where the state was sampled; returns the cotangents of A and B over dt."""
    N = u.shape[0] // 2
    Ab = Bb = 0.0
    for i in range(N):
        U, V, p, q = u[i], u[N + i], w[i], w[N + i]
        for j in range(N):
            d = p[j] - q[j]
            Ud = U[j] * d
            Ab -= Ud
            Bb += p[j]
            p[j] += dt * ((2 * U[j] * V[j] - A) * d - p[j]) + sampled * (U[j] - 1)
            q[j] += dt * U[j] * Ud + sampled * (V[j] - 1)
    return Ab, Bb


@njit(fastmath=True)
def dot_lap(w, u):
    """<w, lap u> dx^2 as -<grad w, grad u>: differences of neighbours are exact where the fields are smooth, lap u is not."""
    N = u.shape[0] // 2
    total = 0.0
    for s in (0, N):
        for i in range(N):
            x, xp, z, zp = w[s + i], w[s + (i + 1) % N], u[s + i], u[s + (i + 1) % N]
            for j in range(N - 1):
                total -= (xp[j] - x[j]) * (zp[j] - z[j]) + (x[j + 1] - x[j]) * (z[j + 1] - z[j])
            j = N - 1
            total -= (xp[j] - x[j]) * (zp[j] - z[j]) + (x[0] - x[j]) * (z[0] - z[j])
    return total


@njit(fastmath=True)
def imex_vjp_kernel(states, A, S, dt, steps, every, r, waves, w):
    """The cotangents of u0, A, B and alpha / dx^2, from that of the last state in r and from all the states."""
    Ab = Bb = cb = 0.0
    for n in range(steps - 1, -1, -1):
        diffuse(r, 0 * A, 0 * A, S, waves, w)
        cb += dot_lap(w, states[n + 1])
        A1, B1 = react_vjp(states[n], A, dt, 1.0 if n % every == 0 else 0.0, w)
        Ab += A1
        Bb += B1
        r, w = w, r
    return r, dt * Ab, dt * Bb, dt * cb


@njit(fastmath=True)
def react_jvp(u, du, A, dA, dB, dt, dr):
    """The tangent of r in `react`."""
    N = u.shape[0] // 2
    for i in range(N):
        U, V, dU, dV, p, q = u[i], u[N + i], du[i], du[N + i], dr[i], dr[N + i]
        for j in range(N):
            dflow = dA * U[j] + (A - 2 * U[j] * V[j]) * dU[j] - U[j] * U[j] * dV[j]
            p[j] = dU[j] + dt * (dB - dU[j] - dflow)
            q[j] = dV[j] + dt * dflow


@njit(fastmath=True)
def add_lap(u, a, r):
    """r += a lap u dx^2"""
    N = u.shape[0] // 2
    for s in (0, N):
        for i in range(N):
            x, xm, xp, z = u[s + i], u[s + (i - 1) % N], u[s + (i + 1) % N], r[s + i]
            for j in range(N):
                left, right = x[j - 1 if j > 0 else N - 1], x[j + 1 if j < N - 1 else 0]
                z[j] += a * ((xm[j] - x[j]) + (xp[j] - x[j]) + (left - x[j]) + (right - x[j]))


@njit(fastmath=True)
def misfit_jvp(u, du, total):
    for i in range(u.shape[0]):
        x, dx = u[i], du[i]
        for j in range(u.shape[0] // 2):
            total += (x[j] - 1) * dx[j]
    return total


@njit(fastmath=True)
def imex_duals_kernel(u, du, r, dr, A, dA, B, dB, dc, disc, S, dt, steps, every, first, waves, dloss):
    """The loss, and its tangents into dloss. w = S r has the tangent S (dr + dt dalpha lap w): S is applied to tangents."""
    loss = misfit(u[:, : len(disc)], 0 * A)
    for k in range(LANES):
        dloss[k] = misfit_jvp(u, du[k], 0 * A)
    for n in range(steps):
        for k in range(LANES):
            react_jvp(u, du[k], A, dA[k], dB[k], dt, dr[k])
        U0, V0 = react(u, A, B, FORCING if n >= first else 0.0, disc, dt, r)
        diffuse(r, U0, V0, S, waves, u)
        for k in range(LANES):
            add_lap(u, dt * dc[k], dr[k])
            diffuse(dr[k], 0 * A, 0 * A, S, waves, du[k])
        if (n + 1) % every == 0:
            loss = misfit(u[:, : len(disc)], loss)
            for k in range(LANES):
                dloss[k] = misfit_jvp(u, du[k], dloss[k])
    return loss


def imex_primal(theta, data, size, work, states):
    saves, every, first = clock(size)
    S = solver(theta["alpha"][()], size, work.basis)
    A, B = theta["A"][()], theta["B"][()]
    states[0] = theta["u0"].reshape(2 * size.N, size.N)
    loss = imex_kernel(states, A, B, data["disc"], S, size.dt, saves * every, every, first, work.r, work.waves)
    return loss, S


def imex(theta, data, size, work):
    return imex_primal(theta, data, size, work, work.states[:2])[0]


def imex_gradient(work, u0b, Ab, Bb, cb):
    """By block, of the cotangents of u0, A, B and alpha / dx^2."""
    N = work.u0b.shape[1]
    work.u0b[:] = u0b[:, :N]
    return {"u0": work.u0b.reshape(2, N, N), "A": Ab, "B": Bb, "alpha": cb * (N - 1) ** 2}


def imex_adjoint(theta, data, size, work):
    N, (saves, every, _) = size.N, clock(size)
    loss, S = imex_primal(theta, data, size, work, work.states)
    A = theta["A"][()]
    np.subtract(work.states[-1], 1, out=work.r[:, :N])
    u0b, Ab, Bb, cb = imex_vjp_kernel(work.states, A, S, size.dt, saves * every, every, work.r, work.waves, work.w)
    return loss, imex_gradient(work, u0b, Ab, Bb, cb)


def imex_checkpoints(theta, data, size, work):
    """A state a stretch is kept, and those within a stretch are computed again before its reverse sweep."""
    N, (saves, every, first), (states, kept, r, w) = size.N, clock(size), (work.states, work.kept, work.r, work.w)
    A, B, S = theta["A"][()], theta["B"][()], solver(theta["alpha"][()], size, work.basis)
    stretches = [(n, min(len(states) - 1, saves * every - n)) for n in range(0, saves * every, len(states) - 1)]

    def run(k, states, r):
        n, steps = stretches[k]
        states[0] = kept[k]
        return imex_kernel(states, A, B, data["disc"], S, size.dt, steps, every, first - n, r, work.waves)

    kept[0] = theta["u0"].reshape(2 * N, N)
    loss = 0.0
    for k, (n, steps) in enumerate(stretches):
        loss += run(k, states[:2], r) - (misfit(kept[k], 0.0) if n else 0.0)  # which the stretch before has sampled
        if k + 1 < len(kept):
            kept[k + 1] = states[steps % 2]
    np.subtract(states[steps % 2], 1, out=r[:, :N])
    Ab = Bb = cb = 0.0
    for k, (_, steps) in reversed([*enumerate(stretches)]):
        run(k, states, w)
        _, A1, B1, c1 = imex_vjp_kernel(states, A, S, size.dt, steps, every, r, work.waves, w)
        Ab, Bb, cb = Ab + A1, Bb + B1, cb + c1
        r, w = (w, r) if steps % 2 else (r, w)  # as often as the kernel did
    return loss, imex_gradient(work, r, Ab, Bb, cb)


@njit(fastmath=True)
def imex_binomial_kernel(u0, schedule, kept, states, A, B, disc, S, dt, steps, every, first, r, waves, w):
    """The loss, and the cotangents of u0, A, B and alpha / dx^2."""
    after, two, reached = states[2], states[:2], 0
    copy(u0, kept[0])
    loss, Ab, Bb, cb = misfit(u0, 0 * A), 0 * A, 0 * A, 0 * A
    for row in range(len(schedule)):
        n, m, a, b = schedule[row, 0], schedule[row, 1], schedule[row, 2], schedule[row, 3]
        reverse = m == n
        if n == steps - 1:  # of which the state at its end is not known yet
            m = steps
        if m > n:
            copy(kept[a], two[n % 2])
        for k in range(n, m):
            new = two[(k + 1) % 2]
            U0, V0 = react(two[k % 2], A, B, FORCING if k >= first else 0.0, disc, dt, w)
            diffuse(w, U0, V0, S, waves, new)
            if k == reached:  # for the first time
                reached += 1
                if reached % every == 0:
                    loss = misfit(new, loss)
        if not reverse:
            copy(two[m % 2], kept[b])
            continue
        if m == steps:
            copy(two[m % 2], after)
            for i in range(after.shape[0]):
                for j in range(after.shape[1]):
                    r[i, j] = after[i, j] - 1
        diffuse(r, 0 * A, 0 * A, S, waves, w)
        cb += dot_lap(w, after)
        copy(kept[a], after)
        A1, B1 = react_vjp(after, A, dt, 1.0 if n % every == 0 else 0.0, w)
        Ab += A1
        Bb += B1
        r, w = w, r
    return loss, r, dt * Ab, dt * Bb, dt * cb


def imex_binomial(theta, data, size, work):
    N, (saves, every, first), S = size.N, clock(size), solver(theta["alpha"][()], size, work.basis)
    given = theta["A"][()], theta["B"][()], data["disc"], S, size.dt, saves * every, every, first
    u0, kept = theta["u0"].reshape(2 * N, N), (work.schedule, work.kept, work.states)
    loss, u0b, Ab, Bb, cb = imex_binomial_kernel(u0, *kept, *given, work.r, work.waves, work.w)
    return loss, imex_gradient(work, u0b, Ab, Bb, cb)


def imex_duals(theta, data, size, work):
    N, (saves, every, first) = size.N, clock(size)
    S, A, B = solver(theta["alpha"][()], size, work.basis), theta["A"][()], theta["B"][()]
    u0, u, r = theta["u0"].reshape(2 * N, N), work.w, work.r
    du, dr = np.empty((2, LANES, *u.shape), u0.dtype)

    def dual(d, out):
        u[:, :N], du[..., :N] = u0, d["u0"].reshape(2 * N, N, LANES).transpose(2, 0, 1)
        tangents = A, d["A"], B, d["B"], d["alpha"] * (N - 1) ** 2
        steps = size.dt, saves * every, every, first
        return imex_duals_kernel(u, du, r, dr, *tangents, data["disc"], S, *steps, work.waves, out)

    return by_chunks(theta, dual)


# ude: the state as in imex. Cells go through the network by blocks, so that all of it stays in the nearest cache. Its
# hidden values are not kept: 128 bytes a cell and step, fetched 300 steps later, take as long at N = 16 as to have them
# again, and 1.35 times as long at N = 32.

CELLS = 256  # of a block


class UdeWork(NamedTuple):
    basis: tuple
    states: np.ndarray  # (steps+1, 2N, N)
    r: np.ndarray  # (2N, N + pad), as waves and w
    waves: np.ndarray
    w: np.ndarray
    z: np.ndarray  # (HIDDEN, CELLS)
    fields: np.ndarray  # (4, N, N): what the network gives, its cotangent, and those of U and V
    gradient: tuple  # W1 (HIDDEN, 2), b1 (HIDDEN), W2 (HIDDEN)


def ude_prepare(structure, size):
    N, (saves, every, _), dtype = size.N, clock(size), structure["W1"].dtype
    basis, pad = imex_basis(N, dtype)
    waves = (np.zeros((2 * N, N + pad), dtype) for _ in range(3))
    states = np.empty((saves * every + 1, 2 * N, N), dtype)
    z, fields = np.empty((HIDDEN, CELLS), dtype), np.empty((4, N, N), dtype)
    gradient = tuple(np.empty(structure[name].shape, dtype) for name in ("W1", "b1", "W2"))
    return UdeWork(basis, states, *waves, z, fields, gradient)


@njit(fastmath=True, error_model="numpy")
def network(U, V, net, z, f):
    """f = W2 z + b2 with z = tanh(W1 (U, V) + b1), one hidden unit after the other."""
    W1, b1, W2, b2 = net
    for k in range(U.size):
        f[k] = b2
    for h in range(b1.size):
        p, q, b, w, y = W1[h, 0], W1[h, 1], b1[h], W2[h], z[h]
        for k in range(U.size):
            y[k] = tanh(p * U[k] + q * V[k] + b)
            f[k] += w * y[k]


@njit(fastmath=True, error_model="numpy")
def network_vjp(U, V, net, z, fb, W1b, b1b, W2b, Ub, Vb):
    """Ub and Vb, and adds to the cotangents of the weights."""
    W1, b1, W2, _ = net
    for k in range(U.size):
        Ub[k] = Vb[k] = 0
    for h in range(b1.size):
        p, q, w, y = W1[h, 0], W1[h, 1], W2[h], z[h]
        pb = qb = bb = wb = 0.0
        for k in range(U.size):
            ab = w * fb[k] * (1 - y[k] * y[k])
            wb += fb[k] * y[k]
            bb += ab
            pb += ab * U[k]
            qb += ab * V[k]
            Ub[k] += p * ab
            Vb[k] += q * ab
        W1b[h, 0] += pb
        W1b[h, 1] += qb
        b1b[h] += bb
        W2b[h] += wb


@njit(fastmath=True)
def react_given(u, f, force, disc, dt, r):
    """As `react`, with f for U^2 V."""
    N = disc.shape[0]
    U0, V0 = u[0, 0], u[N, 0]
    for i in range(N):
        U, V, e, x, p, q = u[i], u[N + i], f[i], disc[i], r[i], r[N + i]
        for j in range(N):
            flow = A_UDE * U[j] - e[j]
            p[j] = U[j] - U0 + dt * (B_UDE - U[j] - flow + force * x[j])
            q[j] = V[j] - V0 + dt * flow
    return U0, V0


@njit(fastmath=True)
def misfit_to(u, target, total):
    """total + sum (u - target)^2"""
    for i in range(target.shape[0]):
        x, y = u[i], target[i]
        for j in range(target.shape[1]):
            total += (x[j] - y[j]) ** 2
    return total


@njit(fastmath=True)
def ude_kernel(states, net, disc, target, S, dt, steps, every, first, r, waves, z, f):
    """The loss; state n stays in states[n], as far as they reach."""
    N, cells = len(disc), f.ravel()
    loss = misfit_to(states[0], target[0], 0.0)
    for n in range(steps):
        u, new = states[n % len(states)], states[(n + 1) % len(states)]
        U, V = u[:N].ravel(), u[N:].ravel()
        for k in range(0, U.size, CELLS):
            at = slice(k, k + CELLS)
            network(U[at], V[at], net, z, cells[at])
        U0, V0 = react_given(u, f, FORCING if n >= first else 0.0, disc, dt, r)
        diffuse(r, U0, V0, S, waves, new)
        if (n + 1) % every == 0:
            loss = misfit_to(new, target[(n + 1) // every], loss)
    return loss / target.size


@njit(fastmath=True)
def react_given_vjp(u, target, w, fb, Ub, Vb, dt, weight, r):
    """r = (1 + dt R'(u))^T w, Ub and Vb being what comes through the network, plus weight (u - target)."""
    N = fb.shape[0]
    for i in range(N):
        U, V, x, y, p, q, a, b, d, rU, rV = (
            u[i], u[N + i], target[i], target[N + i], w[i], w[N + i], Ub[i], Vb[i], fb[i], r[i], r[N + i]
        )  # fmt: skip
        for j in range(N):
            rU[j] = p[j] - dt * p[j] - A_UDE * d[j] + a[j] + weight * (U[j] - x[j])
            rV[j] = q[j] + b[j] + weight * (V[j] - y[j])


@njit(fastmath=True)
def ude_vjp_kernel(states, net, target, S, dt, steps, every, r, waves, w, z, fields, gradient):
    """Into `gradient` and, of b2, returned."""
    (W1b, b1b, W2b), fb, Ub, Vb, b2b = gradient, fields[1], fields[2], fields[3], 0.0
    N, cells, cells_b, cells_Ub, cells_Vb = len(fb), fields[0].ravel(), fb.ravel(), Ub.ravel(), Vb.ravel()
    W1b[:] = 0
    b1b[:] = 0
    W2b[:] = 0
    w[:] = 0
    fields[:] = 0
    for n in range(steps, 0, -1):
        react_given_vjp(states[n], target[n // every], w, fb, Ub, Vb, dt, 2 / target.size * (n % every == 0), r)
        diffuse(r, 0.0, 0.0, S, waves, w)
        for i in range(N):
            p, q, d = w[i], w[N + i], fb[i]
            for j in range(N):
                d[j] = dt * (p[j] - q[j])
                b2b += d[j]
        U, V = states[n - 1, :N].ravel(), states[n - 1, N:].ravel()
        for k in range(0, U.size, CELLS):
            at = slice(k, k + CELLS)
            network(U[at], V[at], net, z, cells[at])
            network_vjp(U[at], V[at], net, z, cells_b[at], W1b, b1b, W2b, cells_Ub[at], cells_Vb[at])
    return b2b


@njit(fastmath=True, error_model="numpy")
def network_jvp(U, V, dU, dV, net, dnet, lane, z, df):
    """The tangent of f in `network`, of which z is given."""
    W1, _, W2, _ = net
    dW1, db1, dW2, db2 = dnet
    for k in range(U.size):
        df[k] = db2[lane]
    for h in range(W2.size):
        p, q, w, y = W1[h, 0], W1[h, 1], W2[h], z[h]
        dp, dq, db, dw = dW1[h, 0, lane], dW1[h, 1, lane], db1[h, lane], dW2[h, lane]
        for k in range(U.size):
            da = dp * U[k] + dq * V[k] + p * dU[k] + q * dV[k] + db
            df[k] += dw * y[k] + w * (1 - y[k] * y[k]) * da


@njit(fastmath=True)
def react_given_jvp(du, df, dt, dr):
    """The tangent of r in `react_given`."""
    N = du.shape[0] // 2
    for i in range(N):
        dU, dV, e, p, q = du[i], du[N + i], df[i], dr[i], dr[N + i]
        for j in range(N):
            dflow = A_UDE * dU[j] - e[j]
            p[j] = dU[j] - dt * (dU[j] + dflow)
            q[j] = dV[j] + dt * dflow


@njit(fastmath=True)
def misfit_to_jvp(u, du, target, total):
    for i in range(target.shape[0]):
        x, dx, y = u[i], du[i], target[i]
        for j in range(target.shape[1]):
            total += 2 * (x[j] - y[j]) * dx[j]
    return total


@njit(fastmath=True)
def ude_duals_kernel(u, du, r, dr, net, dnet, disc, target, S, dt, steps, every, first, waves, z, f, df, dloss):
    """The loss, and its tangents into dloss."""
    N, cells = len(disc), f.ravel()
    loss = misfit_to(u, target[0], 0.0)
    du[:] = 0
    dloss[:] = 0
    for n in range(steps):
        U, V = u[:N].ravel(), u[N:].ravel()
        for k in range(0, U.size, CELLS):
            at = slice(k, k + CELLS)
            network(U[at], V[at], net, z, cells[at])
            for lane in range(LANES):
                dU, dV, dcells = du[lane, :N].ravel(), du[lane, N:].ravel(), df[lane].ravel()
                network_jvp(U[at], V[at], dU[at], dV[at], net, dnet, lane, z, dcells[at])
        for lane in range(LANES):
            react_given_jvp(du[lane], df[lane], dt, dr[lane])
            diffuse(dr[lane], 0.0, 0.0, S, waves, du[lane])
        U0, V0 = react_given(u, f, FORCING if n >= first else 0.0, disc, dt, r)
        diffuse(r, U0, V0, S, waves, u)
        if (n + 1) % every == 0:
            goal = target[(n + 1) // every]
            loss = misfit_to(u, goal, loss)
            for lane in range(LANES):
                dloss[lane] = misfit_to_jvp(u, du[lane], goal, dloss[lane])
    for lane in range(LANES):
        dloss[lane] /= target.size
    return loss / target.size


def ude_arguments(theta, data, size, work):
    """The network, the forcing, the target and the clock, as all kernels take them."""
    N, (saves, every, first) = size.N, clock(size)
    net = theta["W1"], theta["b1"], theta["W2"], theta["b2"][()]
    S = solver(size.alpha, size, work.basis)
    return net, data["disc"], data["target"].reshape(-1, 2 * N, N), S, size.dt, saves * every, every, first


def ude_primal(data, size, work, states, arguments):
    states[0] = data["u0"].reshape(2 * size.N, size.N)
    return ude_kernel(states, *arguments, work.r, work.waves, work.z, work.fields[0])


def ude(theta, data, size, work):
    return ude_primal(data, size, work, work.states[:2], ude_arguments(theta, data, size, work))


def ude_adjoint(theta, data, size, work):
    arguments = net, _, target, S, dt, steps, every, _ = ude_arguments(theta, data, size, work)
    loss = ude_primal(data, size, work, work.states, arguments)
    scratch = work.r, work.waves, work.w, work.z, work.fields
    b2b = ude_vjp_kernel(work.states, net, target, S, dt, steps, every, *scratch, work.gradient)
    return loss, dict(zip(theta, (*work.gradient, b2b), strict=True))


def ude_duals(theta, data, size, work):
    N, (u, dtype) = size.N, (work.states[0], work.z.dtype)
    (net, *fixed), f = ude_arguments(theta, data, size, work), work.fields[0]
    du, dr, df = (
        np.empty((LANES, 2 * N, N), dtype),
        np.empty((LANES, *work.r.shape), dtype),
        np.empty((LANES, N, N), dtype),
    )

    def dual(d, out):
        u[:] = data["u0"].reshape(2 * N, N)
        dnet = d["W1"], d["b1"], d["W2"], d["b2"]
        return ude_duals_kernel(u, du, work.r, dr, net, dnet, *fixed, work.waves, work.z, f, df, out)

    return by_chunks(theta, dual)


# implicit: row i of both fields is one row of 2N numbers, and the ring of rows is folded, 0, N-1, 1, N-2, ..., so that it
# has no wrap: J is block tridiagonal, two rows a block, with -c 1 beside the diagonal. Of its LU each block is inverted, in
# loops, so that Enzyme is given the same. With LAPACK's inverse SciPy's SuperLU (minimum degree) took 2.8, 2.5 and 1.2 times
# as long at N = 8, 16 and 32, LAPACK's band LU, its band not yet filled, 0.8, 1.4 and 0.9 times. An odd ring ends in a row of
# its own, to which both rows before it are neighbours; a row of zeros fills its block.


class Folded(NamedTuple):
    row: np.ndarray  # (N) which row of the field lies here, int64
    states: np.ndarray  # (steps+1, R, 2N), R = N or N + 1
    P: np.ndarray  # (R/2, 4N, 4N) the inverted blocks
    F: np.ndarray  # (R, 2N), as x
    x: np.ndarray
    y: np.ndarray  # (4N)
    u0b: np.ndarray  # (2, N, N)


def fold(N):
    """Which row of the field lies where, and how many rows the ring has, an even number."""
    p = np.arange(N)
    return np.where(p % 2, N - 1 - p // 2, p // 2), N + N % 2


def implicit_prepare(structure, size):
    N, (saves, every, _) = size.N, clock(size)
    dtype = structure["u0"].dtype
    (row, R), m = fold(N), 2 * N
    states, P = np.zeros((saves * every + 1, R, m), dtype), np.zeros((R // 2, 2 * m, 2 * m), dtype)
    F, x = np.zeros((2, R, m), dtype)
    return Folded(row, states, P, F, x, np.empty(2 * m, dtype), np.empty((2, N, N), dtype))


@njit
def beside(p, N):
    """Where the rows before and after the one at p lie."""
    return p - 2 if p >= 2 else 1 - p, p + 2 if p + 2 < N else 2 * N - 3 - p


@njit(fastmath=True)
def residual(w, u, A, B, c, force, disc, row, dt, F):
    """F = w - u - dt f(w), c = dt alpha / dx^2"""
    N = row.size
    for p in range(N):
        before, after = beside(p, N)
        x, xm, xp, z, old, f = w[p], w[before], w[after], F[p], u[p], disc[row[p]]
        for j in range(N):
            k, jm, jp = N + j, j - 1 if j > 0 else N - 1, j + 1 if j < N - 1 else 0
            flow = A * x[j] - x[j] * x[j] * x[k]
            lapU = (xm[j] - x[j]) + (xp[j] - x[j]) + (x[jm] - x[j]) + (x[jp] - x[j])
            lapV = (xm[k] - x[k]) + (xp[k] - x[k]) + (x[N + jm] - x[k]) + (x[N + jp] - x[k])
            z[j] = x[j] - old[j] - dt * (B - x[j] - flow + force * f[j]) - c * lapU
            z[k] = x[k] - old[k] - dt * flow - c * lapV


@njit(fastmath=True)
def invert(D, m):
    """D becomes its inverse, by Gauss and Jordan with row pivots: LAPACK takes 2.0, 1.3, 0.8 times as long at N = 8, 16, 32."""
    row, column = np.empty(m, D.dtype), np.empty(m, D.dtype)
    swap = np.empty(m, np.uint64)  # Numba asks an index from memory for its sign, by which Enzyme cannot go
    for k in range(m):
        p = k
        for i in range(k + 1, m):
            if abs(D[i, k]) > abs(D[p, k]):
                p = i
        swap[k], pivot = p, 1 / D[p, k]
        for j in range(m):
            row[j] = pivot * D[p, j]
            D[p, j] = D[k, j]
        row[k] = pivot
        for i in range(m):
            column[i] = D[i, k]
            D[i, k] = 0
        for i in range(m):
            x, f = D[i], column[i]
            for j in range(m):
                x[j] -= f * row[j]
        for j in range(m):
            D[k, j] = row[j]
    for k in range(m - 1, -1, -1):
        for i in range(m):
            D[i, k], D[i, swap[k]] = D[i, swap[k]], D[i, k]


@njit(fastmath=True)
def factorise(w, A, c, dt, N, P):
    """P = the inverted blocks of J(w)."""
    m = 2 * N
    for b in range((N + 1) // 2):
        D, Q, c2 = P[b], P[b - 1], -c * c
        if 2 * b + 1 < N:
            for i in range(2 * m):
                for j in range(2 * m):
                    D[i, j] = c2 * Q[i, j] if b > 0 else 0.0
        else:
            for i in range(m):
                for j in range(m):
                    D[i, j] = c2 * (Q[i, j] + Q[m + i, j] + Q[i, m + j] + Q[m + i, m + j])
                    D[m + i, j] = D[i, m + j] = 0
                    D[m + i, m + j] = 1 if i == j else 0
        for p in range(2 * b, min(2 * b + 2, N)):
            first, x = p % 2 * m, w[p]
            other = m - first
            for j in range(N):
                U, V = first + j, first + N + j
                gain, U2 = dt * (2 * x[j] * x[N + j] - A), dt * x[j] * x[j]
                D[U, U] += 1 + 4 * c + dt - gain
                D[U, V] -= U2
                D[V, U] += gain
                D[V, V] += 1 + 4 * c + U2
                jp = j + 1 if j < N - 1 else 0
                for s in (first, first + N):
                    D[s + j, s + jp] -= c
                    D[s + jp, s + j] -= c
                for at in beside(p, N):
                    if at // 2 == b:
                        D[U, other + j] -= c
                        D[V, other + N + j] -= c
        invert(D, 2 * m)


@njit
def times(P, y, out, transposed):
    if transposed:
        np.dot(y, P, out)
    else:
        np.dot(P, y, out)


@njit(fastmath=True)
def solve(P, c, N, b, x, y, transposed):
    """x = J^-1 b or J^-T b; b is spent."""
    blocks, m, odd = (N + 1) // 2, 2 * N, N % 2 == 1
    b, x = b.reshape(blocks, 2 * m), x.reshape(blocks, 2 * m)
    for k in range(blocks):
        end = odd and k == blocks - 1
        for i in range(2 * m):
            y[i] = b[k, i]
            if k > 0 and not end:
                y[i] += c * x[k - 1, i]
            elif end and i < m:
                y[i] += c * (x[k - 1, i] + x[k - 1, m + i])
        times(P[k], y, x[k], transposed)
    for k in range(blocks - 2, -1, -1):
        both = odd and k == blocks - 2
        for i in range(2 * m):
            y[i] = c * x[k + 1, i - m if both and i >= m else i]
        times(P[k], y, b[k], transposed)
        for i in range(2 * m):
            x[k, i] += b[k, i]


@njit
def newton(w, u, A, B, c, force, disc, row, N, dt, tolerance, more, P, F, x, y):
    """w from its first guess u, until it stands and `more` times after; returns the iterations, 0 where they do not end."""
    for p in range(N):
        for j in range(2 * N):
            w[p, j] = u[p, j]
    for k in range(MOST_NEWTON):
        residual(w, u, A, B, c, force, disc, row, dt, F)
        factorise(w, A, c, dt, N, P)
        solve(P, c, N, F, x, y, False)
        moves = False
        for p in range(N):
            for j in range(2 * N):
                w[p, j] -= x[p, j]
                moves |= (
                    not abs(x[p, j]) <= tolerance
                )  # nor is it a number, perhaps: without fastmath, which has none such
        if not moves:
            if more == 0:
                return k + 1
            more -= 1
    return 0


@njit(fastmath=True)
def implicit_kernel(states, A, B, c, disc, row, N, dt, steps, every, first, tolerance, more, P, F, x, y):
    """The loss, and the iterations in all, 0 where they do not end; state n stays in states[n], as far as they reach."""
    iterations = 0
    loss = misfit(states[0, :N], 0 * A)
    for n in range(steps):
        u, w = states[n % len(states)], states[(n + 1) % len(states)]
        force = FORCING if n + 1 >= first else 0.0
        k = newton(w, u, A, B, c, force, disc, row, N, dt, tolerance, more, P, F, x, y)
        if k == 0:
            return loss, 0
        iterations += k
        if (n + 1) % every == 0:
            loss = misfit(w[:N], loss)
    return loss, iterations


@njit(fastmath=True)
def implicit_vjp_kernel(states, A, c, dt, steps, every, N, P, wb, lam, y):
    """The cotangents of A, B and alpha / dx^2; that of the last state in wb becomes that of u0."""
    Ab = Bb = cb = 0.0
    for n in range(steps - 1, -1, -1):
        w, u = states[n + 1], states[n]
        factorise(w, A, c, dt, N, P)
        solve(P, c, N, wb, lam, y, True)
        sampled = 1.0 if n % every == 0 else 0.0
        for p in range(N):
            before, after = beside(p, N)
            x, xm, xp, z, zm, zp, old, out = w[p], w[before], w[after], lam[p], lam[before], lam[after], u[p], wb[p]
            for j in range(N):
                k, jp = N + j, j + 1 if j < N - 1 else 0
                Ab += x[j] * (z[k] - z[j])
                Bb += z[j]
                for a, ap in ((j, jp), (k, N + jp)):  # <lam, lap w> as -<grad lam, grad w>, along x from both sides
                    cb -= ((zp[a] - z[a]) * (xp[a] - x[a]) + (zm[a] - z[a]) * (xm[a] - x[a])) / 2
                    cb -= (z[ap] - z[a]) * (x[ap] - x[a])
                    out[a] = z[a] + sampled * (old[a] - 1)
    return dt * Ab, dt * Bb, dt * cb


def implicit_primal(theta, data, size, work, states):
    N, (saves, every, first), dtype = size.N, clock(size), work.x.dtype
    A, B, c = theta["A"][()], theta["B"][()], size.dt * theta["alpha"][()] * (N - 1) ** 2
    states[0, :N] = theta["u0"][:, work.row].swapaxes(0, 1).reshape(N, 2 * N)
    tolerance, buffers = np.sqrt(np.finfo(dtype).eps), (work.P, work.F, work.x, work.y)
    loss, iterations = implicit_kernel(
        states, A, B, c, data["disc"], work.row, N, size.dt, saves * every, every, first, tolerance, 0, *buffers
    )
    if not iterations:
        raise diverged()
    return loss, iterations


def implicit(theta, data, size, work):
    return implicit_primal(theta, data, size, work, work.states[:2])[0]


def implicit_adjoint(theta, data, size, work):
    N, (saves, every, _) = size.N, clock(size)
    loss, _ = implicit_primal(theta, data, size, work, work.states)
    A, c, wb = theta["A"][()], size.dt * theta["alpha"][()] * (N - 1) ** 2, work.F
    wb[:N] = work.states[-1, :N] - 1
    wb[N:] = 0
    Ab, Bb, cb = implicit_vjp_kernel(work.states, A, c, size.dt, saves * every, every, N, work.P, wb, work.x, work.y)
    work.u0b[:, work.row] = wb[:N].reshape(N, 2, N).swapaxes(0, 1)
    return loss, {"u0": work.u0b, "A": Ab, "B": Bb, "alpha": cb * (N - 1) ** 2}


def implicit_stats(theta, data, size):
    """Of the primal; the adjoint has a Jacobian and a solve a step more."""
    saves, every, _ = clock(size)
    work = implicit_prepare(structure(theta, data), size)
    _, iterations = implicit_primal(theta, data, size, work, work.states[:2])
    return {
        "steps": saves * every,
        "newton_iterations": iterations,
        "jacobians": iterations,
        "linear_solves": iterations,
    }


# ode: KenCarp4 in steps of its own, and the adjoint of the steps that it took. Fields are (2N, N), each row of U above that
# of V, so that a recurrence from row to row takes both fields at once and neighbours are always as far away. Of a stage
# (1 - c alpha lap) w = r, c = gamma dt, each cell is scaled so that a symmetric matrix with a diagonal of ones remains:
# w = g y, S y = e r, S = 1 - g A g, A the sum of the four neighbours, g^2 = 1 / (4 + dx^2 / (c alpha)), e = 1 / g - 4 g; the
# adjoint is nu = e S^-1 g q. S is solved by conjugate gradients, preconditioned by M, which is S with one g for all cells,
# the root of the mean square, and is inverted by waves along one axis and recurrences along the other. Where alpha is the
# same everywhere, M is S; else it takes few iterations, because g is 1/2 wherever a cell is stiff, whatever its alpha: two
# or three to 1e-6 at any c for alpha in 5..15, where waves and the mean of 1 / alpha take up to ten at small c. They begin
# at what the last KNOWN solutions with this S span (Fischer, Comput. Methods Appl. Mech. Engrg. 163 (1998) 193).

KNOWN = 24


class Solver(NamedTuple):
    """S of one c, and what it takes to solve it; y = S^-1 b of the last b."""

    Q: np.ndarray  # (N, N)
    Qt: np.ndarray
    mu: np.ndarray  # (N) of each wave along an axis the sum of both neighbours
    rings: np.ndarray  # (4, 2N) of each wave of U, then of V, a, g and around of `ring`, then its y
    smooth: np.ndarray  # the same for the estimate of the error
    c: np.ndarray  # (1) h / dx^2, 0 where there is no S yet
    number: np.ndarray  # (1) of the solutions since c was set
    known: np.ndarray  # (KNOWN, 2 N^2) what is new in each, orthogonal to what is old, y^T S y = 1
    S_known: np.ndarray  # (KNOWN, 2 N^2) S times that
    halo: np.ndarray  # (2N + 4, N) a field between its last rows and its first
    g: np.ndarray  # (2N, N), as all that follow
    e: np.ndarray
    y: np.ndarray
    res: np.ndarray
    z: np.ndarray
    p: np.ndarray
    Sp: np.ndarray
    waves: np.ndarray


class Steps(NamedTuple):
    S: Solver
    given: tuple  # pieces, tableau and tolerances: what the size alone decides
    kept: list  # dt (n), sampled (n), stages (n + 1, 6, 2N, N): as many as were needed so far
    alpha: np.ndarray  # (2N, N), as r and lam
    r: np.ndarray
    lam: np.ndarray
    slopes: np.ndarray  # (2, 6, 2N, N) explicit, implicit
    gradient: np.ndarray  # (2, 2N, N) by A above B, and by both alpha


CG_FAILED, FULL, TOO_SMALL, NOT_FINITE = -1, -2, -3, -4  # where a count would be


def ode_prepare(structure, size):
    N, dtype = size.N, structure["A"].dtype
    Q, mu = fourier(N), 2 + eigenvalues(N) / (N - 1) ** 2
    Q, Qt, mu = (np.ascontiguousarray(x, dtype) for x in (Q, Q.T, mu))
    *fields, alpha, r, lam = np.empty((11, 2 * N, N), dtype)
    known, halo = np.empty((2, KNOWN, 2 * N * N), dtype), np.empty((2 * N + 4, N), dtype)
    S = Solver(Q, Qt, mu, *np.empty((2, 4, 2 * N), dtype), np.zeros(1), np.zeros(1, int), *known, halo, *fields)
    slopes, gradient = np.empty((2, 6, 2 * N, N), dtype), np.empty((2, 2 * N, N), dtype)
    course = tuple(pieces(size))
    given = course, tuple(kencarp4()), ark_tolerances(size, dtype)
    return Steps(S, given, room(2 * len(course[0]) + 16, N, dtype), alpha, r, lam, slopes, gradient)


def room(steps, N, dtype):
    return [np.empty(steps), np.empty(steps), np.empty((steps + 1, 6, 2 * N, N), dtype)]


@njit(fastmath=FAST, error_model="numpy")
def scale(alpha, c, mu, g, e, rings):
    """g and e of S, c in units of dx^2, and M = (1 - a shift)(1 - a shift^T) / w^2 along the ring of each wave."""
    N = len(mu)
    for s in range(2):
        mean = 0.0
        for i in range(s, 2 * N, 2):
            x, y, z = alpha[i], g[i], e[i]
            for j in range(N):
                square = 1 / (4 + 1 / (c * x[j]))
                y[j] = np.sqrt(square)
                z[j] = (1 - 4 * square) / y[j]
                mean += square / (N * N)
        a, w, around = rings[0, s * N :], rings[1, s * N :], rings[2, s * N :]
        for k in range(N):
            d = 1 - mean * mu[k]
            a[k] = 2 * mean / (d + np.sqrt(d * d - 4 * mean * mean))
            w[k] = np.sqrt(a[k] / mean)
            around[k] = 1 / (1 - a[k] ** N)


@njit(fastmath=FAST, error_model="numpy")
def least(rings, s):
    """The least eigenvalue of M of a field, that of the mean."""
    first = s * (rings.shape[1] // 2)
    return ((1 - rings[0, first]) / rings[1, first]) ** 2


@njit(fastmath=FAST, error_model="numpy")
def precondition(r, S, rings, z):
    """z = M^-1 r"""
    N = len(S.Q)
    np.dot(r, S.Q, S.waves)
    ring(rows(S.waves, 2 * N), rings[0], rings[1], rings[2], rings[3])
    np.dot(S.waves, S.Qt, z)


@njit(fastmath=FAST, error_model="numpy")
def neighbours(halo, out):
    """The sum of the four neighbours of each cell of the field in halo, whose first and last two rows this fills."""
    N, w, z = halo.shape[1], flat(halo), flat(out)
    row, n = 2 * N, out.size  # row: of both fields
    for k in range(row):
        w[k], w[row + n + k] = w[n + k], w[row + k]
    up, down, left, right = w[:n], w[2 * row :], w[row - 1 :], w[row + 1 :]
    for k in range(n):
        z[k] = up[k] + down[k] + left[k] + right[k]
    for first in range(0, n, N):  # around the other ring
        last = first + N - 1
        z[first] += w[row + last] - w[row + first - 1]
        z[last] += w[row + first] - w[row + last + 1]


@njit(fastmath=FAST, error_model="numpy")
def times_S(S, y, out):
    """out = S y, returns y^T S y"""
    x, z, g, w, total = flat(y), flat(out), flat(S.g), flat(S.halo[2:]), 0.0
    for k in range(x.size):
        w[k] = g[k] * x[k]
    neighbours(S.halo, out)
    for k in range(x.size):
        z[k] = x[k] - g[k] * z[k]
        total += x[k] * z[k]
    return total


@njit(fastmath=FAST, error_model="numpy")
def lap_rows(u, dx2, halo, out):
    """out = lap u"""
    x, z, w = flat(u), flat(out), flat(halo[2:])
    for k in range(x.size):
        w[k] = x[k]
    neighbours(halo, out)
    for k in range(x.size):
        z[k] = (z[k] - 4 * x[k]) / dx2


@njit(fastmath=FAST, error_model="numpy")
def dot(x, y):
    x, y, total = flat(x), flat(y), 0.0
    for k in range(x.size):
        total += x[k] * y[k]
    return total


@njit(fastmath=FAST, error_model="numpy")
def cg(S, b, tolerance):
    """S.y = S^-1 b, and b is spent. Returns the iterations. They end where the energy of the error, res M^-1 res or res^2 over
    the least eigenvalue, is tolerance^2 of that of y."""
    res, z, p, Sp, y = flat(b), flat(S.z), flat(S.p), flat(S.Sp), flat(S.y)
    number, energy = S.number[0], 0.0
    for k in range(y.size):
        y[k] = 0
    a = dot(S.known[0], res)
    for m in range(min(number, KNOWN)):
        part, S_part, following, rest = S.known[m], S.S_known[m], S.known[(m + 1) % KNOWN], 0.0
        for k in range(y.size):
            y[k] += a * part[k]
            res[k] -= a * S_part[k]
            rest += following[k] * res[k]
        energy += a * a
        a = rest
    new, S_new = S.known[number % KNOWN], S.S_known[number % KNOWN]
    bound, target, rz, done = min(least(S.rings, 0), least(S.rings, 1)), tolerance**2 * energy, 1.0, CG_FAILED
    for iteration in range(MOST_CG):
        precondition(b, S, S.rings, S.z)
        rz, previous = dot(b, S.z), rz
        if rz <= target:
            done = iteration
            break
        if iteration == 0:
            for k in range(y.size):
                new[k], S_new[k], p[k] = y[k], res[k], z[k]
        else:
            for k in range(y.size):
                p[k] = z[k] + rz / previous * p[k]
        step, rr = rz / times_S(S, S.p, S.Sp), 0.0
        energy += step * rz
        target = tolerance**2 * energy
        for k in range(y.size):
            y[k] += step * p[k]
            res[k] -= step * Sp[k]
            rr += res[k] * res[k]
        if rr <= target * bound:
            done = iteration
            break
        if not rr < np.inf:
            return NOT_FINITE
    if rz > target or done > 0:  # there was an iteration
        size = 0.0
        for k in range(y.size):
            new[k], S_new[k] = y[k] - new[k], S_new[k] - res[k]
            size += new[k] * S_new[k]
        f = 1 / np.sqrt(size) if size > 1e-16 * energy else 0.0  # below that it is rounding
        for k in range(y.size):
            new[k], S_new[k] = f * new[k], f * S_new[k]
        S.number[0] = number + (f > 0)
    if rz <= target:
        for k in range(y.size):
            y[k] += z[k]
    return done


@njit(fastmath=FAST, error_model="numpy")
def set_step(S, alpha, h):
    c = h * (len(S.Q) - 1) ** 2
    if abs(c - S.c[0]) > 1e-12 * c:  # what differs by rounding has the same S, and its known solutions
        scale(alpha, c, S.mu, S.g, S.e, S.rings)
        S.c[0], S.number[0] = c, 0


@njit(fastmath=FAST, error_model="numpy")
def multiply(x, y):
    """x *= y; Numba's own takes seconds more to compile, for its message of shapes that differ."""
    a, b = flat(x), flat(y)
    for k in range(a.size):
        a[k] *= b[k]


@njit(fastmath=FAST, error_model="numpy")
def add(x, y, c):
    """x += y + c"""
    p, q = flat(x), flat(y)
    for k in range(p.size):
        p[k] += q[k] + c


@njit(fastmath=FAST, error_model="numpy")
def reaction_rows(u, A, B, force, disc, out):
    """Of fields whose rows of U and V alternate."""
    for i in range(len(disc)):
        U, V, a, b, f, p, q = u[2 * i], u[2 * i + 1], A[i], B[i], disc[i], out[2 * i], out[2 * i + 1]
        for j in range(U.size):
            flow = a[j] * U[j] - U[j] * U[j] * V[j]
            p[j] = b[j] - U[j] - flow + force * f[j]
            q[j] = flow


@njit(fastmath=FAST, error_model="numpy")
def combine(u, slopes, wE, wI, dt, n, out):
    """out = u + dt times the first n slopes, each with its weight."""
    x, z = flat(u), flat(out)
    for k in range(x.size):
        z[k] = x[k]
    for j in range(n):
        p, q, a, b = flat(slopes[0, j]), flat(slopes[1, j]), dt * wE[j], dt * wI[j]
        for k in range(x.size):
            z[k] += a * p[k] + b * q[k]


@njit(fastmath=FAST, error_model="numpy")
def solve_stage(S, alpha, h, tolerance, r, w, done):
    """w = (1 - h alpha lap)^-1 r, and the iterations that it took."""
    set_step(S, alpha, h)
    x, y, z, e, g = flat(w), flat(S.y), flat(r), flat(S.e), flat(S.g)
    for k in range(x.size):
        x[k] = e[k] * z[k]
    done[0] = cg(S, w, tolerance)
    for k in range(x.size):
        x[k] = g[k] * y[k]


@njit(fastmath=FAST, error_model="numpy")
def implicit_slope(w, r, h, out):
    """alpha lap w"""
    x, y, z = flat(w), flat(r), flat(out)
    for k in range(x.size):
        z[k] = (x[k] - y[k]) / h


@njit(fastmath=FAST, error_model="numpy")
def distance(u, w, slopes, error, dt, rtol, atol, S):
    """The error of a step from u to w over what is tolerated, (1 - SMOOTH alpha lap)^-1 of it, with one alpha."""
    d, x, y = flat(S.res), flat(u), flat(w)
    d[:] = 0
    for j in range(6):
        p, q, a = flat(slopes[0, j]), flat(slopes[1, j]), dt * error[j]
        for k in range(d.size):
            d[k] += a * (p[k] + q[k])
    precondition(S.res, S, S.smooth, S.z)
    z, total = flat(S.z), 0.0
    for k in range(d.size):
        total += (z[k] / (atol + rtol * max(abs(x[k]), abs(y[k])))) ** 2
    return np.sqrt(total / d.size)


@njit(error_model="numpy")
def ode_kernel(A, B, alpha, disc, course, ark, tolerances, S, dts, sampled, stages, r, slopes, counts):
    """The loss from u0 in stages[0, 0]; the counts of steps, rejected ones, right-hand sides, solves, iterations and those of the
    last solve, or in the place of the first what went wrong."""
    lengths, forced, samples = course
    rtol, atol, cg_tolerance = tolerances
    E, I, b, error = ark
    n, gamma, dx2, done = 0, I[1, 1], 1.0 / (len(disc) - 1) ** 2, counts[5:]
    counts[:] = 0
    S.c[0] = 0
    loss = misfit(stages[0, 0], 0.0)
    scale(alpha, SMOOTH / dx2, S.mu, S.g, S.e, S.smooth)
    for s in range(2):  # M as 1 - SMOOTH alpha lap: it leaves a mean as it is
        f = np.sqrt(least(S.smooth, s))  # `ring` takes it twice
        for k in range(s * len(disc), (s + 1) * len(disc)):
            S.smooth[1, k] *= f
    h = 0.0  # of the next step
    for piece in range(len(lengths)):
        left, force = lengths[piece], FORCING * forced[piece]
        if piece == 0 or forced[piece] != forced[piece - 1]:
            h = FIRST
        reaction_rows(stages[n, 0], A, B, force, disc, slopes[0, 0])
        counts[2] += 1
        while left > 0:
            if n == len(dts):
                counts[0] = FULL
                return loss
            u, new = stages[n, 0], stages[n + 1, 0]
            lap_rows(u, dx2, S.halo, slopes[1, 0])
            multiply(slopes[1, 0], alpha)
            off = np.inf
            while not off <= 1:
                equal = int(np.ceil(left / h - 1e-3))  # the steps that are left, were they equal
                dt = left / equal
                if dt < SHORTEST:
                    counts[0] = TOO_SMALL
                    return loss
                f = gamma * dt
                for i in range(1, 6):
                    combine(u, slopes, E[i], I[i], dt, i, r)
                    solve_stage(S, alpha, f, cg_tolerance, r, stages[n, i], done)
                    if done[0] < 0:
                        break
                    implicit_slope(stages[n, i], r, f, slopes[1, i])
                    reaction_rows(stages[n, i], A, B, force, disc, slopes[0, i])
                    counts[2] += 1
                    counts[3] += 1
                    counts[4] += done[0]
                if done[0] == CG_FAILED:
                    counts[0] = CG_FAILED
                    return loss
                combine(u, slopes, b, b, dt, 6, new)
                off = distance(u, new, slopes, error, dt, rtol, atol, S) if done[0] >= 0 else np.inf
                h = dt * min(5.0, 0.9 * max(off, 1e-4) ** -0.25) if off < 1e4 else 0.1 * dt
                counts[1] += not off <= 1
            dts[n], sampled[n] = dt, 0.0
            left = left - dt if equal > 1 else 0.0
            n += 1
            if left > 0:
                reaction_rows(new, A, B, force, disc, slopes[0, 0])
                counts[2] += 1
        sampled[n - 1] = samples[piece]
        if samples[piece] > 0:
            loss = misfit(stages[n, 0], loss)
    counts[0] = n
    return loss


@njit(fastmath=FAST, error_model="numpy")
def stage_vjp(w, A, l_E, l_I, f, gA, gB, mu):
    """mu = f R'(w)^T l_E + l_I, and the cotangents of A and B."""
    for i in range(len(A)):
        U, V, a, p, q, Ab, Bb = w[2 * i], w[2 * i + 1], A[i], l_E[2 * i], l_E[2 * i + 1], gA[i], gB[i]
        x, y, s, t = mu[2 * i], mu[2 * i + 1], l_I[2 * i], l_I[2 * i + 1]
        for j in range(U.size):
            d = p[j] - q[j]
            Ud = U[j] * d
            Ab[j] -= Ud
            Bb[j] += p[j]
            x[j] = f * ((2 * U[j] * V[j] - a[j]) * d - p[j]) + s[j]
            y[j] = f * U[j] * Ud + t[j]


@njit(fastmath=FAST, error_model="numpy")
def weigh(lam, mu, E, I, b, dt, j, l_E, l_I):  # noqa: E741
    """The cotangents of both slopes of stage j: through the step's end, and through the stages after it."""
    x, p, q = flat(lam), flat(l_E), flat(l_I)
    for k in range(x.size):
        p[k] = q[k] = dt * b[j] * x[k]
    for i in range(j + 1, 6):
        y, wE, wI = flat(mu[i]), dt * E[i, j], dt * I[i, j]
        for k in range(x.size):
            p[k] += wE * y[k]
            q[k] += wI * y[k]


@njit(fastmath=FAST, error_model="numpy")
def stage_back(S, mu, l_I, f, lap, ab, tolerance):
    """From f R'^T l_E + l_I in mu the cotangent of the stage's right-hand side, and that of alpha."""
    z, l, x, a, y, g, e = flat(mu), flat(l_I), flat(lap), flat(ab), flat(S.y), flat(S.g), flat(S.e)
    for k in range(z.size):
        z[k] *= g[k]
    iterations = cg(S, mu, tolerance)
    for k in range(z.size):
        nu = e[k] * y[k]
        a[k] += nu * x[k]
        z[k] = (nu - l[k]) / f
    return iterations


@njit(error_model="numpy")
def ode_vjp_kernel(n, A, alpha, ark, tolerance, S, dts, sampled, stages, lam, slopes, gradient):
    """The gradient by the fields A, B, alpha1, alpha2; returns the iterations, or that one failed.

    Of stage j the cotangents of its slopes are l_E and l_I, that of its right-hand side mu = (nu - l_I) / (gamma dt), where
    nu = (1 - gamma dt lap alpha)^-1 (gamma dt R'^T l_E + l_I) is also that of alpha lap w.
    """
    E, I, b, _ = ark
    N, gamma, dx2, iterations = len(A), I[1, 1], 1.0 / (len(A) - 1) ** 2, 0
    l_E, l_I, lap, mu = slopes[0, 0], slopes[0, 1], slopes[0, 2], slopes[1]
    Ab, Bb, ab = gradient[0, :N], gradient[0, N:], gradient[1]
    gradient[:] = 0
    lam[:] = 0
    S.c[0] = 0
    for step in range(n - 1, -1, -1):
        if sampled[step] > 0:
            add(lam, stages[step + 1, 0], -1.0)
        dt = dts[step]
        set_step(S, alpha, gamma * dt)
        for j in range(5, 0, -1):
            weigh(lam, mu, E, I, b, dt, j, l_E, l_I)
            lap_rows(stages[step, j], dx2, S.halo, lap)
            stage_vjp(stages[step, j], A, l_E, l_I, gamma * dt, Ab, Bb, mu[j])
            done = stage_back(S, mu[j], l_I, gamma * dt, lap, ab, tolerance)
            if done < 0:
                return CG_FAILED
            iterations += done
        weigh(lam, mu, E, I, b, dt, 0, l_E, l_I)
        lap_rows(stages[step, 0], dx2, S.halo, lap)
        multiply(lap, l_I)
        add(ab, lap, 0.0)
        multiply(l_I, alpha)
        lap_rows(l_I, dx2, S.halo, lap)
        stage_vjp(stages[step, 0], A, l_E, lap, 1.0, Ab, Bb, mu[0])
        for j in range(6):
            add(lam, mu[j], 0.0)
    return iterations


def ode_primal(theta, data, size, work):
    """The loss, and the counts of steps, rejected ones, right-hand sides, solves and iterations; the steps stay in work."""
    np.stack([theta["alpha1"], theta["alpha2"]], 1, work.alpha.reshape(size.N, 2, size.N))
    fields, counts = (theta["A"], theta["B"], work.alpha, data["disc"]), np.empty(6, int)
    while True:
        work.kept[2][0, 0] = data["u0"].swapaxes(0, 1).reshape(work.r.shape)
        scratch = work.r, work.slopes, counts
        loss = ode_kernel(*fields, *work.given, work.S, *work.kept, *scratch)
        steps = len(work.kept[0])
        if counts[0] != FULL or steps >= MOST_STEPS:
            break
        work.kept[:] = room(min(4 * steps, MOST_STEPS), size.N, work.r.dtype)
    if counts[0] < 0:
        raise {CG_FAILED: unsolved, FULL: endless, TOO_SMALL: stiff}[counts[0]]()
    return loss, counts


def ode(theta, data, size, work):
    return ode_primal(theta, data, size, work)[0]


def ode_adjoint(theta, data, size, work):
    loss, counts = ode_primal(theta, data, size, work)
    _, ark, (_, _, tolerance) = work.given
    scratch = work.lam, work.slopes, work.gradient
    if ode_vjp_kernel(counts[0], theta["A"], work.alpha, ark, tolerance, work.S, *work.kept, *scratch) < 0:
        raise unsolved()
    (Ab, Bb), ab = np.split(work.gradient[0], 2), work.gradient[1].reshape(size.N, 2, size.N)
    return loss, {"A": Ab, "B": Bb, "alpha1": ab[:, 0], "alpha2": ab[:, 1]}


def ode_stats(theta, data, size):
    """Of the primal; the adjoint has the same steps and as many solves."""
    _, counts = ode_primal(theta, data, size, ode_prepare(structure(theta, data), size))
    names = "steps", "rejected", "rhs_calls", "linear_solves", "cg_iterations"
    return dict(zip(names, counts[:5], strict=True))


IMPLEMENTATION = {
    "rhs": {"loops": Implementation(rhs, rhs_prepare, strategies={"adjoint": rhs_adjoint, "duals": rhs_duals})},
    "imex": {
        "loops": Implementation(imex, imex_prepare, strategies={"adjoint": imex_adjoint, "duals": imex_duals}),
        "checkpoints": Implementation(imex, imex_checkpoints_prepare, strategies={"adjoint": imex_checkpoints}),
        "binomial": Implementation(imex, imex_binomial_prepare, strategies={"adjoint": imex_binomial}),
    },
    "ude": {"loops": Implementation(ude, ude_prepare, strategies={"adjoint": ude_adjoint, "duals": ude_duals})},
    "implicit": {
        "loops": Implementation(implicit, implicit_prepare, implicit_stats, strategies={"adjoint": implicit_adjoint})
    },
    "ode": {"loops": Implementation(ode, ode_prepare, ode_stats, strategies={"adjoint": ode_adjoint})},
}
