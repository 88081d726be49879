"""Stage 1 of MagicInfinite at 13B (paper 4.1.2): 80,000 steps of portrait + text at 720x1280, 129 frames,
AdamW at 1e-5.

    mi-jax convert hunyuan-video ckpts weights/start --extend magic-infinite-stage1 \
        --text-encoder llava-llama-3-8b-v1_1-transformers                                      # docs/weights.md
    mi-jax train configs/magic_infinite_stage1.py --out runs/magic_infinite_stage1 --distributed auto   # on every host

Windows are the paper's 33 latent frames. Half of them start later than their clip, as all but the first of a long video
do, so the records' clips must be longer: 41 latent frames (161 frames, 6.44 s) or more; shorter ones are refused.

The paper trained on 200 H100s and 1.85 million clips; batch size and weight decay are not stated there (here: one clip
per `data` shard of a 25 x 8 mesh, AdamW's usual 0.01). This project has not run it.
"""

from mi_jax.models.dit import DiTConfig
from mi_jax.train.curriculum import CurriculumObjective
from mi_jax.train.objective import TrainConfig
from mi_jax.train.turns import OptimizerConfig

config = TrainConfig(
    name="magic_infinite_stage1",
    objective=CurriculumObjective(
        dit=DiTConfig.magic_infinite_13b(audio=False),
        records="data/records",
        init_from="weights/start",
        shift=7.0,
        windows=((33, 25),),
        window_weights=(1.0,),
        sample_vae="weights/start",
    ),
    steps=80_000,
    optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=1000, ema_decay=0.9999),
    compute_dtype="bfloat16",
    seq=8,
    checkpoint_every=500,
    sample_every=2000,
)
