"""How fast, against a straightforward loop and against what this machine can do.

    python benchmark.py                    # under five minutes on two cores
    python benchmark.py --json bench.json

Two training steps alternate, A/B/A/B, each in a process of its own (so that neither has the other's
allocator settings, and each has its own peak of memory): the project's
(`training_step.train_step`) and a reference with the structure of the report's published script,
less one pass of the fakes through the discriminator: an extra generator and discriminator pass per
step, NCHW, fp32. Networks, losses and mathematics are the same; `tests/test_train.py`
compares their losses and updates.
"""

import support  # noqa: F401  first, for Ctrl-C

# isort: split
import multiprocessing
import resource
import signal
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import train_identity
import training_step
from data_utils import CROPS, TrainDatasetFromFolder, ValidDatasetFromFolder, check_room
from loss_identity import adversarial_loss, embed, fake_loss, pixel_loss, real_loss
from model import back_project
from support import checkpoints, figures
from support.cli import InputError, Parser, check_named, positive, run_script
from support.fast_layers import PReLU
from support.machine import DEVICES, PRECISIONS, choose_device, keep_freed_memory, set_up_machine
from support.portraits import synthetic_portraits

# ---------------------------------------------------------------------------------------------
# The reference: what the report's published script does


def plain_generator(netG, lr):
    """The generator as Ledig et al. draw it: shuffle first, then the 9x9 convolution."""
    x = netG.first(lr)
    x = x + netG.skip(netG.residual(x))
    for block in netG.upsample:
        x = F.pixel_shuffle(block(x), 2)
    x = F.conv2d(x, netG.last.weight, netG.last.bias, padding=4).float()
    sr = (torch.tanh(x) + 1) / 2
    return sr if netG.back_projection is None else back_project(sr, lr)


def reference_step(trainer, lr, hr):
    """One update of both networks, every term of L_total on the whole batch at once -> terms."""
    sr = plain_generator(trainer.netG, lr)
    if not trainer.mixed_batches:
        real_logits, fake_logits = trainer.netD(hr), trainer.netD(sr)
    else:
        halves = [trainer.netD(torch.cat(pair)).chunk(2)
                  for pair in zip(hr.chunk(2), sr.chunk(2))]
        real_logits, fake_logits = (torch.cat(logits) for logits in zip(*halves))
    loss_d = (real_loss(trainer.loss.gan_loss, real_logits)
              + fake_loss(trainer.loss.gan_loss, fake_logits))
    trainer.netD.zero_grad()
    loss_d.backward(retain_graph=True)
    gradients_d = [p.grad for p in trainer.netD.parameters()]

    trainer.netG.zero_grad()
    trainer.netD.zero_grad()
    content, identity = trainer.loss.perceptual(sr, trainer.loss.targets(hr))
    terms = {"pixel": pixel_loss(sr, hr), "content": content, "identity": identity,
             "adversarial": adversarial_loss(trainer.loss.gan_loss, fake_logits)}
    trainer.loss.total(terms).backward()
    for parameter, gradient in zip(trainer.netD.parameters(), gradients_d):
        parameter.grad = gradient  # not what the generator's loss left there
    trainer.optimizerD.step()
    trainer.optimizerG.step()

    trainer.netD(plain_generator(trainer.netG, lr)).mean().item()  # the published one's, logged
    return {name: term.item() for name, term in terms.items()} | {"loss_d": loss_d.item()}


def reference_pixel_step(trainer, lr, hr):
    """One update with the pixel loss alone."""
    trainer.netG.zero_grad()
    pixel_loss(plain_generator(trainer.netG, lr), hr).backward()
    trainer.optimizerG.step()


@torch.no_grad()
def reference_evaluation(trainer, dataset, device, with_d):
    """Image after image, HR's embedding anew each time; in training also D's opinion of both."""
    trainer.netG.eval()
    trainer.netD.eval()
    for index in range(len(dataset)):
        lr, _, hr = (x[None].to(device) for x in dataset[index])
        sr = plain_generator(trainer.netG, lr)
        (evaluate.psnr_y(sr, hr).item(), evaluate.ssim(sr, hr).item(),
         evaluate.cosine(embed(trainer.face_network, sr), embed(trainer.face_network, hr)).item())
        if with_d:
            trainer.netD(hr).item(), trainer.netD(sr).item()


# ---------------------------------------------------------------------------------------------
# One process for each of the two


def timed(function, device):
    """Seconds of one call, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def convolution_rate(device, dtype):
    """GFLOP/s of a large 3x3 convolution in this precision, the better of two layouts."""
    best = 0.0
    x = torch.rand(16, 128, 64, 64, device=device).to(dtype)
    weight = torch.rand(128, 128, 3, 3, device=device).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        a, b = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
        F.conv2d(a, b, padding=1)
        seconds = statistics.median(
            timed(lambda a=a, b=b: F.conv2d(a, b, padding=1), device) for _ in range(9))
        best = max(best, 2 * 16 * 64 * 64 * 128 * 128 * 9 / seconds / 1e9)
    return best


@torch.no_grad()
def step_flop(trainer, lr, hr):
    """FLOP of the step's mathematics for one image: (1, 3, h, w), (1, 3, H, W).

    A backward pass to parameters and input costs two forwards, one to the input alone costs one.
    The generator goes forward and back (3); the discriminator forward on real and fake and back to
    its parameters (6), and back to the image, through both if they are mixed (1 or 2); the frozen
    networks forward on HR, for their targets, forward on SR and back to it (3).
    """
    total = 0
    with trainer.autocast():  # which the frozen networks need
        for passes, function in (
                (3, lambda: plain_generator(trainer.netG, lr)),
                (8 if trainer.mixed_batches else 7, lambda: trainer.netD(hr)),
                (3, lambda: trainer.loss.vgg(hr)), (3, lambda: embed(trainer.face_network, hr))):
            with FlopCounterMode(display=False) as counter:
                function()
            total += passes * counter.get_total_flops()
    return total


def project_step(trainer, lr, hr, with_gan, with_perceptual):
    """One update as training takes it. The targets are new: nearly all of its crops come once."""
    targets = None
    if with_perceptual:
        with trainer.autocast():
            targets = training_step.batch_targets(trainer, [None] * len(hr), hr)
    training_step.train_step(trainer, lr, hr, targets, with_gan, with_perceptual)
    training_step.apply_updates(trainer, with_gan)


class Launches(TorchDispatchMode):
    """Counts the operators that work on data, each of which a GPU has to be asked for.

    Views, allocations and marks for the profiler are none. That is a lower bound of the kernels:
    some operators, such as a convolution in another layout, launch more than one.
    """

    FREE = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::as_strided_")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, returns = function.name(), function._schema.returns
        view = any(value.alias_info and not value.alias_info.is_write for value in returns)
        self.count += name.startswith("aten::") and not view and not name.startswith(self.FREE)
        return function(*args, **(kwargs or {}))


def step_launches(trainer, lr, hr):
    """{kind of step: its launches, the updates included}, as a GPU has them.

    What only a CPU does to save memory and time is left out: parts of a batch, upsampling computed
    again, its own PReLU. The networks and optimisers take these steps.
    """
    trainer.netG.train()
    trainer.netD.train()
    launches = {}
    with (mock.patch.multiple(trainer, chunk=len(hr), checkpoint_chunk=None),
          mock.patch.object(PReLU, "forward", nn.PReLU.forward)):
        for kind, gan, perceptual in (("pixel", False, False), ("GAN", True, False),
                                      ("perceptual", False, True)):
            with Launches() as counter:
                project_step(trainer, lr, hr, gan, perceptual)
            launches[kind] = counter.count
    return launches


def step_parts(trainer, lr, hr):
    """{part: function} of the project's step, each a piece that can be timed by itself."""
    sr = trainer.netG(lr).detach()
    gradient = torch.rand_like(sr)

    def of_hr():
        with trainer.autocast():
            return trainer.loss.targets(hr)

    targets = of_hr()

    def generator():
        with trainer.autocast():
            image = trainer.ddpG(lr, trainer.checkpoint_chunk)
        image.backward(gradient)

    def discriminator():
        training_step.discriminator_step(
            trainer, sr.clone().requires_grad_(), hr, {}, 1.0)

    def only(alpha, gamma):
        kept = trainer.loss.alpha, trainer.loss.gamma
        trainer.loss.alpha, trainer.loss.gamma = kept[0] * alpha, kept[1] * gamma
        with trainer.autocast():
            trainer.loss.perceptual_gradient(sr, targets, trainer.chunk)
        trainer.loss.alpha, trainer.loss.gamma = kept

    return {"generator": generator, "discriminator": discriminator, "targets": of_hr,
            "content": lambda: only(1, 0), "identity": lambda: only(0, 1),
            "optimisers": lambda: training_step.apply_updates(trainer, with_gan=True)}


def project_functions(trainer, lr, hr, valid):
    """{question: function} of what the project does in training and in evaluate.py."""
    def validation():
        discriminate = training_step.validation_discriminator(trainer)
        evaluate.validate(trainer.average, discriminate, valid, trainer.face_network,
                          trainer.hr_embedding_cache[0], trainer.device, range(len(valid)),
                          trainer.autocast)

    def evaluation():
        evaluate.measure({"SR": lambda lr, restored, hr: trainer.average.eval()(lr)}, valid,
                         {"cosine": trainer.face_network}, evaluate.BATCH, trainer.device,
                         trainer.autocast)

    return {"step": lambda: project_step(trainer, lr, hr, True, True),
            "pixel step": lambda: project_step(trainer, lr, hr, False, False),
            "validation": validation, "evaluation": evaluation,
            "parts": lambda: step_parts(trainer, lr, hr)}


def reference_functions(trainer, lr, hr, valid):
    """The same questions to the reference."""
    return {"step": lambda: reference_step(trainer, lr, hr),
            "pixel step": lambda: reference_pixel_step(trainer, lr, hr),
            "validation": lambda: reference_evaluation(trainer, valid, trainer.device, with_d=True),
            "evaluation": lambda: reference_evaluation(trainer, valid, trainer.device,
                                                       with_d=False)}


def data_path(folder, flags, device):
    """{crop mode: images per second} from cached photographs to (LR, HR) batches, on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rates = {}
    for mode in CROPS:
        dataset = TrainDatasetFromFolder(folder, flags.crop_size, flags.upscale_factor, mode,
                                         flips=True)
        batches = [[*range(len(dataset))][i:i + 16] for i in range(0, len(dataset), 16)]

        def epochs(dataset=dataset, batches=batches):
            for epoch in range(16):
                dataset.set_epoch(epoch)
                for _ in dataset.batches(batches, device):
                    pass

        epochs()
        seconds = statistics.median(timed(epochs, device) for _ in range(5))
        rates[mode] = 16 * len(dataset) / seconds
    torch.set_num_threads(threads)
    return rates


def worker(role, flags, folder, pipe):
    """Answer the parent's questions with seconds (or other figures) until it closes the pipe."""
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # Ctrl-C, of which the parent speaks
    project = role == "project"
    if project:
        keep_freed_memory()
        device, _, _ = set_up_machine(flags.device)
    else:
        device = choose_device(flags.device)
        flags.precision = "fp32"
    trainer = training_step.build_trainer(flags, device, 1)
    layout = torch.channels_last if project else torch.contiguous_format
    for network in (trainer.netG, trainer.netD, trainer.loss.vgg, trainer.face_network):
        network.to(memory_format=layout)
    hr = torch.stack([torch.from_numpy(p.copy()).permute(2, 0, 1) / 255
                      for p in synthetic_portraits(flags.batch_size, flags.crop_size, 0)])
    lr = F.interpolate(hr, scale_factor=1 / flags.upscale_factor, mode="bicubic",
                       antialias=True, align_corners=False)
    lr, hr = (x.to(device).contiguous(memory_format=layout) for x in (lr, hr))
    valid = ValidDatasetFromFolder(folder, flags.crop_size, flags.upscale_factor)
    functions = (project_functions if project else reference_functions)(
        trainer, lr, hr, valid)

    def in_training(function):
        trainer.netG.train()
        trainer.netD.train()
        return timed(function, device)

    answers = {
        "data path": lambda: data_path(folder, flags, device),
        "convolution": lambda: {precision: convolution_rate(device, PRECISIONS[precision])
                                for precision in {"fp32", flags.precision}},
        "precision": lambda: flags.precision,  # build_trainer has put the machine's for auto
        "flop": lambda: step_flop(trainer, lr[:1], hr[:1]),
        # as many for a few images as for all
        "launches": lambda: step_launches(trainer, lr[:4], hr[:4]),
        "parts": lambda: {name: in_training(part) for name, part in functions["parts"]().items()},
        # ru_maxrss is in bytes on macOS, in KiB elsewhere
        "memory": lambda: (torch.cuda.max_memory_allocated() if device.type == "cuda" else
                           resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                           * (1 if sys.platform == "darwin" else 1024)) / 2 ** 30,
    }
    with suppress(EOFError, BrokenPipeError):
        while question := pipe.recv():
            pipe.send(answers[question]() if question in answers else
                      in_training(functions[question]))


# ---------------------------------------------------------------------------------------------
# The comparison


def ask(pipe, question):
    """The worker's answer to one question. Raises InputError if it has died."""
    try:
        pipe.send(question)
        return pipe.recv()
    except (EOFError, OSError):
        raise InputError("a process of the benchmark died, of what it said above or for want of "
                         "memory: a smaller --batch_size takes less") from None


def compare(project, reference, question, rounds, images):
    """Alternate the two -> (median images per second of the project, of the reference, ratio).

    The ratio is the median over the rounds' own ratios: both halves of a round met the same
    weather on a shared machine.
    """
    pairs = [(ask(project, question), ask(reference, question)) for _ in range(rounds)]
    ours, theirs = (statistics.median(column) for column in zip(*pairs))
    return images / ours, images / theirs, statistics.median(b / a for a, b in pairs)


@contextmanager
def workers(args, folder):
    """Pipes to the processes of project and reference, which work on drawn portraits in `folder`.

    They end with the context, whose end closes the pipes.
    """
    flags = train_identity.parse([
        "--batch_size", str(args.batch_size), "--crop_size", str(args.crop_size), "--device",
        args.device, "--precision", args.precision, "--vgg_weights", "random", "--face_weights",
        "random", "--without", "ratio_bound"])
    for i, portrait in enumerate(synthetic_portraits(args.valid_images, 256, 1)):
        figures.save_image(Image.fromarray(portrait), Path(folder, f"{i:03}.png"))
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for role in ("project", "reference"):
        pipe, end = context.Pipe()
        pipes.append(pipe)
        process = context.Process(target=worker, args=(role, flags, folder, end), daemon=True)
        process.start()
        end.close()
        processes.append(process)
    try:
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(10)


def benchmark(args):
    """Run everything -> {name: figure}."""
    with tempfile.TemporaryDirectory() as folder, workers(args, folder) as (project, reference):
        ours, theirs = {}, {}
        result = {"batch_size": args.batch_size, "device": args.device,
                  "threads": torch.get_num_threads(), "precision": ask(project, "precision")}
        # before the steps: after them it would run in memory that they have used
        result["data_images_per_second"] = ask(project, "data path")
        # the first call of each warms up: primitives are chosen
        compare(project, reference, "step", 1, args.batch_size)
        rounds, rates = [], [ask(project, "convolution")]
        for _ in range(args.rounds):
            rounds.append(compare(project, reference, "step", 1, args.batch_size))
            rates.append(ask(project, "convolution"))
        ours["train"], theirs["train"], result["speedup"] = (
            statistics.median(column) for column in zip(*rounds))
        result["memory_gib"], result["reference_memory_gib"] = (
            ask(pipe, "memory") for pipe in (project, reference))
        for name, question, images in (("pixel", "pixel step", args.batch_size),
                                       ("validation", "validation", args.valid_images),
                                       ("evaluation", "evaluation", args.valid_images)):
            compare(project, reference, question, 1, images)
            ours[name], theirs[name], result[f"{name}_speedup"] = compare(
                project, reference, question, args.rounds, images)
        parts = [ask(project, "parts") for _ in range(2)]
        result["gflop_per_image"] = ask(project, "flop") / 1e9
        result["launches_per_step"] = ask(project, "launches")
    result["parts_seconds_per_image"] = {
        name: statistics.mean(p[name] for p in parts) / args.batch_size for name in parts[0]}
    return result | derived(result, ours, theirs, rates)


def derived(result, ours, theirs, rates):
    """What follows from the measured: {name: figure}."""
    more = {f"{name}_images_per_second": value for name, value in ours.items()}
    more["reference_images_per_second"] = theirs["train"]
    more |= {f"reference_{name}_images_per_second": theirs[name]
             for name in ("pixel", "validation", "evaluation")}
    more["memory_ratio"] = result["memory_gib"] / result["reference_memory_gib"]
    more["gflop_per_second"] = result["gflop_per_image"] * ours["train"]
    for name, precision in (("", "fp32"), ("own_precision_", result["precision"])):
        rate = statistics.median(r[precision] for r in rates)
        more[f"convolution_{name}gflop_per_second"] = rate
        more[f"{name}conv_fraction"] = more["gflop_per_second"] / rate
    return more


def report(result):
    """The figures as a table for people."""
    lines = [f"{'images per second':<26}{'project':>10}{'reference':>11}{'ratio':>8}"]
    for title, name, ratio in (("training step", "train", "speedup"),
                               ("pixel-only step", "pixel", "pixel_speedup"),
                               ("validation in training", "validation", "validation_speedup"),
                               (f"evaluate.py in {result['precision']}", "evaluation",
                                "evaluation_speedup")):
        theirs = result["reference_images_per_second" if name == "train"
                        else f"reference_{name}_images_per_second"]
        lines.append(f"{title:<26}{result[f'{name}_images_per_second']:>10.2f}{theirs:>11.2f}"
                     f"{result[ratio]:>7.2f}x")
    for mode, rate in result["data_images_per_second"].items():
        lines.append(f"{f'data path, {mode} crops':<26}{rate:>10.0f}  (one core)")
    lines.append(f"{'peak memory, GiB':<26}{result['memory_gib']:>10.2f}"
                 f"{result['reference_memory_gib']:>11.2f}{result['memory_ratio']:>7.2f}x")
    lines.append(f"training step: {result['gflop_per_image']:.1f} GFLOP per image, "
                 f"{result['gflop_per_second']:.0f} GFLOP/s; a large convolution reaches "
                 f"{result['convolution_gflop_per_second']:.0f} in fp32: "
                 f"{result['conv_fraction']:.0%}")
    if result["precision"] != "fp32":
        lines.append(f"in {result['precision']} a large convolution reaches "
                     f"{result['convolution_own_precision_gflop_per_second']:.0f}: "
                     f"{result['own_precision_conv_fraction']:.0%}")
    lines.append("launches of a step: " + ", ".join(
        f"{kind} {count}" for kind, count in result["launches_per_step"].items()))
    parts = result["parts_seconds_per_image"]
    lines.append("seconds per image: " + ", ".join(f"{k} {v:.4f}" for k, v in parts.items()))
    return "\n".join(lines)


def main(argv=None):
    parser = Parser(
        description="Times training, validation and data loading, against a reference loop.",
        epilog="example: python benchmark.py --json bench.json")
    parser.add_argument("--batch_size", type=positive, default=32, help="images per step")
    parser.add_argument("--crop_size", type=int, default=128, help="HR size in px")
    parser.add_argument("--rounds", type=positive, default=2, help="times that the two take turns")
    parser.add_argument("--valid_images", type=positive, default=20, help="images of a validation")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where to compute")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto",
                        help="of the project's arithmetic; the reference is fp32")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args(argv)
    args.device = choose_device(args.device).type
    if args.crop_size < 32 or args.crop_size % 8:
        raise InputError(f"--crop_size {args.crop_size}: must be a multiple of 8, 32 or more")
    check_room(args.crop_size, "--crop_size")
    if args.json:
        check_named("--json", args.json, ".json",
                    lambda path: b'"speedup"' in Path(path).read_bytes())
    result = benchmark(args)
    print(report(result))
    if args.json:
        checkpoints.save_json(result, args.json)


if __name__ == "__main__":
    run_script(main)
