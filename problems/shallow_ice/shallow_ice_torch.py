"""The valley glacier in PyTorch: whole arrays on the eager tape; the temperatures are a leading axis.

PyTorch has no sparse solve on the CPU, so the semi-implicit step's, LAPACK's banded Cholesky, sits in an autograd.Function:
a rule over the solve alone, which keeps the factor for the adjoint.

The loop of pseudo_transient is Python's, and the tape as long as it ran.
"""

from functools import partial

import torch
from torch.nn.functional import pad, softplus

from backends.torch_backend import checkpointed, compiled
from problems import Diverged, Implementation
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
    diverged,
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


def cap(e, lo, hi):
    return torch.where(e < lo, lo, torch.where(e > hi, hi, e))  # torch.clamp halves the derivative at a tie


def diffusivity(Hc, dSx, dSy, A, rho_g=RHO_G):
    """D on corners, (N-1, N-1)."""
    gx, gy, Hb = avg_y(dSx), avg_x(dSy), avg_x(avg_y(Hc))
    Hb2 = Hb * Hb  # Hb**5 costs 1.2 times the whole
    return (0.4 * rho_g**3) * A * (Hb2 * Hb2 * Hb) * (gx * gx + gy * gy + EPS)


def sia(H, B, A, dx):
    """H_t of the shallow ice approximation, (..., N, N); A is a number or (..., 1, 1)."""
    Hc = torch.where(H > 0, H, 0.0)
    S = B + Hc
    dSx, dSy = S.diff(dim=-2) / dx, S.diff(dim=-1) / dx  # (N-1, N), (N, N-1): edges
    D = diffusivity(Hc, dSx, dSy, A)
    cx, cy = Hc[..., 1:-1] / dx, Hc[..., 1:-1, :] / dx
    ex = cap(dSx[..., 1:-1], -cx[..., :-1, :], cx[..., 1:, :])  # (N-1, N-2)
    ey = cap(dSy[..., 1:-1, :], -cy[..., :-1], cy[..., 1:])  # (N-2, N-1)
    Fx, Fy = -avg_y(D) * ex, -avg_x(D) * ey
    return pad(-(Fx.diff(dim=-2) + Fy.diff(dim=-1)) / dx, (1, 1, 1, 1))  # nothing moves on the boundary


def sia_inplace(H, B, A, dx):
    """The same in buffers, as far as the tape allows: what a product or a cap needs again must stay."""
    Hc = torch.where(H > 0, H, 0.0)
    S = B + Hc
    dSx, dSy = S[..., 1:, :] - S[..., :-1, :], S[..., 1:] - S[..., :-1]
    gx, gy = dSx[..., 1:] + dSx[..., :-1], dSy[..., 1:, :] + dSy[..., :-1, :]
    Hb = Hc[..., 1:, 1:] + Hc[..., 1:, :-1]
    Hb += Hc[..., :-1, 1:]
    Hb += Hc[..., :-1, :-1]
    Hb *= 0.25
    D = gx * gx
    D += gy * gy
    D *= 0.25 / dx**2
    D += EPS
    Hb2 = Hb * Hb
    D *= Hb2 * Hb2 * Hb
    D *= (0.2 * RHO_G**3 / dx**2) * A  # and what the averages and the fluxes are divided by
    Fx = D[..., 1:] + D[..., :-1]
    Fy = D[..., 1:, :] + D[..., :-1, :]
    Fx *= cap(dSx[..., 1:-1], -Hc[..., :-1, 1:-1], Hc[..., 1:, 1:-1])
    Fy *= cap(dSy[..., 1:-1, :], -Hc[..., 1:-1, :-1], Hc[..., 1:-1, 1:])
    dH = torch.zeros_like(S)
    inside = dH[..., 1:-1, 1:-1]
    inside += Fx[..., 1:, :]
    inside -= Fx[..., :-1, :]
    inside += Fy[..., 1:]
    inside -= Fy[..., :-1]
    return dH


def rhs(theta, data, size, sia=sia):
    A = size.A * torch.exp(theta["lnA"])
    return torch.sum(data["v"] * sia(theta["H"], data["B"], A, BOX / size.N))


def rhs_inplace(theta, data, size):
    return rhs(theta, data, size, sia_inplace)


def fluidity(theta, T):
    """A of every temperature."""
    z = ((T + 25) / 26)[None]  # (1, temperatures)
    z = softplus(theta["W1"] @ z + theta["b1"][:, None])
    z = softplus(theta["W2"] @ z + theta["b2"][:, None])
    z = softplus(theta["W3"] @ z + theta["b3"][:, None])
    z = theta["W4"] @ z + theta["b4"][:, None]
    return A_MIN + (A_MAX - A_MIN) * torch.sigmoid(z[0])


def step(H, B, A, dx, dt, sia=sia):
    """SSPRK3."""
    H1 = H + dt * sia(H, B, A, dx)
    H2 = 0.75 * H + 0.25 * (H1 + dt * sia(H1, B, A, dx))
    return (H + 2 * (H2 + dt * sia(H2, B, A, dx))) / 3


def step_inplace(H, B, A, dx, dt, sia=sia_inplace):
    """SSPRK3 in place."""
    H1 = sia(H, B, A, dx)
    H1 *= dt
    H1 += H
    H2 = sia(H1, B, A, dx)
    H2 *= dt
    H2 += H1
    H2 *= 0.25
    H2 += 0.75 * H
    H3 = sia(H2, B, A, dx)
    H3 *= dt
    H3 += H2
    H3 *= 2 / 3
    H3 += H / 3
    return H3


def ude(theta, data, size, step=step):
    B, H0, Href = data["B"], data["H0"], data["Href"]
    A = fluidity(theta, data["T"])[:, None, None]
    H = H0.expand(Href.shape[1:])  # (temperatures, N, N)
    spy, loss = steps_a_year(size), 0.0
    for year in range(size.years):
        for _ in range(spy):
            H = step(H, B, A, BOX / size.N, 1 / spy)
        loss = loss + torch.sum((H - Href[year]) ** 2)
    return loss / Href.numel()


def ude_inplace(theta, data, size):
    return ude(theta, data, size, step_inplace)


def ude_checkpoint(theta, data, size):
    """A state a step; a state a year takes 1.3 times the memory at N = 32, and as long."""
    return ude(theta, data, size, checkpointed(step))


def ude_inplace_checkpoint(theta, data, size):
    return ude(theta, data, size, checkpointed(step_inplace))


def ude_compile(theta, data, size):
    """Its right-hand side is compiled: a whole step takes over a minute to compile."""
    return ude(theta, data, size, partial(step, sia=compiled(sia)))


def ude_inplace_compile(theta, data, size):
    return ude(theta, data, size, partial(step_inplace, sia=compiled(sia_inplace)))


def conductance(H, B, A, dx, dt, rho_g=RHO_G):
    """dt D / dx^2 on edges, (N-1, N-2) and (N-2, N-1)."""
    S = B + H
    D = dt / dx**2 * diffusivity(H, S.diff(dim=-2) / dx, S.diff(dim=-1) / dx, A, rho_g)
    return avg_y(D), avg_x(D)


def flow(Kx, Ky, S):
    """dt div(D grad S) inside, (N-2, N-2)."""
    return (Kx * S[..., 1:-1].diff(dim=-2)).diff(dim=-2) + (Ky * S[..., 1:-1, :].diff(dim=-1)).diff(dim=-1)


class Factor:
    """What the host's solver left, which autograd hands through."""

    def __init__(self, *K):
        self.factor = cholesky(*(k.cpu().numpy() for k in K))

    def __call__(self, b):
        return torch.from_numpy(substitute(self.factor, b.cpu().numpy())).to(b.device)


class Substitute(torch.autograd.Function):
    """The solution for a batch of b at once; it has a rule for vmap and needs none for derivatives."""

    @staticmethod
    def forward(factor, b):
        return factor(b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, factor, b):
        return Substitute.apply(factor, b.movedim(in_dims[1], 0)), 0


class Solve(torch.autograd.Function):
    """x inside from x - flow(x) = b, x = 0 on the boundary, and the factor."""

    @staticmethod
    def forward(Kx, Ky, b):
        factor = Factor(Kx, Ky)
        return factor(b), factor

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.factor = output
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx, xb, _):
        lam = Substitute.apply(ctx.factor, xb)
        x0, lam0 = pad(ctx.saved_tensors[0], (1, 1, 1, 1)), pad(lam, (1, 1, 1, 1))
        Kxb = -lam0[..., 1:-1].diff(dim=-2) * x0[..., 1:-1].diff(dim=-2)
        return Kxb, -lam0[..., 1:-1, :].diff(dim=-1) * x0[..., 1:-1, :].diff(dim=-1), lam

    @staticmethod
    def jvp(ctx, dKx, dKy, db):
        return Substitute.apply(ctx.factor, db + flow(dKx, dKy, pad(ctx.saved_tensors[0], (1, 1, 1, 1)))), None

    @staticmethod
    def vmap(*_):
        raise NotImplementedError("one matrix at a time; PyTorch asks for this where its tangents alone are a batch")


def implicit_step(H, B, A, dx, dt, conductance=conductance):
    Kx, Ky = conductance(H, B, A, dx, dt)
    x, _ = Solve.apply(Kx, Ky, flow(Kx, Ky, B + H))
    H = H + pad(x, (1, 1, 1, 1))
    return torch.where(H > 0, H, 0.0)


def semi_implicit(theta, data, size, step=implicit_step):
    """The solve is an autograd.Function around LAPACK, and keeps the factor for the way back."""
    H0, A = theta["H0"], size.A * torch.exp(theta["lnA"])
    H = torch.where(H0 > 0, H0, 0.0)
    for _ in range(size.nst):
        H = step(H, data["B"], A, BOX / size.N, YEARS / size.nst)
    return torch.mean((H - H0) ** 2)


def semi_implicit_checkpoint(theta, data, size):
    """A state a step; factors too are computed again."""
    return semi_implicit(theta, data, size, checkpointed(implicit_step))


def semi_implicit_compile(theta, data, size):
    """Its assembly is compiled; the solve is a call of Python."""
    return semi_implicit(theta, data, size, partial(implicit_step, conductance=compiled(conductance)))


def spread(H, A, dx, dt, conductance=conductance):
    H = H + pad(flow(*conductance(H, 0.0, A, dx, dt, HALFAR_RHO_G), H), (1, 1, 1, 1))
    return torch.where(H > 0, H, 0.0)


def halfar(theta, data, size, step=spread):
    H, A = data["H0"], HALFAR_A * torch.exp(theta["lnA"])
    for dt in data["dt"]:
        H = step(H, A, halfar_dx(size), dt)
    return H[size.N // 2, size.N // 2]


def halfar_checkpoint(theta, data, size):
    """A state a step."""
    return halfar(theta, data, size, checkpointed(spread))


def halfar_compile(theta, data, size):
    """Its diffusivity is compiled: a whole step takes over a minute to compile."""
    return halfar(theta, data, size, partial(spread, conductance=compiled(conductance)))


def iteration(T, V, T0, A, dx, conductance=conductance):
    Kx, Ky = conductance(T, 0.0, A, dx, 1.0, PLATE_RHO_G)
    V = DAMPING * V + (flow(Kx, Ky, T) - (T - T0)[..., 1:-1, 1:-1] / DT)
    dtau = 1 / (1 / DT + (D_MIN / dx**2 + avg_x(Kx)) / CFL) / 3
    T = T + pad(dtau * V, (1, 1, 1, 1))
    return torch.where(T > 0, T, 0.0), V


def relax(T0, A, size, iteration=iteration):
    """T at the step's end."""
    T, V = T0, torch.zeros_like(T0[..., 1:-1, 1:-1])
    for _ in range(most_iterations(size)):
        last, (T, V) = T, iteration(T, V, T0, A, PLATE / size.N)
        if (T - last).detach().abs().max() < size.tol:
            return T
    raise diverged(size)


class Root(torch.autograd.Function):
    """Where the loop would end at last, by the implicit function theorem: nothing of the loop is kept. Its linear solve is
    BiCGStab on products with the transposed Jacobian, (I - dt J)^T, which come from the tape of one residual."""

    @staticmethod
    def forward(ctx, T0, A, size):
        T = relax(T0, A, size._replace(tol=CONVERGED))
        ctx.save_for_backward(T, T0, A)
        ctx.dx = PLATE / size.N
        return T

    @staticmethod
    def backward(ctx, Tb):
        at = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            T, T0, A = at
            F = flow(*conductance(T, 0.0, A, ctx.dx, DT, PLATE_RHO_G), T)
            r = torch.where(T > 0, T - T0 - pad(F, (1, 1, 1, 1)), T)  # where the loop cuts T off at 0, T is 0

        def transposed(lam):
            return torch.autograd.grad(r, T, lam, retain_graph=True)[0]

        lam = bicgstab(transposed, Tb)
        T0b, Ab = torch.autograd.grad(r, (T0, A), -lam)
        return T0b, Ab, None


def bicgstab(J, b, tolerance=1e-12, most=1000):
    """van der Vorst, SIAM J. Sci. Stat. Comput. 13 (1992) 631."""
    x, r, rho = torch.zeros_like(b), b, torch.sum(b * b)
    p, enough = r, tolerance * b.norm()
    for _ in range(most):
        if r.norm() <= enough:
            return x
        Jp = J(p)
        alpha = rho / torch.sum(b * Jp)
        s = r - alpha * Jp
        Js = J(s)
        omega = torch.sum(Js * s) / torch.sum(Js * Js)
        x, r = x + alpha * p + omega * s, s - omega * Js
        rho, last = torch.sum(b * r), rho
        p = r + rho / last * alpha / omega * (p - omega * Jp)
    raise Diverged(f"BiCGStab did not converge in {most} iterations.")


def pseudo_transient(theta, data, size, relax=relax):
    T = data["T0"]
    for A in data["A"] * torch.exp(theta["lnA"]):
        T = relax(T, A, size)
    return torch.mean(T * T) / 2


def pseudo_transient_checkpoint(theta, data, size):
    """A state a step, and while a step is gone through again, of every iteration."""
    return pseudo_transient(theta, data, size, checkpointed(partial(relax, iteration=checkpointed(iteration))))


def pseudo_transient_root(theta, data, size):
    return pseudo_transient(theta, data, size, Root.apply)


def pseudo_transient_compile(theta, data, size):
    """As of halfar; the loop and its end are Python's."""
    once = partial(iteration, conductance=compiled(conductance))
    return pseudo_transient(theta, data, size, partial(relax, iteration=once))


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs), "inplace": Implementation(rhs_inplace)},
    "ude": {
        "array": Implementation(ude, strategies={"checkpoint": ude_checkpoint, "compile": ude_compile}),
        "inplace": Implementation(
            ude_inplace, strategies={"checkpoint": ude_inplace_checkpoint, "compile": ude_inplace_compile}
        ),
    },
    "semi_implicit": {
        "array": Implementation(
            semi_implicit,
            stats=semi_implicit_stats,
            strategies={"checkpoint": semi_implicit_checkpoint, "compile": semi_implicit_compile},
        ),
    },
    "halfar": {
        "array": Implementation(halfar, strategies={"checkpoint": halfar_checkpoint, "compile": halfar_compile})
    },
    "pseudo_transient": {
        "array": Implementation(
            pseudo_transient,
            stats=pseudo_transient_stats,
            strategies={
                "checkpoint": pseudo_transient_checkpoint,
                "compile": pseudo_transient_compile,
                "implicit": pseudo_transient_root,
            },
        ),
    },
}
