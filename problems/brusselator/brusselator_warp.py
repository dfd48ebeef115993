"""The Brusselator in Warp: a thread a cell; the solve is four products of tiles with the Fourier basis Q."""

from functools import cache
from math import ceil
from typing import NamedTuple

import warp as wp

from backends.warp_backend import scratch
from problems import Implementation
from problems.brusselator import A_UDE, B_UDE, FORCING, HIDDEN, T_FORCING, clock, eigenvalues, fourier

TILE, THREADS = 32, 64  # the largest edge of a tile, and the threads that share one on a GPU


@cache
def rhs_kernel(real):
    field, fields, number = wp.array2d(dtype=real), wp.array3d(dtype=real), wp.array(dtype=real)

    @wp.kernel
    def kernel(
        u: fields, A: number, B: number, alpha: number, disc: field, v: fields, force: real, N: int, loss: number
    ):
        i, j = wp.tid()
        im, ip, jm, jp = (i + N - 1) % N, (i + 1) % N, (j + N - 1) % N, (j + 1) % N
        U, V = u[0, i, j], u[1, i, j]
        lapU = u[0, im, j] + u[0, ip, j] + u[0, i, jm] + u[0, i, jp] - real(4.0) * U
        lapV = u[1, im, j] + u[1, ip, j] + u[1, i, jm] + u[1, i, jp] - real(4.0) * V
        c = alpha[0] * real((N - 1) * (N - 1))
        flow = A[0] * U - U * U * V
        dU = B[0] - U - flow + c * lapU + force * disc[i, j]
        dV = flow + c * lapV
        wp.atomic_add(loss, 0, v[0, i, j] * dU + v[1, i, j] * dV)

    return kernel


def rhs(theta, data, size, work):
    kernel, loss = work
    loss.zero_()
    force = FORCING if size.t >= T_FORCING else 0.0
    inputs = [theta["u"], theta["A"], theta["B"], theta["alpha"], data["disc"], data["v"], force, size.N]
    wp.launch(kernel, (size.N, size.N), inputs, [loss])
    return loss


def rhs_prepare(structure, size):
    real = wp.dtype_from_numpy(structure["u"].dtype)
    return rhs_kernel(real), scratch(1, real)


# imex


@cache
def imex_kernels(real, t):
    """For tiles of t x t."""
    field, fields, number = wp.array2d(dtype=real), wp.array3d(dtype=real), wp.array(dtype=real)

    @wp.kernel
    def start(u0: fields, alpha: number, lam: number, dt: real, u: fields, h: field):
        """h = S - 1 in the basis Q: it is 0 for the mean, so that 300 steps do not see Q^T Q = 1 + rounding."""
        i, j = wp.tid()
        u[0, i, j] = u0[0, i, j]
        u[1, i, j] = u0[1, i, j]
        z = dt * alpha[0] * (lam[i] + lam[j])
        h[i, j] = z / (real(1.0) - z)

    @wp.kernel
    def react(u: fields, A: number, B: number, disc: field, force: real, dt: real, r: fields):
        i, j = wp.tid()
        U, V = u[0, i, j], u[1, i, j]
        flow = A[0] * U - U * U * V
        r[0, i, j] = U + dt * (B[0] - U - flow + force * disc[i, j])
        r[1, i, j] = V + dt * flow

    @wp.kernel
    def turn(X: fields, Q: field, out: fields):
        """out = (X Q)^T of both fields: twice is Q^T X Q."""
        s, i, j = wp.tid()
        total = wp.tile_zeros(shape=(t, t), dtype=real)
        for k in range((Q.shape[0] + t - 1) // t):
            x = wp.tile_load(X[s], shape=(t, t), offset=(i * t, k * t))
            q = wp.tile_load(Q, shape=(t, t), offset=(k * t, j * t))
            wp.tile_matmul(x, q, total)
        wp.tile_store(out[s], wp.tile_transpose(total), offset=(j * t, i * t))

    @wp.kernel
    def scale_turn(h: field, v: fields, Q: field, out: fields):
        """out = (h v Q)^T"""
        s, i, j = wp.tid()
        total = wp.tile_zeros(shape=(t, t), dtype=real)
        for k in range((Q.shape[0] + t - 1) // t):
            g = wp.tile_load(h, shape=(t, t), offset=(i * t, k * t))
            x = wp.tile_load(v[s], shape=(t, t), offset=(i * t, k * t))
            q = wp.tile_load(Q, shape=(t, t), offset=(k * t, j * t))
            wp.tile_matmul(wp.tile_map(wp.mul, g, x), q, total)
        wp.tile_store(out[s], wp.tile_transpose(total), offset=(j * t, i * t))

    @wp.kernel
    def turn_add(X: fields, Q: field, r: fields, out: fields):
        """out = r + (X Q)^T"""
        s, i, j = wp.tid()
        total = wp.tile_zeros(shape=(t, t), dtype=real)
        for k in range((Q.shape[0] + t - 1) // t):
            x = wp.tile_load(X[s], shape=(t, t), offset=(i * t, k * t))
            q = wp.tile_load(Q, shape=(t, t), offset=(k * t, j * t))
            wp.tile_matmul(x, q, total)
        here = wp.tile_load(r[s], shape=(t, t), offset=(j * t, i * t))
        wp.tile_store(out[s], here + wp.tile_transpose(total), offset=(j * t, i * t))

    @wp.kernel
    def misfit(u: fields, loss: number):
        s, i, j = wp.tid()
        d = real(1.0) - u[s, i, j]
        wp.atomic_add(loss, 0, real(0.5) * d * d)

    return start, react, turn, scale_turn, turn_add, misfit


class Work(NamedTuple):
    kernels: tuple
    tiles: tuple  # the launch of turn
    lam: wp.array  # (N)
    Q: wp.array  # (N, N)
    Qt: wp.array
    u: list  # (2, N, N), for every step as its values are wanted on the way back
    v: list  # Q^T r Q, the same
    h: wp.array  # (N, N)
    r: wp.array  # (2, N, N), as w: steps share what is used linearly only
    w: wp.array
    loss: wp.array


def imex(theta, data, size, work):
    u, v, h, r, w = work.u, work.v, work.h, work.r, work.w
    A, B, dt = theta["A"], theta["B"], size.dt
    start, react, turn, scale_turn, turn_add, misfit = work.kernels
    saves, every, first = clock(size)
    cells, both = (size.N, size.N), (2, size.N, size.N)
    work.loss.zero_()
    wp.launch(start, cells, [theta["u0"], theta["alpha"], work.lam, dt], [u[0], h])
    wp.launch(misfit, both, [u[0]], [work.loss])
    for n in range(saves * every):
        force = FORCING if n >= first else 0.0
        wp.launch(react, cells, [u[n], A, B, data["disc"], force, dt], [r])
        for kernel, inputs, out in (
            (turn, [r, work.Q], w),
            (turn, [w, work.Q], v[n]),
            (scale_turn, [h, v[n], work.Qt], w),
            (turn_add, [w, work.Qt, r], u[n + 1]),
        ):
            wp.launch_tiled(kernel, dim=work.tiles, inputs=inputs, outputs=[out], block_dim=THREADS)
        if (n + 1) % every == 0:
            wp.launch(misfit, both, [u[n + 1]], [work.loss])
    return work.loss


def imex_prepare(structure, size):
    N, (saves, every, _) = size.N, clock(size)
    real, steps = wp.dtype_from_numpy(structure["u0"].dtype), saves * every
    blocks = ceil(N / TILE)
    Q = fourier(N)
    lam, Q, Qt = (wp.array(a, dtype=real) for a in (eigenvalues(N), Q, Q.T))
    r, w = (scratch((2, N, N), real) for _ in range(2))
    gradients = [wp.zeros((2, N, N), dtype=real) for _ in range(3)]  # on the way back they are zero again once used
    u = [scratch((2, N, N), real, gradients[n % 2]) for n in range(steps + 1)]
    v = [scratch((2, N, N), real, gradients[2]) for _ in range(steps)]
    kernels = imex_kernels(real, ceil(N / blocks))
    return Work(kernels, (2, blocks, blocks), lam, Q, Qt, u, v, scratch((N, N), real), r, w, scratch(1, real))


# ude


@cache
def network_kernel(real):
    field, fields, number = wp.array2d(dtype=real), wp.array3d(dtype=real), wp.array(dtype=real)
    hidden, A, B = wp.constant(HIDDEN), real(A_UDE), real(B_UDE)

    @wp.kernel
    def react(u: fields, W1: field, b1: number, W2: number, b2: number, disc: field, force: real, dt: real, r: fields):
        """As for imex, with the network for U^2 V."""
        i, j = wp.tid()
        U, V = u[0, i, j], u[1, i, j]
        f = b2[0]
        for h in range(hidden):
            f += W2[h] * wp.tanh(W1[h, 0] * U + W1[h, 1] * V + b1[h])
        flow = A * U - f
        r[0, i, j] = U + dt * (B - U - flow + force * disc[i, j])
        r[1, i, j] = V + dt * flow

    @wp.kernel
    def misfit(u: fields, target: fields, factor: real, loss: number):
        s, i, j = wp.tid()
        d = u[s, i, j] - target[s, i, j]
        wp.atomic_add(loss, 0, factor * d * d)

    return react, misfit


class UdeWork(NamedTuple):
    kernels: tuple
    tiles: tuple
    Q: wp.array  # (N, N), as Qt and h
    Qt: wp.array
    h: wp.array
    u: list  # (2, N, N), for every step
    r: wp.array  # (2, N, N), as v and w: S is linear, so that steps share them
    v: wp.array
    w: wp.array
    loss: wp.array


def ude(theta, data, size, work):
    u, h, r, v, w, target, dt = [data["u0"], *work.u], work.h, work.r, work.v, work.w, data["target"], size.dt
    react, misfit, turn, scale_turn, turn_add = work.kernels
    net = [theta[name] for name in ("W1", "b1", "W2", "b2")]
    saves, every, first = clock(size)
    cells, both = (size.N, size.N), (2, size.N, size.N)
    work.loss.zero_()
    wp.launch(misfit, both, [u[0], target[0], 1 / target.size], [work.loss])
    for n in range(saves * every):
        force = FORCING if n >= first else 0.0
        wp.launch(react, cells, [u[n], *net, data["disc"], force, dt], [r])
        for kernel, inputs, out in (
            (turn, [r, work.Q], w),
            (turn, [w, work.Q], v),
            (scale_turn, [h, v, work.Qt], w),
            (turn_add, [w, work.Qt, r], u[n + 1]),
        ):
            wp.launch_tiled(kernel, dim=work.tiles, inputs=inputs, outputs=[out], block_dim=THREADS)
        if (n + 1) % every == 0:
            wp.launch(misfit, both, [u[n + 1], target[(n + 1) // every], 1 / target.size], [work.loss])
    return work.loss


def ude_prepare(structure, size):
    N, (saves, every, _) = size.N, clock(size)
    real, blocks, Q, lam = wp.dtype_from_numpy(structure["W1"].dtype), ceil(N / TILE), fourier(N), eigenvalues(N)
    z = size.dt * size.alpha * (lam[:, None] + lam)
    Q, Qt, h = (wp.array(a, dtype=real) for a in (Q, Q.T, z / (1 - z)))
    r, v, w = (scratch((2, N, N), real) for _ in range(3))
    gradients = [wp.zeros((2, N, N), dtype=real) for _ in range(2)]  # on the way back they are zero again once used
    u = [scratch((2, N, N), real, gradients[n % 2]) for n in range(saves * every)]
    _, _, turn, scale_turn, turn_add, _ = imex_kernels(real, ceil(N / blocks))
    kernels = *network_kernel(real), turn, scale_turn, turn_add
    return UdeWork(kernels, (2, blocks, blocks), Q, Qt, h, u, r, v, w, scratch(1, real))


IMPLEMENTATION = {
    "rhs": {"loops": Implementation(rhs, rhs_prepare)},
    "imex": {"loops": Implementation(imex, imex_prepare)},
    "ude": {"loops": Implementation(ude, ude_prepare)},
}
