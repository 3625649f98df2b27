"""Runs a Triton kernel on the CPU, one launch at a time, in a process that can also compile kernels.

Triton has an interpreter (with NumPy arrays instead of registers), but TRITON_INTERPRET=1 switches the whole
process to it before `import triton`, and its bfloat16 is wrong. Here the interpreter is chosen per launch,
and corrected:

  bfloat16   NumPy has no such type, so the values are uint16 bit patterns. Triton's own interpreter truncates
             where the hardware rounds to nearest even, and its arithmetic, comparisons, reductions and dots
             treat the patterns as integers. Here each of them widens to float32, computes, and rounds once.
  NumPy 2    rejects int() of a one-element array, which Triton 3.6 needs for `range(tensor)`, and -1 as an
             unsigned number, which `~x` needs.
  overflow   Triton adds a check to each integer operation, which reports only in debug builds on a GPU. Here
             the check is off, because with it one address would cost ten operations.
  memory     A load is one NumPy gather (Triton's own goes through the elements at 16 ns each). An address
             outside every tensor of the launch is an error with a message, not a crash or silent garbage.

`tl` is one module for compiling and interpreting, so it is patched only during a launch, under a lock. Do not
compile a kernel in one thread while another thread interprets.

Programs run one after another, so races are not noticed, and a program that waits for a later one hangs. Only
in a cooperative launch do programs take turns: where one waits, the next one goes on. A `tl` operation costs
tens of microseconds per program, whatever its size, so launch few programs with large blocks.
"""

import ast
import contextlib
import dataclasses
import functools
import inspect
import itertools
import textwrap
import threading
import time

import numpy as np
import triton
import triton.language as tl
from triton.compiler import CompiledKernel
from triton.runtime import interpreter as stock
from triton.runtime.autotuner import Autotuner, Heuristics
from triton.runtime.interpreter import InterpretedFunction, TensorHandle
from triton.runtime.jit import JITFunction, KernelInterface

from triton_kernels.interpreter_types import PATCHES, Semantic

POLL_SECONDS = 60.0  # for which a kernel waits for a word of another process

# ---- bfloat16 as uint16 bit patterns -----------------------------------------------------------------------


def bf16_to_f32(bits):
    """uint16 bit patterns -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values):
    """float32 -> uint16 bit patterns, round to nearest even; every NaN becomes the quiet NaN 0x7FC0."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if nan.any():
        rounded[nan] = 0x7FC0
    return rounded.reshape(np.shape(values))


_NP_DTYPES = {
    t.name: np.dtype(n)
    for t, n in (
        (tl.int1, bool),
        (tl.int8, "i1"),
        (tl.uint8, "u1"),
        (tl.int16, "i2"),
        (tl.uint16, "u2"),
        (tl.int32, "i4"),
        (tl.uint32, "u4"),
        (tl.int64, "i8"),
        (tl.uint64, "u8"),
        (tl.float16, "f2"),
        (tl.bfloat16, "u2"),
        (tl.float32, "f4"),
        (tl.float64, "f8"),
        (tl.float8e5, "u1"),
        (tl.float8e4nv, "u1"),
        (tl.float8e4b8, "u1"),
        (tl.float8e4b15, "u1"),
        (tl.float8e5b16, "u1"),
    )
}


def _np_dtype(type):
    """The NumPy type for a Triton type: pointers are uint64, bfloat16 and the 8-bit floats are bit
    patterns."""
    return _NP_DTYPES.get(type.scalar.name) or _NP_DTYPES["uint64"]


def _is_bf16(handle):
    return handle.dtype.scalar is tl.bfloat16 and handle.data.dtype == np.uint16


def _widen(handle):
    return TensorHandle(bf16_to_f32(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrow(handle):
    return TensorHandle(f32_to_bf16(handle.data), tl.bfloat16)


class Builder(stock.InterpreterBuilder):
    """Triton's own operations, with those that are wrong for bfloat16 replaced."""

    def __init__(self):
        super().__init__()
        self.options = stock.InterpreterOptions(sanitize_overflow=False)
        self.turns = None  # the _Turns of a cooperative launch

    def get_bf16(self, value):
        return TensorHandle(f32_to_bf16(np.array([value], dtype=np.float32)), tl.bfloat16)

    def get_all_ones_value(self, type):
        dtype = _np_dtype(type)
        # ~x of an unsigned x: NumPy rejects -1 as an unsigned number.
        if dtype.kind == "u":
            return TensorHandle(np.full(1, np.iinfo(dtype).max, dtype), type.scalar)
        return super().get_all_ones_value(type)

    def cast_impl(self, src, dst_type):
        if dst_type.scalar is tl.bfloat16:
            return src if _is_bf16(src) else _narrow(src)
        src = _widen(src)
        return src if src.dtype.scalar is dst_type.scalar else super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar) and dst_type.scalar.primitive_bitwidth > 8:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def binary_op(self, lhs, rhs, op):
        if not (_is_bf16(lhs) and _is_bf16(rhs)):
            return super().binary_op(lhs, rhs, op)
        out = op(bf16_to_f32(lhs.data), bf16_to_f32(rhs.data))
        return (
            TensorHandle(out, tl.int1)
            if out.dtype == np.bool_
            else TensorHandle(f32_to_bf16(out), tl.bfloat16)
        )

    def unary_op(self, arg, op):
        return _narrow(super().unary_op(_widen(arg), op)) if _is_bf16(arg) else super().unary_op(arg, op)

    def ternary_op(self, lhs, rhs, other, op):
        # A select moves bit patterns: nothing to correct.
        if op is np.where or not _is_bf16(other):
            return super().ternary_op(lhs, rhs, other, op)
        return _narrow(super().ternary_op(_widen(lhs), _widen(rhs), _widen(other), op))

    def create_fma(self, x, y, z):
        if not _is_bf16(z):
            return super().create_fma(x, y, z)
        return _narrow(super().create_fma(_widen(x), _widen(y), _widen(z)))

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return super().create_dot(_widen(a), _widen(b), d, input_precision, max_num_imprecise_acc)

    def create_splat(self, ret_ty, arg):
        shape = tuple(ret_ty.shape.values)
        # A view, not a copy; np.broadcast_to takes ten times as long.
        view = np.ndarray(shape, arg.data.dtype, arg.data, strides=(0,) * len(shape))
        return TensorHandle(view, arg.dtype.scalar)

    def create_rsqrt(self, arg):
        return TensorHandle(np.reciprocal(np.sqrt(arg.data)), arg.dtype.scalar)

    # -- memory --

    def set_tensors(self, tensors, reads=()):
        """Sets the launch's arguments: the memory that the programs may access. reads: of these, what other
        processes may write."""
        self.reads, self.polled = reads, None
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.starts = np.array(sorted(storages), dtype=np.uint64)
        self.ends = np.array([start + storages[start] for start in sorted(storages)], dtype=np.uint64)

    def check_addresses(self, addresses, size, verb):
        first, last = addresses.min(), addresses.max()
        for start, end in zip(self.starts, self.ends):
            if start <= first and last + np.uint64(size) <= end:
                return
        owner = np.searchsorted(self.starts, addresses, side="right") - 1
        inside = (owner >= 0) & (addresses + np.uint64(size) <= self.ends[owner])
        if not inside.all():
            count = f"{(~inside).sum()} of {addresses.size}"
            raise IndexError(f"{count} elements {verb} lie outside every tensor of the launch")

    def create_addptr(self, ptr, offset):
        # Broadcast axes (stride 0) of the offset are multiplied once, not once per element.
        step = max(1, ptr.get_element_ty().primitive_bitwidth // 8)
        offset = offset.data[
            tuple(slice(0, 1) if stride == 0 else slice(None) for stride in offset.data.strides)
        ]
        return TensorHandle(ptr.data + (offset.astype(np.int64) * step).view(np.uint64), ptr.dtype)

    def create_load(self, ptr, cache_modifier, eviction_policy, is_volatile):
        return self.create_masked_load(ptr, None, None, cache_modifier, eviction_policy, is_volatile)

    def create_store(self, ptr, value, cache_modifier, eviction_policy):
        mask = TensorHandle(np.broadcast_to(np.True_, ptr.data.shape), tl.int1)
        return self.create_masked_store(ptr, value, mask, cache_modifier, eviction_policy)

    def create_masked_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
        element = ptrs.get_element_ty()
        dtype = _np_dtype(element)
        live = None if mask is None or mask.data.all() else mask.data
        addresses = ptrs.data
        # A masked lane reads what the first live lane reads.
        if live is not None:
            if not live.any():
                return TensorHandle(np.array(_fill(other, live.shape, dtype)), element)
            addresses = np.where(live, addresses, addresses.flat[live.argmax()])
        self.check_addresses(addresses, dtype.itemsize, "read")
        if is_volatile:
            self.before_poll(int(addresses.flat[0]))
        values = _gather(addresses, dtype)
        if live is not None:
            values = np.where(live, values, _fill(other, live.shape, dtype))
        return TensorHandle(values, element)

    def before_poll(self, address):
        """A kernel loads what another rank writes again and again until it is there. Raises TimeoutError when
        that takes too long."""
        if address != self.polled:
            self.polled, self.since = address, time.monotonic()
            return
        # Not at the top: of the ops' contracts only calls between ranks need one.
        from lab.ops.exchange import patience, sender_at

        time.sleep(0)  # the other rank may need this core
        limit = patience(POLL_SECONDS)
        if time.monotonic() - self.since > limit:
            sender = sender_at(self.reads, address)
            who = "nobody wrote what the kernel polls" if sender is None else f"rank {sender} sent nothing"
            raise TimeoutError(f"{who} for {limit:g} s")

    def create_masked_store(self, ptrs, value, mask, cache_modifier, eviction_policy):
        addresses = ptrs.data if mask.data.all() else ptrs.data[mask.data]
        if addresses.size:
            self.check_addresses(addresses, value.data.itemsize, "written")
            super().create_masked_store(ptrs, value, mask, cache_modifier, eviction_policy)

    def create_atomic_rmw(self, rmw_op, ptr, value, mask, sem, scope):
        if self.turns:
            self.turns.before_atomic(looks=rmw_op.name == "ADD" and not value.data.any())
        live = ptr.data[mask.data]
        if live.size:
            self.check_addresses(live, value.data.itemsize, "updated")
        return super().create_atomic_rmw(rmw_op, ptr, value, mask, sem, scope)


def _fill(other, shape, dtype):
    return np.broadcast_to(np.zeros((), dtype) if other is None else other.data, shape)


class _Memory:
    """The memory of this process from an address on, as a NumPy array."""

    def __init__(self, address, count, dtype):
        self.__array_interface__ = dict(
            version=3, data=(int(address), True), shape=(count,), typestr=dtype.str
        )


def _gather(addresses, dtype):
    first, shift = addresses.min(), np.uint64(dtype.itemsize.bit_length() - 1)
    index = ((addresses - first) >> shift).view(np.int64)
    return np.asarray(_Memory(first, int(index.max()) + 1, dtype)).take(index)


BUILDER = Builder()
SEMANTIC = Semantic(BUILDER)


# ---- the language, patched for the length of a launch ------------------------------------------------------


def _interpreted_builtin(member):
    """Passes a tl builtin the object that builds its operations; the compiler does it with `_semantic`."""
    function = getattr(member, "__wrapped__", member)  # inside Triton's test that it is passed one

    @functools.wraps(member)
    def call(*args, **kwargs):
        kwargs["_semantic"] = SEMANTIC
        return function(*args, **kwargs)

    return call


def _reduction(apply):
    """bfloat16 operands of a reduction or scan are widened, and the results rounded once."""

    def run(input, axis, combine_fn, option=False, **kwargs):
        option = kwargs.get("keep_dims", kwargs.get("reverse", option))
        operands = input if isinstance(input, tuple) else (input,)
        narrow = [t.dtype is tl.bfloat16 for t in operands]
        wide = tuple(SEMANTIC.cast(t, tl.float32) if n else t for t, n in zip(operands, narrow))
        out = apply(axis, combine_fn, option).apply(wide)
        out = tuple(SEMANTIC.cast(t, tl.bfloat16) if n else t for t, n in zip(out, narrow))
        return out if isinstance(input, tuple) else out[0]

    return run


def _host_clock(asm, *args, **options):
    """In the place of inline PTX, of which the interpreter knows what reads a clock: it reads the host's."""
    text = getattr(asm, "value", asm)
    if "%clock64" not in text and "%globaltimer" not in text:
        raise NotImplementedError(f"inline PTX that reads no clock: {text}")
    return SEMANTIC.to_tensor(time.perf_counter_ns(), False)


class _Patches:
    """The attributes that Triton's own interpreter would set on `tl` at each launch, collected once."""

    def __init__(self):
        self.values = {}

    def set_attr(self, owner, name, value):  # the name that Triton's own patchers call
        self.values[(owner, name)] = value

    def builtins(self, owner):
        for name, member in inspect.getmembers(owner):
            if tl.core.is_builtin(member):
                self.set_attr(owner, name, _interpreted_builtin(member))


@functools.lru_cache(maxsize=None)
def _patches():
    patches = _Patches()
    for module in (tl, tl.core):
        patches.builtins(module)
        patches.builtins(module.tensor)
        stock._patch_lang_tensor(module.tensor, patches)
        stock._patch_lang_core(module, patches)
        patches.set_attr(module, "reduce", _reduction(stock.ReduceOps))
        patches.set_attr(module, "associative_scan", _reduction(stock.ScanOps))
    patches.builtins(tl.math)
    patches.set_attr(stock, "_get_np_dtype", _np_dtype)  # Triton's own function builds a dict at each call
    patches.builtins(tl.core.tensor_descriptor_base)
    for patch in PATCHES:
        patches.set_attr(*patch)
    for module in (tl, tl.core):
        patches.set_attr(module, "inline_asm_elementwise", _host_clock)
    patches.set_attr(tl.core.tensor, "__index__", lambda t: int(t.handle.data.item()))
    for jitted in (JITFunction, InterpretedFunction):  # a kernel calls another jit function
        patches.set_attr(
            jitted, "__call__", lambda self, *args, **kwargs: _rewritten(self.fn)(*args, **kwargs)
        )
    return [
        (owner, name, value, owner.__dict__.get(name, _patches))
        for (owner, name), value in patches.values.items()
    ]


_lock = threading.RLock()


@contextlib.contextmanager
def interpreting():
    """A context in which `tl` functions compute with NumPy; the language is restored at its end."""
    with _lock, np.errstate(all="ignore"):  # overflow and 0/0 are defined on a GPU
        knob = triton.knobs.runtime.interpret
        try:
            triton.knobs.runtime.interpret = True
            for owner, name, value, _ in _patches():
                setattr(owner, name, value)
            yield
        finally:
            for owner, name, _, original in _patches():
                if original is _patches:  # it was inherited, or absent
                    delattr(owner, name)
                else:
                    setattr(owner, name, original)
            triton.knobs.runtime.interpret = knob


# ---- the kernel's source, rewritten once -------------------------------------------------------------------


class _TensorAssignments(ast.NodeTransformer):
    """`x = value` becomes `x = to_tensor(value)`, because in a kernel a number is a tensor too."""

    def visit_Assign(self, node):
        self.generic_visit(node)
        node.value = ast.Call(ast.Name("__to_tensor", ast.Load()), [node.value], [])
        return node


@functools.lru_cache(maxsize=None)
def _rewritten(fn):
    lines, first = inspect.getsourcelines(fn)
    start = next(i for i, line in enumerate(lines) if line.lstrip().startswith("def "))
    tree = ast.parse(textwrap.dedent("".join(lines[start:])))
    tree = ast.increment_lineno(
        ast.fix_missing_locations(_TensorAssignments().visit(tree)), first + start - 1
    )
    names = {**fn.__globals__, "__to_tensor": lambda value: SEMANTIC.to_tensor(value, False)}
    exec(compile(tree, inspect.getsourcefile(fn), "exec"), names)
    return names[fn.__name__]


class _Turns:
    """Runs programs that wait for each other, each in a thread of its own, one at a time.

    A program runs until it ends or polls a counter (an atomic addition of 0); then the next one has its turn.
    """

    def __init__(self, call, programs):
        self.call, self.error, self.looks = call, None, 0
        self.may_run = {program: threading.Semaphore(0) for program in programs}
        # A program may find a counter full three times before it adds to one: for each of q, k and v.
        self.most_looks = 4 * len(self.may_run)
        self.handed_over = threading.Semaphore(0)

    def run(self):
        threads = [
            threading.Thread(target=self._body, args=(program,), daemon=True) for program in self.may_run
        ]
        for thread in threads:
            thread.start()
        while self.may_run:
            for program in tuple(self.may_run):  # after an error each program ends at its turn
                BUILDER.set_grid_idx(*program)
                self.may_run[program].release()
                self.handed_over.acquire()
        for thread in threads:
            thread.join()
        if self.error:
            raise self.error

    def _body(self, program):
        self.may_run[program].acquire()
        try:
            if not self.error:
                with np.errstate(all="ignore"):  # of this thread
                    self.call(program)
        except Exception as error:
            self.error = self.error or error
        del self.may_run[program]
        self.handed_over.release()

    def before_atomic(self, looks):
        self.looks = self.looks + 1 if looks else 0
        if looks:
            mine = self.may_run[BUILDER.grid_idx]
            self.handed_over.release()
            mine.acquire()
            if self.error or self.looks > self.most_looks:
                raise RuntimeError("every program waits, and none can go on")


@functools.lru_cache(maxsize=None)
def _parameters(fn):
    """name -> (default, is it a tl.constexpr?)"""
    return {
        p.name: (p.default, "constexpr" in str(p.annotation))
        for p in inspect.signature(fn).parameters.values()
    }


def run(kernel, grid, args, meta, reads=()):
    """Interpret `kernel` (a triton.jit function) over `grid` (up to three ints) on CPU tensors and numbers.

    reads: tensors whose addresses the kernel finds in memory. With launch_cooperative_grid programs may wait
    for each other; other keywords in `meta` that are no parameters of the kernel (num_warps, launch_pdl ...)
    are ignored, as they are for the compiler only. Raises RuntimeError with the kernel and the program for
    any error inside.
    """
    parameters = _parameters(kernel.fn)
    values = dict(zip(parameters, args, strict=False))
    if len(args) > len(parameters):
        raise TypeError(f"{kernel.fn.__name__} takes {len(parameters)} arguments, got {len(args)}")
    values.update((k, v) for k, v in meta.items() if k in parameters)
    for name, (default, constant) in parameters.items():
        value = values.get(name, default)
        if value is inspect.Parameter.empty:
            raise TypeError(f"{kernel.fn.__name__}: argument {name!r} is missing")
        values[name] = value if constant else stock._implicit_cvt(value)
    tensors = [value for value in (*args, *meta.values(), *reads) if hasattr(value, "untyped_storage")]
    grid = tuple(grid) + (1,) * (3 - len(grid))
    with interpreting():
        function = _rewritten(kernel.fn)
        BUILDER.set_grid_dim(*grid)
        BUILDER.set_tensors(tensors, reads)

        def call(program):
            try:
                function(**values)
            except Exception as error:
                where = f"{kernel.fn.__name__}, program {program}"
                raise RuntimeError(f"{where}: {type(error).__name__}: {error}") from error

        programs = itertools.product(*map(range, grid))
        if meta.get("launch_cooperative_grid"):
            BUILDER.turns = _Turns(call, programs)
            try:
                BUILDER.turns.run()
            finally:
                BUILDER.turns = None
            return
        for program in programs:
            BUILDER.set_grid_idx(*program)
            call(program)


# ---- kernel[grid](...), as Triton's tutorials write it -----------------------------------------------------


@contextlib.contextmanager
def launches_interpreted(names=None):
    """A context in which kernel[grid](...) and kernel.run(..., grid=grid) on CPU tensors are interpreted. An
    autotuned kernel uses its first configuration. names: a list to which each launched kernel's name is
    added."""

    def launcher(kernel, grid):
        return lambda *args, **meta: launch(kernel, grid, args, meta, names)

    kinds = [
        kind for kind in (KernelInterface, JITFunction, Autotuner, Heuristics) if "__getitem__" in vars(kind)
    ]
    patches = [(kind, "__getitem__", launcher) for kind in kinds]
    patches += [
        (
            kind,
            "run",
            lambda kernel, *args, grid, warmup=False, **meta: launch(kernel, grid, args, meta, names),
        )
        for kind in (JITFunction, Autotuner, Heuristics)
    ]
    before = [getattr(kind, name) for kind, name, _ in patches]
    for kind, name, method in patches:
        setattr(kind, name, method)
    try:
        yield
    finally:
        for (kind, name, _), method in zip(patches, before):
            setattr(kind, name, method)


@contextlib.contextmanager
def launches_noted(names):
    """A context in which the name of each kernel that Triton launches on a GPU is added to a list, however it
    is launched; with None none is. All ways end in CompiledKernel.run."""
    if names is None:
        yield
        return
    unnoted = CompiledKernel.run

    def noted(compiled):
        def run(grid_x, grid_y, grid_z, *rest):
            if grid_x * grid_y * grid_z > 0:  # Triton launches nothing on an empty grid
                names.append(compiled.name)
            return unnoted.fget(compiled)(grid_x, grid_y, grid_z, *rest)

        return run

    CompiledKernel.run = property(noted)
    try:
        yield
    finally:
        CompiledKernel.run = unnoted


@functools.lru_cache(maxsize=1)
def compiler_options():
    """The names of Triton's compiler options for NVIDIA's GPUs, which a launch may pass besides the kernel's
    parameters."""
    from triton.backends.nvidia.compiler import CUDAOptions

    return {f.name for f in dataclasses.fields(CUDAOptions)}


def check_arguments(kernel, args, meta):
    """Raises TypeError for arguments that a launch on a GPU would reject, too."""
    name, parameters = kernel.fn.__name__, list(_parameters(kernel.fn))
    if len(args) > len(parameters):
        raise TypeError(f"{name}: {len(args)} arguments, and the kernel has {len(parameters)} parameters")
    for key in meta:
        if key in parameters[: len(args)]:
            raise TypeError(f"{name}: argument {key!r} is given twice")
        if key not in parameters and key not in compiler_options():
            raise TypeError(
                f"{name}: {key!r} is neither a parameter of the kernel nor an option of the compiler"
            )


def launch(kernel, grid, args, meta, names=None):
    """Interprets a kernel with decorators around triton.jit: autotune and heuristics. names: see
    launches_interpreted()."""
    meta, hooks = dict(meta), []
    while not isinstance(kernel, JITFunction):
        if isinstance(kernel, Autotuner):
            config = kernel.configs[0]
            meta.update(config.all_kwargs())
            hooks += [config.pre_hook] if config.pre_hook else []
        elif isinstance(kernel, Heuristics):
            known = {**dict(zip(kernel.arg_names, args)), **meta}
            for name, choose in kernel.values.items():
                meta[name] = known[name] = choose(known)
        else:
            raise TypeError(f"{type(kernel).__name__} cannot be interpreted: launch a triton.jit kernel")
        kernel = kernel.fn
    if names is not None:
        names.append(kernel.fn.__name__)
    check_arguments(kernel, args, meta)
    values = {**dict(zip(_parameters(kernel.fn), args)), **meta}
    for hook in hooks:
        hook(values)
    defaults = {
        name: default
        for name, (default, _) in _parameters(kernel.fn).items()
        if default is not inspect.Parameter.empty
    }
    run(kernel, grid({**defaults, **values}) if callable(grid) else grid, args, meta)
