"""Steps of 64 bytes, which numba has no words for: written in the compiler's own terms (LLVM).

They fit any processor: where it has no such wide instructions, LLVM takes several narrow ones; but for
`take`, whose callers ask `can_take` first. Nothing is checked here. Called by kernels.plain.
"""

from __future__ import annotations

import numba as nb
import numba.extending

LANES = 64
"""Bytes that are taken at once."""

_INT, _WORD = nb.types.int64, nb.types.uint64


@nb.extending.intrinsic
def can_take(typing_context):
    """Whether this processor packs chosen bytes together in one instruction (AVX512-VBMI2)."""

    def generate(context, builder, signature, arguments):
        features = context.codegen().magic_tuple()[2].split(",")
        return context.get_constant(nb.types.boolean, "+avx512vbmi2" in features)

    return nb.types.boolean(), generate


@nb.extending.intrinsic
def marks(typing_context, src, at):
    """Of src[at:at + LANES] (uint8): a bit for each that is not zero, and for each of 128 or more."""

    def generate(context, builder, signature, arguments):
        from llvmlite import ir

        bytes_ = _load(context, builder, signature.args[0], *arguments)
        zeros = ir.Constant(bytes_.type, [0] * LANES)
        found = [
            builder.bitcast(builder.icmp_signed(sign, bytes_, zeros), ir.IntType(LANES))
            for sign in ("!=", "<")
        ]
        return context.make_tuple(builder, signature.return_type, found)

    return nb.types.UniTuple(_WORD, 2)(src, _INT), generate


@nb.extending.intrinsic
def take(typing_context, src, at, mask, gaps, g, out, n):
    """The bytes of src[at:at + LANES] whose bit of `mask` is set, into out[n:], and into gaps[g:] how
    far each lies behind the one before; the first, behind `at`. All are uint8; LANES bytes are written
    to both.
    """

    def generate(context, builder, signature, arguments):
        from llvmlite import ir

        src, at, mask, gaps, g, out, n = arguments
        bytes_ = _load(context, builder, signature.args[0], src, at)
        flags = ir.VectorType(ir.IntType(1), LANES)
        kind = ir.FunctionType(bytes_.type, [bytes_.type, flags, bytes_.type])
        name = f"llvm.experimental.vector.compress.v{LANES}i8"
        compress = builder.module.declare_intrinsic(name, (), kind)
        chosen = builder.bitcast(mask, flags)
        zeros = ir.Constant(bytes_.type, [0] * LANES)
        every = ir.Constant(bytes_.type, list(range(LANES)))
        places = builder.call(compress, [every, chosen, zeros])
        before = [ir.Constant(ir.IntType(32), i) for i in (LANES, *range(LANES - 1))]
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), before)
        between = builder.sub(places, builder.shuffle_vector(places, zeros, lanes))
        _store(context, builder, signature.args[3], gaps, g, between)
        values = builder.call(compress, [bytes_, chosen, zeros])
        _store(context, builder, signature.args[5], out, n, values)
        return context.get_dummy_value()

    return nb.types.void(src, _INT, _WORD, gaps, _INT, out, _INT), generate


@nb.extending.intrinsic
def clear(typing_context, out, at):
    """out[at:at + LANES] = 0, of bytes."""

    def generate(context, builder, signature, arguments):
        from llvmlite import ir

        zeros = ir.Constant(ir.VectorType(ir.IntType(8), LANES), [0] * LANES)
        _store(context, builder, signature.args[0], *arguments, zeros)
        return context.get_dummy_value()

    return nb.types.void(out, _INT), generate


@nb.extending.intrinsic
def leading_zeros(typing_context, word):
    """How many zero bits a uint64 has above its highest set one, as int64; it has one."""

    def generate(context, builder, signature, arguments):
        return builder.ctlz(arguments[0], context.get_constant(nb.types.boolean, 1))

    return _INT(_WORD), generate


def _load(context, builder, kind, array, at):
    loaded = builder.load(_place(context, builder, kind, array, at))
    loaded.align = 1
    return loaded


def _store(context, builder, kind, array, at, values):
    builder.store(values, _place(context, builder, kind, array, at)).align = 1


def _place(context, builder, kind, array, at):
    from llvmlite import ir
    from numba.np.arrayobj import make_array

    element = builder.gep(make_array(kind)(context, builder, array).data, [at])
    return builder.bitcast(element, ir.VectorType(ir.IntType(8), LANES).as_pointer())
