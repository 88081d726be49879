"""The puppets' wav2vec2: phonemes and mouth of espeak-ng voices, drawn on the fly.

mi-jax train configs/puppet_wav2vec2.py --out runs/wav2vec2_first
"""

from mi_jax.puppets.phonemes import PhonemeObjective
from mi_jax.train.objective import TrainConfig
from mi_jax.train.turns import OptimizerConfig

config = TrainConfig(
    name="puppet_wav2vec2",
    objective=PhonemeObjective(),
    steps=1500,
    optimizer=OptimizerConfig(
        kind="muon",
        learning_rate=4e-3,
        warmup_steps=100,
        decay_fraction=0.5,
        weight_decay=0.01,
        clip_norm=1.0,
        ema_decay=0.99,
    ),
    checkpoint_every=200,
    log_every=25,
    sample_every=0,
)
