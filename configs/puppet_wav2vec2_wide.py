"""The puppets' wav2vec2, trained on with 46 more voices, 43 more throats and other rooms, so that it understands
voices that it never heard.

    mi-jax train configs/puppet_wav2vec2_wide.py --out runs/wav2vec2

Starts from the averaged parameters of configs/puppet_wav2vec2.py (runs/wav2vec2_first). Cost and result:
docs/puppets.md.
"""

from mi_jax.puppets.phonemes import PhonemeObjective
from mi_jax.train.objective import TrainConfig
from mi_jax.train.turns import OptimizerConfig

config = TrainConfig(
    name="puppet_wav2vec2_wide",
    objective=PhonemeObjective(
        init_from="runs/wav2vec2_first", split="wide", batch_size=8, speed=(0.75, 1.35), echo=1.0
    ),
    steps=3000,
    optimizer=OptimizerConfig(
        kind="muon",
        learning_rate=3e-3,
        warmup_steps=50,
        decay_fraction=0.9,
        weight_decay=0.01,
        clip_norm=1.0,
        ema_decay=0.995,
    ),
    matmul_precision="bfloat16",
    workers=1,
    checkpoint_every=250,
    log_every=25,
    sample_every=0,
)
