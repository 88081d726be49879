"""The puppet VAE, trained on with noise in its latents: a decoder that forgives what a denoiser leaves, and an encoder
that says nothing which little noise would drown.

    mi-jax train configs/puppet_vae_noisy.py --out runs/vae

Starts from the averaged parameters of configs/puppet_vae.py (runs/vae_first). Cost and result: docs/puppets.md.
"""

from mi_jax.train.objective import TrainConfig
from mi_jax.train.vae import VAEObjective

config = TrainConfig(
    name="puppet_vae_noisy",
    objective=VAEObjective(
        init_from="runs/vae_first", latent_noise=0.5, kl_weight=1e-3, face_weight=2.0, mouth_weight=12.0
    ),
    steps=2600,
    optimizer="muon",
    learning_rate=1.2e-3,
    warmup_steps=50,
    decay_fraction=0.8,
    weight_decay=0.01,
    clip_norm=1.0,
    ema_decay=0.998,
    workers=1,
    checkpoint_every=200,
    log_every=10,
    sample_every=500,
)
