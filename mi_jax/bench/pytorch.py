"""The rival's process: diffusers' HunyuanVideo in PyTorch, told what to do over a pipe.

    python -m mi_jax.bench.pytorch

Reads one line of JSON (`rival.spec`), answers with one (versions, parameters), and then answers every line "run" with
the seconds of one run, and the processor's. Imports nothing of JAX.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def main() -> None:
    # Whatever a library prints must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    spec = json.loads(sys.stdin.readline())
    run, about = build(spec)
    print(json.dumps(about), file=answers)
    for line in sys.stdin:
        if line.strip() == "run":
            seconds, spent = run()
            print(json.dumps({"seconds": seconds, "processor_seconds": spent}), file=answers)


def build(spec: dict[str, Any]) -> tuple[Callable[[], tuple[float, float]], dict[str, Any]]:
    """A function that does the work once and returns its seconds (and the processor's), and what it runs on."""
    import diffusers
    import torch

    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    device, dtype = torch.device(spec["device"]), getattr(torch, spec["dtype"])
    training = spec["what"] == "step"
    weights = torch.float32 if training else dtype
    torch.set_default_dtype(weights)
    with device:
        model = diffusers.HunyuanVideoTransformer3DModel(**spec["model"])
    torch.set_default_dtype(torch.float32)
    if training and spec["remat"]:
        model.enable_gradient_checkpointing()
    parameters = sum(p.numel() for p in model.parameters())
    velocity = torch.compile(model) if spec["compile"] else model

    def normal(*shape):
        return torch.randn(shape, device=device, dtype=weights)

    batch, model_spec, (t, h, w) = spec["batch"], spec["model"], spec["grid"]
    inputs = {
        "hidden_states": normal(batch, model_spec["in_channels"], t, h, w),
        "timestep": torch.full((batch,), 700, device=device, dtype=torch.long),
        "encoder_hidden_states": normal(batch, spec["text_tokens"], model_spec["text_embed_dim"]),
        "encoder_attention_mask": torch.ones((batch, spec["text_tokens"]), device=device, dtype=torch.long),
        "pooled_projections": normal(batch, model_spec["pooled_projection_dim"]),
        "return_dict": False,
    }
    if model_spec["guidance_embeds"]:
        inputs["guidance"] = torch.full((batch,), 6000.0, device=device, dtype=weights)

    if training:
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
        target = normal(batch, model_spec["out_channels"], t, h, w)

        def work():
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                made = velocity(**inputs)[0]
            torch.nn.functional.mse_loss(made.float(), target).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    else:
        model.eval()

        @torch.inference_mode()
        def work():
            velocity(**inputs)

    def run() -> tuple[float, float]:
        start, start_spent = time.perf_counter(), time.process_time()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, time.process_time() - start_spent

    start = time.perf_counter()
    run()
    about = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "compile": spec["compile"],
        "parameters": parameters,
        "first_seconds": round(time.perf_counter() - start, 3),
    }
    return run, about


if __name__ == "__main__":
    main()
