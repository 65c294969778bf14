"""The report's "Evaluation Metrics" on checkpoints: PSNR-Y, SSIM, cosine of face embeddings.

    python evaluate.py                                    # the shipped generator
    python evaluate.py --checkpoint epochs/netG_epoch_8_100.pth --data_dir data/DIV2K_valid_HR

Beyond the report: recognition (is the restored face still found among all faces?), judges that
training never saw, 95 % bootstrap intervals, and paired differences between models.
"""

import argparse
import math
import zipfile
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate
from tqdm import tqdm

from data_utils import VALID_DIR, ValidDatasetFromFolder
from loss_identity import embed, load_face_network
from support import checkpoints, export, figures, report
from support.cli import (
    HelpFormatter,
    InputError,
    check_out_dir,
    markdown_table,
    not_negative,
    positive,
    positive_number,
    run_script,
    weight,
)
from support.figures import to_image
from support.machine import DEVICES, PRECISIONS, autocast, choose_device, fast_precision

RESAMPLES = 10_000
BATCH = 20  # images at a time
EXPORTED = {"archive_format", "serialized_exported_program.json"}  # in torch.export's
SCRIPTED = "constants.pkl"  # in TorchScript's


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


def cosine(embeddings_a, embeddings_b):
    """Cosine similarity of embeddings, row by row: (N, D) twice -> (N,) in [-1, 1]."""
    return F.cosine_similarity(embeddings_a.float(), embeddings_b.float())


def recognition(probes, gallery):
    """How well faces are recognised: row i of both (n, D) embedding arrays is the same person.

    -> rank-1 and rank-5 identification rate of each probe among the whole gallery, and of all
    n * n pairs the verification AUC and the TAR at a FAR of 1 %; all in [0, 1].
    """
    probes, gallery = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (probes, gallery))
    similarity = probes @ gallery.T  # nan where an embedding is all zeros:
    genuine = np.nan_to_num(np.diag(similarity), nan=-2)  # such a face is like nobody,
    similarity = np.nan_to_num(similarity, nan=2)         # and in the way of everybody
    # gallery faces before the right one; a tie is no identification
    rank = (similarity >= genuine[:, None]).sum(1) - (genuine > -2)
    impostors = np.sort(similarity[~np.eye(len(similarity), dtype=bool)])
    if not len(impostors):  # of a single face nothing can be verified
        return {"rank1": (rank < 1).mean(), "rank5": (rank < 5).mean(), "auc": np.nan,
                "tar_at_far_1": np.nan}
    below = np.searchsorted(impostors, genuine, "left")
    equal = np.searchsorted(impostors, genuine, "right") - below
    # accept what exceeds the threshold: at most 1 % of the impostor pairs do
    threshold = impostors[len(impostors) - 1 - int(0.01 * len(impostors))]
    return {"rank1": (rank < 1).mean(), "rank5": (rank < 5).mean(),
            "auc": ((below + equal / 2) / len(impostors)).mean(),
            "tar_at_far_1": (genuine > threshold).mean()}


def bootstrap(values, seed=0, resamples=RESAMPLES):
    """95 % percentile interval of the mean under resampling of images: (n,) -> (low, high).

    The same seed draws the same images, so that differences of two models' values are paired.
    """
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=(max(1, resamples // 100), len(values)))].mean(1)
             for _ in range(100)]  # a hundredth at a time: the draws of 30,000 images fit in memory
    return tuple(np.percentile(np.concatenate(means), [2.5, 97.5]))


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
    """A face network that training never saw, as images (N, 3, H, W) in [0, 1] -> (N, D).

    `name`: casia-webface, or a TorchScript file that maps (N, 3, 160, 160) in [-1, 1] to
    embeddings. Such a file is code, which the user trusts. Raises InputError if it cannot be
    loaded or does not do that.
    """
    if name in ("casia-webface", "vggface2", "random"):
        network = load_face_network(name)
    elif not Path(name).is_file():
        raise InputError(f"--judge {name}: no such file; give casia-webface or the path of a "
                         "TorchScript file")
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


def load_script(path):
    """A TorchScript file -> the network in eval mode. Raises InputError naming --judge."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = {Path(entry).name for entry in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        inside = set()
    if inside & EXPORTED or Path(path).suffix == ".pt2":
        # torch.export.load unpickles and opens libraries that lie in the archive
        raise InputError(f"--judge {path}: a torch.export archive, which can run any program when "
                         "it is opened; save the network with torch.jit.save instead")
    try:
        if SCRIPTED not in inside:
            raise ValueError("no TorchScript")
        network = torch.jit.load(path, map_location="cpu").eval()
    except Exception:  # the loader raises what it likes
        raise InputError(f"--judge {path}: not a TorchScript file that can be loaded") from None
    network.label = path
    return network


def check_finite(values, what):
    """Raise InputError if a tensor holds NaN or infinite values: any score of them would lie."""
    if not values.isfinite().all():
        raise InputError(f"{what} hold NaN or infinite values; take another network")


@torch.no_grad()
def measure(models, dataset, embedders, batch_size, device, context=nullcontext):
    """Every model on every image -> (per-image table, {(model, embedder): (n, D) array}).

    models: {name: function of (LR, bicubic, HR) -> SR}; embedders: {name: network}, the training
    embedder first, under the name "cosine", then judges. context: what models and training
    embedder run in, see `machine.autocast`; a judge may not bear it. Raises InputError naming the
    network that gave a number which is not finite.
    """
    def embeddings(images):
        found = {}
        for name, network in embedders.items():
            with context() if name == "cosine" else nullcontext():
                found[name] = embed(network, images)
            flag = "--face_weights" if name == "cosine" else "--judge"
            check_finite(found[name], f"{flag} {getattr(network, 'label', name)}: its embeddings")
        return found

    rows, vectors = [], {(m, e): [] for m in models for e in embedders}
    bar = tqdm(total=len(dataset), unit="image", desc="evaluating", leave=False, disable=None)
    if not dataset.crop_size:  # frames have the size of four crops
        batch_size = max(1, batch_size // 4)
    for group, lr, restored, hr in batches(dataset, batch_size, device):
        of_hr = embeddings(hr)
        for name, model in models.items():
            with context():
                sr = model(lr, restored, hr).float()
            check_finite(sr, f"{name}: its pictures")
            of_sr = of_hr if sr is hr else embeddings(sr)
            columns = {"psnr_y": psnr_y(sr, hr), "ssim": ssim(sr, hr)}
            for e in embedders:
                columns[e] = cosine(of_sr[e], of_hr[e])
                vectors[name, e].append(of_sr[e].float().cpu().numpy())
            values = pd.DataFrame({k: v.cpu().double().numpy() for k, v in columns.items()})
            values.insert(0, "image", [dataset.files[i].name for i in group])
            values.insert(0, "model", name)
            rows.append(values)
        bar.update(len(group))
    bar.close()
    table = pd.concat(rows, ignore_index=True)
    return table, {key: np.concatenate(value) for key, value in vectors.items()}


def restored_exactly(per_image):
    """Names of the images whose PSNR-Y is infinite for a model, as a flat picture's is."""
    infinite = np.isinf(per_image["psnr_y"]) & (per_image["model"] != "HR")
    return list(per_image["image"][infinite].unique())


def summarise(per_image, vectors, seed):
    """One row per model: means with their 95 % intervals, the pooled PSNR-Y, recognition.

    Pooled is the report's way: the PSNR of the mean squared error over all images. The mean PSNR-Y
    leaves out what a model restored exactly, for every model.
    """
    exact = restored_exactly(per_image)
    metrics = [c for c in per_image.columns if c not in ("model", "image")]
    rows = []
    for name, table in per_image.groupby("model", sort=False):
        row = {"model": name, "n": len(table)}
        for metric in metrics:
            left_out = exact if metric == "psnr_y" else []
            values = table[metric][~table["image"].isin(left_out)].to_numpy()
            mean = values.mean() if len(values) else np.nan  # HR's PSNR with itself is infinite
            low, high = bootstrap(values, seed) if np.isfinite(mean) else (mean, mean)
            row |= {metric: mean, f"{metric}_low": low, f"{metric}_high": high}
        mse = np.mean(10 ** (-table["psnr_y"] / 10))
        row["psnr_y_pooled"] = -10 * np.log10(mse) if mse else np.inf
        for e in metrics[2:]:
            rates = recognition(vectors[name, e], vectors["HR", e])
            suffix = e.removeprefix("cosine")  # of a judge: _casia-webface
            row |= {f"{rate}{suffix}": value for rate, value in rates.items()}
        rows.append(row)
    return pd.DataFrame(rows)


def differences(per_image, seed):
    """Every pair of models, metric by metric: the mean paired difference with its interval."""
    metrics = [c for c in per_image.columns if c not in ("model", "image")]
    names = [m for m in per_image["model"].unique() if m != "HR"]
    exact = restored_exactly(per_image)
    rows = []
    for a, b in combinations(names, 2):
        of_a, of_b = (per_image[per_image["model"] == m].set_index("image") for m in (a, b))
        for metric in metrics:
            left_out = exact if metric == "psnr_y" else []
            values = (of_b[metric] - of_a[metric]).drop(left_out).to_numpy()
            mean = values.mean() if len(values) else np.nan
            low, high = bootstrap(values, seed) if np.isfinite(mean) else (np.nan, np.nan)
            rows.append({"model": b, "minus": a, "metric": metric, "difference": mean, "low": low,
                         "high": high, "larger_than_chance": bool(low > 0 or high < 0)})
    return pd.DataFrame(rows)


def cells(summary):
    """The summary as texts, figures with their intervals -> (head of the table, its rows)."""
    metrics = [c for c in summary.columns if f"{c}_low" in summary.columns]
    rates = [c for c in summary.columns if c.startswith(("rank", "auc", "tar"))]
    head = ["model", "n", *metrics, "psnr_y_pooled", *rates]
    rows_of_cells = []
    for _, row in summary.iterrows():
        texts = [row["model"], str(row["n"])]
        for metric in metrics:
            digits = 2 if metric == "psnr_y" else 4
            texts.append(f"{row[metric]:.{digits}f} [{row[metric + '_low']:.{digits}f}, "
                         f"{row[metric + '_high']:.{digits}f}]" if np.isfinite(row[metric])
                         else "-")  # HR's PSNR-Y with itself
        texts += [f"{row[name]:.{digits}f}" if np.isfinite(row[name]) else "-"
                  for name, digits in {"psnr_y_pooled": 2, **dict.fromkeys(rates, 3)}.items()]
        rows_of_cells.append(texts)
    return head, rows_of_cells


def measured_by(labels):
    """A line on units, intervals and face networks."""
    measured = "; ".join(f"{name}: {label}" for name, label in labels.items())
    return f"PSNR-Y in dB; [95 % bootstrap interval]; {measured}"


def markdown(summary, labels):
    """The summary as a Markdown table, figures with their intervals, and what measured them."""
    return "\n".join([*markdown_table(*cells(summary)), "", measured_by(labels), ""])


# ---------------------------------------------------------------------------------------------
# The script


def load_models(args, device):
    """({name: function}, upscale factor) of bicubic, the checkpoints, the blends and HR."""
    paths = args.checkpoint or [checkpoints.shipped_generator()]
    networks = {}
    for path in paths:
        name = Path(path).stem
        taken = name in networks or name in ("bicubic", "HR")
        networks[str(path) if taken else name] = checkpoints.load_generator(path)
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
    """({metric: network}, {metric: what it is}) of the training embedder and of each judge."""
    embedders = {"cosine": load_face_network(face_weights)}
    labels = {"cosine": f"InceptionResnetV1 {embedders['cosine'].label}"}
    for judge in judges:
        name = f"cosine_{Path(judge).stem}"
        if name in embedders or name.endswith(("_low", "_high")):  # the names of intervals
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
        _, lr, restored, hr = next(batches(dataset, 1, device, [names.index(image)]))
        row = {"label": label, "images": [to_image(lr[0])], "captions": [""]}
        for name, model in models.items():
            row["images"].append(to_image(model(lr, restored, hr)[0]))
            scores = per_image[(per_image["model"] == name) & (per_image["image"] == image)].iloc[0]
            row["captions"].append("" if name == "HR" else
                                   f"cos {scores['cosine']:.2f}  {scores['psnr_y']:.1f} dB")
        rows.append(row)
    return rows


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description="PSNR-Y, SSIM, cosine and recognition of generators, against bicubic.",
        formatter_class=HelpFormatter,
        epilog="example: python evaluate.py --checkpoint epochs/netG_epoch_8_100.pth "
               "--data_dir data/DIV2K_valid_HR --out_dir results")
    add = parser.add_argument_group("what").add_argument
    add("--checkpoint", nargs="+", default=[], metavar="PTH",
        help="generators to evaluate (default: the shipped one)")
    add("--blend", action="append", default=[], metavar="B.pth:0.3",
        help="also 0.7 of the first checkpoint's weights and 0.3 of B's; may be repeated")
    add("--data_dir", default=VALID_DIR, help="folder of photographs")
    add("--export", nargs=2, metavar=("FORMAT", "OUT"),
        help="measure nothing but write the one generator to the file OUT: onnx or torchscript, "
             "for LR of any size, or safetensors, its weights")
    add("--crop_size", type=not_negative, nargs="+", default=[128, 0],
        help="HR sizes in px of the centre crops to measure; 0: whole frames, as the report's code")
    add("--shift", type=int, nargs="+", default=[], metavar="PX",
        help="also measure the gain over bicubic on crops that many px right of and below the "
             "centre (sweep.csv, sweep.png)")
    add("--scale", type=positive_number, nargs="+", default=[], metavar="F",
        help="also on whole frames, and the faces in them, F times as large")
    add = parser.add_argument_group("how").add_argument
    add("--face_weights", default="vggface2",
        help="embedder of the cosine: vggface2, casia-webface, random, or a state dict's path")
    add("--judge", action="append", default=[], metavar="NAME|PATH",
        help="a further face network: casia-webface, or a TorchScript file, which is code that "
             "you must trust; may be repeated")
    add("--batch_size", type=positive, default=BATCH, help="images per batch")
    add("--device", choices=DEVICES, default="auto", help="where to compute")
    add("--precision", choices=("auto", *PRECISIONS), default="fp32",
        help="of the networks' arithmetic, but for judges; auto: as training has it, and faster")
    add("--cache_gb", type=weight, default=4.0, help="GiB of decoded pictures to hold in memory")
    add("--seed", type=not_negative, default=0, help="of the bootstrap")
    add("--out_dir", default="results", help="folder of the tables and the picture")
    return parser.parse_args(argv)


def framing_name(crop_size):
    """What tables and files call it."""
    return f"crop_{crop_size}" if crop_size else "whole_frames"


def sweep(models, dataset, args, embedder, device, context):
    """Means and gains over bicubic on shifted crops and on larger and smaller faces: a table."""
    crop = max(args.crop_size) or 128
    framings = [("shift", px, dataset.framed(crop, shift=px)) for px in args.shift]
    framings += [("scale", f, dataset.framed(0, scale=f)) for f in args.scale]
    rows = []
    for name, value, framing in framings:
        per_image, _ = measure({k: v for k, v in models.items() if k != "HR"}, framing,
                               {"cosine": embedder}, args.batch_size, device, context)
        means = per_image.groupby("model", sort=False)[["psnr_y", "ssim", "cosine"]].mean()
        gains = (means - means.loc["bicubic"]).add_suffix("_gain")
        rows += [{"sweep": name, "value": value, "model": model, **means.loc[model],
                  **gains.loc[model]} for model in means.index]
    return pd.DataFrame(rows)


def load_dataset(args, factor):
    """The photographs, large enough for every --crop_size and --shift."""
    sizes = [size - size % factor for size in args.crop_size]
    for size, wanted in zip(sizes, args.crop_size):
        if size != wanted:
            print(f"--crop_size {wanted} is no multiple of {factor}: using {size}")
    args.crop_size = list(dict.fromkeys(sizes))
    room = max(args.crop_size) + 2 * max(map(abs, args.shift), default=0)
    return ValidDatasetFromFolder(args.data_dir, room, factor, args.cache_gb, "--data_dir")


def write_tables(args, tables, labels, pictures):
    """CSV and Markdown of all framings; prints what a person wants to know.

    tables: {framing: (per image, summary, differences)}; pictures: {framing: `picture_rows`}.
    -> the sections of `report.save_report`.
    """
    folder, text, sections = Path(args.out_dir), "", []
    for n, name in enumerate(("per_image", "summary", "differences")):
        whole = pd.concat([table[n].assign(framing=framing) for framing, table in tables.items()])
        checkpoints.save_csv(whole[["framing", *whole.columns[:-1]]], folder / f"{name}.csv")
    for framing, (_, summary, pairs) in tables.items():
        text += f"## {framing}\n\n{markdown(summary, labels)}\n"
        lines = [f"{p.model} - {p.minus}: {p.metric} {p.difference:+.4f} [{p.low:+.4f}, "
                 f"{p.high:+.4f}], {verdict(p)}" for p in pairs.itertuples()]
        text += "".join(f"- {line}\n" for line in lines) + "\n"
        sections.append((framing, cells(summary), lines, pictures[framing]))
    checkpoints.save_text(text, folder / "summary.md")
    print(text, end="")
    return sections


def verdict(pair):
    """A row of `differences` in words."""
    if not pair.larger_than_chance:
        return "within chance"
    return "better beyond chance" if pair.difference > 0 else "worse beyond chance"


def export_generator(args):
    """--export: the one checkpoint or blend, or the shipped generator, in another format."""
    kind, out = args.export
    if kind not in export.FORMATS:
        raise InputError(f"--export {kind}: give {', '.join(export.FORMATS[:-1])} or "
                         f"{export.FORMATS[-1]}, then the file to write")
    if len(args.checkpoint) > 1 or len(args.blend) > 1:
        raise InputError("--export writes one generator: give one --checkpoint, or one --blend")
    path = args.checkpoint[0] if args.checkpoint else checkpoints.shipped_generator()
    if args.blend:
        generator = checkpoints.load_blend(path, *checkpoints.parse_blend(args.blend[0]))
    else:
        generator = checkpoints.load_generator(path)
    export.export(generator, kind, out)
    print(f"{path}: wrote {out}, {generator.scale_factor}x")


def main(argv=None):
    args = parse(argv)
    if args.export:
        export_generator(args)
        return
    device, folder = choose_device(args.device), Path(args.out_dir)
    check_out_dir(args.out_dir, data_dir=args.data_dir)
    strangers = [*folder.glob("comparison_*.png"), *folder.glob("sweep.png")]
    if strangers and not (folder / "per_image.csv").exists():
        raise InputError(f"{strangers[0]} is not of this script; choose another --out_dir")
    models, factor = load_models(args, device)
    dataset = load_dataset(args, factor)
    embedders, labels = load_embedders(args.face_weights, args.judge)
    for network in embedders.values():
        network.to(device)

    precision = fast_precision(device) if args.precision == "auto" else args.precision
    if precision != "fp32":
        labels["cosine"] += f"; generators and it computed in {precision}"
    context, tables, pictures = autocast(device, precision), {}, {}
    for crop_size in args.crop_size:
        name, framing = framing_name(crop_size), dataset.framed(crop_size)
        per_image, vectors = measure(models, framing, embedders, args.batch_size, device, context)
        if exact := restored_exactly(per_image):
            print(f"{name}: left out of PSNR-Y, being restored without any error by a model: "
                  f"{', '.join(exact)}")
        summary = summarise(per_image, vectors, args.seed).assign(
            networks="; ".join(labels.values()))
        tables[name] = per_image, summary, differences(per_image, args.seed)
        pictures[name] = picture_rows(models, framing, per_image, device)
        figures.save_comparison(folder / f"comparison_{name}.png", ["LR", *models], pictures[name])
    sections, picture = write_tables(args, tables, labels, pictures), None
    if args.shift or args.scale:
        table = sweep(models, dataset, args, embedders["cosine"], device, context)
        picture = folder / "sweep.png"
        checkpoints.save_csv(table, folder / "sweep.csv")
        figures.save_sweep(table, picture)
        print(table.round(4).to_string(index=False))
    report.save_report(folder / "report.html", measured_by(labels), sections, picture)
    print("wrote report.html, summary.csv, summary.md, differences.csv, per_image.csv, "
          f"comparison_*.png{' and sweep.*' * bool(args.shift or args.scale)} to {folder}/")


if __name__ == "__main__":
    run_script(main)
