"""The Brusselator in PyTorch: whole arrays on the eager tape."""

from functools import partial
from math import ceil, isfinite, nan

import torch

from backends.torch_backend import checkpointed, compiled
from problems import Implementation
from problems.brusselator import (
    A_UDE,
    B_UDE,
    FIRST,
    FORCING,
    MOST_CG,
    MOST_NEWTON,
    MOST_STEPS,
    SHORTEST,
    SMOOTH,
    T_FORCING,
    ark_tolerances,
    clock,
    diverged,
    eigenvalues,
    endless,
    fourier,
    kencarp4,
    lap_matrix,
    pieces,
    stiff,
    unsolved,
)


def lap(u, N):
    """The periodic five-point Laplacian of the last two axes."""
    return (u.roll(1, -2) + u.roll(-1, -2) + u.roll(1, -1) + u.roll(-1, -1) - 4 * u) * (N - 1) ** 2


def reaction(u, A, B, force):
    """All that is not diffusion."""
    U, V = u
    U2V = U * U * V
    return torch.stack([B + U2V - (A + 1) * U + force, A * U - U2V])


def rhs(theta, data, size):
    u, A, B, alpha = theta["u"], theta["A"], theta["B"], theta["alpha"]
    force = FORCING * data["disc"] if size.t >= T_FORCING else 0.0
    du = reaction(u, A, B, force) + alpha * lap(u, size.N)
    return torch.sum(data["v"] * du)


def rhs_inplace(theta, data, size):
    u, A, B, alpha = theta["u"], theta["A"], theta["B"], theta["alpha"]
    du = -4 * u
    du[:, 1:] += u[:, :-1]
    du[:, 0] += u[:, -1]
    du[:, :-1] += u[:, 1:]
    du[:, -1] += u[:, 0]
    du[:, :, 1:] += u[:, :, :-1]
    du[:, :, 0] += u[:, :, -1]
    du[:, :, :-1] += u[:, :, 1:]
    du[:, :, -1] += u[:, :, 0]
    du *= alpha * (size.N - 1) ** 2
    U, V = u
    U2V = U * U * V
    du[0] += B + U2V - (A + 1) * U
    du[1] += A * U - U2V
    if size.t >= T_FORCING:
        du[0] += FORCING * data["disc"]
    du *= data["v"]
    return du.sum()


def solver(alpha, size, like):
    """S in the Fourier basis, (N, N)."""
    lam = torch.as_tensor(eigenvalues(size.N), dtype=like.dtype, device=like.device)
    return 1 / (1 - size.dt * alpha * (lam[:, None] + lam))


def misfit(u):
    return torch.sum((1 - u) ** 2) / 2


def explicit(U, V, A, B, dt, push):
    flow = A * U - U * U * V
    source = B - U - flow
    if push is not None:
        source = source + push
    return U + dt * source, V + dt * flow


def diffuse(U, V, g):
    """Two real fields, one complex FFT: S is real, so S (U + i V) = S U + i S V; 1.2 times faster than rfft2, and than Q."""
    w = torch.fft.ifft2(g * torch.fft.fft2(torch.complex(U, V)))
    return w.real, w.imag


class Diffuse(torch.autograd.Function):
    """The same with a rule of its own: S is symmetric, so it is its own adjoint; all that is stored of a step are its waves."""

    @staticmethod
    def forward(U, V, g):
        waves = torch.fft.fft2(torch.complex(U, V))
        w = torch.fft.ifft2(g * waves)
        return w.real, w.imag, waves

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(inputs[2], output[2] if ctx.needs_input_grad[2] else None)

    @staticmethod
    def backward(ctx, Ub, Vb, _):
        g, waves = ctx.saved_tensors
        y = torch.fft.fft2(torch.complex(Ub, Vb))
        r = torch.fft.ifft2(g * y)
        return r.real, r.imag, None if waves is None else (y.real * waves.real + y.imag * waves.imag) / g.numel()


def diffuse_rule(U, V, g):
    return Diffuse.apply(U, V, g)[:2]


def imex(theta, data, size, keep=lambda interval: interval, explicit=explicit, diffuse=diffuse):
    u, A, B, alpha, dt = theta["u0"], theta["A"], theta["B"], theta["alpha"], size.dt
    saves, every, first = clock(size)
    g = solver(alpha, size, u)
    push = FORCING * data["disc"]

    @keep
    def interval(U, V, steps):
        for n in steps:
            U, V = diffuse(*explicit(U, V, A, B, dt, push if n >= first else None), g)
        return U, V, misfit(U) + misfit(V)

    loss = misfit(u)
    U, V = u
    for n in range(0, saves * every, every):
        U, V, part = interval(U, V, range(n, n + every))
        loss = loss + part
    return loss


def imex_checkpoint(theta, data, size):
    """One state a sample is stored, as in JAX: next to every step's, 0.7 times the time and half the memory."""
    return imex(theta, data, size, checkpointed)


def imex_compile(theta, data, size):
    """The FFTs stay outside: inductor has no complex numbers, and a step compiled with them takes 1.7 times as long as eager."""
    return imex(theta, data, size, explicit=compiled(explicit))


def imex_rule(theta, data, size):
    """A Function in Python costs more than it saves, 1.1 to 1.3 times the time (N = 64 to 8)."""
    return imex(theta, data, size, diffuse=diffuse_rule)


def explicit_inplace(u, A, B, dt, push):
    U, V = u
    flow = dt * (A * U - U * U * V)
    r = u.clone()
    r[0] *= 1 - dt
    r[0] += dt * B
    r[0] -= flow
    r[1] += flow
    if push is not None:
        r[0] += push
    return r


def diffuse_inplace(r, g):
    waves = torch.fft.rfft2(r)
    waves *= g
    return torch.fft.irfft2(waves, r.shape[-2:])


def imex_inplace(theta, data, size, keep=lambda interval: interval, explicit=explicit_inplace):
    A, B, alpha, dt = theta["A"], theta["B"], theta["alpha"], size.dt
    saves, every, first = clock(size)
    u = theta["u0"].clone()
    g = solver(alpha, size, u)[:, : size.N // 2 + 1]
    push = dt * FORCING * data["disc"]

    @keep
    def interval(u, steps):
        for n in steps:
            u = diffuse_inplace(explicit(u, A, B, dt, push if n >= first else None), g)
        return u, misfit(u)

    loss = misfit(u)
    for n in range(0, saves * every, every):
        u, part = interval(u, range(n, n + every))
        loss += part
    return loss


def imex_inplace_checkpoint(theta, data, size):
    return imex_inplace(theta, data, size, checkpointed)


def imex_inplace_compile(theta, data, size):
    return imex_inplace(theta, data, size, explicit=compiled(explicit_inplace))


def network(U, V, W1, b1, W2, b2):
    """What stands for U^2 V."""
    z = torch.tanh(torch.addmm(b1[:, None], W1, torch.cat([U, V]).view(2, -1)))
    return (W2 @ z + b2).view_as(U)


def explicit_given(U, V, net, dt, push):
    """As `explicit`, with the network."""
    flow = A_UDE * U - network(U, V, **net)
    return U + dt * (B_UDE - U - flow + push), V + dt * flow


def ude(theta, data, size, keep=lambda interval: interval, explicit=explicit_given, diffuse=diffuse):
    u, target, dt = data["u0"], data["target"], size.dt
    saves, every, first = clock(size)
    g = solver(size.alpha, size, u)
    push = FORCING * data["disc"]
    zero = torch.zeros_like(push)

    @keep
    def interval(U, V, steps):
        for n in steps:
            U, V = diffuse(*explicit(U, V, theta, dt, push if n >= first else zero), g)
        return U, V

    loss = torch.sum((u - target[0]) ** 2)
    U, V = u
    for n in range(0, saves * every, every):
        U, V = interval(U, V, range(n, n + every))
        x, y = target[n // every + 1]
        loss = loss + torch.sum((U - x) ** 2) + torch.sum((V - y) ** 2)
    return loss / target.numel()


def ude_checkpoint(theta, data, size):
    return ude(theta, data, size, checkpointed)


def ude_compile(theta, data, size):
    return ude(theta, data, size, explicit=compiled(explicit_given))


def ude_rule(theta, data, size):
    return ude(theta, data, size, diffuse=diffuse_rule)


def residual(w, u, A, B, alpha, push, dt):
    return w - u - dt * (reaction(w, A, B, push) + alpha * lap(w, w.shape[-1]))


def jacobian(w, A, alpha, dt, L):
    U, V = w.reshape(2, -1)
    gain, U2 = 2 * U * V - A, U * U
    one, blocks = torch.ones_like(gain), ((gain - 1, U2), (-gain, -U2))
    R = torch.cat([torch.cat([torch.diag(block) for block in row], 1) for row in blocks])
    return torch.diag(torch.cat([one, one])) - dt * (alpha * L + R)


def solve(J, F):
    return torch.linalg.solve(J, F.ravel()).view_as(F)


def newton(F, J, w, more=1):
    """Until it stands, and once more, in which the derivative of the iteration converges."""
    tolerance, stood = torch.finfo(w.dtype).eps ** 0.5, 0
    for _ in range(MOST_NEWTON):
        dw = solve(J(w), F(w))
        w = w - dw
        stood += bool(dw.detach().abs().max() <= tolerance)
        if stood > more:
            return w
    raise diverged()


def root(F, J, w):
    """The implicit function theorem: at the root, held fixed, one Newton step with a fixed J has the root's derivative."""
    with torch.no_grad():
        w = newton(F, J, w, more=0)
        J = J(w)
    return w - solve(J, F(w))


def implicit(theta, data, size, L, newton=newton, residual=residual, jacobian=jacobian):
    u, A, B, alpha, dt = theta["u0"], theta["A"], theta["B"], theta["alpha"], size.dt
    saves, every, first = clock(size)
    L = L.to(u.device)
    push = FORCING * data["disc"]
    zero, loss = torch.zeros_like(push), misfit(u)
    for n in range(1, saves * every + 1):
        old, force = u, push if n >= first else zero
        u = newton(lambda w: residual(w, old, A, B, alpha, force, dt), lambda w: jacobian(w, A, alpha, dt, L), u)
        if n % every == 0:
            loss = loss + misfit(u)
    return loss


def implicit_root(theta, data, size, L):
    return implicit(theta, data, size, L, root)


def implicit_compile(theta, data, size, L):
    """What is not LAPACK's, compiled."""
    return implicit(theta, data, size, L, residual=compiled(residual), jacobian=compiled(jacobian))


def implicit_prepare(structure, size):
    return torch.as_tensor(lap_matrix(size.N).toarray().astype(structure["u0"].dtype))


DIRECT = 12  # up to this N the modes take less time than the iterations


def symmetric(c, fixed, mu):
    """What scales 1 - c alpha lap to S = 1 - g A g, A the sum of the four neighbours, and its mean M in waves."""
    square = 1 / (4 + 1 / (c * fixed))
    g = torch.sqrt(square)
    return g, (1 - 4 * square) / g, 1 - square.mean((1, 2), keepdim=True) * (mu[:, None] + mu)


def by_waves(Q, M, r):
    """M^-1 r: M is the same for both axes, so that the transpose is as good between two products."""
    waves = ((r @ Q).mT @ Q) / M
    return (waves @ Q.T).mT @ Q.T


def dot(x, y):
    return torch.dot(x.reshape(-1), y.reshape(-1)).item()


def cg(tolerance, g, M, Q, b):
    """S^-1 b, until the energy of the error, res M^-1 res, is tolerance^2 of that of the solution. Numbers are Python's, so
    that each line of a field is one operation."""
    y, res = torch.zeros_like(b), b
    p = z = by_waves(Q, M, res)
    rz = dot(b, z)
    for _ in range(MOST_CG):
        if rz == 0:
            return y + z
        x = g * p
        Sp = p - g * (x.roll(1, 1) + x.roll(-1, 1) + x.roll(1, 2) + x.roll(-1, 2))
        step = rz / dot(p, Sp)
        y, res = torch.add(y, p, alpha=step), torch.sub(res, Sp, alpha=step)
        z = by_waves(Q, M, res)
        rz, previous = dot(res, z), rz
        if rz <= tolerance**2 * dot(y, b):
            return y + z
        if not isfinite(rz):
            return nan * b  # a step that is too long
        p = torch.add(z, p, alpha=rz / previous)
    raise unsolved()


def modes(g):
    """V (2, N^2, N^2) and K (2, N^2, 1) of each field, g lap g = V K V^T, dx = 1, by which each solve is two products."""
    one = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
    ring, g = one.roll(1, 0) + one.roll(-1, 0) - 2 * one, g.reshape(2, -1)
    K, V = torch.linalg.eigh(g[:, :, None] * (torch.kron(ring, one) + torch.kron(one, ring)) * g[:, None])
    return V, K[:, :, None]


def by_modes(_, V, over, b):
    """S^-1 b"""
    return (V @ (over * (V.mT @ b.reshape(2, -1, 1)))).reshape(b.shape)


class Solve(torch.autograd.Function):
    """(1 - c alpha lap)^-1 r = g S^-1 e r. The way back solves the same symmetric system: nothing of the solution is kept."""

    @staticmethod
    def forward(r, alpha, c, inverse, g, e, *S):
        return g * inverse(g, *S, e * r)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, ctx.c, ctx.inverse, *scales = inputs
        ctx.save_for_backward(output, *scales)

    @staticmethod
    def backward(ctx, wb):
        w, g, e, *S = ctx.saved_tensors
        rb = e * ctx.inverse(g, *S, g * wb)
        return rb, ctx.c * rb * lap(w, w.shape[-1]), *[None] * (4 + len(S))


def combined(u, slopes, weights):
    """u + the sum of slopes, each with its weight."""
    for k, weight in zip(slopes, weights, strict=False):
        if weight:
            u = torch.add(u, k, alpha=weight)
    return u


def ode(theta, data, size, reaction=reaction, keep=lambda attempt: attempt):
    """KenCarp4; how long a step is, and whether it is taken, is not differentiated."""
    A, B, u, disc, N = theta["A"], theta["B"], data["u0"], data["disc"], size.N
    alpha = torch.stack([theta["alpha1"], theta["alpha2"]])
    fixed = alpha.detach() * (N - 1) ** 2
    rtol, atol, tolerance = ark_tolerances(size, str(u.dtype).removeprefix("torch."))
    E, I, b, error = (x.tolist() for x in kencarp4())  # noqa: E741
    Q, mu = (
        torch.as_tensor(x, dtype=u.dtype, device=u.device) for x in (fourier(N), 2 + eigenvalues(N) / (N - 1) ** 2)
    )
    smooth = symmetric(SMOOTH, fixed, mu)[2]

    def iterated(c):
        return partial(cg, tolerance), *symmetric(c, fixed, mu), Q

    def direct(g, V, K):
        return lambda c: (by_modes, g, 1 / g, V, 1 / (1 - c * K))

    root = fixed.sqrt()
    solver = direct(root, *modes(root)) if N <= DIRECT else iterated

    @keep
    def attempt(u, dt, force):
        """The state after a step, and its error over what is tolerated."""
        c = I[1][1] * dt
        S = solver(c)
        k_E, k_I = [reaction(u, A, B, force)], [alpha * lap(u, N)]
        for i in range(1, 6):
            r = combined(combined(u, k_E, [dt * x for x in E[i]]), k_I, [dt * x for x in I[i]])
            w = Solve.apply(r, alpha, c, *S)
            k_E.append(reaction(w, A, B, force))
            k_I.append((w - r) / c)
        new = combined(combined(u, k_E, [dt * x for x in b]), k_I, [dt * x for x in b])
        with torch.no_grad():
            off = combined(torch.zeros_like(u), k_E + k_I, [dt * x for x in error + error])
            off = smooth[:, :1, :1] * by_waves(Q, smooth, off)
            return new, torch.sqrt(torch.mean((off / (atol + rtol * torch.maximum(u.abs(), new.abs()))) ** 2)).item()

    loss, steps, h, before = misfit(u), 0, 0.0, None
    for length, forced, sampled in zip(*pieces(size), strict=True):
        left, force = float(length), FORCING * float(forced) * disc
        if forced != before:
            h, before = FIRST, forced
        while left > 0:
            equal = ceil(left / h - 1e-3)  # the steps that are left, were they equal
            dt = left / equal
            if dt < SHORTEST:
                raise stiff()
            if steps == MOST_STEPS:
                raise endless()
            new, off = attempt(u, dt, force)
            h = dt * min(5, 0.9 * max(off, 1e-4) ** -0.25) if off < 1e4 else 0.1 * dt
            if off <= 1:
                u, left, steps = new, left - dt if equal > 1 else 0.0, steps + 1
        if sampled:
            loss = loss + misfit(u)
    return loss


def ode_checkpoint(theta, data, size):
    """The state of every step is kept."""
    return ode(theta, data, size, keep=checkpointed)


def ode_compile(theta, data, size):
    return ode(theta, data, size, compiled(reaction))


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs), "inplace": Implementation(rhs_inplace)},
    "imex": {
        "array": Implementation(
            imex, strategies={"checkpoint": imex_checkpoint, "compile": imex_compile, "custom_rule": imex_rule}
        ),
        "inplace": Implementation(
            imex_inplace, strategies={"checkpoint": imex_inplace_checkpoint, "compile": imex_inplace_compile}
        ),
    },
    "ude": {
        "array": Implementation(
            ude, strategies={"checkpoint": ude_checkpoint, "compile": ude_compile, "custom_rule": ude_rule}
        ),
    },
    "implicit": {
        "array": Implementation(
            implicit, implicit_prepare, strategies={"implicit": implicit_root, "compile": implicit_compile}
        ),
    },
    "ode": {
        "array": Implementation(
            ode,
            strategies={"checkpoint": ode_checkpoint, "compile": ode_compile},
            unsupported={
                "forward": "Tangents come in batches by vmap, which has no iteration whose length the data decide "
                "(`You tried to vmap over Solve, but it does not have vmap support`)."
            },
        )
    },
}
