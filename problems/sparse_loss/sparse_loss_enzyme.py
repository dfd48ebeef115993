"""The sparse losses in Numba for Enzyme: the very loops of the hand-written adjoint's primal.

Enzyme differentiates the assembly; the solve beside it is that of sparse_loss_jax, whose rule is over the solve alone, and
JAX differentiates the loss behind it. LAPACK is no code that Enzyme sees, and a Cholesky in loops is differentiated entry by
entry of its factor (6.5 times as slow at m = 32, and 2 GB at m = 128).
"""

import jax.numpy as jnp
import numpy as np
from numba import njit

from backends.enzyme_backend import differentiable, output, scratch
from problems import Implementation
from problems.sparse_loss import HALF_WIDTH, band, box, edges, slots
from problems.sparse_loss.sparse_loss_jax import solve
from problems.sparse_loss.sparse_loss_numba import (
    BLOCK,
    coefficients,
    conductivity,
    hopping,
    load,
    moments,
    product,
    residual,
    stiffness,
)


@njit
def build(theta, x, ends, tri, edge, c, T, mid, k, K, g):
    bits = np.empty(BLOCK, np.int64)
    c[:] = 0
    coefficients(theta, c)
    conductivity(x, ends, c, T, bits, bits.view(np.float64), mid, k)
    stiffness(x, tri, edge, k, K, g)


def buffers(size, edges, triangles, dtype):
    Q = -(-size.q // 4) * 4
    shapes = (Q, Q), (2, Q, BLOCK), (2, edges), edges, edges, (triangles, 3)
    return tuple(scratch(shape, dtype) for shape in shapes)


# The product


@njit
def matvec_kernel(theta, x, w, b, mesh, buffers, r):
    ends, tri, edge = mesh
    c, T, mid, k, K, g = buffers
    build(theta, x, ends, tri, edge, c, T, mid, k, K, g)
    return residual(ends, K, w, b, r)


def fem_matvec(theta, data, size, mesh):
    theta, (ends, tri, _) = theta["theta"], mesh
    work, r = buffers(size, len(ends), len(tri), theta.dtype), scratch(data["b"].shape, theta.dtype)
    return differentiable(matvec_kernel)(theta, data["x"], data["w"], data["b"], mesh, work, r)


def matvec_prepare(structure, size):
    tri = structure["tri"]
    ends, edge = edges(tri)
    return tuple(a.astype(np.int32) for a in (ends, tri, edge))


# The solve


@njit
def system_kernel(theta, x, mesh, buffers, slots, K, F):
    """K_ij of every edge, F over the inner nodes and one more for the boundary."""
    ends, tri, edge = mesh
    c, T, mid, k, g = buffers
    build(theta, x, ends, tri, edge, c, T, mid, k, K, g)
    load(x, tri, slots, F)


def fem_solve(theta, data, size, work):
    mesh, slots, band, factors = work
    theta, (ends, tri, _), n = theta["theta"], mesh, len(data["inner"])
    *fem, _, g = buffers(size, len(ends), len(tri), theta.dtype)
    K, F = output(len(ends), theta.dtype), output(n + 1, theta.dtype)
    K, F = differentiable(system_kernel)(theta, data["x"], mesh, (*fem, g), slots, K, F)
    u = solve(K, F[:-1], band, factors)
    r = jnp.append(u, 0.0)[band.slot] - data["u_star"]
    return jnp.vdot(r, r) / (2 * len(r))


def solve_prepare(structure, size):
    mesh = matvec_prepare(structure, size)
    b = band(mesh[0], structure["inner"], *structure["u_star"].shape)
    return mesh, b.slot[mesh[1]].astype(np.int32), b, {}


# The lattice


@njit
def hamiltonian(x, bonds, image, L, scale, place, buffers):
    bits = np.empty(BLOCK, np.int64)
    d, r, t, H = buffers
    hopping(x, bonds, image, L[0], L[1], scale, place, bits, bits.view(np.float64), d, r, t, H)
    return H.reshape(-1, 3)


@njit
def tight_binding_kernel(positions, bonds, image, x, L, near, place, buffers, y):
    return product(near, hamiltonian(positions, bonds, image, L, 1.0, place, buffers), x, y)


@njit
def kpm_kernel(positions, bonds, image, v, L, near, place, buffers, T, mu):
    return moments(near, hamiltonian(positions, bonds, image, L, 1 / HALF_WIDTH, place, buffers), v, T, mu)


def tight_binding(theta, data, size, work):
    x, (near, place) = theta["positions"], work
    lattice = x, data["bonds"], data["image"], data["x"], tuple(box(size)), near, place
    return differentiable(tight_binding_kernel)(*lattice, lattice_buffers(place, x.dtype), scratch(len(near), x.dtype))


def kpm(theta, data, size, work):
    x, (near, place) = theta["positions"], work
    lattice = x, data["bonds"], data["image"], data["v"], tuple(box(size)), near, place
    T, mu = scratch((size.K, len(near)), x.dtype), scratch(size.K, x.dtype)
    return differentiable(kpm_kernel)(*lattice, lattice_buffers(place, x.dtype), T, mu)


def lattice_buffers(place, dtype):
    bonds = place.shape[1]
    return tuple(scratch(shape, dtype) for shape in ((2, bonds), bonds, bonds, 2 * bonds))


def lattice_prepare(structure, size):
    near, _, _, place = slots(structure["bonds"])
    return near.astype(np.int32), place.astype(np.int32)


IMPLEMENTATION = {
    "fem_matvec": {"loops": Implementation(fem_matvec, matvec_prepare)},
    "fem_solve": {"loops": Implementation(fem_solve, solve_prepare)},
    "tight_binding": {"loops": Implementation(tight_binding, lattice_prepare)},
    "kpm": {"loops": Implementation(kpm, lattice_prepare)},
}
