"""The Brusselator in JAX: whole arrays, functional."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from problems import Implementation
from problems.brusselator import FORCING, MOST_NEWTON, T_FORCING, clock, eigenvalues, lap_matrix

UNROLLED = 8  # Newton iterations at most where each is differentiated: what they need is kept for as many


def lap(u, N):
    """The periodic five-point Laplacian of the last two axes."""
    return (jnp.roll(u, 1, -2) + jnp.roll(u, -1, -2) + jnp.roll(u, 1, -1) + jnp.roll(u, -1, -1) - 4 * u) * (N - 1) ** 2


def reaction(u, A, B, force):
    """All that is not diffusion."""
    U, V = u
    U2V = U * U * V
    return jnp.stack([B + U2V - (A + 1) * U + force, A * U - U2V])


def rhs(theta, data, size):
    u, A, B, alpha = theta["u"], theta["A"], theta["B"], theta["alpha"]
    force = FORCING * data["disc"] if size.t >= T_FORCING else 0.0
    du = reaction(u, A, B, force) + alpha * lap(u, size.N)
    return jnp.vdot(data["v"], du)


def rhs_loops(theta, data, size):
    """Cell by cell. Reverse mode adds the cotangent of every read of u to the whole of it, N^2 times N^2 numbers: 30 times
    the time of whole arrays at N = 32."""
    u, A, B, alpha, N = theta["u"], theta["A"], theta["B"], theta["alpha"], size.N
    force = FORCING if size.t >= T_FORCING else 0.0

    def cell(n, du):
        i, j = n // N, n % N
        U, V = u[:, i, j]
        lapU, lapV = u[:, i - 1, j] + u[:, (i + 1) % N, j] + u[:, i, j - 1] + u[:, i, (j + 1) % N] - 4 * u[:, i, j]
        U2V, c = U * U * V, alpha * (N - 1) ** 2
        du = du.at[0, i, j].set(B + U2V - (A + 1) * U + force * data["disc"][i, j] + c * lapU)
        return du.at[1, i, j].set(A * U - U2V + c * lapV)

    return jnp.vdot(data["v"], lax.fori_loop(0, N * N, cell, jnp.zeros_like(u)))


def diffuse(g, U, V):
    """S: two real fields, one complex FFT; S is real, so S (U + i V) = S U + i S V. 1.2 times faster than rfft2, and than Q."""
    w = jnp.fft.ifft2(g * jnp.fft.fft2(lax.complex(U, V)))
    return w.real, w.imag


def diffuse_forward(g, U, V):
    waves = jnp.fft.fft2(lax.complex(U, V))
    w = jnp.fft.ifft2(g * waves)
    return (w.real, w.imag), (g, waves)


def diffuse_back(kept, wb):
    """S is symmetric, so it is its own adjoint; all that is stored of a step are its waves."""
    g, waves = kept
    y = jnp.fft.fft2(lax.complex(*wb))
    r = jnp.fft.ifft2(g * y)
    return (y.real * waves.real + y.imag * waves.imag) / g.size, r.real, r.imag


diffuse_rule = jax.custom_vjp(diffuse)
diffuse_rule.defvjp(diffuse_forward, diffuse_back)


def imex(theta, data, size, keep=lambda interval: interval, diffuse=diffuse):
    u0, A, B, alpha, dt = theta["u0"], theta["A"], theta["B"], theta["alpha"], size.dt
    saves, every, first = clock(size)
    lam = eigenvalues(size.N).astype(u0.dtype)
    g = 1 / (1 - dt * alpha * (lam[:, None] + lam))

    def misfit(U, V):
        return jnp.sum((1 - U) ** 2 + (1 - V) ** 2) / 2

    def step(u, force):
        U, V = u
        flow = A * U - U * U * V
        return diffuse(g, U + dt * (B - U - flow + force * data["disc"]), V + dt * flow), None

    @keep
    def interval(u, forces):
        u, _ = lax.scan(step, u, forces)
        return u, misfit(*u)

    forces = FORCING * (np.arange(saves * every) >= first).astype(u0.dtype)
    _, losses = lax.scan(interval, tuple(u0), forces.reshape(saves, every))
    return misfit(*u0) + jnp.sum(losses)


def imex_checkpoint(theta, data, size):
    """One state a sample is stored, those in between are computed again."""
    return imex(theta, data, size, jax.checkpoint)


def imex_rule(theta, data, size):
    """S has a rule of its own, as fast as what JAX derives (0.9 to 1.05 of its time, N = 32 and 64)."""
    return imex(theta, data, size, diffuse=diffuse_rule)


def update(F, J, w):
    return jnp.linalg.solve(J(w), F(w).ravel()).reshape(w.shape)


def small(dw):
    return jnp.max(jnp.abs(dw)) <= jnp.sqrt(jnp.finfo(dw.dtype).eps)


def unrolled(F, J, w):
    """Newton's iteration itself, until it stands, and once more; of fixed length, because reverse mode needs one."""

    def iterate(carry, _):
        def once(carry):
            w, last, _ = carry
            dw = update(F, J, w)
            return w - dw, small(dw), last

        return lax.cond(carry[2], lambda carry: carry, once, carry), None

    (w, _, done), _ = lax.scan(iterate, (w, False, False), length=UNROLLED)
    return jnp.where(done, w, jnp.nan)


def root(F, J, w):
    """The same root, differentiated by the implicit function theorem: nothing of the iteration is kept."""

    def solve(F, w):
        def iterate(carry):
            w, _, k = carry
            dw = update(F, J, w)
            return w - dw, small(dw), k + 1

        w, done, _ = lax.while_loop(lambda c: ~c[1] & (c[2] < MOST_NEWTON), iterate, (w, False, 0))
        return jnp.where(done, w, jnp.nan)

    def tangent_solve(g, y):
        return jnp.linalg.solve(jax.jacfwd(g)(y).reshape(y.size, y.size), y.ravel()).reshape(y.shape)

    return lax.custom_root(F, w, solve, tangent_solve)


def implicit(theta, data, size, solve=unrolled):
    u0, A, B, alpha, dt = theta["u0"], theta["A"], theta["B"], theta["alpha"], size.dt
    saves, every, first = clock(size)
    L = lap_matrix(size.N).toarray().astype(u0.dtype)

    def step(u, force):
        def F(w):
            return w - u - dt * (reaction(w, A, B, force * data["disc"]) + alpha * lap(w, size.N))

        def J(w):
            U, V = w.reshape(2, -1)
            gain, U2 = 2 * U * V - A, U * U
            R = jnp.block([[jnp.diag(gain - 1), jnp.diag(U2)], [jnp.diag(-gain), jnp.diag(-U2)]])
            return jnp.eye(len(L), dtype=L.dtype) - dt * (alpha * L + R)

        return solve(F, J, u), None

    def interval(u, forces):
        u, _ = lax.scan(step, u, forces)
        return u, jnp.sum((1 - u) ** 2) / 2

    forces = FORCING * (np.arange(1, saves * every + 1) >= first).astype(u0.dtype)
    _, losses = lax.scan(interval, u0, forces.reshape(saves, every))
    return jnp.sum((1 - u0) ** 2) / 2 + jnp.sum(losses)


def implicit_root(theta, data, size):
    return implicit(theta, data, size, root)


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs), "loops": Implementation(rhs_loops)},
    "imex": {"array": Implementation(imex, strategies={"checkpoint": imex_checkpoint, "custom_rule": imex_rule})},
    "implicit": {"array": Implementation(implicit, strategies={"implicit": implicit_root})},
}
