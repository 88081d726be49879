"""The puppets' multimodal encoder: reads directions from prompts and looks from portraits.

    mi-jax train configs/puppet_mllm.py --out runs/mllm

Cost and result: docs/puppets.md.
"""

from mi_jax.puppets.attributes import AttributeObjective
from mi_jax.train.objective import TrainConfig
from mi_jax.train.turns import OptimizerConfig

config = TrainConfig(
    name="puppet_mllm",
    objective=AttributeObjective(),
    steps=500,
    optimizer=OptimizerConfig(kind="muon", learning_rate=3e-3, warmup_steps=50, decay_fraction=0.5, ema_decay=0.99),
    checkpoint_every=250,
    sample_every=0,
)
