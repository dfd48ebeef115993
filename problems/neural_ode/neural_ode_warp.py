"""The neural ODE in Warp: a thread a hidden unit, a launch a stage.

One kernel for a whole trajectory would overwrite its state in a loop, which Warp does not differentiate.
"""

from functools import cache
from typing import NamedTuple

import warp as wp

from backends.warp_backend import scratch
from problems import Implementation
from problems.neural_ode import SAVES, T


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


IMPLEMENTATION = {
    "rhs": {"loops": Implementation(rhs, rhs_prepare)},
    "rk4": {"loops": Implementation(rk4, rk4_prepare)},
}
