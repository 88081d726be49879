"""Stage 2 of MagicInfinite at 13B (paper 4.1.2): audio attention added, 30,000 steps, AdamW at 1e-5, adaptive
weight 10.

    mi-jax train configs/magic_infinite_stage2.py --out runs/magic_infinite_stage2 --distributed auto   # on every host

Starts from stage 1's averaged parameters. A tenth of the windows lets the voice act on the whole picture, as sampling
does where no face is found. This project has not run it; tests trace its step at 720x1280x129.
"""

import dataclasses
import runpy
from pathlib import Path

from mi_jax.models.dit import DiTConfig

stage1 = runpy.run_path(str(Path(__file__).with_name("magic_infinite_stage1.py")))["config"]
config = dataclasses.replace(
    stage1,
    name="magic_infinite_stage2",
    objective=dataclasses.replace(
        stage1.objective,
        dit=DiTConfig.magic_infinite_13b(),
        init_from="runs/magic_infinite_stage1",
        adaptive_weight=10.0,
        whole_mask=0.1,
    ),
    steps=30_000,
)
