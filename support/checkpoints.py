"""Files that must survive: atomic writing, generators on disk, resuming a run.

Every file is written under a temporary name beside its place, flushed to disk and moved there, so
that a reader (or a run that is resumed) finds the old file or the new one, never half of one.
Checkpoints are untrusted input: a look at the archive, PyTorch's `weights_only` loader, then
checks of our own.
"""

import errno
import hashlib
import json
import os
import re
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from model import Generator
from support.cli import InputError, first_line

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
    # 50 characters of the name: with all of them, the temporary one may be too long
    temporary = path.with_name(f".{path.stem[:50]}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with suppress(PermissionError):  # as Windows raises for any folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the new name, too, outlives a power cut
            finally:
                os.close(folder)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk to RuntimeError
        if isinstance(error, RuntimeError) and "CUDA" in str(error):
            raise  # the GPU's, which is met when its tensors are copied
        reason = getattr(error, "strerror", None) or first_line(error)
        if "inline_container" in reason:  # that writer's words for a write cut short
            reason = "the disk is full, or took only a part"
        remedy = "free some space or choose another folder"
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            remedy = "shorten the name"
        raise InputError(f"could not write {path}: {reason}; {remedy}. What was there before is "
                         "intact") from error
    finally:
        with suppress(OSError):  # it isn't there, or the disk is read-only
            temporary.unlink()


def remove_leftovers(folder, stems):
    """Delete the temporary files of `replacing` that a killed process left in a folder.

    stems: a regular expression; only files that would have become one of these are ours.
    """
    for path in Path(folder).glob(".*.tmp.*"):
        name = re.fullmatch(r"\.(.+)\.\d+\.tmp\.\w+", path.name)
        if name and re.fullmatch(stems, name[1]):
            path.unlink(missing_ok=True)


def save_torch(value, path):
    """torch.save(value), atomically."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(value, file)


def save_safetensors(state, path):
    """A state dict as safetensors, atomically. Raises InputError where the package is missing."""
    data = safetensors(path).save({name: value.contiguous() for name, value in state.items()})
    with replacing(path) as temporary:
        temporary.write_bytes(data)  # save_file would make a file that others may not read


def safetensors(path):
    """The package's PyTorch part, which `path` needs. Raises InputError where it is missing."""
    try:
        import safetensors.torch
        return safetensors.torch
    except ImportError:
        raise InputError(f"{path}: needs the package safetensors: pip install safetensors"
                         ) from None


def save_text(text, path):
    """UTF-8 text, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def save_json(value, path):
    """Indented JSON, atomically."""
    save_text(json.dumps(value, indent=2) + "\n", path)


def save_csv(table, path):
    """A pandas table as CSV without its index, atomically."""
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, errors="backslashreplace")


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
            start = file.read(2)
        pickled = start == b"PK" or start[:1] == b"\x80"  # torch's zip, or a bare pickle
        if start == b"PK":
            check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # damaged and hostile files raise anything
        if pickled and "weights_only" in str(error):
            reason = "holds objects other than tensors, which could run code, and is not loaded"
        else:
            reason = "truncated, damaged or not a checkpoint"
        raise InputError(f"{path}: {reason}") from None


def read_safetensors(path):
    """{name: tensor} of a safetensors file. Raises InputError naming the file and the reason."""
    load = safetensors(path).load_file
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        return load(path, device="cpu")
    except Exception:  # as damaged and hostile ones do
        raise InputError(f"{path}: truncated, damaged or no safetensors file") from None


def check_archive(path):
    """Raise InputError if a zip is no plain one of torch.save, or was altered since.

    torch.load looks at no checksum, and unpacks whatever a record claims to hold.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if (any(member.compress_type != zipfile.ZIP_STORED for member in members)
                or sum(member.file_size for member in members) > path.stat().st_size):
            raise InputError(f"{path}: holds packed or overlapping records, which torch.save never "
                             "writes, and is not loaded")
        damaged = archive.testzip()
    if damaged:
        raise InputError(f"{path}: damaged, the checksum of its record {damaged} does not fit; "
                         "take another copy")


def read_state(path):
    """The state dict of a network, as it stands in a file, *.safetensors or PyTorch's."""
    is_safetensors = Path(path).suffix.lower() == ".safetensors"
    state = read_safetensors(path) if is_safetensors else read_torch(path)
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


def all_finite(network):
    """Whether no weight and no BatchNorm statistic of a network is NaN or infinite."""
    return bool(torch.stack([x.isfinite().all() for x in network.state_dict().values()]).all())


def load_generator(path):
    """A Generator in eval mode from a state dict of ours or of the public code base.

    The upscale factor is read from the file (`.scale_factor`). Raises InputError naming the file:
    missing, truncated, hostile, another network, NaN, or not the one that SHA256SUMS tells of.
    """
    check_digest(path)
    state = from_public_layout(read_state(path))
    n_upsample = len({k for k in state if re.fullmatch(r"upsample\.\d+\.conv\.weight", k)})
    if not 1 <= n_upsample <= 6:
        raise InputError(f"{path}: not a checkpoint of the report's Generator "
                         f"({n_upsample} sub-pixel blocks)")
    netG = Generator(2 ** n_upsample, back_projection="back_projection" in state)
    return _load_into(netG, state, path)


def file_digest(path):
    """SHA-256 of a file's bytes, hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def check_digest(path):
    """Raise InputError if a SHA256SUMS beside the file has another digest for it."""
    path, sums = Path(path), Path(path).with_name("SHA256SUMS")
    if path.is_file() and sums.is_file():
        lines = [line.split() for line in sums.read_text(errors="replace").splitlines()]
        known = {line[1]: line[0] for line in lines if len(line) == 2}
        if known.get(path.name, digest := file_digest(path)) != digest:
            raise InputError(f"{path}: not the file that was shipped, by the digest in {sums}; "
                             "take it from the repository again")


def shipped_generator(kind=""):
    """Path of the generator that this repository ships. Raises InputError if it is gone.

    kind: "pixel" for the one that was trained with the pixel loss alone.
    """
    found = sorted(Path(PRETRAINED, kind).glob("netG_epoch_8_*.pth"))
    if not found:
        raise InputError(f"{Path(PRETRAINED, kind)}: holds no netG_epoch_8_*.pth; take it from the "
                         "repository again, or name a --checkpoint")
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
    so both must have been fine-tuned from the same generator (`--start`), or one from the other,
    which the config.json beside each checkpoint tells. Raises InputError if they were not.
    """
    netG, other = load_generator(path_a), load_generator(path_b).state_dict()
    a, b = ({file_digest(path), _start_of(path)} - {None} for path in (path_a, path_b))
    if not a & b:
        raise InputError(f"{path_a} and {path_b} cannot be blended: by the config.json beside them "
                         "they were not fine-tuned from the same --start generator")
    if netG.state_dict().keys() != other.keys():
        raise InputError(f"{path_a} and {path_b} differ in upscale factor or back_projection")
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
    tensors. Random generators are added here, from which nothing is drawn in an epoch today.
    """
    state = {"parts": {name: part.state_dict() for name, part in parts.items()},
             "progress": progress, "cpu_rng": torch.get_rng_state(),
             "cuda_rng": torch.cuda.get_rng_state_all()}
    save_torch(state, Path(folder, "last.pt"))


def read_run(folder):
    """`last.pt` as `save_run` wrote it. Raises InputError if the folder has none that is whole."""
    path = Path(folder, "last.pt")
    if not path.parent.is_dir():
        raise InputError(f"--out_dir {folder}: no such folder; give the folder of the run to go on")
    if not path.is_file():
        raise InputError(f"{path}: nothing to resume; start the run without --resume")
    state = read_torch(path)
    if (not isinstance(state, dict) or not {"parts", "progress", "cpu_rng"} <= state.keys()
            or not isinstance(state["parts"], dict) or not isinstance(state["progress"], dict)):
        raise InputError(f"{path}: not a training state that train_identity.py wrote")
    return state


def restore_run(state, parts, path):
    """Put `read_run`'s state back into `parts` and the random generators.

    Raises InputError naming `path` and the part that does not fit.
    """
    name = "the list of parts"
    try:
        for name, part in parts.items():
            if state["parts"][name] or name != "scaler":  # which has no state where it is not used
                part.load_state_dict(state["parts"][name])
                check_restored(part)
        name = "the random generators"
        torch.set_rng_state(state["cpu_rng"])
        if torch.cuda.is_available() and len(state["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_rng"])
    except Exception as error:  # what a damaged state raises is not ours to list
        raise InputError(f"{path}: {name} does not fit this run ({first_line(error)}); put back a "
                         "last.pt of it, or begin a new run in another --out_dir") from None


def check_restored(part):
    """Raise ValueError for what PyTorch lets into a network, optimiser or schedule unseen."""
    if isinstance(part, torch.nn.Module) and not all_finite(part):
        raise ValueError("NaN or infinite weights")
    if not isinstance(getattr(part, "last_epoch", 0), int):
        raise ValueError("the step of a schedule is no whole number")
    for parameter, kept in getattr(part, "state", {}).items():
        if any(kept[key].shape != parameter.shape for key in ("exp_avg", "exp_avg_sq")):
            raise ValueError("the averages of Adam have other shapes than the weights")


def read_config(path):
    """A run's config.json. Raises InputError naming the file where it is not one."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such config.json of a run")
    try:
        config = dict(json.loads(Path(path).read_text(encoding="utf-8")))
        if not isinstance(config["flags"], dict):
            raise TypeError("its flags are no object")
        return config
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not the config.json of a run ({error}); choose another file or "
                         "folder") from None
