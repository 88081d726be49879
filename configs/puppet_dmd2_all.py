"""The puppets' four-step student with all weights trained, as in the paper: `puppet_dmd2.py` otherwise, without its
adversarial term.

    mi-jax train configs/puppet_dmd2_all.py --out runs/puppet_dmd2_all
    mi-jax export runs/puppet_dmd2_all runs/four_steps --base puppet-teacher

38 minutes on two cores that did other work beside. Result: docs/distillation.md.
"""

import dataclasses
import runpy
from pathlib import Path

from mi_jax.train.schedules import Ramp

base = runpy.run_path(str(Path(__file__).with_name("puppet_dmd2.py")))["config"]
config = dataclasses.replace(
    base,
    name="puppet_dmd2_all",
    objective=dataclasses.replace(
        base.objective,
        student_rank=None,
        follow=0.0,  # which is the student's factors'
        student=dataclasses.replace(base.objective.student, learning_rate=1e-4),
        gan=Ramp(start=0.0, end=0.0),
    ),
)
