"""The valley glacier in Warp: a thread a cell and temperature, a launch a stage.

A thread computes the four diffusivities and fluxes around its cell from nine thicknesses and shares none with its
neighbours: so nothing but the states is stored for the way back. The semi-implicit step stores its matrix and the solution
too; its solve is LAPACK's on the host, a function of Python on the tape.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import warp as wp

from backends.warp_backend import record, scratch
from problems import Implementation
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
    TEMPERATURES,
    YEARS,
    cholesky,
    diverged,
    halfar_dx,
    most_iterations,
    pseudo_transient_stats,
    semi_implicit_stats,
    steps_a_year,
    substitute,
)

SSPRK3 = (0, 1), (3 / 4, 1 / 4), (1 / 3, 2 / 3)  # stage s: X[s + 1] = p X[0] + q (X[s] + dt H_t(X[s]))


@cache
def shallow_ice(real):
    """H_t at a cell, and D at a corner, for kernels."""
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

    return sia, diffusivity


@cache
def rhs_kernels(real):
    field, fields, number = wp.array2d(dtype=real), wp.array3d(dtype=real), wp.array(dtype=real)
    sia, _ = shallow_ice(real)

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
    number, field, fields = wp.array(dtype=real), wp.array2d(dtype=real), wp.array3d(dtype=real)
    sia, _ = shallow_ice(real)
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


# semi_implicit


@cache
def semi_implicit_kernels(real):
    number, field = wp.array(dtype=real), wp.array2d(dtype=real)
    (fluidity, _), (_, diffusivity) = rhs_kernels(real), shallow_ice(real)
    zero, half = real(0), real(0.5)

    @wp.kernel
    def start(H0: field, H: field):
        i, j = wp.tid()
        H[i, j] = wp.where(H0[i, j] > zero, H0[i, j], zero)

    @wp.kernel
    def corners(H: field, B: field, A: number, dx: real, factor: real, D: field):
        i, j = wp.tid()
        h00, h01, h10, h11 = H[i, j], H[i, j + 1], H[i + 1, j], H[i + 1, j + 1]
        S00, S01, S10, S11 = B[i, j] + h00, B[i, j + 1] + h01, B[i + 1, j] + h10, B[i + 1, j + 1] + h11
        D[i, j] = factor * A[0] * diffusivity(h00, h01, h10, h11, S00, S01, S10, S11, dx)

    @wp.kernel
    def edges(D: field, Kx: field, Ky: field):
        i, j = wp.tid()
        Kx[i, j] = half * (D[i, j] + D[i, j + 1])
        Ky[j, i] = half * (D[j, i] + D[j + 1, i])

    @wp.kernel
    def spread(Kx: field, Ky: field, H: field, B: field, b: field):
        """dt div(D grad S) inside"""
        i, j = wp.tid()
        S = B[i + 1, j + 1] + H[i + 1, j + 1]
        north, south = B[i, j + 1] + H[i, j + 1] - S, B[i + 2, j + 1] + H[i + 2, j + 1] - S
        west, east = B[i + 1, j] + H[i + 1, j] - S, B[i + 1, j + 2] + H[i + 1, j + 2] - S
        b[i, j] = Kx[i, j] * north + Kx[i + 1, j] * south + Ky[i, j] * west + Ky[i, j + 1] * east

    @wp.kernel
    def solve_vjp(lam: field, x: field, Kxb: field, Kyb: field):
        i, j = wp.tid()
        Kxb[i, j] -= (lam[i + 1, j + 1] - lam[i, j + 1]) * (x[i + 1, j + 1] - x[i, j + 1])
        Kyb[j, i] -= (lam[j + 1, i + 1] - lam[j + 1, i]) * (x[j + 1, i + 1] - x[j + 1, i])

    @wp.kernel
    def add(H: field, x: field, out: field):
        i, j = wp.tid()
        Hn = H[i, j] + x[i, j]
        out[i, j] = wp.where(Hn > zero, Hn, zero)

    @wp.kernel
    def misfit(H: field, H0: field, factor: real, loss: number):
        i, j = wp.tid()
        d = H[i, j] - H0[i, j]
        wp.atomic_add(loss, 0, factor * d * d)

    return fluidity, start, corners, edges, spread, solve_vjp, add, misfit


class SemiImplicitWork(NamedTuple):
    kernels: tuple
    A: wp.array
    H: list  # (N, N), before every step and at the end
    systems: list  # Kx (N-1, N-2), Ky (N-2, N-1) and x (N, N) of every step
    D: wp.array  # (N-1, N-1)
    b: wp.array  # (N-2, N-2)
    lam: wp.array  # (N, N)
    loss: wp.array


def solve(Kx, Ky, b, x, lam, solve_vjp):
    """x inside from x - flow(x) = b, x = 0 on the boundary; the reverse of it is another substitution."""
    factor = cholesky(Kx.numpy(), Ky.numpy())
    x.assign(np.pad(substitute(factor, b.numpy()), 1))

    def backward():
        inside = substitute(factor, x.grad.numpy()[1:-1, 1:-1])
        b.grad.assign(inside)
        lam.assign(np.pad(inside, 1))
        x.grad.zero_()
        wp.launch(solve_vjp, Kx.shape, [lam, x], [Kx.grad, Ky.grad], record_tape=False)

    return backward


def semi_implicit(theta, data, size, work):
    """Kernels write into buffers; between two launches the solve is LAPACK's, and its reverse is put on the tape by hand."""
    fluidity, start, corners, edges, spread, solve_vjp, add, misfit = work.kernels
    N, A, B, D, b, dx = size.N, work.A, data["B"], work.D, work.b, BOX / size.N
    wp.launch(fluidity, 1, [size.A, theta["lnA"]], [A])
    wp.launch(start, (N, N), [theta["H0"]], [work.H[0]])
    for n, (Kx, Ky, x) in enumerate(work.systems):
        H = work.H[n]
        wp.launch(corners, D.shape, [H, B, A, dx, YEARS / size.nst / dx**2], [D])
        wp.launch(edges, Kx.shape, [D], [Kx, Ky])
        wp.launch(spread, b.shape, [Kx, Ky, H, B], [b])
        record(solve(Kx, Ky, b, x, work.lam, solve_vjp), [Kx, Ky, b, x])
        wp.launch(add, (N, N), [H, x], [work.H[n + 1]])
    work.loss.zero_()
    wp.launch(misfit, (N, N), [work.H[-1], theta["H0"], 1 / N**2], [work.loss])
    return work.loss


def semi_implicit_prepare(structure, size):
    """What all steps have shares its gradients, which are zero again once they were used; see ude_prepare."""
    real, N = wp.dtype_from_numpy(structure["H0"].dtype), size.N
    shapes = (N - 1, N - 2), (N - 2, N - 1), (N, N)
    shared = [(shape, real, wp.zeros(shape, dtype=real)) for shape in shapes]
    systems = [[scratch(*x) for x in shared] for _ in range(size.nst)]
    gradients = [wp.zeros((N, N), dtype=real) for _ in range(2)]
    H = [scratch((N, N), real, gradients[n % 2]) for n in range(size.nst + 1)]
    D, b, lam = scratch((N - 1, N - 1), real), scratch((N - 2, N - 2), real), wp.zeros((N, N), dtype=real)
    return SemiImplicitWork(semi_implicit_kernels(real), scratch(1, real), H, systems, D, b, lam, scratch(1, real))


# Flat ground and no caps, of halfar and pseudo_transient


@cache
def flat(real, rho_g):
    """H_t at a node, and D averaged over its corners, for A = 1; 0 on the boundary."""
    field = wp.array2d(dtype=real)
    zero, half, quarter, c, eps = real(0), real(0.5), real(0.25), real(0.4 * rho_g**3), real(EPS)

    @wp.func
    def diffusivity(h00: real, h01: real, h10: real, h11: real, dx: real):
        gx, gy = half * (h10 - h00 + h11 - h01) / dx, half * (h01 - h00 + h11 - h10) / dx
        h = quarter * (h00 + h01 + h10 + h11)
        h2 = h * h
        return c * (h2 * h2 * h) * (gx * gx + gy * gy + eps)

    @wp.func
    def flow(H: field, dx: real, i: int, j: int):
        N = H.shape[0]
        if i == 0 or i == N - 1 or j == 0 or j == N - 1:
            return zero, zero
        h01, h10, h11, h12, h21 = H[i - 1, j], H[i, j - 1], H[i, j], H[i, j + 1], H[i + 1, j]
        D00 = diffusivity(H[i - 1, j - 1], h01, h10, h11, dx)
        D01 = diffusivity(h01, H[i - 1, j + 1], h11, h12, dx)
        D10 = diffusivity(h10, h11, H[i + 1, j - 1], h21, dx)
        D11 = diffusivity(h11, h12, h21, H[i + 1, j + 1], dx)
        north, south, west, east = D00 + D01, D10 + D11, D00 + D10, D01 + D11
        flows = south * (h21 - h11) - north * (h11 - h01) + east * (h12 - h11) - west * (h11 - h10)
        return half * flows / (dx * dx), quarter * (north + south)

    return flow


@cache
def halfar_kernels(real):
    number, field, flow = wp.array(dtype=real), wp.array2d(dtype=real), flat(real, HALFAR_RHO_G)
    zero, A0 = real(0), real(HALFAR_A)

    @wp.kernel
    def fluidity(lnA: number, A: number):
        A[0] = A0 * wp.exp(lnA[0])

    @wp.kernel
    def step(H: field, A: number, dt: number, n: int, dx: real, out: field):
        i, j = wp.tid()
        F, _ = flow(H, dx, i, j)
        Hn = H[i, j] + dt[n] * A[0] * F
        out[i, j] = wp.where(Hn > zero, Hn, zero)

    @wp.kernel
    def dome(H: field, loss: number):
        loss[0] = H[H.shape[0] / 2, H.shape[1] / 2]

    return fluidity, step, dome


class HalfarWork(NamedTuple):
    kernels: tuple
    A: wp.array
    H: list  # (N, N), for every step
    loss: wp.array


def halfar(theta, data, size, work):
    fluidity, step, dome = work.kernels
    H, A, dt, dx = [data["H0"], *work.H], work.A, data["dt"], halfar_dx(size)
    wp.launch(fluidity, 1, [theta["lnA"]], [A])
    for n in range(size.ns):
        wp.launch(step, H[n].shape, [H[n], A, dt, n, dx], [H[n + 1]])
    wp.launch(dome, 1, [H[-1]], [work.loss])
    return work.loss


def halfar_prepare(structure, size):
    """Two arrays serve as gradients of all states in turn; see ude_prepare."""
    real, shape = wp.dtype_from_numpy(structure["H0"].dtype), (size.N, size.N)
    gradients = [wp.zeros(shape, dtype=real) for _ in range(2)]
    H = [scratch(shape, real, gradients[n % 2]) for n in range(size.ns)]
    return HalfarWork(halfar_kernels(real), scratch(1, real), H, scratch(1, real))


@cache
def pseudo_transient_kernels(real):
    number, field, flow = wp.array(dtype=real), wp.array2d(dtype=real), flat(real, PLATE_RHO_G)
    zero, three, per_dt, damping, per_cfl, D_min = (real(x) for x in (0, 3, 1 / DT, DAMPING, 1 / CFL, D_MIN))

    @wp.kernel
    def fluidity(A0: number, lnA: number, A: number):
        n = wp.tid()
        A[n] = A0[n] * wp.exp(lnA[0])

    @wp.kernel
    def iteration(T: field, V: field, T0: field, A: number, n: int, dx: real, Tn: field, Vn: field):
        i, j = wp.tid()
        F, D = flow(T, dx, i, j)
        v = damping * V[i, j] + (A[n] * F - (T[i, j] - T0[i, j]) * per_dt)
        new = T[i, j] + v / (three * (per_dt + (D_min + A[n] * D) / (dx * dx) * per_cfl))
        Vn[i, j] = v
        Tn[i, j] = wp.where(new > zero, new, zero)

    @wp.kernel
    def change(T: field, Tn: field, off: number):
        i, j = wp.tid()
        wp.atomic_max(off, 0, wp.abs(Tn[i, j] - T[i, j]))

    @wp.kernel
    def copy(T: field, out: field):
        i, j = wp.tid()
        out[i, j] = T[i, j]

    @wp.kernel
    def energy(T: field, factor: real, loss: number):
        i, j = wp.tid()
        wp.atomic_add(loss, 0, factor * T[i, j] * T[i, j])

    return fluidity, iteration, change, copy, energy


class PseudoTransientWork(NamedTuple):
    kernels: tuple
    A: wp.array  # (steps)
    ends: list  # (N, N), T at the end of every step
    states: list  # T and V after every iteration, made when first wanted
    gradients: list  # that they share in turn, of T and of V
    zero: wp.array  # (N, N): V at first
    off: wp.array
    loss: wp.array


def pseudo_transient(theta, data, size, work):
    fluidity, iteration, change, copy, energy = work.kernels
    A, off, dx, k, real = work.A, work.off, PLATE / size.N, 0, work.zero.dtype
    if work.zero.device.is_capturing:
        raise NotImplementedError("a captured graph ends no loop by a number that it computes")
    T, dim = data["T0"], work.zero.shape
    wp.launch(fluidity, size.steps, [data["A"], theta["lnA"]], [A])
    for n in range(size.steps):
        T0, V = T, work.zero
        for _ in range(most_iterations(size)):
            if k == len(work.states):
                work.states.append([scratch(dim, real, gradient) for gradient in work.gradients[k % 2]])
            (Tn, Vn), k = work.states[k], k + 1
            wp.launch(iteration, dim, [T, V, T0, A, n, dx], [Tn, Vn])
            off.zero_()
            wp.launch(change, dim, [T, Tn], [off], record_tape=False)
            T, V = Tn, Vn
            if off.numpy()[0] < size.tol:
                break
        else:
            raise diverged(size)
        wp.launch(copy, dim, [T], [work.ends[n]])  # whose gradient is its own: it is T0 of all iterations to come
        T = work.ends[n]
    work.loss.zero_()
    wp.launch(energy, dim, [T, 1 / (2 * size.N**2)], [work.loss])
    return work.loss


def pseudo_transient_prepare(structure, size):
    real, shape = wp.dtype_from_numpy(structure["T0"].dtype), (size.N, size.N)
    gradients = [[wp.zeros(shape, dtype=real) for _ in "TV"] for _ in range(2)]
    ends = [scratch(shape, real) for _ in range(size.steps)]
    zero, off = wp.zeros(shape, dtype=real), wp.zeros(1, dtype=real)
    A, loss = scratch(size.steps, real), scratch(1, real)
    return PseudoTransientWork(pseudo_transient_kernels(real), A, ends, [], gradients, zero, off, loss)


IMPLEMENTATION = {
    "rhs": {"loops": Implementation(rhs, rhs_prepare)},
    "ude": {"loops": Implementation(ude, ude_prepare)},
    "semi_implicit": {
        "loops": Implementation(
            semi_implicit,
            semi_implicit_prepare,
            stats=semi_implicit_stats,
            unsupported={
                "compile": "The solve is LAPACK's, called from Python, and a captured graph holds launches only "
                "(`a function in Python is on the tape`).",
            },
        )
    },
    "halfar": {"loops": Implementation(halfar, halfar_prepare)},
    "pseudo_transient": {
        "loops": Implementation(
            pseudo_transient,
            pseudo_transient_prepare,
            stats=pseudo_transient_stats,
            unsupported={
                "compile": "Whether the loop ends is a number on the device, which the host reads after every iteration "
                "(`a captured graph ends no loop by a number that it computes`)."
            },
        )
    },
}
