"""Stage 2 of one's own: LoRA factors of a 13B model on own records (`mi-jax prepare`), on one H200 or eight GPUs.

    mi-jax train configs/magic_infinite_lora.py --out runs/lora --objective.records data/mine            # one
    mi-jax train configs/magic_infinite_lora.py --out runs/lora --objective.records data/mine --seq 8    # eight
    mi-jax export runs/lora mine.safetensors
    mi-jax animate ... --model weights/magic-infinite --lora mine.safetensors:0.8

Windows of 17 latent frames (2.6 s); what fits which machine is in docs/scale.md. This project has not run it at 13B.
"""

import dataclasses
import runpy
from pathlib import Path

from mi_jax.train.adaptation import AdaptationObjective
from mi_jax.train.turns import OptimizerConfig

stage2 = runpy.run_path(str(Path(__file__).with_name("magic_infinite_stage2.py")))["config"]
curriculum = stage2.objective
config = dataclasses.replace(
    stage2,
    name="magic_infinite_lora",
    objective=AdaptationObjective(
        dit=curriculum.dit,
        records="data/records",
        init_from="weights/magic-infinite",
        rank=32,
        shift=curriculum.shift,
        windows=((17, 1),),
        window_weights=(1.0,),
        mid_clip=curriculum.mid_clip,
        adaptive_weight=curriculum.adaptive_weight,
        whole_mask=curriculum.whole_mask,
        sample_vae="weights/magic-infinite",
    ),
    steps=2000,
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=50, ema_decay=0.99),
    seq=1,
    accumulate=1,
    checkpoint_every=250,
    sample_every=500,
)
