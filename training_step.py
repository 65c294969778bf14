"""One update of both networks: the report's L_total, differentiated at SR, term by term.

`train_step` fills the gradients, `discriminator_step` is its part against D, `apply_updates` moves
the weights. `build_trainer` makes the networks, losses and optimisers that they work on.
"""

import math
from collections import defaultdict
from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from loss_identity import (
    GeneratorLoss,
    adversarial_loss,
    cast_once,
    fake_loss,
    load_face_network,
    load_vgg,
    pixel_loss,
    real_loss,
)
from model import Discriminator, Generator, probability, remove_stripes_
from support import checkpoints
from support.cli import InputError, log
from support.machine import PRECISIONS, autocast, fast_precision

# What each step logs, in this order; nan where a step left a term out.
LOGGED = ("pixel", "content", "adversarial", "identity", "loss_d", "score_d", "score_g", "ratio")

LAZY_INTERVAL = 4  # steps between two with the adversarial or the perceptual terms
MATURE_D = 100     # updates of D before it may be called dead: a new one knows nothing yet
MAX_RATIO = 1.0    # of the adversarial gradient at SR to the pixel loss's, averaged over steps
EMA_DECAY = 0.999  # limit of the generator average's decay
BETA1_D = 0.5      # of D's Adam; plain Adam has 0.9
WARM_UP_D = 64     # updates of D at twice its rate: it begins new against a trained generator

NOT_FINITE = ("stopped; last.pt, if there is one, holds the last good state. --resume with a lower "
              "learning rate (--lr, --lr_d) or a lower weight of that term")


def train_step(trainer, lr, hr, targets, with_gan, with_perceptual, interval_weight=1):
    """Gradients of the generator and, `with_gan`, of the discriminator, on one batch.

    L_total is differentiated at SR, term by term, and the sum goes back through the generator
    once. That frees each frozen network's activations before the next term, gives the size of each
    gradient for nothing, and lets one pass of D over the fakes serve both losses: D's
    update takes the gradient to its parameters, the generator's the one to the images.

    trainer: see `build_trainer`; lr, hr: (N, 3, h, w), (N, 3, H, W) in [0, 1]; targets:
    `trainer.loss.targets(hr)`; interval_weight: weight of the terms that only every
    LAZY_INTERVAL-th step computes. -> the LOGGED values, whose ratio is that of the adversarial to
    the pixel gradient, before trainer.max_ratio bounds it.
    """
    loss, logged = trainer.loss, {}
    scale = 1.0
    if trainer.scaler.is_enabled():  # get_scale() would wait for a GPU
        scale = trainer.scaler.scale(torch.ones((), device=lr.device))
    with trainer.autocast():
        # on a CPU D's activations and the generator's are not held together (`build_trainer`)
        sr_graph = trainer.ddpG(lr, trainer.checkpoint_chunk if with_gan else None)
    sr = sr_graph.detach().requires_grad_()

    logged["pixel"] = pixel_loss(sr, hr)
    gradient, = torch.autograd.grad(logged["pixel"], sr)

    if with_gan:
        grad_sr = discriminator_step(trainer, sr, hr, logged, scale)
        squares = torch.stack([grad_sr.norm().square(), gradient.norm().square()])
        if dist.is_initialized():  # one bound for all processes
            dist.all_reduce(squares)
        logged["ratio"] = (squares[0] / squares[1].clamp_min(1e-24)).sqrt()
        if trainer.max_ratio:  # a D that wins would drown the other terms
            grad_sr *= (trainer.max_ratio / logged["ratio"]).clamp_max(1)
        gradient.add_(grad_sr, alpha=interval_weight)

    if with_perceptual and (loss.alpha or loss.gamma):
        with trainer.autocast():
            grad_sr, content, identity = loss.perceptual_gradient(
                sr.detach(), targets, trainer.chunk, scale)
        if loss.alpha:
            logged["content"] = content
        if loss.gamma:
            logged["identity"] = identity
        gradient.add_(grad_sr, alpha=interval_weight)

    sr_graph.backward(trainer.scaler.scale(gradient))
    # nan marks a term that this step left out, so a term that has become nan is noted as inf
    left_out = sr.new_full((), math.nan)
    return torch.stack([
        logged[name].detach().float().nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf)
        if name in logged else left_out for name in LOGGED])


def discriminator_step(trainer, sr, hr, logged, scale):
    """Backward pass of D's loss -> the gradient of beta L_GAN at `sr`, a leaf.

    Adds the gradient of D's loss to D's parameters, and the terms to `logged`. One pass of D over
    the fakes serves both losses (see `discriminator_batches`). scale: a GradScaler's, which D's
    gradients keep and the result does not.
    """
    kind, logits, gradients = trainer.loss.gan_loss, [], []
    several_processes = trainer.ddpD is not trainer.netD
    parameters = list(trainer.netD.parameters())
    passes = discriminator_batches(trainer.mixed_batches, hr, sr)
    for number, (real, fake) in enumerate(passes, 1):
        # several processes exchange the gradients once, with those of the last pass
        wait = several_processes and number < len(passes)
        with trainer.ddpD.no_sync() if wait else nullcontext():
            with trainer.autocast():
                real_logits, fake_logits = trainer.ddpD(torch.cat([real, fake])).split(
                    [len(real), len(fake)])
            loss_d = 0.0
            if len(real):
                loss_d += real_loss(kind, real_logits) * (scale * (len(real) / len(hr)))
            if len(fake):
                share = scale * (len(fake) / len(sr))
                gradients += torch.autograd.grad(adversarial_loss(kind, fake_logits) * share, fake,
                                                 retain_graph=True)
                loss_d += fake_loss(kind, fake_logits) * share
            loss_d.backward(inputs=parameters)
        logits.append((real_logits.detach().float(), fake_logits.detach().float()))
    real_logits, fake_logits = map(torch.cat, zip(*logits))
    logged |= {"adversarial": adversarial_loss(kind, fake_logits),
               "loss_d": real_loss(kind, real_logits) + fake_loss(kind, fake_logits),
               "score_d": probability(real_logits).mean(),
               "score_g": probability(fake_logits).mean()}
    return torch.cat(gradients) * (trainer.loss.beta / scale)


def discriminator_batches(mixed, hr, sr):
    """[(real, fake)]: the images of each of D's two passes.

    Mixed, each pass has half of the real and half of the fake images; a batch of one has one pass.
    Otherwise either kind has a pass of its own, as in the published code: BatchNorm then
    standardises each kind with its own statistics, which takes away most of what tells the two
    apart, and D hardly learns (results/EXPERIMENTS.md, "Why the discriminator dies").
    """
    return list(zip(hr.chunk(2), sr.chunk(2))) if mixed else [(hr, sr[:0]), (hr[:0], sr)]


def apply_updates(trainer, with_gan):
    """Step the optimisers on the gradients, then the schedule and the average."""
    for optimizer in (trainer.optimizerG, trainer.optimizerD)[:2 if with_gan else 1]:
        trainer.scaler.step(optimizer)
        optimizer.zero_grad()
    if with_gan:
        trainer.scheduleD.step()
    if trainer.stripe_filter:
        remove_stripes(trainer.netG)
    trainer.scaler.update()
    trainer.scheduleG.step()
    trainer.updates += 1
    if trainer.average is not trainer.netG:
        update_average(trainer.average, trainer.netG, trainer.updates, EMA_DECAY)


def remove_stripes(netG):
    """`remove_stripes_` in every convolution that reads an enlarged map.

    Lines that alternate there have periods of 2, 4 and 8 pixels in SR. LR's own are no artefact.
    """
    for convolution in (netG.last, *(block.conv for block in netG.upsample[1:])):
        remove_stripes_(convolution.weight)


@torch.no_grad()
def update_average(average, netG, updates, limit):
    """Exponential moving average of weights and BatchNorm statistics, in place.

    The decay ramps up as (1 + t) / (10 + t) towards `limit`: a fixed one would hold on to the
    random start for thousands of steps.
    """
    decay = min(limit, (1 + updates) / (10 + updates))
    pairs = list(zip(average.state_dict().values(), netG.state_dict().values()))
    # a GPU gets one kernel for all tensors of a kind, not one for each
    means, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()))
    torch._foreach_lerp_(means, values, 1 - decay)
    counts, values = zip(*(pair for pair in pairs if not pair[0].is_floating_point()))
    torch._foreach_copy_(counts, values)


def batch_targets(trainer, keys, hr):
    """`loss.targets(hr)`; those of crops that come again are kept in `trainer.target_cache`.

    keys: for each image what it is found under again, or None. What is kept is computed one image
    at a time, so that it does not depend on the batch that it was first met in and a resumed run
    finds the same bits.
    """
    cache, new = trainer.target_cache, [i for i, key in enumerate(keys) if key is None]
    targets = {}
    if new:  # put together of slices: a list of indices would make a GPU wait
        images = torch.cat([hr[i:i + 1] for i in new])
        columns = trainer.loss.targets(images)
        targets = {i: tuple(None if column is None else column[k:k + 1] for column in columns)
                   for k, i in enumerate(new)}
    for i, key in enumerate(keys):
        if key is not None:
            if key not in cache:
                cache[key] = trainer.loss.targets(hr[i:i + 1])
            targets[i] = cache[key]
    return [None if column[0] is None else torch.cat(column)
            for column in zip(*(targets[i] for i in range(len(keys))))]


def validation_discriminator(trainer):
    """function (hr, sr) -> [logits of HR, of SR], with D as its own steps see the images.

    That is in passes with the batch's statistics: BatchNorm's running ones lag behind, and with
    them a D that tells most pairs apart may call all images the same. A copy, so that looking
    changes nothing; a plain one, since ranks with unequal numbers of batches must not wait for
    each other. The logits are fp32, whatever the precision of the passes.
    """
    with torch.device("meta"):  # no start values to be drawn and thrown away
        netD = Discriminator()
    netD.to_empty(device=trainer.device).to(memory_format=torch.channels_last).train()
    netD.load_state_dict(trainer.netD.state_dict())

    def discriminate(hr, sr):
        with trainer.autocast():
            logits = [netD(torch.cat([real, fake])).float().split([len(real), len(fake)])
                      for real, fake in discriminator_batches(trainer.mixed_batches, hr, sr)]
        return [torch.cat(kind) for kind in zip(*logits)]

    return discriminate


def dead_discriminator(row, args):
    """A warning when D taught nothing for a whole epoch, else None.

    Either it could not tell real from generated, or its gradient did not arrive.
    """
    gap, ratio = row["Score_D"] - row["Score_G"], row["Gradient_ratio"]
    undone = [name for name in ("cross_entropy", "mixed_batches", "slow_d") if name in args.without]
    if gap >= 0.01 and ratio < 1e-4:  # D tells them apart, but its gradient at SR vanishes
        advice = ["leaving cross_entropy out of --without"] * ("cross_entropy" in undone)
        advice += ["a larger --beta"] + ["a lower --lr_d"] * (gap > 0.9)
        return (f"warning: epoch {row['Epoch']}: the discriminator's gradient is negligible: "
                f"D(x) - D(G(z)) is {gap:.4f}, but at SR it is {ratio:.1e} of the pixel gradient, "
                f"so the adversarial term teaches nothing. Try {', or '.join(advice)}")
    if gap < 0.01 and row["D_updates"] >= MATURE_D:
        advice = [f"leaving {' and '.join(undone)} out of --without"] * bool(undone)
        advice += ["a higher --lr_d", "more steps: a larger --num_epochs"]
        return (f"warning: epoch {row['Epoch']}: the discriminator is dead: D(x) - D(G(z)) is "
                f"{gap:.4f} after {row['D_updates']:.0f} updates of D. It cannot tell real from "
                f"generated images, so the adversarial term teaches nothing, however large its "
                f"gradient is (at SR {ratio:.1e} of the pixel gradient). "
                f"Try {', or '.join(advice)}")
    return None


def check_finite(history, epoch, scaled=False):
    """Raise InputError naming epoch, step and term of the first loss that is not finite.

    scaled: a GradScaler skips a step whose gradients overflowed, so the ratio may be inf.
    """
    losses = history[:, :LOGGED.index("ratio")] if scaled else history
    bad = losses.isinf().nonzero().tolist()
    if bad:
        step, term = bad[0]
        raise InputError(f"epoch {epoch}, step {step + 1}: {LOGGED[term]} is not finite; "
                         f"{NOT_FINITE}")


def check_weights(trainer, progress):
    """Raise InputError if the last update made a weight infinite or nan: it must not be saved.

    BatchNorm's statistics count as weights.
    """
    for name, network in (("generator", trainer.netG), ("discriminator", trainer.netD),
                          ("generator's average", trainer.average)):
        if not checkpoints.all_finite(network):
            raise InputError(f"epoch {progress['epoch']}, step {progress['step']}: the update made "
                             f"weights of the {name} infinite or NaN; {NOT_FINITE}")


# ---------------------------------------------------------------------------------------------
# Set-up


def build_trainer(args, device, steps_per_epoch, world=1):
    """Networks, losses, optimisers and schedules of a run, in one namespace.

    args: the flags of train_identity.py. `trainer.average` is netG itself without an average.
    """
    torch.manual_seed(args.seed)
    trainer = SimpleNamespace(device=device, updates=0)
    build_networks(trainer, args, device, world)
    trainer.face_network = load_face_network(args.face_weights).to(device)
    vgg = load_vgg(args.vgg_weights).to(device) if args.alpha else None
    trainer.loss = GeneratorLoss(args.alpha, args.beta, args.gamma, vgg, trainer.face_network,
                                 "linear" if "cross_entropy" in args.without else "bce")
    trainer.mixed_batches = "mixed_batches" not in args.without
    trainer.max_ratio = 0 if "ratio_bound" in args.without else MAX_RATIO
    build_optimizers(trainer, args, steps_per_epoch)

    if args.precision == "auto":
        args.precision = fast_precision(device)  # noted with the flags: part of what the run is
    trainer.autocast = autocast(device, args.precision)
    cast_once(trainer.face_network, PRECISIONS[args.precision])
    if args.alpha:
        cast_once(vgg, PRECISIONS[args.precision])
    trainer.scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    trainer.scaler.scale(torch.zeros((), device=device))  # makes its state: a damaged one shows
    # A CPU is as fast with four images as with all, in less memory; a GPU wants the whole batch.
    trainer.chunk = 4 if device.type == "cpu" else args.batch_size
    trainer.checkpoint_chunk = 4 if device.type == "cpu" else None
    trainer.curves_drawn = -math.inf  # seconds on the clock
    trainer.target_cache = {}        # HR's VGG features and embeddings, of the training images
    trainer.hr_embedding_cache = defaultdict(dict)  # by crop size, of the validation images
    return trainer


def build_networks(trainer, args, device, world):
    """G, D, the average of G, and what several processes wrap around them."""
    trainer.netG = Generator(args.upscale_factor, "icnr" not in args.without,
                             "back_projection" not in args.without)
    trainer.netD = Discriminator()
    if args.start and not args.resume:  # last.pt holds a resumed run's weights
        start = checkpoints.load_generator(args.start)
        if start.scale_factor != args.upscale_factor:
            raise InputError(f"{args.start}: is a {start.scale_factor}x generator; give "
                             f"--upscale_factor {start.scale_factor} or another --start")
        weights = start.state_dict()
        weights.pop("back_projection", None)  # this run's flags say whether there is one
        trainer.netG.load_state_dict(weights, strict=False)
    trainer.stripe_filter = "stripe_filter" not in args.without
    if trainer.stripe_filter:
        remove_stripes(trainer.netG)
    if world > 1 and device.type == "cuda":
        trainer.netG = torch.nn.SyncBatchNorm.convert_sync_batchnorm(trainer.netG)
        trainer.netD = torch.nn.SyncBatchNorm.convert_sync_batchnorm(trainer.netD)
    for network in (trainer.netG, trainer.netD):
        network.to(device, memory_format=torch.channels_last)
    trainer.average = trainer.netG if "ema" in args.without else deepcopy(trainer.netG)
    trainer.ddpG, trainer.ddpD = trainer.netG, trainer.netD
    if world > 1:
        # Each rank keeps its own BatchNorm statistics in a step; rank 0's are saved.
        trainer.ddpG = DistributedDataParallel(trainer.netG, broadcast_buffers=False)
        trainer.ddpD = DistributedDataParallel(trainer.netD, broadcast_buffers=False)


def build_optimizers(trainer, args, steps_per_epoch):
    """Adam for either network; the generator's rate falls along a half cosine to a twentieth.

    D's is doubled for its first WARM_UP_D updates.
    """
    trainer.optimizerG = torch.optim.Adam(trainer.netG.parameters(), lr=args.lr, fused=True)
    trainer.optimizerD = torch.optim.Adam(trainer.netD.parameters(), lr=args.lr_d, fused=True)
    total = args.num_epochs * steps_per_epoch

    def factor(step):
        if "cosine" in args.without:
            return 1.0
        return 0.05 + 0.95 * (1 + math.cos(math.pi * min(1, step / total))) / 2

    def factor_d(step):
        return 1.0 if "slow_d" in args.without or step >= WARM_UP_D else 2.0

    trainer.scheduleG = torch.optim.lr_scheduler.LambdaLR(trainer.optimizerG, factor)
    trainer.scheduleD = torch.optim.lr_scheduler.LambdaLR(trainer.optimizerD, factor_d)
    set_rates(trainer, args)  # and D's beta1


def set_rates(trainer, args):
    """Put the flags' learning rates where a restored optimiser or schedule had the saved run's.

    Says so where the generator's goes up: a larger --num_epochs stretches the half cosine.
    """
    before, base = (trainer.optimizerG.param_groups[0][name] for name in ("lr", "initial_lr"))
    for optimizer, schedule, rate in ((trainer.optimizerG, trainer.scheduleG, args.lr),
                                      (trainer.optimizerD, trainer.scheduleD, args.lr_d)):
        schedule.base_lrs = [rate]
        factor = schedule.lr_lambdas[0](schedule.last_epoch)
        for group in optimizer.param_groups:
            group.update(initial_lr=rate, lr=rate * factor)
    rate = trainer.optimizerG.param_groups[0]["lr"]
    if rate > 1.01 * before and args.lr == base:
        why = (f"is stretched to {args.num_epochs} epochs" if "cosine" not in args.without else
               "no longer holds")
        without = " ".join(dict.fromkeys([*args.without, "cosine"]))
        log(f"the generator's rate goes up from {before:.2g} to {rate:.2g}: the half cosine {why}; "
            f"--lr {before:.2g} --without {without} keeps it at {before:.2g}")
    beta1 = 0.9 if "slow_d" in args.without else BETA1_D
    for group in trainer.optimizerD.param_groups:
        group["betas"] = beta1, 0.999
