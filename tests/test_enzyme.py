"""The battery of the Numba-to-Enzyme driver: each kernel is right, against complex step, or refused with one sentence."""

import math
import os

import numpy as np
import pytest

pytest.importorskip("enzyme_ad.jax")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from numba import njit  # noqa: E402

from backends.enzyme_backend import EnzymeError, check, differentiable, output, rule, scratch  # noqa: E402
from problems import gold  # noqa: E402

jax.config.update("jax_enable_x64", True)

N = 7
X = gold(N) + 0.6  # positive
Y = gold(N, 4)
M = gold(N * N, 9).reshape(N, N)
INDEX = np.array([2, 0, 6, 2, 5, 5, 1])


# Kernels, each a function of arrays that returns a number. They are run by Numba under Enzyme, and as plain Python on
# complex numbers for the reference.


def mutation(x, y):
    for i in range(x.size):
        x[i] = x[i] * x[i]
    for i in range(1, x.size):
        x[i] = x[i] * x[i - 1] + y[i]
    return x[x.size - 1] + x[2]


def branches(x, y):
    s = 0.0 * x[0]
    for i in range(x.size):
        if y[i].real > 0.1:
            s += x[i] * x[i]
        elif y[i].real > -0.2:
            s -= 3 * x[i] * y[i]
        else:
            continue
        if s.real > 0.5:
            s *= 0.5 + y[i]
    return s


def while_loop(x, y):
    s, n = x[0] * 1.0, 0
    while s.real < 50.0 and n < 100:
        s = s * (1 + x[n % x.size]) + y[n % x.size]
        n += 1
    return s


def scratch_empty(x, y):
    w = np.empty(x.size, x.dtype)
    for i in range(x.size):
        w[i] = np.sin(x[i]) * y[i]
    for i in range(x.size):
        w[i] = w[i] * w[i - 1]
    return w[3] * w[0] + w[5]


def scratch_zeros(x, y):
    w = np.zeros((x.size, 3), x.dtype)
    for i in range(x.size):
        w[(3 * i) % x.size, i % 3] += x[i] * y[i]
        w[i, 0] += x[i] ** 3
    return (w * w).sum()


def scratch_in_loop(x, y):
    s = 0.0 * x[0]
    for k in range(20):
        w = np.empty(x.size, x.dtype)
        for i in range(x.size):
            w[i] = x[i] * y[(i + k) % x.size] + s
        s = 0.1 * w[k % x.size] * w[0]
    return s


def views(x, y):
    w = np.zeros(2 * x.size, x.dtype)
    even, odd, tail = w[::2], w[1::2], w[x.size :]
    even[:] = x * y
    odd[:] = x + 2
    tail[1:] *= x[1:]
    for i in range(tail.size):
        w[i] += tail[i] * tail[i]
    return w[:5].sum() * w[-1]


def views_of_rows(m, y):
    s = 0.0 * m[0, 0]
    for i in range(1, m.shape[0]):
        a, b = m[i], m[i - 1]
        for j in range(a.size):
            b[j] = b[j] * a[j] + y[j]
        s += b[i]
    return s


def view_that_outlives(x, y):
    def half(a):
        b = a * a
        return b[2:]

    u = half(x)
    v = half(y)
    w = half(u)
    return u[0] * v[1] + w[0] * u[3] + v[2]


def ufuncs(x, y):
    return np.sum(np.exp(-x * x) * np.sin(y) + np.sqrt(x) / (1 + y * y) - np.log(x + 2) ** 2)


def mixed_axes(m, y):
    return (m.T * y + m.sum(axis=0) - m[:, 1:3].sum()).sum() + (m[2] * m[:, 3]).sum()


def dot_matrix_matrix(m, y):
    w = np.dot(m, m)
    v = np.dot(m.T, w)
    return (np.dot(v, w.T) * m).sum() + v[1, 2] * y[3]


def dot_matrix_vector(m, y):
    w = np.dot(m, y)
    v = np.dot(m.T, w * w)
    return np.dot(v, w) + v[0]


def dot_out(m, y):
    w = np.empty_like(m)
    np.dot(m, m, w)
    w *= 2
    np.dot(w.copy(), m, w)
    return w[1, 2] + w[5, 5] * y[0]


def dot_overwritten(m, y):
    a = m * 2
    b = m + 1
    c = np.dot(a, b)
    a[:] = 0
    b[:] = c * c
    for i in range(b.shape[0]):
        b[i] = b[i] * c[i]
    return (np.dot(b, c)).sum() + y[0] * c[1, 1]


def dot_in_loop(m, y):
    v = y * 1
    for _ in range(6):
        v = np.dot(m, v) + y
    return (v * v).sum()


def dot_with_constant(m, y):
    c = np.empty((m.shape[1], 3), m.dtype)
    for i in range(c.shape[0]):
        for j in range(3):
            c[i, j] = 0.5 * i - j
    return (np.dot(m, c) ** 2).sum() + y[1]


def norm_by_hand(x, y):
    return np.sqrt((x * x).sum()) * np.sqrt(np.sum((x - y) ** 2))


def reductions(x, y):
    s, p = 0.0 * x[0], 1.0 + 0.0 * x[0]
    for a in x:
        s += a
        p *= a
    return s * p + x.sum() * y.sum() + x.prod() + np.mean(x * y) + np.sum(x * x)


def cumulative(x, y):
    return (np.cumsum(x * y) * x).sum()


def reshaped(m, y):
    flat = m.reshape(m.size)
    flat[3] = flat[3] * y[0]
    cube = np.ascontiguousarray(m.T).reshape((m.shape[0], 1, m.shape[1]))
    return (cube * cube).sum() * m[0, 3] + np.ravel(m)[5] * flat[3]


def power(x, y):
    s = 0.0 * x[0]
    for i in range(x.size):
        s += x[i] ** 5 + x[i] ** y[i] + x[i] ** -2 + x[i] ** 0.5
    return s


def nested(x, y):
    def square(a):
        return a * a + 1

    def twice(a, b):
        return square(square(a)) - b

    s = 0.0 * x[0]
    for i in range(x.size):
        s += twice(x[i], y[i]) * square(s)
        s *= 0.1
    return s


def recursion_by_stack(x, y):
    stack = np.empty(64, x.dtype)
    top = 0
    stack[top] = x[0]
    s = 0.0 * x[0]
    n = 0
    while top >= 0 and n < 40:
        a = stack[top]
        top -= 1
        n += 1
        s += a * y[n % y.size]
        if n < 20:
            stack[top + 1] = a * x[n % x.size]
            stack[top + 2] = a + y[n % y.size]
            top += 2
    return s


def recursive_helper(x, n):
    if n == 0:
        return 1.0 + 0 * x
    return x * recursive_helper(x, n - 1) + 0.5


def swapped_buffers(x, y):
    a, b = x * 1, np.zeros_like(x)
    for n in range(9):
        for i in range(a.size):
            b[i] = a[i] + 0.1 * (a[i - 1] - a[i]) * a[i] + 0.01 * y[i] * n
        a, b = b, a
    return (a * a).sum()


def overwritten_many_times(x, y):
    w = np.zeros(3, x.dtype)
    for i in range(x.size):
        w[0] = x[i] * w[2] + y[i]
        w[1] = w[0] * w[0]
        w[2] = w[1] - w[0] * x[i]
    return w[0] + w[1] * w[2]


def tuples(x, y):
    p = (x[0], x[1] * y[0], x[2])
    q = (p[2], p[0] * p[1])
    return q[0] * q[1] + p[1]


def early_return(x, y):
    s = 0.0 * x[0]
    for i in range(x.size):
        s += x[i] * x[i]
        if s.real > 1.0:
            return s * y[i]
    return s * 100


def break_out(x, y):
    s = 1.0 + 0.0 * x[0]
    for i in range(x.size):
        for j in range(x.size):
            if x[j].real > 0.9:
                break
            s *= 1 + 0.1 * x[j] * y[i]
    return s


def constant_table(x, y):
    s = 0.0 * x[0]
    for i in range(x.size):
        s += TABLE[i % 3] * x[i] * x[i] + y[i]
    return s


TABLE = np.array([0.5, -1.5, 2.5])

RIGHT = {
    f.__name__: f
    for f in (
        mutation, branches, while_loop, scratch_empty, scratch_zeros, scratch_in_loop, views, views_of_rows,
        view_that_outlives, ufuncs, mixed_axes, dot_matrix_matrix, dot_matrix_vector, dot_out, dot_overwritten,
        dot_in_loop, dot_with_constant, norm_by_hand, reductions, cumulative, reshaped, power, nested, recursion_by_stack,
        swapped_buffers, overwritten_many_times, tuples, early_return, break_out, constant_table,
    )
}  # fmt: skip


def complex_step(f, arguments):
    """Gradients of the real arrays among the arguments; the rest passes as it is."""
    gradients = []
    for k, x in enumerate(arguments):
        if not (isinstance(x, np.ndarray) and x.dtype.kind == "f"):
            continue
        g = np.empty(x.shape)
        for at in np.ndindex(x.shape):
            moved = [
                np.array(a, complex) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a for a in arguments
            ]
            moved[k][at] += 1e-30j
            g[at] = np.imag(f(*moved)) / 1e-30
        gradients.append(g)
    return gradients


def close(got, want, gate=1e-12):
    for g, w in zip(got, want, strict=True):
        assert np.linalg.norm(np.asarray(g) - w) <= gate * np.linalg.norm(w), (g, w)


def both_modes(call, arguments, want, gate=1e-12):
    """Reverse, and forward along each of two directions, against the gradients."""
    real = [k for k, x in enumerate(arguments) if isinstance(x, np.ndarray) and x.dtype.kind == "f"]

    def of_real(*xs):
        whole = list(arguments)
        for k, x in zip(real, xs, strict=True):
            whole[k] = x
        return call(*whole)

    xs = [jnp.asarray(arguments[k]) for k in real]
    value, got = jax.jit(jax.value_and_grad(of_real, argnums=tuple(range(len(xs)))))(*xs)
    close(got, want, gate)
    for seed in (1, 20):
        v = [gold(x.size, seed).reshape(x.shape) for x in xs]
        primal, tangent = jax.jit(lambda *xs, v=v: jax.jvp(of_real, xs, tuple(v)))(*xs)
        expected = sum(np.vdot(a, b) for a, b in zip(v, want, strict=True))
        scale = sum(np.linalg.norm(a) * np.linalg.norm(b) for a, b in zip(v, want, strict=True))
        assert abs(tangent - expected) <= gate * scale
        assert abs(primal - value) <= 1e-14 * abs(value) + 1e-300
    check()


def arguments_of(f):
    first, *rest = f.__code__.co_varnames[: f.__code__.co_argcount]
    return [M if first == "m" else X, *(Y for _ in rest)]


STRICT = ("mutation", "branches", "views", "dot_in_loop")  # also without fastmath


@pytest.mark.parametrize("name, fastmath", [(name, True) for name in RIGHT] + [(name, False) for name in STRICT])
def test_right(name, fastmath):
    f = RIGHT[name]
    arguments = arguments_of(f)
    want = complex_step(f, arguments)
    if f in (view_that_outlives, nested):
        f = globals()[f"njit_{name}"]
    else:
        f = njit(fastmath=fastmath)(f)
    both_modes(differentiable(f), arguments, want)
    check()


@njit
def _half(a):
    b = a * a
    return b[2:]


@njit
def njit_view_that_outlives(x, y):
    u = _half(x)
    v = _half(y)
    w = _half(u)
    return u[0] * v[1] + w[0] * u[3] + v[2]


@njit
def _square(a):
    return a * a + 1


@njit
def _twice(a, b):
    return _square(_square(a)) - b


@njit
def njit_nested(x, y):
    s = 0.0 * x[0]
    for i in range(x.size):
        s += _twice(x[i], y[i]) * _square(s)
        s *= 0.1
    return s


# Arguments of every kind


@njit
def gathered(x, index, n, scale, flag):
    s = 0.0
    for i in range(n):
        s += scale * x[index[i]] ** 2 * (i + 1)
    return s if flag else -s


def test_integer_arrays_and_numbers():
    want = complex_step(lambda x: gathered.py_func(x, INDEX, 5, 0.5, True), [X])
    both_modes(lambda x: differentiable(gathered)(x, INDEX, 5, 0.5, True), [X], want)
    both_modes(lambda x: differentiable(gathered)(x, INDEX.astype(np.int32), np.array(5), 0.5, True), [X], want)
    both_modes(lambda x: differentiable(gathered)(x, INDEX, 5, 0.5, False), [X], [-g for g in want])


@njit
def scalars(a, x, b):
    s = a
    for i in range(x.size):
        s = s * b + x[i] * a
    return s


def test_scalar_arguments():
    arguments = [np.array(1.3), X, np.array(0.7)]

    def plain(a, x, b):
        return scalars.py_func(a[()], x, b[()])

    want = complex_step(plain, arguments)
    both_modes(differentiable(scalars), arguments, want)
    partly = jax.jit(jax.grad(differentiable(scalars), argnums=1))(1.3, X, jnp.asarray(0.7))
    close([partly], [want[1]])


@njit
def of_0d_arrays(a, x, b):
    return a[()] * x[0] + b[()] ** 2 * x[1]


def test_0d_arrays():
    """A kernel that indexes its 0-d arguments gets them as arrays."""
    arguments = [np.array(1.3), X, np.array(0.7)]
    both_modes(differentiable(of_0d_arrays), arguments, complex_step(of_0d_arrays.py_func, arguments))


@njit
def read_back(x, out):
    for i in range(x.size):
        out[i] = x[i] * x[i]
    for i in range(x.size):
        out[i] *= x[i]
    for i in range(1, x.size):
        out[i] += out[i - 1] * out[i]


@njit
def three_results(x, y, out):
    read_back(x, out)
    return x[0] * y[1], x * y, 3


def test_output_is_read_back():
    """backends.md G4: silently wrong where an output is written twice in the hands of enzyme-ad itself."""

    def loss(x):
        out = np.zeros_like(x)
        read_back.py_func(x, out)
        return (out * Y).sum()

    want = complex_step(loss, [X])
    both_modes(lambda x: jnp.sum(differentiable(read_back)(x, output(N)) * Y), [X], want)


@pytest.mark.parametrize("used", [(0,), (1,), (3,), (0, 1, 3)])
def test_some_of_many_results(used):
    def parts(x, y):
        out = np.zeros_like(x)
        read_back.py_func(x, out)
        return x[0] * y[1], (x * y * Y).sum(), 3, (out * out).sum()

    def loss(x, y):
        a, b, c, d = differentiable(three_results, N)(x, y, output(N))
        assert c.dtype == np.int64
        return sum((a, jnp.sum(b * Y), c, jnp.sum(d * d))[k] for k in used)

    want = complex_step(lambda x, y: sum(parts(x, y)[k] for k in used), [X, Y])
    both_modes(loss, [X, Y], want)


@njit
def through_scratch(x, w):
    for i in range(x.size):
        w[0, i] = x[i] * x[i - 1]
    for i in range(x.size):
        w[1, i] = w[0, i] * w[0, i - 1]
        w[0, i] = w[1, i] * x[i]
    return w.sum()


def test_scratch():
    want = complex_step(lambda x: through_scratch.py_func(x, np.zeros((2, N), x.dtype)), [X])
    both_modes(lambda x: differentiable(through_scratch)(x, scratch((2, N))), [X], want)


def test_data_that_carries_a_derivative():
    """An array that is not differentiated, but that the kernel uses as a buffer."""

    def kernel(x, w):
        for i in range(x.size):
            w[i] = w[i] * x[i]
        return w[2] * w[3] + w[5]

    want = complex_step(lambda x: kernel(x, Y.astype(x.dtype)), [X])
    call, data = differentiable(njit(kernel)), jnp.asarray(Y)
    both_modes(lambda x: call(x, data), [X], want)
    assert np.array_equal(data, Y)  # and it is as it was


def this_or_that(x, data):
    w = x if x[0].real > 0.2 else data
    s = 0.0 * x[0]
    for i in range(w.size):
        s += w[i] ** 2 * x[i]
    return s


def exchanged(x, data):
    a, b = x, data
    s = 0.0 * x[0]
    for _ in range(4):
        for i in range(a.size):
            s += a[i] ** 2 * b[i - 1]
        a, b = b, a
    return s


def both_in_turn(x, data):
    s = 0.0 * x[0]
    for w in (x, data, x):
        for i in range(w.size):
            s += w[i] ** 2
    return s


def data_in_scratch(x, data):
    w = np.zeros((2, x.size), x.dtype)
    w[0] = data
    w[1] = x
    s = 0.0 * x[0]
    for i in range(x.size):
        s += w[0, i] * w[1, i] ** 2
    w[0] = x
    return s * w[0, 2]


@pytest.mark.parametrize("f", [this_or_that, exchanged, both_in_turn, data_in_scratch])
def test_pointer_to_either(f):
    """One name for an array that is differentiated and one that is not (Enzyme: runtime activity)."""
    call = differentiable(njit(f))
    for x in (X, -X):
        data = jnp.asarray(Y)
        want = complex_step(lambda x: f(x, Y + 0j), [x])
        both_modes(lambda x, data=data: call(x, data), [x], want)
        assert np.array_equal(data, Y)


def test_aliases():
    """The same array twice: the gradients add where the kernel only reads; where it writes there is a refusal."""

    @njit
    def reads(a, b):
        s = 0.0
        for i in range(a.size):
            s += a[i] * b[i - 1] ** 2
        return s

    want = complex_step(lambda x: reads.py_func(x, x), [X])
    both_modes(lambda x: differentiable(reads)(x, x), [X], want)
    with pytest.raises(EnzymeError, match="overwrites an argument that is passed twice"):
        jax.jit(lambda x: differentiable(njit(mutation))(x, x))(X)


def test_product_with_data():
    """A factor that is not differentiated gets no derivative written into it."""

    @njit
    def kernel(m, y, data):
        w = np.dot(data, m)
        v = np.dot(m, data.T)
        return (w * v).sum() + np.dot(data, y)[2] * np.dot(y, y) + np.dot(data[1], y)

    data = M + 0.3
    want = complex_step(lambda m, y: kernel.py_func(m, y, data + 0j), [M, Y])
    both_modes(lambda m, y: differentiable(kernel)(m, y, data), [M, Y], want)
    only = jax.jit(jax.grad(lambda y: differentiable(kernel)(M, y, data)))(Y)
    close([only], want[1:])


@njit
def of_tuple(weights, x):
    (W, b), c = weights
    h = np.dot(W, x) + b
    return (np.tanh(h) * c).sum()


def test_tuples_of_arrays():
    def plain(W, b, c, x):
        return (np.tanh(W @ x + b) * c).sum()

    arguments = [M, X, Y, X + 1]
    want = complex_step(plain, arguments)
    both_modes(lambda W, b, c, x: differentiable(of_tuple)(((W, b), c), x), arguments, want)


FUNCTIONS = """acos acosh asin asinh atan atanh cbrt ceil cos cosh erf erfc exp exp2 expm1 fabs floor gamma lgamma log log10
log1p log2 sin sinh sqrt tan tanh trunc"""


@pytest.mark.parametrize("name", FUNCTIONS.split())
def test_functions_of_one_number(name):
    from scipy import special

    f = getattr(math, name)
    at = 1.3 if name == "acosh" else 0.3

    @njit
    def kernel(x):
        return 1.0 * f(x[0])

    exact = {
        "acos": lambda x: -1 / np.sqrt(1 - x * x), "acosh": lambda x: 1 / np.sqrt(x * x - 1),
        "asin": lambda x: 1 / np.sqrt(1 - x * x), "asinh": lambda x: 1 / np.sqrt(x * x + 1),
        "atan": lambda x: 1 / (1 + x * x), "atanh": lambda x: 1 / (1 - x * x), "ceil": lambda x: 0, "floor": lambda x: 0,
        "trunc": lambda x: 0, "cos": lambda x: -np.sin(x), "cosh": np.sinh, "erf": lambda x: 2 / np.sqrt(np.pi) * np.exp(-x * x),
        "erfc": lambda x: -2 / np.sqrt(np.pi) * np.exp(-x * x), "exp": np.exp, "expm1": np.exp, "fabs": np.sign,
        "log": lambda x: 1 / x, "log10": lambda x: 1 / x / np.log(10), "log1p": lambda x: 1 / (1 + x),
        "log2": lambda x: 1 / x / np.log(2), "sin": np.cos, "sinh": np.cosh, "sqrt": lambda x: 0.5 / np.sqrt(x),
        "tan": lambda x: 1 / np.cos(x) ** 2, "tanh": lambda x: 1 / np.cosh(x) ** 2, "exp2": lambda x: np.log(2) * 2**x,
        "cbrt": lambda x: x ** (-2 / 3) / 3, "gamma": lambda x: special.gamma(x) * special.digamma(x), "lgamma": special.digamma,
    }  # fmt: skip
    if name in ("cbrt", "gamma", "lgamma"):
        refused(kernel, "Numba cannot compile|calls (numba_|l)gamma", np.array([at]))
        return
    got = jax.jit(jax.grad(differentiable(kernel)))(np.array([at]))[0]
    assert abs(got - exact[name](at)) <= 1e-14 * max(1, abs(got))


TWO = {
    "atan2": (math.atan2, lambda x, y: (y / (x * x + y * y), -x / (x * x + y * y))),
    "copysign": (math.copysign, lambda x, y: (-1, 0)),
    "fmax": (np.fmax, lambda x, y: (1, 0)),
    "fmin": (np.fmin, lambda x, y: (0, 1)),
    "fmod": (np.fmod, lambda x, y: (1, 1)),
    "mod": (lambda x, y: x % y, lambda x, y: (1, 2)),
    "hypot": (math.hypot, lambda x, y: (x / math.hypot(x, y), y / math.hypot(x, y))),
    "maximum": (np.maximum, lambda x, y: (1, 0)),
    "pow": (lambda x, y: x**y, lambda x, y: (y * x ** (y - 1), x**y * math.log(x))),
}


@pytest.mark.parametrize("name", TWO)
def test_functions_of_two_numbers(name):
    f, exact = TWO[name]
    if name in ("mod", "pow"):
        f = njit(f)

    @njit
    def kernel(x):
        return 1.0 * f(x[0], x[1])

    got = jax.jit(jax.grad(differentiable(kernel)))(np.array([1.3, -0.7]))
    close([got], [np.array(exact(1.3, -0.7))], 1e-14)


def test_rounding():
    @njit
    def kernel(x):
        return x[0] * np.rint(x[1]) + x[1] * round(x[0]) + np.round(x[0]) * x[0]

    close([jax.jit(jax.grad(differentiable(kernel)))(np.array([1.3, 2.7]))], [np.array([4.0, 1.0])], 1e-14)


# What is refused, with a sentence


def refused(kernel, match, *arguments, shapes=()):
    with pytest.raises(EnzymeError, match=match):
        jax.jit(lambda *a: differentiable(kernel, *shapes)(*a))(*(arguments or (X,)))


def test_refusals():
    @njit
    def random(x):
        return x[0] * np.random.random()

    @njit
    def printing(x):
        print(x[0])
        return x[0]

    @njit
    def solving(m):
        return np.linalg.solve(m, m)[0, 0]

    @njit
    def array_result(x):
        return x * 2

    @njit
    def recursive(m, n):
        return m[0, 0] if n == 0 else recursive(np.dot(m, m), n - 1)

    @njit
    def of_complex(x):
        return x[0] * 1j

    @njit
    def untypable(x):
        return x.no_such_thing

    refused(random, "calls numba_")
    refused(printing, "needs Python objects")
    refused(solving, "calls numba_", M)
    refused(recursive, "np.dot in a function that calls itself", M, np.array(3))
    refused(array_result, "shape nobody knows")
    refused(array_result, "cannot be", shapes=[(N, 1)])
    refused(of_complex, "dtype complex128")
    refused(untypable, "Numba cannot compile")
    refused(lambda x: x, "no Numba kernel")
    refused(scalars, "dtype complex128", np.array(1j), X, X[0])


def test_library_function_at_an_address():
    import ctypes

    cos = ctypes.CDLL(None).cos
    cos.argtypes, cos.restype = [ctypes.c_double], ctypes.c_double

    @njit
    def kernel(x):
        return cos(x[0])

    refused(kernel, "by its address")


def test_unknown_symbol():
    """Without the check it would be called as it is: a derivative of 0, or a jump to address 0 where nobody has it."""
    from numba import types

    drand48 = types.ExternalFunction("drand48", types.float64())

    @njit
    def kernel(x):
        return drand48() * x[0]

    refused(kernel, "calls drand48, of which there is no LLVM code and no rule")


def test_second_order():
    call = differentiable(njit(ufuncs))
    with pytest.raises(EnzymeError, match="not twice"):
        jax.jit(jax.hessian(call))(X, Y)
    with pytest.raises(EnzymeError, match="not twice"):
        jax.jit(jax.grad(lambda x: jnp.sum(jax.grad(call)(x, Y) ** 2)))(X)


# Exceptions in the kernel


@njit
def raising(x, y):
    s = 0.0
    for i in range(x.size):
        if y[i] < -0.3:
            raise ValueError("negative")
        s += x[i] / y[i]
    return s


@njit
def wrong_shape(x):
    return x[1:] * 2


@njit(boundscheck=True)
def out_of_bounds(x, y):
    return x[x.size] * y[0]


def test_exceptions():
    call = jax.jit(jax.value_and_grad(differentiable(raising)))
    value, gradient = call(X, np.abs(Y))
    close([gradient], [1 / np.abs(Y)])
    check()
    for bad in (-np.abs(Y) - 1, np.zeros(N)):  # its own exception, and Python's division by zero
        value, gradient = call(X, bad)
        assert np.isnan(value) and np.isnan(gradient).all()
        with pytest.raises(EnzymeError, match="raising raised an exception"):
            check()
        check()  # once
    for call in (differentiable(out_of_bounds), lambda x, _: differentiable(wrong_shape, N)(x)):
        assert np.isnan(jax.jit(call)(X, Y)).all()
        with pytest.raises(EnzymeError, match="raised an exception"):
            check()


def test_division_in_numpys_way():
    @njit(error_model="numpy")
    def kernel(x, y):
        return x[0] / y[0]

    assert np.isinf(jax.jit(differentiable(kernel))(X, np.zeros(N)))
    check()


@pytest.mark.parametrize("fastmath", [False, True])
def test_ties(fastmath):
    """At a kink the branch that the code takes counts: fastmath must not make a maximum of it."""

    @njit(fastmath=fastmath)
    def kernel(x):
        s = 0.0
        for i in range(x.size):
            h = x[i] if x[i] > 0 else 0.0
            g = x[i] if x[i] >= 0 else 0.0
            s += 2 * h + 5 * g + 11 * max(0.0, x[i]) + 17 * max(x[i], 0.0)
        return s

    call = differentiable(kernel)
    close([jax.jit(jax.grad(call))(np.array([0.0, 1.0, -1.0]))], [[22.0, 35.0, 0.0]])
    close([jax.jit(jax.jacfwd(call))(np.array([0.0, 1.0, -1.0]))], [[22.0, 35.0, 0.0]])


# Rules


@njit
def triple(x, factor, out):
    for k in range(x.size):
        out[k] = factor * x[k] * x[k]


@njit
def triple_vjp(x, factor, out, xb, outb):
    """Three times the cotangent, so that it shows."""
    for k in range(x.size):
        xb[k] += 3 * 2 * factor * x[k] * outb[k]
        outb[k] = 0


rule(triple, triple_vjp, wrt=("x", "out"))


@njit
def chain(x, y, buffer):
    """A loop whose every step is a call of `triple`, with a number that changes and arrays that are kept."""
    n = len(buffer) - 1
    for k in range(x.size):
        buffer[0, k] = x[k] + y[k]
    for i in range(n):
        triple(buffer[i], 0.5 + 0.25 * i, buffer[i + 1])
    total = 0.0
    for k in range(x.size):
        total += buffer[n, k] * y[k]
    return total


@pytest.mark.parametrize("wrt", [(0,), (1,), (0, 1)])
def test_rule(wrt):
    def plain(x, y):
        x = x + y
        for factor in (0.5, 0.75, 1.0):
            x = factor * x * x
        return (x * y).sum()

    call = differentiable(chain)
    loss, got = jax.jit(jax.value_and_grad(lambda x, y: call(x, y, scratch((4, N))), wrt))(X, Y)
    close([loss], [plain(X, Y)])
    dx, dy = complex_step(plain, [X, Y])
    direct = (np.asarray(X + Y) ** 2 * 0.5) ** 2 * 0.75
    dy = 27 * (dy - direct**2) + direct**2  # y also enters after the last rule
    close(got, [(27 * dx, dy)[k] for k in wrt])


def test_rule_of_data():
    """Nothing comes back where neither is differentiated, and data is not written to."""

    @njit
    def kernel(x, data, buffer):
        triple(data, 2.0, buffer)
        total = 0.0
        for k in range(x.size):
            total += buffer[k] * x[k]
        return total

    data = jnp.asarray(Y)
    close([jax.jit(jax.grad(lambda x: differentiable(kernel)(x, data, scratch(N))))(X)], [2 * Y * Y])
    close([data], [Y])


@njit
def invert(x, kept, out):
    for k in range(x.size):
        kept[k] = out[k] = 1 / x[k]


@njit
def invert_vjp(x, kept, out, xb, outb):
    for k in range(x.size):
        xb[k] -= kept[k] ** 2 * outb[k]
        outb[k] = 0


rule(invert, invert_vjp, wrt=("x", "out"))


def test_rule_with_a_buffer_that_is_not_differentiated():
    """What the way there left in it is what the way back finds."""

    @njit
    def kernel(x, y, kept, buffer):
        invert(x, kept[0], buffer[0])
        for k in range(x.size):
            buffer[1, k] = buffer[0, k] * y[k]
        invert(buffer[1], kept[1], buffer[2])
        return (buffer[2] * x).sum()

    kept, buffer = scratch((2, N), differentiated=False), scratch((3, N))
    x, y = np.abs(X) + 1, np.abs(Y) + 2
    got = jax.jit(jax.grad(lambda x, y: differentiable(kernel)(x, y, kept, buffer), (0, 1)))(x, y)
    close(got, complex_step(lambda x, y: (1 / (1 / x * y) * x).sum(), [x, y]))


def test_rule_is_for_reverse_mode():
    with pytest.raises(EnzymeError, match="forward mode"):
        jax.jvp(lambda x: differentiable(chain)(x, Y, scratch((4, N))), (X,), (X,))


# In JAX


def test_transformations():
    call = differentiable(njit(ufuncs))
    xs = jnp.stack([X, X + 1, X + 2])
    want = np.stack([complex_step(ufuncs, [x, Y])[0] for x in np.asarray(xs)])
    gradient = jax.grad(call)
    close([jax.jit(jax.vmap(gradient, (0, None)))(xs, Y)], [want])
    close([jax.jit(jax.jacfwd(lambda x: call(x, Y)))(X)], want[:1])
    close([gradient(X, Y)], want[:1])  # outside jit too
    close([jax.jit(jax.grad(lambda x: jax.checkpoint(call)(x, Y)))(X)], want[:1])
    summed = jax.jit(jax.grad(lambda xs: jax.lax.scan(lambda s, x: (s + call(x, Y), None), 0.0, xs)[0]))
    close([summed(xs)], [want])


def test_transposed_twice():
    """J v and (J^T)^T v are the same: a solver without a matrix asks JAX for the transpose of a transpose."""

    @njit
    def square(x, out):
        for i in range(x.size):
            out[i] = x[i] * x[i - 1]

    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    _, J = jax.linearize(lambda x: differentiable(square)(x, output(X.shape)), X)
    JT = jax.linear_transpose(J, shape)
    JTT = jax.linear_transpose(lambda w: JT(w)[0], shape)
    v = jnp.cos(X)
    want = v * jnp.roll(X, 1) + X * jnp.roll(v, 1)
    close([J(v), jax.jit(JTT)(v)[0]], [want, want])


def test_recurrence_under_scan():
    """A kernel as the step of a loop in JAX: the derivative goes through the state."""

    @njit
    def step(x, y):
        out = np.empty_like(x)
        for i in range(x.size):
            out[i] = x[i] + 0.1 * (x[i - 1] - x[i]) * x[i] + 0.01 * y[i]
        return out

    def plain(x, y):
        for _ in range(5):
            x = np.array([x[i] + 0.1 * (x[i - 1] - x[i]) * x[i] + 0.01 * y[i] for i in range(N)])
        return (x * x).sum()

    def loss(x, y):
        return jnp.sum(jax.lax.fori_loop(0, 5, lambda _, x: differentiable(step, N)(x, y), x) ** 2)

    both_modes(loss, [X, Y], complex_step(plain, [X, Y]))


def test_float32():
    x, y = X.astype(np.float32), Y.astype(np.float32)
    want = complex_step(ufuncs, [X, Y])
    got = jax.jit(jax.grad(differentiable(njit(ufuncs)), argnums=(0, 1)))(x, y)
    assert got[0].dtype == np.float32
    close(got, want, 1e-5)
    m = M.astype(np.float32)
    close(
        jax.jit(jax.grad(differentiable(njit(dot_matrix_vector)), argnums=(0, 1)))(m, y),
        complex_step(dot_matrix_vector, [M, Y]),
        1e-5,
    )

    @njit
    def summed(x):
        total = 0.0
        for k in range(x.size):
            total += x[k] * x[k]
        return total

    got = jax.grad(lambda x: differentiable(summed)(x).astype(x.dtype))(x)  # a sum in float64 of float32
    assert got.dtype == np.float32
    close([got], [2 * X], 1e-6)


def test_no_leak():
    """Every call frees what the kernel, Enzyme and the rule of the product took: 2 MB a call, which would be seen at once."""

    def resident():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    @njit
    def kernel(m, y):
        s = 0.0
        for k in range(4):
            w = np.dot(m, m) + y[k]
            v = w[1:]
            v *= m[:-1]
            s += v.sum()
        return s

    big = gold(200 * 200).reshape(200, 200)
    call = jax.jit(jax.value_and_grad(differentiable(kernel)))
    for _ in range(20):
        jax.block_until_ready(call(big, Y))
    before = resident()
    for _ in range(200):
        jax.block_until_ready(call(big, Y))
    assert resident() - before < 20e6
