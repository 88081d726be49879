"""Causal 3D convolution, channels last, in the form that suits the backend.

On accelerators a causal convolution is one `lax.conv_general_dilated`. XLA's CPU backend has no fast path for it, so
there it is written as matrix products: the width taps become input columns and the other taps become output columns
that are shifted and added. The gradients are the transposes of that product. Both forms compute the same sum; a test
holds values and gradients against each other.
"""

from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

Triple = tuple[int, int, int]


def causal_pad(x: Float[Array, "b t h w c"], kernel: Triple) -> Float[Array, "b T H W c"]:
    """Repeats the border pixels on all sides and the first frame to the left in time: no output sees the future."""
    kt, kh, kw = kernel
    if kernel == (1, 1, 1):
        return x
    return jnp.pad(x, ((0, 0), (kt - 1, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)), mode="edge")


def _by_library(x, kernel, strides):
    x = causal_pad(x, kernel.shape[:3])
    return lax.conv_general_dilated(x, kernel, strides, "VALID", dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))


def _add_over_time(taps):
    """[b t h w kt o]: the product of frame f with time tap k belongs to output frame f + kt - 1 - k."""
    kt, t = taps.shape[4], taps.shape[1]
    if kt == 1:
        return taps[..., 0, :]
    # Products commute with the padding: repeat the first frame's instead of convolving copies of it.
    first = jnp.broadcast_to(taps[:, :1], (taps.shape[0], kt - 1, *taps.shape[2:]))
    taps = jnp.concatenate([first, taps], axis=1)
    return sum(taps[:, k : k + t, :, :, k] for k in range(kt))


def _by_rows(x, kernel):
    """Stride 1. Columns are the width taps; one product yields all time and height taps, then shifted and added."""
    kt, kh, kw, _, o = kernel.shape
    b, t, h, w, _ = x.shape
    columns = _columns(causal_pad(x, (1, kh, kw)), kw)
    taps = columns @ rearrange(kernel, "kt kh kw c o -> (kw c) (kt kh o)")
    taps = taps.reshape(b, t, h + kh - 1, w, kt, kh, o)
    return _add_over_time(sum(taps[:, :, i : i + h, :, :, i] for i in range(kh)))


@jax.custom_vjp
def _by_products(x, kernel):
    return _by_rows(x, kernel)


def _backward(saved, g):
    """Both gradients are one product each, with the output gradient shifted to every time and height tap.

    Autodiff of `_by_rows` gives the same products, but XLA's CPU backend then fuses the shifts into transposing copies
    that take longer than the products. The barriers keep them apart.
    """
    x, kernel = saved
    kt, kh, kw = kernel.shape[:3]
    shifted = lax.optimization_barrier(_shift_to_taps(g, kt, kh))
    columns = lax.optimization_barrier(_columns(causal_pad(x, (1, kh, kw)), kw))
    d_kernel = jnp.einsum("...k,...o->ko", columns, shifted)
    d_columns = shifted @ rearrange(kernel, "kt kh kw c o -> (kt kh o) (kw c)")
    d_columns = jnp.split(lax.optimization_barrier(d_columns), kw, axis=-1)
    d_x = sum(_zeros_around(part, 3, j, kw - 1 - j) for j, part in enumerate(d_columns))
    d_x = _fold_border(_fold_border(d_x, 3, kw // 2), 2, kh // 2)
    return d_x, rearrange(d_kernel, "(kw c) (kt kh o) -> kt kh kw c o", kt=kt, kh=kh, kw=kw)


_by_products.defvjp(lambda x, kernel: (_by_rows(x, kernel), (x, kernel)), _backward)


def _columns(x, kw):
    """The width taps of a padded input side by side: [b t h W c] -> [b t h w (kw c)]."""
    w = x.shape[3] - kw + 1
    return jnp.concatenate([x[:, :, :, j : j + w] for j in range(kw)], axis=-1)


def _shift_to_taps(g, kt, kh):
    """Transpose of shift and add: [b t h w o] -> [b t H w (kt kh o)], H = h + kh - 1, what each tap receives."""
    h = g.shape[2]
    rows = _zeros_around(g, 2, kh - 1, kh - 1)
    rows = jnp.concatenate([rows[:, :, kh - 1 - i : h + 2 * (kh - 1) - i] for i in range(kh)], axis=-1)
    frames = []
    for ahead in range(kt - 1, -1, -1):
        # Frame f reached output f + ahead; the first frame, repeated to its left, reached 0 .. ahead.
        later = _zeros_around(rows[:, 1 + ahead :], 1, 0, min(ahead, rows.shape[1] - 1))
        frames.append(jnp.concatenate([rows[:, : 1 + ahead].sum(axis=1, keepdims=True), later], axis=1))
    return jnp.concatenate(frames, axis=-1)


def _zeros_around(x, axis, before, after):
    # Written as a concatenation: XLA's CPU backend turns a sum of pads into one loop with a branch per element.
    def zeros(n):
        return jnp.zeros((*x.shape[:axis], n, *x.shape[axis + 1 :]), x.dtype)

    return jnp.concatenate([zeros(before), x, zeros(after)], axis=axis)


def _fold_border(x, axis, reach):
    """Transpose of edge padding by `reach` on both sides: what fell on the copies is added to the border itself."""
    if not reach:
        return x
    before, inner, after = jnp.split(x, [reach, x.shape[axis] - reach], axis=axis)
    first, rest = jnp.split(inner, [1], axis=axis)
    inner = jnp.concatenate([first + before.sum(axis=axis, keepdims=True), rest], axis=axis)
    rest, last = jnp.split(inner, [x.shape[axis] - 2 * reach - 1], axis=axis)
    return jnp.concatenate([rest, last + after.sum(axis=axis, keepdims=True)], axis=axis)


def _by_strided_taps(x, kernel, strides):
    kt, kh, kw, _, _ = kernel.shape
    st, sh, sw = strides
    x = causal_pad(x, (kt, kh, kw))
    t, h, w = ((n - k) // s + 1 for n, k, s in zip(x.shape[1:4], (kt, kh, kw), strides, strict=True))

    def tap(k, i, j):
        view = x[:, k : k + st * (t - 1) + 1 : st, i : i + sh * (h - 1) + 1 : sh, j : j + sw * (w - 1) + 1 : sw]
        return view @ kernel[k, i, j]

    return sum(tap(k, i, j) for k in range(kt) for i in range(kh) for j in range(kw))


def causal_conv3d(
    x: Float[Array, "b t h w c"], kernel: Float[Array, "kt kh kw c o"], strides: Triple = (1, 1, 1), *, products: bool
) -> Float[Array, "b T H W o"]:
    """Convolves with replicate padding in space and on the left in time: output k sees inputs 0 .. k * strides[0].

    products: True for the matrix-product form (CPU), False for the library convolution. The kernel is odd in space.
    """
    if x.shape[1] == 1:
        # Padded in time with itself: all time taps see the same frame.
        kernel, strides = kernel.sum(axis=0, keepdims=True), (1, *strides[1:])
    if not products:
        return _by_library(x, kernel, strides)
    if prod(strides) == 1:
        return _by_products(x, kernel)
    return _by_strided_taps(x, kernel, strides)


class CausalConv3d(nnx.Module):
    """`causal_conv3d` with a kernel [kt kh kw c o] and a bias [o], both f32 and cast to the input's dtype.

    zero: start at 0, for the last convolution of a residual branch, which then starts as the identity.
    """

    def __init__(
        self,
        c: int,
        o: int,
        kernel: Triple = (3, 3, 3),
        strides: Triple = (1, 1, 1),
        *,
        zero: bool = False,
        rngs: nnx.Rngs,
    ):
        # Fan-in over taps and input channels.
        init = nnx.initializers.zeros if zero else nnx.initializers.lecun_normal(in_axis=(0, 1, 2, 3))
        self.kernel = nnx.Param(init(rngs.params(), (*kernel, c, o), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((o,)))
        self.strides = strides

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b T H W o"]:
        kernel = self.kernel[...].astype(x.dtype)
        y = lax.platform_dependent(
            x,
            kernel,
            cpu=partial(causal_conv3d, strides=self.strides, products=True),
            default=partial(causal_conv3d, strides=self.strides, products=False),
        )
        return y + self.bias[...].astype(x.dtype).reshape(1, 1, 1, 1, -1)
