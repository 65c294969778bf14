"""Train the identity-preserving SRGAN of the report.

    python train_identity.py                              # the default recipe, 100 epochs
    python train_identity.py --recipe report              # everything as the report did it
    python train_identity.py --resume                     # go on where a run in epochs/ stopped
    torchrun --nproc_per_node=4 train_identity.py         # one machine, four GPUs
"""

import argparse
import ctypes
import hashlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

import checkpoints
import evaluate
import figures
from data_utils import (
    TRAIN_DIR,
    VALID_DIR,
    InputError,
    TrainDatasetFromFolder,
    ValidDatasetFromFolder,
    not_negative,
    positive,
    refuse_overlap,
    run_script,
    synthetic_portraits,
    valid_crop_size,
)
from loss_identity import (
    PRESETS,
    GeneratorLoss,
    adversarial_loss,
    fake_loss,
    load_face_network,
    load_vgg,
    pixel_loss,
    real_loss,
)
from model import (
    PRECISIONS,
    Discriminator,
    Generator,
    autocast,
    fast_precision,
    probability,
    remove_stripes_,
)

# What each step logs, in this order; nan where a step left a term out.
LOGGED = ("pixel", "content", "adversarial", "identity", "loss_d", "score_d", "score_g", "ratio")

# The default recipe against the report's: each departure has a flag, --recipe report sets all.
RECIPES = {
    "ours": dict(batch_size=16, lr=4e-4, lr_d=2.5e-5, momentum_d=0.5, schedule="cosine",
                 pretrain_epochs=None, gan_loss="bce", separate_d=False, max_ratio=2.0, ema=0.999,
                 lazy=4, no_flip=False, no_icnr=False, no_notch=False, precision="auto"),
    "report": dict(batch_size=32, lr=1e-4, lr_d=1e-4, momentum_d=0.9, schedule="constant",
                   pretrain_epochs=0, gan_loss="linear", separate_d=True, max_ratio=0.0, ema=0.0,
                   lazy=1, no_flip=True, no_icnr=True, no_notch=True, precision="fp32"),
}

NOT_FINITE = ("stopped, and last.pt, once written, keeps the last good state. Lower the learning "
              "rate (--lr, --lr_d) or that term's weight and go on with --resume --resume_override")

# Of the flags that are numbers from 0 up: what they must be under.
LIMITS = {"lr": math.inf, "lr_d": math.inf, "momentum_d": 1, "max_ratio": math.inf, "ema": 1,
          "alpha": math.inf, "beta": math.inf, "gamma": math.inf}

# Flags that are not the run's own, and those of its own that --resume may change.
NOT_OF_THE_RUN = {"config", "recipe", "preset", "resume", "resume_override", "overwrite", "demo",
                  "out_dir"}
FREE_ON_RESUME = {"num_epochs", "save_every", "save_minutes", "valid_every", "valid_batch",
                  "cache_gb", "device", "allow_overlap", "compile", "precision", "train_dir",
                  "valid_dir"}


# ---------------------------------------------------------------------------------------------
# The step


def train_step(run, lr, hr, targets, with_gan, with_perceptual, every=1, share=1.0):
    """Gradients of the generator and, `with_gan`, of the discriminator, on one batch.

    L_total is differentiated at SR, term by term, and the sum goes back through the generator
    once. That frees each frozen network's activations before the next term, gives the size of each
    gradient for nothing, and lets one pass of D over the fakes serve both sides of the game: D's
    update takes the gradient to its parameters, the generator's the one to the images.

    run: the networks, optimisers and loss (see `build`); lr, hr: (N, 3, h, w), (N, 3, H, W) in
    [0, 1]; targets: `loss.targets(hr)`; every: the weight of terms that are computed on every
    `every`-th step only; share: of this part in an accumulated batch. -> the LOGGED values, whose
    ratio is that of the adversarial to the pixel gradient, before run.max_ratio bounds it.
    """
    loss, scale = run.loss, run.scaler.get_scale()
    logged = {}
    with run.autocast():
        # beside D's activations there is no room for the generator's
        sr_graph = run.ddpG(lr, run.recompute if with_gan else None)
    sr = sr_graph.detach().requires_grad_()

    logged["pixel"] = pixel_loss(sr, hr)
    gradient, = torch.autograd.grad(logged["pixel"], sr)

    if with_gan:
        run.tidy()
        at_sr = play(run, sr, hr, logged, share * scale, scale)
        squares = torch.stack([at_sr.norm().square(), gradient.norm().square()])
        if dist.is_initialized():  # one bound for all processes
            dist.all_reduce(squares)
        logged["ratio"] = (squares[0] / squares[1].clamp_min(1e-24)).sqrt()
        if run.max_ratio:  # a D that wins would drown the other terms
            at_sr *= (run.max_ratio / logged["ratio"]).clamp_max(1)
        gradient += every * at_sr

    if with_perceptual and (loss.alpha or loss.gamma):
        run.tidy()
        with run.autocast():
            at_sr, content, identity = loss.perceptual_gradient(
                sr.detach(), targets, run.chunk, scale)
        logged |= {"content": content} if loss.alpha else {}
        logged |= {"identity": identity} if loss.gamma else {}
        gradient += every * at_sr

    sr_graph.backward(gradient * share * scale)
    # nan marks a term that this step left out, so a term that has become nan is noted as inf
    return torch.stack([logged[name].detach().float().nan_to_num(math.inf, math.inf, math.inf)
                        if name in logged else sr.new_full((), math.nan) for name in LOGGED])


def play(run, sr, hr, logged, weight, scale):
    """One round against the discriminator -> gradient of beta L_GAN at `sr`, a leaf.

    Adds the gradient of D's loss times `weight` to D's parameters, and the terms to `logged`. One
    pass of D over the fakes serves both. There are two passes, one at a time alive: each over half
    of the real and half of the fake images or, with --separate_d, one over either kind. In a pass
    of its own each kind is standardised by BatchNorm with its own statistics, which takes away
    most of what tells the two apart; D then hardly learns (README, "Departures"). A batch of one
    has one mixed pass.
    """
    kind, at_sr = run.loss.gan_loss, torch.zeros_like(sr)
    logged |= {name: sr.new_zeros(()) for name in ("adversarial", "loss_d", "score_d", "score_g")}
    for real, fake in passes(run.separate_d, hr, sr):
        with run.autocast():
            real_logits, fake_logits = run.ddpD(torch.cat([real, fake])).split(
                [len(real), len(fake)])
        loss_d = sr.new_zeros(())
        if len(real):
            part = len(real) / len(hr)
            loss_d += real_loss(kind, real_logits) * part
            logged["score_d"] += probability(real_logits.detach().float()).mean() * part
        if len(fake):
            part = len(fake) / len(sr)
            adversarial = adversarial_loss(kind, fake_logits) * part
            at_sr += torch.autograd.grad(adversarial * scale, sr, retain_graph=True)[0]
            loss_d += fake_loss(kind, fake_logits) * part
            logged["adversarial"] += adversarial.detach()
            logged["score_g"] += probability(fake_logits.detach().float()).mean() * part
        (loss_d * weight).backward(inputs=run.parametersD)
        logged["loss_d"] += loss_d.detach()
    return at_sr * (run.loss.beta / scale)


def passes(separate_d, hr, sr):
    """[(real, fake)]: the images of each pass of D, one of which may be empty (see `play`)."""
    return ([(hr, sr[:0]), (hr[:0], sr)] if separate_d else list(zip(hr.chunk(2), sr.chunk(2))))


def apply_updates(run, with_gan):
    """Step both optimisers on the accumulated gradients, then the schedule and the average."""
    for optimizer in [run.optimizerG] + [run.optimizerD] * with_gan:
        run.scaler.step(optimizer)
        optimizer.zero_grad()
    if run.notch:
        remove_stripes_(run.netG.last.weight)
    run.scaler.update()
    run.scheduleG.step()
    run.updates += 1
    if run.average is not run.netG:
        update_average(run.average, run.netG, run.updates, run.ema)


@torch.no_grad()
def update_average(average, netG, updates, limit):
    """Exponential moving average of weights and BatchNorm statistics, in place.

    The decay ramps up as (1 + t) / (10 + t) towards `limit`: a fixed one would hold on to the
    random start for thousands of steps.
    """
    decay = min(limit, (1 + updates) / (10 + updates))
    for mean, value in zip(average.state_dict().values(), netG.state_dict().values()):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)


# ---------------------------------------------------------------------------------------------
# Set-up


def build(args, device, steps_per_epoch, world=1):
    """Networks, losses, optimisers and schedules of a run, in one namespace."""
    torch.manual_seed(args.seed)
    run = SimpleNamespace()
    run.netG = Generator(args.upscale_factor, icnr=not args.no_icnr)
    run.netD = Discriminator()
    if args.start and not args.resume:  # last.pt holds a resumed run's weights
        start = checkpoints.load_generator(args.start)
        if start.scale_factor != args.upscale_factor:
            raise InputError(f"{args.start}: is a {start.scale_factor}x generator; give "
                             f"--upscale_factor {start.scale_factor} or another --start")
        run.netG.load_state_dict(start.state_dict())
    run.notch = not args.no_notch
    if run.notch:
        remove_stripes_(run.netG.last.weight)
    if world > 1 and device.type == "cuda":
        run.netG = torch.nn.SyncBatchNorm.convert_sync_batchnorm(run.netG)
        run.netD = torch.nn.SyncBatchNorm.convert_sync_batchnorm(run.netD)
    for network in (run.netG, run.netD):
        network.to(device, memory_format=torch.channels_last)
    run.ema = args.ema
    run.average = deepcopy(run.netG) if args.ema else run.netG
    run.ddpG, run.ddpD = run.netG, run.netD
    if args.compile:
        # D goes back twice through one pass (see `play`), which donated buffers do not allow
        torch._functorch.config.donated_buffer = False
        run.ddpG, run.ddpD = torch.compile(run.netG), torch.compile(run.netD)
    if world > 1:
        # Each rank keeps its own BatchNorm statistics in a step; rank 0's are saved.
        run.ddpG = DistributedDataParallel(run.ddpG, broadcast_buffers=False)
        run.ddpD = DistributedDataParallel(run.ddpD, broadcast_buffers=False)
    run.parametersD = list(run.netD.parameters())

    run.face_network = load_face_network(args.face_weights).to(device)
    vgg = load_vgg(args.vgg_weights).to(device) if args.alpha else None
    run.loss = GeneratorLoss(args.alpha, args.beta, args.gamma, vgg, run.face_network,
                             args.gan_loss)
    run.separate_d, run.max_ratio = args.separate_d, args.max_ratio

    fused = {"fused": True} if device.type in ("cpu", "cuda") else {}
    run.optimizerG = torch.optim.Adam(run.netG.parameters(), lr=args.lr, **fused)
    run.optimizerD = torch.optim.Adam(run.netD.parameters(), lr=args.lr_d,
                                      betas=(args.momentum_d, 0.999), **fused)
    total = args.num_epochs * steps_per_epoch

    def factor(step):  # of the learning rate: a half cosine to a twentieth
        if args.schedule == "constant":
            return 1.0
        return 0.05 + 0.95 * (1 + math.cos(math.pi * min(1, step / total))) / 2

    run.scheduleG = torch.optim.lr_scheduler.LambdaLR(run.optimizerG, factor)

    if args.precision == "auto":
        args.precision = fast_precision(device)  # noted with the flags: part of what the run is
    run.autocast = autocast(device, args.precision)
    run.scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    run.scaler.scale(torch.zeros((), device=device))  # it makes its factor when it is first used
    # A CPU frees activations that it has done with; a GPU wants the whole batch. Sixteen images in
    # the frozen networks take no more than D does.
    run.chunk = 16 if device.type == "cpu" else args.batch_size
    run.recompute = 4 if device.type == "cpu" else None
    run.tidy = give_back_freed_memory if device.type == "cpu" else (lambda: None)
    run.updates = 0
    run.curves_drawn = -math.inf  # seconds on the clock
    run.known = {}             # HR's VGG features and embeddings, of the training images
    run.known_embeddings = {}  # HR's embeddings, of the validation images
    return run


def set_optimizers(run, args):
    """Those of the flags: the restored optimisers and schedule brought the saved run's along."""
    run.scheduleG.base_lrs = [args.lr]
    for group in run.optimizerG.param_groups:
        group["initial_lr"] = args.lr
        group["lr"] = args.lr * run.scheduleG.lr_lambdas[0](run.scheduleG.last_epoch)
    for group in run.optimizerD.param_groups:
        group.update(lr=args.lr_d, betas=(args.momentum_d, 0.999))


def set_up_machine(args):
    """Device, process group and CPU settings -> (device, rank, world)."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA here; use --device cpu")
    world = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets these three
    rank = int(os.environ.get("RANK", 0))
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)
    if name == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32
        torch.backends.cudnn.allow_tf32 = True
    else:
        torch.set_flush_denormal(True)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if name == "cuda" else "gloo")
    return device, rank, world


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


def give_back_freed_memory():
    """Give the kernel what is free, between two parts of a step that need blocks of other sizes.

    In the holes that one part leaves the next does not fit: a batch of 32 peaks at 2.1 instead of
    2.3 GiB. It costs nothing with large pages and a tenth of the step without them.
    """
    glibc("malloc_trim", 0)


def glibc(name, *arguments):
    """Call a function of glibc; elsewhere (macOS, Windows, musl) do nothing -> its answer or 0."""
    try:
        return getattr(ctypes.CDLL(None), name)(*arguments)
    except (AttributeError, OSError, TypeError):
        return 0


def load_data(args):
    """(training set, validation set), checked; says so when the crop size is floored."""
    crop = valid_crop_size(args.crop_size, args.upscale_factor)
    if crop != args.crop_size:
        say(f"--crop_size {args.crop_size} is no multiple of {args.upscale_factor}: using {crop}")
    if not crop:
        raise InputError(f"--crop_size {args.crop_size}: must be {args.upscale_factor} or more")
    if crop < 32 and args.alpha:
        raise InputError(f"--crop_size {args.crop_size}: VGG16 halves a picture five times and "
                         "needs 32 px; take a larger crop, or --alpha 0")
    train = TrainDatasetFromFolder(args.train_dir, crop, args.upscale_factor, args.crop, args.seed,
                                   args.cache_gb)
    valid = ValidDatasetFromFolder(args.valid_dir, crop, args.upscale_factor, args.cache_gb)
    if not args.allow_overlap:
        refuse_overlap(train, valid)
    return train, valid


def run_flags(args):
    """The flags that make a run what it is; not where it is kept or how it was called."""
    return {name: value for name, value in vars(args).items() if name not in NOT_OF_THE_RUN}


def file_digest(path):
    """SHA-256 of a file's bytes, hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def describe(args, run, progress, train, valid, device, world):
    """config.json: what a reader needs to repeat the run."""
    def git(*command):
        try:
            return subprocess.run(["git", *command], cwd=Path(__file__).parent, text=True,
                                  capture_output=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    status = git("status", "--porcelain", "--untracked-files=no")
    return {
        "flags": run_flags(args),
        "start": progress.get("start"),
        "networks": {"vgg16": getattr(run.loss.vgg, "label", "not used"),
                     "inception_resnet_v1": run.face_network.label},
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


# ---------------------------------------------------------------------------------------------
# The run


def say(message):
    """A line that does not tear the progress bar; with a time stamp when it goes into a file."""
    if int(os.environ.get("RANK", 0)):
        return
    stamp = "" if sys.stdout.isatty() else time.strftime("%Y-%m-%d %H:%M:%S ")
    tqdm.write(f"{stamp}{message}", file=sys.stdout)
    sys.stdout.flush()


def catch_signals(world):
    """List that SIGINT and SIGTERM append to; a second signal stops a lone process at once.

    One of several gets two from a scheduler, its own and torchrun's: it saves, and torchrun kills
    it if that takes longer than half a minute.
    """
    caught = []

    def note(number, _frame):
        caught.append(number)
        if world == 1:
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, signal.SIG_DFL)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, note)
    return caught


def leave_signals_to_the_run(_worker):
    """torchrun signals the workers of a DataLoader too: they end when the run has saved."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)


def epoch_order(n, args, epoch, rank, world):
    """(batches of indices of this rank, flip of every image): functions of seed and epoch alone."""
    sampler = DistributedSampler(range(n), world, rank, shuffle=True, seed=args.seed)
    sampler.set_epoch(epoch)
    order, size = list(sampler), args.batch_size // world
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
    flips = torch.rand(n, generator=generator) < (0.0 if args.no_flip else 0.5)
    return [order[i:i + size] for i in range(0, len(order), size)], flips


def cached_targets(loss, known, keys, hr):
    """`loss.targets(hr)`, computed once per (image, flip): HR crops never change.

    One image at a time, so that a target does not depend on the batch that it was first met in and
    a resumed run finds the same bits. known: {key: targets}, filled here.
    """
    for key, image in zip(keys, hr):
        if key not in known:
            known[key] = loss.targets(image[None])
    return [None if column[0] is None else torch.cat(column)
            for column in zip(*(known[key] for key in keys))]


def train_epoch(run, args, dataset, progress, device, rank, world, between_steps):
    """The steps of one epoch from `progress["step"]` on; fills `progress["history"]`.

    between_steps() is called after each update, when everything is in a state to be saved. Raises
    InputError with epoch, step and term when a loss is not finite.
    """
    epoch = progress["epoch"]
    with_gan = epoch > args.pretrain_epochs
    lazy = args.lazy if with_gan else 1
    batches, flips = epoch_order(len(dataset), args, epoch, rank, world)
    dataset.epoch = epoch
    if progress["history"] is None:
        progress["history"] = torch.full((len(batches), len(LOGGED)), math.nan, device=device)
    history, first = progress["history"], progress["step"]
    workers = 0 if dataset.cached else min(8, os.cpu_count())
    loader = DataLoader(dataset, batch_sampler=batches[first:], num_workers=workers,
                        pin_memory=device.type == "cuda",
                        worker_init_fn=leave_signals_to_the_run)
    # a look at the losses waits for a GPU; a CPU has them anyway
    look_every = 25 if device.type == "cuda" else 1
    target_bytes = 4 * 512 * ((dataset.crop_size // 32) ** 2 + 1)  # VGG features and embedding
    keep_targets = (args.crop == "center"
                    and 2 * len(dataset) * target_bytes < args.cache_gb * 2 ** 30)
    run.netG.train()
    run.netD.train()
    bar = tqdm(total=len(dataset), initial=first * args.batch_size, unit="image", leave=False,
               desc=f"epoch {epoch}/{args.num_epochs}", disable=True if rank else None)
    for step, (indices, (lr, hr)) in enumerate(zip(batches[first:], loader), first):
        flipped = flips[indices]
        mirror = flipped.to(device, non_blocking=True)[:, None, None, None]
        lr, hr = (x.to(device, memory_format=torch.channels_last, non_blocking=True)
                  for x in (lr, hr))
        lr, hr = (torch.where(mirror, x.flip(-1), x) for x in (lr, hr))
        # in turn, so that the steps are of equal length; a small epoch has fewer than `lazy`
        gan = with_gan and run.updates % lazy == 0
        perceptual = with_gan and run.updates % lazy == lazy // 2
        rows = []
        size = math.ceil(len(indices) / args.accumulate)
        for start in range(0, len(indices), size):
            part, targets = slice(start, start + size), None
            if perceptual:
                keys = list(zip(indices[part], flipped[part].tolist()))
                with run.autocast():
                    targets = (cached_targets(run.loss, run.known, keys, hr[part]) if keep_targets
                               else run.loss.targets(hr[part]))
            share = len(lr[part]) / len(indices)
            rows.append(share * train_step(run, lr[part], hr[part], targets, gan, perceptual, lazy,
                                           share))
        apply_updates(run, gan)
        history[step] = torch.stack(rows).sum(0)
        progress["step"] = step + 1
        last = step + 1 == len(batches)
        if (step + 1) % look_every == 0 or last:
            check_finite(history[:step + 1], epoch, run.scaler.is_enabled())
            if last:
                check_weights(run, progress)
            if not bar.disable:
                bar.set_postfix({k: f"{v:.4f}" for k, v in zip(LOGGED, history[step].tolist())
                                 if v == v}, refresh=False)
        bar.update(len(indices) * world)
        between_steps()
    bar.close()


def check_finite(history, epoch, scaled=False):
    """Raise InputError naming epoch, step and term of the first loss that is not finite.

    scaled: a GradScaler passes over a step whose gradients overflowed, so the ratio may be inf.
    """
    losses = history[:, :LOGGED.index("ratio")] if scaled else history
    bad = losses.isinf().nonzero().tolist()
    if bad:
        step, term = bad[0]
        raise InputError(f"epoch {epoch}, step {step + 1}: {LOGGED[term]} is not finite; "
                         f"{NOT_FINITE}")


def check_weights(run, progress):
    """Raise InputError if the last update made a weight infinite or nan: it must not be saved."""
    for name, network in (("generator", run.netG), ("discriminator", run.netD)):
        if not torch.stack([p.isfinite().all() for p in network.parameters()]).all():
            raise InputError(f"epoch {progress['epoch']}, step {progress['step']}: its update made "
                             f"weights of the {name} that are not finite; {NOT_FINITE}")


def discriminator_at_work(run, device):
    """function (hr, sr) -> [logits of HR, of SR], with D as its own steps see the images.

    That is in passes with the batch's statistics: BatchNorm's running ones lag behind, and with
    them a D that tells most pairs apart may call all images the same. A copy, so that looking
    changes nothing; a plain one, since ranks with unequal numbers of batches must not wait for
    each other. The logits are fp32, whatever the precision of the passes.
    """
    with torch.device("meta"):  # no start values to be drawn and thrown away
        netD = Discriminator()
    netD.to_empty(device=device).to(memory_format=torch.channels_last).train()
    netD.load_state_dict(run.netD.state_dict())

    def discriminate(hr, sr):
        with run.autocast():
            logits = [netD(torch.cat([real, fake])).float().split([len(real), len(fake)])
                      for real, fake in passes(run.separate_d, hr, sr)]
        return [torch.cat(kind) for kind in zip(*logits)]

    return discriminate


def validate_epoch(run, args, gan, dataset, device, rank, world):
    """Validation images split over the ranks -> one (n, 6) array (see `evaluate.validate`).

    The networks compute as in training: on 100 images bf16 moves PSNR-Y by -0.003 dB and the cosine
    by -0.0003 against fp32, in which `evaluate.py` measures.
    """
    mine = range(rank, len(dataset), world)
    if world > 1:  # BatchNorm's running statistics: those that are saved
        for buffer in run.average.buffers():
            dist.broadcast(buffer, 0)
    discriminate = discriminator_at_work(run, device) if gan else None
    rows = evaluate.validate(run.average, discriminate, dataset, run.face_network,
                             run.known_embeddings, args.valid_batch, device, mine,
                             run.autocast).cpu()
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, rows)
        rows = torch.cat(parts)
    return rows[rows[:, 5].argsort()].numpy()


def epoch_row(run, args, progress, validation):
    """One row of train_results.csv: the report's columns, then the terms and the state of D."""
    history = progress["history"].double()
    history[history.isinf()] = math.nan  # the ratio of a step that a GradScaler passed over
    means = dict(zip(LOGGED, history.nanmean(0).tolist()))
    weighted = (("pixel", 1), ("content", run.loss.alpha), ("adversarial", run.loss.beta),
                ("identity", run.loss.gamma))
    loss_g = sum(weight * means[name] for name, weight in weighted if means[name] == means[name])
    gan = progress["epoch"] > args.pretrain_epochs
    psnr, ssim, cosine = [math.nan] * 3 if validation is None else validation.mean(0)[:3]
    accuracy = math.nan
    if gan and validation is not None:
        accuracy = ((validation[:, 3] > 0).mean() + (validation[:, 4] < 0).mean()) / 2
    return {"Epoch": progress["epoch"], "Loss_D": means["loss_d"], "Loss_G": loss_g,
            "Score_D": means["score_d"], "Score_G": means["score_g"],
            "PSNR": float(psnr), "SSIM": float(ssim), "Cosine": float(cosine),
            "Pixel": means["pixel"], "Content": means["content"],
            "Adversarial": means["adversarial"], "Identity": means["identity"],
            "D_accuracy": float(accuracy), "Gradient_ratio": means["ratio"],
            "Learning_rate": run.optimizerG.param_groups[0]["lr"],
            "Phase": "gan" if gan else "pixel", "Seconds": progress["seconds"]}


def dead_discriminator(row, args):
    """A warning when D taught nothing for a whole epoch, else None.

    Either it could not tell real from generated, or its gradient did not arrive.
    """
    gap, ratio = row["Score_D"] - row["Score_G"], row["Gradient_ratio"]
    if gap >= 0.01 and ratio < 1e-4:  # D tells them apart, but SR hears nothing of it
        advice = ["--gan_loss bce"] * (args.gan_loss != "bce") + ["a larger --beta"]
        advice += ["a lower --lr_d"] * (gap > 0.9)
        return (f"warning: epoch {row['Epoch']}: the discriminator is not heard: D(x) - D(G(z)) is "
                f"{gap:.4f}, but its gradient at SR is {ratio:.1e} of the pixel gradient, so the "
                f"adversarial term teaches nothing. Try {', or '.join(advice)}")
    if gap < 0.01:
        advice = ["--no-separate_d"] * args.separate_d
        advice += ["--gan_loss bce"] * (args.gan_loss != "bce")
        advice += ["--momentum_d 0.5"] * (args.momentum_d > 0.5)
        advice += ["a higher --lr_d", "more steps: a larger --num_epochs"]
        return (f"warning: epoch {row['Epoch']}: the discriminator is dead: D(x) - D(G(z)) is "
                f"{gap:.4f}. It cannot tell real from generated images, so the adversarial term "
                f"teaches nothing, however large its gradient is (at SR {ratio:.1e} of the pixel "
                f"gradient). Try {', or '.join(advice)}")
    return None


def summary_line(row, args):
    """One epoch in one line."""
    left = args.num_epochs - row["Epoch"]
    if row["Phase"] == "pixel":  # a step with every term takes ten times as long (benchmark.py)
        left += 9 / args.lazy * max(0, args.num_epochs - args.pretrain_epochs)
    left *= row["Seconds"]
    line = (f"epoch {row['Epoch']}/{args.num_epochs} ({row['Phase']}): "
            f"PSNR-Y {row['PSNR']:.2f} dB, SSIM {row['SSIM']:.4f}, cosine {row['Cosine']:.4f}, "
            f"pixel {row['Pixel']:.5f}")
    if row["Phase"] == "gan":
        line += (f", D(x) {row['Score_D']:.3f}, D(G(z)) {row['Score_G']:.3f}, "
                 f"D accuracy {row['D_accuracy']:.2f}, gradient ratio {row['Gradient_ratio']:.2g}")
    return f"{line}; {row['Seconds']:.0f} s, about {left / 60:.0f} min left"


def generators(args):
    """The networks in --out_dir that this run or an older one left."""
    return sorted(Path(args.out_dir).glob(f"net[GD]_epoch_{args.upscale_factor}_*.pth"))


def open_folder(args):
    """The state to resume from, or None for a new run; changes nothing that a person may want.

    A folder that holds a run is refused unless --resume or --overwrite says what to do with it.
    """
    folder = Path(args.out_dir)
    if (folder / "last.pt").exists() and not (args.resume or args.overwrite):
        raise InputError(f"{folder} already holds a run: go on with it (--resume --out_dir "
                         f"{folder}), choose another --out_dir, or replace it (--overwrite)")
    for leftover in folder.glob(".*.tmp*"):  # of a process that was killed while it wrote
        leftover.unlink(missing_ok=True)
    if args.resume:
        return checkpoints.read_run(folder)
    if args.start and Path(args.start).resolve() in [path.resolve() for path in generators(args)]:
        raise InputError(f"--start {args.start} lies in --out_dir, where a new run sets the files "
                         "of older ones aside; choose another --out_dir")
    return None


def make_room(args):
    """Delete the run that --overwrite replaces, or set a generator that was shipped here aside.

    Only when all that a new run needs has been loaded: what is refused must cost nothing.
    """
    folder = Path(args.out_dir)
    if (folder / "last.pt").exists():
        for path in (folder / "last.pt", *generators(args), *folder.glob("samples/epoch_*.png")):
            path.unlink()
        return
    # not to be taken for this run's
    for path in (folder / "train_results.csv", folder / "config.json",
                 *sorted(folder.glob("net[GD]_epoch_*_*.pth"))):
        if path.exists():
            kept = f"previous_{path.name}"
            while (folder / kept).exists():
                kept = f"previous_{kept}"
            os.replace(path, folder / kept)
            say(f"{path} kept as {kept}")


def refuse_changes(args, progress, train, valid):
    """Raise InputError if a resumed run would go on with other flags or other photographs."""
    then, now = progress["flags"], run_flags(args)
    changed = [f"--{name} {then.get(name)} -> {now.get(name)}" for name in sorted({*then, *now})
               if name not in FREE_ON_RESUME and then.get(name) != now.get(name)]
    if then.get("start") != now["start"]:
        raise InputError(f"--start {now['start']}: a run that goes on has its weights; leave that "
                         "flag out, or begin a new run in another --out_dir")
    for name, data in (("train_dir", train), ("valid_dir", valid)):
        if progress["data"][name] != data.digest():
            changed.append(f"the photographs in --{name} {getattr(args, name)}")
    if changed and not args.resume_override:
        raise InputError(f"this run began with something else: {', '.join(changed)}; leave that "
                         "as it was, or add --resume_override")


def train(args):
    """The whole run: set up, then epoch after epoch with validation, pictures and checkpoints."""
    device, rank, world = set_up_machine(args)
    if args.batch_size % (world * args.accumulate):
        raise InputError(f"--batch_size {args.batch_size} does not divide by {world} processes x "
                         f"--accumulate {args.accumulate}")
    folder = Path(args.out_dir)
    train_set, valid_set = load_data(args)
    state = open_folder(args) if rank == 0 or args.resume else None
    steps_per_epoch = math.ceil(math.ceil(len(train_set) / world) / (args.batch_size // world))
    run = build(args, device, steps_per_epoch, world)
    parts = {"netG": run.netG, "netD": run.netD, "optimizerG": run.optimizerG,
             "optimizerD": run.optimizerD, "scheduleG": run.scheduleG, "scaler": run.scaler}
    if args.ema:
        parts["average"] = run.average
    progress = {"epoch": 1, "step": 0, "updates": 0, "history": None, "rows": [], "seconds": 0.0,
                "flags": run_flags(args),
                "start": file_digest(args.start) if args.start and not args.resume else None,
                "data": {"train_dir": train_set.digest(), "valid_dir": valid_set.digest()}}
    if state:
        refuse_changes(args, state["progress"], train_set, valid_set)
        state["parts"].setdefault("average", state["parts"]["netG"])  # begun with --ema 0
        checkpoints.restore_run(state, parts, folder / "last.pt")
        progress = state["progress"] | {name: progress[name] for name in ("flags", "data")}
        run.updates = progress["updates"]
        if progress["history"] is not None and len(progress["history"]) != steps_per_epoch:
            say(f"another number of steps per epoch: epoch {progress['epoch']} begins anew")
            progress.update(step=0, history=None)
        if progress["history"] is not None:
            history = progress["history"].to(device)
            # an fp16 overflow is no reason to stop what goes on in another precision
            progress["history"] = torch.where(history.isinf(), math.nan, history)
        # counted in this run's steps, since another batch size makes other epochs
        run.scheduleG.last_epoch = (progress["epoch"] - 1) * steps_per_epoch + progress["step"]
        set_optimizers(run, args)
        if progress["epoch"] > args.num_epochs:
            say(f"{folder}: {progress['epoch'] - 1} epochs are done; a larger --num_epochs goes on")
            if world > 1:
                dist.destroy_process_group()
            return
        say(f"resumed {folder} at epoch {progress['epoch']}, step {progress['step'] + 1}")
    config = describe(args, run, progress, train_set, valid_set, device, world)
    say(f"{len(train_set)} training and {len(valid_set)} validation images; {world} process(es) on "
        f"{config['device']} in {args.precision}; VGG16: {config['networks']['vgg16']}, "
        f"InceptionResnetV1: {config['networks']['inception_resnet_v1']}")

    if args.pretrain_epochs >= args.num_epochs:
        say(f"the pixel loss alone: --pretrain_epochs {args.pretrain_epochs} leaves no GAN epoch "
            f"of --num_epochs {args.num_epochs}")

    caught = catch_signals(world)
    # processes stop together, and a GPU that waits for the others' answer stands still
    stop_every = 8 if device.type == "cuda" else 1
    clock = {"from": time.perf_counter(), "saved": time.perf_counter()}

    def save():
        now = time.perf_counter()
        progress["seconds"] += now - clock["from"]
        progress["updates"] = run.updates
        clock["from"] = clock["saved"] = now
        if rank == 0:
            checkpoints.save_run(folder, parts, progress)

    def between_steps():
        stop = torch.tensor(caught[0] if caught else 0)
        if world > 1:
            if progress["step"] % stop_every:
                stop.zero_()
            else:
                stop = stop.to(device)
                dist.all_reduce(stop, dist.ReduceOp.MAX)
        if stop or time.perf_counter() - clock["saved"] > 60 * args.save_minutes:
            if progress["step"]:  # between two epochs nothing is unchecked
                check_finite(progress["history"][:progress["step"]], progress["epoch"],
                             run.scaler.is_enabled())
                check_weights(run, progress)
            save()
        if stop:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            with_what = ("python" if world == 1 else
                         f"torchrun --nproc_per_node={local}" if world == local else
                         f"torchrun (on {world // local} machines, with the options as before)")
            say(f"stopped at epoch {progress['epoch']}, step {progress['step']}; go on with:\n"
                f"  {with_what} train_identity.py --resume --out_dir {folder}")
            if world > 1:
                dist.destroy_process_group()
            sys.exit(128 + int(stop))

    if rank == 0:
        if not state:
            make_room(args)
        checkpoints.save_json(config, folder / "config.json")
    while progress["epoch"] <= args.num_epochs:
        epoch = progress["epoch"]
        train_epoch(run, args, train_set, progress, device, rank, world, between_steps)
        last = epoch == args.num_epochs
        validation = None
        if epoch % args.valid_every == 0 or last:
            gan = epoch > args.pretrain_epochs
            validation = validate_epoch(run, args, gan, valid_set, device, rank, world)
        if world > 1:
            dist.all_reduce(progress["history"])
            progress["history"] /= world
        now = time.perf_counter()
        progress["seconds"] += now - clock["from"]
        clock["from"] = now
        row = epoch_row(run, args, progress, validation)
        progress["rows"].append(row)
        progress.update(epoch=epoch + 1, step=0, history=None, seconds=0.0)
        if rank == 0:
            say(summary_line(row, args))
            warning = dead_discriminator(row, args)
            if warning and not any(dead_discriminator(r, args) for r in progress["rows"][-2:-1]):
                say(warning)
            write_epoch(run, args, folder, progress["rows"], config, epoch, last, validation,
                        valid_set, device)
        save()
        between_steps()
    say(f"done: {folder}/ holds netG_epoch_{args.upscale_factor}_{args.num_epochs}.pth, "
        "train_results.csv, curves.png and samples/")
    if world > 1:
        dist.destroy_process_group()


def write_epoch(run, args, folder, rows, config, epoch, last, validation, valid_set, device):
    """What a person looks at after an epoch: CSV, curves, samples, checkpoints, config."""
    table = pd.DataFrame(rows)
    checkpoints.save_csv(table, folder / "train_results.csv")
    config["wall_seconds"] = float(table["Seconds"].sum())
    checkpoints.save_json(config, folder / "config.json")
    if last or time.perf_counter() - run.curves_drawn > 60:  # matplotlib takes a second or two
        figures.save_curves(table, folder / "curves.png")
        run.curves_drawn = time.perf_counter()
    if epoch % args.save_every == 0 or last:
        checkpoints.save_torch(run.average.state_dict(),
                               checkpoints.generator_path(folder, args.upscale_factor, epoch))
        checkpoints.save_torch(run.netD.state_dict(),
                               folder / f"netD_epoch_{args.upscale_factor}_{epoch}.pth")
    if validation is not None:
        shown = range(min(8, len(valid_set)))
        _, lr, restored, hr = next(evaluate.batches(valid_set, len(shown), device, shown))
        with torch.no_grad():
            sr = run.average.eval()(lr)
        figures.save_samples(folder / "samples" / f"epoch_{epoch}.png", restored, sr, hr)


def demo(args):
    """The main job in two minutes: synthetic people, random frozen networks, then evaluate.py."""
    folder = Path(args.out_dir, "demo")
    for split, n, seed in (("train", 64, 1), ("valid", 12, 2)):
        for i, portrait in enumerate(synthetic_portraits(n, 128, seed)):
            figures.save_image(Image.fromarray(portrait), folder / "data" / split / f"{i:03}.png")
    say(f"synthetic portraits written to {folder / 'data'}; now a short training:")
    results = folder / "results"
    main(["--train_dir", f"{folder}/data/train", "--valid_dir", f"{folder}/data/valid",
          "--crop_size", "64", "--num_epochs", "6", "--batch_size", "8", "--lazy", "1",
          "--vgg_weights", "random", "--face_weights", "random", "--overwrite",
          "--device", args.device, "--out_dir", str(folder)])
    evaluate.main(["--checkpoint", f"{folder}/netG_epoch_8_6.pth", "--data_dir",
                   f"{folder}/data/valid", "--crop_size", "64", "--face_weights", "random",
                   "--device", args.device, "--out_dir", str(results)])
    say(f"look at {folder}/samples/epoch_6.png (bicubic | SR | HR), {folder}/curves.png and "
        f"{results}/comparison.png\nnext: put photographs into {TRAIN_DIR} and {VALID_DIR} and run "
        "python train_identity.py --crop_size 128 --upscale_factor 8 --num_epochs 100")


def parse(argv=None):
    """Flags -> namespace. A recipe, a config.json or the run to be resumed sets the defaults."""
    parser = argparse.ArgumentParser(
        description="Train the identity-preserving SRGAN of the report.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="example: python train_identity.py --crop_size 128 --upscale_factor 8 "
               "--num_epochs 100")
    add = parser.add_argument_group("data").add_argument
    add("--train_dir", default=TRAIN_DIR, help="folder of training photographs")
    add("--valid_dir", default=VALID_DIR, help="folder of validation photographs")
    add("--crop_size", type=positive, default=128, help="HR size in px")
    add("--upscale_factor", type=int, choices=(2, 4, 8), default=8, help="HR size / LR size")
    add("--crop", choices=("center", "random"), default="center",
        help="of the 256 px frame: the report's text, or its published code")
    add("--no_flip", action="store_true", help="no random horizontal flips")
    add("--cache_gb", type=float, default=4.0,
        help="GiB of decoded pictures to hold in memory; more are decoded by worker processes. As "
             "much again for HR's targets; more are computed in each step")
    add("--allow_overlap", action="store_true",
        help="go on although a photograph is in both folders")

    add = parser.add_argument_group("recipe").add_argument
    add("--recipe", choices=tuple(RECIPES),
        help="report: undo every departure in README's table; None: ours")
    add("--num_epochs", type=positive, default=100, help="epochs in all")
    add("--pretrain_epochs", type=int,
        help="the first of them with the pixel loss alone; None: three quarters")
    add("--batch_size", type=positive, help="images per update, over all processes")
    add("--accumulate", type=positive, default=1,
        help="parts that a batch is computed in, to save memory")
    add("--lr", type=float, help="Adam's learning rate of the generator")
    add("--lr_d", type=float, help="and of the discriminator")
    add("--momentum_d", type=float,
        help="Adam's beta1 of the discriminator; 0.9: plain Adam")
    add("--schedule", choices=("cosine", "constant"), help="of the generator's learning rate")
    add("--gan_loss", choices=("bce", "linear"),
        help="adversarial loss: cross-entropy on logits, or 1 - D(x) + D(G(z))")
    add("--separate_d", action=argparse.BooleanOptionalAction,
        help="real and generated images go through D in passes of their own, not mixed")
    add("--max_ratio", type=float,
        help="the adversarial gradient at SR, before --lazy weighs it, is held to this many times "
             "the pixel loss's; 0: no bound")
    add("--ema", type=float, help="limit of the generator average's decay; 0: no average")
    add("--lazy", type=positive,
        help="adversarial and perceptual terms every k-th step, at k times the weight")
    add("--no_icnr", action="store_true", help="plain initialisation of the sub-pixel blocks")
    add("--no_notch", action="store_true",
        help="let the generator's last convolution draw lines of period two (stripes)")
    add("--start", help="generator checkpoint to start from instead of a random one")
    add("--seed", type=not_negative, default=0, help="of weights, order, flips and crops")

    add = parser.add_argument_group("loss (L_pixel + alpha L_content + beta L_GAN + "
                                    "gamma L_identity)").add_argument
    add("--preset", choices=tuple(PRESETS), help="the report's weightings; None: identity")
    add("--alpha", type=float, help="weight of the content loss")
    add("--beta", type=float, help="weight of the adversarial loss")
    add("--gamma", type=float, help="weight of the identity loss")
    add("--vgg_weights", default="imagenet", help="imagenet, random, or a state dict's path")
    add("--face_weights", default="vggface2",
        help="vggface2, casia-webface, random, or a state dict's path")

    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    add("--precision", choices=("auto", *PRECISIONS),
        help="of the networks' arithmetic in training; auto: bf16 on CUDA (fp16 where that is "
             "missing) and on a CPU with AMX, else fp32")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile both networks")

    add = parser.add_argument_group("run").add_argument
    add("--out_dir", default="epochs", help="folder of the run")
    add("--valid_every", type=positive, default=1, help="epochs between validations")
    add("--valid_batch", type=positive, default=20, help="images per validation batch")
    add("--save_every", type=positive, default=10, help="epochs between netG/netD checkpoints")
    add("--save_minutes", type=float, default=10, help="minutes between writes of last.pt")
    add("--resume", action="store_true", help="go on with the run in --out_dir")
    add("--resume_override", action="store_true", help="... although its flags or data differ")
    add("--overwrite", action="store_true", help="replace the run in --out_dir")
    add("--config", help="config.json of a run to repeat; other flags override it")
    add("--demo", action="store_true",
        help="a two-minute run on synthetic portraits with random frozen networks")

    weights = {name: dict(zip(("alpha", "beta", "gamma"), PRESETS[name])) for name in PRESETS}
    parser.set_defaults(**RECIPES["ours"], **weights["identity"])
    first, _ = parser.parse_known_args(argv)
    stored = {}
    if first.config:
        stored = read_flags(first.config)
        for what, names in (("is left out, being unknown", stored.keys() - vars(first).keys()),
                            ("is not in it and as today", run_flags(first).keys() - stored.keys())):
            if names:
                say(f"{first.config} is another version's: {', '.join(sorted(names))} {what}")
    if first.resume:
        stored = checkpoints.read_run(first.out_dir)["progress"]["flags"]
    stored = {name: value for name, value in stored.items() if hasattr(first, name)}
    for defaults in (stored, RECIPES.get(first.recipe, {}), weights.get(first.preset, {})):
        parser.set_defaults(**defaults)  # a recipe or preset that is given wins over a stored run
    args = parser.parse_args(argv)
    for name, limit in LIMITS.items():
        if not 0 <= getattr(args, name) < limit:
            raise InputError(f"--{name} {getattr(args, name)}: must be from 0 up and under {limit}")
    if args.pretrain_epochs is None:
        # a GAN epoch takes three times as long as a pixel epoch: each phase gets half of the time
        args.pretrain_epochs = args.num_epochs * 3 // 4
    return args


def read_flags(path):
    """The flags in a run's config.json."""
    try:
        return dict(json.loads(Path(path).read_text())["flags"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the config.json of a run ({error})") from None


def main(argv=None):
    keep_freed_memory()
    args = parse(argv)
    if args.demo:
        demo(args)
    else:
        train(args)


if __name__ == "__main__":
    run_script(main)
