"""A whole avatar of untrained networks a few channels wide: every part and every seam, in seconds."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mi_jax.avatar.config import AvatarConfig
from mi_jax.data.features import Encoders
from mi_jax.models.audio_encoder import AudioEncoderConfig
from mi_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from mi_jax.models.dit import DiT, DiTConfig
from mi_jax.models.llama import LlamaConfig
from mi_jax.models.mllm import MLLM, MLLMConfig
from mi_jax.models.prompts import PromptConfig, Prompter
from mi_jax.models.vae import VAE, VAEConfig
from mi_jax.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from mi_jax.puppets.words import build_puppet_tokenizer
from mi_jax.sample.avatar import Avatar

SENTENCES = ["She is happy and nods.", "He is sad."]


def tiny_config(height: int = 32, width: int = 32) -> AvatarConfig:
    prompts = PromptConfig.puppet()
    return AvatarConfig(
        dit=DiTConfig(
            latent_channels=4, image_to_video=True, width=32, heads=2, mlp_ratio=2, double_depth=1, single_depth=2,
            refiner_depth=1, text_dim=16, pooled_dim=16, rope_axes=(4, 6, 6), remat="none",
            audio=AudioEncoderConfig(input_dim=16, layers=2, width=16, heads=2, depth=1),
        ),
        vae=VAEConfig(
            latent_channels=4, widths=(16, 16, 16), strides=((2, 1, 1), (2, 2, 2)),
            decoder_strides=((2, 2, 2), (2, 1, 1)), encoder_blocks=1, decoder_blocks=1, time_kernels=(1, 1, 1),
            patch_size=4, norm="rms", shortcuts=True, tile_frames=16, scaling_factor=8.0,
        ),
        wav2vec2=Wav2Vec2Config(
            conv_dim=8, width=16, num_layers=1, num_heads=2, mlp_width=16, position_kernel=8, position_groups=2
        ),
        mllm=MLLMConfig(
            vision=CLIPVisionConfig(
                image_size=96, patch_size=16, width=16, mlp_width=16, depth=1, heads=2, feature_layer=-1
            ),
            language=LlamaConfig(vocab_size=256, width=16, mlp_width=16, depth=1, heads=2, key_value_heads=1),
            clip_text=CLIPTextConfig(
                vocab_size=256, eos_token_id=prompts.eos_token_id, width=16, mlp_width=16, depth=1, heads=2,
                max_tokens=34,
            ),
            prompts=prompts,
            hidden_state_skip_layer=0,
        ),
        height=height, width=width, steps=2, shift=3.0,
    )  # fmt: skip


def make_avatar(config: AvatarConfig | None = None) -> Avatar:
    """No weight is zero, not even where training would start at zero, so that every condition reaches the pixels."""
    config = tiny_config() if config is None else config
    tokenizers = [build_puppet_tokenizer(SENTENCES, closed=closed) for closed in (False, True)]
    encoders = Encoders(
        vae=draw_weights(VAE, config.vae, 1),
        wav2vec2=draw_weights(Wav2Vec2, config.wav2vec2, 2),
        mllm=draw_weights(MLLM, config.mllm, 3),
        prompter=Prompter(config.mllm.prompts, *tokenizers),
    )
    return Avatar(config=config, dit=draw_weights(DiT, config.dit, 0), encoders=encoders)


def draw_weights(kind: type[nnx.Module], config, seed: int) -> nnx.Module:
    """A module whose matrices have small gain and whose scales are near 1; drawn by NumPy, which compiles nothing."""
    graph, state = nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    leaves = []
    for path, variable in nnx.to_flat_state(state):
        fan_in = np.prod(variable.shape[:-1]) if len(variable.shape) > 1 else 100
        value = 0.5 * rng.normal(size=variable.shape) / np.sqrt(fan_in) + ("scale" in path)
        leaves.append((path, variable.replace(jnp.asarray(value, variable.dtype))))
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def portrait(height: int = 40, width: int = 48, seed: int = 0) -> np.ndarray:
    """A smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)


def voice(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise with a slow beat, at 16 kHz."""
    n = round(seconds * 16000)
    beat = np.sin(np.arange(n) * 2 * np.pi * 3 / 16000)
    return (0.1 * beat * np.random.default_rng(seed).normal(size=n)).astype(np.float32)
