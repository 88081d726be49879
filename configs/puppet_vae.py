"""The puppet VAE: 96x96 video through 12x12x16 latents, one per 4 frames.

    mi-jax train configs/puppet_vae.py --out runs/vae_first

configs/puppet_vae_noisy.py goes on from here. Cost and result: docs/puppets.md.
"""

from mi_jax.train.objective import TrainConfig
from mi_jax.train.vae import VAEObjective

config = TrainConfig(
    name="puppet_vae",
    objective=VAEObjective(face_weight=2.0),
    steps=1800,
    optimizer="muon",
    learning_rate=1.2e-3,
    warmup_steps=100,
    decay_fraction=0.8,
    weight_decay=0.01,
    clip_norm=1.0,
    ema_decay=0.998,
    workers=1,
    checkpoint_every=200,
    log_every=10,
    sample_every=250,
)
