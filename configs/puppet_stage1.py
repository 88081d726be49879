"""Stage 1 on puppets: portrait + text to video, no audio (paper 3.3).

    mi-jax train configs/puppet_stage1.py --out runs/stage1

Needs the records of `mi-jax prepare` (docs/puppets.md gives the whole chain). Cost and result: docs/puppets.md.
"""

from mi_jax.models.dit import DiTConfig
from mi_jax.train.curriculum import CurriculumObjective
from mi_jax.train.objective import TrainConfig
from mi_jax.train.turns import OptimizerConfig

config = TrainConfig(
    name="puppet_stage1",
    objective=CurriculumObjective(
        dit=DiTConfig.puppet(audio=False), records="runs/records", sample_vae="runs/encoders"
    ),
    steps=700,
    optimizer=OptimizerConfig(
        kind="muon", learning_rate=3e-3, warmup_steps=50, decay_fraction=0.3, weight_decay=0.01, ema_decay=0.99
    ),
    matmul_precision="bfloat16",
    checkpoint_every=300,
    sample_every=400,
)
