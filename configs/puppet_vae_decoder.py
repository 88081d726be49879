"""The puppet VAE's decoder, trained on with the encoder as it is: sharper pictures of the same latents, and of
latents that a denoiser did not get quite clean.

    mi-jax train configs/puppet_vae_decoder.py --out runs/vae_decoder

A denoiser that was trained on the latents stays valid. Not run yet: neither cost nor result is known.
"""

from mi_jax.train.objective import TrainConfig
from mi_jax.train.vae import VAEObjective

config = TrainConfig(
    name="puppet_vae_decoder",
    objective=VAEObjective(init_from="runs/vae", decoder_only=True, latent_noise=0.3, face_weight=2.0),
    steps=3000,
    optimizer="muon",
    learning_rate=1.2e-3,
    warmup_steps=50,
    decay_fraction=0.8,
    weight_decay=0.01,
    clip_norm=1.0,
    ema_decay=0.998,
    checkpoint_every=200,
    log_every=10,
    sample_every=500,
)
