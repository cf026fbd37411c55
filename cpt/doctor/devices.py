"""Checks of the devices: what they multiply is compared with float64 on the CPU, layers with their own weights."""

import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from cpt.doctor.line import Line, absent, fail, ok, warn
from eval_harness.quantization import INSTALL, is_installed, keep_gradients_right

# Largest error of a product of 512 x 512 normal numbers, relative to its norm. Rounding to 8, 11 and 24 bits of
# significand gives 0.24 %, 0.03 % and below 1e-6; TF32, where somebody switched it on, 0.03 %.
_LIMITS = {"bfloat16": 0.01, "float16": 0.002, "float32": 0.002}
_GIB = 2**30


def accelerators() -> list[str]:
    """cuda:0, mps:0, xpu:0 and so on; [] where training runs on the CPU."""
    import torch

    kind = torch.accelerator.current_accelerator(check_available=True)
    return [f"{kind.type}:{number}" for number in range(torch.accelerator.device_count())] if kind else []


def free_and_total(device: str) -> tuple[int, int]:
    """Bytes of an accelerator's memory."""
    import torch

    if device.startswith("mps"):
        total = torch.mps.recommended_max_memory()
        return total - torch.mps.driver_allocated_memory(), total
    return torch.accelerator.get_memory_info(device)


def check_accelerators() -> Line:
    """Name, compute capability and memory of each; one number is put on each and read back."""
    import torch

    found = accelerators()
    if not found:
        return _no_accelerator()
    busy, said = [], []
    for device in found:
        if torch.ones(1, device=device).item() != 1.0:
            return fail(f"{device} does not give back what was put on it", "look at the driver's log (dmesg)")
        free, total = free_and_total(device)
        said.append(f"{device} {_named(device)}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free")
        if free < total / 2:
            busy.append(device)
    if busy:
        advice = f"end what holds {', '.join(busy)} (nvidia-smi), or CUDA_VISIBLE_DEVICES=N chooses another"
        return warn("\n".join(said), advice)
    return ok("\n".join(said))


def _named(device: str) -> str:
    import torch

    if not device.startswith("cuda"):
        return device.partition(":")[0].upper()
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


def _no_accelerator() -> Line:
    import torch

    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
        if listed.returncode == 0 and listed.stdout.strip():
            found = f"nvidia-smi lists {len(listed.stdout.splitlines())} GPUs and torch {torch.__version__} sees none"
            return fail(found, "pip install torch for this driver's CUDA: https://pytorch.org/get-started/locally")
    return absent("no CUDA, MPS or XPU device: stages train on the CPU")


def product_error(device: str, dtype: Any) -> float:
    """Relative error (Frobenius norm) of a 512 x 512 product in `dtype` on `device`, against float64 on the CPU."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    made = (a.to(device, dtype) @ b.to(device, dtype)).to("cpu", torch.float64)
    return float((made - exact).norm() / exact.norm())


def check_products(name: str, error: Callable[[str, Any], float] = product_error) -> Line:
    """A matrix product in one precision (bfloat16, float16, float32) on every device."""
    import torch

    found = {device: error(device, getattr(torch, name)) for device in ["cpu", *accelerators()]}
    said = f"a 512 x 512 product is off by {_per_device(found)}"
    if wrong := [device for device, off in found.items() if not off <= _LIMITS[name]]:
        advice = f"do not train in {name} on {', '.join(wrong)}: install another torch build, or another driver"
        return fail(f"{said}; at most {_LIMITS[name]:.1%} is rounding", advice)
    on_cuda = accelerators()[:1] == ["cuda:0"]
    if name == "bfloat16" and on_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        return warn(f"{said}; emulated, so slow", "training.bf16=false training.fp16=true")
    return ok(said)


def _per_device(found: dict[str, float]) -> str:
    """The CPU's figure and the accelerators': of more than two the largest."""
    others = {device: off for device, off in found.items() if device != "cpu"}
    if len(others) > 2:
        others = {f"{len(others)} devices": max(others.values())}
    shown = {key: value for key, value in found.items() if key == "cpu"} | others
    return ", ".join(f"{_share(off)} ({device})" for device, off in shown.items())


def _share(off: float) -> str:
    return f"{off:.2%}" if not off < 1e-4 else f"{off:.0e}"


def check_attention() -> Line:
    """Causal attention by torch's kernels against the formula, with gradient, on every device; flash-attn if here."""
    import torch

    found = {device: _attention_error(device) for device in ["cpu", *accelerators()]}
    said = f"sdpa is off its formula by {_per_device(found)}"
    if wrong := [device for device, off in found.items() if not off <= 0.02]:
        return fail(said, f"model.attn_implementation=eager computes without it (wrong on {', '.join(wrong)})")
    if torch.cuda.is_available():
        said += f"; kernels: {', '.join(_kernels()) or 'none'}"
    return ok(said + (f"; flash-attn {_flash_attention()}" if find_spec("flash_attn") else "; no flash-attn"))


def _inputs(device: str) -> Any:
    """Queries, keys and values (2 rows, 4 heads, 64 tokens, 32) in the precision that is trained in there."""
    import torch

    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    made = [torch.randn(2, 4, 64, 32, generator=generator).to(device, dtype) for _ in range(3)]
    return [part.requires_grad_() for part in made]


def _attention_error(device: str) -> float:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = _inputs(device)
    made = scaled_dot_product_attention(q, k, v, is_causal=True)
    made.sum().backward()
    if not all(bool(part.grad.isfinite().all()) for part in (q, k, v)):
        return float("inf")
    q, k, v = (part.detach().cpu().double() for part in (q, k, v))
    later = torch.ones(64, 64, dtype=torch.bool).triu(1)
    exact = (q @ k.transpose(-1, -2) / 32**0.5).masked_fill(later, float("-inf")).softmax(-1) @ v
    return float((made.detach().cpu().double() - exact).norm() / exact.norm())


def _kernels() -> list[str]:
    """Which of sdpa's kernels compute on the first GPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    found = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            try:
                q, k, v = _inputs("cuda:0")
                scaled_dot_product_attention(q, k, v, is_causal=True)
            except RuntimeError:  # this GPU has no such kernel
                continue
        found.append(backend.name.lower())
    return found


def _flash_attention() -> str:
    import torch
    from flash_attn import flash_attn_func

    q, k, v = (part.transpose(1, 2) for part in _inputs("cuda:0"))
    if not bool(torch.isfinite(flash_attn_func(q, k, v, causal=True)).all()):
        raise RuntimeError("flash-attn gives values that are no numbers")
    return f"{version('flash_attn')} computes"


def check_quantized(bits: int) -> Line:
    """A layer of 4 or 8 bits on the device that stages train on: forward and gradient, after an evaluation."""
    if not is_installed():
        return absent("bitsandbytes is not installed; only model.quantization needs it", INSTALL)
    device = next(iter(accelerators()), "cpu")
    forward, gradient = layer_errors(bits, device)
    against = "what its 4-bit weights give" if bits == 4 else "unquantized weights"
    said = f"forward {forward:.1%}, gradient {gradient:.1%} off {against} ({device})"
    if not max(forward, gradient) <= 0.05:
        return fail(said, f"do not train with model.quantization={bits}bit here: pip install -U bitsandbytes")
    return ok(f"bitsandbytes {version('bitsandbytes')}: {said}")


def layer_errors(bits: int, device: str, guard: Callable[[Any], Any] = keep_gradients_right) -> tuple[float, float]:
    """Relative errors of a quantized layer's output and input gradient, trained after a forward in eval mode.

    guard: what is done to the model before its first forward.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    torch.manual_seed(0)
    dtype = torch.bfloat16
    weights = torch.randn(256, 128, dtype=dtype) * 0.05
    kind: Any = Linear4bit if bits == 4 else Linear8bitLt
    options = {"quant_type": "nf4", "compute_dtype": dtype} if bits == 4 else {"has_fp16_weights": False}
    layer = kind(128, 256, bias=False, **options)
    layer.weight.data = weights.clone()
    model = guard(torch.nn.Sequential(layer).to(device))
    if bits == 4:
        weights = dequantize_4bit(layer.weight.data, layer.weight.quant_state).cpu()
    with torch.no_grad():
        model.eval()(torch.randn(16, 128, dtype=dtype, device=device))
    x = torch.randn(16, 128, dtype=dtype).to(device).requires_grad_()
    made = model.train()(x)
    back = torch.randn(16, 256, dtype=dtype).to(device)
    made.backward(back)
    exact = x.detach().cpu().float() @ weights.float().T
    exact_gradient = back.cpu().float() @ weights.float()
    gradient = x.grad.cpu().float() if x.grad is not None else torch.zeros_like(exact_gradient)
    return _off(made.detach().cpu().float(), exact), _off(gradient, exact_gradient)


def _off(made: Any, exact: Any) -> float:
    return float((made - exact).norm() / exact.norm())
