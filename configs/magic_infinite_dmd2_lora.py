"""DMD2 at 13B with one set of weights: student and critic are factors of the same frozen teacher.

    mi-jax train configs/magic_infinite_dmd2_lora.py --out runs/magic_infinite_dmd2_lora
    mi-jax export runs/magic_infinite_dmd2_lora four-steps.safetensors
    mi-jax animate ... --model weights/magic-infinite --lora four-steps.safetensors --steps 4 --guidance-audio 0

Rank and rates are those of LightX2V's public training of a 14B model, and the critic takes over 3 % of the student
after each of its steps, as there. This project has not run it; the smallest machine that it fits is in docs/scale.md.
"""

import dataclasses
import runpy
from pathlib import Path

full = runpy.run_path(str(Path(__file__).with_name("magic_infinite_dmd2.py")))["config"]
student = dataclasses.replace(full.objective.student, learning_rate=1e-4, b1=0.9)
config = dataclasses.replace(
    full,
    name="magic_infinite_dmd2_lora",
    objective=dataclasses.replace(
        full.objective,
        student_rank=64,
        critic_rank=64,
        follow=0.03,
        student=student,
        critic=dataclasses.replace(student, learning_rate=2e-5, ema_decay=None),
        windows=((33, 1),),
    ),
)
