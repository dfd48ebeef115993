"""The neural ODE in Warp: a thread a hidden unit, a launch a stage.

One kernel for a whole trajectory would overwrite its state in a loop, which Warp does not differentiate. Of ode the host reads
the slopes after every attempt at a step, and decides.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import warp as wp

from backends.warp_backend import scratch
from problems import Implementation
from problems.neural_ode import MOST_STEPS, SAVES, SHORTEST, T, dopri5, endless, first_step, too_small


@cache
def rhs_kernel(real):
    vector, matrix = wp.array(dtype=real), wp.array2d(dtype=real)

    @wp.kernel
    def kernel(u: vector, W1: matrix, b1: vector, W2: matrix, b2: vector, v: vector, loss: vector):
        j = wp.tid()
        c0, c1 = u[0] * u[0] * u[0], u[1] * u[1] * u[1]
        z = wp.tanh(W1[j, 0] * c0 + W1[j, 1] * c1 + b1[j])
        wp.atomic_add(loss, 0, (v[0] * W2[0, j] + v[1] * W2[1, j]) * z)
        if j == 0:
            wp.atomic_add(loss, 0, v[0] * b2[0] + v[1] * b2[1])

    return kernel


def rhs(theta, data, size, work):
    kernel, loss = work
    loss.zero_()
    inputs = [theta["u"], theta["W1"], theta["b1"], theta["W2"], theta["b2"], data["v"]]
    wp.launch(kernel, size.H, inputs, [loss])
    return loss


def rhs_prepare(structure, size):
    real = wp.dtype_from_numpy(structure["u"].dtype)
    return rhs_kernel(real), scratch(1, real)


# rk4


@cache
def rk4_kernels(real):
    vector, matrix, fields = wp.array(dtype=real), wp.array2d(dtype=real), wp.array3d(dtype=real)

    @wp.kernel
    def start(u0: matrix, u: matrix):
        k, s = wp.tid()
        u[k, s] = u0[k, s]

    @wp.kernel
    def biases(b2: vector, f: fields):
        n, k, s = wp.tid()
        f[n, k, s] = b2[s]

    @wp.kernel
    def stage(u: matrix, before: matrix, ahead: real, W1: matrix, b1: vector, W2: matrix, f: matrix):
        """f += W2 tanh(W1 x^3 + b1) at x = u + ahead before."""
        k, j = wp.tid()
        x0, x1 = u[k, 0] + ahead * before[k, 0], u[k, 1] + ahead * before[k, 1]
        z = wp.tanh(W1[j, 0] * (x0 * x0 * x0) + W1[j, 1] * (x1 * x1 * x1) + b1[j])
        wp.atomic_add(f, k, 0, W2[0, j] * z)
        wp.atomic_add(f, k, 1, W2[1, j] * z)

    @wp.kernel
    def advance(u: matrix, f1: matrix, f2: matrix, f3: matrix, f4: matrix, dt: real, out: matrix):
        k, s = wp.tid()
        out[k, s] = u[k, s] + dt / real(6.0) * (f1[k, s] + real(2.0) * (f2[k, s] + f3[k, s]) + f4[k, s])

    @wp.kernel
    def misfit(u: fields, target: matrix, m: int, loss: vector):
        i, k, s = wp.tid()
        d = u[i * m, k, s] - target[i, s]
        wp.atomic_add(loss, 0, d * d)

    return start, biases, stage, advance, misfit


class Work(NamedTuple):
    kernels: tuple
    u: wp.array  # (steps + 1, b, 2)
    f: wp.array  # (4 steps, b, 2)
    at: list  # u of each step
    k: list  # f of each stage
    loss: wp.array


def rk4(theta, data, size, work):
    u, k, (start, biases, stage, advance, misfit) = work.at, work.k, work.kernels
    net, dt = [theta["W1"], theta["b1"], theta["W2"]], T / (SAVES - 1) / size.m
    work.loss.zero_()
    wp.launch(start, (size.b, 2), [data["u0"]], [u[0]])
    wp.launch(biases, work.f.shape, [theta["b2"]], [work.f])
    for n in range(len(u) - 1):
        k1, k2, k3, k4 = k[4 * n : 4 * n + 4]
        for before, ahead, f in ((u[n], 0.0, k1), (k1, dt / 2, k2), (k2, dt / 2, k3), (k3, dt, k4)):
            wp.launch(stage, (size.b, size.H), [u[n], before, ahead, *net], [f])
        wp.launch(advance, (size.b, 2), [u[n], k1, k2, k3, k4, dt], [u[n + 1]])
    wp.launch(misfit, (SAVES, size.b, 2), [work.u, data["target"], size.m], [work.loss])
    return work.loss


def rk4_prepare(structure, size):
    real, steps = wp.dtype_from_numpy(structure["W1"].dtype), size.m * (SAVES - 1)
    u, f = scratch((steps + 1, size.b, 2), real), scratch((4 * steps, size.b, 2), real)
    at, k = [u[n] for n in range(steps + 1)], [f[n] for n in range(4 * steps)]
    return Work(rk4_kernels(real), u, f, at, k, scratch(1, real))


# ode: the batch takes steps together


@cache
def ode_kernels(real):
    vector, matrix, fields = wp.array(dtype=real), wp.array2d(dtype=real), wp.array3d(dtype=real)

    @wp.kernel
    def point(u: matrix, k: fields, A: matrix, s: int, dt: real, x: fields):
        """Where the slope of stage s is taken; stored, because what a loop has summed has no derivative otherwise."""
        m, c = wp.tid()
        total = u[m, c]
        for j in range(s):
            total += dt * A[s, j] * k[j, m, c]
        x[s, m, c] = total

    @wp.kernel
    def bias(b2: vector, s: int, k: fields):
        m, c = wp.tid()
        k[s, m, c] = b2[c]

    @wp.kernel
    def slope(x: fields, W1: matrix, b1: vector, W2: matrix, s: int, k: fields):
        m, j = wp.tid()
        x0, x1 = x[s, m, 0], x[s, m, 1]
        z = wp.tanh(W1[j, 0] * (x0 * x0 * x0) + W1[j, 1] * (x1 * x1 * x1) + b1[j])
        wp.atomic_add(k, s, m, 0, W2[0, j] * z)
        wp.atomic_add(k, s, m, 1, W2[1, j] * z)

    @wp.kernel
    def last_first(before: fields, k: fields):
        m, c = wp.tid()
        k[0, m, c] = before[6, m, c]

    @wp.kernel
    def misfit(u: matrix, k: fields, w: matrix, target: matrix, first: int, loss: vector):
        i, m, c = wp.tid()
        total = u[m, c]
        for j in range(7):
            total += w[i, j] * k[j, m, c]
        d = total - target[first + i, c]
        wp.atomic_add(loss, 0, d * d)

    return point, bias, slope, last_first, misfit


class OdeWork(NamedTuple):
    kernels: tuple
    A: wp.array  # (7, 7)
    steps: list  # x and k of each, (7, b, 2), made when first wanted
    loss: wp.array


def ode(theta, data, size, work):
    """Dormand and Prince's pair. How long a step is, and whether it is taken, is no matter of the tape."""
    point, bias, slope, last_first, misfit = work.kernels
    (_, error, P), times, real, dim = dopri5(), np.linspace(0, T, SAVES), work.A.dtype, (size.b, 2)
    u, target, loss = data["u0"], data["target"], work.loss
    if loss.device.is_capturing:
        raise NotImplementedError("a captured graph ends no loop by a number that it computes")

    def stage(s, dt):
        wp.launch(point, dim, [u, k, work.A, s, dt], [x])
        wp.launch(bias, dim, [theta["b2"], s], [k])
        wp.launch(slope, (size.b, size.H), [x, theta["W1"], theta["b1"], theta["W2"], s], [k])

    def room(n):
        if n == len(work.steps):
            work.steps.append([scratch((7, size.b, 2), real) for _ in "xk"])
        return work.steps[n]

    def compare(w, first):
        wp.launch(misfit, (len(w), *dim), [u, k, wp.array(w, dtype=real), target, first], [loss])

    (x, k), n, t, h, i = room(0), 0, 0.0, first_step(size), 1
    loss.zero_()
    compare(np.zeros((1, 7)), 0)
    stage(0, 0.0)
    while i < SAVES:
        if n == MOST_STEPS:
            raise endless()
        if h < SHORTEST:
            raise too_small()
        dt = min(h, T - t)
        for s in range(1, 7):
            stage(s, dt)
        new = x[6]
        off = dt * np.tensordot(error, k.numpy(), 1)
        off = off / (size.atol + size.rtol * np.maximum(np.abs(u.numpy()), np.abs(new.numpy())))
        off = np.sqrt(np.mean(off**2))
        if off <= 1:
            end = T if h >= T - t else t + dt
            first, i = i, int(np.searchsorted(times, end, "right"))
            if first < i:  # all save times in the step at once
                compare(dt * ((times[first:i, None] - t) / dt) ** np.arange(1, 5) @ P.T, first)
            before, n, u, t = k, n + 1, new, end
            x, k = room(n)
            wp.launch(last_first, dim, [before], [k])
        h = dt * min(10.0, 0.9 * max(off, 1e-6) ** -0.2) if off < 1e3 else 0.2 * dt
    return loss


def ode_prepare(structure, size):
    real, A = wp.dtype_from_numpy(structure["W1"].dtype), dopri5()[0]
    return OdeWork(ode_kernels(real), wp.array(A, dtype=real), [], scratch(1, real))


IMPLEMENTATION = {
    "rhs": {"loops": Implementation(rhs, rhs_prepare)},
    "rk4": {"loops": Implementation(rk4, rk4_prepare)},
    "ode": {
        "loops": Implementation(
            ode,
            ode_prepare,
            unsupported={
                "compile": "How many steps there are the data say, which the host reads after every attempt "
                "(`a captured graph ends no loop by a number that it computes`)."
            },
        )
    },
}
