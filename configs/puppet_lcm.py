"""The puppets' baseline: consistency distillation (LCM) of the same teacher on the same records, for four steps.

    mi-jax train configs/puppet_lcm.py --out runs/puppet_lcm
    mi-jax export runs/puppet_lcm runs/puppet-lcm --base puppet

Records as for `puppet_dmd2.py`. Result: docs/distillation.md.
"""

import dataclasses
import runpy
from pathlib import Path

from mi_jax.models.dit import DiTConfig
from mi_jax.train.lcm import LCMObjective
from mi_jax.train.turns import OptimizerConfig

dmd2 = runpy.run_path(str(Path(__file__).with_name("puppet_dmd2.py")))["config"]
config = dataclasses.replace(
    dmd2,
    name="puppet_lcm",
    objective=LCMObjective(
        dit=DiTConfig.puppet(),
        records=dmd2.objective.records,
        teacher=dmd2.objective.teacher,
        teacher_dtype=dmd2.objective.teacher_dtype,
        student_rank=dmd2.objective.student_rank,
        student=OptimizerConfig(learning_rate=3e-4, warmup_steps=20, weight_decay=0.0, ema_decay=0.98),
        guidance_audio=dmd2.objective.guidance_audio,
        adaptive_weight=dmd2.objective.adaptive_weight,
        windows=dmd2.objective.windows,
        window_weights=dmd2.objective.window_weights,
        whole_mask=dmd2.objective.whole_mask,
        speakers=dmd2.objective.speakers,
        shift=dmd2.objective.shift,
        mid_clip=dmd2.objective.mid_clip,
        sample_vae=dmd2.objective.sample_vae,
    ),
    steps=200,
)
