"""The console script `mi-jax`, and `python -m mi_jax`."""

from mi_jax.interrupts import quit_on_interrupt


def main() -> None:
    quit_on_interrupt()  # before the imports, which take a second
    from mi_jax.cli import entry

    entry()


if __name__ == "__main__":
    main()
