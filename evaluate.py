"""The report's "Evaluation Metrics" on checkpoints: PSNR-Y, SSIM, cosine of face embeddings.

    python evaluate.py                                    # the shipped generator
    python evaluate.py --checkpoint epochs/netG_epoch_8_100.pth --data_dir data/DIV2K_valid_HR

Beyond the report: recognition (is the restored face still found among all faces?), judges that
training never saw, 95 % bootstrap intervals, and paired differences between models.
"""

import support  # noqa: F401  first, for Ctrl-C

# isort: split
import math
import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate
from tqdm import tqdm

from data_utils import (
    VALID_DIR,
    ValidDatasetFromFolder,
    check_room,
    list_images,
    read_image,
    to_tensor,
    valid_crop_size,
)
from loss_identity import embed, load_face_network
from support import checkpoints, export, figures, report
from support.cli import (
    InputError,
    Parser,
    check_named,
    check_out_dir,
    not_negative,
    positive,
    run_script,
    scale,
    weight,
)
from support.figures import save_image, to_image
from support.machine import DEVICES, PRECISIONS, autocast, choose_device, fast_precision
from support.tables import (
    differences,
    is_distance,
    left_out,
    summarise,
    write_people,
    write_tables,
)
from support.torchscript import load_script
from support.verification import pair_rates, read_pairs, recognition, similarity

BATCH = 20  # images at a time


# ---------------------------------------------------------------------------------------------
# The metrics


def luma(images):
    """Y of RGB: (N, 3, H, W) in [0, 1] -> (N, H, W); ITU-R BT.601, full range."""
    red, green, blue = images.float().unbind(1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def psnr_y(sr, hr):
    """PSNR in dB on Y, peak 1, one value per image: (N, 3, H, W) in [0, 1] twice -> (N,)."""
    return -10 * torch.log10((luma(sr) - luma(hr)).square().mean((1, 2)))


def ssim(sr, hr):
    """Mean SSIM per image (Wang et al. 2004): RGB, 11x11 Gaussian, sigma 1.5, zeros beyond borders.

    pytorch-ssim's, in float64 on any device: a variance is a small difference of two means, of
    which TF32 would keep 10 bits. (N, 3, H, W) in [0, 1] twice -> (N,).
    """
    x, y = (images.double().contiguous() for images in (sr, hr))
    rows, columns = (gaussian_matrix(side, x.device) for side in x.shape[2:])

    def blur(images):
        return rows @ images @ columns

    mean_x, mean_y, c1, c2 = blur(x), blur(y), 0.01 ** 2, 0.03 ** 2
    variances = blur(x * x) - mean_x ** 2 + blur(y * y) - mean_y ** 2
    covariance = blur(x * y) - mean_x * mean_y
    return ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)
            / ((mean_x ** 2 + mean_y ** 2 + c1) * (variances + c2))).mean((1, 2, 3))


def gaussian_matrix(n, device):
    """(n, n), float64: its product with a column blurs it by SSIM's Gaussian, cut at 5 px."""
    place = torch.arange(n, device=device)
    distance = (place - place[:, None]).double()
    gaussian = torch.exp(-distance ** 2 / (2 * 1.5 ** 2)) * (distance.abs() <= 5)
    return gaussian / sum(math.exp(-d ** 2 / (2 * 1.5 ** 2)) for d in range(-5, 6))


def distance(embeddings_a, embeddings_b):
    """Euclidean distance of embeddings, row by row: (N, D) twice -> (N,)."""
    return (embeddings_a - embeddings_b).double().norm(dim=1)


def cosine(embeddings_a, embeddings_b):
    """Cosine similarity of embeddings, row by row: (N, D) twice -> (N,) in [-1, 1]."""
    return F.cosine_similarity(embeddings_a.float(), embeddings_b.float())


# ---------------------------------------------------------------------------------------------
# Running the models


def batches(dataset, batch_size, device, indices=None):
    """Yield (indices, LR, bicubic, HR) of a ValidDatasetFromFolder, batched, channels last.

    Whole frames may differ in size; a batch holds one size only. `indices`: a part of the data set.
    """
    group, size = [], None
    for index in [*(range(len(dataset)) if indices is None else indices), None]:
        item = dataset[index] if index is not None else None
        if group and (item is None or len(group) == batch_size or item[2].shape != size):
            images = default_collate([images for _, images in group])
            yield [i for i, _ in group], *(
                x.to(device).contiguous(memory_format=torch.channels_last) for x in images)
            group = []
        if item is not None:
            group.append((index, item))
            size = item[2].shape


@torch.no_grad()
def restore(netG, dataset, index, device):
    """[bicubic, SR, HR] of one photograph of a ValidDatasetFromFolder: (3, H, W) each."""
    _, lr, restored, hr = next(batches(dataset, 1, device, [index]))
    return [restored[0], netG.eval()(lr)[0], hr[0]]


@torch.no_grad()
def validate(netG, discriminate, dataset, face_network, hr_embedding_cache, device, indices,
             context=nullcontext):
    """What training logs of its validation images after an epoch.

    -> (n, 6) tensor, one row per index: PSNR-Y (dB), SSIM, cosine, D's logits of HR and of SR, and
    the index. `hr_embedding_cache` keeps HR's embeddings between epochs ({index: (512,)}).
    discriminate: function (hr, sr) -> their logits, (N,) each; without it (None: D has not begun
    to learn) more than half of the arithmetic is spared and the logits are nan. context: what
    the generator and the face network run in, see `machine.autocast`. netG is left in eval mode.
    """
    netG.eval()
    rows = []
    batch_size = BATCH if dataset.crop_size else max(1, BATCH // 4)  # frames have four crops' size
    for group, lr, _, hr in batches(dataset, batch_size, device, indices):
        with context():
            sr = netG(lr).float()
            if any(i not in hr_embedding_cache for i in group):
                hr_embedding_cache.update(zip(group, embed(face_network, hr)))
            of_sr = embed(face_network, sr)
        of_hr = torch.stack([hr_embedding_cache[i] for i in group])
        logits = discriminate(hr, sr) if discriminate else [sr.new_full((len(group),), np.nan)] * 2
        rows.append(torch.stack([psnr_y(sr, hr), ssim(sr, hr), cosine(of_sr, of_hr), *logits,
                                 torch.tensor(group, device=device).float()], dim=1))
    return torch.cat(rows) if rows else torch.empty(0, 6, device=device)


def load_judge(name):
    """A face network that training never saw: (N, 3, 160, 160) in [-1, 1] -> (N, D).

    `name`: casia-webface; dlib, whose network takes (pictures, HR) instead, see
    `dlib_judge.DlibJudge`; or the path of a TorchScript file, which is code that the user must
    trust. Raises InputError if it cannot be loaded or does not do that.
    """
    if name == "dlib":
        from support.dlib_judge import load_dlib  # an optional extra

        return load_dlib()
    if name in ("casia-webface", "vggface2", "random"):
        network = load_face_network(name, "--judge")
    elif not Path(name).is_file():
        raise InputError(f"--judge {name}: no such file; give dlib, casia-webface or the path of "
                         "a TorchScript file")
    else:
        network = load_script(name)
    for n in (1, 3):  # a network with a fixed batch size fails here, not on the last batch
        try:
            with torch.no_grad():
                shape = tuple(network(torch.zeros(n, 3, 160, 160)).shape)
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(f"--judge {name}: fails on a {n} x 3 x 160 x 160 batch: "
                             f"{reason[-1]}") from None
        if len(shape) != 2 or shape[0] != n:
            raise InputError(f"--judge {name}: gives {shape} for {n} face(s), not ({n}, D)")
    return network


def check_finite(values, what):
    """Raise InputError if a tensor holds NaN or infinite values: any score of them would lie."""
    if not values.isfinite().all():
        raise InputError(f"{what} hold NaN or infinite values; take another network")


def embed_all(embedders, images, hr, context=nullcontext):
    """Every network's embeddings of images (N, 3, H, W) that show what HR does: {name: (N, D)}.

    Only the training embedder runs in `context`: a judge may not bear it.
    """
    found = {}
    for name, network in embedders.items():
        if is_distance(name):  # NaN where HR shows no face
            found[name] = network(images, hr)
            continue
        with context() if name == "cosine" else nullcontext():
            found[name] = embed(network, images)
        flag = "--face_weights" if name == "cosine" else "--judge"
        check_finite(found[name], f"{flag} {getattr(network, 'label', name)}: its embeddings")
    return found


def pictures_of(model, lr, restored, hr, paths):
    """A model's pictures of a batch (N, 3, H, W); a folder's are those restored from `paths`."""
    if isinstance(model, dict):
        return torch.stack([to_tensor(read_image(model[path])) for path in paths]).to(hr.device)
    return model(lr, restored, hr).float()


@torch.no_grad()
def measure(models, dataset, embedders, batch_size, device, context=nullcontext):
    """Every model on every image -> (per-image table, {(model, embedder): (n, D) array}).

    models: {name: function of (LR, bicubic, HR) -> SR, or what `find_restored` found}; embedders:
    {name: network} of `load_embedders`. context: what models and training embedder run in, see
    `machine.autocast`. Where dlib finds no face on HR, that image's distance is NaN for every
    model. Raises InputError naming the network that gave a number which is not finite.
    """
    rows, vectors = [], {(m, e): [] for m in models for e in embedders}
    bar = tqdm(total=len(dataset), unit="image", desc="evaluating", leave=False, disable=None)
    if not dataset.crop_size:  # frames have the size of four crops
        batch_size = max(1, batch_size // 4)
    for group, lr, restored, hr in batches(dataset, batch_size, device):
        of_hr = embed_all(embedders, hr, hr, context)
        for name, model in models.items():
            with context():
                sr = pictures_of(model, lr, restored, hr, [dataset.files[i] for i in group])
            check_finite(sr, f"{name}: its pictures")
            of_sr = of_hr if sr is hr else embed_all(embedders, sr, hr, context)
            columns = {"psnr_y": psnr_y(sr, hr), "ssim": ssim(sr, hr)}
            for e in embedders:
                columns[e] = (distance if is_distance(e) else cosine)(of_sr[e], of_hr[e])
                vectors[name, e].append(of_sr[e].float().cpu().numpy())
            values = pd.DataFrame({k: v.cpu().double().numpy() for k, v in columns.items()})
            values.insert(0, "image", [dataset.files[i].name for i in group])
            values.insert(0, "model", name)
            rows.append(values)
        bar.update(len(group))
    bar.close()
    table = pd.concat(rows, ignore_index=True)
    return table, {key: np.concatenate(value) for key, value in vectors.items()}


# ---------------------------------------------------------------------------------------------
# Against another photograph of the same person


def files_of_pairs(args):
    """Photographs of --pairs -> (paths, (n, 2) their indices, (n, 2) people, (n,) folds).

    Picture 1 of name lies at DATA_DIR/name/name_0001 with any suffix. Raises InputError naming
    what is missing.
    """
    pairs = read_pairs(args.pairs)
    pictures = sorted({picture for _, *pair in pairs for picture in pair})
    names = sorted({name for name, _ in pictures})
    stems, found = [(name, f"{name}_{number:04d}") for name, number in pictures], {}
    for name in names:
        folder = Path(args.data_dir, name)
        files = photographs_of(folder, "--data_dir") if folder.is_dir() else []
        found[name] = {stem: files[i] for stem, i in stems_of(files).items()}
    if missing := [f"{name}/{stem}" for name, stem in stems if stem not in found[name]]:
        raise InputError(f"--pairs {args.pairs}: {len(missing)} of its photographs are not in "
                         f"--data_dir {args.data_dir}: {', '.join(missing[:5])}")
    place = {picture: i for i, picture in enumerate(pictures)}
    return ([found[name][stem] for name, stem in stems],
            np.array([[place[picture] for picture in pair] for _, *pair in pairs]),
            np.array([[names.index(name) for name, _ in pair] for _, *pair in pairs]),
            np.array([fold for fold, *_ in pairs]))


def photographs_of(person, flag):
    """Sorted photographs in a person's folder. Raises InputError naming it if there is none."""
    try:
        return list_images(person, flag)
    except InputError:
        raise InputError(f"{person}: no photograph in it; {flag} must hold a folder with "
                         "photographs for each person") from None


def files_of_gallery(folder):
    """Photographs of --gallery, a folder per person -> (paths, (n,) people as numbers from 0)."""
    if not Path(folder).is_dir():
        raise InputError(f"--gallery {folder}: no such folder; give one with a folder per person")
    people = sorted(p for p in Path(folder).iterdir() if p.is_dir() and p.name[0] != ".")
    files = [photographs_of(person, "--gallery") for person in people]
    if len(people) < 2 or max(map(len, files)) < 2:
        raise InputError(f"--gallery {folder}: must hold a folder for each of two or more people, "
                         "with two or more photographs of somebody")
    return [path for of_one in files for path in of_one], np.repeat(np.arange(len(people)),
                                                                    [*map(len, files)])


def score_pairs(probes, references, by_distance, pairs, people, fold, seed):
    """`verification.pair_rates`, the first picture of a pair restored, the second HR.

    probes, references: (n, D) embeddings of all pictures, SR and HR. Pairs in which dlib finds
    no face are left out; "n" counts the others.
    """
    seen = np.isfinite(references[pairs]).all((1, 2))
    if len(np.unique(fold[seen])) < 2:
        raise InputError("--judge dlib: finds no faces in all folds but one; leave it out")
    pairs = pairs[seen]
    people = np.unique(people[seen], return_inverse=True)[1].reshape(-1, 2)  # those with pairs left
    scores = similarity(probes[pairs[:, 0]], references[pairs[:, 1]], by_distance, paired=True)
    return {"n": seen.sum()} | pair_rates(scores, people, fold[seen], seed=seed)


def score_gallery(probes, references, by_distance, person, seed):
    """`verification.recognition` of all people's photographs but the first, which is the gallery.

    probes, references: (n, D) embeddings of SR and HR, sorted by person; person: (n,). Photographs
    in which dlib finds no face are left out; "n" counts the probes.
    """
    seen = np.flatnonzero(np.isfinite(references).all(1))
    _, first, number = np.unique(person[seen], return_index=True, return_inverse=True)
    rest = np.setdiff1d(np.arange(len(seen)), first)
    if not len(rest):
        raise InputError("--judge dlib: finds no person's face in two photographs; leave it out")
    scores = similarity(probes[seen[rest]], references[seen[first]], by_distance)
    return {"n": len(rest)} | recognition(scores, number[rest], (0.01, 0.001), seed)


def compare_people(args, models, factor, embedders, labels, device, context):
    """--pairs and --gallery: every model's probes against HR of another photograph; writes tables.

    The model HR is the ceiling, bicubic the floor.
    """
    figures.check_ours(Path(args.out_dir, f"people.{kind}") for kind in ("csv", "md"))
    rows = []
    for protocol, source in (("pairs", args.pairs), ("gallery", args.gallery)):
        if not source:
            continue
        files, *of_pairs = (files_of_pairs(args) if protocol == "pairs" else
                            files_of_gallery(source))
        sizes = usable_crop_sizes(args.crop_size, factor)
        check_room(max(sizes), "--crop_size")
        dataset = ValidDatasetFromFolder(source, max(sizes), factor, args.cache_gb, files=files)
        for size in sizes:
            _, vectors = measure(models, dataset.framed(size), embedders, args.batch_size, device,
                                 context)
            score = score_pairs if protocol == "pairs" else score_gallery
            rows += [{"protocol": protocol, "framing": framing_name(size), "judge": judge,
                      "model": model, **score(vectors[model, judge], vectors["HR", judge],
                                              is_distance(judge), *of_pairs, args.seed)}
                     for judge in embedders for model in models]
    write_people(Path(args.out_dir), rows, labels)


# ---------------------------------------------------------------------------------------------
# Pictures that something else restored


def stems_of(files, flag="--data_dir"):
    """{file name without its suffix: index}; raises InputError naming the flag if two share one."""
    stems = {path.stem: i for i, path in enumerate(files)}
    for i, path in enumerate(files):
        if stems[path.stem] != i:
            raise InputError(f"{flag}: {path} and {files[stems[path.stem]].name} differ in their "
                             "suffix alone; rename one of them")
    return stems


def export_lr(dataset, crop_sizes, folder):
    """Write every LR picture to FOLDER/crop_128/ and the like, a PNG named like its photograph."""
    stems = stems_of(dataset.files)
    paths = {(size, i): Path(folder, framing_name(size), f"{stem}.png")
             for size in crop_sizes for stem, i in stems.items()}
    figures.check_ours(paths.values(), "--export_lr")
    for (size, i), path in paths.items():
        save_image(to_image(dataset.framed(size)[i][0]), path)
    print(f"wrote the LR pictures to {folder}/; score what is restored from them with --restored "
          "NAME=FOLDER")


def find_restored(text, dataset):
    """--restored's NAME=FOLDER -> {path of a photograph: path of its restored picture}.

    The pictures lie in FOLDER/crop_128/ and the like, or else in FOLDER itself. Raises InputError
    naming what is missing or has another size than HR.
    """
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise InputError(f"--restored {text}: give NAME=FOLDER, such as waifu2x=restored/waifu2x")
    inside = Path(folder, framing_name(dataset.crop_size))
    folder = inside if inside.is_dir() else Path(folder)
    files, stems = list_images(folder, "--restored"), stems_of(dataset.files)
    found = {stem: files[i] for stem, i in stems_of(files, "--restored").items()}
    if missing := sorted(stems.keys() - found.keys()):
        raise InputError(f"--restored {name}: {folder} lacks {len(missing)} of {len(stems)} "
                         f"pictures: {', '.join(missing[:5])}; restore what --export_lr wrote")
    for stem, index in stems.items():
        height, width = dataset[index][2].shape[1:]
        if (size := read_image(found[stem]).size) != (width, height):
            raise InputError(f"{found[stem]}: {size[0]}x{size[1]} px, but HR has {width}x{height} "
                             f"in {framing_name(dataset.crop_size)}; restore what --export_lr "
                             "wrote, or leave out that --crop_size")
    return {dataset.files[index]: found[stem] for stem, index in stems.items()}


def with_restored(models, texts, dataset):
    """`models` and, behind bicubic, what --restored names, for one framing."""
    others = {}
    for text in texts:
        if (name := text.partition("=")[0]) in models | others:
            raise InputError(f"--restored {text}: {name} is taken; choose another name")
        others[name] = find_restored(text, dataset)
    return {"bicubic": models["bicubic"]} | others | models


# ---------------------------------------------------------------------------------------------
# The script


def load_models(args, device):
    """({name: function}, upscale factor) of bicubic, the checkpoints, the blends and HR."""
    paths = args.checkpoint or [checkpoints.shipped_generator()]
    networks = {}
    for path in paths:
        name = Path(path).stem
        taken = name in networks or name in ("bicubic", "HR")
        networks[os.path.abspath(path) if taken else name] = checkpoints.load_generator(path)
    for text in args.blend:
        other, weight = checkpoints.parse_blend(text)
        name = f"{Path(paths[0]).stem}+{weight:g}*{Path(other).stem}"
        if name in networks:  # runs name their checkpoints alike
            name = f"{Path(paths[0]).stem}+{weight:g}*{other}"
        networks[name] = checkpoints.load_blend(paths[0], other, weight)
    factors = {name: netG.scale_factor for name, netG in networks.items()}
    if len(set(factors.values())) > 1:
        raise InputError(f"checkpoints of different upscale factors {factors}; evaluate one "
                         "factor at a time")
    return as_models(networks, device), next(iter(factors.values()))


def as_models(networks, device):
    """{name: generator} -> {name: function of (LR, bicubic, HR)}, bicubic first and HR last."""
    models = {"bicubic": lambda lr, restored, hr: restored}
    for name, netG in networks.items():
        netG.to(device, memory_format=torch.channels_last)
        models[name] = lambda lr, restored, hr, netG=netG: netG(lr)
    return models | {"HR": lambda lr, restored, hr: hr}


def load_embedders(face_weights, judges):
    """({metric: network}, {metric: what it is}) of the training embedder and of each judge.

    The training embedder comes first, as "cosine"; dlib's metric is "distance_dlib".
    """
    embedders = {"cosine": load_face_network(face_weights)}
    labels = {"cosine": f"InceptionResnetV1 {embedders['cosine'].label}"}
    for judge in dict.fromkeys(judges):
        name = "distance_dlib" if judge == "dlib" else f"cosine_{Path(judge).stem}"
        # names that are taken: of another judge, of its rates, of intervals
        if judge != "dlib" and (name in embedders or name.endswith(("_dlib", "_low", "_high"))):
            name = f"cosine_{judge}"
        embedders[name] = load_judge(judge)
        labels[name] = getattr(embedders[name], "label", judge)
    return embedders, labels


@torch.no_grad()
def picture_rows(models, dataset, per_image, device):
    """Best, median and worst images by cosine of the last model, for `figures.save_comparison`."""
    shown = [name for name in models if name not in ("bicubic", "HR")]
    ranked = per_image[per_image["model"] == shown[-1]].sort_values("cosine")["image"].tolist()
    n = len(ranked)
    picks = {"best": ranked[-1], "median": ranked[(n - 1) // 2], "worst": ranked[0]}
    names = [path.name for path in dataset.files]
    rows = []
    for label, image in list(picks.items())[:n]:
        index = names.index(image)
        _, lr, restored, hr = next(batches(dataset, 1, device, [index]))
        row = {"label": label, "images": [to_image(lr[0])], "captions": [""]}
        for name, model in models.items():
            pictures = pictures_of(model, lr, restored, hr, [dataset.files[index]])
            row["images"].append(to_image(pictures[0]))
            scores = per_image[(per_image["model"] == name) & (per_image["image"] == image)].iloc[0]
            row["captions"].append("" if name == "HR" else
                                   f"cos {scores['cosine']:.2f}  {scores['psnr_y']:.1f} dB")
        rows.append(row)
    return rows


def parse(argv=None):
    parser = Parser(
        description="PSNR-Y, SSIM, cosine and recognition of generators, against bicubic.",
        epilog="example: python evaluate.py --checkpoint epochs/netG_epoch_8_100.pth "
               "--data_dir data/DIV2K_valid_HR --out_dir results")
    add = parser.add_argument_group("what").add_argument
    add("--checkpoint", nargs="+", default=[], metavar="PTH",
        help="generators to evaluate (default: the shipped one)")
    add("--blend", action="append", default=[], metavar="B.pth:0.3",
        help="also 0.7 of the first checkpoint's weights and 0.3 of B's; may be repeated")
    add("--restored", action="append", default=[], metavar="NAME=FOLDER",
        help="also pictures that something else restored, named like the photographs; may be "
             "repeated")
    add("--export_lr", metavar="FOLDER",
        help="instead: write the LR pictures, inputs for another tool, to FOLDER/crop_128/ and the "
             "like")
    add("--data_dir", default=VALID_DIR, help="folder of photographs")
    add("--export", nargs=2, metavar=("FORMAT", "OUT"),
        help="measure nothing but write the one generator to the file OUT: onnx or torchscript, "
             "for LR of any size, or safetensors, its weights")
    add("--crop_size", type=not_negative, nargs="+", default=[128, 0],
        help="HR sizes in px of the centre crops to measure; 0: whole frames, as the report's code")
    add("--shift", type=int, nargs="+", default=[], metavar="PX",
        help="also measure the checkpoints' gain over bicubic on crops that many px right of and "
             "below the centre (sweep.csv, sweep.png)")
    add("--scale", type=scale, nargs="+", default=[], metavar="F",
        help="also measure it on whole frames, and the faces in them, F times as large")
    add("--pairs", metavar="TXT",
        help="instead: verification of restored faces against other photographs of the same "
             "people, listed as in LFW's pairs.txt, at DATA_DIR/name/name_0001.jpg")
    add("--gallery", metavar="FOLDER",
        help="instead: identification of restored faces; a folder of photographs per person, the "
             "first of each is the gallery")
    add = parser.add_argument_group("how").add_argument
    add("--face_weights", default="vggface2",
        help="embedder of the cosine: vggface2, casia-webface, random, or a state dict's path")
    add("--judge", action="append", default=[], metavar="NAME|PATH",
        help="a further face network: dlib (requirements-judge.txt), casia-webface, or a "
             "TorchScript file, which is code that you must trust; may be repeated")
    add("--batch_size", type=positive, default=BATCH, help="images per batch")
    add("--device", choices=DEVICES, default="auto", help="where to compute")
    add("--precision", choices=("auto", *PRECISIONS), default="fp32",
        help="arithmetic of the generators and of the cosine's network (judges: fp32); auto: as in "
             "training, and faster")
    add("--cache_gb", type=weight, default=4.0, help="GiB of decoded pictures to hold in memory")
    add("--seed", type=not_negative, default=0, help="seed of the bootstrap")
    add("--out_dir", default="results",
        help="folder of report.html, the tables and the pictures")
    return parser.parse_args(argv)


def framing_name(crop_size):
    """What tables and files call it."""
    return f"crop_{crop_size}" if crop_size else "whole_frames"


def crop_to_shift(args):
    """Size in px of the crops that --shift moves."""
    return max(args.crop_size) or 128


def sweep(models, dataset, args, embedder, device, context):
    """Means and gains over bicubic on shifted crops and on larger and smaller faces: a table."""
    framings = [("shift", px, dataset.framed(crop_to_shift(args), shift=px)) for px in args.shift]
    framings += [("scale", f, dataset.framed(0, scale=f)) for f in args.scale]
    rows = []
    for name, value, framing in framings:
        per_image, _ = measure({k: v for k, v in models.items() if k != "HR"}, framing,
                               {"cosine": embedder}, args.batch_size, device, context)
        exact = per_image["image"].isin(left_out(per_image, "psnr_y"))
        per_image["psnr_y"] = per_image["psnr_y"].mask(exact)
        means = per_image.groupby("model", sort=False)[["psnr_y", "ssim", "cosine"]].mean()
        gains = (means - means.loc["bicubic"]).add_suffix("_gain")
        rows += [{"sweep": name, "value": value, "model": model, **means.loc[model],
                  **gains.loc[model]} for model in means.index]
    return pd.DataFrame(rows)


def usable_crop_sizes(wanted, factor):
    """--crop_size, each rounded down to a multiple of the factor, which is said; none twice."""
    sizes = [valid_crop_size(size, factor) for size in wanted]
    for size, asked in zip(sizes, wanted):
        if asked and not size:
            raise InputError(f"--crop_size {asked}: must be {factor} or more, or 0 for whole "
                             "frames")
        if size != asked:
            print(f"--crop_size {asked} is no multiple of {factor}: using {size}")
    return list(dict.fromkeys(sizes))


def load_dataset(args, factor):
    """The photographs, large enough for every --crop_size and --shift."""
    args.crop_size = usable_crop_sizes(args.crop_size, factor)
    room = max(args.crop_size)
    if args.shift:
        room = crop_to_shift(args) + 2 * max(map(abs, args.shift))
        room += -room % factor  # a crop size that is no multiple would be rounded down
    check_room(room, "--crop_size" if not args.shift else "--crop_size and --shift")
    return ValidDatasetFromFolder(args.data_dir, room, factor, args.cache_gb, "--data_dir")


def export_generator(args):
    """--export: the one checkpoint or blend, or the shipped generator, in another format."""
    kind, out = args.export
    if kind not in export.FORMATS:
        *others, last = export.FORMATS
        raise InputError(f"--export {kind}: give {', '.join(others)} or {last}, then the file to "
                         "write")
    if len(args.checkpoint) > 1 or len(args.blend) > 1:
        raise InputError("--export writes one generator: give one --checkpoint, or one --blend")
    if not out:
        raise InputError(f"--export {kind}: give the file to write after it")
    check_named("--export", out, export.FORMATS[kind], export.is_export)
    path = args.checkpoint[0] if args.checkpoint else checkpoints.shipped_generator()
    if args.blend:
        generator = checkpoints.load_blend(path, *checkpoints.parse_blend(args.blend[0]))
    else:
        generator = checkpoints.load_generator(path)
    export.export(generator, kind, out)
    print(f"{path}: wrote {out}, {generator.scale_factor}x")


def compare_models(args, models, dataset, embedders, labels, device, context):
    """Every model on every framing, and on those of --shift and --scale; writes tables, pictures.

    embedders, labels: of `load_embedders`.
    """
    folder, tables, pictures = Path(args.out_dir), {}, {}
    swept = bool(args.shift or args.scale)
    names = [*(f"comparison_{framing_name(size)}.png" for size in args.crop_size), "report.html",
             "per_image.csv", "summary.csv", "summary.md", "differences.csv"]
    figures.check_ours(folder / name for name in names + ["sweep.csv", "sweep.png"] * swept)
    framings = [dataset.framed(size) for size in args.crop_size]
    of_framing = [with_restored(models, args.restored, framing) for framing in framings]
    for framing, shown in zip(framings, of_framing):
        name = framing_name(framing.crop_size)
        per_image, vectors = measure(shown, framing, embedders, args.batch_size, device, context)
        summary = summarise(per_image, vectors, args.seed).assign(
            networks="; ".join(labels.values()))
        tables[name] = per_image, summary, differences(per_image, args.seed)
        pictures[name] = picture_rows(shown, framing, per_image, device)
        figures.save_comparison(folder / f"comparison_{name}.png", ["LR", *shown], pictures[name])
    sections, picture = write_tables(folder, tables, labels, pictures), None
    if swept:
        table = sweep(models, dataset, args, embedders["cosine"], device, context)
        picture = folder / "sweep.png"
        checkpoints.save_csv(table, folder / "sweep.csv")
        figures.save_sweep(table, picture)
        print(table.round(4).to_string(index=False))
    report.save_report(folder / "report.html", sections, picture)
    print("wrote report.html, summary.csv, summary.md, differences.csv, per_image.csv, "
          f"comparison_*.png{' and sweep.*' * swept} to {folder}/")


def check_heeded(args):
    """Raise InputError naming a flag that another one would have ignored."""
    unheeded = {"export": ("restored", "export_lr", "shift", "scale", "pairs", "gallery", "judge"),
                "export_lr": ("restored", "shift", "scale", "pairs", "gallery", "judge"),
                "pairs": ("restored", "shift", "scale"), "gallery": ("restored", "shift", "scale")}
    for flag, others in unheeded.items():
        if getattr(args, flag) and (given := [name for name in others if getattr(args, name)]):
            raise InputError(f"{' and '.join(f'--{name}' for name in given)}: leave it out beside "
                             f"--{flag}")


def check_outputs(args):
    """Raise InputError where an output would lie among photographs."""
    folders = {"gallery": args.gallery} if args.gallery else {}
    if args.pairs or not args.gallery:
        folders["data_dir"] = args.data_dir
    if args.export_lr:
        check_out_dir(args.export_lr, "--export_lr", **folders)
    else:
        check_out_dir(args.out_dir, **folders)


def main(argv=None):
    args = parse(argv)
    check_heeded(args)
    if args.export:
        return export_generator(args)
    device = choose_device(args.device)
    check_outputs(args)
    models, factor = load_models(args, device)
    if args.export_lr:
        return export_lr(load_dataset(args, factor), args.crop_size, args.export_lr)
    of_people = args.pairs or args.gallery
    dataset = None if of_people else load_dataset(args, factor)
    embedders, labels = load_embedders(args.face_weights, args.judge)
    for network in embedders.values():
        network.to(device)
    precision = fast_precision(device) if args.precision == "auto" else args.precision
    if precision != "fp32":
        labels["cosine"] += f"; generators and it computed in {precision}"
    context = autocast(device, precision)
    if of_people:
        return compare_people(args, models, factor, embedders, labels, device, context)
    compare_models(args, models, dataset, embedders, labels, device, context)


if __name__ == "__main__":
    run_script(main)
