"""The two passes of the resizing, compiled: weighted sums of bytes, many at a time.

Each works on vectors, so both passes sum along the slow axis of what they read: the vertical one along the rows of the
picture; the horizontal one along the columns of a strip of `STRIP` rows, which is turned for it, and its result turned
back. In a turned strip pixels stand in pairs of 16 bits, which processors multiply and add in one step:

    [pair of columns][channel][row of the strip][column of the pair]

numba is imported with this module, by the first resize.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending
from numba.core import cgutils, types

from qwenvl_jax.data.compiled import kept

STRIP = 32  # rows turned at a time, so that what is summed stays in the nearest cache; and bytes summed at a time
SIDE = 16  # of the blocks that are turned, in bytes

_intrinsic: Any = extending.intrinsic  # what it makes is called without the first argument
_BYTE, _SHORT, _INT, _LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))


def _picked(places) -> ir.Constant:
    return ir.Constant(ir.VectorType(_INT, len(places)), places)


def _at(builder, address, type_):
    return builder.inttoptr(address, type_.as_pointer())


def _rows(builder, source, stride, column):
    """16 vectors of 16 bytes, one of each row of a block."""
    vector = ir.VectorType(_BYTE, SIDE)
    first = builder.add(source, _LONG(column))
    starts = [builder.add(first, builder.mul(stride, _LONG(row))) for row in range(SIDE)]
    return [builder.load(_at(builder, start, vector), align=1) for start in starts]


def _turned(builder, rows):
    """The columns of a block of 16 x 16 bytes: four perfect shuffles of its rows."""
    half = SIDE // 2
    low, high = (_picked([start + k // 2 + SIDE * (k % 2) for k in range(SIDE)]) for start in (0, half))
    for _ in range(4):
        pairs = [(rows[i], rows[i + half], part) for i in range(half) for part in (low, high)]
        rows = [builder.shuffle_vector(*pair) for pair in pairs]
    return rows


@_intrinsic
def _turn(context, source, stride, target, target_stride):
    """Turns a block of 16 x 16 bytes; addresses and strides in bytes."""

    def generate(context, builder, signature, arguments):
        source, stride, target, target_stride = arguments
        for i, row in enumerate(_turned(builder, _rows(builder, source, stride, 0))):
            address = builder.add(target, builder.mul(target_stride, _LONG(i)))
            builder.store(row, _at(builder, address, row.type), align=1)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64, types.uint64), generate


@_intrinsic
def _turn_in_pairs(context, source, stride, target):
    """Turns 16 rows of 16 pixels of three bytes into pairs; `target` is their place in the turned strip."""

    def generate(context, builder, signature, arguments):
        source, stride, target = arguments
        columns = [c for k in range(3) for c in _turned(builder, _rows(builder, source, stride, SIDE * k))]
        woven = _picked([k // 2 + SIDE * (k % 2) for k in range(2 * SIDE)])
        for pair in range(SIDE // 2):
            for channel in range(3):
                at = 6 * pair + channel
                both = builder.shuffle_vector(columns[at], columns[at + 3], woven)
                shorts = builder.zext(both, ir.VectorType(_SHORT, 2 * SIDE))
                address = builder.add(target, _LONG((3 * pair + channel) * STRIP * 4))
                builder.store(shorts, _at(builder, address, shorts.type), align=1)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64), generate


def _weigher(paired: bool):
    """Sums `count` vectors of `STRIP` bytes (or pairs of 16 bits) with their weights, and rounds to bytes."""
    lanes = STRIP

    def generate(context, builder, signature, arguments):
        source, stride, count, weights, bits, target = arguments
        wide, double = ir.VectorType(_INT, lanes), ir.VectorType(_INT, 2 * lanes)

        def spread(number):
            one = builder.insert_element(ir.Constant(wide, ir.Undefined), number, _INT(0))
            return builder.shuffle_vector(one, one, _picked([0] * lanes))

        def product(source, weights):
            if not paired:
                pixels = builder.load(_at(builder, source, ir.VectorType(_BYTE, lanes)), align=1)
                weight = builder.load(_at(builder, weights, _SHORT), align=2)
                return builder.mul(builder.zext(pixels, wide), spread(builder.sext(weight, _INT)))
            pixels = builder.load(_at(builder, source, ir.VectorType(_SHORT, 2 * lanes)), align=1)
            pair = builder.load(_at(builder, weights, ir.VectorType(_SHORT, 2)), align=2)
            pairs = builder.shuffle_vector(pair, pair, _picked([k % 2 for k in range(2 * lanes)]))
            products = builder.mul(builder.sext(pixels, double), builder.sext(pairs, double), flags=["nsw"])
            even, odd = (_picked([2 * k + which for k in range(lanes)]) for which in (0, 1))
            return builder.add(*(builder.shuffle_vector(products, products, part) for part in (even, odd)))

        total = cgutils.alloca_once(builder, wide)
        builder.store(spread(builder.lshr(builder.shl(_INT(1), bits), _INT(1))), total)
        with cgutils.for_range(builder, count, intp=_LONG) as loop:
            at = builder.add(source, builder.mul(stride, loop.index))
            its = builder.add(weights, builder.mul(_LONG(4 if paired else 2), loop.index))
            builder.store(builder.add(builder.load(total), product(at, its)), total)
        found = builder.ashr(builder.load(total), spread(bits))
        for end, beyond in ((0, "<"), (255, ">")):
            bound = ir.Constant(wide, [end] * lanes)
            found = builder.select(builder.icmp_signed(beyond, found, bound), bound, found)
        found = builder.trunc(found, ir.VectorType(_BYTE, lanes))
        builder.store(found, _at(builder, target, found.type), align=1)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.int64, types.uint64, types.int32, types.uint64), generate


@_intrinsic
def _weigh(context, source, stride, count, weights, bits, target):
    """Of rows of bytes; addresses and strides in bytes."""
    return _weigher(paired=False)


@_intrinsic
def _weigh_pairs(context, source, stride, count, weights, bits, target):
    """Of pairs of a turned strip."""
    return _weigher(paired=True)


@kept
def horizontal(image, first, count, weights, bits, out):
    """Sums along the rows of a picture.

    Args:
      image: u8[H, W, 3], contiguous.
      first, count: i64[out], the first pair of columns of each column of the result, and how many.
      weights: i16[out, 2 * most pairs], contiguous.
      bits: fractional bits of the weights.
      out: u8[H, out, 3], contiguous, written.
    """
    height, width, wide = image.shape[0], 3 * image.shape[1], 3 * out.shape[1]
    across, along = -(-width // (3 * SIDE)), -(-wide // SIDE)
    strip = np.empty((across * SIDE // 2, 3, STRIP, 2), np.int16)
    found = np.empty((along * SIDE, STRIP), np.uint8)
    edge = np.zeros((SIDE, 3 * SIDE), np.uint8)
    source, target, its = image.ctypes.data, out.ctypes.data, weights.ctypes.data
    turned, result, spare = strip.ctypes.data, found.ctypes.data, edge.ctypes.data
    flat, flat_out = image.reshape(height, width), out.reshape(height, wide)
    for top in range(0, height, STRIP):
        for y in range(top, min(top + STRIP, height), SIDE):
            rows = min(SIDE, height - y)
            for block in range(across):
                x = 3 * SIDE * block
                columns = min(3 * SIDE, width - x)
                place = turned + (block * SIDE // 2 * 3 * STRIP + y - top) * 4
                if rows == SIDE and columns == 3 * SIDE:
                    _turn_in_pairs(np.uint64(source + y * width + x), np.uint64(width), np.uint64(place))
                else:
                    for row in range(rows):
                        for column in range(columns):
                            edge[row, column] = flat[y + row, x + column]
                    _turn_in_pairs(np.uint64(spare), np.uint64(3 * SIDE), np.uint64(place))
        for column in range(first.shape[0]):
            for channel in range(3):
                _weigh_pairs(
                    np.uint64(turned + (3 * first[column] + channel) * STRIP * 4),
                    np.uint64(3 * STRIP * 4),
                    count[column],
                    np.uint64(its + 2 * weights.shape[1] * column),
                    np.int32(bits),
                    np.uint64(result + (3 * column + channel) * STRIP),
                )
        for y in range(top, min(top + STRIP, height), SIDE):
            rows = min(SIDE, height - y)
            for block in range(along):
                x = SIDE * block
                columns = min(SIDE, wide - x)
                place = result + x * STRIP + y - top
                if rows == SIDE and columns == SIDE:
                    _turn(np.uint64(place), np.uint64(STRIP), np.uint64(target + y * wide + x), np.uint64(wide))
                else:
                    _turn(np.uint64(place), np.uint64(STRIP), np.uint64(spare), np.uint64(3 * SIDE))
                    for row in range(rows):
                        for column in range(columns):
                            flat_out[y + row, x + column] = edge[row, column]


@kept
def vertical(image, first, count, weights, bits, out):
    """Sums along the columns of a picture.

    Args:
      image: u8[H, bytes], contiguous, at least `STRIP` bytes in a row.
      first, count: i64[out], the first row of each row of the result, and how many.
      weights: i16[out, most taps], contiguous.
      bits: fractional bits of the weights.
      out: u8[out, bytes], contiguous, written.
    """
    width = image.shape[1]
    source, target, its = image.ctypes.data, out.ctypes.data, weights.ctypes.data
    for row in range(first.shape[0]):
        for start in range(0, width, STRIP):
            x = min(start, width - STRIP)
            _weigh(
                np.uint64(source + first[row] * width + x),
                np.uint64(width),
                count[row],
                np.uint64(its + 2 * weights.shape[1] * row),
                np.int32(bits),
                np.uint64(target + row * width + x),
            )
