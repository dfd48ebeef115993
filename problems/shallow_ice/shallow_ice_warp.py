"""The valley glacier in Warp: a thread a cell and temperature, a launch a stage.

A thread computes the four diffusivities and fluxes around its cell from nine thicknesses and shares none with its
neighbours: so nothing but the states is stored for the way back.
"""

from functools import cache
from typing import NamedTuple

import warp as wp

from backends.warp_backend import scratch
from problems import Implementation
from problems.shallow_ice import A_MAX, A_MIN, BOX, EPS, LAYERS, RHO_G, TEMPERATURES, steps_a_year

SSPRK3 = (0, 1), (3 / 4, 1 / 4), (1 / 3, 2 / 3)  # stage s: X[s + 1] = p X[0] + q (X[s] + dt H_t(X[s]))


@cache
def shallow_ice(real):
    """H_t at a cell, for kernels."""
    field, fields = wp.array2d(dtype=real), wp.array3d(dtype=real)
    zero, half, quarter, c, eps = real(0), real(0.5), real(0.25), real(0.4 * RHO_G**3), real(EPS)

    @wp.func
    def ice(H: fields, k: int, i: int, j: int):
        return wp.where(H[k, i, j] > zero, H[k, i, j], zero)

    @wp.func
    def diffusivity(h00: real, h01: real, h10: real, h11: real, S00: real, S01: real, S10: real, S11: real, dx: real):
        """At the corner between four cells, for A = 1."""
        gx, gy = half * (S10 - S00 + S11 - S01) / dx, half * (S01 - S00 + S11 - S10) / dx
        h = quarter * (h00 + h01 + h10 + h11)
        h2 = h * h
        return c * (h2 * h2 * h) * (gx * gx + gy * gy + eps)

    @wp.func
    def capped(e: real, below: real, above: real):
        return wp.where(e < -below, -below, wp.where(e > above, above, e))

    @wp.func
    def sia(H: fields, B: field, A: real, dx: real, k: int, i: int, j: int):
        N = B.shape[0]
        if i == 0 or i == N - 1 or j == 0 or j == N - 1:
            return zero
        h00, h01, h02 = ice(H, k, i - 1, j - 1), ice(H, k, i - 1, j), ice(H, k, i - 1, j + 1)
        h10, h11, h12 = ice(H, k, i, j - 1), ice(H, k, i, j), ice(H, k, i, j + 1)
        h20, h21, h22 = ice(H, k, i + 1, j - 1), ice(H, k, i + 1, j), ice(H, k, i + 1, j + 1)
        S00, S01, S02 = B[i - 1, j - 1] + h00, B[i - 1, j] + h01, B[i - 1, j + 1] + h02
        S10, S11, S12 = B[i, j - 1] + h10, B[i, j] + h11, B[i, j + 1] + h12
        S20, S21, S22 = B[i + 1, j - 1] + h20, B[i + 1, j] + h21, B[i + 1, j + 1] + h22
        D00 = diffusivity(h00, h01, h10, h11, S00, S01, S10, S11, dx)
        D01 = diffusivity(h01, h02, h11, h12, S01, S02, S11, S12, dx)
        D10 = diffusivity(h10, h11, h20, h21, S10, S11, S20, S21, dx)
        D11 = diffusivity(h11, h12, h21, h22, S11, S12, S21, S22, dx)
        north, south = (D00 + D01) * capped(S11 - S01, h01, h11), (D10 + D11) * capped(S21 - S11, h11, h21)
        west, east = (D00 + D10) * capped(S11 - S10, h10, h11), (D01 + D11) * capped(S12 - S11, h11, h12)
        return half * A * (south - north + east - west) / (dx * dx)

    return sia


@cache
def rhs_kernels(real):
    field, fields, number, sia = wp.array2d(dtype=real), wp.array3d(dtype=real), wp.array(dtype=real), shallow_ice(real)

    @wp.kernel
    def fluidity(A0: real, lnA: number, A: number):
        A[0] = A0 * wp.exp(lnA[0])

    @wp.kernel
    def kernel(H: fields, B: field, A: number, dx: real, v: field, loss: number):
        i, j = wp.tid()
        wp.atomic_add(loss, 0, v[i, j] * sia(H, B, A[0], dx, 0, i, j))

    return fluidity, kernel


def rhs(theta, data, size, work):
    (fluidity, kernel), A, loss = work
    N = size.N
    loss.zero_()
    wp.launch(fluidity, 1, [size.A, theta["lnA"]], [A])
    wp.launch(kernel, (N, N), [theta["H"].reshape((1, N, N)), data["B"], A, BOX / N, data["v"]], [loss])
    return loss


def rhs_prepare(structure, size):
    real = wp.dtype_from_numpy(structure["H"].dtype)
    return rhs_kernels(real), scratch(1, real), scratch(1, real)


# ude


@cache
def ude_kernels(real):
    number, field, fields, sia = wp.array(dtype=real), wp.array2d(dtype=real), wp.array3d(dtype=real), shallow_ice(real)
    one, A_min, A_span = real(1), real(A_MIN), real(A_MAX - A_MIN)

    @wp.kernel
    def scaled(T: number, z: field):
        k = wp.tid()
        z[0, k] = (T[k] + real(25.0)) / real(26.0)

    @wp.kernel
    def dense(W: field, b: number, z: field, a: field):
        """Apart from softplus: what a loop has summed may be stored but not used otherwise, or its derivative is lost."""
        o, k = wp.tid()
        total = b[o]
        for i in range(W.shape[1]):
            total += W[o, i] * z[i, k]
        a[o, k] = total

    @wp.kernel
    def softplus(a: field, z: field):
        o, k = wp.tid()
        z[o, k] = wp.log(one + wp.exp(a[o, k]))

    @wp.kernel
    def fluidity(a: field, A: number):
        k = wp.tid()
        A[k] = A_min + A_span / (one + wp.exp(-a[0, k]))

    @wp.kernel
    def start(H0: field, H: fields):
        k, i, j = wp.tid()
        H[k, i, j] = H0[i, j]

    @wp.kernel
    def stage(P: fields, X: fields, B: field, A: number, p: real, q: real, dx: real, dt: real, out: fields):
        k, i, j = wp.tid()
        out[k, i, j] = p * P[k, i, j] + q * (X[k, i, j] + dt * sia(X, B, A[k], dx, k, i, j))

    @wp.kernel
    def misfit(H: fields, Href: fields, factor: real, loss: number):
        k, i, j = wp.tid()
        d = H[k, i, j] - Href[k, i, j]
        wp.atomic_add(loss, 0, factor * d * d)

    return scaled, dense, softplus, fluidity, start, stage, misfit


class Work(NamedTuple):
    kernels: tuple
    layers: list  # (a, z) of each layer, (out, temperatures); the first has z alone
    A: wp.array  # (temperatures)
    X: list  # (temperatures, N, N), for every stage
    loss: wp.array


def network(theta, T, work):
    """A of every temperature."""
    scaled, dense, softplus, fluidity, *_ = work.kernels
    (_, z), *layers = work.layers
    wp.launch(scaled, len(TEMPERATURES), [T], [z])
    for layer, (a, out) in enumerate(layers, 1):
        wp.launch(dense, a.shape, [theta[f"W{layer}"], theta[f"b{layer}"], z], [a])
        if layer < len(layers):
            wp.launch(softplus, a.shape, [a], [out])
        z = out
    wp.launch(fluidity, len(TEMPERATURES), [a], [work.A])


def ude(theta, data, size, work):
    *_, start, stage, misfit = work.kernels
    X, A, B, Href, spy = work.X, work.A, data["B"], data["Href"], steps_a_year(size)
    dim, dx, dt = X[0].shape, BOX / size.N, 1 / spy
    network(theta, data["T"], work)
    work.loss.zero_()
    wp.launch(start, dim, [data["H0"]], [X[0]])
    for n in range(size.years * spy):
        for s, (p, q) in enumerate(SSPRK3):
            wp.launch(stage, dim, [X[3 * n], X[3 * n + s], B, A, p, q, dx, dt], [X[3 * n + s + 1]])
        if (n + 1) % spy == 0:
            wp.launch(misfit, dim, [X[3 * n + 3], Href[n // spy], 1 / Href.size], [work.loss])
    return work.loss


def ude_prepare(structure, size):
    """On the way back a state's gradient is zero again once it was used, so four arrays serve all in turn."""
    real, temperatures = wp.dtype_from_numpy(structure["W1"].dtype), len(TEMPERATURES)
    layers = [[scratch((n, temperatures), real) for _ in "az"] for n in LAYERS]
    shape = temperatures, size.N, size.N
    gradients = [wp.zeros(shape, dtype=real) for _ in range(4)]
    X = [scratch(shape, real, gradients[n % 4]) for n in range(3 * size.years * steps_a_year(size) + 1)]
    return Work(ude_kernels(real), layers, scratch(temperatures, real), X, scratch(1, real))


IMPLEMENTATION = {
    "rhs": {"loops": Implementation(rhs, rhs_prepare)},
    "ude": {"loops": Implementation(ude, ude_prepare)},
}
