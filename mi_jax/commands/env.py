"""`mi-jax env`."""


def env(json: bool = False) -> None:
    """Versions, devices, caches and extras: what a report of a fault should hold.

    Args:
      json: print one JSON object instead of a page.
    """
    import os

    # JAX would take a GPU's memory in advance, which another process may be using.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from mi_jax.environment import describe, page

    found = describe()
    if json:
        import json as encoder

        print(encoder.dumps(found, indent=1))
    else:
        print(page(found))
