"""The sparse losses in JAX: whole arrays, K as one weight an edge (problems.sparse_loss.edges), summed by scatters.

The solve is LAPACK's banded Cholesky on the host, as in Numba and PyTorch. Its rule is over the solve alone: the jvp is one
more solve with the same factor, lax.custom_linear_solve, which JAX transposes for reverse mode; the strategy custom_rule
has the reverse rule itself, as one custom_vjp. JAX's own sparse solve, jax.experimental.sparse.linalg.spsolve, factorises
again for the adjoint (7 times as slow at m = 32) and cannot be batched.

H is its three numbers a row, by columns, so that a product gathers. By scatters over bonds the gradient of the moments takes
1.2 times as long, by one gather of (n, 3) 0.85 times at 1,024 sites and 1.3 times at 16,384.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from problems import Implementation
from problems.sparse_loss import BETA, HALF_WIDTH, T0, A, band, box, cholesky, edges, slots, substitute


def chebyshev(c, q):
    """cos(i pi x), i = 0..q-1, from c = cos(pi x)."""
    T = [jnp.ones_like(c), c]
    for _ in range(2, q):
        T.append(2 * c * T[-1] - T[-2])
    return T[:q]


def conductivity(theta, mid, q):
    """k at the points mid (2, points). The cosines are a loop over x, y, or XLA would compute them again in every row that
    is made of them; a sum over rows is written out, because jnp.sum(axis=0) is 10 times slower on the CPU."""
    i = jnp.arange(q, dtype=mid.dtype)
    c = theta.reshape(q, q) / (1 + i[:, None] ** 2 + i**2)
    X, Y = (chebyshev(cos, q) for cos in jax.lax.map(jnp.cos, jnp.pi * mid))
    t = c.T @ jnp.stack(X)  # (q, points)
    return jnp.exp(sum(t[j] * Y[j] for j in range(q)))


def geometry(x, tri):
    """The weights of each triangle's three edges at k = 1 (3, triangles), the areas; x is (2, n)."""
    p0, p1, p2 = (x[:, tri[:, s]] for s in range(3))
    e0, e1, e2 = p2 - p1, p0 - p2, p1 - p0
    area = (e0[0] * e1[1] - e0[1] * e1[0]) / 2
    return jnp.stack([a[0] * b[0] + a[1] * b[1] for a, b in ((e1, e2), (e2, e0), (e0, e1))]) / (4 * area), area


def stiffness(theta, x, tri, ends, edge, q):
    """K_ij of every edge."""
    i, j = ends
    k = conductivity(theta, (x[:, i] + x[:, j]) / 2, q)
    kbar = (k[edge[0]] + k[edge[1]] + k[edge[2]]) / 3
    return jnp.zeros_like(k).at[edge].add(kbar * geometry(x, tri)[0])


def product(K, ends, w):
    """K w; its rows sum to zero."""
    i, j = ends
    flux = K * (w[j] - w[i])
    return jnp.zeros_like(w).at[i].add(flux).at[j].add(-flux)


def fem_matvec(theta, data, size, work):
    ends, edge = work
    K = stiffness(theta["theta"], data["x"].T, data["tri"], ends, edge, size.q)
    r = product(K, ends, data["w"]) - data["b"]
    return jnp.vdot(r, r) / 2


def on_host(band, factors):
    """factorise(K, F) -> (u, number of the factor), back(number, b). The factor stays on the host, among the two latest of
    factors, and its number goes with u: as an array it would be copied four times (1.5 times as slow)."""

    def factorise(K, F):
        key = max(factors, default=-1) + 1
        factors[key] = U = cholesky(np.asarray(K), band)
        factors.pop(key - 2, None)
        return substitute(U, np.asarray(F)), np.int32(key)

    def back(key, b):
        b, U = np.asarray(b), factors[np.asarray(key).item()]
        return substitute(U, b) if b.ndim == 1 else substitute(U, b.T).T  # under vmap one factor, many b

    return (
        lambda K, F: jax.pure_callback(factorise, (F, jax.ShapeDtypeStruct((), jnp.int32)), K, F),
        lambda key, b: jax.pure_callback(back, b, key, b, vmap_method="expand_dims"),
    )


def solve(K, F, band, factors):
    """u from K u = F over the inner nodes; the last slot is the boundary's, u = 0."""
    ends = band.ends.T
    factorise, back = on_host(band, factors)

    @jax.custom_jvp
    def u(K, F):
        return factorise(K, F)[0]

    @u.defjvp
    def u_jvp(primals, tangents):
        (K, F), (dK, dF) = primals, tangents
        u, key = factorise(K, F)
        du = jax.lax.custom_linear_solve(
            lambda v: product(K, ends, jnp.append(v, 0.0))[:-1],
            dF - product(dK, ends, jnp.append(u, 0.0))[:-1],
            lambda _, b: back(key, b),
            symmetric=True,
        )
        return u, du

    return u(K, F)


def solve_rule(K, F, band, factors):
    """The same solve with its adjoint written out, where JAX transposes no jvp."""
    i, j = band.ends.T
    factorise, back = on_host(band, factors)

    @jax.custom_vjp
    def u(K, F):
        return factorise(K, F)[0]

    def forward(K, F):
        u, key = factorise(K, F)
        return u, (u, key)

    def backward(kept, ub):
        u, key = kept
        lam = back(key, ub)
        u0, lam0 = jnp.append(u, 0.0), jnp.append(lam, 0.0)
        return (lam0[i] - lam0[j]) * (u0[i] - u0[j]), lam

    u.defvjp(forward, backward)
    return u(K, F)


def load(x, tri, slot, n):
    """F over the n inner nodes; what falls on the boundary goes past the last."""
    area = geometry(x, tri)[1]
    return jnp.zeros(n + 1, x.dtype).at[slot[tri.T]].add(area / 3)[:-1]


def fem_solve(theta, data, size, work, solve=solve):
    ends, edge, band, factors = work
    x, tri, slot = data["x"].T, data["tri"], jnp.asarray(band.slot)
    K = stiffness(theta["theta"], x, tri, ends, edge, size.q)
    u = solve(K, load(x, tri, slot, len(data["inner"])), band, factors)
    r = jnp.append(u, 0.0)[slot] - data["u_star"]
    return jnp.vdot(r, r) / (2 * len(r))


def fem_solve_rule(theta, data, size, work):
    return fem_solve(theta, data, size, work, solve_rule)


def fem_matvec_loops(theta, data, size):
    """Triangle by triangle into r, a loop of fixed length (reverse mode needs one)."""
    x, tri, w, q = data["x"], data["tri"], data["w"], size.q
    n = jnp.arange(q, dtype=x.dtype)
    c = theta["theta"].reshape(q, q) / (1 + n[:, None] ** 2 + n**2)
    before, after = np.array([1, 2, 0]), np.array([2, 0, 1])

    def triangle(t, r):
        p = x[tri[t]]
        e, mid = p[after] - p[before], (p[after] + p[before]) / 2
        X, Y = jnp.cos(jnp.pi * mid[:, 0, None] * n), jnp.cos(jnp.pi * mid[:, 1, None] * n)
        kbar = jnp.mean(jnp.exp(jnp.sum((X @ c) * Y, 1)))
        area = (e[0, 0] * e[1, 1] - e[0, 1] * e[1, 0]) / 2
        return r.at[tri[t]].add(kbar / (4 * area) * (e @ (w[tri[t]] @ e)))

    r = jax.lax.fori_loop(0, len(tri), triangle, -data["b"])
    return jnp.vdot(r, r) / 2


def fem_matvec_bcoo(theta, data, size, work):
    """K as JAX's sparse type: each edge is four of its entries, which need not be summed before the product."""
    ends, edge, places = work
    n = len(data["w"])
    K = stiffness(theta["theta"], data["x"].T, data["tri"], ends, edge, size.q)
    r = BCOO((jnp.concatenate([K, K, -K, -K]), places), shape=(n, n)) @ data["w"] - data["b"]
    return jnp.vdot(r, r) / 2


def hopping(x, bonds, image, size):
    """t of every bond."""
    i, j = bonds.T
    dx, dy = (x[j] - x[i] + image * box(size, image.dtype)).T
    return T0 * jnp.exp(-BETA * (jnp.sqrt(dx * dx + dy * dy) / A - 1))


def row_by_row(H, near, x):
    """H x."""
    return sum(H[s] * x[near[s]] for s in range(3))


def tight_binding(theta, data, size, work):
    near, number = work
    H = hopping(theta["positions"], data["bonds"], data["image"], size)[number]
    y = row_by_row(H, near, data["x"])
    return jnp.vdot(y, y) / 2


def kpm(theta, data, size, work):
    (near, number), v = work, data["v"]
    H = hopping(theta["positions"], data["bonds"], data["image"], size)[number] / HALF_WIDTH

    def step(pair, _):
        before, now = pair
        return (now, 2 * row_by_row(H, near, now) - before), jnp.vdot(v, now)

    _, mu = jax.lax.scan(step, (v, row_by_row(H, near, v)), None, length=size.K - 1)
    return (jnp.vdot(v, v) ** 2 + jnp.vdot(mu, mu)) / 2


def matvec_prepare(structure, size):
    ends, edge = edges(structure["tri"])
    return ends.T.astype(np.int32), edge.T.astype(np.int32)


def bcoo_prepare(structure, size):
    ends, edge = matvec_prepare(structure, size)
    i, j = ends
    return ends, edge, np.concatenate([np.stack(place, 1) for place in ((i, j), (j, i), (i, i), (j, j))])


def solve_prepare(structure, size):
    ends, edge = matvec_prepare(structure, size)
    return ends, edge, band(ends.T, structure["inner"], *structure["u_star"].shape), {}


def lattice_prepare(structure, size):
    near, number, *_ = slots(structure["bonds"])
    return near.T.astype(np.int32), number.T.astype(np.int32)


IMPLEMENTATION = {
    "fem_matvec": {
        "array": Implementation(fem_matvec, matvec_prepare),
        "bcoo": Implementation(fem_matvec_bcoo, bcoo_prepare),
        "loops": Implementation(fem_matvec_loops),
    },
    "fem_solve": {"array": Implementation(fem_solve, solve_prepare, strategies={"custom_rule": fem_solve_rule})},
    "tight_binding": {"array": Implementation(tight_binding, lattice_prepare)},
    "kpm": {"array": Implementation(kpm, lattice_prepare)},
}
