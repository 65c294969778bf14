"""Train the identity-preserving SRGAN of the report.

    python train_identity.py                              # the default recipe, 100 epochs
    python train_identity.py --recipe report              # every named departure undone
    python train_identity.py --resume                     # continue the run in epochs/
    torchrun --nproc_per_node=4 train_identity.py         # one machine, four GPUs

One update is in training_step.py, the terms of the loss are in loss_identity.py.
"""

import support  # noqa: F401  first, for Ctrl-C

# isort: split
import math
import time
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
from tqdm import tqdm

import evaluate
from data_utils import CROPS, TRAIN_DIR, VALID_DIR, epoch_order, load_data
from loss_identity import PRESETS
from support import checkpoints, demo, figures, run_folder, tensorboard
from support.cli import InputError, Parser, log, not_negative, positive, run_script, weight
from support.framing import warn_of_framing
from support.machine import DEVICES, PRECISIONS, keep_freed_memory, set_up_machine
from training_step import (
    LAZY_INTERVAL,
    LOGGED,
    apply_updates,
    batch_targets,
    build_trainer,
    check_finite,
    check_weights,
    dead_discriminator,
    set_rates,
    train_step,
    validation_discriminator,
)

# The named departures from the report, and why: `--without NAME` undoes one, `--recipe report`
# all of them. Where its text and code differ, that takes the code's crops and the text's rates.
DEPARTURES = {
    "mixed_crops": "centre, random, rescaled and recoloured crops, for faces in any framing",
    "pretraining": "three quarters of the epochs have the pixel loss alone, then the GAN begins",
    "small_batches": "16 images at a rate of 4e-4 instead of 32 at 1e-4: learns faster",
    "cosine": "the generator's rate falls along a half cosine to a twentieth",
    "flips": "half of the pictures are mirrored, anew in each epoch",
    "icnr": "sub-pixel convolutions start as plain upsampling, without a checkerboard",
    "back_projection": "SR + enlarge(LR - reduce(SR)), so that its reduction is LR",
    "ema": "a moving average of the generator is validated and saved",
    "stripe_filter": "no convolution behind an upsampling draws lines of alternating pixels",
    "cross_entropy": "-log D(G(z)); the gradient of 1 - D(G(z)) vanishes where D is sure",
    "mixed_batches": "D sees real and generated images in one batch, so that BatchNorm does not "
                     "hide what tells them apart",
    "slow_d": "D's Adam has a rate of 2.5e-5 (twice that in its first 64 updates) and beta1 0.5, "
              "so that D does not die",
    "ratio_bound": "the adversarial gradient is at most as long as the pixel loss's (before lazy)",
    "lazy": f"D, and all terms but pixel {LAZY_INTERVAL}-fold, in every {LAZY_INTERVAL}th step",
    "fast_precision": "--precision auto, not fp32",
}

# What undoing a departure does to flags that a person may also give by themselves.
DEFAULTS = {"crop": "mixed", "pretrain_epochs": None, "batch_size": 16, "lr": 4e-4,
            "lr_d": 2.5e-5, "precision": "auto"}
UNDONE = {"mixed_crops": {"crop": "random"}, "pretraining": {"pretrain_epochs": 0},
          "small_batches": {"batch_size": 32, "lr": 1e-4}, "slow_d": {"lr_d": 1e-4},
          "fast_precision": {"precision": "fp32"}}

# The rate that --start takes unless a flag, a config.json or a --recipe says another: at 4e-4 a
# trained generator forgets (results/EXPERIMENTS.md, "Fine-tuning on few photographs").
FINE_TUNING = 2e-5

IN_BAR = {"pixel": "pixel", "score_d": "D(x)", "score_g": "D(G(z))"}  # what a step's bar shows


# ---------------------------------------------------------------------------------------------
# One epoch


def train_epoch(trainer, args, dataset, progress, rank, world, after_update):
    """The steps of one epoch from `progress["step"]` on; fills `progress["history"]`.

    after_update() is called when everything is in a state to be saved. Raises InputError with
    epoch, step and term when a loss is not finite.
    """
    epoch, device = progress["epoch"], trainer.device
    with_gan = epoch > args.pretrain_epochs
    interval = LAZY_INTERVAL if with_gan and "lazy" not in args.without else 1
    batches = epoch_order(len(dataset), args.batch_size, args.seed, epoch, rank, world)
    dataset.set_epoch(epoch)
    if progress["history"] is None:
        progress["history"] = torch.full((len(batches), len(LOGGED)), math.nan, device=device)
    history, first = progress["history"], progress["step"]
    # a look at the losses waits for a GPU; a CPU has them anyway
    look_every = 25 if device.type == "cuda" else 1
    trainer.netG.train()
    trainer.netD.train()
    bar = tqdm(total=len(dataset), initial=first * args.batch_size, unit="image", leave=False,
               desc=f"epoch {epoch}/{args.num_epochs}", disable=True if rank else None)
    shown = {}  # the last values of what fits into 100 columns; not every step has all
    for step, (lr, hr) in enumerate(dataset.batches(batches[first:], device), first):
        # in turn, so that the steps are of equal length; an epoch may be shorter than the interval
        gan = with_gan and trainer.updates % interval == 0
        perceptual = with_gan and trainer.updates % interval == interval // 2
        targets = None
        if perceptual:
            with trainer.autocast():
                targets = batch_targets(trainer, dataset.cache_keys(batches[step]), hr)
        history[step] = train_step(trainer, lr, hr, targets, gan, perceptual, interval)
        apply_updates(trainer, gan)
        progress["step"] = step + 1
        last = step + 1 == len(batches)
        if (step + 1) % look_every == 0 or last:
            check_finite(history[:step + 1], epoch, trainer.scaler.is_enabled())
            if last:
                check_weights(trainer, progress)
            if not bar.disable:
                values = dict(zip(LOGGED, history[step].tolist()))
                shown |= {text: f"{values[name]:.2g}" for name, text in IN_BAR.items()
                          if not math.isnan(values[name])}
                bar.set_postfix(shown, refresh=False)
        bar.update(len(lr) * world)
        after_update()
    bar.close()


def validate_epoch(trainer, gan, dataset, rank, world):
    """Validation images split over the ranks -> (n, 6) arrays of whole frames, of centre crops.

    The columns are those of `evaluate.validate`; D sees crops alone, as in training. The networks
    compute as in training; `evaluate.py` measures in fp32.
    """
    mine = range(rank, len(dataset), world)
    if world > 1:  # BatchNorm's running statistics: those that are saved
        for buffer in trainer.average.buffers():
            dist.broadcast(buffer, 0)
    discriminate = validation_discriminator(trainer) if gan else None
    results = []
    for framing, judge in ((dataset.framed(0), None), (dataset, discriminate)):
        rows = evaluate.validate(trainer.average, judge, framing, trainer.face_network,
                                 trainer.hr_embedding_cache[framing.crop_size], trainer.device,
                                 mine, trainer.autocast).cpu()
        if world > 1:
            parts = [None] * world
            dist.all_gather_object(parts, rows)
            rows = torch.cat(parts)
        results.append(rows[rows[:, 5].argsort()].numpy())
    return results


# ---------------------------------------------------------------------------------------------
# What is said and written of an epoch


def epoch_row(trainer, args, progress, validation):
    """One row of train_results.csv: the report's columns, then the terms and the state of D."""
    history = progress["history"].double()
    history[history.isinf()] = math.nan  # the ratio of a step that a GradScaler skipped
    means = dict(zip(LOGGED, history.nanmean(0).tolist()))
    computed = {name: 0.0 if math.isnan(value) else value for name, value in means.items()}
    gan = progress["epoch"] > args.pretrain_epochs
    frames, crops = validation
    measured = dict(zip(("PSNR", "SSIM", "Cosine"), frames.mean(0).tolist()))
    measured |= dict(zip(("PSNR_crop", "SSIM_crop", "Cosine_crop"), crops.mean(0).tolist()))
    accuracy = ((crops[:, 3] > 0).mean() + (crops[:, 4] < 0).mean()) / 2
    return {"Epoch": progress["epoch"], "Loss_D": means["loss_d"],
            "Loss_G": trainer.loss.total(computed),
            "Score_D": means["score_d"], "Score_G": means["score_g"],
            **measured, "Pixel": means["pixel"], "Content": means["content"],
            "Adversarial": means["adversarial"], "Identity": means["identity"],
            "D_accuracy": float(accuracy) if gan else math.nan, "Gradient_ratio": means["ratio"],
            "D_updates": trainer.scheduleD.last_epoch,
            "Learning_rate": trainer.optimizerG.param_groups[0]["lr"],
            "Phase": "gan" if gan else "pixel", "Seconds": progress["seconds"]}


def summary_line(row, args):
    """One epoch in one line."""
    left = args.num_epochs - row["Epoch"]
    if row["Phase"] == "pixel":  # a step with every term takes ten times as long (benchmark.py)
        interval = 1 if "lazy" in args.without else LAZY_INTERVAL
        left += 9 / interval * max(0, args.num_epochs - args.pretrain_epochs)
    left *= row["Seconds"]
    frames, crops = ("{:.2f} dB, SSIM {:.4f}, cosine {:.4f}".format(
        *(row[name + suffix] for name in ("PSNR", "SSIM", "Cosine"))) for suffix in ("", "_crop"))
    line = (f"epoch {row['Epoch']}/{args.num_epochs} ({row['Phase']}): whole frames {frames}; "
            f"centre crops {crops}; pixel {row['Pixel']:.5f}")
    if row["Phase"] == "gan" and math.isnan(row["Score_D"]):
        line += ", no GAN step fell into this epoch of few images"
    elif row["Phase"] == "gan":
        line += (f", D(x) {row['Score_D']:.3f}, D(G(z)) {row['Score_G']:.3f}, "
                 f"D accuracy {row['D_accuracy']:.2f}, gradient ratio {row['Gradient_ratio']:.2g}")
    line += f"; {row['Seconds']:.0f} s"
    if left:
        line += f", about {f'{left:.0f} s' if left < 120 else f'{left / 60:.0f} min'} left"
    return line


def write_epoch(trainer, args, rows, config, validation_set):
    """What a person looks at after an epoch: CSV, curves, samples, checkpoints, config."""
    folder, epoch, table = Path(args.out_dir), rows[-1]["Epoch"], pd.DataFrame(rows)
    last = epoch == args.num_epochs
    checkpoints.save_csv(table, folder / "train_results.csv")
    config["wall_seconds"] = float(table["Seconds"].sum())
    checkpoints.save_json(config, folder / "config.json")
    if last or time.perf_counter() - trainer.curves_drawn > 60:  # matplotlib takes a second
        figures.save_curves(table, folder / "curves.png")
        trainer.curves_drawn = time.perf_counter()
    if epoch % args.save_every == 0 or last:
        checkpoints.save_torch(trainer.average.state_dict(),
                               checkpoints.generator_path(folder, args.upscale_factor, epoch))
        checkpoints.save_torch(trainer.netD.state_dict(),
                               folder / f"netD_epoch_{args.upscale_factor}_{epoch}.pth")
    images = [evaluate.restore(trainer.average, dataset, index, trainer.device)
              for index in range(min(4, len(validation_set)))
              for dataset in (validation_set.framed(0), validation_set)]
    figures.save_samples(folder / "samples" / f"epoch_{epoch}.png", images)
    if args.tensorboard:
        tensorboard.write_epoch(folder, rows[-1])


# ---------------------------------------------------------------------------------------------
# The run


def train(args):
    """The whole run: set up, then epoch after epoch, then what there is to look at."""
    device, rank, world = set_up_machine(args.device)
    if args.batch_size % world:
        raise InputError(f"--batch_size {args.batch_size} does not divide by {world} processes")
    if args.tensorboard:
        tensorboard.summary_writer()  # missing: said now, not after an epoch
    train_set, valid_set = load_data(args)
    if rank == 0:
        warn_of_framing(valid_set)
    state = run_folder.open_run(args) if rank == 0 or args.resume else None
    steps_per_epoch = len(epoch_order(len(train_set), args.batch_size, args.seed, 1, rank, world))
    trainer = build_trainer(args, device, steps_per_epoch, world)
    parts = {name: getattr(trainer, name) for name in (
        "netG", "netD", "optimizerG", "optimizerD", "scheduleG", "scheduleD", "scaler")}
    if "ema" not in args.without:
        parts["average"] = trainer.average
    progress = run_folder.new_progress(args, train_set, valid_set)
    if state:
        progress = run_folder.resume(state, args, progress, trainer, parts,
                                     (steps_per_epoch, len(LOGGED)))
        set_rates(trainer, args)
    config = run_folder.describe(args, trainer, progress, train_set, valid_set, device, world)
    run_folder.say_settings(args, config)

    def check():
        if progress["step"]:  # between two epochs nothing is unchecked
            check_finite(progress["history"][:progress["step"]], progress["epoch"],
                         trainer.scaler.is_enabled())
            check_weights(trainer, progress)

    saver = run_folder.Saver(args, parts, progress, trainer, rank, world, check)
    if progress["epoch"] > args.num_epochs:
        log(f"{args.out_dir}: {progress['epoch'] - 1} epochs are done; give a larger "
            "--num_epochs to continue")
    elif rank == 0 and not saver.replaces:
        checkpoints.save_json(config, Path(args.out_dir, "config.json"))
    while progress["epoch"] <= args.num_epochs:
        run_epoch(trainer, args, train_set, valid_set, progress, config, saver)
        if progress["epoch"] > args.num_epochs:
            log(f"done: {args.out_dir}/ holds netG_epoch_{args.upscale_factor}_"
                f"{args.num_epochs}.pth, train_results.csv, curves.png and samples/\nnext:\n"
                + run_folder.next_commands(args))
    if world > 1:
        dist.destroy_process_group()


def run_epoch(trainer, args, train_set, valid_set, progress, config, saver):
    """Train, validate, note and save one epoch."""
    rank, world = saver.rank, saver.world
    train_epoch(trainer, args, train_set, progress, rank, world, saver.after_update)
    if saver.replaces:
        saver.save()  # before any other file: an old run goes when the new one can be resumed
    gan = progress["epoch"] > args.pretrain_epochs
    validation = validate_epoch(trainer, gan, valid_set, rank, world)
    if world > 1:
        run_folder.average_history(progress)
    saver.count_seconds()
    row = epoch_row(trainer, args, progress, validation)
    progress["rows"].append(row)
    progress.update(epoch=progress["epoch"] + 1, step=0, history=None, seconds=0.0)
    if rank == 0:
        log(summary_line(row, args))
        if row["PSNR"] < 12:
            log(f"warning: epoch {row['Epoch']}: {row['PSNR']:.2f} dB is no picture of a face; "
                "look at samples/, then try a lower --lr")
        warning = dead_discriminator(row, args)
        if warning and not any(dead_discriminator(r, args) for r in progress["rows"][-2:-1]):
            log(warning)
        write_epoch(trainer, args, progress["rows"], config, valid_set)
    saver.save()
    saver.after_update()


# ---------------------------------------------------------------------------------------------
# The command line


def add_flags(parser):
    """Every flag, in the order in which a person needs them."""
    add = parser.add_argument_group("data").add_argument
    add("--train_dir", default=TRAIN_DIR, help="folder of training photographs")
    add("--valid_dir", default=VALID_DIR, help="folder of validation photographs")
    add("--out_dir", default="epochs", help="folder of the run")

    add = parser.add_argument_group("loss (L_pixel + alpha L_content + beta L_GAN + "
                                    "gamma L_identity)").add_argument
    add("--preset", choices=tuple(PRESETS), help="the report's weightings (default: identity)")
    add("--alpha", type=weight, help="weight of the content loss")
    add("--beta", type=weight, help="weight of the adversarial loss")
    add("--gamma", type=weight, help="weight of the identity loss")

    add = parser.add_argument_group("recipe").add_argument
    add("--num_epochs", type=positive, default=100, help="epochs in all")
    add("--recipe", choices=("report",), help="--without everything listed below")
    add("--without", nargs="*", choices=tuple(DEPARTURES), metavar="NAME",
        help="undo departures from the report, which are listed below")
    add("--start", help="generator checkpoint to fine-tune, instead of a random one; "
                        f"then --lr is {FINE_TUNING:g} unless a flag says another")
    add("--pretrain_epochs", type=not_negative,
        help="first epochs with the pixel loss alone (default: three quarters of --num_epochs)")
    add("--batch_size", type=positive, help="images per update, over all processes")
    add("--lr", type=weight, help="Adam's learning rate of the generator")
    add("--lr_d", type=weight,
        help="and of the discriminator, doubled for its first 64 updates unless --without slow_d")
    add("--crop_size", type=positive, default=128, help="HR size in px")
    add("--upscale_factor", type=int, choices=(2, 4, 8), default=8, help="HR size / LR size")
    add("--crop", choices=CROPS,
        help="where to crop the 256 px frame: center (the report's text), random (its published "
             "code), or mixed (both, and rescaled and recoloured crops)")
    add("--seed", type=not_negative, default=0, help="seed of weights, order, flips and crops")

    add = parser.add_argument_group("run").add_argument
    add("--resume", action="store_true",
        help="continue the run in --out_dir; flags given beside it hold from there on")
    add("--overwrite", action="store_true", help="replace the run in --out_dir")
    add("--config", help="config.json of a run to repeat; other flags override it")
    add("--save_every", type=positive, default=10, help="epochs between netG/netD checkpoints")
    add("--tensorboard", action="store_true",
        help="also write the rows and samples for TensorBoard (the package tensorboard)")
    add("--demo", action="store_true",
        help="a two-minute run on synthetic portraits with random frozen networks")

    add = parser.add_argument_group("machine and frozen networks").add_argument
    add("--device", choices=DEVICES, default="auto", help="where to compute")
    add("--precision", choices=("auto", *PRECISIONS),
        help="arithmetic of the networks; auto: bf16 on CUDA (fp16 where that is missing) and on "
             "a CPU that is faster with it, else fp32")
    add("--cache_gb", type=weight, default=4.0,
        help="GiB of decoded pictures to hold for each data set; a larger one is read anew")
    add("--vgg_weights", default="imagenet", help="imagenet, random, or a state dict's path")
    add("--face_weights", default="vggface2", help="vggface2, casia-webface, random, or a path")
    add("--allow_overlap", action="store_true", help="accept a photograph in both folders")


def parse(argv=None):
    """Flags -> namespace. A recipe, a config.json or the run to be resumed sets the defaults."""
    listed = "\n".join(f"  {name:<16} {why}" for name, why in DEPARTURES.items())
    parser = Parser(
        description="Train the identity-preserving SRGAN of the report. The defaults are our "
                    "recipe; what\neach part of it brings is in results/EXPERIMENTS.md.",
        epilog=f"departures from the report, undone by --without NAME ...:\n{listed}\n\n"
               "example: python train_identity.py --crop_size 128 --upscale_factor 8 "
               "--num_epochs 100")
    add_flags(parser)
    weights = {name: dict(zip(("alpha", "beta", "gamma"), PRESETS[name])) for name in PRESETS}
    parser.set_defaults(**DEFAULTS, **weights["identity"])
    first, _ = parser.parse_known_args(argv)
    stored = run_folder.load_flags(parser, first)
    parser.set_defaults(**stored)
    if first.start and not (first.resume or first.config):
        parser.set_defaults(lr=FINE_TUNING)
    # what is given now wins over what a stored run had
    without = [*DEPARTURES] if first.recipe else first.without
    if without is not None:
        parser.set_defaults(**undo(without, [] if first.recipe else stored["without"]))
    parser.set_defaults(**weights.get(first.preset, {}))
    args = parser.parse_args(argv)
    if without is not None:
        args.without = [name for name in DEPARTURES if name in without]
    if args.pretrain_epochs is None:
        # a GAN epoch takes three times as long as a pixel epoch: each phase gets half of the time
        args.pretrain_epochs = args.num_epochs * 3 // 4
    return args


def undo(without, before):
    """Numbers that go with the departures `without` which differ from those in `before`."""
    numbers = {}
    for name, undone in UNDONE.items():
        if (name in without) != (name in before):
            numbers |= undone if name in without else {key: DEFAULTS[key] for key in undone}
    return numbers


def main(argv=None):
    keep_freed_memory()
    args = parse(argv)
    if args.demo:
        if args != parse(["--demo", "--out_dir", args.out_dir, "--device", args.device]):
            raise InputError("--demo: takes --out_dir and --device alone; leave out the others")
        args = parse(demo.begin(args.out_dir, args.device))
    with run_folder.lock(args), run_folder.restored_signals():
        train(args)
    if demo.is_demo(args):  # one that was interrupted and is resumed ends like any other
        evaluate.main(demo.evaluation(args))
        demo.end(args)


if __name__ == "__main__":
    run_script(main)
