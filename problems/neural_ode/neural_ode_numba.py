"""The neural ODE in Numba: scalar loops, and the discrete adjoint by hand.

Members of the batch do not know of each other, so one after the other runs forward and back, and what it stores stays
in the cache. A loop over hidden units does the whole network, or its vjp, in one pass. The forward sweep stores tanh a,
so the reverse sweep computes none: with z = tanh a, ab = (W2^T fb) (1 - z^2). That of ode takes the steps that the
forward sweep took, and does not differentiate how they were chosen.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit

from backends.numba_backend import LANES, by_chunks
from backends.numba_math import tanh
from problems import Implementation, structure
from problems.neural_ode import MOST_STEPS, SAVES, SHORTEST, T, dopri5, endless, first_step, too_small

PAD = 8  # hidden units are padded to a multiple of this, with weights 0


# rhs


@njit(fastmath=True, error_model="numpy")
def rhs_kernel(u, W1, b1, W2, b2, v):
    c0, c1 = u[0] * u[0] * u[0], u[1] * u[1] * u[1]
    f0, f1 = b2[0] + 0 * c0, b2[1] + 0 * c1
    W = W1.reshape(-1)  # flat, so that the stride is known to be 2: a third of the time
    for j in range(b1.size):
        z = tanh(W[2 * j] * c0 + W[2 * j + 1] * c1 + b1[j])
        f0 += W2[0, j] * z
        f1 += W2[1, j] * z
    return v[0] * f0 + v[1] * f1


@njit(fastmath=True, error_model="numpy")
def rhs_vjp_kernel(u, W1, b1, W2, b2, v, ub, W1b, b1b, W2b, b2b):
    """The loss <v, f>, and the cotangents of all arguments of f into those named with a b."""
    c0, c1, v0, v1 = u[0] * u[0] * u[0], u[1] * u[1] * u[1], v[0], v[1]
    W, Wb = W1.reshape(-1), W1b.reshape(-1)
    for j in range(b1.size):
        z = tanh(W[2 * j] * c0 + W[2 * j + 1] * c1 + b1[j])
        b1b[j] = z
        W2b[0, j] = v0 * z
        W2b[1, j] = v1 * z
    c0b = c1b = loss = 0.0
    for j in range(b1.size):  # apart, because one loop over so many arrays takes three times as long
        z = b1b[j]
        zb = W2[0, j] * v0 + W2[1, j] * v1
        loss += zb * z
        ab = zb * (1 - z * z)
        b1b[j] = ab
        Wb[2 * j] = ab * c0
        Wb[2 * j + 1] = ab * c1
        c0b += ab * W[2 * j]
        c1b += ab * W[2 * j + 1]
    ub[0], ub[1] = 3 * u[0] * u[0] * c0b, 3 * u[1] * u[1] * c1b
    b2b[0], b2b[1] = v0, v1
    return loss + v0 * b2[0] + v1 * b2[1]


def rhs(theta, data, size, blocks):
    return rhs_kernel(theta["u"], theta["W1"], theta["b1"], theta["W2"], theta["b2"], data["v"])


def rhs_adjoint(theta, data, size, blocks):
    arguments = theta["u"], theta["W1"], theta["b1"], theta["W2"], theta["b2"], data["v"]
    return rhs_vjp_kernel(*arguments, *blocks.values()), blocks


def prepare_rhs(structure, size):
    return {name: np.empty(structure[name].shape, structure[name].dtype) for name in ("u", "W1", "b1", "W2", "b2")}


# duals: each number u comes with its tangents du (..., LANES)


@njit(fastmath=True, error_model="numpy")
def f_duals(u, du, W1, dW1, b1, db1, W2, dW2, b2, db2, f, df, dc):
    """f and df; dc (2, LANES) is scratch."""
    c0, c1 = u[0] * u[0] * u[0], u[1] * u[1] * u[1]
    for i in range(2):
        f[i] = b2[i]
        for k in range(LANES):
            dc[i, k], df[i, k] = 3 * u[i] * u[i] * du[i, k], db2[i, k]
    for j in range(b1.size):
        z = tanh(W1[j, 0] * c0 + W1[j, 1] * c1 + b1[j])
        f[0] += W2[0, j] * z
        f[1] += W2[1, j] * z
        for k in range(LANES):
            da = dW1[j, 0, k] * c0 + W1[j, 0] * dc[0, k] + dW1[j, 1, k] * c1 + W1[j, 1] * dc[1, k] + db1[j, k]
            dz = (1 - z * z) * da
            df[0, k] += dW2[0, j, k] * z + W2[0, j] * dz
            df[1, k] += dW2[1, j, k] * z + W2[1, j] * dz


def pairs(theta, d):
    """Every block of the network with its tangents."""
    return tuple(x for name in ("W1", "b1", "W2", "b2") for x in (theta[name], d[name]))


def rhs_duals(theta, data, size, blocks):
    v, dtype = data["v"], theta["u"].dtype
    f, df, dc = np.empty(2, dtype), np.empty((2, LANES), dtype), np.empty((2, LANES), dtype)

    def dual(d, out):
        f_duals(theta["u"], d["u"], *pairs(theta, d), f, df, dc)
        np.dot(v, df, out)
        return v @ f

    return by_chunks(theta, dual)


@njit(fastmath=True, error_model="numpy")
def misfit_duals(u, du, target, dloss):
    e0, e1 = u[0] - target[0], u[1] - target[1]
    for k in range(LANES):
        dloss[k] += 2 * (e0 * du[0, k] + e1 * du[1, k])
    return e0 * e0 + e1 * e1


@njit(fastmath=True, error_model="numpy")
def rk4_duals_kernel(net, start, target, m, dt, u, du, scratch, dloss):
    """The loss, and its tangents into dloss. u[0] is the state, u[1] the stage, u[2] becomes the next state."""
    f, df, dc = scratch
    dloss[:] = 0
    loss = 0 * dt
    for member in range(start.shape[0]):
        u[:], du[:] = start[member], 0
        loss += misfit_duals(u[0], du[0], target[0], dloss)
        for i in range(1, SAVES):
            for _ in range(m):
                for s in range(4):
                    f_duals(u[1], du[1], *net, f, df, dc)
                    ahead = dt if s == 2 else dt / 2
                    weight = dt / 6 if s == 0 or s == 3 else dt / 3
                    for r in range(2):
                        u[1, r] = u[0, r] + ahead * f[r]
                        u[2, r] += weight * f[r]
                        for k in range(LANES):
                            du[1, r, k] = du[0, r, k] + ahead * df[r, k]
                            du[2, r, k] += weight * df[r, k]
                for r in range(2):
                    u[0, r] = u[1, r] = u[2, r]
                    for k in range(LANES):
                        du[0, r, k] = du[1, r, k] = du[2, r, k]
            loss += misfit_duals(u[0], du[0], target[i], dloss)
    return loss


def rk4_duals(theta, data, size, work):
    dtype, dt = theta["W1"].dtype, T / (SAVES - 1) / size.m
    u, du = np.empty((3, 2), dtype), np.empty((3, 2, LANES), dtype)
    scratch = np.empty(2, dtype), np.empty((2, LANES), dtype), np.empty((2, LANES), dtype)

    def dual(d, out):
        return rk4_duals_kernel(pairs(theta, d), data["u0"], data["target"], size.m, dt, u, du, scratch, out)

    return by_chunks(theta, dual)


# rk4 and ode


@cache
def network(H, tanh):
    """f and its vjp, compiled for one H as XLA compiles for one shape, and the weights packed into one array W (5 H).

    With H known LLVM sees that the rows of one array do not overlap; checking that took a third of a stage, 40 ns.
    """

    @njit(fastmath=True, error_model="numpy")
    def f(c0, c1, W, z):
        """W2 z with z = tanh(W1 c + b1)."""
        f0 = f1 = 0 * c0
        for j in range(H):
            z[j] = tanh(W[j] * c0 + W[H + j] * c1 + W[2 * H + j])
            f0 += W[3 * H + j] * z[j]
            f1 += W[4 * H + j] * z[j]
        return f0, f1

    @njit(fastmath=True, error_model="numpy")
    def vjp(f0b, f1b, W, z):
        """Cotangent of c for one of f."""
        c0b = c1b = 0.0
        for j in range(H):
            ab = (W[3 * H + j] * f0b + W[4 * H + j] * f1b) * (1 - z[j] * z[j])
            c0b += ab * W[j]
            c1b += ab * W[H + j]
        return c0b, c1b

    @njit(fastmath=True, error_model="numpy")
    def pack(W1, b1, W2, W):
        for j in range(b1.size):
            W[j], W[H + j], W[2 * H + j] = W1[j, 0], W1[j, 1], b1[j]
            W[3 * H + j], W[4 * H + j] = W2[0, j], W2[1, j]

    @njit(fastmath=True, error_model="numpy")
    def unpack(Wb, W1b, b1b, W2b):
        for j in range(b1b.size):
            W1b[j, 0], W1b[j, 1], b1b[j] = Wb[j], Wb[H + j], Wb[2 * H + j]
            W2b[0, j], W2b[1, j] = Wb[3 * H + j], Wb[4 * H + j]

    return f, vjp, pack, unpack


# rk4


@cache
def kernels(H, tanh):
    """The loss and the gradient for one H."""
    f, vjp, pack, unpack = network(H, tanh)

    @njit(fastmath=True, error_model="numpy")
    def add(fb, c, W, z, Wb):
        """Adds the cotangent of the weights for four of f, so that Wb is read and written once a step."""
        p0, p1, p2, p3 = fb[0, 0], fb[1, 0], fb[2, 0], fb[3, 0]
        q0, q1, q2, q3 = fb[0, 1], fb[1, 1], fb[2, 1], fb[3, 1]
        c0, c1, c2, c3 = c[0, 0], c[1, 0], c[2, 0], c[3, 0]
        d0, d1, d2, d3 = c[0, 1], c[1, 1], c[2, 1], c[3, 1]
        for j in range(H):
            z0, z1, z2, z3 = z[0, j], z[1, j], z[2, j], z[3, j]
            v, w = W[3 * H + j], W[4 * H + j]
            a0 = (v * p0 + w * q0) * (1 - z0 * z0)
            a1 = (v * p1 + w * q1) * (1 - z1 * z1)
            a2 = (v * p2 + w * q2) * (1 - z2 * z2)
            a3 = (v * p3 + w * q3) * (1 - z3 * z3)
            Wb[j] += a0 * c0 + a1 * c1 + a2 * c2 + a3 * c3
            Wb[H + j] += a0 * d0 + a1 * d1 + a2 * d2 + a3 * d3
            Wb[2 * H + j] += a0 + a1 + a2 + a3
            Wb[3 * H + j] += p0 * z0 + p1 * z1 + p2 * z2 + p3 * z3
            Wb[4 * H + j] += q0 * z0 + q1 * z1 + q2 * z2 + q3 * z3

    @njit(fastmath=True, error_model="numpy")
    def forward(start, target, m, dt, W, b2, u, c, z):
        """The loss of one member. Stage s of step n goes into u, c = u^3 and z at 4 n + s, the last state into u."""
        u0, u1 = start[0] + 0 * b2[0], start[1] + 0 * b2[1]
        loss = (u0 - target[0, 0]) ** 2 + (u1 - target[0, 1]) ** 2
        n = 0
        for i in range(1, SAVES):
            for _ in range(m):
                x0, x1, y0, y1 = u0, u1, u0, u1  # the stage, and the sum that becomes the next state
                for s in range(4):
                    u[n, 0], u[n, 1] = x0, x1
                    c[n, 0], c[n, 1] = x0 * x0 * x0, x1 * x1 * x1
                    k0, k1 = f(c[n, 0], c[n, 1], W, z[n])
                    k0 += b2[0]
                    k1 += b2[1]
                    ahead = dt if s == 2 else dt / 2
                    weight = dt / 6 if s == 0 or s == 3 else dt / 3
                    x0, x1 = u0 + ahead * k0, u1 + ahead * k1
                    y0 += weight * k0
                    y1 += weight * k1
                    n += 1
                u0, u1 = y0, y1
            loss += (u0 - target[i, 0]) ** 2 + (u1 - target[i, 1]) ** 2
            u[n, 0], u[n, 1] = u0, u1
        return loss

    @njit(fastmath=True, error_model="numpy")
    def backward(target, m, dt, W, u, c, z, fb, Wb, b2b):
        n = 4 * m * (SAVES - 1)
        u0b = u1b = 0.0
        for i in range(SAVES - 1, 0, -1):
            u0b += 2 * (u[n, 0] - target[i, 0])
            u1b += 2 * (u[n, 1] - target[i, 1])
            for _ in range(m):
                x0b = x1b = 0.0
                y0b, y1b = u0b, u1b
                for s in range(3, -1, -1):
                    n -= 1
                    ahead = 0.0 if s == 3 else dt if s == 2 else dt / 2
                    weight = dt / 6 if s == 0 or s == 3 else dt / 3
                    fb[s, 0], fb[s, 1] = weight * y0b + ahead * x0b, weight * y1b + ahead * x1b
                    c0b, c1b = vjp(fb[s, 0], fb[s, 1], W, z[n])
                    x0b, x1b = 3 * u[n, 0] * u[n, 0] * c0b, 3 * u[n, 1] * u[n, 1] * c1b
                    u0b += x0b
                    u1b += x1b
                    b2b[0] += fb[s, 0]
                    b2b[1] += fb[s, 1]
                add(fb, c[n : n + 4], W, z[n : n + 4], Wb)

    @njit(fastmath=True, error_model="numpy")
    def loss(W1, b1, W2, b2, start, target, m, dt, W, u, c, z):
        pack(W1, b1, W2, W)
        total = 0 * b2[0]
        for k in range(start.shape[0]):
            total += forward(start[k], target, m, dt, W, b2, u, c, z)
        return total

    @njit(fastmath=True, error_model="numpy")
    def gradient(W1, b1, W2, b2, start, target, m, dt, W, u, c, z, fb, Wb, W1b, b1b, W2b, b2b):
        pack(W1, b1, W2, W)
        Wb[:] = 0
        b2b[:] = 0
        total = 0.0
        for k in range(start.shape[0]):
            total += forward(start[k], target, m, dt, W, b2, u, c, z)
            backward(target, m, dt, W, u, c, z, fb, Wb, b2b)
        unpack(Wb, W1b, b1b, W2b)
        return total

    return loss, gradient


def arguments(theta, data, size):
    dt = T / (SAVES - 1) / size.m
    return theta["W1"], theta["b1"], theta["W2"], theta["b2"], data["u0"], data["target"], size.m, dt


def rk4(theta, data, size, work):
    return work.loss(*arguments(theta, data, size), *work.forward)


def rk4_adjoint(theta, data, size, work):
    loss = work.gradient(*arguments(theta, data, size), *work.forward, *work.backward, *work.blocks.values())
    return loss, work.blocks


def aligned(shape, dtype):
    """Zeros that start on a cache line: 8% at H = 256."""
    n = int(np.prod(shape))
    buffer = np.zeros(n + 64, dtype)
    first = -buffer.ctypes.data % 64 // buffer.itemsize
    return buffer[first : first + n].reshape(shape)


class Work(NamedTuple):
    loss: Callable
    gradient: Callable
    forward: tuple
    backward: tuple
    blocks: dict


def prepare_rk4(structure, size):
    dtype, n, H = structure["W1"].dtype, 4 * size.m * (SAVES - 1), -(-size.H // PAD) * PAD
    return Work(
        *kernels(H, np.tanh if dtype.kind == "c" else tanh),
        forward=(aligned(5 * H, dtype), np.empty((n + 1, 2), dtype), np.empty((n, 2), dtype), aligned((n, H), dtype)),
        backward=(np.empty((4, 2), dtype), aligned(5 * H, dtype)),
        blocks={name: np.empty(structure[name].shape, dtype) for name in ("W1", "b1", "W2", "b2")},
    )


# ode: dopri5, and the adjoint of the steps that it took, their lengths held fixed. Stage s of step n is stage 6 n + s of the
# whole course, because the last of a step is the first of the next; a step that is refused is written over.

FULL, TOO_SMALL = -1, -2  # where the count of steps would be


@cache
def ode_kernels(H, tanh):
    """The loss and the gradient for one H. Each array costs a call 0.1 us, so what is kept comes in few."""
    f, vjp, pack, _ = network(H, tanh)
    A, P, times = np.zeros((8, 8)), np.zeros((8, 4)), np.linspace(0, T, SAVES)
    A[:7, :7], A[7, :7], P[:7] = dopri5()  # eight in a row are one register, so loops over fewer run to eight
    AT, PT = A.T.copy(), P.T.copy()

    @njit(fastmath={"contract", "reassoc", "arcp", "nsz"}, error_model="numpy")
    def forward(start, target, first, rtol, atol, W, b2, k, y, u, z, steps, saves, counts):
        """The loss of one member; counts gets its steps, or what went wrong, and adds up all those refused.

        Of a stage: u and c = u^3 side by side (4). Of a step: its length and the first save time after it (2). Of a save
        time: the stages' weights that interpolate u in its step, and the misfit u - data (10). k (2, 8): the slopes of a step;
        y (2, 8): their sums, each one stage's, at last the error's.
        """
        t, h, i, n = 0.0, first, 1, 0
        counts[0] = 0
        u0, u1 = start[0] + 0 * b2[0], start[1] + 0 * b2[1]
        saves[0, 8], saves[0, 9] = u0 - target[0, 0], u1 - target[0, 1]
        loss = saves[0, 8] ** 2 + saves[0, 9] ** 2
        u[0, 0], u[0, 1], u[0, 2], u[0, 3] = u0, u1, u0 * u0 * u0, u1 * u1 * u1
        k0, k1 = f(u[0, 2], u[0, 3], W, z[0])
        k[0, 0], k[1, 0] = k0 + b2[0], k1 + b2[1]
        k[0, 7] = k[1, 7] = 0.0  # of no stage
        while i < SAVES:
            if n == len(steps):
                counts[0] = FULL
                return loss
            if h < SHORTEST:
                counts[0] = TOO_SMALL
                return loss
            dt = min(h, T - t)
            m = 6 * n
            u0, u1 = u[m, 0], u[m, 1]
            for r in range(8):
                y[0, r], y[1, r] = AT[0, r] * k[0, 0], AT[0, r] * k[1, 0]
            for s in range(1, 7):
                x0, x1 = u0 + dt * y[0, s], u1 + dt * y[1, s]
                m += 1
                u[m, 0], u[m, 1], u[m, 2], u[m, 3] = x0, x1, x0 * x0 * x0, x1 * x1 * x1
                k0, k1 = f(u[m, 2], u[m, 3], W, z[m])
                k0 += b2[0]
                k1 += b2[1]
                k[0, s], k[1, s] = k0, k1
                for r in range(8):
                    y[0, r] += AT[s, r] * k0
                    y[1, r] += AT[s, r] * k1
            e0 = dt * y[0, 7] / (atol + rtol * max(abs(u0), abs(u[m, 0])))
            e1 = dt * y[1, 7] / (atol + rtol * max(abs(u1), abs(u[m, 1])))
            off = np.sqrt((e0 * e0 + e1 * e1) / 2)
            if off <= 1:
                end = T if h >= T - t else t + dt
                while i < SAVES and times[i] <= end:
                    x = (times[i] - t) / dt
                    v0, v1 = u0 - target[i, 0], u1 - target[i, 1]
                    for j in range(8):
                        w = dt * x * (PT[0, j] + x * (PT[1, j] + x * (PT[2, j] + x * PT[3, j])))
                        saves[i, j] = w
                        v0 += w * k[0, j]
                        v1 += w * k[1, j]
                    saves[i, 8], saves[i, 9] = v0, v1
                    loss += v0 * v0 + v1 * v1
                    i += 1
                steps[n, 0], steps[n, 1] = dt, i
                n += 1
                t = end
                k[0, 0], k[1, 0] = k[0, 6], k[1, 6]
            else:
                counts[1] += 1
            h = dt * min(10.0, 0.9 * max(off, 1e-6) ** -0.2) if off < 1e3 else 0.2 * dt
        counts[0] = n
        counts[2] += n
        return loss

    @njit(fastmath=True, error_model="numpy")
    def add(fb, u, W, z, Wb):
        """Adds the cotangent of the weights for three of f, so that Wb is read and written twice a step."""
        p0, p1, p2, q0, q1, q2 = fb[0, 0], fb[0, 1], fb[0, 2], fb[1, 0], fb[1, 1], fb[1, 2]
        c0, c1, c2, d0, d1, d2 = u[0, 2], u[1, 2], u[2, 2], u[0, 3], u[1, 3], u[2, 3]
        for j in range(H):
            z0, z1, z2 = z[0, j], z[1, j], z[2, j]
            v, w = W[3 * H + j], W[4 * H + j]
            a0 = (v * p0 + w * q0) * (1 - z0 * z0)
            a1 = (v * p1 + w * q1) * (1 - z1 * z1)
            a2 = (v * p2 + w * q2) * (1 - z2 * z2)
            Wb[j] += a0 * c0 + a1 * c1 + a2 * c2
            Wb[H + j] += a0 * d0 + a1 * d1 + a2 * d2
            Wb[2 * H + j] += a0 + a1 + a2
            Wb[3 * H + j] += p0 * z0 + p1 * z1 + p2 * z2
            Wb[4 * H + j] += q0 * z0 + q1 * z1 + q2 * z2

    @njit(fastmath=True, error_model="numpy")
    def backward(last, W, fb, u, z, steps, saves, Wb, b2b):
        """fb (2, 8): the cotangents of the slopes of a step."""
        u0b = u1b = 0.0
        fb[:] = 0
        for n in range(last - 1, -1, -1):
            f0b, f1b = fb[0, 0], fb[1, 0]  # what the step after this gave its first stage
            fb[:] = 0
            fb[0, 6], fb[1, 6] = f0b, f1b
            g0 = g1 = 0.0
            for i in range(int(steps[n - 1, 1]) if n > 0 else 1, int(steps[n, 1])):
                v0, v1 = 2 * saves[i, 8], 2 * saves[i, 9]
                g0 += v0
                g1 += v1
                for j in range(8):
                    fb[0, j] += saves[i, j] * v0
                    fb[1, j] += saves[i, j] * v1
            for s in range(6, 0, -1):
                m = 6 * n + s
                f0b, f1b = fb[0, s], fb[1, s]
                c0b, c1b = vjp(f0b, f1b, W, z[m])
                x0b, x1b = 3 * u[m, 0] * u[m, 0] * c0b, 3 * u[m, 1] * u[m, 1] * c1b
                b2b[0] += f0b
                b2b[1] += f1b
                if s == 6:  # which stands at the step's end
                    x0b += u0b
                    x1b += u1b
                    u0b, u1b = g0, g1
                u0b += x0b
                u1b += x1b
                x0b *= steps[n, 0]
                x1b *= steps[n, 0]
                for j in range(8):
                    fb[0, j] += A[s, j] * x0b
                    fb[1, j] += A[s, j] * x1b
            for s in (1, 4):
                m = 6 * n + s
                add(fb[:, s : s + 3], u[m : m + 3], W, z[m : m + 3], Wb)
        b2b[0] += fb[0, 0]
        b2b[1] += fb[1, 0]
        fb[:, 1:] = 0
        add(fb[:, :3], u[:3], W, z[:3], Wb)

    @njit(error_model="numpy")
    def loss(W1, b1, W2, b2, start, target, first, rtol, atol, W, slopes, u, z, steps, saves, counts):
        pack(W1, b1, W2, W[0])
        counts[:] = 0
        total = 0 * b2[0]
        for n in range(start.shape[0]):
            total += forward(
                start[n], target, first, rtol, atol, W[0], b2, slopes[0], slopes[1], u, z, steps, saves, counts
            )
            if counts[0] < 0:
                return np.nan
        return total

    @njit(error_model="numpy")
    def gradient(W1, b1, W2, b2, start, target, first, rtol, atol, W, slopes, u, z, steps, saves, counts, out):
        pack(W1, b1, W2, W[0])
        counts[:] = 0
        out[:] = 0
        W[1] = 0
        total, h, Wb = 0.0, b1.size, W[1]
        for n in range(start.shape[0]):
            total += forward(
                start[n], target, first, rtol, atol, W[0], b2, slopes[0], slopes[1], u, z, steps, saves, counts
            )
            if counts[0] < 0:
                break
            backward(counts[0], W[0], slopes[2], u, z, steps, saves, Wb, out[5 * h :])
        for j in range(h):
            out[2 * j], out[2 * j + 1], out[2 * h + j] = Wb[j], Wb[H + j], Wb[2 * H + j]
            out[3 * h + j], out[4 * h + j] = Wb[3 * H + j], Wb[4 * H + j]
        return total

    return loss, gradient


class Course(NamedTuple):
    loss: Callable
    gradient: Callable
    given: tuple  # first step, rtol, atol
    W: np.ndarray  # (2, 5H) the weights and their cotangents
    slopes: np.ndarray  # (3, 2, 8) of a step, their sums, their cotangents
    kept: list  # of all stages, steps and save times, as many as were needed so far
    out: np.ndarray  # (5H + 2)
    blocks: dict  # its parts


def prepare_ode(structure, size):
    dtype, H = structure["W1"].dtype, -(-size.H // PAD) * PAD
    out, ends = np.empty(5 * size.H + 2, dtype), np.array([2, 3, 5]) * size.H
    parts = zip(("W1", "b1", "W2", "b2"), np.split(out, ends), strict=True)
    return Course(
        *ode_kernels(H, tanh),
        given=(first_step(size), size.rtol, size.atol),
        W=aligned((2, 5 * H), dtype),
        slopes=aligned((3, 2, 8), dtype),
        kept=room(32, H, dtype),
        out=out,
        blocks={name: part.reshape(structure[name].shape) for name, part in parts},
    )


def room(steps, H, dtype):
    n = 6 * steps + 1
    return [np.empty((n, 4), dtype), aligned((n, H), dtype), np.empty((steps, 2)), np.empty((SAVES, 10), dtype)]


def course(kernel, theta, data, work, *out):
    """The loss, and the steps of all members: those taken, those refused."""
    weights, counts = (theta["W1"], theta["b1"], theta["W2"], theta["b2"]), np.empty(3, int)
    while True:
        inputs = *weights, data["u0"], data["target"], *work.given
        loss = kernel(*inputs, work.W, work.slopes, *work.kept, counts, *out)
        steps = len(work.kept[2])
        if counts[0] != FULL or steps >= MOST_STEPS:
            break
        work.kept[:] = room(min(4 * steps, MOST_STEPS), work.W.shape[1] // 5, work.W.dtype)
    if counts[0] < 0:
        raise {FULL: endless, TOO_SMALL: too_small}[counts[0]]()
    return loss, counts[2], counts[1]


def ode(theta, data, size, work):
    return course(work.loss, theta, data, work)[0]


def ode_adjoint(theta, data, size, work):
    return course(work.gradient, theta, data, work, work.out)[0], work.blocks


def ode_stats(theta, data, size):
    """Of the primal, over all members; the adjoint has a vjp for each right-hand side of the steps that were taken."""
    work = prepare_ode(structure(theta, data), size)
    _, steps, rejected = course(work.loss, theta, data, work)
    return {"steps": steps, "rejected": rejected, "rhs_calls": 6 * (steps + rejected) + size.b}


IMPLEMENTATION = {
    "rhs": {"loops": Implementation(rhs, prepare_rhs, strategies={"adjoint": rhs_adjoint, "duals": rhs_duals})},
    "rk4": {"loops": Implementation(rk4, prepare_rk4, strategies={"adjoint": rk4_adjoint, "duals": rk4_duals})},
    "ode": {"loops": Implementation(ode, prepare_ode, ode_stats, strategies={"adjoint": ode_adjoint})},
}
