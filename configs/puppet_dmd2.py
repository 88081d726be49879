"""The puppets' four-step student: DMD2 with distilled guidance, student and critic as factors of the shipped teacher.

    mi-jax prepare --puppets 300 --duets 20 --seconds 2.92 --model puppet-teacher --out runs/records_puppet
    mi-jax train configs/puppet_dmd2.py --out runs/puppet_dmd2
    mi-jax export runs/puppet_dmd2 four-steps.safetensors --dtype bfloat16

150 of the student's steps among 450 of the critic's, on windows of two or three clips: 36 minutes on two cores that
did other work beside. The factors that ship as `puppet` are of this run. Result and variants: docs/distillation.md.
"""

from mi_jax.models.dit import DiTConfig
from mi_jax.train.dmd2 import DMD2Objective
from mi_jax.train.objective import TrainConfig
from mi_jax.train.schedules import Ramp
from mi_jax.train.turns import OptimizerConfig

config = TrainConfig(
    name="puppet_dmd2",
    objective=DMD2Objective(
        dit=DiTConfig.puppet(),
        records="runs/records_puppet",
        teacher="puppet-teacher",
        teacher_dtype="float32",
        student_rank=32,
        critic_rank=32,
        student=OptimizerConfig(learning_rate=3e-4, warmup_steps=60, b1=0.0, b2=0.99, weight_decay=0.0, ema_decay=0.98),
        critic=OptimizerConfig(learning_rate=5e-4, b1=0.0, b2=0.99, weight_decay=0.0, ema_decay=None),
        guidance_audio=1.0,
        adaptive_weight=1.5,
        critic_turns=3,
        follow=0.1,
        base=Ramp(start=1.0, end=0.05, steps=400),
        matching=Ramp(start=0.0, end=1.0, steps=400),
        gan=Ramp(start=0.05, end=0.05),
        gan_taps=(("double", 1), ("single", 2), ("single", 5)),
        gan_r1=1.0,
        windows=((9, 3), (17, 2)),
        window_weights=(0.6, 0.4),
        whole_mask=0.1,
        speakers=2,
        shift=3.0,
        mid_clip=0.35,
        sample_vae="puppet-teacher",
    ),
    steps=600,
    optimizer=OptimizerConfig(learning_rate=3e-4),
    matmul_precision="bfloat16",
    checkpoint_every=200,
    keep=20,
    log_every=20,
    sample_every=500,
)
