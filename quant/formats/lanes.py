"""Thirty-two lanes as a numba type: write the arithmetic of one block, run it for 32 at once.

llama.cpp's encoders are scalar: each block is searched by a chain of additions in a fixed order,
and every rounding in that chain shows in the bytes. Speed without changing a byte therefore comes
from doing many blocks side by side: `FLOATS` is 32 float32 (two AVX-512 registers, four of AVX2,
eight of NEON), lane k belongs to block k, and no operation mixes lanes. A kernel then reads like
the C it reproduces, with `select(condition, a, b)` where the C branches.

The usual way, a loop over lanes that LLVM is trusted to vectorise, keeps its sums in memory; here
they stay in registers, which is more than twice as fast. Lanes live in arrays of shape (n, LANES),
one value of all blocks in each row.

All arithmetic is IEEE float32, as written: no fast-math flag is set, so LLVM may neither fuse
a * b + c nor reorder a sum. A float64 operand is a typing error, so that nothing is promoted
unseen: constants must be np.float32.

What there is, for numba-compiled code only: + - * / and comparisons of floats; + - & | << >> and
comparisons of ints (32 bits, >> keeps the sign); & | ~ of masks; and the functions below.
"""

import operator

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

LANES = 32

_INT32, _INT64 = ir.IntType(32), ir.IntType(64)


class Lanes(types.Type):
    """LANES values of one LLVM type."""

    def __init__(self, name: str, element: ir.Type):
        super().__init__(name=f"{name} x {LANES}")
        self.vector = ir.VectorType(element, LANES)


FLOATS = Lanes("float32", ir.FloatType())
INTS = Lanes("int32", _INT32)
MASK = Lanes("bool", ir.IntType(1))

_SCALARS = {FLOATS: types.float32, INTS: types.int32, MASK: types.boolean}


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, lanes):
        super().__init__(manager, lanes, lanes.vector)


# --- operators -----------------------------------------------------------------------------------


def _as_lanes(context, builder, value, given, lanes):
    """`value` of numba type `given` as `lanes`: a scalar is repeated."""
    if given == lanes:
        return value
    scalar = context.cast(builder, value, given, _SCALARS[lanes])
    nothing = ir.Constant(lanes.vector, ir.Undefined)
    first = builder.insert_element(nothing, scalar, _INT32(0))
    return builder.shuffle_vector(first, nothing, _indices([0] * LANES))


def _indices(places):
    return ir.Constant(ir.VectorType(_INT32, len(places)), list(places))


def _fits(lanes, given):
    """Whether a value of numba type `given` can stand where `lanes` is wanted, without rounding."""
    if lanes == INTS:
        return given == INTS or isinstance(given, types.Integer)
    return given in (lanes, _SCALARS[lanes])


def _define_binary(function, lanes, result, build):
    """Make `function(a, b)` work for `lanes`, and for `lanes` with one of its scalars."""

    @type_callable(function)
    def type_binary(context):
        def typer(a, b):
            return result if lanes in (a, b) and _fits(lanes, a) and _fits(lanes, b) else None

        return typer

    def lower(context, builder, sig, args):
        a, b = (_as_lanes(context, builder, args[i], sig.args[i], lanes) for i in (0, 1))
        return build(builder, a, b)

    scalar = types.Integer if lanes == INTS else _SCALARS[lanes]
    for a, b in ((lanes, lanes), (lanes, scalar), (scalar, lanes)):
        lower_builtin(function, a, b)(lower)


def _instruction(name, *first):
    return lambda builder, a, b: getattr(builder, name)(*first, a, b)


_FLOAT_OPERATORS = {"add": "fadd", "sub": "fsub", "mul": "fmul", "truediv": "fdiv"}
_INT_OPERATORS = {
    "add": "add", "sub": "sub", "and_": "and_", "or_": "or_", "lshift": "shl", "rshift": "ashr",
}  # fmt: skip
_MASK_OPERATORS = {"and_": "and_", "or_": "or_"}
_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}

for _lanes, _table in (
    (FLOATS, _FLOAT_OPERATORS),
    (INTS, _INT_OPERATORS),
    (MASK, _MASK_OPERATORS),
):
    for _name, _llvm in _table.items():
        _define_binary(getattr(operator, _name), _lanes, _lanes, _instruction(_llvm))
for _name, _sign in _COMPARISONS.items():
    # As in C, NaN differs from everything and every other comparison with it is false.
    _float = "fcmp_unordered" if _name == "ne" else "fcmp_ordered"
    _define_binary(getattr(operator, _name), FLOATS, MASK, _instruction(_float, _sign))
    _define_binary(getattr(operator, _name), INTS, MASK, _instruction("icmp_signed", _sign))


def _define_unary(function, lanes, build):
    @type_callable(function)
    def type_unary(context):
        return lambda a: lanes if a == lanes else None

    @lower_builtin(function, lanes)
    def lower(context, builder, sig, args):
        return build(builder, args[0])


_define_unary(operator.neg, FLOATS, lambda builder, a: builder.fneg(a))
_define_unary(operator.invert, MASK, lambda builder, a: builder.not_(a))


# --- functions of lanes --------------------------------------------------------------------------


def _convert(given, result, build):
    """A numba function of one argument, from its LLVM builder."""

    def function(typing_context, a):
        return result(given), lambda context, builder, sig, args: build(builder, args[0])

    return function


def _call(name):
    """The LLVM intrinsic `name` on 32 float32."""
    type_ = ir.FunctionType(FLOATS.vector, [FLOATS.vector])
    name = f"llvm.{name}.v{LANES}f32"
    return lambda builder, a: builder.call(builder.module.declare_intrinsic(name, (), type_), [a])


def _any(builder, a):
    every = ir.IntType(LANES)
    return builder.icmp_unsigned("!=", builder.bitcast(a, every), every(0))


fabs = intrinsic(_convert(FLOATS, FLOATS, _call("fabs")))
sqrt = intrinsic(_convert(FLOATS, FLOATS, _call("sqrt")))
to_float = intrinsic(_convert(INTS, FLOATS, lambda builder, a: builder.sitofp(a, FLOATS.vector)))
to_int = intrinsic(_convert(FLOATS, INTS, lambda builder, a: builder.fptosi(a, INTS.vector)))
bits = intrinsic(_convert(FLOATS, INTS, lambda builder, a: builder.bitcast(a, INTS.vector)))
from_bits = intrinsic(_convert(INTS, FLOATS, lambda builder, a: builder.bitcast(a, FLOATS.vector)))
any_of = intrinsic(_convert(MASK, types.boolean, _any))


@intrinsic
def splat(typing_context, value):
    """One float32, integer or boolean in all lanes."""
    lanes = next((t for t in (FLOATS, MASK, INTS) if _fits(t, value)), None)
    if lanes is None:
        return None

    def build(context, builder, sig, args):
        return _as_lanes(context, builder, args[0], sig.args[0], lanes)

    return lanes(value), build


@intrinsic
def select(typing_context, mask, a, b):
    """`a` where `mask`, else `b`; a scalar is repeated."""
    lanes = next((t for t in (FLOATS, MASK, INTS) if _fits(t, a) and _fits(t, b)), None)
    if lanes is None:
        return None

    def build(context, builder, sig, args):
        a, b = (_as_lanes(context, builder, args[i], sig.args[i], lanes) for i in (1, 2))
        return builder.select(args[0], a, b)

    return lanes(mask, a, b), build


@njit
def to_float16(a):
    """float32 -> the 16 bits of float16, rounded half to even; too large becomes infinity.

    LLVM's own conversion needs a processor with F16C or a library that numba does not link.
    # ref: ggml-impl.h, ggml_compute_fp32_to_fp16
    """
    word = bits(a)
    scaled = (fabs(a) * np.float32(2.0**112)) * np.float32(2.0**-110)  # infinite if too large
    exponent = word & 0x7F800000
    exponent = select(exponent > 0x38800000, exponent, 0x38800000)
    # Adding this power of two makes the float32 addition round at float16's last bit.
    rounded = bits(from_bits(exponent + 0x07800000) + scaled)
    magnitude = ((rounded >> 13) & 0x7C00) + (rounded & 0x0FFF)
    magnitude = select((word & 0x7FFFFFFF) > 0x7F800000, 0x7E00, magnitude)
    return ((word >> 16) & 0x8000) | magnitude


@njit
def from_float16(a):
    """The 16 bits of a finite float16 -> float32."""
    magnitude = from_bits((a & 0x7FFF) << 13) * np.float32(2.0**112)
    return from_bits(bits(magnitude) | (a & 0x8000) << 16)


# --- memory --------------------------------------------------------------------------------------


def _pointer(context, builder, array_type, array, place, vector):
    """Where `vector` begins: row `place` of an (n, LANES) array, item `place` of a flat one."""
    data = context.make_array(array_type)(context, builder, array).data
    if array_type.ndim == 2:
        place = builder.mul(place, _INT64(LANES))
    return builder.bitcast(builder.gep(data, [place]), vector.as_pointer())


@intrinsic
def load(typing_context, rows, i):
    """Row i of a float32 or int32 array of shape (n, LANES). No bounds check."""
    lanes = FLOATS if rows.dtype == types.float32 else INTS

    def build(context, builder, sig, args):
        place = _pointer(context, builder, sig.args[0], args[0], args[1], lanes.vector)
        return builder.load(place, align=4)

    return lanes(rows, types.intp), build


@intrinsic
def store(typing_context, rows, i, value):
    """rows[i] = value, for an array of shape (n, LANES). No bounds check."""

    def build(context, builder, sig, args):
        place = _pointer(context, builder, sig.args[0], args[0], args[1], value.vector)
        builder.store(args[2], place, align=4)
        return context.get_dummy_value()

    return types.void(rows, types.intp, value), build


_SIDE = 16


def _transpose(builder, rows):
    """The 16 columns of a 16x16 square given as 16 vectors.

    Interleaving rows r and r + 8 rotates the eight bits (row, column) of every element's place by
    one, so four rounds exchange rows with columns.
    """
    low = _indices([i // 2 + i % 2 * _SIDE for i in range(_SIDE)])
    high = _indices([i // 2 + i % 2 * _SIDE + _SIDE // 2 for i in range(_SIDE)])
    for _ in range(4):
        pairs = [(rows[r], rows[r + _SIDE // 2]) for r in range(_SIDE // 2)]
        rows = [builder.shuffle_vector(a, b, half) for a, b in pairs for half in (low, high)]
    return rows


def _starts_of(context, builder, starts_type, starts):
    data = context.make_array(starts_type)(context, builder, starts).data
    return [builder.load(builder.gep(data, [_INT64(k)])) for k in range(LANES)]


@intrinsic
def gather16(typing_context, flat, starts, rows, i):
    """rows[i + c, k] = flat[starts[k] + c] for c in 0..15 and every lane k. No bounds check.

    `flat` is float32 (n,), `starts` int64 (LANES,), `rows` float32 (n, LANES).
    """
    vector = ir.VectorType(ir.FloatType(), _SIDE)

    def build(context, builder, sig, args):
        places = _starts_of(context, builder, sig.args[1], args[1])
        squares = []
        for first in range(0, LANES, _SIDE):
            lines = []
            for start in places[first : first + _SIDE]:
                place = _pointer(context, builder, sig.args[0], args[0], start, vector)
                lines.append(builder.load(place, align=4))
            squares.append(_transpose(builder, lines))
        for c in range(_SIDE):
            whole = builder.shuffle_vector(squares[0][c], squares[1][c], _indices(range(LANES)))
            row = builder.add(args[3], _INT64(c))
            place = _pointer(context, builder, sig.args[2], args[2], row, FLOATS.vector)
            builder.store(whole, place, align=4)
        return context.get_dummy_value()

    return types.void(flat, starts, rows, types.intp), build


@intrinsic
def scatter16(typing_context, rows, i, flat, starts, offset):
    """Write words rows[i : i + 16, k] one after another at byte starts[k] + offset of `flat`.

    `rows` is int32 (n, LANES), `flat` uint8 (n,), `starts` int64 (LANES,). Words are stored in the
    machine's byte order, which must be little-endian. No bounds check.
    """
    half = ir.VectorType(_INT32, _SIDE)

    def build(context, builder, sig, args):
        columns = []
        for c in range(_SIDE):
            row = builder.add(args[1], _INT64(c))
            place = _pointer(context, builder, sig.args[0], args[0], row, INTS.vector)
            columns.append(builder.load(place, align=4))
        places = _starts_of(context, builder, sig.args[3], args[3])
        for first in range(0, LANES, _SIDE):
            lanes = _indices(range(first, first + _SIDE))
            square = [builder.shuffle_vector(column, column, lanes) for column in columns]
            for start, line in zip(places[first:], _transpose(builder, square), strict=False):
                at = builder.add(start, args[4])
                place = _pointer(context, builder, sig.args[2], args[2], at, half)
                builder.store(line, place, align=1)
        return context.get_dummy_value()

    return types.void(rows, types.intp, flat, starts, types.intp), build


@intrinsic
def scatter_halves(typing_context, value, flat, starts, offset):
    """Write the low 16 bits of lane k at byte starts[k] + offset of `flat` (uint8)."""

    def build(context, builder, sig, args):
        places = _starts_of(context, builder, sig.args[2], args[2])
        for k, start in enumerate(places):
            half = builder.trunc(builder.extract_element(args[0], _INT32(k)), ir.IntType(16))
            at = builder.add(start, args[3])
            place = _pointer(context, builder, sig.args[1], args[1], at, ir.IntType(16))
            builder.store(half, place, align=1)
        return context.get_dummy_value()

    return types.void(INTS, flat, starts, types.intp), build
