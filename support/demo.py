"""`train_identity.py --demo`: drawn people, a look at the shipped generator, a short training."""

from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from support import checkpoints, figures, run_folder
from support.cli import InputError, log
from support.portraits import synthetic_portraits

EPOCHS = 6


def begin(out_dir, device):
    """Draw portraits, restore one with the shipped generator -> the flags of a short training.

    Everything is in the folder demo/ of `out_dir`, so that no run is ever overwritten.
    """
    folder = Path(out_dir, "demo")
    check_replaceable(folder)
    portraits = {folder / "data" / split / f"{i:03}.png": Image.fromarray(array)
                 for split, n, seed in (("train", 64, 1), ("valid", 12, 2))
                 for i, array in enumerate(synthetic_portraits(n, 128, seed))}
    figures.check_ours([*portraits, folder / "restored.png"])
    for path, portrait in portraits.items():
        figures.save_image(portrait, path)
    restore(Image.fromarray(synthetic_portraits(1, 256, 3)[0]), folder / "restored.png")
    log(f"{folder}/restored.png: a drawn face by the shipped generator (bicubic | SR | original)\n"
        f"now a smoke test of the training: from the shipped pixel network, on the drawn people in "
        f"{folder}/data, with random frozen networks:")
    return ["--train_dir", f"{folder}/data/train", "--valid_dir", f"{folder}/data/valid",
            "--out_dir", str(folder), "--overwrite", "--device", device,
            "--start", str(checkpoints.shipped_generator("pixel")),
            "--crop_size", "64", "--num_epochs", str(EPOCHS), "--batch_size", "8", "--lr", "1e-4",
            "--vgg_weights", "random", "--face_weights", "random"]


def check_replaceable(folder):
    """Raise InputError if a folder holds a run that is no demo's."""
    if not run_folder.holds_a_run(folder):
        return
    flags = {}
    with suppress(InputError):
        flags = (run_folder.read_last(folder)["progress"]["flags"]
                 if (folder / "last.pt").exists() else
                 checkpoints.read_config(folder / "config.json")["flags"])
    of_demo = Path(str(flags.get("train_dir"))).parts[-2:] == ("data", "train")
    if not (of_demo and flags.get("face_weights") == "random"):
        raise InputError(f"{folder} holds a run that is no demo's, and is left alone; move it, or "
                         "choose another --out_dir")


@torch.no_grad()
def restore(portrait, path):
    """Write bicubic | SR | original of a PIL picture, reduced 8x, side by side."""
    generator = checkpoints.load_generator(checkpoints.shipped_generator())
    lr = portrait.resize([side // 8 for side in portrait.size], Image.Resampling.BICUBIC)
    bicubic = lr.resize(portrait.size, Image.Resampling.BICUBIC)
    sr = figures.to_image(generator(to_tensor(lr)[None])[0])
    figures.save_image(figures.grid([[bicubic, sr, portrait]], ("bicubic", "SR", "original")), path)


def is_demo(args):
    """Whether the flags are of a demo's training, begun or resumed."""
    of_demo = Path(args.train_dir).resolve() == Path(args.out_dir, "data", "train").resolve()
    return of_demo and args.face_weights == "random"


def evaluation(args):
    """The flags of evaluate.py that measure a demo's generator."""
    return ["--checkpoint", str(checkpoints.generator_path(args.out_dir, 8, args.num_epochs)),
            "--data_dir", args.valid_dir, "--crop_size", str(args.crop_size), "0",
            "--face_weights", "random", "--device", args.device,
            "--out_dir", f"{args.out_dir}/results"]


def end(args):
    """Say what the numbers mean, what to look at and what comes next."""
    log("a smoke test: it shows that everything runs. The training began from the shipped pixel "
        "generator, which already beats bicubic, so most of the gain is that generator's; the "
        "cosine comes from a random network and means nothing\n"
        f"look at {args.out_dir}/restored.png, "
        f"{args.out_dir}/samples/epoch_{args.num_epochs}.png (bicubic | SR | HR), "
        f"{args.out_dir}/curves.png and {args.out_dir}/results/\nnext: make the data set with "
        "prepare_celeba_hq.py, then run\n  python train_identity.py --crop_size 128 "
        "--upscale_factor 8 --num_epochs 100")
