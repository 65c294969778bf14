"""What depends on the machine: device, precision, processes, the memory of a CPU."""

import ctypes
import os
import signal
from functools import partial

import torch
import torch.distributed as dist

from support.cli import InputError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ("auto", "cpu", "cuda")  # of every script's --device


def choose_device(name):
    """One of DEVICES -> torch.device; auto: CUDA where there is one. Raises InputError.

    From here on fp32 means fp32: by default cuDNN's convolutions round to TF32, which has 10 bits.
    """
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise InputError("--device cuda: no CUDA here; use --device cpu")
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    return torch.device("cuda" if cuda and name != "cpu" else "cpu")


def set_up_machine(name):
    """Device, process group and the settings of either -> (device, rank, world)."""
    device = choose_device(name)
    world = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets these three
    rank = int(os.environ.get("RANK", 0))
    if device.type == "cuda":
        place, n = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if place >= n:
            raise InputError(f"--nproc_per_node: more processes than GPUs, of which there are {n}")
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    else:
        torch.set_flush_denormal(True)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, rank, world


def fast_precision(device):
    """The fastest of PRECISIONS on this device: what --precision auto means.

    On CUDA bf16, or fp16 where that is missing. A CPU takes a step in bf16 several times as fast
    with matrix units for it (AMX), 1.9 times as fast with vector instructions for it (AVX-512
    BF16), and slower than in fp32 without either.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older PyTorch cannot tell
    fast = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return "bf16" if fast else "fp32"


def autocast(device, precision):
    """Function that makes a context in which networks compute in one of PRECISIONS.

    Weights, losses and metrics are fp32 in any case.
    """
    return partial(torch.autocast, device.type, PRECISIONS[precision], enabled=precision != "fp32")


def keep_freed_memory():
    """Have large blocks reused instead of given back to the kernel after each use.

    Fresh pages cost a fault each, and with them a fifth of the step's time. They cost less if they
    are large ones, for which Linux has to be asked; PyTorch looks at the variable when it makes
    the first tensor, so this comes before that. Only for a CPU's speed, elsewhere without effect.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # M_MMAP_THRESHOLD; older ones' limit
    glibc("mallopt", -3, 2 ** 31 - 1) or glibc("mallopt", -3, 2 ** 25)
    glibc("mallopt", -1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


def glibc(name, *arguments):
    """Call a function of glibc; elsewhere (macOS, Windows, musl) do nothing -> its answer or 0."""
    try:
        return getattr(ctypes.CDLL(None), name)(*arguments)
    except (AttributeError, OSError, TypeError):
        return 0


def ignore_signals(_worker):
    """torchrun signals the workers of a DataLoader too: they end when the run has saved."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
