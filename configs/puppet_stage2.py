"""Stage 2 on puppets, from nothing: text, portrait and voices at once; the loss is raised on faces and on what moves.

    mi-jax train configs/puppet_stage2.py --out runs/stage2

Records lie in the GPU's memory, ten steps a call. Stage 1 did not help lips at this length (docs/puppets.md);
`--objective.init-from runs/stage1` is the paper's way. The GPU queue's program takes 13 such steps
a second on an H100 (15,000 latent frames); this command was not timed there.
On two cores: `--on-device 0 --objective.windows 9 6 17 3 33 2 --compute-dtype float32 --matmul-precision bfloat16`.
The shipped denoiser had 1,850 such steps, then 1,640 with `--objective.adaptive-weight 2.5 --objective.sigma-scale 1.5
--objective.window-weights 0.4 0.3 0.3` on 5,056 other clips (benchmarks/gpu/). Result: docs/puppets.md.
"""

from mi_jax.models.dit import DiTConfig
from mi_jax.train.curriculum import CurriculumObjective
from mi_jax.train.objective import TrainConfig
from mi_jax.train.turns import OptimizerConfig

config = TrainConfig(
    name="puppet_stage2",
    objective=CurriculumObjective(
        dit=DiTConfig.puppet(),
        records="runs/records",
        adaptive_weight=1.5,
        motion_weight=1.5,
        whole_mask=0.1,
        speakers=2,
        shift=3.0,
        sigma_scale=1.3,
        mid_clip=0.35,
        windows=((9, 128), (17, 64), (33, 32)),
        window_weights=(0.6, 0.2, 0.2),
        sample_vae="runs/encoders",
    ),
    steps=5000,
    optimizer=OptimizerConfig(
        kind="muon", learning_rate=2e-3, warmup_steps=200, decay_fraction=0.85, weight_decay=0.01, ema_decay=0.999
    ),
    compute_dtype="bfloat16",
    on_device=10,
    checkpoint_every=1000,
    sample_every=2500,
)
