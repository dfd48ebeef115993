"""The valley glacier in PyTorch: whole arrays on the eager tape; the temperatures are a leading axis."""

from functools import partial

import torch
from torch.nn.functional import pad, softplus

from backends.torch_backend import checkpointed, compiled
from problems import Implementation
from problems.shallow_ice import A_MAX, A_MIN, BOX, EPS, RHO_G, steps_a_year


def avg_x(a):
    return 0.5 * (a[..., 1:, :] + a[..., :-1, :])


def avg_y(a):
    return 0.5 * (a[..., 1:] + a[..., :-1])


def cap(e, lo, hi):
    return torch.where(e < lo, lo, torch.where(e > hi, hi, e))  # torch.clamp halves the derivative at a tie


def sia(H, B, A, dx):
    """H_t of the shallow ice approximation, (..., N, N); A is a number or (..., 1, 1)."""
    Hc = torch.where(H > 0, H, 0.0)
    S = B + Hc
    dSx, dSy = S.diff(dim=-2) / dx, S.diff(dim=-1) / dx  # (N-1, N), (N, N-1): edges
    gx, gy, Hb = avg_y(dSx), avg_x(dSy), avg_x(avg_y(Hc))  # (N-1, N-1): corners
    Hb2 = Hb * Hb  # Hb**5 costs 1.2 times the whole
    D = (0.4 * RHO_G**3) * A * (Hb2 * Hb2 * Hb) * (gx * gx + gy * gy + EPS)
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


IMPLEMENTATION = {
    "rhs": {"array": Implementation(rhs), "inplace": Implementation(rhs_inplace)},
    "ude": {
        "array": Implementation(ude, strategies={"checkpoint": ude_checkpoint, "compile": ude_compile}),
        "inplace": Implementation(
            ude_inplace, strategies={"checkpoint": ude_inplace_checkpoint, "compile": ude_inplace_compile}
        ),
    },
}
