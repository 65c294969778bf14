"""A run's folder: opened, described in config.json, saved in intervals, stopped, resumed."""

import os
import platform
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision

from support import checkpoints, figures
from support.cli import InputError, check_out_dir, check_stored, log, shown

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

# Flags that say where a run is kept or how it was called, and those that say where it computes:
# neither kind is part of what it learns.
NOT_OF_THE_RUN = {"config", "recipe", "preset", "resume", "overwrite", "demo", "out_dir"}
MACHINE_FLAGS = {"save_every", "cache_gb", "device", "allow_overlap", "precision", "train_dir",
                 "valid_dir", "tensorboard"}
SAVE_MINUTES = 10  # between writes of last.pt

LOCK = ".train_identity.lock"
HANG_UP = getattr(signal, "SIGHUP", None)  # Windows has none
STOP_SIGNALS = [number for number in (signal.SIGINT, signal.SIGTERM, HANG_UP) if number]
# What `replacing` is asked to write in a run's folder and in its samples/, without suffixes.
WRITTEN = r"last|config|train_results|curves|net[GD]_epoch_\d+_\d+|epoch_\d+"


# ---------------------------------------------------------------------------------------------
# Flags


def load_flags(parser, args):
    """The flags of the run that --resume or --config names, checked; none without either.

    parser: train_identity.py's; args: what it made of the command line alone. Raises InputError
    naming the file and the flag in it.
    """
    if args.resume and (args.config or args.overwrite):
        raise InputError("--resume goes on with the run in --out_dir: leave out --config and "
                         "--overwrite")
    if args.resume:
        source = Path(args.out_dir, "last.pt")
        flags = read_last(args.out_dir)["progress"]["flags"]
    elif args.config:
        source, flags = args.config, checkpoints.read_config(args.config)["flags"]
    else:
        return {"without": []}
    flags = stored_flags(flags, args, source)
    check_stored(parser, flags, source)
    return flags


def run_flags(args):
    """The flags that make a run what it is; not where it is kept or how it was called."""
    return {name: value for name, value in vars(args).items() if name not in NOT_OF_THE_RUN}


def stored_flags(flags, args, source):
    """Flags from a config.json or last.pt -> those that this version knows.

    args: the flags of today; source: the file's name. Says in a line what is ignored or missing.
    """
    flags, known = {"without": [], **flags}, run_flags(args)
    for what, names in (("unknown and ignored", flags.keys() - known.keys()),
                        ("missing, today's default is used", known.keys() - flags.keys())):
        if names:
            log(f"{source} was written by another version; {what}: {', '.join(sorted(names))}")
    return {name: value for name, value in flags.items() if name in known}


def changed_flags(then, now, ignored=()):
    """["--lr 0.0004 -> 0.0001", ...]: where two runs' flags differ."""
    return [f"--{name} {then.get(name)} -> {now.get(name)}" for name in sorted({*then, *now})
            if name not in ignored and then.get(name) != now.get(name)]


# ---------------------------------------------------------------------------------------------
# Opening


@contextmanager
def lock(args):
    """Keep other processes' runs out of --out_dir; raises InputError naming the one that is in it.

    Also if it lies among photographs. The kernel opens the lock when the process ends, however it
    ends: none is ever stale. It is rank 0's business. A folder that was made for the run goes again
    if nothing was written. Windows has no such lock: that is said, and nothing is kept out.
    """
    check_out_dir(args.out_dir, train_dir=args.train_dir, valid_dir=args.valid_dir)
    folder = Path(args.out_dir)
    if fcntl is None or int(os.environ.get("RANK", 0)):
        if fcntl is None:
            log(f"no lock on this system: let no other run write to {folder} meanwhile")
        yield
        return
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        try:  # of the process: unlike flock's, workers that outlive it do not keep it
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise InputError(f"--out_dir {folder}: {file.read() or 'another process'} is training "
                             "in it; wait until that ends, or choose another folder") from None
        except OSError:  # a disk that knows no locks
            pass
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=file, flush=True)
        try:
            yield
        finally:
            with suppress(OSError):
                (folder / LOCK).unlink()
                for path in new:
                    path.rmdir()


def holds_a_run(folder):
    """Whether a folder has a training state or networks of a run."""
    return (folder / "last.pt").exists() or any(folder.glob("net[GD]_epoch_*.pth"))


def open_run(args):
    """The state to resume from, or None for a new run; changes nothing that a person may want.

    A folder that holds a run, or its pictures or table alone, is refused unless --resume or
    --overwrite says what to do with it.
    """
    folder = Path(args.out_dir)
    remains = [*folder.glob("curves.png"), *folder.glob("samples/epoch_*.png"),
               *folder.glob("train_results.csv")]
    is_run = holds_a_run(folder)
    if not is_run:
        figures.check_ours(remains)
        if (folder / "config.json").exists():  # another program's must not be written over
            checkpoints.read_config(folder / "config.json")
    if (is_run or remains) and not (args.resume or args.overwrite):
        raise InputError(f"{folder} already holds a run: go on with it (--resume --out_dir "
                         f"{folder}), choose another --out_dir, or replace it (--overwrite)")
    for written in (folder, folder / "samples"):
        checkpoints.remove_leftovers(written, WRITTEN)
    if args.resume:
        state = read_last(folder)
        if state["progress"].pop("replaces", False):
            delete_old_run(args)
        return state
    if args.overwrite and args.start and (
            Path(args.start).resolve() in [path.resolve() for path in generators(args)]):
        raise InputError(f"--start {args.start} belongs to the run that --overwrite deletes; copy "
                         "it elsewhere, or choose another --out_dir")
    return None


def generators(args):
    """The networks in --out_dir that a run of this factor left."""
    return named_by_a_run(Path(args.out_dir), f"net[GD]_epoch_{args.upscale_factor}_*.pth")


def named_by_a_run(folder, pattern):
    """The files of this pattern, less those that a person named, such as netG_epoch_8_best.pth."""
    return sorted(path for path in folder.glob(pattern) if re.fullmatch(WRITTEN, path.stem))


def delete_old_run(args):
    """What --overwrite replaces, but for last.pt: the new run's has just taken its place."""
    folder = Path(args.out_dir)
    named = [folder / name for name in ("config.json", "train_results.csv", "curves.png")]
    for path in (*named, *generators(args), *named_by_a_run(folder, "samples/epoch_*.png"),
                 *folder.glob("tensorboard/events.out.tfevents.*")):
        path.unlink(missing_ok=True)


def read_last(folder):
    """`checkpoints.read_run`, with its progress checked. Raises InputError naming file and value.

    Its flags are `load_flags`' business.
    """
    state, path = checkpoints.read_run(folder), Path(folder, "last.pt")
    progress, texts = state["progress"], (str, type(None))
    history, rows, data = (progress.get(name) for name in ("history", "rows", "data"))

    def whole(name, low):
        return type(progress.get(name)) is int and progress[name] >= low

    good = {
        "epoch": whole("epoch", 1), "step": whole("step", 0), "updates": whole("updates", 0),
        "history": "history" in progress and (
            progress.get("step") == 0 if history is None else isinstance(history, torch.Tensor)
            and history.is_floating_point() and history.dim() == 2),
        "rows": isinstance(rows, list) and all(
            isinstance(row, dict) and isinstance(row.get(name), (int, float)) for row in rows
            for name in ("Seconds", "Score_D", "Score_G", "Gradient_ratio", "D_updates")),
        "seconds": isinstance(progress.get("seconds"), (int, float)),
        "flags": isinstance(progress.get("flags"), dict) and all(
            isinstance(name, str) for name in progress["flags"]),
        "changes": isinstance(progress.get("changes", []), list),  # older versions noted none
        "start": isinstance(progress.get("start"), texts),
        "data": isinstance(data, dict) and all(
            isinstance(data.get(name), str) for name in ("train_dir", "valid_dir")),
        "replaces": isinstance(progress.get("replaces", False), bool),
    }
    for name, is_good in good.items():
        if not is_good:
            raise InputError(f"{path}: {name} is {shown(progress.get(name))}, which no run wrote; "
                             "put back another last.pt, or begin anew (--overwrite)")
    return state


def new_progress(args, train, valid):
    """What last.pt holds beside the networks, before the first step."""
    progress = {"epoch": 1, "step": 0, "updates": 0, "history": None, "rows": [], "seconds": 0.0,
                "flags": run_flags(args), "changes": [],
                "start": (checkpoints.file_digest(args.start) if args.start and not args.resume
                          else None),
                "data": {"train_dir": train.digest(), "valid_dir": valid.digest()}}
    if args.config and not args.resume:
        say_what_differs(args.config, progress)
    return progress


def say_what_differs(path, progress):
    """Say what is another than in the run of the config.json that is to be repeated."""
    config = checkpoints.read_config(path)
    if config.get("changes"):
        log(f"{path}: only the last flags are repeated; that run had others before "
            f"{config['changes']}")
    with suppress(KeyError, TypeError):
        then, now = config["git"]["commit"], git("rev-parse", "HEAD")
        if then and now and then != now:  # a copy without git cannot tell
            log(f"{path}: made at commit {then}, this is {now}: the default recipe may differ")
    with suppress(KeyError, TypeError):  # a config.json of flags alone
        then = {f"--{name}_dir": config["data"][name]["hash"] for name in ("train", "valid")}
        then["--start"] = config["start"]
        now = {f"--{name}": digest for name, digest in progress["data"].items()}
        now["--start"] = progress["start"]
        if others := [flag for flag in then if then[flag] != now[flag]]:
            log(f"{path}: this is not the same run, since {', '.join(others)} differ(s) from what "
                "it had")


def resume(state, args, progress, trainer, parts, shape):
    """Put `open_run`'s state into the trainer -> its progress, with the flags of today.

    A flag that was given beside --resume is applied and said; other photographs are refused.
    shape: of an epoch's history, steps and what each of them logs.
    """
    saved = {"changes": []} | state["progress"]
    for name in ("train_dir", "valid_dir"):
        if saved["data"][name] != progress["data"][name]:
            raise InputError(f"--{name} {getattr(args, name)}: not the photographs that the run in "
                             f"{args.out_dir} began with; put them back, or begin a new run with "
                             "--start and another --out_dir")
    then, now = saved["flags"], progress["flags"]
    if then.get("start") != now["start"]:
        raise InputError(f"--start {now['start']}: a run that goes on has its weights; leave that "
                         "flag out, or begin a new run in another --out_dir")
    generator, path = state["parts"].get("netG"), Path(args.out_dir, "last.pt")
    has = isinstance(generator, dict) and "back_projection" in generator
    if generator and has == ("back_projection" in args.without):
        raise InputError(f"{path}: its generator has {'' if has else 'no '}back-projection; "
                         f"{'leave it out of' if has else 'add back_projection to'} --without")
    if then.get("upscale_factor") != now["upscale_factor"]:
        raise InputError(f"--upscale_factor {now['upscale_factor']}: the run in {args.out_dir} has "
                         f"{then.get('upscale_factor')}; leave that flag out, or begin a new run "
                         "in another --out_dir")
    if ("icnr" in then.get("without", [])) != ("icnr" in args.without):
        raise InputError(f"--without icnr: concerns a generator's first weights, which {path} has "
                         "long left behind; give it as that run had it")
    if changed := changed_flags(then, now):
        log(f"changed for the epochs to come: {', '.join(changed)}")
    state["parts"].setdefault("average", state["parts"].get("netG"))  # begun --without ema
    checkpoints.restore_run(state, parts, path)
    progress = saved | {name: progress[name] for name in ("flags", "data")}
    if changed := changed_flags(then, now, MACHINE_FLAGS):
        progress["changes"] = [*saved["changes"], f"epoch {saved['epoch']}: {', '.join(changed)}"]
    trainer.updates = progress["updates"]
    if progress["history"] is not None and progress["history"].shape != shape:
        log(f"another number of steps per epoch: epoch {progress['epoch']} begins anew")
        progress.update(step=0, history=None)
    if progress["history"] is not None:
        history = progress["history"].to(trainer.device)
        # an fp16 overflow is no reason to stop what goes on in another precision
        progress["history"] = torch.where(history.isinf(), torch.nan, history)
    # counted in this run's steps, since another batch size makes other epochs
    trainer.scheduleG.last_epoch = (progress["epoch"] - 1) * shape[0] + progress["step"]
    if progress["epoch"] <= args.num_epochs:
        log(f"resumed {args.out_dir} at epoch {progress['epoch']}, step {progress['step'] + 1}")
    return progress


def git(*command):
    """What git says of this repository, or None."""
    try:
        return subprocess.run(["git", *command], cwd=Path(__file__).parent, text=True,
                              capture_output=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(args, trainer, progress, train, valid, device, world):
    """config.json: what a reader needs to repeat the run."""
    status = git("status", "--porcelain", "--untracked-files=no")
    return {
        "flags": run_flags(args),
        "changes": progress["changes"],
        "start": progress.get("start"),
        "networks": {"vgg16": getattr(trainer.loss.vgg, "label", "not used"),
                     "inception_resnet_v1": trainer.face_network.label},
        "data": {"train": {"n": len(train), "hash": train.digest()},
                 "valid": {"n": len(valid), "hash": valid.digest()}},
        "seed": args.seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": world,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "torchvision": torchvision.__version__, "numpy": np.__version__},
        "git": {"commit": git("rev-parse", "HEAD"),
                "clean": status == "" if status is not None else None},
        "wall_seconds": float(sum(row["Seconds"] for row in progress["rows"])),
    }


def say_settings(args, config):
    """Say what is trained on what, and which flags hardly anyone means; config: `describe`'s."""
    networks, n = config["networks"], config["data"]["train"]["n"]
    log(f"{n} training and {config['data']['valid']['n']} validation images; "
        f"{config['processes']} process(es) on {config['device']} in {args.precision}; VGG16: "
        f"{networks['vgg16']}, InceptionResnetV1: {networks['inception_resnet_v1']}")
    if args.start and not args.resume:
        log(f"fine-tuning {args.start}: --lr {args.lr:g} --pretrain_epochs {args.pretrain_epochs}")
    if args.batch_size > n:
        log(f"warning: --batch_size {args.batch_size} is more than the {n} training images, so an "
            "epoch is one smaller step; take a smaller --batch_size")
    if args.pretrain_epochs >= args.num_epochs:
        log(f"the pixel loss alone: --pretrain_epochs {args.pretrain_epochs} leaves no GAN epoch "
            f"of --num_epochs {args.num_epochs}")


def next_commands(args):
    """The lines to type after a run: measure its generator, use it."""
    path = checkpoints.generator_path(args.out_dir, args.upscale_factor, args.num_epochs)
    command = ["python", "evaluate.py", "--checkpoint", path, "--data_dir", args.valid_dir,
               "--out_dir", Path(args.out_dir, "results")]
    if args.crop_size != 128:
        command += ["--crop_size", args.crop_size, 0]
    if args.face_weights != "vggface2":
        command += ["--face_weights", args.face_weights]
    return (f"  {shlex.join(map(str, command))}\n"
            f"  python super_resolve.py PICTURE --checkpoint {shlex.quote(str(path))}")


# ---------------------------------------------------------------------------------------------
# Saving and stopping


@contextmanager
def restored_signals():
    """Give the signals back to whoever had them before `catch_signals`."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def catch_signals(world):
    """List that the signals which ask a run to stop append to; a second one stops a lone process.

    SIGHUP, of a terminal that closes, is one unless nohup has it ignored. One process of several
    gets two from a scheduler, its own and torchrun's: it saves, and torchrun kills it if that takes
    longer than half a minute.
    """
    caught = []
    known = [number for number in STOP_SIGNALS
             if number != HANG_UP or signal.getsignal(number) != signal.SIG_IGN]

    def note(number, _frame):
        caught.append(number)
        if world == 1:
            for other in known:
                signal.signal(other, signal.SIG_DFL)

    for number in known:
        signal.signal(number, note)
    return caught


def average_history(progress):
    """Put the mean over all processes into the steps of this epoch that are done.

    All ranks then hold the same, so that the file has what each of them needs to go on; a mean of
    equal rows leaves them as they are.
    """
    done = progress["history"][:progress["step"]]
    dist.all_reduce(done)
    done /= dist.get_world_size()


class Saver:
    """Writes last.pt now and then and when a signal asks the run to stop; keeps the epoch's time.

    parts: {name: anything with a state_dict()}; check: function that raises InputError where the
    state must not be saved.
    """

    def __init__(self, args, parts, progress, trainer, rank, world, check):
        self.args, self.parts, self.progress, self.trainer = args, parts, progress, trainer
        self.rank, self.world, self.check = rank, world, check
        self.replaces = args.overwrite and not args.resume
        self.caught = catch_signals(world)
        self.counted = self.saved = time.perf_counter()

    def count_seconds(self):
        """Add the time since the last call to the epoch's."""
        now = time.perf_counter()
        self.progress["seconds"] += now - self.counted
        self.counted = now

    def save(self):
        """Write last.pt; of several processes all take part, and rank 0 writes."""
        self.count_seconds()
        self.saved = self.counted
        self.progress["updates"] = self.trainer.updates
        if self.world > 1 and self.progress["history"] is not None:
            average_history(self.progress)
        if self.rank == 0:
            if self.replaces:  # a kill before all is deleted leaves this to --resume
                checkpoints.save_run(self.args.out_dir, self.parts,
                                     self.progress | {"replaces": True})
                delete_old_run(self.args)
            checkpoints.save_run(self.args.out_dir, self.parts, self.progress)
        self.replaces = False

    def after_update(self):
        """Save if it is time to; stop if a signal came, in all processes at the same step."""
        stop, due = self.agree()
        if stop or due:
            self.check()
            self.save()
        if stop:
            log(f"stopped at epoch {self.progress['epoch']}, step {self.progress['step']}; go on "
                f"with:\n  {self.command()} train_identity.py --resume --out_dir "
                f"{shlex.quote(str(self.args.out_dir))}")
            if self.world > 1:
                dist.destroy_process_group()
            sys.exit(128 + stop)

    def agree(self):
        """(signal that any process caught or 0, whether any finds it time to save)."""
        due = time.perf_counter() - self.saved > 60 * SAVE_MINUTES
        asked = [self.caught[0] if self.caught else 0, int(due)]
        if self.world > 1:
            # a GPU that waits for the others' answer stands still, so it asks now and then
            if self.progress["step"] % (8 if self.trainer.device.type == "cuda" else 1):
                return 0, 0
            asked = torch.tensor(asked, device=self.trainer.device)
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            asked = asked.tolist()
        return asked

    def command(self):
        """What a person types before the script's name."""
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if self.world == 1:
            return "python"
        if self.world == local:
            return f"torchrun --nproc_per_node={local}"
        return f"torchrun (on {self.world // local} machines, with the options as before)"
