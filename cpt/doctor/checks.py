"""Every check in the order it is shown, with its limits and what to do when it fails."""

from functools import partial

from cpt.doctor import devices, needs, software, system
from cpt.doctor.line import At, Check


def checks(at: At) -> list[Check]:
    """The checks of a machine whose runs go to `at.folder`, and of `at.stream` if there is one."""
    found = _machine(at)
    return found + needs.stream_checks(at.stream, at.folder) if at.stream else found


def _machine(at: At) -> list[Check]:
    reinstall = "pip install --force-reinstall"
    other_disk = "give another disk: output_dir=FOLDER"
    one_precision = "install another torch build: https://pytorch.org/get-started/locally"
    return [
        Check("python", software.check_python, "make PYTHON=/path/to/python3.11 dev", every_use=True),
        Check("libraries", software.check_libraries, f"{reinstall} cpt", limit_s=120, every_use=True),
        Check(
            "tokenizer",
            partial(software.check_tokenizer, at.scratch),
            f"{reinstall} tokenizers safetensors",
            every_use=True,
        ),
        Check("accelerator", devices.check_accelerators, "update the driver, or CUDA_VISIBLE_DEVICES= trains on CPU"),
        Check("float32", partial(devices.check_products, "float32"), one_precision, every_use=True),
        Check("bfloat16", partial(devices.check_products, "bfloat16"), "training.bf16=false"),
        Check("float16", partial(devices.check_products, "float16"), "training.fp16=false"),
        Check("attention", devices.check_attention, "model.attn_implementation=eager"),
        Check("4-bit", partial(devices.check_quantized, 4), f"{reinstall} bitsandbytes", limit_s=60),
        Check("8-bit", partial(devices.check_quantized, 8), f"{reinstall} bitsandbytes", limit_s=60),
        Check("all-reduce", system.check_all_reduce, "export GLOO_SOCKET_IFNAME=lo", limit_s=60),
        Check("shared memory", system.check_shared_memory, "docker run --shm-size=8g"),
        Check("disk", partial(system.check_disk, at.folder, at.scratch), other_disk, limit_s=60, every_use=True),
        Check("locks", partial(system.check_locks, at.folder, at.scratch), other_disk, every_use=True),
        Check("hub", system.check_hub, "export HF_HUB_OFFLINE=1, and give folders", limit_s=15),
        Check("trackers", partial(software.check_trackers, at.scratch), "pip install 'cpt[track]'", limit_s=60),
        Check("vllm", software.check_vllm, f"{reinstall} 'cpt[vllm]'", limit_s=120, slow=True),
        Check("deepspeed", software.check_deepspeed, "python -m deepspeed.env_report", limit_s=240, slow=True),
        Check(
            "training",
            partial(software.check_training, at.scratch),
            "cpt run quickstart shows where it stops",
            limit_s=180,
            every_use=True,
            slow=True,
            alone=True,
        ),
    ]
