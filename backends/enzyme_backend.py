"""Enzyme: Numba kernels differentiated as LLVM IR, by pip alone (Moses and Churavy, NeurIPS 2020).

Numba lowers an ordinary @njit kernel to LLVM IR; an entry point written here calls Enzyme on it; enzyme-ad, a package for
JAX that carries Enzyme and LLVM, compiles the whole and runs it as an XLA custom call:

    loss = differentiable(kernel)               # loss(x, scratch((3, n)), 5): as the kernel, with jax.grad, vjp, jvp, vmap

enzyme-ad's own rules for derivatives are not used: it is asked for a plain call, whose code contains the derivative. So
activity is ours (what is not differentiated gets no shadow), nothing of a tape passes through XLA, and a scalar kernel
gives its value and gradient in one call. What a kernel may do is written at `differentiable`; tests/test_enzyme.py shows
it. What cannot be done raises EnzymeError with one sentence, before anything runs.
"""

import ctypes
import math
import os
import re
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType

import numpy as np

from backends import Backend


class EnzymeError(Exception):
    """What Enzyme, or this way to it, cannot do: one sentence."""


@dataclass(frozen=True)
class Buffer:
    """An array argument that belongs to the call: `scratch` holds anything, `output` zeros at first and is returned."""

    shape: tuple[int, ...]
    dtype: str = "float64"
    returned: bool = False


def _shape(shape):
    return tuple(int(n) for n in np.atleast_1d(shape))


def scratch(shape, dtype="float64"):
    return Buffer(_shape(shape), np.dtype(dtype).name)


def output(shape, dtype="float64"):
    return Buffer(_shape(shape), np.dtype(dtype).name, returned=True)


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
        for x in (x for x, mutated in zip(leaves, program.mutated, strict=True) if mutated):
            if sum(x is y for y in leaves) > 1:
                raise EnzymeError(
                    f"{program.name} overwrites an argument that is passed twice, which has no meaning for arrays that "
                    "cannot change; pass a copy."
                )
        out = _primal().bind(*leaves, program=program)
        return out[0] if len(out) == 1 else tuple(out)

    return call


def check():
    """Raises EnzymeError if a kernel raised an exception since the last check."""
    failed = [program.name for program in _programs if program.status.value]
    for program in _programs:
        program.status.value = 0
    if failed:
        raise EnzymeError(f"{failed[0]} raised an exception; call it without differentiating to see which.")


# The kernel's LLVM IR


@dataclass(frozen=True)
class Number:
    """A scalar argument at run time (a 0-d array)."""

    dtype: str


@dataclass(frozen=True)
class Array:
    shape: tuple[int, ...]
    dtype: str


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
        if isinstance(x, Buffer):
            return x
        if isinstance(x, tuple | list):
            return tuple(spec(y) for y in x)
        if isinstance(x, bool | int | float) and not isinstance(x, np.generic):
            return Static(repr(x), type(x))
        x = jnp.asarray(x)
        leaves.append(x)
        return Array(x.shape, x.dtype.name) if x.ndim else Number(x.dtype.name)

    return tuple(spec(x) for x in args), leaves


IR_TYPES = {"float64": "double", "float32": "float", "int64": "i64", "int32": "i32", "uint8": "i8", "bool": "i8"}


def _ir_type(dtype, what):
    if dtype not in IR_TYPES:
        raise EnzymeError(f"{what} has the dtype {dtype}; Enzyme is given {', '.join(IR_TYPES)} here.")
    return IR_TYPES[dtype]


@dataclass
class Slot:
    """One pointer of `core`: a result, a buffer or an argument."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self):
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def attribute(self):
        """Tells Enzyme what is there, which it cannot always see from the code."""
        what = {"float64": "Float@double", "float32": "Float@float"}.get(self.dtype, "Integer")
        return f'"enzyme_type"="{{[-1]:Pointer, [-1,-1]:{what}}}"'

    @property
    def real(self):
        return self.dtype.startswith("float")


class Program:
    """A kernel for arguments of known shapes: `core`, its IR as void(results, buffers, arguments, status)."""

    def __init__(self, kernel, spec, shapes):
        self.name = getattr(kernel, "__name__", str(kernel))
        self.status = ctypes.c_int32(0)  # written by the compiled code
        self.inputs, self.buffers, self.results = [], [], []
        self.core = _Core(self, kernel, spec, list(shapes)).text
        declared = re.sub(r'"[^"]*"="[^"]*"', "", re.search(r"^define[^\n]* @core\(([^\n]*)", self.core, re.M)[1])
        reads = {
            name for about, name in re.findall(r"ptr ([^%]*)%(\w+)", declared) if re.search("read(only|none)", about)
        }
        self.mutated = [x.name not in reads for x in self.inputs]
        self.outputs = self.results + [b for b, returned in self.buffers if returned]


@cache
def _program(kernel, spec, shapes):
    program = Program(kernel, spec, shapes)
    _programs.append(program)
    return program


_programs = []


class _Core:
    """Writes `core`, which calls the kernel with Numba's own conventions."""

    def __init__(self, program, kernel, spec, shapes):
        self.program, self.shapes = program, list(shapes)
        self.checks, self.wrong, self.copies = [], [], []
        for boxed in (False, True):  # 0-d arrays as numbers or, for a kernel that indexes them, as arrays
            self.loads, self.boxed = [], boxed
            program.inputs, program.buffers = [], []
            arguments = [self.argument(x) for x in spec]
            try:
                overload = _compile(kernel, tuple(t for t, _ in arguments))
                break
            except EnzymeError:
                if boxed or not any(not s.shape for s in program.inputs):
                    raise
        values = [v for _, some in arguments for v in some]
        root = self.result(overload.fndesc.restype)
        wrong = "%raised"
        for k, one in enumerate(self.wrong):
            self.checks.append(f"%w{k} = or i1 {wrong}, {one}")
            wrong = f"%w{k}"
        slots = [*program.results, *(b for b, _ in program.buffers), *program.inputs]
        inner, arguments = overload.fndesc.llvm_func_name, ", ".join(["ptr %ret", "ptr %exc", *values])
        lines = [
            f"define void @core({', '.join(f'ptr noalias {s.attribute} %{s.name}' for s in slots)}, ptr noalias %status) {{",
            "%ret = alloca ROOT",
            "%exc = alloca ptr",
            *self.loads,
            f'%code = call i32 @"{inner}"({arguments})',
            "%raised = icmp ne i32 %code, 0",
            *self.checks,
            f"%failed = zext i1 {wrong} to i32",
            "store i32 %failed, ptr %status",
            f"br i1 {wrong}, label %end, label %copy",
            "copy:",
            *self.copies,
            "br label %end",
            "end:",
            "ret void",
            "}",
        ]
        self.text = _simplify(program.name, overload.library.get_llvm_str(), "\n".join(lines).replace("ROOT", root))

    def argument(self, x):
        """Numba's type of an argument, and its values in Numba's calling convention."""
        from numba import from_dtype, types

        if isinstance(x, tuple):
            parts = [self.argument(y) for y in x]
            return types.Tuple([t for t, _ in parts]), [v for _, values in parts for v in values]
        if isinstance(x, Static):
            if x.type is float:
                return types.float64, [f"double 0x{np.float64(x.value).view(np.uint64):016X}"]
            return (
                (types.boolean, [f"i8 {x.value == 'True':d}"]) if x.type is bool else (types.int64, [f"i64 {x.value}"])
            )
        dtype = from_dtype(np.dtype(x.dtype))
        kind = _ir_type(x.dtype, f"An argument of {self.program.name}")
        if isinstance(x, Buffer):
            slot = Slot(f"b{len(self.program.buffers)}", x.shape, x.dtype)
            self.program.buffers.append((slot, x.returned))
        else:
            slot = Slot(f"a{len(self.program.inputs)}", getattr(x, "shape", ()), x.dtype)
            self.program.inputs.append(slot)
        if isinstance(x, Number) and not self.boxed:
            self.loads.append(f"%{slot.name}v = load {kind}, ptr %{slot.name}")
            return dtype, [f"{kind} %{slot.name}v"]
        size, shape = np.dtype(x.dtype).itemsize, slot.shape
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

        k, results = len(self.program.results), self.program.results
        what = f"A result of {self.program.name}"
        if isinstance(numba_type, types.NoneType):
            return "ptr"
        if isinstance(numba_type, types.BaseTuple):
            return "{ " + ", ".join(self.result(t, (*path, i)) for i, t in enumerate(numba_type)) + " }"
        if isinstance(numba_type, types.Number | types.Boolean):
            dtype = as_dtype(numba_type).name
            kind = _ir_type(dtype, what)
            results.append(Slot(f"r{k}", (), dtype))
            self.copies += [field(f"p{k}"), f"%v{k} = load {kind}, ptr %p{k}", f"store {kind} %v{k}, ptr %r{k}"]
            return kind
        if isinstance(numba_type, types.Array) and numba_type.layout == "C" and numba_type.ndim:
            if not self.shapes:
                raise EnzymeError(
                    f"{self.program.name} returns an array whose shape nobody knows before it runs; "
                    "give it, as in differentiable(kernel, (n, n))."
                )
            n, shape, dtype = numba_type.ndim, _shape(self.shapes.pop(0)), as_dtype(numba_type.dtype).name
            _ir_type(dtype, what)
            if len(shape) != n:
                raise EnzymeError(f"{self.program.name} returns an array of {n} axes, whose shape cannot be {shape}.")
            results.append(Slot(f"r{k}", shape, dtype))
            for axis in range(n):
                name = f"{k}x{axis}"
                self.checks += [field(f"s{name}", 5, axis), f"%n{name} = load i64, ptr %s{name}"]
                self.checks += [f"%e{name} = icmp ne i64 %n{name}, {shape[axis]}"]
                self.wrong.append(f"%e{name}")
            copy = f"call void @llvm.memcpy.p0.p0.i64(ptr %r{k}, ptr %d{k}, i64 {results[-1].bytes}, i1 false)"
            self.copies += [field(f"q{k}", 4), f"%d{k} = load ptr, ptr %q{k}", copy]
            return f"{{ ptr, ptr, i64, i64, ptr, [{n} x i64], [{n} x i64] }}"
        raise EnzymeError(
            f"{self.program.name} returns {numba_type}; let it return numbers and C-contiguous arrays, "
            "or write to an output buffer."
        )


def _compile(kernel, types):
    """Numba's overload of the kernel, not optimised: that comes before (_optimize) and after differentiating."""
    from numba import config
    from numba.core.errors import NumbaError, UnsupportedBytecodeError

    if not hasattr(kernel, "overloads"):
        raise EnzymeError(f"{kernel} is no Numba kernel; decorate it with @njit.")
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


# Functions of libm whose derivatives Enzyme knows, tried one by one in tests/test_enzyme.py.
LIBM = {
    name + suffix
    for name in (
        "acos acosh asin asinh atan atan2 atanh cbrt ceil copysign cos cosh erf erfc exp exp2 expm1 fabs floor fmax fmin"
        " fmod hypot log log10 log1p log2 pow rint round sin sinh sqrt tan tanh trunc"
    ).split()
    for suffix in ("", "f")
}
LIBC = {"memcpy", "memset", "memmove"}


def _simplify(name, kernel, core):
    """IR of the kernel and its core in one module, inlined and simplified, as Enzyme wants it. Names what is not there."""
    import llvmlite.binding as llvm

    # References are not counted: all that a call allocates lives until it ends.
    kernel = re.sub(r"^ *(tail )?call void @NRT_(in|de)cref\(.*\n", "", kernel, flags=re.M)
    # fastmath lets LLVM make a maximum of h if h > 0 else 0, and at h = 0 Enzyme would take the derivative of the other branch.
    kernel = re.sub(r"\b(fcmp|select|phi) (?:(?:fast|nnan|ninf|nsz|arcp|contract|afn|reassoc) )+", r"\1 ", kernel)
    # Where Numba keeps Python objects of a kernel: not here, so that what needs them is found below.
    kernel = re.sub(r"^(@\S*_ZN08NumbaEnv\S* = )[^\n]*global ptr null.*", r"\1external global ptr", kernel, flags=re.M)
    memcpy = "declare void @llvm.memcpy.p0.p0.i64("
    declared = memcpy + "ptr, ptr, i64, i1)\n" if memcpy not in kernel else ""
    module = llvm.parse_assembly(kernel + declared + core)
    function, arguments = re.search(r"call i32 @\"([^\"]+)\"\((.*)\)$", core, re.M).groups()
    expected = [str(a.type) for a in module.get_function(function).arguments]
    if expected != [word.split()[0] for word in arguments.split(", ")]:
        raise EnzymeError(
            f"Numba passes the arguments of {name} in a way that is not known here: {', '.join(expected)}."
        )
    module.link_in(llvm.parse_assembly(NUMBA))
    for f in module.functions:
        if not f.is_declaration and f.name != "core":
            f.linkage = "internal"
            if not any(b"noinline" in about for about in f.attributes):
                f.add_function_attribute("alwaysinline")
    for g in module.global_variables:
        if not g.is_declaration:
            g.linkage = "internal"
    whole = str(module)
    # Loops are better left to Enzyme, but some exceptions that cannot happen only vanish with the loops over axes.
    for unroll in (False, True):
        text = _optimize(whole, unroll)
        missing = _missing(text)
        if not missing:
            break
    if any(re.match("Py|_ZN08NumbaEnv", x) for x in missing):
        raise EnzymeError(
            f"Enzyme cannot differentiate {name}: it needs Python objects at run time, for printing or for an exception "
            "whose text is made then; write that part as loops, or outside the kernel."
        )
    if missing:
        raise EnzymeError(
            f"Enzyme cannot differentiate {name}: it calls {missing[0]}, of which there is no LLVM code and no rule; "
            "write that part as loops, or outside the kernel."
        )
    if re.search(r"\bcall [^@\n]*? (%[\w.]+|inttoptr \([^)]*\))\(", text):
        raise EnzymeError(
            f"Enzyme cannot differentiate {name}: it calls a function by its address; call it by its name instead."
        )
    bodies = re.split(r"^define ", text, flags=re.M)[1:]
    if any("@gemm." in body and "@core(" not in body.split("\n", 1)[0] for body in bodies):
        raise EnzymeError(
            f"Enzyme cannot differentiate {name}: it uses np.dot in a function that calls itself; write it as a loop."
        )
    return text


def _optimize(text, unroll):
    """LLVM's usual passes, save that nothing is made SIMD: that comes after differentiating."""
    import llvmlite.binding as llvm

    module = llvm.parse_assembly(text)
    options = llvm.create_pipeline_tuning_options(2)
    options.loop_vectorization = options.slp_vectorization = False
    options.loop_unrolling = unroll
    builder = llvm.create_pass_builder(llvm.Target.from_default_triple().create_target_machine(), options)
    builder.getModulePassManager().run(module, builder)
    # What LLVM wrote about aliasing in its version 22 is not what Enzyme's 24 reads.
    text = re.sub(r", !(alias\.scope|noalias) !\d+", "", str(module))
    return re.sub(r"^ *(tail )?call void @llvm\.experimental\.noalias\.scope\.decl\(.*\n", "", text, flags=re.M)


def _missing(text):
    """What the module calls or reads, but has not, and Enzyme does not know."""
    names = re.findall(r"^declare [^@\n]*@\"?([\w.$]+)", text, re.M)
    missing = [x for x in names if not x.startswith("llvm.") and x not in LIBM | LIBC | OURS]
    return missing + re.findall(r"^@\"?([^\s\"]+)\"? = external", text, re.M)


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
OURS = {"take", "gemm.double", "gemm.float"}
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

; Only where the array is contiguous, in C order; else 0, and Numba raises.
define i32 @numba_attempt_nocopy_reshape(i64 %n, ptr %dims, ptr %strides, i64 %n.new, ptr %dims.new, ptr %strides.new, i64 %size, i32 %fortran) alwaysinline {
entry:
  %c = icmp eq i32 %fortran, 0
  br i1 %c, label %old, label %no
old:
  %k = phi i64 [ %n, %entry ], [ %i, %old.next ]
  %stride = phi i64 [ %size, %entry ], [ %stride1, %old.next ]
  %more = icmp sgt i64 %k, 0
  br i1 %more, label %old.one, label %new
old.one:
  %i = sub i64 %k, 1
  %dim.at = getelementptr i64, ptr %dims, i64 %i
  %dim = load i64, ptr %dim.at
  %stride.at = getelementptr i64, ptr %strides, i64 %i
  %is = load i64, ptr %stride.at
  %right = icmp eq i64 %is, %stride
  %one = icmp eq i64 %dim, 1
  %fine = or i1 %right, %one
  %stride1 = mul i64 %stride, %dim
  br i1 %fine, label %old.next, label %no
old.next:
  br label %old
new:
  %l = phi i64 [ %n.new, %old ], [ %j, %new.one ]
  %step = phi i64 [ %size, %old ], [ %step1, %new.one ]
  %more.new = icmp sgt i64 %l, 0
  br i1 %more.new, label %new.one, label %yes
new.one:
  %j = sub i64 %l, 1
  %new.at = getelementptr i64, ptr %strides.new, i64 %j
  store i64 %step, ptr %new.at
  %dim.new.at = getelementptr i64, ptr %dims.new, i64 %j
  %dim.new = load i64, ptr %dim.new.at
  %step1 = mul i64 %step, %dim.new
  br label %new
yes:
  ret i32 1
no:
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


# The same as loops. In forward mode Enzyme (enzyme-ad 0.0.16) takes no rule for a function that returns nothing, but it
# differentiates this.
GEMM_LOOPS = _ir(r"""
define internal void @gemm.TYPE(ptr %s, ptr %a, ptr %b, ptr %c) {
entry:
LOAD
  %a.plain = icmp eq i64 %ta, 110
  %b.plain = icmp eq i64 %tb, 110
  %a.row = select i1 %a.plain, i64 1, i64 %lda
  %a.column = select i1 %a.plain, i64 %lda, i64 1
  %b.row = select i1 %b.plain, i64 1, i64 %ldb
  %b.column = select i1 %b.plain, i64 %ldb, i64 1
  br label %column
column:
  %j = phi i64 [ 0, %entry ], [ %j1, %column.end ]
  %j.in = icmp slt i64 %j, %n
  br i1 %j.in, label %row, label %end
row:
  %i = phi i64 [ 0, %column ], [ %i1, %row.end ]
  %i.in = icmp slt i64 %i, %m
  br i1 %i.in, label %sum, label %column.end
sum:
  %p = phi i64 [ 0, %row ], [ %p1, %term ]
  %x = phi TYPE [ 0.0, %row ], [ %x1, %term ]
  %p.in = icmp slt i64 %p, %k
  br i1 %p.in, label %term, label %row.end
term:
  %ai = mul i64 %i, %a.row
  %ap = mul i64 %p, %a.column
  %aip = add i64 %ai, %ap
  %a.at = getelementptr TYPE, ptr %a, i64 %aip
  %av = load TYPE, ptr %a.at
  %bp = mul i64 %p, %b.row
  %bj = mul i64 %j, %b.column
  %bpj = add i64 %bp, %bj
  %b.at = getelementptr TYPE, ptr %b, i64 %bpj
  %bv = load TYPE, ptr %b.at
  %ab = fmul fast TYPE %av, %bv
  %x1 = fadd fast TYPE %x, %ab
  %p1 = add i64 %p, 1
  br label %sum
row.end:
  %cj = mul i64 %j, %ldc
  %cij = add i64 %cj, %i
  %c.at = getelementptr TYPE, ptr %c, i64 %cij
  store TYPE %x, ptr %c.at
  %i1 = add i64 %i, 1
  br label %row
column.end:
  %j1 = add i64 %j, 1
  br label %column
end:
  ret void
}
""")  # noqa: E501


# The entry points: void(result, options, parameters, buffers, status, profile), XLA's convention for compiled code


def _entry(program, mode, active):
    """(IR, shapes that come out) of one mode: primal; forward (also tangents in and out); reverse (cotangents in, the
    gradients of the active inputs out)."""
    reals = [s for s in program.outputs if s.real]
    changed = [program.inputs[k] for k in active]
    out = {"primal": [], "forward": reals, "reverse": changed}[mode]
    into = {"primal": [], "forward": changed, "reverse": reals}[mode]
    lines = []
    names = [s.name for s in program.outputs] + [f"d{s.name}" for s in out]
    names += [f"in.{s.name}" for s in program.inputs] + [f"in.d{s.name}" for s in into]
    for k, name in enumerate(names):
        lines += [f"%at.{name} = getelementptr ptr, ptr %buffers, i64 {k}", f"%{name} = load ptr, ptr %at.{name}"]

    def take(name, slot, source=None):
        """A block of the call's own: zeros, or a copy of the source."""
        lines.append(f"%{name} = call ptr @take(i64 {slot.bytes})")
        fill(name, slot) if source is None else copy(name, source, slot)

    def fill(name, slot, byte=0):
        lines.append(f"call void @llvm.memset.p0.i64(ptr %{name}, i8 {byte}, i64 {slot.bytes}, i1 false)")

    def copy(name, source, slot):
        lines.append(f"call void @llvm.memcpy.p0.p0.i64(ptr %{name}, ptr %{source}, i64 {slot.bytes}, i1 false)")

    lines += ["%status = alloca i32", "call void @begin()"]
    arguments = []  # each pointer, and its shadow where it is differentiated
    for slot in program.results:
        if slot.real and mode == "reverse":
            take(f"d{slot.name}", slot, f"in.d{slot.name}")
        arguments.append((slot.name, slot.real and f"d{slot.name}"))
    for slot, returned in program.buffers:
        if returned:
            fill(slot.name, slot)
        else:
            lines.append(f"%{slot.name} = call ptr @take(i64 {slot.bytes})")
        if slot.real and mode != "primal":
            if not returned:
                take(f"d{slot.name}", slot)
            elif mode == "forward":
                fill(f"d{slot.name}", slot)
            else:
                take(f"d{slot.name}", slot, f"in.d{slot.name}")
        arguments.append((slot.name, slot.real and f"d{slot.name}"))
    for k, (slot, mutated) in enumerate(zip(program.inputs, program.mutated, strict=True)):
        name = slot.name if mutated else f"in.{slot.name}"
        if mutated:
            take(slot.name, slot, f"in.{slot.name}")
        differentiated = slot.real and (mutated or k in active)
        if differentiated and mode != "primal":
            if k not in active:
                take(f"d{slot.name}", slot)
            elif mode == "reverse":
                fill(f"d{slot.name}", slot)
            elif mutated:
                take(f"d{slot.name}", slot, f"in.d{slot.name}")
        shadow = f"d{slot.name}" if mutated or mode == "reverse" else f"in.d{slot.name}"
        arguments.append((name, differentiated and shadow))
    if mode == "primal":
        lines.append(f"call void @core({', '.join(f'ptr %{name}' for name, _ in arguments)}, ptr %status)")
    else:
        # Without the flag, a pointer to this array or that, one of them not differentiated, gets its gradient written into
        # the other's data: silently wrong.
        words = ["ptr @core", 'metadata !"enzyme_runtime_activity"']
        for name, shadow in arguments:
            words.append(
                f'metadata !"enzyme_dup", ptr %{name}, ptr %{shadow}'
                if shadow
                else f'metadata !"enzyme_const", ptr %{name}'
            )
        words.append('metadata !"enzyme_const", ptr %status')
        lines.append(f"call void (...) @__enzyme_{'fwddiff' if mode == 'forward' else 'autodiff'}({', '.join(words)})")
    lines += [
        "call void @end()",
        "%code = load i32, ptr %status",
        "%failed = icmp ne i32 %code, 0",
        "br i1 %failed, label %failure, label %done",
        "failure:",
        f"store volatile i32 1, ptr inttoptr (i64 {ctypes.addressof(program.status)} to ptr)",
    ]
    for name, slot in zip(names, [*program.outputs, *out], strict=False):
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
        if f"@gemm.{kind}(" in core:
            from numba.np.linalg import ensure_blas

            ensure_blas()
            text = GEMM_LOOPS if mode == "forward" else GEMM
            runtime += (
                text.replace("TYPE", kind)
                .replace("KIND", str(ord("d" if kind == "double" else "s")))
                .replace("SIZE", str(size))
                .replace("ADDRESS", str(llvm.address_of_symbol("numba_xxgemm")))
            )
    there = {m for m in re.findall(r"^(?:define|declare) [^@\n]*@([\w.]+)\(", runtime, re.M)}
    core = re.sub(r"^declare [^@\n]*@([\w.]+)\(.*\n", lambda m: "" if m[1] in there else m[0], core, flags=re.M)
    core = core.replace("define void @core(", "define internal void @core(")
    core = re.sub(r"\bnoinline\b", '"noinline"', core)  # Enzyme adds alwaysinline, and LLVM aborts on both
    features = ",".join(f for f in llvm.get_host_cpu_features().flatten().split(",") if f.startswith("+"))
    target = f'"target-features"="{features}" "tune-cpu"="{llvm.get_host_cpu_name()}" {{'
    return re.sub(r"^(define .*)\{$", lambda m: m[1] + target, core + runtime + entry, flags=re.M)


# JAX


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

    def linearize(is_vjp, nonzero, *inputs, program):
        active = tuple(k for k, some in enumerate(nonzero) if some)
        number = is_vjp and [s.shape for s in program.outputs] == [()] and program.outputs[0].real
        if number:
            one = jnp.ones((), program.outputs[0].dtype)
            out, *gradients = pullback.bind(*inputs, one, program=program, active=active)

            def linear(gradients, *tangents):
                return [sum(jnp.sum(g * t) for g, t in zip(gradients, _pick(tangents, active), strict=True))]

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
            "NUMBA_OPT": "0",  # LLVM optimises after differentiating: loops that are unrolled already are slower then
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
