"""The sparse losses in PyTorch: whole arrays on the eager tape, K as one weight an edge (problems.sparse_loss.edges).

Gathers and scatters are index_select and index_add: each is the adjoint of the other, while x[i] goes back through the
slower index_put. PyTorch has no sparse solve on the CPU, so LAPACK's banded Cholesky, as in Numba and JAX, sits in an
autograd.Function: a rule over the solve alone, which keeps the factor for the adjoint. So `reverse` is `custom_rule` here.
"""

from functools import cache

import torch

from backends.torch_backend import compiled
from problems import Implementation
from problems.sparse_loss import BETA, HALF_WIDTH, T0, A, band, box, cholesky, edges, slots, substitute


def coefficients(theta, q):
    i = torch.arange(q, dtype=theta.dtype, device=theta.device)
    return theta.reshape(q, q) / (1 + i[:, None] ** 2 + i**2)


def midpoints(x, ends):
    return (x.index_select(1, ends[0]) + x.index_select(1, ends[1])) / 2


def chebyshev(c, q):
    """cos(i pi x), i = 0..q-1, from c = cos(pi x): (2, q, points) of (2, points)."""
    T = [torch.ones_like(c), c]
    for _ in range(2, q):
        T.append(2 * c * T[-1] - T[-2])
    return torch.stack(T[:q], 1)


def conductivity(theta, mid, q):
    """k at the points mid (2, points)."""
    X, Y = chebyshev(torch.cos(torch.pi * mid), q)
    return torch.exp(torch.sum((coefficients(theta, q).T @ X) * Y, 0))


def geometry(x, tri):
    """The weights of each triangle's three edges at k = 1 (3, triangles), the areas; x is (2, n)."""
    p0, p1, p2 = (x.index_select(1, nodes) for nodes in tri)
    e0, e1, e2 = p2 - p1, p0 - p2, p1 - p0
    area = (e0[0] * e1[1] - e0[1] * e1[0]) / 2
    return torch.stack([(e1 * e2).sum(0), (e2 * e0).sum(0), (e0 * e1).sum(0)]) / (4 * area), area


def stiffness(theta, x, tri, ends, edge, q):
    """K_ij of every edge."""
    k = conductivity(theta, midpoints(x, ends), q)
    kbar = k.index_select(0, edge.ravel()).reshape(3, -1).mean(0)
    return torch.zeros_like(k).index_add(0, edge.ravel(), (kbar * geometry(x, tri)[0]).ravel())


def product(K, ends, w):
    """K w; its rows sum to zero."""
    i, j = ends
    flux = K * (w.index_select(0, j) - w.index_select(0, i))
    return torch.zeros_like(w).index_add(0, i, flux).index_add(0, j, -flux)


def fem_matvec(theta, data, size, work):
    ends, edge = work(data["x"].device)
    K = stiffness(theta["theta"], data["x"].T, data["tri"].T, ends, edge, size.q)
    r = product(K, ends, data["w"]) - data["b"]
    return torch.dot(r, r) / 2


class Substitute(torch.autograd.Function):
    """K^-1 b from the factor of K, of a batch of b at once; it has a rule for vmap and needs none for derivatives."""

    @staticmethod
    def forward(U, b):
        u = torch.zeros_like(b)
        u[..., :-1] = torch.from_numpy(substitute(U.numpy(), b[..., :-1].cpu().numpy().T).T)
        return u

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, U, b):
        return Substitute.apply(U, b.movedim(in_dims[1], 0)), 0


class Solve(torch.autograd.Function):
    """u from K u = F over the inner nodes, K given by its edges, and the factor; the last slot is the boundary's, u = 0."""

    @staticmethod
    def forward(K, F, ends, band):
        U = torch.from_numpy(cholesky(K.cpu().numpy(), band))
        return Substitute.forward(U, F), U

    @staticmethod
    def setup_context(ctx, inputs, output):
        u, U = output
        ctx.mark_non_differentiable(U)
        ctx.save_for_backward(u, U, inputs[2])
        ctx.save_for_forward(u, U, inputs[2])

    @staticmethod
    def backward(ctx, ub, _):
        u, U, (i, j) = ctx.saved_tensors
        lam = Substitute.apply(U, ub)
        Kb = (lam.index_select(0, i) - lam.index_select(0, j)) * (u.index_select(0, i) - u.index_select(0, j))
        return Kb, lam, None, None

    @staticmethod
    def jvp(ctx, dK, dF, *_):
        u, U, ends = ctx.saved_tensors
        b = -product(dK, ends, u)
        return Substitute.apply(U, b if dF is None else b + dF), None

    @staticmethod
    def vmap(*_):
        raise NotImplementedError("one K at a time; PyTorch asks for this where its tangents alone are a batch")


def load(x, tri, slot, n):
    """F in n slots, the last one for what falls on the boundary."""
    area = geometry(x, tri)[1]
    return x.new_zeros(n).index_add(0, slot[tri].ravel(), (area / 3).repeat(3))


def fem_solve(theta, data, size, work):
    maps, band = work
    ends, edge, slot, slots = maps(data["x"].device)
    x, tri = data["x"].T, data["tri"].T
    K = stiffness(theta["theta"], x, tri, ends, edge, size.q)
    u, _ = Solve.apply(K, load(x, tri, slot, len(data["inner"]) + 1), slots, band)
    r = u.index_select(0, slot) - data["u_star"]
    return torch.dot(r, r) / (2 * len(r))


def hopping(x, bonds, image, size):
    """t of every bond."""
    d = x.index_select(0, bonds[:, 1]) - x.index_select(0, bonds[:, 0]) + image * image.new_tensor(box(size))
    return T0 * torch.exp(-BETA * (torch.sqrt(torch.sum(d * d, 1)) / A - 1))


def row_by_row(H, near, x):
    """H x."""
    return torch.sum(H * x.index_select(0, near).reshape(H.shape), 0)


def tight_binding(theta, data, size, work):
    near, number = work(data["x"].device)
    t = hopping(theta["positions"], data["bonds"], data["image"], size)
    y = row_by_row(t.index_select(0, number).reshape(3, -1), near, data["x"])
    return torch.dot(y, y) / 2


def chebyshev_step(H, near, now, before):
    return 2 * row_by_row(H, near, now) - before


def kpm(theta, data, size, work, step=chebyshev_step):
    near, number = work(data["v"].device)
    t, v = hopping(theta["positions"], data["bonds"], data["image"], size) / HALF_WIDTH, data["v"]
    H = t.index_select(0, number).reshape(3, -1)
    T = [v, row_by_row(H, near, v)]
    for _ in range(2, size.K):
        T.append(step(H, near, T[-1], T[-2]))
    mu = torch.stack(T) @ v
    return torch.dot(mu, mu) / 2


def kpm_compile(theta, data, size, work):
    return kpm(theta, data, size, work, compiled(chebyshev_step))


# inplace: buffers mutated


def stiffness_inplace(theta, x, tri, ends, edge, q):
    c, mid = coefficients(theta, q), midpoints(x, ends).mul_(torch.pi)
    T = x.new_ones(q, 2, len(ends[0]))
    for i in range(1, q):
        torch.cos(i * mid, out=T[i])
    k = x.new_zeros(len(ends[0]))
    for i in range(q):
        k.addcmul_(T[i, 0], c[i] @ T[:, 1])
    k.exp_()
    weights, _ = geometry(x, tri)
    weights = weights * (
        k.index_select(0, edge[0]).add_(k.index_select(0, edge[1])).add_(k.index_select(0, edge[2])) / 3
    )
    K = torch.zeros_like(k)
    for s in range(3):
        K.index_add_(0, edge[s], weights[s])
    return K


def fem_matvec_inplace(theta, data, size, work):
    ends, edge = work(data["x"].device)
    K = stiffness_inplace(theta["theta"], data["x"].T, data["tri"].T, ends, edge, size.q)
    i, j = ends
    w, r = data["w"], -data["b"]
    K *= w.index_select(0, j).sub_(w.index_select(0, i))
    r.index_add_(0, i, K)
    r.index_add_(0, j, K, alpha=-1)
    return torch.dot(r, r) / 2


def fem_solve_inplace(theta, data, size, work):
    maps, band = work
    ends, edge, slot, slots = maps(data["x"].device)
    x, tri = data["x"].T, data["tri"].T
    K = stiffness_inplace(theta["theta"], x, tri, ends, edge, size.q)
    u, _ = Solve.apply(K, load(x, tri, slot, len(data["inner"]) + 1), slots, band)
    r = u.index_select(0, slot)
    r -= data["u_star"]
    return torch.dot(r, r) / (2 * len(r))


def on_device(*arrays):
    """Index arrays as tensors, moved to a device at the first call there."""
    return cache(lambda device: tuple(torch.as_tensor(a.copy(), device=device) for a in arrays))


def matvec_prepare(structure, size):
    ends, edge = edges(structure["tri"])
    return on_device(ends.T, edge.T)


def solve_prepare(structure, size):
    ends, edge = edges(structure["tri"])
    b = band(ends, structure["inner"], *structure["u_star"].shape)
    return on_device(ends.T, edge.T, b.slot, b.ends.T), b


def lattice_prepare(structure, size):
    near, number, *_ = slots(structure["bonds"])
    return on_device(near.T.ravel(), number.T.ravel())


IMPLEMENTATION = {
    "fem_matvec": {
        "array": Implementation(fem_matvec, matvec_prepare),
        "inplace": Implementation(fem_matvec_inplace, matvec_prepare),
    },
    "fem_solve": {
        "array": Implementation(fem_solve, solve_prepare, strategies={"custom_rule": fem_solve}),
        "inplace": Implementation(fem_solve_inplace, solve_prepare, strategies={"custom_rule": fem_solve_inplace}),
    },
    "tight_binding": {"array": Implementation(tight_binding, lattice_prepare)},
    "kpm": {"array": Implementation(kpm, lattice_prepare, strategies={"compile": kpm_compile})},
}
