"""What a puppets' wav2vec2 understands: of languages and throats that training heard, and of others.

    python benchmarks/puppet_phonemes.py RUN [--clips 64]

RUN is a run of configs/puppet_wav2vec2.py or puppet_wav2vec2_wide.py. One JSON line for each pairing: the accuracy of
the phoneme class in 20 ms steps, and the correlation of the mouth it reads with the true one, of the last hidden state.
No clip was trained on: seed 1000.
"""

import dataclasses
import json
from pathlib import Path

import grain
import tyro

from mi_jax.puppets.phonemes import PhonemeObjective, SpeechSource, measure
from mi_jax.train.checkpoints import load_ema


@dataclasses.dataclass(frozen=True)
class Args:
    run: tyro.conf.Positional[Path]
    clips: int = 64


def main(args: Args) -> None:
    objective = PhonemeObjective()
    model = load_ema(args.run, objective)
    for languages in ("train", "test"):
        for throats in ("train", "test"):
            source = SpeechSource(
                num_clips=args.clips,
                frames=objective.frames,
                samples=objective.wav2vec2.num_samples(2 * objective.frames),
                seed=1000,
                split=languages,
                throats=throats,
            )
            found = measure(model, grain.MapDataset.source(source).batch(objective.batch_size))
            read = {name: round(found[name], 3) for name in ("accuracy", "opening", "width", "roundness")}
            print(json.dumps({"languages": languages, "throats": throats, **read}), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
