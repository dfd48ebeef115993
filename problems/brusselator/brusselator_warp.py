"""The Brusselator in Warp: a thread a cell; the solve is four products of tiles with the Fourier basis Q."""

from functools import cache
from math import ceil

import warp as wp

from backends.warp_backend import scratch
from problems import Implementation
from problems.brusselator import FORCING, T_FORCING, clock, eigenvalues, fourier

TILE = 32


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


IMPLEMENTATION = {
    "rhs": {"loops": Implementation(rhs, rhs_prepare)},
}
