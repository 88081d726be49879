"""Stage 2 on puppets: audio attention added, everything trained, face-masked adaptive loss with weight 10 (paper 3.3).

    mi-jax train configs/puppet_stage2.py --out runs/stage2

Starts from the averaged parameters of runs/stage1. Cost and result: docs/puppets.md.
"""

from mi_jax.models.dit import DiTConfig
from mi_jax.train.curriculum import CurriculumObjective
from mi_jax.train.objective import TrainConfig

config = TrainConfig(
    name="puppet_stage2",
    objective=CurriculumObjective(
        dit=DiTConfig.puppet(),
        records="runs/records",
        init_from="runs/stage1",
        adaptive_weight=10.0,
        whole_mask=0.1,
        speakers=2,
        shift=2.0,
        sigma_scale=1.5,
        sample_vae="runs/encoders",
    ),
    steps=5000,
    optimizer="muon",
    learning_rate=2e-3,
    warmup_steps=50,
    decay_fraction=0.9,
    matmul_precision="bfloat16",
    weight_decay=0.01,
    ema_decay=0.998,
    checkpoint_every=200,
    sample_every=2500,
)
