"""Every attention kernel that this device has, against the formula in f32: values, gradients and denominators.

    python benchmarks/gpu/attention.py OUT.json [--kernels cudnn xla splash]

Padded keys, none at all (as dropped text is), and the shapes of the puppets and of the 13B model, f32's in f32 and the
rest in bf16, where 4e-3 is rounding. The last column tells what cuDNN itself, without our care, makes of no key.
"""

import argparse
import json
import os
import pathlib
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp

from mi_jax.models.attention import attention, attention_with_lse

CASES = {
    "padded": (3, 392, 392, 4, 64, (392, 361, 380)),
    "text alone": (4, 32, 32, 4, 64, (7, 32, 1, 15)),
    "no key in some": (4, 32, 32, 4, 64, (0, 7, 0, 32)),
    "a frame's audio": (64, 36, 4, 4, 64, (4,) * 64),
    "13B, odd": (1, 2101, 2101, 24, 128, (2101,)),
    "13B, padded": (2, 1000, 1256, 24, 128, (1256, 1003)),
    "13B, no key in one": (2, 1000, 256, 24, 128, (0, 200)),
}


def formula(q, k, v, length):
    logits = jnp.einsum("bnkd,bmkd->bknm", q, k) * q.shape[-1] ** -0.5
    logits = jnp.where(jnp.arange(k.shape[1]) < length[:, None, None, None], logits, -1e30)
    return jnp.einsum("bknm,bmkd->bnkd", jax.nn.softmax(logits, -1), v), jax.nn.logsumexp(logits, -1)


def error(got, wanted) -> float:
    got, wanted = got.astype(jnp.float32), wanted.astype(jnp.float32)
    return float(jnp.linalg.norm((got - wanted).ravel()) / jnp.linalg.norm(wanted.ravel()))


def check(kernel: str, case) -> dict[str, float | list[float] | bool]:
    b, n, m, heads, d, lengths = case
    dtype = jnp.bfloat16 if kernel == "cudnn" else jnp.float32
    keys = jax.random.split(jax.random.key(n), 4)
    q, k, v, g = (
        jax.random.normal(key, (b, t, heads, d), jnp.float32).astype(dtype) for key, t in zip(keys, (n, m, m, n))
    )
    length = jnp.array(lengths, jnp.int32)
    some = length > 0  # where there is no key, finite is all that is asked
    g = jnp.where(some[:, None, None, None], g, 0)
    up = [x.astype(jnp.float32) for x in (q, k, v, g)]

    @jax.jit
    def ours(q, k, v, g):
        out, pull = jax.vjp(lambda *x: attention(*x, length=length, implementation=kernel), q, k, v)
        return out, pull(g), attention_with_lse(q, k, v, length=length, implementation=kernel)

    @jax.jit
    def reference(q, k, v, g):
        (out, lse), pull = jax.vjp(lambda *x: formula(*x, length), q, k, v)
        return out, lse, pull((g, jnp.zeros_like(lse)))

    out, gradients, (again, lse) = ours(q, k, v, g)
    wanted, wanted_lse, wanted_gradients = reference(*up)
    finite = all(bool(jnp.isfinite(x).all()) for x in (out, again, *gradients))
    told = {
        "values": error(out[some], wanted[some]),
        "gradients": [error(a, b) for a, b in zip(gradients, wanted_gradients)],
        "values beside denominators": error(again[some], wanted[some]),
        "denominators": float(jnp.abs(lse - wanted_lse)[some].max()),
        "finite": finite,
    }
    if kernel == "cudnn" and not bool(some.all()):
        raw = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=length, implementation="cudnn"))(q, k, v)  # fmt: skip
        told["cuDNN alone is finite"] = bool(jnp.isfinite(raw).all())
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--kernels", nargs="*", default=["cudnn", "xla"])
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    given = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "float32")
    device = jax.devices()[0]
    report = {"device": device.device_kind, "jax": jax.__version__}
    for kernel in given.kernels:
        for name in given.cases:
            try:
                report[f"{kernel}: {name}"] = check(kernel, CASES[name])
            except Exception as failed:
                report[f"{kernel}: {name}"] = f"{type(failed).__name__}: {str(failed)[:300]}"
            print(kernel, name, report[f"{kernel}: {name}"], flush=True)
            given.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
