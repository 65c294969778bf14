"""Files that must survive: atomic writing, generators on disk, resuming a run.

Every file is written under a temporary name beside its place, flushed to disk and moved there, so
that a reader (or a run that is resumed) finds the old file or the new one, never half of one.
Checkpoints are untrusted input: PyTorch's `weights_only` loader, then checks of our own.
"""

import json
import os
import re
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from model import Generator
from support.cli import InputError

PRETRAINED = Path(__file__).parent.parent / "epochs" / "pretrained"

# ---------------------------------------------------------------------------------------------
# Writing


@contextmanager
def replacing(path):
    """Yield a temporary path in `path`'s folder; on success it is flushed and becomes `path`.

    The temporary name keeps the suffix, which tells Pillow and matplotlib the format. Raises
    InputError when the disk refuses (full, read-only, no permission); `path` is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, outlives a power cut
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk to RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        if "inline_container" in reason:  # that writer's words for a write cut short
            reason = "the disk is full, or took only a part"
        raise InputError(f"could not write {path}: {reason}; free some space or choose another "
                         "folder. What was there before is intact") from error
    finally:
        with suppress(OSError):  # it isn't there, or the disk is read-only
            temporary.unlink()


def save_torch(value, path):
    """torch.save(value), atomically."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(value, file)


def save_text(text, path):
    """UTF-8 text, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_json(value, path):
    """Indented JSON, atomically."""
    save_text(json.dumps(value, indent=2) + "\n", path)


def save_csv(table, path):
    """A pandas table as CSV without its index, atomically."""
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False)


# ---------------------------------------------------------------------------------------------
# Networks


def generator_path(folder, factor, epoch):
    """Where a run keeps its generator after `epoch` epochs: netG_epoch_8_100.pth."""
    return Path(folder, f"netG_epoch_{factor}_{epoch}.pth")


def public_names(n_upsample):
    """The key table at our border: {prefix in the public SRGAN code base: our prefix}.

    It is the code base that the report started from; its generators hold `block1` to `block8`.
    `n_upsample` is log2 of the generator's factor.
    """
    return {
        "block1.": "first.",
        **{f"block{2 + n}.": f"residual.{n}." for n in range(5)},
        "block7.": "skip.",
        **{f"block8.{n}.": f"upsample.{n}." for n in range(n_upsample)},
        f"block8.{n_upsample}.": "last.",
    }


def from_public_layout(state):
    """A state dict with the public code base's keys -> with ours; ours pass unchanged."""
    n_upsample = len({k for k in state if re.fullmatch(r"block8\.\d+\.conv\.weight", k)})
    table = public_names(n_upsample)

    def rename(key):
        prefix = next((p for p in table if key.startswith(p)), "")
        return table.get(prefix, "") + key.removeprefix(prefix)

    return {rename(key): value for key, value in state.items()}


def read_torch(path):
    """torch.load with weights_only on the CPU. Raises InputError naming the file and the reason."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    pickled = False
    try:
        with open(path, "rb") as file:
            pickled = file.read(1) in (b"P", b"\x80")  # torch's zip, or a bare pickle
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged and hostile files raise anything
        if pickled and "weights_only" in str(error):
            reason = "holds objects other than tensors, which could run code, and is not loaded"
        else:
            reason = "truncated, damaged or not a checkpoint"
        raise InputError(f"{path}: {reason}") from None


def read_state(path):
    """The state dict of a network, as it stands in a file."""
    state = read_torch(path)
    if not isinstance(state, dict) or not state or not all(
            isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise InputError(f"{path}: not the state dict of a network (last.pt is for --resume; "
                         "give a netG_epoch_*.pth)")
    return state


def _load_into(network, state, path):
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:120]
        raise InputError(f"{path}: not a checkpoint of the report's {type(network).__name__} "
                         f"({reason})") from None
    for key, value in network.state_dict().items():
        if not torch.isfinite(value).all():
            raise InputError(f"{path}: {key} holds NaN or infinite weights; take an earlier epoch")
    return network.eval()


def load_generator(path):
    """A Generator in eval mode from a state dict of ours or of the public code base.

    The upscale factor is read from the file (`.scale_factor`). Raises InputError naming the file:
    missing, truncated, hostile, another network, NaN.
    """
    state = from_public_layout(read_state(path))
    n_upsample = len({k for k in state if re.fullmatch(r"upsample\.\d+\.conv\.weight", k)})
    if not 1 <= n_upsample <= 6:
        raise InputError(f"{path}: not a checkpoint of the report's Generator "
                         f"({n_upsample} sub-pixel blocks)")
    return _load_into(Generator(2 ** n_upsample), state, path)


def shipped_generator():
    """Path of the generator that this repository ships. Raises InputError if it is gone."""
    found = sorted(PRETRAINED.glob("netG_epoch_8_*.pth"))
    if not found:
        raise InputError(f"{PRETRAINED}: holds no netG_epoch_8_*.pth; take it from the repository "
                         "again, or name a --checkpoint")
    return found[-1]


def parse_blend(text):
    """`B.pth:0.3` -> (path, weight of B). Raises InputError on any other form."""
    path, colon, weight = text.rpartition(":")
    try:
        weight = float(weight)
    except ValueError:
        colon = ""
    if not (colon and path and 0 <= weight <= 1):
        raise InputError(f"--blend {text}: give B.pth:0.3, a checkpoint and its weight in [0, 1]")
    return path, weight


def load_blend(path_a, path_b, weight):
    """Network interpolation (Wang et al. 2018, ESRGAN sec. 3.4): (1 - weight) A + weight B.

    -> Generator in eval mode. Weights of networks with different pasts do not add up to a network,
    so both runs must have been fine-tuned from the same generator (`--start`), which the
    config.json beside each checkpoint tells. Raises InputError if they were not.
    """
    starts = [_start_of(path) for path in (path_a, path_b)]
    if starts[0] is None or starts[0] != starts[1]:
        raise InputError(f"{path_a} and {path_b} cannot be blended: by the config.json beside them "
                         "they were not fine-tuned from the same --start generator")
    netG, other = load_generator(path_a), load_generator(path_b).state_dict()
    if netG.state_dict().keys() != other.keys():
        raise InputError(f"{path_a} and {path_b} have different upscale factors")
    netG.load_state_dict({key: torch.lerp(value, other[key], weight)
                          if value.is_floating_point() else value
                          for key, value in netG.state_dict().items()})
    return netG


def _start_of(path):
    """Digest of the generator that a checkpoint's run started from; None if nothing tells."""
    with suppress(InputError):
        return read_config(Path(path).with_name("config.json")).get("start")


# ---------------------------------------------------------------------------------------------
# Runs


def save_run(folder, parts, progress):
    """Write `last.pt`, from which a run goes on exactly.

    parts: {name: anything with a state_dict()}; progress: a dict of numbers, strings, lists and
    tensors. Random generators are added here.
    """
    state = {"parts": {name: part.state_dict() for name, part in parts.items()},
             "progress": progress, "cpu_rng": torch.get_rng_state(),
             "cuda_rng": torch.cuda.get_rng_state_all()}
    save_torch(state, Path(folder, "last.pt"))


def read_run(folder):
    """`last.pt` as `save_run` wrote it. Raises InputError if the folder has none that is whole."""
    path = Path(folder, "last.pt")
    if not path.is_file():
        raise InputError(f"{path}: nothing to resume; start the run without --resume")
    state = read_torch(path)
    if not isinstance(state, dict) or not {"parts", "progress", "cpu_rng"} <= state.keys():
        raise InputError(f"{path}: not a training state that train_identity.py wrote")
    return state


def restore_run(state, parts, path):
    """Put `read_run`'s state back into `parts` and the random generators."""
    try:
        for name, part in parts.items():
            if state["parts"][name]:  # a GradScaler has no state where it is not used
                part.load_state_dict(state["parts"][name])
    except (KeyError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}: does not fit these networks "
                         f"({str(error).splitlines()[0]})") from None
    torch.set_rng_state(state["cpu_rng"])
    if torch.cuda.is_available() and len(state["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda_rng"])


def read_config(path):
    """A run's config.json. Raises InputError naming the file where it is not one."""
    try:
        config = dict(json.loads(Path(path).read_text()))
        dict(config["flags"])
        return config
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the config.json of a run ({error})") from None
