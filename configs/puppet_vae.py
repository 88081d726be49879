"""The puppet VAE: 96x96 video through 12x12x16 latents, one per 4 frames.

    mi-jax train configs/puppet_vae.py --out runs/vae

Clips are drawn on the fly, so it wants cores to draw them beside a GPU: a batch is 544 frames, of which an H200 took
6,700 a second. On two cores: `--objective.batch-size 3 --objective.frames 9 --workers 1`, and much longer. The shipped
VAE had 820 steps with these terms in a program of its own, which draws into memory maps (benchmarks/gpu/). Result:
docs/puppets.md.
"""

from mi_jax.puppets.vae import VAEObjective
from mi_jax.train.objective import TrainConfig
from mi_jax.train.turns import OptimizerConfig

config = TrainConfig(
    name="puppet_vae",
    objective=VAEObjective(
        batch_size=32,
        frames=17,
        face_weight=2.0,
        mouth_weight=8.0,
        kl_weight=1e-3,
        latent_noise=0.4,
        perceptual_weight=0.5,
        half_size=0.25,
        duets=0.1,
    ),
    steps=3000,
    optimizer=OptimizerConfig(
        kind="muon",
        learning_rate=1.5e-3,
        warmup_steps=60,
        decay_fraction=0.7,
        weight_decay=0.01,
        clip_norm=1.0,
        ema_decay=0.998,
    ),
    compute_dtype="bfloat16",
    workers=12,
    checkpoint_every=200,
    log_every=10,
    sample_every=500,
)
