"""The multimodal text encoder: LLaVA (Liu et al. 2023; CLIP's vision tower, a projector, Llama) and CLIP's text tower.

Portrait and prompt go in as one sequence, `template(<image> ... prompt)`; out come the hidden states of the image
positions and of the prompt's positions, which the denoiser attends to (image before text), and CLIP's pooled vector.
HunyuanVideo reads Llama two layers before its end without the final norm, Magic-1-For-1 the last hidden state.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mi_jax.bounds import Tokens, Within, check_fields
from mi_jax.errors import InputError
from mi_jax.mesh import gather_parameters
from mi_jax.models.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from mi_jax.models.layers import linear
from mi_jax.models.llama import Llama, LlamaConfig
from mi_jax.models.prompts import PromptConfig


@dataclass(frozen=True, kw_only=True)
class MLLMConfig:
    """Sizes of the parts, and what is read from them."""

    vision: CLIPVisionConfig | None
    """None: prompts alone are read, no portraits (HunyuanVideo from text)."""
    language: LlamaConfig
    clip_text: CLIPTextConfig | None
    """None: the denoiser takes no pooled vector."""
    prompts: PromptConfig
    hidden_state_skip_layer: Annotated[int, Within(0, 1024)] = 2
    """0 reads the last hidden state, after the final norm; s > 0 the raw state s layers before the end."""
    image_token_stride: Tokens = 4
    """Every so manieth image token is kept for the denoiser (Magic-1-For-1, HunyuanVideo-I2V with token replace)."""

    def __post_init__(self):
        check_fields(self)
        p = self.prompts
        if self.vision and p.image_tokens != self.vision.num_patches:
            raise InputError(
                f"<image> stands for {p.image_tokens} tokens, the image has {self.vision.num_patches} patches"
            )
        text = self.clip_text
        if text and (p.clip_max_tokens, p.eos_token_id) != (text.max_tokens, text.eos_token_id):
            raise InputError("prompts and the CLIP text tower differ in their length or their end-of-text token")
        if self.vision and p.image_token_id >= self.language.vocab_size:
            raise InputError(f"image_token_id is {p.image_token_id}, of {self.language.vocab_size} tokens")
        if self.hidden_state_skip_layer > self.language.depth:
            raise InputError(
                f"hidden_state_skip_layer is {self.hidden_state_skip_layer}, of {self.language.depth} layers"
            )

    @property
    def image_size(self) -> int | None:
        """Side of the square portrait that the vision tower sees, in pixels."""
        return self.vision.image_size if self.vision else None

    @property
    def width(self) -> int:
        """Width of text and image tokens."""
        return self.language.width

    @property
    def pooled_width(self) -> int | None:
        """Width of the pooled vector."""
        return self.clip_text.width if self.clip_text else None

    @property
    def num_image_tokens(self) -> int:
        """Image tokens given to the denoiser."""
        return -(-self.vision.num_patches // self.image_token_stride) if self.vision else 0

    @classmethod
    def llava_llama3_8b(cls) -> "MLLMConfig":
        """xtuner/llava-llama-3-8b-v1_1 and CLIP ViT-L/14's text tower, as in HunyuanVideo: 576 -> 144 image tokens."""
        return cls(
            vision=CLIPVisionConfig.vit_l_14_336(),
            language=LlamaConfig.llama3_8b(vocab_size=128_320),
            clip_text=CLIPTextConfig.vit_l_14(),
            prompts=PromptConfig.hunyuan_video(),
        )

    @classmethod
    def puppet(cls) -> "MLLMConfig":
        """The same parts at toy width (1.1 M parameters) for 96x96 portraits: 36 -> 9 image tokens."""
        prompts = PromptConfig.puppet()
        return cls(
            vision=CLIPVisionConfig(
                image_size=96, patch_size=16, width=96, mlp_width=384, depth=3, heads=4, feature_layer=-1
            ),
            language=LlamaConfig(vocab_size=768, width=128, mlp_width=352, depth=2, heads=4, key_value_heads=2),
            clip_text=CLIPTextConfig(
                vocab_size=768,
                eos_token_id=prompts.eos_token_id,
                width=96,
                mlp_width=384,
                depth=2,
                heads=4,
                max_tokens=prompts.clip_max_tokens,
            ),
            prompts=prompts,
            hidden_state_skip_layer=0,
        )

    def replace(self, **changes) -> "MLLMConfig":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


class MLLM(nnx.Module):
    """CLIP vision -> projector -> Llama, and CLIP text, all weights f32 at creation."""

    def __init__(self, config: MLLMConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.vision = CLIPVision(c.vision, rngs=rngs) if c.vision else None
        self.projector_in = linear(c.vision.width, c.width, rngs=rngs) if c.vision else None
        self.projector_out = linear(c.width, c.width, rngs=rngs) if c.vision else None
        self.language = Llama(c.language, rngs=rngs)
        self.clip_text = CLIPText(c.clip_text, rngs=rngs) if c.clip_text else None

    def image_features(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b n d"]:
        """What Llama reads in place of the image tokens: projected patch features (exact GELU between the layers).

        Raises:
            ValueError: the model has no vision tower.
        """
        if self.vision is None:
            raise ValueError("this model has no vision tower: it reads prompts alone")
        project_in, project_out = gather_parameters((self.projector_in, self.projector_out))
        return project_out(jax.nn.gelu(project_in(self.vision(images)), approximate=False))

    def hidden_states(
        self,
        images: Float[Array, "b H W 3"] | None,
        input_ids: Int[Array, "b n"],
        attention_mask: Bool[Array, "b n"],
    ) -> Float[Array, "b n d"]:
        """Llama's hidden state at every position, at the layer that the config names.

        The k-th image token of a sequence is replaced by the k-th image feature; a sequence holds as many as the vision
        tower has patches (`Prompter` sees to it) or, without images, none.
        """
        x = self.language.embed(input_ids)
        if images is not None:
            features = self.image_features(images).astype(x.dtype)
            is_image = input_ids == self.config.prompts.image_token_id
            index = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, features.shape[1] - 1)
            x = jnp.where(is_image[..., None], jnp.take_along_axis(features, index[..., None], axis=1), x)
        return self.language(x, attention_mask, self.config.hidden_state_skip_layer)

    def encode(
        self,
        images: Float[Array, "b H W 3"] | None,
        input_ids: Int[Array, "b n"],
        attention_mask: Bool[Array, "b n"],
        text_positions: Int[Array, "b k"],
        clip_ids: Int[Array, "b j"] | None = None,
    ) -> tuple[Float[Array, "b m d"] | None, Float[Array, "b k d"], Bool[Array, "b k"], Float[Array, "b p"] | None]:
        """Image tokens (subsampled), text tokens (cropped), text mask (False at padding) and the pooled CLIP vector.

        All but `images` come from `Prompter.tokenize`: `mllm.encode(images, *prompts.arrays)`. Images are RGB in
        [0, 1], `config.image_size` pixels square; CLIP's normalisation is done here. Without images there are no image
        tokens, without a CLIP text tower no pooled vector.

        Raises:
            ValueError: the model has a CLIP text tower and `clip_ids` are missing.
        """
        c = self.config
        states = self.hidden_states(images, input_ids, attention_mask)
        text_tokens = jnp.take_along_axis(states, text_positions[..., None], axis=1)
        text_mask = jnp.take_along_axis(attention_mask, text_positions, axis=1)
        image_tokens = None
        if images is not None:
            first = jnp.argmax(input_ids == c.prompts.image_token_id, axis=1)
            index = first[:, None] + jnp.arange(0, c.vision.num_patches, c.image_token_stride)[None]
            image_tokens = jnp.take_along_axis(states, index[..., None], axis=1)
        pooled = None
        if self.clip_text is not None:
            if clip_ids is None:
                raise ValueError("this model has a CLIP text tower: give clip_ids")
            pooled = self.clip_text(clip_ids)
        return image_tokens, text_tokens, text_mask, pooled
