"""CLIP's two towers (Radford et al. 2021): the vision transformer that LLaVA looks through, and the text tower.

The text tower's state at the end of text is HunyuanVideo's pooled prompt vector. Both have the same layer: pre-norm
attention and MLP with quick-GELU.
"""

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from mi_jax.bounds import Depth, Epsilon, Heads, Pixels, TokenId, Tokens, Vocabulary, Width, Within, check_fields
from mi_jax.errors import InputError
from mi_jax.mesh import gather_parameters
from mi_jax.models.layers import LayerNorm, linear
from mi_jax.models.stack import lookup, run_layers, stack_layers

_Spread = Annotated[float, Within(above=0, most=1000)]


@dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig:
    """A CLIP vision transformer on square images of `image_size` pixels."""

    image_size: Pixels
    patch_size: Pixels
    width: Width
    mlp_width: Width
    depth: Depth
    heads: Heads
    feature_layer: Annotated[int, Within(-1025, 1024)] = -2
    """Index into [embedding, layer 1, ..., layer `depth`]; LLaVA reads the last but one."""
    norm_eps: Epsilon = 1e-5
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # of the pictures CLIP was trained on
    std: tuple[_Spread, _Spread, _Spread] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        check_fields(self)
        if self.image_size % self.patch_size:
            raise InputError(f"patches of {self.patch_size} pixels do not divide a picture of {self.image_size}")
        if self.width % self.heads:
            raise InputError(f"{self.heads} heads do not divide a width of {self.width}")
        if not -self.depth - 1 <= self.feature_layer <= self.depth:
            raise InputError(f"feature_layer is {self.feature_layer}, of {self.depth + 1} states")

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def vit_l_14_336(cls) -> "CLIPVisionConfig":
        """openai/clip-vit-large-patch14-336: 24x24 patches."""
        return cls(image_size=336, patch_size=14, width=1024, mlp_width=4096, depth=24, heads=16)


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """A CLIP text tower. `eos_token_id` marks the position that is read as the pooled vector."""

    vocab_size: Vocabulary
    eos_token_id: TokenId
    width: Width
    mlp_width: Width
    depth: Depth
    heads: Heads
    max_tokens: Tokens = 77
    norm_eps: Epsilon = 1e-5

    def __post_init__(self):
        check_fields(self)
        if self.width % self.heads:
            raise InputError(f"{self.heads} heads do not divide a width of {self.width}")
        if self.eos_token_id >= self.vocab_size:
            raise InputError(f"eos_token_id is {self.eos_token_id}, of {self.vocab_size} tokens")

    @classmethod
    def vit_l_14(cls) -> "CLIPTextConfig":
        """The text tower of openai/clip-vit-large-patch14."""
        return cls(vocab_size=49408, eos_token_id=49407, width=768, mlp_width=3072, depth=12, heads=12)


class CLIPLayer(nnx.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, width: int, mlp_width: int, heads: int, norm_eps: float, rngs: nnx.Rngs):
        self.attention_norm = LayerNorm(width, eps=norm_eps)
        self.query = linear(width, width, rngs=rngs)
        self.key = linear(width, width, rngs=rngs)
        self.value = linear(width, width, rngs=rngs)
        self.out = linear(width, width, rngs=rngs)
        self.mlp_norm = LayerNorm(width, eps=norm_eps)
        self.mlp_in = linear(width, mlp_width, rngs=rngs)
        self.mlp_out = linear(mlp_width, width, rngs=rngs)
        self.heads = heads

    def __call__(self, x: Float[Array, "b n d"], is_causal: bool) -> Float[Array, "b n d"]:
        h = self.attention_norm(x)
        projections = (self.query, self.key, self.value)
        query, key, value = (rearrange(project(h), "b n (h c) -> b n h c", h=self.heads) for project in projections)
        attended = jax.nn.dot_product_attention(query, key, value, is_causal=is_causal)
        x = x + self.out(rearrange(attended, "b n h c -> b n (h c)"))
        h = self.mlp_in(self.mlp_norm(x))
        return x + self.mlp_out(h * jax.nn.sigmoid(1.702 * h))  # quick-GELU


class CLIPVision(nnx.Module):
    """Image -> patch features of the layer that the config names."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        normal = nnx.initializers.normal(0.02)
        self.class_token = nnx.Param(normal(rngs.params(), (c.width,)))
        self.patch = linear(3 * c.patch_size**2, c.width, bias=False, rngs=rngs)
        # As large as the patches: a norm follows their sum, and a short training has to tell places apart.
        self.positions = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (c.num_patches + 1, c.width)))
        self.pre_norm = LayerNorm(c.width, eps=c.norm_eps)
        self.layers = stack_layers(
            lambda rngs: CLIPLayer(c.width, c.mlp_width, c.heads, c.norm_eps, rngs), c.depth, rngs
        )
        # Norm of the class token, which LLaVA does not read; kept so that CLIP's files map to this tree key by key.
        self.post_norm = LayerNorm(c.width, eps=c.norm_eps)

    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b n d"]:
        """Images in [0, 1] -> features of the n patches, row by row, class token dropped, not normalised.

        Raises:
            ValueError: the images are not `image_size` pixels square.
        """
        c = self.config
        if images.shape[1:3] != (c.image_size, c.image_size):
            raise ValueError(f"images are {images.shape[1:3]}, the vision tower sees {c.image_size}x{c.image_size}")
        patch, class_token, positions = gather_parameters((self.patch, self.class_token[...], self.positions[...]))
        mean, std = (jnp.asarray(value, images.dtype).reshape(1, 1, 1, 3) for value in (c.mean, c.std))
        x = ((images - mean) / std).astype(positions.dtype)
        # One axis at a time: where the batch is split over a mesh, JAX lays out no larger reshapes.
        x = rearrange(x, "b (h p) W c -> b h p W c", p=c.patch_size)
        x = rearrange(x, "b h p (w q) c -> b h w p q c", q=c.patch_size)
        x = patch(rearrange(x, "b h w p q c -> b h w (p q c)"))
        x = rearrange(x, "b h w d -> b (h w) d")
        # The class token stands first; a patch of zeros gives its place the layout that the batch has on the mesh.
        x = jnp.pad(x, ((0, 0), (1, 0), (0, 0))) + jnp.pad(class_token[None], ((0, c.num_patches), (0, 0)))[None]
        x = self.pre_norm(x + positions[None])
        count = c.feature_layer if c.feature_layer >= 0 else c.depth + 1 + c.feature_layer
        x = run_layers(self.layers, lambda layer, x: layer(x, is_causal=False), x, c.depth, count)
        return x[:, 1:]


class CLIPText(nnx.Module):
    """Token ids -> the normalised state at the first end-of-text token."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        normal = nnx.initializers.normal(0.02)
        self.tokens = nnx.Param(normal(rngs.params(), (c.vocab_size, c.width)))
        self.positions = nnx.Param(normal(rngs.params(), (c.max_tokens, c.width)))
        self.layers = stack_layers(
            lambda rngs: CLIPLayer(c.width, c.mlp_width, c.heads, c.norm_eps, rngs), c.depth, rngs
        )
        self.final_norm = LayerNorm(c.width, eps=c.norm_eps)

    def __call__(self, ids: Int[Array, "b n"]) -> Float[Array, "b p"]:
        """Pooled vector of each prompt. Attention is causal, so nothing after the end-of-text token is seen by it.

        Raises:
            ValueError: more than `max_tokens` tokens.
        """
        c = self.config
        if ids.shape[1] > c.max_tokens:
            raise ValueError(f"{ids.shape[1]} tokens, the text tower holds {c.max_tokens}")
        x = lookup(self.tokens[...], ids) + gather_parameters(self.positions[...])[None, : ids.shape[1]]
        x = run_layers(self.layers, lambda layer, x: layer(x, is_causal=True), x, c.depth, c.depth)
        end = jnp.argmax(ids == c.eos_token_id, axis=1)
        return self.final_norm(jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0])
