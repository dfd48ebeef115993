"""Enzyme: Numba kernels differentiated as LLVM IR, by pip alone (Moses and Churavy, NeurIPS 2020).

Numba lowers an ordinary @njit kernel to LLVM IR; an entry point written here calls Enzyme on it; enzyme-ad, a package for
JAX that carries Enzyme and LLVM, compiles the whole and runs it as an XLA custom call:

    loss = differentiable(kernel)               # loss(x, scratch((3, n)), 5): as the kernel, with jax.grad, vjp, jvp, vmap

enzyme-ad's own rules for derivatives are not used: it is asked for a plain call, whose code contains the derivative. So
activity is ours (what is not differentiated gets no shadow), nothing of a tape passes through XLA, and a scalar kernel
gives its value and gradient in one call. A function that the kernel calls may have a reverse rule instead (`rule`). What a
kernel may do is written at `differentiable`; tests/test_enzyme.py shows it. What cannot be done raises EnzymeError with one
sentence, before anything runs.
"""

import ctypes
import inspect
import math
import os
import re
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from types import FunctionType

import numpy as np

from backends import Backend


class EnzymeError(Exception):
    """What Enzyme, or this way to it, cannot do: one sentence."""


@dataclass(frozen=True)
class Slot:
    """An array of the call: an argument (one without axes is a number), a buffer, or what the kernel returns."""

    shape: tuple[int, ...]
    dtype: str
    role: str = "input"  # scratch, kept, output or result
    name: str = ""

    @property
    def bytes(self):
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def real(self):
        return self.dtype.startswith("float")


def scratch(shape, dtype="float64", differentiated=True):
    """A buffer of the kernel's; it holds anything at first. One through which no derivative goes
    (functions with a rule alone write it, or only decisions are made of it) needs none."""
    return Slot(_shape(shape), np.dtype(dtype).name, "scratch" if differentiated else "kept")


def output(shape, dtype="float64"):
    """A buffer that is returned; it holds zeros at first."""
    return Slot(_shape(shape), np.dtype(dtype).name, "output")


def _shape(shape):
    return tuple(int(n) for n in np.atleast_1d(shape))


def differentiable(kernel, *shapes):
    """The @njit kernel as a function of JAX arrays.

    Arguments: arrays and 0-d arrays (scalars for the kernel), tuples of these, `scratch` and `output` buffers, and Python
    numbers, which are compiled in. Integer arrays are never differentiated. The kernel may overwrite everything: it then
    works on a copy. Results: what the kernel returns, numbers and C-contiguous arrays whose shapes are given in order in
    `shapes`, then the output buffers; one alone comes bare. An exception in the kernel gives NaN everywhere in the
    results, and `check` raises.
    """

    def call(*args):
        spec, leaves = _flatten(args)
        program = _program(kernel, spec, shapes)
        for x, slot in zip(leaves, program.inputs, strict=True):
            if slot.name not in program.constant and sum(x is y for y in leaves) > 1:
                raise EnzymeError(
                    f"{program.name} overwrites an argument that is passed twice, which has no meaning for arrays that "
                    "cannot change; pass a copy."
                )
        out = _primal().bind(*leaves, program=program)
        return out[0] if len(out) == 1 else tuple(out)

    return call


def rule(kernel, vjp, wrt):
    """A reverse rule: where a differentiated kernel calls this @njit function, Enzyme does not look into it.

    The function returns nothing; its arguments are arrays, tuples of arrays and numbers. `vjp`, an @njit function too, is
    given the same arguments, and after them the cotangents of the arrays named in `wrt`: it adds to those of what was read
    and clears that of what was written. On the way back numbers are what they were at the call, arrays what they are by
    then; numbers and arrays not named have no derivative. There is no forward rule.
    """
    names = list(inspect.signature(kernel.py_func).parameters)
    _rules[kernel] = vjp, tuple(names.index(name) for name in wrt)


def check():
    """Raises EnzymeError if a kernel raised an exception since the last check."""
    failed = [program.name for program in _programs if program.status.value]
    for program in _programs:
        program.status.value = 0
    if failed:
        raise EnzymeError(f"{failed[0]} raised an exception; call it without differentiating to see which.")


# Numba's LLVM IR of the kernel, and `core`, which calls it


@dataclass(frozen=True)
class Static:
    """A Python number, as text, because 1 == 1.0 == True and 0.0 == -0.0."""

    value: str
    type: type


def _flatten(args):
    """(what the arguments are, the arrays among them)."""
    import jax.numpy as jnp

    leaves = []

    def spec(x):
        if isinstance(x, Slot):
            return x
        if isinstance(x, tuple | list):
            return tuple(spec(y) for y in x)
        if isinstance(x, bool | int | float) and not isinstance(x, np.generic):
            return Static(repr(x), type(x))
        x = jnp.asarray(x)
        leaves.append(x)
        return Slot(x.shape, x.dtype.name)

    return tuple(spec(x) for x in args), leaves


IR_TYPES = {"float64": "double", "float32": "float", "int64": "i64", "int32": "i32", "uint8": "i8", "bool": "i8"}


def _ir_type(dtype, what):
    if dtype not in IR_TYPES:
        raise EnzymeError(f"{what} has the dtype {dtype}; Enzyme is given {', '.join(IR_TYPES)} here.")
    return IR_TYPES[dtype]


class Program:
    """A kernel for arguments of known shapes; `core` is its IR as void(results, buffers, inputs, status)."""

    def __init__(self, kernel, spec, shapes):
        self.name, self.shapes = getattr(kernel, "__name__", str(kernel)), list(shapes)
        self.status = ctypes.c_int32(0)  # written by the compiled code
        for boxed in (False, True):  # 0-d arrays as numbers or, for a kernel that indexes them, as arrays
            self.inputs, self.buffers, loads = [], [], []
            arguments = [self.argument(x, None if boxed else loads) for x in spec]
            try:
                overload = _compile(kernel, tuple(t for t, _ in arguments))
                break
            except EnzymeError:
                if boxed or all(s.shape for s in self.inputs):
                    raise
        values = [v for _, some in arguments for v in some]
        self.results, self.checks, self.copies, self.wrong = [], [], [], "%raised"
        root = self.result(overload.fndesc.restype)
        self.outputs = self.results + [s for s in self.buffers if s.role == "output"]
        # Tells Enzyme what is there, which it cannot always see from the code.
        kinds = {"float64": "Float@double", "float32": "Float@float"}
        about = 'ptr noalias "enzyme_type"="{{[-1]:Pointer, [-1,-1]:{}}}" %{}'
        slots = [about.format(kinds.get(s.dtype, "Integer"), s.name) for s in self.slots]
        inner, types = overload.fndesc.llvm_func_name, ["ptr", "ptr", *(v.split()[0] for v in values)]
        lines = [
            f'declare i32 @"{inner}"({", ".join(types)})',
            f"define void @core({', '.join(slots)}, ptr noalias %status) {{",
            "%ret = alloca ROOT",
            "%exc = alloca ptr",
            *loads,
            f'%code = call i32 @"{inner}"({", ".join(["ptr %ret", "ptr %exc", *values])})',
            "%raised = icmp ne i32 %code, 0",
            *self.checks,
            f"%failed = zext i1 {self.wrong} to i32",
            "store i32 %failed, ptr %status",
            f"br i1 {self.wrong}, label %end, label %copy",
            "copy:",
            *self.copies,
            "br label %end",
            "end:",
            "ret void",
            "}",
        ]
        self.core, constant = _link(self.name, overload, types, "\n".join(lines).replace("ROOT", root))
        self.constant = {s.name for s in self.inputs} & constant

    @property
    def slots(self):
        return [*self.results, *self.buffers, *self.inputs]

    def argument(self, x, loads):
        """Numba's type of an argument, and its values in Numba's calling convention."""
        from numba import from_dtype, types

        if isinstance(x, tuple):
            parts = [self.argument(y, loads) for y in x]
            return types.Tuple([t for t, _ in parts]), [v for _, values in parts for v in values]
        if isinstance(x, Static):
            if x.type is float:
                return types.float64, [f"double 0x{np.float64(x.value).view(np.uint64):016X}"]
            if x.type is bool:
                return types.boolean, [f"i8 {x.value == 'True':d}"]
            return types.int64, [f"i64 {x.value}"]
        dtype, kind = from_dtype(np.dtype(x.dtype)), _ir_type(x.dtype, f"An argument of {self.name}")
        same = self.inputs if x.role == "input" else self.buffers
        slot = replace(x, name=f"{x.role[0]}{len(same)}")
        same.append(slot)
        if x.role == "input" and not x.shape and loads is not None:
            loads.append(f"%{slot.name}v = load {kind}, ptr %{slot.name}")
            return dtype, [f"{kind} %{slot.name}v"]
        size, shape = np.dtype(x.dtype).itemsize, x.shape
        strides = [size * math.prod(shape[k + 1 :]) for k in range(len(shape))]
        words = [f"i64 {n}" for n in (*shape, *strides)]
        head = ["ptr null", "ptr null", f"i64 {math.prod(shape)}", f"i64 {size}", f"ptr %{slot.name}"]
        return types.Array(dtype, len(shape), "C"), head + words

    def result(self, numba_type, path=()):
        """IR type of what the kernel returns; notes how it gets from %ret to the results. ROOT is the whole's type."""
        from numba import types
        from numba.np.numpy_support import as_dtype

        def field(name, *where):
            return f"%{name} = getelementptr ROOT, ptr %ret, i32 0" + "".join(f", i32 {k}" for k in (*path, *where))

        def new(shape, numba_dtype):
            dtype = as_dtype(numba_dtype).name
            kind = _ir_type(dtype, f"A result of {self.name}")
            self.results.append(Slot(shape, dtype, "result", f"r{k}"))
            return kind

        k = len(self.results)
        if isinstance(numba_type, types.NoneType):
            return "ptr"
        if isinstance(numba_type, types.BaseTuple):
            return "{ " + ", ".join(self.result(t, (*path, i)) for i, t in enumerate(numba_type)) + " }"
        if isinstance(numba_type, types.Number | types.Boolean):
            kind = new((), numba_type)
            self.copies += [field(f"p{k}"), f"%v{k} = load {kind}, ptr %p{k}", f"store {kind} %v{k}, ptr %r{k}"]
            return kind
        if isinstance(numba_type, types.Array) and numba_type.layout == "C" and numba_type.ndim:
            if not self.shapes:
                raise EnzymeError(
                    f"{self.name} returns an array whose shape nobody knows before it runs; "
                    "give it, as in differentiable(kernel, (n, n))."
                )
            n, shape = numba_type.ndim, _shape(self.shapes.pop(0))
            new(shape, numba_type.dtype)
            if len(shape) != n:
                raise EnzymeError(f"{self.name} returns an array of {n} axes, whose shape cannot be {shape}.")
            for axis in range(n):
                x = f"{k}x{axis}"
                self.checks += [field(f"s{x}", 5, axis), f"%n{x} = load i64, ptr %s{x}"]
                self.checks += [f"%e{x} = icmp ne i64 %n{x}, {shape[axis]}", f"%w{x} = or i1 {self.wrong}, %e{x}"]
                self.wrong = f"%w{x}"
            copy = f"call void @llvm.memcpy.p0.p0.i64(ptr %r{k}, ptr %d{k}, i64 {self.results[-1].bytes}, i1 false)"
            self.copies += [field(f"q{k}", 4), f"%d{k} = load ptr, ptr %q{k}", copy]
            return f"{{ ptr, ptr, i64, i64, ptr, [{n} x i64], [{n} x i64] }}"
        raise EnzymeError(
            f"{self.name} returns {numba_type}; let it return numbers and C-contiguous arrays, "
            "or write to an output buffer."
        )


@cache
def _program(kernel, spec, shapes):
    program = Program(kernel, spec, shapes)
    _programs.append(program)
    return program


_programs = []
_rules = {}


def _compile(kernel, types):
    """Numba's overload of the kernel, not optimised: that comes before (_optimized) and after differentiating."""
    from numba import config
    from numba.core.errors import NumbaError, UnsupportedBytecodeError
    from numba.core.registry import cpu_target

    if not hasattr(kernel, "overloads"):
        raise EnzymeError(f"{kernel} is no Numba kernel; decorate it with @njit.")
    _ = cpu_target.target_context  # made here, because it optimises ever after as it was told to first
    before = {key: getattr(config, key) for key in ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE")}
    for key, value in before.items():
        setattr(config, key, type(value)(0))
    try:
        kernel.compile(types)
    except (NumbaError, UnsupportedBytecodeError) as e:
        why = next(line for line in str(e).splitlines() if line.strip() and not line.startswith("Failed in nopython"))
        raise EnzymeError(f"Numba cannot compile {kernel.__name__}: {why}") from e
    finally:
        for key, value in before.items():
            setattr(config, key, value)
    return kernel.overloads[types]


def _ir_of(overload):
    """Numba's IR without what Enzyme must not see."""
    text = overload.library.get_llvm_str()
    # References are not counted: all that a call allocates lives until it ends.
    text = re.sub(r"^ *(tail )?call void @NRT_(in|de)cref\(.*\n", "", text, flags=re.M)
    # fastmath lets LLVM make a maximum of h if h > 0 else 0, and at h = 0 Enzyme would take the derivative of the other branch.
    text = re.sub(r"\b(fcmp|select|phi) (?:(?:fast|nnan|ninf|nsz|arcp|contract|afn|reassoc) )+", r"\1 ", text)
    # Where Numba keeps Python objects of a kernel: not here, so that what needs them is found in _link.
    return re.sub(r"^(@\S*_ZN08NumbaEnv\S* = )[^\n]*global ptr null.*", r"\1external global ptr", text, flags=re.M)


def _c_function(name, f, result, *types):
    """A module with a Python function of integers and pointers, by its name in C."""
    from numba import njit

    overload = _compile(njit(fastmath=True)(f), types)
    values = ", ".join(f"{'ptr' if hasattr(t, 'dtype') else IR_TYPES[t.name]} %x{k}" for k, t in enumerate(types))
    done = "ret void" if result == "void" else f"%x = load {result}, ptr %ret\nret {result} %x"
    return (
        _ir_of(overload)
        + f"""
define {result} @{name}({values}) {{
  %ret = alloca i64
  %exc = alloca ptr
  %code = call i32 @"{overload.fndesc.llvm_func_name}"(ptr %ret, ptr %exc, {values})
  {done}
}}"""
    )


# The linked module: kernel, core and Numba's run-time functions, inlined and simplified


# Functions of libm whose derivatives Enzyme knows, tried one by one in tests/test_enzyme.py.
LIBM = {
    name + suffix
    for name in (
        "acos acosh asin asinh atan atan2 atanh cbrt ceil copysign cos cosh erf erfc exp exp2 expm1 fabs floor fmax fmin"
        " fmod hypot log log10 log1p log2 pow rint round sin sinh sqrt tan tanh trunc"
    ).split()
    for suffix in ("", "f")
}
KNOWN = LIBM | {"memcpy", "memset", "memmove", "take", "gemm.double", "gemm.float"}


def _link(name, overload, types, core):
    """(IR of the kernel and its core, as Enzyme wants it, the arguments of core that are only read)."""
    module = _linked(_ruled(_ir_of(overload)), NUMBA + core)
    if "numba_attempt_nocopy_reshape" in {f.name for f in module.functions}:
        module = _linked(str(module), _reshape())
    expected = [str(a.type) for a in module.get_function(overload.fndesc.llvm_func_name).arguments]
    if expected != types:
        raise EnzymeError(
            f"Numba passes the arguments of {name} in a way that is not known here: {', '.join(expected)}."
        )
    # Loops are better left to Enzyme, but some exceptions that cannot happen only vanish with the loops over axes.
    whole = _inlined(module, "core")
    for unroll in (False, True):
        module = _optimized(whole, unroll)
        absent = [x.name for x in (*module.functions, *module.global_variables) if x.is_declaration]
        missing = [x for x in absent if not x.startswith("llvm.") and x not in KNOWN | _glues.keys()]
        if not missing:
            break
    text, why = _text(module), ""
    if any(re.match("Py|_ZN08NumbaEnv", x) for x in missing):
        why = (
            "it needs Python objects at run time, for printing or for an exception whose text is made then; "
            "write that part as loops, or outside the kernel."
        )
    elif missing:
        why = (
            f"it calls {missing[0]}, of which there is no LLVM code and no rule; "
            "write that part as loops, or outside the kernel."
        )
    elif re.search(r"\bcall [^@\n]*? (%[\w.]+|inttoptr \([^)]*\))\(", text):
        why = "it calls a function by its address; call it by its name instead."
    elif any("@gemm." in str(f) for f in module.functions if not f.is_declaration and f.name != "core"):
        why = "it uses np.dot in a function that calls itself; write it as a loop."
    if why:
        raise EnzymeError(f"Enzyme cannot differentiate {name}: {why}")
    arguments = module.get_function("core").arguments
    constant = {a.name for a in arguments if any(re.match(b"read(only|none)", x) for x in a.attributes)}
    return text, constant


def _linked(*texts):
    import llvmlite.binding as llvm

    module, *others = (llvm.parse_assembly(text) for text in texts)
    for other in others:
        module.link_in(other)
    return module


def _inlined(module, name):
    """Its text, with everything to be inlined into the function of this name."""
    for x in (*module.functions, *module.global_variables):
        if not x.is_declaration and x.name != name:
            x.linkage = "internal"
    for f in module.functions:
        if not f.is_declaration and f.name != name and not any(b"noinline" in about for about in f.attributes):
            f.add_function_attribute("alwaysinline")
    return str(module)


def _optimized(text, unroll):
    """LLVM's usual passes, save that nothing is made SIMD: that comes after differentiating."""
    import llvmlite.binding as llvm

    module = llvm.parse_assembly(text)
    options = llvm.create_pipeline_tuning_options(2)
    options.loop_vectorization = options.slp_vectorization = False
    options.loop_unrolling = unroll
    builder = llvm.create_pass_builder(llvm.Target.from_default_triple().create_target_machine(), options)
    builder.getModulePassManager().run(module, builder)
    return module


def _text(module):
    """Without what LLVM wrote about aliasing, in its version 22, which Enzyme's 24 does not read."""
    text = re.sub(r", !(alias\.scope|noalias) !\d+", "", str(module))
    return re.sub(r"^ *(tail )?call void @llvm\.experimental\.noalias\.scope\.decl\(.*\n", "", text, flags=re.M)


@cache
def _reshape():
    """Numba's reshape of an array without a copy, where it is contiguous in C order; else 0, and Numba raises."""
    from numba import types

    def reshape(n, shape, strides, n_new, shape_new, strides_new, size, fortran):
        if fortran != 0:
            return 0
        step = size
        for k in range(n - 1, -1, -1):
            if strides[k] != step and shape[k] != 1:
                return 0
            step *= shape[k]
        step = size
        for k in range(n_new - 1, -1, -1):
            strides_new[k] = step
            step *= shape_new[k]
        return 1

    array = types.intp, types.CPointer(types.intp), types.CPointer(types.intp)
    return _c_function("numba_attempt_nocopy_reshape", reshape, "i32", *array, *array, types.intp, types.int32)


# A product is told by eight words in memory. In the IR below `STORE` with eight values writes them, `LOAD` reads them, and
# `EXTENTS` says how many bytes the three matrices have.
WORDS = ("ta", "tb", "m", "n", "k", "lda", "ldb", "ldc")
LOAD = "".join(
    f"  %{w}.at = getelementptr i64, ptr %s, i64 {i}\n  %{w} = load i64, ptr %{w}.at\n" for i, w in enumerate(WORDS)
)
EXTENTS = """  %a.plain = icmp eq i64 %ta, 110
  %b.plain = icmp eq i64 %tb, 110
  %a.columns = select i1 %a.plain, i64 %k, i64 %m
  %b.columns = select i1 %b.plain, i64 %n, i64 %k
  %a.entries = mul i64 %a.columns, %lda
  %b.entries = mul i64 %b.columns, %ldb
  %c.entries = mul i64 %n, %ldc
  %a.bytes = mul i64 %a.entries, SIZE
  %b.bytes = mul i64 %b.entries, SIZE
  %c.bytes = mul i64 %c.entries, SIZE
"""


def _store(values):
    return "".join(
        f"  %s{i} = getelementptr i64, ptr %s, i64 {i}\n  store i64 {v}, ptr %s{i}\n"
        for i, v in enumerate(values.split())
    )


def _ir(text):
    """The text with its words written out; labels are named b? and b!, whether and what is done."""
    text = text.replace("?", ".if").replace("!", ".do")
    text = text.replace("LOAD\n", LOAD).replace("EXTENTS\n", EXTENTS)
    return re.sub(r"^STORE (.*)\n", lambda m: _store(m[1]), text, flags=re.M)


# Numba's run-time functions, for Enzyme: memory from `take`, all of BLAS as one product, which has a rule.
NUMBA = _ir(r"""
declare noalias nonnull ptr @take(i64) nounwind allocsize(0)
declare void @gemm.double(ptr, ptr, ptr, ptr)
declare void @gemm.float(ptr, ptr, ptr, ptr)
declare void @gemm.complex()
declare void @llvm.trap() noreturn
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)

define noalias ptr @NRT_MemInfo_alloc_aligned(i64 %size, i32 %align) alwaysinline {
  %total = add i64 %size, 64
  %block = call ptr @take(i64 %total)
  %data = getelementptr i8, ptr %block, i64 64
  %word = getelementptr i8, ptr %block, i64 24 ; where Numba looks for the data
  store ptr %data, ptr %word
  ret ptr %block
}

define noalias ptr @NRT_Allocate(i64 %size) alwaysinline {
  %block = call ptr @take(i64 %size)
  ret ptr %block
}

define void @NRT_Free(ptr %block) alwaysinline {
  ret void
}

define void @gemm(i8 %kind, ptr %s, ptr %a, ptr %b, ptr %c) alwaysinline {
  switch i8 %kind, label %other [ i8 100, label %double i8 115, label %float ]
double:
  call void @gemm.double(ptr %s, ptr %a, ptr %b, ptr %c)
  ret void
float:
  call void @gemm.float(ptr %s, ptr %a, ptr %b, ptr %c)
  ret void
other:
  call void @gemm.complex()
  ret void
}

define i32 @numba_xxgemm(i8 %kind, i8 %ta, i8 %tb, i64 %m, i64 %n, i64 %k, ptr %alpha, ptr %a, i64 %lda, ptr %b, i64 %ldb, ptr %beta, ptr %c, i64 %ldc) alwaysinline {
  %s = alloca [8 x i64]
  %ta.word = zext i8 %ta to i64
  %tb.word = zext i8 %tb to i64
STORE %ta.word %tb.word %m %n %k %lda %ldb %ldc
  call void @gemm(i8 %kind, ptr %s, ptr %a, ptr %b, ptr %c)
  ret i32 0
}

define i32 @numba_xxgemv(i8 %kind, i8 %trans, i64 %m, i64 %n, ptr %alpha, ptr %a, i64 %lda, ptr %x, ptr %beta, ptr %y) alwaysinline {
  %s = alloca [8 x i64]
  %trans.word = zext i8 %trans to i64
  %plain = icmp eq i8 %trans, 110
  %rows = select i1 %plain, i64 %m, i64 %n
  %columns = select i1 %plain, i64 %n, i64 %m
STORE %trans.word 110 %rows 1 %columns %lda %columns %rows
  call void @gemm(i8 %kind, ptr %s, ptr %a, ptr %x, ptr %y)
  ret i32 0
}

define i32 @numba_xxdot(i8 %kind, i8 %conjugate, i64 %n, ptr %x, ptr %y, ptr %out) alwaysinline {
  %s = alloca [8 x i64]
STORE 116 110 1 1 %n %n %n 1
  call void @gemm(i8 %kind, ptr %s, ptr %x, ptr %y, ptr %out)
  ret i32 0
}

define void @numba_gil_ensure(ptr %state) alwaysinline {
  ret void
}

define void @numba_gil_release(ptr %state) alwaysinline {
  ret void
}

define void @PyErr_SetString(ptr %kind, ptr %text) alwaysinline {
  ret void
}

define void @Py_FatalError(ptr %text) alwaysinline {
  call void @llvm.trap()
  unreachable
}
""")  # noqa: E501


# Enzyme's entry: what is compiled with the core, and the call of Enzyme


# What is compiled with the core: memory and BLAS. `take` lists its blocks, `end` frees them. One call at a time.
RUNTIME = r"""
@blocks = internal global ptr null
@lock = internal global [64 x i8] zeroinitializer
@only = internal constant [3 x i8] c"-1\00"
@__enzyme_allocation_like = global [4 x ptr] [ptr @take, ptr null, ptr @only, ptr @leave]
declare noalias ptr @malloc(i64)
declare void @free(ptr)
declare i32 @pthread_mutex_lock(ptr)
declare i32 @pthread_mutex_unlock(ptr)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
declare void @__enzyme_autodiff(...)
declare void @__enzyme_fwddiff(...)

define internal noalias nonnull ptr @take(i64 %size) noinline nounwind allocsize(0) {
  %total = add i64 %size, 128
  %block = call ptr @malloc(i64 %total)
  %last = load ptr, ptr @blocks
  store ptr %last, ptr %block
  store ptr %block, ptr @blocks
  %word = ptrtoint ptr %block to i64
  %past = add i64 %word, 127
  %aligned = and i64 %past, -64
  %data = inttoptr i64 %aligned to ptr
  ret ptr %data
}

define internal void @leave(ptr %data) noinline nounwind {
  ret void
}

define internal void @begin() noinline nounwind {
  %x = call i32 @pthread_mutex_lock(ptr @lock)
  ret void
}

define internal void @end() noinline nounwind {
entry:
  br label %next
next:
  %block = load ptr, ptr @blocks
  %empty = icmp eq ptr %block, null
  br i1 %empty, label %done, label %drop
drop:
  %rest = load ptr, ptr %block
  store ptr %rest, ptr @blocks
  call void @free(ptr %block)
  br label %next
done:
  %x = call i32 @pthread_mutex_unlock(ptr @lock)
  ret void
}
"""

# C = op(A) op(B), Fortran order, by the BLAS that Numba itself calls (SciPy's), at its address. The first pointer is to eight
# words, ta, tb, m, n, k, lda, ldb, ldc, because Enzyme passes numbers to a rule in two ways. A, B and the words are kept
# for the reverse pass: the kernel may overwrite them. What is not differentiated is its own shadow: it gets nothing.
GEMM = _ir(r"""
@zero.TYPE = internal constant TYPE 0.0
@one.TYPE = internal constant TYPE 1.0
@__enzyme_register_gradient_TYPE = global [3 x ptr] [ptr @gemm.TYPE, ptr @gemm_keep, ptr @gemm_reverse]

define internal void @blas.TYPE(i1 %add, i64 %ta, i64 %tb, i64 %m, i64 %n, i64 %k, ptr %a, i64 %lda, ptr %b, i64 %ldb, ptr %c, i64 %ldc) noinline {
  %beta = select i1 %add, ptr @one.TYPE, ptr @zero.TYPE
  %ta.8 = trunc i64 %ta to i8
  %tb.8 = trunc i64 %tb to i8
  %x = call i32 inttoptr (i64 ADDRESS to ptr)(i8 KIND, i8 %ta.8, i8 %tb.8, i64 %m, i64 %n, i64 %k, ptr @one.TYPE, ptr %a, i64 %lda, ptr %b, i64 %ldb, ptr %beta, ptr %c, i64 %ldc)
  ret void
}

define internal void @gemm.TYPE(ptr %s, ptr %a, ptr %b, ptr %c) noinline {
LOAD
  call void @blas.TYPE(i1 false, i64 %ta, i64 %tb, i64 %m, i64 %n, i64 %k, ptr %a, i64 %lda, ptr %b, i64 %ldb, ptr %c, i64 %ldc)
  ret void
}

define internal ptr @gemm_keep(ptr %s, ptr %ds, ptr %a, ptr %da, ptr %b, ptr %db, ptr %c, ptr %dc) noinline {
LOAD
EXTENTS
  call void @gemm.TYPE(ptr %s, ptr %a, ptr %b, ptr %c)
  %both = add i64 %a.bytes, %b.bytes
  %bytes = add i64 %both, 128
  %kept = call ptr @malloc(i64 %bytes)
  %kept.a = getelementptr i8, ptr %kept, i64 128
  %kept.b = getelementptr i8, ptr %kept.a, i64 %a.bytes
  call void @llvm.memcpy.p0.p0.i64(ptr %kept, ptr %s, i64 64, i1 false)
  call void @llvm.memcpy.p0.p0.i64(ptr %kept.a, ptr %a, i64 %a.bytes, i1 false)
  call void @llvm.memcpy.p0.p0.i64(ptr %kept.b, ptr %b, i64 %b.bytes, i1 false)
  ret ptr %kept
}

define internal void @gemm_reverse(ptr %_s, ptr %ds, ptr %a, ptr %da, ptr %b, ptr %db, ptr %c, ptr %dc, ptr %s) noinline {
LOAD
EXTENTS
  %kept.a = getelementptr i8, ptr %s, i64 128
  %kept.b = getelementptr i8, ptr %kept.a, i64 %a.bytes
  %ta.not = select i1 %a.plain, i64 116, i64 110
  %tb.not = select i1 %b.plain, i64 116, i64 110
  %quiet = icmp eq ptr %c, %dc
  br i1 %quiet, label %end, label %a?
a?:
  %still.a = icmp eq ptr %a, %da
  br i1 %still.a, label %b?, label %a!
a!:
  br i1 %a.plain, label %a.n, label %a.t
a.n: ; A += C op(B)^T
  call void @blas.TYPE(i1 true, i64 110, i64 %tb.not, i64 %m, i64 %k, i64 %n, ptr %dc, i64 %ldc, ptr %kept.b, i64 %ldb, ptr %da, i64 %lda)
  br label %b?
a.t: ; A += op(B) C^T
  call void @blas.TYPE(i1 true, i64 %tb, i64 116, i64 %k, i64 %m, i64 %n, ptr %kept.b, i64 %ldb, ptr %dc, i64 %ldc, ptr %da, i64 %lda)
  br label %b?
b?:
  %still.b = icmp eq ptr %b, %db
  br i1 %still.b, label %clear, label %b!
b!:
  br i1 %b.plain, label %b.n, label %b.t
b.n: ; B += op(A)^T C
  call void @blas.TYPE(i1 true, i64 %ta.not, i64 110, i64 %k, i64 %n, i64 %m, ptr %kept.a, i64 %lda, ptr %dc, i64 %ldc, ptr %db, i64 %ldb)
  br label %clear
b.t: ; B += C^T op(A)
  call void @blas.TYPE(i1 true, i64 116, i64 %ta, i64 %n, i64 %k, i64 %m, ptr %dc, i64 %ldc, ptr %kept.a, i64 %lda, ptr %db, i64 %ldb)
  br label %clear
clear:
  call void @llvm.memset.p0.i64(ptr %dc, i8 0, i64 %c.bytes, i1 false)
  br label %end
end:
  call void @free(ptr %s)
  ret void
}
""")  # noqa: E501


# A call of a function that has a rule, with pointers alone, the first to its numbers, as above. Numba has compiled it and its
# vjp as it always does. What is not differentiated is its own shadow: its cotangent is zeros, and nobody reads them.
RULE = """
@__enzyme_register_gradient.NAME = global [3 x ptr] [ptr @NAME, ptr @NAME.keep, ptr @NAME.reverse]

define internal void @NAME(ptr %s, DATA) noinline {
  %ret = alloca ptr
  %exc = alloca ptr
NUMBERS  %code = call i32 inttoptr (i64 PRIMAL to ptr)(ptr %ret, ptr %exc, ARGUMENTS)
  ret void
}

define internal ptr @NAME.keep(ptr %s, ptr %ds, BOTH) noinline {
  call void @NAME(ptr %s, DATA)
  %kept = call ptr @malloc(i64 BYTES)
  call void @llvm.memcpy.p0.p0.i64(ptr %kept, ptr %s, i64 BYTES, i1 false)
  ret ptr %kept
}

define internal void @NAME.reverse(ptr %_s, ptr %_ds, BOTH, ptr %s) noinline {
  %ret = alloca ptr
  %exc = alloca ptr
NUMBERSSPARE  %code = call i32 inttoptr (i64 VJP to ptr)(ptr %ret, ptr %exc, ARGUMENTS, COTANGENTS)
FREE  call void @free(ptr %s)
  ret void
}
"""
SPARE = """  %bytes{k} = mul i64 %x{items}, %x{size}
  %spare{k} = call ptr @malloc(i64 %bytes{k})
  call void @llvm.memset.p0.i64(ptr %spare{k}, i8 0, i64 %bytes{k}, i1 false)
  %still{k} = icmp eq ptr %x{k}, %dx{k}
  %c{k} = select i1 %still{k}, ptr %spare{k}, ptr %dx{k}
"""
IN_CORE = """
declare void @NAME(POINTERS)

define void @NAME.call(ALL) alwaysinline {
  %s = alloca [COUNT x i64]
STORED  call void @NAME(ptr %s, DATA)
  ret void
}
"""


@dataclass(frozen=True)
class Glue:
    """A rule for arguments of some types."""

    name: str
    core: str  # IR by which a kernel calls it, with what Numba passes
    code: str  # IR of what is called there
    compiled: tuple  # Numba's, kept so that its code stays where it is


_glues = {}


def _passed(x):
    """What Numba passes for an argument of this type, in order: IR types, each with "data", "number" or "null"."""
    from numba import types

    if isinstance(x, types.Array):
        head = [("ptr", "null"), ("ptr", "null"), ("i64", "number"), ("i64", "number"), ("ptr", "data")]
        return head + [("i64", "number")] * (2 * x.ndim)
    if isinstance(x, types.BaseTuple):
        return [value for part in x.types for value in _passed(part)]
    if str(x) in IR_TYPES:
        return [(IR_TYPES[str(x)], "number")]
    raise EnzymeError(f"A function with a rule takes arrays, tuples of them and numbers, not {x}.")


def anew(kernel, made=None):
    """The function and all that it calls, to be compiled as Numba does by itself: of what was compiled once, not optimised, for
    a kernel, Numba would take the code that is there."""
    from numba import jit
    from numba.core.dispatcher import Dispatcher

    made = {} if made is None else made
    if kernel not in made:
        f = kernel.py_func
        called = {name: f.__globals__.get(name) for name in f.__code__.co_names}
        scope = {name: anew(x, made) for name, x in called.items() if isinstance(x, Dispatcher)}
        copy = FunctionType(f.__code__, f.__globals__ | scope, f.__name__, f.__defaults__, f.__closure__)
        made[kernel] = jit(**kernel.targetoptions)(copy)
    return made[kernel]


@cache
def _glue(kernel, types):
    (vjp, wrt), made = _rules[kernel], {}
    passed = [_passed(x) for x in types]
    starts, flat = np.cumsum([0, *map(len, passed)]), [value for some in passed for value in some]
    data, numbers = ([k for k, (_, what) in enumerate(flat) if what == which] for which in ("data", "number"))

    def values(ks, cotangent=False):
        names = {"null": "null", "number": "%x{}", "data": "%c{}" if cotangent else "%x{}"}
        return ", ".join(f"{flat[k][0]} {names[flat[k][1]].format(k)}" for k in ks)

    def each_number(line):
        at = "  %s{k} = getelementptr i64, ptr %s, i64 {j}\n  " + line + "\n"
        return "".join(at.format(j=j, k=k, type=flat[k][0]) for j, k in enumerate(numbers))

    def compiled(kernel, types):
        kernel = anew(kernel, made)
        kernel.compile(types)
        return kernel.overloads[types]

    def address(overload):
        return str(overload.library.get_pointer_to_function(overload.fndesc.llvm_func_name))

    name, cotangents = f"rule.{len(_glues)}", [k for w in wrt for k in range(starts[w], starts[w + 1])]
    functions = compiled(kernel, types), compiled(vjp, (*types, *(types[w] for w in wrt)))
    spare = [{"items": k - 2, "size": k - 1, "k": k} for k in cotangents if flat[k][1] == "data"]
    words = {
        "NAME": name,
        "DATA": values(data),
        "BOTH": ", ".join(f"ptr %x{k}, ptr %dx{k}" for k in data),
        "NUMBERS": each_number("%x{k} = load {type}, ptr %s{k}"),
        "STORED": each_number("store {type} %x{k}, ptr %s{k}"),
        "COUNT": str(len(numbers)),
        "BYTES": str(8 * len(numbers)),
        "PRIMAL": address(functions[0]),
        "VJP": address(functions[1]),
        "ARGUMENTS": values(range(len(flat))),
        "COTANGENTS": values(cotangents, cotangent=True),
        "SPARE": "".join(SPARE.format(**x) for x in spare),
        "FREE": "".join("  call void @free(ptr %spare{k})\n".format(**x) for x in spare),
        "POINTERS": ", ".join(["ptr"] * (1 + len(data))),
        "ALL": ", ".join(f"{kind} %x{k}" for k, (kind, _) in enumerate(flat)),
    }
    core, code = (re.sub("|".join(sorted(words, reverse=True)), lambda m: words[m[0]], x) for x in (IN_CORE, RULE))
    _glues[name] = Glue(name, core, code, functions)
    return _glues[name]


def _ruled(text):
    """A kernel's IR in which calls of functions that have a rule go there."""
    glues = []
    for kernel in _rules:
        for types, overload in list(kernel.overloads.items()):
            call = rf'(%\S+) = call i32 @"?{re.escape(overload.fndesc.llvm_func_name)}"?\(ptr [^,]+, ptr [^,]+, (.*)\)'
            if re.search(call, text):
                glues.append(_glue(kernel, types))
                text = re.sub(call, rf"call void @{glues[-1].name}.call(\2)\n  \1 = add i32 0, 0", text)
    return text + "".join(glue.core for glue in glues)


@cache
def _gemm_loops(kind):
    """The same as loops: in forward mode Enzyme (enzyme-ad 0.0.16) takes no rule for a function that returns nothing, but it
    differentiates this."""
    from numba import types

    def gemm(s, a, b, c):
        ta, tb, m, n, k, lda, ldb, ldc = s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]
        ai, ak = (1, lda) if ta == 110 else (lda, 1)
        bk, bj = (1, ldb) if tb == 110 else (ldb, 1)
        for j in range(n):
            for i in range(m):
                x = 0 * a[0]
                for p in range(k):
                    x += a[i * ai + p * ak] * b[p * bk + j * bj]
                c[i + j * ldc] = x

    real = types.CPointer(types.float64 if kind == "double" else types.float32)
    text = _c_function(f"gemm.{kind}", gemm, "void", types.CPointer(types.int64), real, real, real)
    return _text(_optimized(_inlined(_linked(text), f"gemm.{kind}"), False))


def _entry(program, mode, active):
    """(IR, shapes that come out) of one mode: primal; forward (also tangents in and out); reverse (cotangents in, the
    gradients of the active inputs out). It is void(result, options, parameters, buffers, status, profile), XLA's convention
    for compiled code."""
    reals = [s for s in program.outputs if s.real]
    changed = [program.inputs[k] for k in active]
    out = {"primal": [], "forward": reals, "reverse": changed}[mode]
    into = {"primal": [], "forward": changed, "reverse": reals}[mode]
    results = [s.name for s in program.outputs] + [f"d{s.name}" for s in out]
    names = results + [f"in.{s.name}" for s in program.inputs] + [f"in.d{s.name}" for s in into]
    lines = []
    for k, name in enumerate(names):
        lines += [f"%at.{name} = getelementptr ptr, ptr %buffers, i64 {k}", f"%{name} = load ptr, ptr %at.{name}"]
    lines += ["%status = alloca i32", "call void @begin()"]

    def fill(name, slot, byte=0):
        lines.append(f"call void @llvm.memset.p0.i64(ptr %{name}, i8 {byte}, i64 {slot.bytes}, i1 false)")

    def pointer(name, slot, zero):
        """Where it is: with XLA, or in a block of the call's own where the kernel or Enzyme would overwrite what XLA gave."""
        given = f"in.{name}"
        if given in names and slot.name in program.constant:
            return given
        if name not in names:
            lines.append(f"%{name} = call ptr @take(i64 {slot.bytes})")
        if given in names:
            lines.append(f"call void @llvm.memcpy.p0.p0.i64(ptr %{name}, ptr %{given}, i64 {slot.bytes}, i1 false)")
        elif zero:
            fill(name, slot)
        return name

    primal, words = [], []
    for slot in program.slots:
        data = pointer(slot.name, slot, slot.role == "output")
        primal.append(f"ptr %{data}")
        varies = slot.real and slot.role != "kept" and (slot.name not in program.constant or slot in changed)
        if mode != "primal" and varies:
            words.append(f'metadata !"enzyme_dup", ptr %{data}, ptr %{pointer(f"d{slot.name}", slot, True)}')
        else:
            words.append(f'metadata !"enzyme_const", ptr %{data}')
    if mode == "primal":
        lines.append(f"call void @core({', '.join(primal)}, ptr %status)")
    else:
        # Without the flag, a pointer to this array or that, one of them not differentiated, gets its gradient written into
        # the other's data: silently wrong.
        words = ["ptr @core", 'metadata !"enzyme_runtime_activity"', *words, 'metadata !"enzyme_const", ptr %status']
        lines.append(f"call void (...) @__enzyme_{'fwddiff' if mode == 'forward' else 'autodiff'}({', '.join(words)})")
    lines += [
        "call void @end()",
        "%code = load i32, ptr %status",
        "%failed = icmp ne i32 %code, 0",
        "br i1 %failed, label %failure, label %done",
        "failure:",
        f"store volatile i32 1, ptr inttoptr (i64 {ctypes.addressof(program.status)} to ptr)",
    ]
    for name, slot in zip(results, [*program.outputs, *out], strict=True):
        fill(name, slot, -1)  # every bit 1: NaN
    lines += ["br label %done", "done:", "ret void", "}"]
    head = "define void @entry_point(ptr %_0, ptr %_1, ptr %_2, ptr %buffers, ptr %_4, ptr %_5) {"
    text = _assemble(program.core, "\n".join([head, *lines]), mode)
    return text, [(s.shape, s.dtype) for s in [*program.outputs, *out]]


def _assemble(core, entry, mode):
    """The whole module, for this machine's processor."""
    import llvmlite.binding as llvm

    runtime = RUNTIME
    for kind, size in (("double", 8), ("float", 4)):
        if f"@gemm.{kind}(" not in core:
            continue
        if mode == "forward":
            core = str(_linked(core, _gemm_loops(kind)))
            continue
        from numba.np.linalg import ensure_blas

        ensure_blas()
        words = {"TYPE": kind, "KIND": ord("d" if kind == "double" else "s"), "SIZE": size}
        words["ADDRESS"] = llvm.address_of_symbol("numba_xxgemm")
        runtime += re.sub("|".join(words), lambda m: str(words[m[0]]), GEMM)
    for glue in _glues.values():
        if f"@{glue.name}(" not in core:
            continue
        if mode == "forward":
            raise EnzymeError("A function with a rule is called, which has none for forward mode; use reverse mode.")
        runtime += glue.code
    there = {m for m in re.findall(r"^(?:define|declare) [^@\n]*@([\w.]+)\(", runtime, re.M)}
    core = re.sub(r"^declare [^@\n]*@([\w.]+)\(.*\n", lambda m: "" if m[1] in there else m[0], core, flags=re.M)
    core = core.replace("define void @core(", "define internal void @core(")
    core = re.sub(r"\bnoinline\b", '"noinline"', core)  # Enzyme adds alwaysinline, and LLVM aborts on both
    features = ",".join(f for f in llvm.get_host_cpu_features().flatten().split(",") if f.startswith("+"))
    target = f'"target-features"="{features}" "tune-cpu"="{llvm.get_host_cpu_name()}" {{'
    return re.sub(r"^(define .*)\{$", lambda m: m[1] + target, core + runtime + entry, flags=re.M)


# The compiled call, as a primitive of JAX


@contextmanager
def _complaints(name):
    """Enzyme writes what it cannot do to the standard error, and goes on or fails without a word: make it an exception."""
    import sys

    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
            failure = None
        except (ValueError, RuntimeError) as e:
            failure = e
        finally:
            os.dup2(before, 2)
            os.close(before)
        file.seek(0)
        text = file.read().decode(errors="replace")
    errors = re.findall(r"^(?:error: .*|warning: .*assumed zero.*)", text, re.M)
    if failure or errors:
        why = re.sub(r"^\w+: (<unknown>:0:0: )?", "", errors[0]) if errors else str(failure)
        raise EnzymeError(f"Enzyme cannot differentiate {name}: {why}") from failure


def _bind(*arrays, program, mode, active=()):
    """The compiled call, as enzyme-ad's primitive."""
    import jax
    from enzyme_ad.jax.primitives import LANG_LLVM, XLAPipeline, ffi_call

    source, shapes = _entry(program, mode, active)
    out = [jax.core.ShapedArray(shape, np.dtype(dtype)) for shape, dtype in shapes]
    return ffi_call(
        *arrays,
        out_shapes=out,
        source=source,
        fn="entry_point",
        argv=("-O3",),
        lang=LANG_LLVM,
        pipeline_options=XLAPipeline(),
    )


def _pick(items, which):
    return [items[k] for k in which]


@cache
def _primal():
    """The primitive for a kernel's call. Its tangent is a linear primitive of its own, whose transpose is the reverse pass;
    where JAX asks for a vjp of one number, one call gives the number and the gradient."""
    import jax
    import jax.numpy as jnp
    from jax._src.interpreters.ad import primitive_linearizations
    from jax.extend.core import Primitive
    from jax.interpreters import ad, batching, mlir

    primal, tangent, pullback = (Primitive(f"enzyme_{name}") for name in ("primal", "tangent", "pullback"))

    def define(primitive, bind, avals):
        def lowering(context, *arrays, program, **params):
            with _complaints(program.name):
                return mlir.lower_fun(partial(bind, program=program, **params), multiple_results=True)(context, *arrays)

        def batch(arrays, axes, **params):
            """One after the other: Enzyme differentiates the kernel as it is."""
            mapped = [jnp.moveaxis(a, axis, 0) for a, axis in zip(arrays, axes, strict=True) if axis is not None]

            def one(moving):
                moving = iter(moving)
                whole = (a if axis is None else next(moving) for a, axis in zip(arrays, axes, strict=True))
                return primitive.bind(*whole, **params)

            out = jax.lax.map(one, mapped)
            return out, [0] * len(out)

        primitive.multiple_results = True
        primitive.def_impl(lambda *arrays, **params: jax.jit(partial(primitive.bind, **params))(*arrays))
        primitive.def_abstract_eval(lambda *arrays, **params: [jax.core.ShapedArray(*a) for a in avals(**params)])
        mlir.register_lowering(primitive, lowering, platform="cpu")
        batching.primitive_batchers[primitive] = batch

    def aval(slot):
        return slot.shape, np.dtype(slot.dtype)

    def outputs(program):
        return [aval(s) for s in program.outputs]

    def reals(program):
        return [k for k, s in enumerate(program.outputs) if s.real]

    def forward(*arrays, program, active):  # inputs, tangents of the active ones -> tangents of the real outputs
        return _bind(*arrays, program=program, mode="forward", active=active)[len(program.outputs) :]

    define(primal, partial(_bind, mode="primal"), outputs)
    define(tangent, forward, lambda program, active: [aval(program.outputs[k]) for k in reals(program)])
    define(
        pullback,  # inputs, cotangents of the real outputs -> outputs, gradients of the active inputs
        partial(_bind, mode="reverse"),
        lambda program, active: outputs(program) + [aval(program.inputs[k]) for k in active],
    )

    def zeros(program):
        return [ad.Zero(jax.core.ShapedArray(*aval(s)).to_tangent_aval()) for s in program.outputs]

    def with_tangents(program, some):
        tangents = zeros(program)
        for k, t in zip(reals(program), some, strict=True):
            tangents[k] = t
        return tangents

    def jvp(inputs, tangents, program):
        active = tuple(k for k, t in enumerate(tangents) if type(t) is not ad.Zero)
        out = primal.bind(*inputs, program=program)
        if not active or not reals(program):
            return out, zeros(program)
        some = tangent.bind(*inputs, *_pick(tangents, active), program=program, active=active)
        return out, with_tangents(program, some)

    def transpose(cotangents, *arrays, program, active):
        inputs = arrays[: len(program.inputs)]
        cotangents = [ad.instantiate_zeros(c) for c in cotangents]
        gradients = pullback.bind(*inputs, *cotangents, program=program, active=active)[len(program.outputs) :]
        return [None] * len(inputs) + list(gradients)

    def transpose_back(cotangents, *arrays, program, active):
        """The transpose of the vjp is the jvp: solvers that are given a transposed matrix ask for it."""
        inputs = arrays[: len(program.inputs)]
        tangents = [ad.instantiate_zeros(c) for c in cotangents[len(program.outputs) :]]
        return [None] * len(inputs) + tangent.bind(*inputs, *tangents, program=program, active=active)

    def linearize(is_vjp, nonzero, *inputs, program):
        active = tuple(k for k, some in enumerate(nonzero) if some)
        number = is_vjp and [s.shape for s in program.outputs] == [()] and program.outputs[0].real
        if number:
            one = jnp.ones((), program.outputs[0].dtype)
            out, *gradients = pullback.bind(*inputs, one, program=program, active=active)

            def linear(gradients, *tangents):
                total = sum(jnp.sum(g * t) for g, t in zip(gradients, _pick(tangents, active), strict=True))
                return [jnp.asarray(total, one.dtype)]

            return [out], [True], gradients, linear

        def linear(inputs, *tangents):
            some = tangent.bind(*inputs, *_pick(tangents, active), program=program, active=active)
            return with_tangents(program, some)

        nonzero = [k in reals(program) for k in range(len(program.outputs))]
        return primal.bind(*inputs, program=program), nonzero, inputs, linear

    def once(*_, program, **params):
        raise EnzymeError(f"{program.name} is differentiated already; Enzyme differentiates it once here, not twice.")

    ad.primitive_jvps[primal] = jvp
    ad.primitive_jvps[tangent] = ad.primitive_jvps[pullback] = once
    ad.primitive_transposes[tangent] = transpose
    ad.primitive_transposes[pullback] = transpose_back
    primitive_linearizations[primal] = linearize
    return primal


# The backend


class Enzyme(Backend):
    namespace = {}  # Numba knows NumPy by its name
    requires = ("enzyme-ad", "absl-py", "jax", "jaxlib", "numba", "llvmlite", "numpy", "scipy")

    @staticmethod
    def environ(threads):
        flags = "" if threads > 1 else "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        return {
            "NUMBA_CACHE_DIR": "",
            # What Enzyme keeps for the reverse pass is freed after each call. glibc then gives it back to the kernel, and the
            # page faults of the next call are half of its time (shallow_ice.ude, N = 32).
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TRIM_THRESHOLD_": "2147483647",
            "NPROC": str(max(threads, 2)),  # threads of XLA's pool: with one, pure_callback can wait for ever (see jax)
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_X64": "1",
            "JAX_ENABLE_COMPILATION_CACHE": "0",
            "XLA_FLAGS": flags,
        }

    def __init__(self, device):
        import enzyme_ad.jax  # noqa: F401 - to fail here, not in the middle of a cell
        import jax.flatten_util
        import numba  # noqa: F401

        self.jax = jax

    def as_is(self, statement, loss):
        """Every function of it under @njit, and a kernel of plain arguments that makes its dicts."""
        from numba import njit

        for name, f in list(vars(statement).items()):
            if isinstance(f, FunctionType):
                setattr(statement, name, njit(f))

        def call(theta, data, size):
            # a dict of unlike values is a struct to Numba, and None is unlike any other
            dicts = ["{" + ", ".join([*(f"{n!r}: {n}" for n in arrays), "'': None"]) + "}" for arrays in (theta, data)]
            source = f"def kernel({', '.join((*theta, *data))}):\n    return {loss.__name__}({', '.join(dicts)}, size)"
            exec(source, scope := vars(statement) | {"size": size})
            return differentiable(njit(scope["kernel"]))(*theta.values(), *data.values())

        return call

    def put(self, array):
        return self.jax.device_put(array)

    def get(self, array):
        return self.jax.device_get(array)

    def wait(self, result):
        result = self.jax.block_until_ready(result)
        check()
        return result

    def primal(self, loss):
        return self.jax.jit(loss)

    def reverse(self, loss):
        return self.jax.jit(self.jax.value_and_grad(loss))

    def implicit(self, loss):
        return self.reverse(loss)

    def implicit_primal(self, loss):
        """Of the loss by the rule, which is what is differentiated."""
        return self.primal(loss)

    def forward(self, loss):
        jax = self.jax

        def derivative(theta, data):
            flat, unflatten = jax.flatten_util.ravel_pytree(theta)

            def entry(k):
                direction = jax.numpy.zeros_like(flat).at[k].set(1)
                return jax.jvp(lambda x: loss(unflatten(x), data), (flat,), (direction,))[1]

            return loss(theta, data), unflatten(jax.lax.map(entry, jax.numpy.arange(flat.size)))

        return jax.jit(derivative)


BACKEND = Enzyme
