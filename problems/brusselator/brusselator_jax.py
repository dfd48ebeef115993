"""The Brusselator in JAX: whole arrays, functional."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from problems import Implementation
from problems.brusselator import (
    A_UDE,
    B_UDE,
    FIRST,
    FORCING,
    MOST_CG,
    MOST_NEWTON,
    SHORTEST,
    SMOOTH,
    T_FORCING,
    ark_tolerances,
    clock,
    eigenvalues,
    fourier,
    kencarp4,
    lap_matrix,
    pieces,
)

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


def explicit(U, V, A, B, force, disc, dt):
    """u + dt R(u)"""
    flow = A * U - U * U * V
    return U + dt * (B - U - flow + force * disc), V + dt * flow


def imex(theta, data, size, keep=lambda interval: interval, explicit=explicit, diffuse=diffuse):
    u0, A, B, alpha, dt = theta["u0"], theta["A"], theta["B"], theta["alpha"], size.dt
    saves, every, first = clock(size)
    lam = eigenvalues(size.N).astype(u0.dtype)
    g = 1 / (1 - dt * alpha * (lam[:, None] + lam))

    def misfit(U, V):
        return jnp.sum((1 - U) ** 2 + (1 - V) ** 2) / 2

    def step(u, force):
        return diffuse(g, *explicit(*u, A, B, force, data["disc"], dt)), None

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


def network(U, V, W1, b1, W2, b2):
    """What stands for U^2 V."""
    z = jnp.tanh(W1 @ jnp.concatenate([U, V]).reshape(2, -1) + b1[:, None])
    return (W2 @ z + b2).reshape(U.shape)


def explicit_given(U, V, net, force, disc, dt):
    """As `explicit`, with the network."""
    flow = A_UDE * U - network(U, V, **net)
    return U + dt * (B_UDE - U - flow + force * disc), V + dt * flow


def ude(theta, data, size, explicit=explicit_given, diffuse=diffuse):
    u0, target, dt = data["u0"], data["target"], size.dt
    saves, every, first = clock(size)
    lam = eigenvalues(size.N).astype(u0.dtype)
    g = 1 / (1 - dt * size.alpha * (lam[:, None] + lam))

    def misfit(u, seen):
        return sum(jnp.sum((x - y) ** 2) for x, y in zip(u, seen, strict=True))

    def step(u, force):
        return diffuse(g, *explicit(*u, theta, force, data["disc"], dt)), None

    def interval(u, given):
        forces, seen = given
        u, _ = lax.scan(step, u, forces)
        return u, misfit(u, seen)

    forces = FORCING * (np.arange(saves * every) >= first).astype(u0.dtype)
    _, losses = lax.scan(interval, tuple(u0), (forces.reshape(saves, every), target[1:]))
    return (misfit(u0, target[0]) + jnp.sum(losses)) / target.size


def ude_checkpoint(theta, data, size):
    """The network is run again on the way back, as by hand: 0.7 and 0.35 of the time of storing its hidden values at
    N = 16 and 32, where one state a sample takes 0.9 and 0.57."""
    return ude(theta, data, size, jax.checkpoint(explicit_given))


def ude_rule(theta, data, size):
    return ude(theta, data, size, diffuse=diffuse_rule)


def update(F, J, w):
    return jnp.linalg.solve(J(w), F(w).ravel()).reshape(w.shape)


def small(dw):
    return jnp.max(jnp.abs(dw)) <= jnp.sqrt(jnp.finfo(dw.dtype).eps)


def unrolled(F, J, w, remat=lambda f: f):
    """Newton's iteration itself, until it stands, and once more; of fixed length, because reverse mode needs one."""

    def iterate(carry, _):
        def once(carry):
            w, last, _ = carry
            dw = update(F, J, w)
            return w - dw, small(dw), last

        return lax.cond(carry[2], lambda carry: carry, once, carry), None

    (w, _, done), _ = lax.scan(remat(iterate), (w, False, False), length=UNROLLED)
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


def implicit_checkpoint(theta, data, size):
    """An iteration keeps w and no matrix: at N = 16 less than half the time, because room for two factors an iteration, taken
    or not, is 1.2 GB."""
    return implicit(theta, data, size, partial(unrolled, remat=jax.checkpoint))


def implicit_root(theta, data, size):
    return implicit(theta, data, size, root)


def attempts(size):
    """Steps that a scan has room for, taken or refused: of the steps that were seen at least half as many again."""
    return 3 * len(pieces(size).lengths) // 2 + int((24 + 4 * size.T) * max(1, 1e-5 / size.atol) ** 0.25)


DIRECT = 10  # up to this N the modes take less time than the iterations


def cg(S, M, b, tolerance):
    """S^-1 b, until the energy of the error, res M^-1 res, is tolerance^2 of that of the solution; NaN where it never is."""

    def dot(x, y):
        return jnp.sum(x * y)  # vdot takes 1.5 times as long

    def iterate(carry):
        y, res, z, p, rz, _, k = carry
        Sp = S(p)
        step = rz / dot(p, Sp)
        y, res = y + step * p, res - step * Sp
        z = M(res)
        rz, previous = dot(res, z), rz
        return y, res, z, z + rz / previous * p, rz, rz <= tolerance**2 * dot(y, b), k + 1

    z = M(b)
    rz = dot(b, z)
    carry = lax.while_loop(lambda c: ~c[5] & (c[6] < MOST_CG), iterate, (0 * z, b, z, z, rz, rz == 0, 0))
    y, _, z, _, _, done, _ = carry
    return jnp.where(done, y + z, jnp.nan)


def modes(g):
    """V (2, N^2, N^2) and K (2, N^2) of each field, g lap g = V K V^T, by which each solve is two products."""
    _, N, _ = g.shape
    lap, g = lap_matrix(N)[: N * N, : N * N].toarray(), g.reshape(2, -1)
    K, V = jnp.linalg.eigh(g[:, :, None] * jnp.asarray(lap, g.dtype) * g[:, None])
    return V, K


def misfit(u):
    return jnp.sum((1 - u) ** 2) / 2


def ode(theta, data, size, reaction=reaction, remat=lambda f: f):
    """KenCarp4 in a scan as long as any course of steps may be, of which those past the end do nothing. How long a step is,
    and whether it is taken, is not differentiated; of a solve neither."""
    A, B, u0, disc, N = theta["A"], theta["B"], data["u0"], data["disc"], size.N
    alpha = jnp.stack([theta["alpha1"], theta["alpha2"]])
    fixed, dtype = lax.stop_gradient(alpha) * (N - 1) ** 2, u0.dtype
    rtol, atol, tolerance = ark_tolerances(size, dtype)
    E, I, b, error = (x.tolist() for x in kencarp4())  # noqa: E741 - plain numbers take the dtype of what they meet
    course, gamma = pieces(size), I[1][1]
    count = len(course.lengths)
    lengths, forces, samples = (jnp.asarray(np.append(x, x[-1]), dtype) for x in course)
    Q, mu = jnp.asarray(fourier(N), dtype), jnp.asarray(2 + eigenvalues(N) / (N - 1) ** 2, dtype)

    def symmetric(c):
        """What scales 1 - c alpha lap to S = 1 - g A g, A the sum of the four neighbours, and its mean M in waves."""
        square = 1 / (4 + 1 / (c * fixed))
        g = jnp.sqrt(square)
        return g, (1 - 4 * square) / g, 1 - jnp.mean(square, (1, 2), keepdims=True) * (mu[:, None] + mu)

    def by_waves(M, r):
        """M^-1 r"""
        return Q @ ((Q.T @ r @ Q) / M) @ Q.T

    def iterated(c):
        g, e, M = symmetric(c)

        def S(y):
            x = g * y
            return y - g * (jnp.roll(x, 1, 1) + jnp.roll(x, -1, 1) + jnp.roll(x, 1, 2) + jnp.roll(x, -1, 2))

        return g, e, lambda r: cg(S, lambda res: by_waves(M, res), r, tolerance)

    def direct(g, V, K):
        def scaled(c):
            def inverse(r):
                z = jnp.einsum("fkm,fk->fm", V, r.reshape(2, -1)) / (1 - c * K)
                return jnp.einsum("fkm,fm->fk", V, z).reshape(r.shape)

            return g, 1 / g, inverse

        return scaled

    root = jnp.sqrt(lax.stop_gradient(alpha))
    scaled = direct(root, *modes(root)) if N <= DIRECT else iterated

    def solver(c):
        """(1 - c alpha lap)^-1"""
        g, e, inverse = scaled(c)

        def solve(r):
            return lax.custom_linear_solve(
                lambda w: w - c * alpha * lap(w, N), r, lambda _, r: g * inverse(e * r), lambda _, q: e * inverse(g * q)
            )

        return solve

    smooth = symmetric(SMOOTH)[2]

    def attempt(carry):
        u, piece, left, h, loss = carry
        equal = jnp.ceil(left / h - 1e-3)
        dt = left / equal
        solve, force = solver(gamma * dt), FORCING * forces[piece] * disc
        k_E, k_I = [reaction(u, A, B, force)], [alpha * lap(u, N)]
        for i in range(1, 6):
            r = u + dt * sum(E[i][j] * k_E[j] + I[i][j] * k_I[j] for j in range(i))
            w = solve(r)
            k_E.append(reaction(w, A, B, force))
            k_I.append((w - r) / (gamma * dt))
        new = u + dt * sum(b[j] * (k_E[j] + k_I[j]) for j in range(6))
        off = lax.stop_gradient(dt * sum(error[j] * (k_E[j] + k_I[j]) for j in range(6)))
        off = smooth[:, :1, :1] * by_waves(smooth, off)
        off = jnp.sqrt(jnp.mean((off / (atol + rtol * jnp.maximum(jnp.abs(u), jnp.abs(new)))) ** 2))
        h = jnp.where(off < 1e4, dt * jnp.minimum(5, 0.9 * jnp.maximum(off, 1e-4) ** -0.25), 0.1 * dt)
        taken = off <= 1
        last = taken & (equal == 1)
        loss = loss + jnp.where(last & (samples[piece] > 0), misfit(new), 0)
        h = jnp.where(last & (forces[piece + 1] != forces[piece]), FIRST, h)
        left = jnp.where(last, lengths[piece + 1], jnp.where(taken, left - dt, left))
        return jnp.where(taken, new, u), piece + last, left, lax.stop_gradient(h), loss

    def step(carry, _):
        return lax.cond((carry[1] < count) & (carry[3] >= SHORTEST), remat(attempt), lambda carry: carry, carry), None

    start = u0, jnp.array(0), lengths[0], jnp.asarray(FIRST, dtype), misfit(u0)
    (_, piece, _, _, loss), _ = lax.scan(step, start, length=attempts(size))
    return jnp.where(piece == count, loss, jnp.nan)


def ode_checkpoint(theta, data, size):
    """The state of every step is kept."""
    return ode(theta, data, size, remat=jax.checkpoint)


def ode_diffrax(theta, data, size, adjoint="RecursiveCheckpointAdjoint", solved=lambda found: None):
    """What diffrax has for a stiff equation (Kidger, arXiv 2202.02435): Kvaerno's method of order 5, Newton's iteration with a
    dense LU of the whole Jacobian in every stage. It stops where the forcing sets in, and samples by interpolation."""
    import diffrax

    def f(t, u, given):
        theta, force = given
        alpha = jnp.stack([theta["alpha1"], theta["alpha2"]])
        return reaction(u, theta["A"], theta["B"], force) + alpha * lap(u, size.N)

    u, (lengths, forced, sampled) = data["u0"], pieces(size)
    loss = misfit(u)
    for force in np.unique(forced):
        here = forced == force
        found = diffrax.diffeqsolve(
            diffrax.ODETerm(f),
            diffrax.Kvaerno5(),
            t0=0.0,
            t1=(t := np.cumsum(lengths[here]))[-1],
            dt0=None,
            y0=u,
            args=(theta, FORCING * force * data["disc"]),
            saveat=diffrax.SaveAt(ts=t),
            stepsize_controller=diffrax.PIDController(rtol=size.rtol, atol=size.atol),
            adjoint=getattr(diffrax, adjoint)(),
        )
        solved(found)
        loss += misfit(found.ys[sampled[here] > 0])
        u = found.ys[-1]
    return loss


def ode_diffrax_stats(theta, data, size):
    pieces = []
    ode_diffrax(theta, data, size, solved=lambda found: pieces.append(found.stats))
    names = {"steps": "num_accepted_steps", "rejected": "num_rejected_steps"}
    return {name: sum(stats[key] for stats in pieces) for name, key in names.items()}


def ode_diffrax_forward(theta, data, size):
    return ode_diffrax(theta, data, size, adjoint="ForwardMode")


def ode_diffrax_backsolve(theta, data, size):
    return ode_diffrax(theta, data, size, adjoint="BacksolveAdjoint")


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs), "loops": Implementation(rhs_loops)},
    "imex": {"array": Implementation(imex, strategies={"checkpoint": imex_checkpoint, "custom_rule": imex_rule})},
    "ude": {"array": Implementation(ude, strategies={"checkpoint": ude_checkpoint, "custom_rule": ude_rule})},
    "implicit": {
        "array": Implementation(implicit, strategies={"checkpoint": implicit_checkpoint, "implicit": implicit_root})
    },
    "ode": {
        "array": Implementation(ode, strategies={"checkpoint": ode_checkpoint}),
        "diffrax-kvaerno5": Implementation(
            ode_diffrax,
            stats=ode_diffrax_stats,
            strategies={"forward": ode_diffrax_forward, "backsolve": ode_diffrax_backsolve},
            unsupported={
                "backsolve": "Diffusion has no way back: what died out grows again, from rounding, by e^1000 at N = 4, and the "
                "solver ends (`The maximum number of solver steps was reached`). Of a stiff equation store the solution, or "
                "its steps.",
            },
        ),
    },
}
