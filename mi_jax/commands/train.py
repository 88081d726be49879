"""`mi-jax train`."""

from collections.abc import Sequence
from pathlib import Path

from mi_jax.caches import share_programs
from mi_jax.commands.terminal import parsing, take_option
from mi_jax.errors import InputError
from mi_jax.interrupts import work_begins


def train(argv: Sequence[str]) -> None:
    """Trains the experiment of a config file; a run that was stopped goes on where it was.

    mi-jax train CONFIG.py [--out DIR] [--distributed auto|HOST:PORT,COUNT,INDEX] [--on-device STEPS]
                           [--steps 1000 --objective.shift 5 ...]

    --out DIR is where checkpoints, logs and samples go (default runs/NAME), for all processes of a run the same folder.
    --distributed joins the processes of a run on several hosts, each started with the same command: `auto` where JAX
    knows the cluster (TPU pods, Slurm, Open MPI, Kubernetes), else process 0's address, the number of processes and
    which of them this one is. They keep compiled programs only in a folder that all of them see, if
    JAX_COMPILATION_CACHE_DIR names one. Every other option overrides a field of the config: `mi-jax train CONFIG.py
    --help` lists them. One of them, --on-device 10, holds all records in the device's memory and takes 10 optimiser
    steps a call: on a GPU a small model is otherwise done before the host has its next batch.
    """
    if not argv:
        raise InputError("no config (mi-jax train --help tells more)")
    if argv[0] in ("-h", "--help"):
        print(train.__doc__)
        return
    config_path, *overrides = argv
    out, cluster = take_option(overrides, "--out"), take_option(overrides, "--distributed")
    if cluster is not None:
        _join(cluster)
    from mi_jax.train.objective import load_config

    with parsing(f"mi-jax train {config_path}"):
        config = load_config(config_path, overrides)
    from mi_jax.train.loop import train as run

    work_begins()
    run(config, Path(out) if out else Path("runs") / config.name)


def _join(cluster: str) -> None:
    """Makes this process one of a run's (`jax.distributed`), as `--distributed` says."""
    import jax

    try:
        address, count, index = cluster.split(",") if cluster != "auto" else (None, "1", "0")
        cluster_options = {} if address is None else {
            "coordinator_address": address, "num_processes": int(count), "process_id": int(index)
        }  # fmt: skip
        if not 0 <= int(index) < int(count):
            raise ValueError
    except ValueError:
        raise InputError(f"--distributed is {cluster}: auto or HOST:PORT,COUNT,INDEX with INDEX < COUNT") from None
    try:
        jax.distributed.initialize(**cluster_options)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--distributed {cluster}: {str(error).splitlines()[0]}") from None
    share_programs()
