"""What several problems compute in Numba: tanh, which libm makes slow, and copies. It is imported by implementations alone."""

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array


def bitcast(source, target):
    """The bits of a number as another type: Numba has no name for it."""

    @intrinsic
    def cast(typing, x):
        return target(source), lambda context, builder, _, x: builder.bitcast(x[0], context.get_value_type(target))

    return cast


bits, from_bits = bitcast(types.float64, types.int64), bitcast(types.int64, types.float64)


# Reassociated, the rounding to n would fold away: not full fastmath.
@njit(fastmath={"contract", "nnan", "ninf", "nsz"}, error_model="numpy")
def tanh(x):
    """Within 3e-16. libm's takes 15 ns and keeps the loop around it scalar; this one vectorises and takes 2 ns.

    exp 2x = 2^n (q + p) / (q - p) with 2x = n ln 2 + 2r, and p / q = tanh r by Lambert's continued fraction.
    """
    x = min(max(x, -20.0), 20.0)  # 1 - tanh(20) < 1e-17
    k = x * 2.8853900817779268 + 6755399441055744.0  # 1.5 2^52 + n: n stands in the lowest bits
    n = k - 6755399441055744.0
    r = (x - n * 0.34657359026372431) - n * 1.6248338976343925e-11  # ln 2 / 2 in two parts
    y = r * r
    p = r * (1 + y * (4 / 33 + y * (1 / 495)))
    q = 1 + y * (5 / 11 + y * (2 / 99 + y * (1 / 10395)))
    s = from_bits(bits(q + p) + (bits(k) << 52))
    return (s - (q - p)) / (s + (q - p))


@njit(fastmath={"contract", "nnan", "ninf", "nsz"}, error_model="numpy")
def tanh_by_factor(x):
    """The same, but 2^n is a factor of its own: integers carry no derivative, and Enzyme differentiates this one."""
    x = min(max(x, -20.0), 20.0)
    n = np.floor(x * 2.8853900817779268 + 0.5)
    r = (x - n * 0.34657359026372431) - n * 1.6248338976343925e-11
    y = r * r
    p = r * (1 + y * (4 / 33 + y * (1 / 495)))
    q = 1 + y * (5 / 11 + y * (2 / 99 + y * (1 / 10395)))
    s = from_bits((np.int64(n) + 1023) << 52) * (q + p)
    return (s - (q - p)) / (s + (q - p))


@intrinsic
def rows(typing, x, length):
    """The numbers of a C-contiguous array in rows of this length, a view that does not keep x alive. reshape() and ravel() call
    a function in C that asks for all strides: 25 ns of a kernel's call, which on 50 numbers is most of it."""
    view = types.Array(x.dtype, 2, "C")

    def build(context, builder, _, arguments):
        source, out = make_array(x)(context, builder, arguments[0]), make_array(view)(context, builder)
        shape = builder.udiv(source.nitems, arguments[1]), arguments[1]
        strides = builder.mul(arguments[1], source.itemsize), source.itemsize
        populate_array(out, source.data, shape, strides, source.itemsize, None)
        return out._getvalue()

    return view(x, types.intp), build


@njit
def flat(x):
    """The same, in one row."""
    return rows(x, x.size)[0]


@njit(fastmath=True)
def copy(source, target):
    """As loops: assigning an array to a slice compiles for seconds."""
    for i in range(source.shape[0]):
        for j in range(source.shape[1]):
            target[i, j] = source[i, j]
