"""The valley glacier in Numba for Enzyme: the very loops of the hand-written adjoint's primal.

In the semi-implicit one the solve has a rule, so that Enzyme does not go through the factorisation; in the form `scan` the
assembly alone is Enzyme's, the solve JAX's beside it, because LAPACK is no code that Enzyme sees.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numba import njit

from backends.enzyme_backend import anew, differentiable, output, rule, scratch
from problems import Implementation
from problems.shallow_ice import (
    A_MAX,
    A_MIN,
    DT,
    HALFAR_A,
    HALFAR_RHO_G,
    LAYERS,
    PLATE,
    PLATE_RHO_G,
    YEARS,
    halfar_dx,
    most_iterations,
    pseudo_transient_stats,
    semi_implicit_stats,
    shallow_ice_jax,
    steps_a_year,
)
from problems.shallow_ice.shallow_ice_jax import fluidity, on_host, pad, root, semi_implicit_prepare, solve
from problems.shallow_ice.shallow_ice_numba import (
    SSPRK3,
    box_stats,
    clear,
    copy,
    corners,
    flow_row,
    halfar_kernel,
    matrix,
    pseudo_transient_kernel,
    relax,
    relaxation,
    rhs_kernel,
    scales,
    semi_implicit_kernel,
    solve_box,
    solve_box_again,
    ssprk3,
    ude_kernel,
    units,
)


def rhs(theta, data, size):
    N, H = size.N, theta["H"]
    unit, eps = scales(size, H.dtype)
    buffers = scratch((N, N), H.dtype), scratch((3, N), H.dtype)
    return differentiable(rhs_kernel)(H, theta["lnA"], data["B"], data["v"], unit * size.A, eps, *buffers)


def ude(theta, data, size):
    """The whole trajectory in one kernel, whose tape is 26 numbers a node and stage: 0.6 GB at N = 64, and 152,000 pages that
    the system hands out anew in every call. They are two fifths of its time, of 3.5 times the hand adjoint's: where malloc
    keeps them (MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ of 4e9) it takes 0.58 of it."""
    N, dtype, spy = size.N, theta["W1"].dtype, steps_a_year(size)
    unit, eps = scales(size, dtype)
    A_span, ssp = (np.array(x, dtype) for x in ([A_MIN, A_MAX - A_MIN], SSPRK3))
    X = scratch((3 * size.years * spy + 1, 1, 1), dtype)  # the primal only asks how long the trajectory is
    L, rows, none = scratch((4, N, N), dtype), scratch((3, N), dtype), scratch(1, dtype)
    z = tuple(scratch(n, dtype) for n in LAYERS)
    weights = tuple(theta[f"{kind}{layer}"] for layer in range(1, len(LAYERS)) for kind in "Wb")
    fields = (data[name] for name in ("B", "H0", "Href", "T"))
    return differentiable(ude_kernel)(weights, *fields, unit / spy, eps, A_span, ssp, X, L, rows, z, z, none, (none,))


@njit
def step_kernel(H, c, B, eps, ssp, L, rows, out):
    copy(H, L[0])
    ssprk3(L, B, c[()], eps, ssp, rows)
    copy(L[0], out)


def ude_scan(theta, data, size):
    """A step is Enzyme's, so that what it stores of one fits the cache; the loop, which keeps the states, and the network are
    JAX's: an eighth of the memory, for 1.2 times the time, because every step runs again; 0.4 of it where others beside want
    the memory, too."""
    N, dtype, spy = size.N, theta["W1"].dtype, steps_a_year(size)
    unit, eps = scales(size, dtype)
    ssp, B, H0, Href = np.array(SSPRK3, dtype), data["B"], data["H0"], data["Href"]
    buffers = scratch((4, N, N), dtype), scratch((2, N), dtype), output((N, N), dtype)

    def misfit(of):
        c, Href = of

        def year(H, Href):
            step = lambda H, _: (differentiable(step_kernel)(H, c, B, eps, ssp, *buffers), None)  # noqa: E731
            H, _ = jax.lax.scan(step, H, length=spy)
            return H, jnp.sum((H - Href) ** 2)

        return jnp.sum(jax.lax.scan(year, H0, Href)[1])

    c = unit / spy * fluidity(theta, data["T"])
    return jnp.sum(jax.lax.map(misfit, (c, Href.swapaxes(0, 1)))) / Href.size


@njit
def system_kernel(H, lnA, B, c, eps, K, Kx, Ky, b):
    """dt D / dx^2 on edges, and dt div(D grad S) inside."""
    corners(H, B, c * np.exp(lnA[()]), eps, K)
    N = len(H)
    for i in range(N - 1):
        for j in range(N - 2):
            Kx[i, j] = K[i, j] + K[i, j + 1]
            Ky[j, i] = K[j, i] + K[j + 1, i]
    for i in range(1, N - 1):
        for j in range(1, N - 1):
            S = B[i, j] + H[i, j]
            b[i - 1, j - 1] = (
                Kx[i - 1, j - 1] * (B[i - 1, j] + H[i - 1, j] - S)
                + Kx[i, j - 1] * (B[i + 1, j] + H[i + 1, j] - S)
                + Ky[i - 1, j - 1] * (B[i, j - 1] + H[i, j - 1] - S)
                + Ky[i - 1, j] * (B[i, j + 1] + H[i, j + 1] - S)
            )


def semi_implicit_scan(theta, data, size, work):
    """The assembly is Enzyme's; the loop and the solve, with its rule, are JAX's."""
    N, nst, B, H0 = size.N, size.nst, data["B"], theta["H0"]
    unit, eps = scales(size, H0.dtype)
    shapes = (N - 1, N - 2), (N - 2, N - 1), (N - 2, N - 2)
    buffers = scratch((N - 1, N - 1), H0.dtype), *(output(shape, H0.dtype) for shape in shapes)
    factorise, back = on_host(work, nst + 1)

    def step_once(H, _):
        c = unit * size.A * YEARS / nst
        Kx, Ky, b = differentiable(system_kernel)(H, theta["lnA"], B, c, eps, *buffers)
        H = H + pad(solve(Kx, Ky, b, factorise, back))
        return jnp.where(H > 0, H, 0), None

    H, _ = jax.lax.scan(step_once, jnp.where(H0 > 0, H0, 0), length=nst)
    return jnp.mean((H - H0) ** 2)


@njit
def solve_box_vjp(D, box, A, r, Db, rb):
    """With M x = r and M lam = xb, of the right-hand side lam, and of the entry M[i, k], which M[k, i] equals,
    -(lam[i] x[k] + lam[k] x[i]). r holds x by now, and A the factor."""
    solve_box_again(box, A, rb)
    n, width = matrix(box, A).shape
    for k in range(n):
        Db[0, k] -= rb[k] * r[k]
    for m, entries in ((1, Db[1]), (width - 1, Db[2])):
        for k in range(n - m):
            entries[k] -= rb[k + m] * r[k] + rb[k] * r[k + m]


rule(solve_box, solve_box_vjp, wrt=("D", "r"))


def semi_implicit_own_stats(theta, data, size):
    return box_stats(theta, data, size, anew(solve_box), anew(solve_box_again))


def semi_implicit(theta, data, size, work):
    """All of it is one kernel. Its solves have a rule, one solve by the same factor, which stays in A until it is wanted."""
    N, nst, H0 = size.N, size.nst, theta["H0"]
    unit, eps = scales(size, H0.dtype)
    inner, dtype = (N - 2) ** 2, H0.dtype
    X, K, D, r = (scratch(shape, dtype) for shape in ((nst + 1, N, N), (N - 1, N - 1), (3, inner), (nst, inner)))
    box, A = scratch((nst, 4), "int64"), scratch((nst, inner * (N - 1)), dtype, differentiated=False)
    c = unit * size.A * YEARS / nst
    return differentiable(semi_implicit_kernel)(theta["lnA"], H0, data["B"], c, eps, X, K, D, r, box, A)


def halfar(theta, data, size):
    """With room for all states, so that Enzyme need not keep what is overwritten: 0.5 of the time of two states in turn."""
    N, H0 = size.N, data["H0"]
    unit, eps = units(halfar_dx(size), HALFAR_RHO_G, H0.dtype)
    buffers = scratch((size.ns + 1, N, N), H0.dtype), scratch(1, H0.dtype), scratch((4, N), H0.dtype)
    return differentiable(halfar_kernel)(H0, theta["lnA"], data["dt"], unit * HALFAR_A, eps, *buffers)


@njit
def pseudo_transient_or_nan(T0, lnA, A, c, eps, numbers, most, X, V, w, rows, ends):
    loss, iterations = pseudo_transient_kernel(T0, lnA, A, c, eps, numbers, most, X, V, w, rows, ends)
    return loss if iterations > 0 else np.nan * loss


def pseudo_transient(theta, data, size):
    """The while loop as it is: Enzyme keeps what it wants again of as many iterations as there were. Room for all states
    spares it little here (0.85 of the time at N = 50), and as much as there may have to be is slower (1.9 at N = 100)."""
    N, T0 = size.N, data["T0"]
    buffers = [scratch(shape, T0.dtype) for shape in ((2, N, N), (N, N), (1, N, N), (6, N))]
    fixed = *units(PLATE / N, PLATE_RHO_G, T0.dtype), relaxation(size, T0.dtype), most_iterations(size)
    ends = scratch(size.steps + 1, "int64")
    return differentiable(pseudo_transient_or_nan)(T0, theta["lnA"], data["A"], *fixed, *buffers, ends)


@njit
def relax_or_nan(T0, A, c, eps, numbers, most, out, X, V, rows):
    copy(T0, X[0])
    clear(V)
    k, off = 0, numbers[4]
    while off >= numbers[4] and k < most:
        off = relax(X[k % 2], T0, c * A[()], eps, numbers, V, X[(k + 1) % 2], rows)
        k += 1
    copy(X[k % 2], out)
    if off >= numbers[4]:
        out[:] = np.nan


@njit
def spread_kernel(T, A, c, eps, out, rows):
    """dt div(D grad T)"""
    N, Ks, Fs, f = len(T), rows[0], rows[1], rows[2]
    for j in range(N):
        Ks[j] = Fs[j] = 0
    for i in range(N - 1):
        flow_row(T, i, c * A[()], eps, Ks, Fs, f, None)
        if i > 0:
            for j in range(1, N - 1):
                out[i, j] = DT * f[j]


def pseudo_transient_root(theta, data, size):
    """The loop is a primal only: of the residual at its end Enzyme gives the jvp and the vjp, and JAX's solve takes both."""

    def relax(T0, A, size):
        buffers = (scratch(shape, T0.dtype) for shape in ((2, *T0.shape), T0.shape, (6, size.N)))
        fixed = *units(PLATE / size.N, PLATE_RHO_G, T0.dtype), relaxation(size, T0.dtype), most_iterations(size)
        return differentiable(relax_or_nan)(T0, A, *fixed, output(T0.shape, T0.dtype), *buffers)

    def spread(T, A, size):
        buffers = output(T.shape, T.dtype), scratch((3, size.N), T.dtype)
        return differentiable(spread_kernel)(T, A, *units(PLATE / size.N, PLATE_RHO_G, T.dtype), *buffers)

    return shallow_ice_jax.pseudo_transient(theta, data, size, partial(root, relax=relax, spread=spread))


IMPLEMENTATION = {
    "rhs": {"loops": Implementation(rhs)},
    "ude": {"loops": Implementation(ude), "scan": Implementation(ude_scan)},
    "semi_implicit": {
        "loops": Implementation(
            semi_implicit, semi_implicit_prepare, semi_implicit_own_stats, strategies={"forward": semi_implicit_scan}
        ),
        "scan": Implementation(semi_implicit_scan, semi_implicit_prepare, stats=semi_implicit_stats),
    },
    "halfar": {"loops": Implementation(halfar)},
    "pseudo_transient": {
        "loops": Implementation(
            pseudo_transient, stats=pseudo_transient_stats, strategies={"implicit": pseudo_transient_root}
        )
    },
}
