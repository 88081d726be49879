"""DMD2 with distilled guidance at 13B (paper 3.4): all weights of the student, the critic as factors of the teacher.

    mi-jax train configs/magic_infinite_dmd2.py --out runs/magic_infinite_dmd2 --distributed auto   # on both hosts
    mi-jax export runs/magic_infinite_dmd2 weights/four-steps --base weights/magic-infinite

For the paper's 16 H100s (two hosts). The paper gives no rate, no length and no schedule: rates, betas and the number of
student steps are those of public DMD trainings of 14B models (docs/distillation.md), 1,000 of the student's among 5,000
of the critic's. Save often and choose by eye: more is not better. This project has not run it; what it takes of the
machine is in docs/scale.md.
"""

import dataclasses
import runpy
from pathlib import Path

from mi_jax.train.dmd2 import DMD2Objective
from mi_jax.train.schedules import Ramp
from mi_jax.train.turns import OptimizerConfig

stage2 = runpy.run_path(str(Path(__file__).with_name("magic_infinite_stage2.py")))["config"]
curriculum = stage2.objective
optimizer = OptimizerConfig(learning_rate=2e-6, warmup_steps=60, b1=0.0, b2=0.999, clip_norm=1.0, ema_decay=0.99)
config = dataclasses.replace(
    stage2,
    name="magic_infinite_dmd2",
    objective=DMD2Objective(
        dit=curriculum.dit,
        records=curriculum.records,
        teacher="runs/magic_infinite_stage2",
        critic_rank=128,
        student=optimizer,
        critic=dataclasses.replace(optimizer, learning_rate=2e-5, ema_decay=None),
        guidance_audio=4.0,
        guidance_text=4.0,
        shift=curriculum.shift,
        windows=((33, 2),),
        window_weights=(1.0,),
        mid_clip=curriculum.mid_clip,
        adaptive_weight=curriculum.adaptive_weight,
        whole_mask=curriculum.whole_mask,
        base=Ramp(start=1.0, end=0.1, steps=2400),
        matching=Ramp(start=0.0, end=1.0, steps=2400),
        sample_vae=curriculum.sample_vae,
    ),
    steps=6000,
    optimizer=optimizer,
    seq=8,
    checkpoint_every=300,
    keep=20,
    sample_every=600,
)
