"""The Brusselator for Enzyme: the very loops of the hand-written adjoint's primal in Numba, and loops in C++.

The reverse pass of a stencil is a scatter, the hand adjoint of rhs a gather: 225 us to 75 at N = 256. Of the 225 the call
takes 8, the zeros that a scatter starts from 22, the primal 50 and the reverse pass 145, 32 if no cell had neighbours. Ten
sums a cell go to memory, and may be those of the next cell: no SIMD. The same scatter by hand in Numba takes 340.

Of imex the reaction is Enzyme's, and JAX's FFT and loop are around it: that is 0.6 to 0.8 of the time of JAX alone at N = 64,
as much at 32. In `loops` all of it is one kernel, where the waves are had by products with Q: 3.6 and 1.8 times as long.

Of implicit the elimination itself is differentiated, in every Newton iteration: 20 and 45 times the hand adjoint at N = 8 and
16. The strategy implicit differentiates the residual at the root, and one solve with J^T is beside it: as fast as by hand.

Of ode all is one kernel, that of the hand adjoint, but the iterations of its solves: they have a rule. It takes 1.4 times the
hand adjoint at N = 17, and 0.2 of the form `scan`, in which the reaction alone is Enzyme's. Without the rule it was not
compiled after minutes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from enzyme_ad.jax import cpp_call
from jax import lax
from llvmlite.binding import get_host_cpu_name
from numba import njit

from backends.enzyme_backend import differentiable, output, rule, scratch
from backends.numba_math import tanh_by_factor as tanh
from problems import Implementation
from problems.brusselator import A_UDE, B_UDE, FORCING, T_FORCING, brusselator_jax, clock, eigenvalues, fourier
from problems.brusselator.brusselator_numba import (
    FAST,
    Solver,
    cg,
    copy,
    factorise,
    fold,
    imex_basis,
    imex_kernel,
    implicit_kernel,
    lap_rows,
    multiply,
    newton,
    ode_kernel,
    ode_prepare,
    react,
    reaction_rows,
    residual,
    rhs_kernel,
    room,
    set_step,
    solve,
    solve_stage,
)


def rhs(theta, data, size):
    force = FORCING if size.t >= T_FORCING else 0.0
    c = theta["alpha"] * (size.N - 1) ** 2
    return differentiable(rhs_kernel)(theta["u"], theta["A"], theta["B"], c, force, data["disc"], data["v"])


# C++ as enzyme-ad compiles it: an output may be written once only, and every argument is differentiated. The flags are those
# of clang's own front end, which takes neither -ffast-math nor -march=native for more than a name: the primal is SIMD by them.
FAST_CPP = (
    "-menable-no-infs",
    "-menable-no-nans",
    "-fno-signed-zeros",
    "-mreassociate",
    "-freciprocal-math",
    "-ffp-contract=fast",
)
FLAGS = "-O3", "-target-cpu", get_host_cpu_name(), *FAST_CPP
RHS_CPP = """
using namespace enzyme;
template <class real, std::size_t N>
void rhs(tensor<real> &out, const tensor<real, 2, N, N> &u, const tensor<real> &A, const tensor<real> &B,
         const tensor<real> &c, const tensor<real> &force, const tensor<real, N, N> &disc, const tensor<real, 2, N, N> &v) {
  real loss = 0;
  for (int i = 0; i < N; i++) {
    int im = i > 0 ? i - 1 : N - 1, ip = i < N - 1 ? i + 1 : 0;
    for (int j = 0; j < N; j++) {
      int jm = j > 0 ? j - 1 : N - 1, jp = j < N - 1 ? j + 1 : 0;
      real U = u[0][i][j], V = u[1][i][j], U2V = U * U * V;
      real lapU = u[0][im][j] + u[0][ip][j] + u[0][i][jm] + u[0][i][jp] - 4 * U;
      real lapV = u[1][im][j] + u[1][ip][j] + u[1][i][jm] + u[1][i][jp] - 4 * V;
      loss += v[0][i][j] * (B + U2V - (A + 1) * U + c * lapU + force * disc[i][j]);
      loss += v[1][i][j] * (A * U - U2V + c * lapV);
    }
  }
  out = loss;
}
"""


def rhs_cpp(theta, data, size):
    u = theta["u"]
    force = jnp.array(FORCING if size.t >= T_FORCING else 0.0, u.dtype)
    arguments = u, theta["A"], theta["B"], theta["alpha"] * (size.N - 1) ** 2, force, data["disc"], data["v"]
    out = [jax.core.ShapedArray((), u.dtype)]
    return cpp_call(*arguments, out_shapes=out, source=RHS_CPP, fn="rhs", argv=FLAGS)[0]


def solver(alpha, size, basis):
    """The coefficients of `diffuse`, in JAX: they are small."""
    dtype = basis[1].dtype
    c, mu = size.dt * alpha * (size.N - 1) ** 2, -size.dt * alpha * eigenvalues(size.N).astype(dtype)
    d = 1 + 2 * c + mu
    a = 2 * c / (d + jnp.sqrt(d * d - 4 * c * c))
    g = (1 - a) / jnp.sqrt(1 + mu)
    return *basis, (a, g, 1 / (1 - a**size.N), scratch(size.N, dtype))


@njit(fastmath=True)
def from_start(u0, A, B, disc, S, dt, steps, every, first, states, r, waves):
    for i in range(u0.shape[0]):
        for j in range(u0.shape[1]):
            states[0, i, j] = u0[i, j]
    return imex_kernel(states, A, B, disc, S, dt, steps, every, first, r, waves)


def imex(theta, data, size):
    N, dtype, (saves, every, first) = size.N, theta["u0"].dtype, clock(size)
    basis, _ = imex_basis(N, dtype, fft=False)  # a product has one rule, the FFT many loops
    S = solver(theta["alpha"], size, basis)
    states, r, waves = (scratch(shape, dtype) for shape in ((2, 2 * N, N), (2 * N, N), (2 * N, N)))
    u0, A, B = theta["u0"].reshape(2 * N, N), theta["A"], theta["B"]
    return differentiable(from_start)(u0, A, B, data["disc"], S, size.dt, saves * every, every, first, states, r, waves)


def explicit(U, V, A, B, force, disc, dt):
    """u + dt R(u)"""
    N, u = len(disc), jnp.concatenate([U, V])
    U0, V0, r = differentiable(react)(u, A, B, force, disc, dt, output(u.shape, u.dtype))
    return U0 + r[:N], V0 + r[N:]


def imex_fft(theta, data, size):
    """The reaction is Enzyme's; the FFTs and the loop around both are JAX's."""
    return brusselator_jax.imex(theta, data, size, explicit=explicit)


@njit(fastmath=True, error_model="numpy")
def react_given(u, net, force, disc, dt, r):
    """As `react`, with the network for U^2 V."""
    N, (W1, b1, W2, b2) = disc.shape[0], net
    U0, V0 = u[0, 0], u[N, 0]
    for i in range(N):
        U, V, x, p, q = u[i], u[N + i], disc[i], r[i], r[N + i]
        for j in range(N):
            q[j] = b2
        for h in range(b1.size):
            for j in range(N):
                q[j] += W2[h] * tanh(W1[h, 0] * U[j] + W1[h, 1] * V[j] + b1[h])
        for j in range(N):
            flow = A_UDE * U[j] - q[j]
            p[j] = U[j] - U0 + dt * (B_UDE - U[j] - flow + force * x[j])
            q[j] = V[j] - V0 + dt * flow
    return U0, V0


def explicit_given(U, V, net, force, disc, dt):
    """u + dt R(u)"""
    N, u, net = len(disc), jnp.concatenate([U, V]), tuple(net[name] for name in ("W1", "b1", "W2", "b2"))
    U0, V0, r = differentiable(react_given)(u, net, force, disc, dt, output(u.shape, u.dtype))
    return U0 + r[:N], V0 + r[N:]


def ude(theta, data, size):
    """The network is Enzyme's, as the reaction of imex is."""
    return brusselator_jax.ude(theta, data, size, explicit=explicit_given)


# S as four products with Q, as in `inplace`; Q and disc are arguments, and so they are differentiated too.
IMEX_CPP = """
using namespace enzyme;
template <class real>
inline void product(int N, const real *__restrict a, const real *__restrict b, real *__restrict c) {
  for (int i = 0; i < N; i++) {
    for (int j = 0; j < N; j++) c[i * N + j] = 0;
    for (int k = 0; k < N; k++)
      for (int j = 0; j < N; j++) c[i * N + j] += a[i * N + k] * b[k * N + j];
  }
}
template <class real, std::size_t N>
void imex(tensor<real> &out, const tensor<real, 2, N, N> &u0, const tensor<real> &A, const tensor<real> &B,
          const tensor<real, N, N> &g, const tensor<real, N, N> &disc, const tensor<real, N, N> &Q) {
  real q[N * N], p[N * N], u[2][N * N], r[2][N * N], w[N * N], loss = 0;
  for (int i = 0; i < N; i++)
    for (int j = 0; j < N; j++) {
      q[i * N + j] = p[j * N + i] = Q[i][j];
      for (int f = 0; f < 2; f++) {
        u[f][i * N + j] = u0[f][i][j];
        loss += (1 - u[f][i * N + j]) * (1 - u[f][i * N + j]) / 2;
      }
    }
  for (int n = 0; n < STEPS; n++) {
    real force = n >= FIRST ? FORCING : 0;
    for (int k = 0; k < N * N; k++) {
      real U = u[0][k], V = u[1][k], flow = A * U - U * U * V;
      r[0][k] = U + DT * (B - U - flow + force * disc[k / N][k % N]);
      r[1][k] = V + DT * flow;
    }
    for (int f = 0; f < 2; f++) {
      product<real>(N, p, r[f], w);
      product<real>(N, w, q, r[f]);
      for (int k = 0; k < N * N; k++) r[f][k] *= g[k / N][k % N];
      product<real>(N, q, r[f], w);
      product<real>(N, w, p, u[f]);
    }
    if ((n + 1) % EVERY == 0)
      for (int f = 0; f < 2; f++)
        for (int k = 0; k < N * N; k++) loss += (1 - u[f][k]) * (1 - u[f][k]) / 2;
  }
  out = loss;
}
"""


def imex_cpp(theta, data, size):
    u0, (saves, every, first) = theta["u0"], clock(size)
    lam = eigenvalues(size.N).astype(u0.dtype)
    g = 1 / (1 - size.dt * theta["alpha"] * (lam[:, None] + lam))
    Q = jnp.asarray(fourier(size.N), u0.dtype)
    numbers = {"STEPS": saves * every, "EVERY": every, "FIRST": first, "DT": size.dt, "FORCING": FORCING}
    flags = *FLAGS, *(f"-D{name}={value}" for name, value in numbers.items())
    out = [jax.core.ShapedArray((), u0.dtype)]
    arguments = u0, theta["A"], theta["B"], g, data["disc"], Q
    return cpp_call(*arguments, out_shapes=out, source=IMEX_CPP, fn="imex", argv=flags)[0]


@njit
def implicit_from_start(u0, A, B, c, disc, row, N, dt, steps, every, first, tolerance, states, P, F, x, y):
    """One Newton iteration more than the root asks for: the derivative of the iteration trails it."""
    states[:], P[:], F[:], x[:] = 0, 0, 0, 0
    for p in range(N):
        for j in range(N):
            states[0, p, j], states[0, p, N + j] = u0[0, row[p], j], u0[1, row[p], j]
    loss, iterations = implicit_kernel(states, A, B, c, disc, row, N, dt, steps, every, first, tolerance, 1, P, F, x, y)
    return loss if iterations > 0 else np.nan * loss


def implicit(theta, data, size):
    """N is an array, whose value LLVM does not know: it unrolls loops of 32 before it could make them SIMD, and at N = 8 the
    primal takes 11 times as long then, compiling the gradient twice. Where it knows how many blocks there are, Enzyme walks
    each path through the unrolled solves, and at N = 16 it had not compiled them after minutes."""
    N, u0, (saves, every, first) = size.N, theta["u0"], clock(size)
    c, m, (row, R) = size.dt * theta["alpha"] * (N - 1) ** 2, 2 * N, fold(N)
    buffers = (scratch(shape, u0.dtype) for shape in ((2, R, m), (R // 2, 2 * m, 2 * m), (R, m), (R, m), 2 * m))
    fixed = size.dt, saves * every, every, first, float(np.sqrt(np.finfo(u0.dtype).eps))
    return differentiable(implicit_from_start)(
        u0, theta["A"], theta["B"], c, data["disc"], jnp.asarray(row), jnp.asarray(N), *fixed, *buffers
    )


@njit
def root_of(u, A, B, c, force, disc, row, N, dt, tolerance, w, P, F, x, y):
    F[:] = 0  # an odd ring's row of zeros
    if newton(w, u, A, B, c, force, disc, row, N, dt, tolerance, 0, P, F, x, y) == 0:
        w[:] = np.nan


@njit
def solve_adjoint(wb, w, A, c, N, dt, lam, P, y):
    """lam = J(w)^-T wb"""
    factorise(w, A, c, dt, N, P)
    solve(P, c, N, wb, lam, y, True)


def implicit_root(theta, data, size):
    """Newton's iteration is a primal only: Enzyme's is the vjp of F at the root, and one solve with J^T comes before it."""
    N, dt, dtype, (saves, every, first) = size.N, size.dt, theta["u0"].dtype, clock(size)
    m, (row, R) = 2 * N, fold(N)
    shape, tolerance = (R, m), float(np.sqrt(np.finfo(dtype).eps))
    P, x, y = (scratch(shape, dtype) for shape in ((R // 2, 2 * m, 2 * m), shape, 2 * m))

    def F(w, u, A, B, c, source):
        return differentiable(residual)(w, u, A, B, c, 1.0, source, row, dt, output(shape, dtype))

    @jax.custom_vjp
    def root(u, A, B, c, source):
        w = output(shape, dtype)
        return differentiable(root_of)(u, A, B, c, 1.0, source, row, np.array(N), dt, tolerance, w, P, x, x, y)

    def forward(*given):
        w = root(*given)
        return w, (w, *given)

    def backward(known, wb):
        w, *given, source = known
        _, A, _, c = given
        lam = differentiable(solve_adjoint)(wb, w, A, c, np.array(N), dt, output(shape, dtype), P, y)
        return *jax.vjp(lambda *given: F(w, *given, source), *given)[1](-lam), None

    root.defvjp(forward, backward)
    c = dt * theta["alpha"] * (N - 1) ** 2

    def step(u, force):
        return root(u, theta["A"], theta["B"], c, force * data["disc"]), None

    def interval(u, forces):
        u, _ = lax.scan(step, u, forces)
        return u, jnp.sum((1 - u[:N]) ** 2) / 2

    forces = FORCING * (np.arange(1, saves * every + 1) >= first).astype(dtype)
    u0 = theta["u0"][:, row].swapaxes(0, 1).reshape(N, m)
    _, losses = lax.scan(interval, jnp.pad(u0, ((0, R - N), (0, 0))), forces.reshape(saves, every))
    return jnp.sum((1 - u0) ** 2) / 2 + jnp.sum(losses)


def reaction(u, A, B, force):
    """All that is not diffusion."""
    rows = u.reshape(2, -1)
    A, B, force = (x.reshape(1, -1) for x in (A, B, force))
    return differentiable(reaction_rows)(rows, A, B, 1.0, force, output(rows.shape, u.dtype)).reshape(u.shape)


def ode_scan(theta, data, size):
    """The reaction is Enzyme's; the steps, and the solves with their rule, are JAX's."""
    return brusselator_jax.ode(theta, data, size, reaction)


@njit(fastmath=FAST, error_model="numpy")
def solve_stage_vjp(S, alpha, h, tolerance, r, w, done, alphab, rb, wb):
    """With nu = (1 - h lap alpha)^-1 wb, rb += nu and alphab += h nu lap w."""
    set_step(S, alpha, h)
    multiply(wb, S.g)
    iterations = cg(S, wb, tolerance)
    lap_rows(w, 1.0 / (len(S.Q) - 1) ** 2, S.halo, S.Sp)
    e, y, lap, ab, rb, wb = S.e.ravel(), S.y.ravel(), S.Sp.ravel(), alphab.ravel(), rb.ravel(), wb.ravel()
    for k in range(wb.size):
        nu = e[k] * y[k] if iterations >= 0 else np.nan
        ab[k] += h * nu * lap[k]
        rb[k] += nu
        wb[k] = 0


rule(solve_stage, solve_stage_vjp, wrt=("alpha", "r", "w"))


@njit(error_model="numpy")
def ode_from_start(u0, A, B, alpha, disc, course, ark, tolerances, S, dts, sampled, stages, r, slopes, counts):
    copy(u0, stages[0, 0])
    fields = A, B, alpha, disc
    loss = ode_kernel(*fields, course, ark, tolerances, Solver(*S), dts, sampled, stages, r, slopes, counts)
    return loss if counts[0] > 0 else np.nan * loss


def ode(theta, data, size):
    """All of it is one kernel. Its solves have a rule, one solve with the transposed matrix, so that Enzyme does not go through
    their iterations; dt follows from a whole number of steps, and has no derivative."""
    N, dtype = size.N, theta["A"].dtype
    rows = lambda U, V: jnp.stack([U, V], 1).reshape(2 * N, N)  # noqa: E731
    like = lambda arrays: (scratch(a.shape, a.dtype) for a in arrays)  # noqa: E731
    work = ode_prepare({"A": theta["A"]}, size)
    # of these only halo holds what is differentiated: the rest is for solves, which have a rule, and for the length of a step
    S = Solver(*(scratch(x.shape, x.dtype, differentiated=x is work.S.halo) for x in work.S))
    S = S._replace(Q=work.S.Q, Qt=work.S.Qt, mu=work.S.mu)
    rest = *room(brusselator_jax.attempts(size), N, dtype), work.r, work.slopes, np.empty(6, int)
    fields = theta["A"], theta["B"], rows(theta["alpha1"], theta["alpha2"]), data["disc"]
    loss = differentiable(ode_from_start)(rows(*data["u0"]), *fields, *work.given, tuple(S), *like(rest))
    return loss.astype(dtype)  # its sums are float64


IMPLEMENTATION = {
    "rhs": {"loops": Implementation(rhs), "cpp": Implementation(rhs_cpp)},
    "imex": {"fft": Implementation(imex_fft), "loops": Implementation(imex), "cpp": Implementation(imex_cpp)},
    "ude": {"fft": Implementation(ude)},
    "implicit": {"loops": Implementation(implicit, strategies={"implicit": implicit_root})},
    "ode": {"loops": Implementation(ode, strategies={"forward": ode_scan}), "scan": Implementation(ode_scan)},
}
