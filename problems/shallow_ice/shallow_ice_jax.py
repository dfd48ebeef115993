"""The valley glacier in JAX: whole arrays, functional; the temperatures are a leading axis, time is a scan.

The semi-implicit step's solve is LAPACK's banded Cholesky on the host, with a rule over the solve alone: the jvp is one
more solve with the same factor, lax.custom_linear_solve, which JAX transposes for reverse mode; the strategy custom_rule
has the reverse rule itself, as one custom_vjp.

The loop of pseudo_transient is a lax.while_loop, which has a forward and no reverse mode. For reverse mode it is a scan as
long as the loop may be, which does nothing once it has converged; the strategy custom_rule gives the while loop a tape.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.sparse.linalg import bicgstab

from problems import Implementation
from problems.shallow_ice import (
    A_MAX,
    A_MIN,
    BOX,
    CFL,
    CONVERGED,
    D_MIN,
    DAMPING,
    DT,
    EPS,
    HALFAR_A,
    HALFAR_RHO_G,
    PLATE,
    PLATE_RHO_G,
    RHO_G,
    YEARS,
    cholesky,
    halfar_dx,
    most_iterations,
    pseudo_transient_stats,
    semi_implicit_stats,
    steps_a_year,
    substitute,
)


def avg_x(a):
    return 0.5 * (a[..., 1:, :] + a[..., :-1, :])


def avg_y(a):
    return 0.5 * (a[..., 1:] + a[..., :-1])


def diff_x(a):
    return a[..., 1:, :] - a[..., :-1, :]


def diff_y(a):
    return a[..., 1:] - a[..., :-1]


def cap(e, lo, hi):
    return jnp.where(e < lo, lo, jnp.where(e > hi, hi, e))  # jnp.clip halves the derivative at a tie


def diffusivity(Hc, dSx, dSy, A, rho_g=RHO_G):
    """D on corners, (N-1, N-1)."""
    gx, gy, Hb = avg_y(dSx), avg_x(dSy), avg_x(avg_y(Hc))
    return (0.4 * rho_g**3) * A * Hb**5 * (gx * gx + gy * gy + EPS)


def sia(H, B, A, dx):
    """H_t of the shallow ice approximation, (..., N, N); A is a number or (..., 1, 1)."""
    Hc = jnp.where(H > 0, H, 0)
    S = B + Hc
    dSx, dSy = diff_x(S) / dx, diff_y(S) / dx  # (N-1, N), (N, N-1): edges
    D = diffusivity(Hc, dSx, dSy, A)
    cx, cy = Hc[..., 1:-1] / dx, Hc[..., 1:-1, :] / dx
    ex = cap(dSx[..., 1:-1], -cx[..., :-1, :], cx[..., 1:, :])  # (N-1, N-2)
    ey = cap(dSy[..., 1:-1, :], -cy[..., :-1], cy[..., 1:])  # (N-2, N-1)
    Fx, Fy = -avg_y(D) * ex, -avg_x(D) * ey
    return pad(-(diff_x(Fx) + diff_y(Fy)) / dx)


def pad(a):
    """Nothing moves on the boundary."""
    return jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(1, 1), (1, 1)])


def rhs(theta, data, size):
    A = size.A * jnp.exp(theta["lnA"])
    return jnp.sum(data["v"] * sia(theta["H"], data["B"], A, BOX / size.N))


def rhs_loops(theta, data, size):
    """Corner by corner, each hands its half of the flux to its four nodes. Reverse mode adds the cotangent of every read of
    H to the whole of it, N^2 times N^2 numbers."""
    H, B, N = theta["H"], data["B"], size.N
    dx, A = BOX / N, size.A * jnp.exp(theta["lnA"])
    box = np.array([[0], [1]]), np.array([0, 1])

    def corner(n, dH):
        nodes = n // (N - 1) + box[0], n % (N - 1) + box[1]
        h = jnp.where(H[nodes] > 0, H[nodes], 0)
        S = B[nodes] + h
        x, y = S[1] - S[0], S[:, 1] - S[:, 0]
        gx, gy = jnp.mean(x) / dx, jnp.mean(y) / dx
        D = (0.4 * RHO_G**3) * A * jnp.mean(h) ** 5 * (gx * gx + gy * gy + EPS) / (2 * dx * dx)
        fx, fy = D * cap(x, -h[0], h[1]), D * cap(y, -h[:, 0], h[:, 1])
        return dH.at[nodes].add(jnp.stack([fx, -fx]) + jnp.stack([fy, -fy], 1))

    dH = jax.lax.fori_loop(0, (N - 1) ** 2, corner, jnp.zeros_like(H))
    return jnp.sum((data["v"] * dH)[1:-1, 1:-1])  # nothing moves on the boundary


def fluidity(theta, T):
    """A of every temperature."""
    z = ((T + 25) / 26)[None]  # (1, temperatures)
    z = jax.nn.softplus(theta["W1"] @ z + theta["b1"][:, None])
    z = jax.nn.softplus(theta["W2"] @ z + theta["b2"][:, None])
    z = jax.nn.softplus(theta["W3"] @ z + theta["b3"][:, None])
    z = theta["W4"] @ z + theta["b4"][:, None]
    return A_MIN + (A_MAX - A_MIN) * jax.nn.sigmoid(z[0])


def step(H, B, A, dx, dt):
    """SSPRK3."""
    H1 = H + dt * sia(H, B, A, dx)
    H2 = 0.75 * H + 0.25 * (H1 + dt * sia(H1, B, A, dx))
    return (H + 2 * (H2 + dt * sia(H2, B, A, dx))) / 3


def ude(theta, data, size, remat=lambda f: f):
    B, H0, Href = data["B"], data["H0"], data["Href"]
    A = fluidity(theta, data["T"])[:, None, None]
    spy = steps_a_year(size)

    @remat
    def step_once(H, _):
        return step(H, B, A, BOX / size.N, 1 / spy), None

    @remat
    def year(H, Href):
        H, _ = jax.lax.scan(step_once, H, length=spy)
        return H, jnp.sum((H - Href) ** 2)

    H = jnp.broadcast_to(H0, Href.shape[1:])  # (temperatures, N, N)
    return jnp.sum(jax.lax.scan(year, H, Href)[1]) / Href.size


def ude_checkpoint(theta, data, size):
    """Keeps the state of every year and, within one year, of every step: at N = 32, 4 MB for the tape's 160. The years
    alone: 29 MB, 1.17 times faster."""
    return ude(theta, data, size, remat=jax.checkpoint)


def conductance(H, B, A, dx, dt, rho_g=RHO_G):
    """dt D / dx^2 on edges, (N-1, N-2) and (N-2, N-1)."""
    S = B + H
    D = dt / dx**2 * diffusivity(H, diff_x(S) / dx, diff_y(S) / dx, A, rho_g)
    return avg_y(D), avg_x(D)


def flow(Kx, Ky, S):
    """dt div(D grad S) inside, (N-2, N-2)."""
    return diff_x(Kx * diff_x(S[..., 1:-1])) + diff_y(Ky * diff_y(S[..., 1:-1, :]))


def on_host(factors, keep):
    """factorise(Kx, Ky, b) -> (x, number of the factor), back(number, b). The factors stay on the host, the latest `keep`
    of them, and their numbers go with x: as arrays they would be copied, and their shapes hang on where the ice is."""

    def factorise(Kx, Ky, b):
        key = max(factors, default=-1) + 1
        factors[key] = factor = cholesky(np.asarray(Kx), np.asarray(Ky))
        factors.pop(key - keep, None)
        return substitute(factor, np.asarray(b)), np.int32(key)

    def back(key, b):
        return substitute(factors[np.asarray(key).item()], np.asarray(b))  # under vmap one factor, many b

    return (
        lambda Kx, Ky, b: jax.pure_callback(factorise, (b, jax.ShapeDtypeStruct((), jnp.int32)), Kx, Ky, b),
        lambda key, b: jax.pure_callback(back, b, key, b, vmap_method="expand_dims"),
    )


def solve(Kx, Ky, b, factorise, back):
    """x inside from x - flow(x) = b, x = 0 on the boundary."""

    @jax.custom_jvp
    def x(Kx, Ky, b):
        return factorise(Kx, Ky, b)[0]

    @x.defjvp
    def x_jvp(primals, tangents):
        (Kx, Ky, b), (dKx, dKy, db) = primals, tangents
        x, key = factorise(Kx, Ky, b)
        dx = jax.lax.custom_linear_solve(
            lambda v: v - flow(Kx, Ky, pad(v)),
            db + flow(dKx, dKy, pad(x)),
            lambda _, b: back(key, b),
            symmetric=True,
        )
        return x, dx

    return x(Kx, Ky, b)


def solve_rule(Kx, Ky, b, factorise, back):
    """The same solve with its adjoint written out, where JAX transposes no jvp."""

    @jax.custom_vjp
    def x(Kx, Ky, b):
        return factorise(Kx, Ky, b)[0]

    def forward(Kx, Ky, b):
        x, key = factorise(Kx, Ky, b)
        return x, (x, key)

    def backward(kept, xb):
        x, key = kept
        lam = back(key, xb)
        x0, lam0 = pad(x), pad(lam)
        Kxb = -diff_x(lam0[:, 1:-1]) * diff_x(x0[:, 1:-1])
        return Kxb, -diff_y(lam0[1:-1]) * diff_y(x0[1:-1]), lam

    x.defvjp(forward, backward)
    return x(Kx, Ky, b)


def semi_implicit(theta, data, size, work, solve=solve, remat=lambda f: f):
    """The solve leaves the graph for LAPACK on the host; its jvp is a custom_linear_solve by the same factor."""
    B, H0, A = data["B"], theta["H0"], size.A * jnp.exp(theta["lnA"])
    factorise, back = on_host(work, size.nst + 1)

    @remat
    def step_once(H, _):
        Kx, Ky = conductance(H, B, A, BOX / size.N, YEARS / size.nst)
        H = H + pad(solve(Kx, Ky, flow(Kx, Ky, B + H), factorise, back))
        return jnp.where(H > 0, H, 0), None

    H, _ = jax.lax.scan(step_once, jnp.where(H0 > 0, H0, 0), length=size.nst)
    return jnp.mean((H - H0) ** 2)


def semi_implicit_checkpoint(theta, data, size, work):
    """Keeps the state of every step; factors too are computed again."""
    return semi_implicit(theta, data, size, work, remat=jax.checkpoint)


def semi_implicit_rule(theta, data, size, work):
    """The adjoint of the solve, which is LAPACK's on the host, is written out: no jvp is transposed."""
    return semi_implicit(theta, data, size, work, solve_rule)


def semi_implicit_prepare(structure, size):
    return {}


def halfar(theta, data, size, remat=lambda f: f):
    A, dx = HALFAR_A * jnp.exp(theta["lnA"]), halfar_dx(size)

    @remat
    def step(H, dt):
        H = H + pad(flow(*conductance(H, 0.0, A, dx, dt, HALFAR_RHO_G), H))
        return jnp.where(H > 0, H, 0), None

    H, _ = jax.lax.scan(step, data["H0"], data["dt"])
    return H[size.N // 2, size.N // 2]


def halfar_checkpoint(theta, data, size):
    """Keeps the state of every step."""
    return halfar(theta, data, size, remat=jax.checkpoint)


def iteration(T, V, T0, A, dx):
    Kx, Ky = conductance(T, 0.0, A, dx, 1.0, PLATE_RHO_G)
    V = DAMPING * V + (flow(Kx, Ky, T) - (T - T0)[1:-1, 1:-1] / DT)
    T = T + pad(V / (1 / DT + (D_MIN / dx**2 + avg_x(Kx)) / CFL) / 3)
    return jnp.where(T > 0, T, 0), V


def change(T, last):
    return jnp.max(jnp.abs(jax.lax.stop_gradient(T - last)))


def relax(T0, A, size):
    """T at the step's end, NaN if it takes too many iterations."""

    def iterate(carry):
        last, V, _, k = carry
        T, V = iteration(last, V, T0, A, PLATE / size.N)
        return T, V, change(T, last), k + 1

    start = T0, jnp.zeros_like(T0[1:-1, 1:-1]), jnp.full_like(A, jnp.inf), 0
    T, _, off, _ = jax.lax.while_loop(lambda c: (c[2] >= size.tol) & (c[3] < most_iterations(size)), iterate, start)
    return jnp.where(off < size.tol, T, jnp.nan)


def relax_bounded(T0, A, size):
    """The same, of fixed length, because reverse mode needs one. An iteration keeps T and V only."""

    @jax.checkpoint
    def once(T, V):
        return iteration(T, V, T0, A, PLATE / size.N)

    def iterate(carry, _):
        def go(carry):
            T, V = once(*carry[:2])
            return T, V, change(T, carry[0])

        return jax.lax.cond(carry[2] >= size.tol, go, lambda carry: carry, carry), None

    start = T0, jnp.zeros_like(T0[1:-1, 1:-1]), jnp.full_like(A, jnp.inf)
    (T, _, off), _ = jax.lax.scan(iterate, start, length=most_iterations(size))
    return jnp.where(off < size.tol, T, jnp.nan)


def relax_taped(T0, A, size):
    """The while loop with a tape of its own: a rule over the loop, not over what is in it. The way back runs it once more
    and writes down T and V, then goes back as many iterations as there were."""

    @jax.custom_vjp
    def end(T0, A):
        return relax(T0, A, size)

    def forward(T0, A):
        return end(T0, A), (T0, A)

    def backward(kept, Tb):
        T0, A = kept
        once = partial(iteration, dx=PLATE / size.N)
        start = T0, jnp.zeros_like(T0[1:-1, 1:-1])
        tape = tuple(jnp.zeros((most_iterations(size), *a.shape), a.dtype) for a in start)

        def record(carry):
            last, V, _, k, Ts, Vs = carry
            T, V_next = once(last, V, T0, A)
            return T, V_next, change(T, last), k + 1, Ts.at[k].set(last), Vs.at[k].set(V)

        def more(carry):
            return (carry[2] >= size.tol) & (carry[3] < most_iterations(size))

        *_, k, Ts, Vs = jax.lax.while_loop(more, record, (*start, jnp.full_like(A, jnp.inf), 0, *tape))

        def back(carry):
            k, Tb, Vb, T0b, Ab = carry
            _, pull = jax.vjp(once, Ts[k - 1], Vs[k - 1], T0, A)
            Tb, Vb, dT0, dA = pull((Tb, Vb))
            return k - 1, Tb, Vb, T0b + dT0, Ab + dA

        zeros = jnp.zeros_like(start[1]), jnp.zeros_like(T0), jnp.zeros_like(A)
        _, Tb, _, T0b, Ab = jax.lax.while_loop(lambda c: c[0] > 0, back, (k, Tb, *zeros))
        return Tb + T0b, Ab

    end.defvjp(forward, backward)
    return end(T0, A)


def spread(T, A, size):
    """dt div(D grad T), 0 on the border."""
    return pad(flow(*conductance(T, 0.0, A, PLATE / size.N, DT, PLATE_RHO_G), T))


def root(T0, A, size, relax=relax, spread=spread):
    """Where the loop would end at last, differentiated by the implicit function theorem: nothing of the loop is kept, and
    its derivative is one linear solve, without a matrix. The transpose of bicgstab itself, and so of lax.custom_root with it,
    asks to open an issue: it must be told again that it is a linear solve."""
    size = size._replace(tol=CONVERGED)

    def residual(T, T0, A):
        """Where the loop cuts T off at 0, T is 0."""
        return jnp.where(T > 0, T - T0 - spread(T, A, size), T)

    @jax.custom_jvp
    def end(T0, A):
        return relax(T0, A, size)

    @end.defjvp
    def end_jvp(primals, tangents):
        T = end(*primals)
        _, db = jax.jvp(lambda *at: residual(T, *at), primals, tangents)
        _, J = jax.linearize(lambda T: residual(T, *primals), T)
        solve = lambda J, b: bicgstab(J, b, tol=1e-12)[0]  # noqa: E731
        return T, -jax.lax.custom_linear_solve(J, db, solve, solve)

    return end(T0, A)


def pseudo_transient(theta, data, size, relax=relax):
    def step(T, A):
        return relax(T, A, size), None

    T, _ = jax.lax.scan(step, data["T0"], data["A"] * jnp.exp(theta["lnA"]))
    return jnp.mean(T * T) / 2


def pseudo_transient_reverse(theta, data, size):
    return pseudo_transient(theta, data, size, relax_bounded)


def pseudo_transient_checkpoint(theta, data, size):
    """Keeps the state of every step."""
    return pseudo_transient(theta, data, size, jax.checkpoint(relax_bounded, static_argnums=2))


def pseudo_transient_rule(theta, data, size):
    return pseudo_transient(theta, data, size, relax_taped)


def pseudo_transient_root(theta, data, size):
    return pseudo_transient(theta, data, size, root)


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs), "loops": Implementation(rhs_loops)},
    "ude": {"array": Implementation(ude, strategies={"checkpoint": ude_checkpoint})},
    "semi_implicit": {
        "array": Implementation(
            semi_implicit,
            semi_implicit_prepare,
            stats=semi_implicit_stats,
            strategies={"checkpoint": semi_implicit_checkpoint, "custom_rule": semi_implicit_rule},
        ),
    },
    "halfar": {"array": Implementation(halfar, strategies={"checkpoint": halfar_checkpoint})},
    "pseudo_transient": {
        "array": Implementation(
            pseudo_transient,
            stats=pseudo_transient_stats,
            strategies={
                "reverse": pseudo_transient_reverse,
                "checkpoint": pseudo_transient_checkpoint,
                "custom_rule": pseudo_transient_rule,
                "implicit": pseudo_transient_root,
            },
        ),
    },
}
