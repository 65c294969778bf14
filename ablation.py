"""The report's objective 5 in one command: an ablation study of the identity loss.

    python ablation.py                         # seven weightings, three seeds: 315 GAN epochs
    python ablation.py --gamma 10 --seeds 0    # the report's three weightings and one more, once

Every run trains GAN epochs alone, from the same generator of the pixel loss; runs of the same seed
see the same batches. Run again, the command continues where it stopped and skips finished runs.
"""

import support  # noqa: F401  first, for Ctrl-C

# isort: split
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import evaluate
import train_identity
from data_utils import load_data
from loss_identity import PRESETS
from support import checkpoints, figures, run_folder, tables
from support.cli import (
    InputError,
    Parser,
    check_out_dir,
    log,
    markdown_table,
    not_negative,
    positive,
    run_script,
)
from support.machine import fast_precision, keep_freed_memory, set_up_machine
from support.statistics import RESAMPLES, bootstrap

# Flags of train_identity.py that the ablation itself gives to each run.
OWN_FLAGS = ("--out_dir", "--preset", "--alpha", "--beta", "--seed", "--num_epochs",
             "--pretrain_epochs", "--resume", "--overwrite", "--config", "--demo")
LOGGED = {"psnr_y": "PSNR", "ssim": "SSIM", "cosine": "Cosine", "d_accuracy": "D_accuracy"}
TITLES = {"psnr_y": "PSNR-Y (dB)", "ssim": "SSIM", "cosine": "cosine", "d_accuracy": "D accuracy"}
BLEND = [0, 0.25, 0.5, 0.75, 1]  # weights of identity against visual
RATE = 1e-4  # the report's; a new generator's 4e-4 would first undo what the start has learnt

# ---------------------------------------------------------------------------------------------
# Training


def configurations(gammas):
    """{name: its flags for train_identity.py}: the presets, then gamma_<value> of each gamma."""
    flags = {name: ["--preset", name] for name in PRESETS}
    return flags | {f"gamma_{g:g}": ["--preset", "identity", "--gamma", str(g)] for g in gammas}


def check_unchanged(folder, wanted, data):
    """Raise InputError if the run in `folder` has other flags, start or photographs than wanted."""
    config = checkpoints.read_config(folder / "config.json")
    then = run_folder.stored_flags(config["flags"], wanted, folder / "config.json")
    changed = run_folder.changed_flags(
        then, run_folder.run_flags(wanted), (run_folder.MACHINE_FLAGS | {"start"}) - {"precision"})
    if config.get("start") != (wanted.start and checkpoints.file_digest(wanted.start)):
        changed.append("the generator that it starts from")
    if config.get("data") != data:
        changed.append("the photographs")
    if changed:
        raise InputError(f"{folder} holds a run with something else: {', '.join(changed)}; leave "
                         "that as it was, choose another --out_dir, or remove that folder")


def train_run(folder, flags, data, again):
    """Run train_identity.py in `folder`, or continue it, unless it is finished.

    data: digests of the photographs; again: the command that continues the ablation, for the
    person who stops it.
    """
    flags = [*flags, "--out_dir", str(folder)]
    wanted = train_identity.parse(flags)
    finished = checkpoints.generator_path(folder, wanted.upscale_factor, wanted.num_epochs).exists()
    begun = (folder / "last.pt").exists()
    if finished or begun:
        check_unchanged(folder, wanted, data)
    if finished:
        log(f"{folder} is finished")
        return
    log(f"{folder}:")
    if begun:  # last.pt has the weights of the start, which may lie elsewhere by now
        place = flags.index("--start")
        flags[place:place + 2] = ["--resume"]
    try:
        train_identity.main(flags)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    except SystemExit:  # SIGINT or SIGTERM: it has saved what it had
        log(f"the ablation stopped in {folder}; continue with:\n  {again}")
        raise


def train_all(args, training, data, again):
    """{(configuration, seed): folder}, everything trained.

    training: flags of train_identity.py that all runs share.
    """
    lr = str(train_identity.parse(["--lr", str(RATE), *training]).lr)
    runs = {}
    for seed in args.seeds:  # one whole comparison after the other
        for name, flags in configurations(args.gamma).items():
            runs[name, seed] = Path(args.out_dir, f"{name}_seed{seed}")
            train_run(runs[name, seed], [
                *training, *flags, "--start", str(args.start), "--lr", lr, "--pretrain_epochs", "0",
                "--num_epochs", str(args.epochs), "--seed", str(seed)], data, again)
            check_networks(runs[name, seed], next(iter(runs.values())))
    return runs


def check_networks(folder, first):
    """Raise InputError if a run's frozen networks are not the first run's."""
    networks, wanted = (checkpoints.read_config(run / "config.json")["networks"]
                        for run in (folder, first))
    if networks != wanted:
        raise InputError(f"{folder}: trained with other networks than {first}, {networks}; choose "
                         "another --out_dir")


# ---------------------------------------------------------------------------------------------
# Evaluation


def measure_all(args, runs, valid_set, embedders, device):
    """Final generators, start, bicubic and the blends of `visual` and `identity`.

    -> (per image and model, per model) as `evaluate.measure` and `tables.summarise` have them;
    a run is called by its folder, a blend is "blend 0.3".
    """
    networks = {"start": checkpoints.load_generator(args.start)}
    factor = networks["start"].scale_factor
    paths = {key: checkpoints.generator_path(folder, factor, args.epochs)
             for key, folder in runs.items()}
    networks |= {runs[key].name: checkpoints.load_generator(path) for key, path in paths.items()}
    ends = [paths[name, args.seeds[0]] for name in ("visual", "identity")]
    networks |= {f"blend {weight:g}": checkpoints.load_blend(*ends, weight) for weight in BLEND}
    models = evaluate.as_models(networks, device)
    per_image, vectors = evaluate.measure(models, valid_set.framed(0), embedders,
                                          evaluate.BATCH, device)
    return per_image, tables.summarise(per_image, vectors, seed=0)


def average_seeds(per_image, per_run, runs):
    """`measure_all`'s tables with one model per configuration, HR left out.

    A metric is averaged over the seeds image by image, and its interval is that of these averages;
    the rates of recognition with their intervals, and the pooled PSNR-Y, are averaged as they are.
    """
    configuration = {folder.name: name for (name, _), folder in runs.items()}
    averaged, summary = (
        table[table["model"] != "HR"].replace({"model": configuration})
        .groupby(keys, sort=False, as_index=False).mean()
        for table, keys in ((per_image, ["model", "image"]), (per_run, "model")))
    summary["n"] = summary["n"].astype(int)
    for row, name in enumerate(summary["model"]):
        of_model = averaged[averaged["model"] == name]
        for metric in averaged.columns[2:]:
            counted = ~of_model["image"].isin(tables.left_out(averaged, metric))
            low, high = bootstrap(of_model[metric][counted].to_numpy())
            summary.loc[row, [f"{metric}_low", f"{metric}_high"]] = low, high
    return averaged, summary


def significant(low, high, by_seed):
    """Whether a difference is more than the photographs' and the seeds' doing; None: can't tell.

    low, high: its interval over photographs, which must exclude 0; by_seed: the difference that
    each seed shows by itself, whose mean must exceed their largest minus their smallest.
    """
    if low <= 0 <= high:
        return False
    if len(by_seed) < 2:
        return None
    return bool(abs(np.mean(by_seed)) > max(by_seed) - min(by_seed))


def passed_by_noise(n_seeds):
    """How often n differences that are nothing but noise between seeds exceed their own spread."""
    noise = np.random.default_rng(0).standard_normal((100_000, n_seeds))
    return (abs(noise.mean(1)) > np.ptp(noise, axis=1)).mean()


def differences(averaged, per_run, runs, minus="baseline"):
    """Configuration - `minus`, metric by metric, with its interval, seeds and verdict.

    Holm's correction is for these comparisons alone: as many per metric as configurations.
    """
    names, seeds = ([*dict.fromkeys(column)] for column in zip(*runs))
    pairs = tables.differences(averaged, 0, names, minus)
    values = per_run.set_index("model")
    pairs["by_seed"] = [
        [values.loc[runs[pair.model, seed].name, pair.metric]
         - values.loc[runs[minus, seed].name, pair.metric] for seed in seeds]
        for pair in pairs.itertuples()]
    pairs["significant"] = pd.Series(
        [pair.significant and significant(pair.low, pair.high, pair.by_seed)
         for pair in pairs.itertuples()], dtype=object)
    return pairs


def learning_curves(runs):
    """Every run's train_results.csv in one table: name, seed, epoch and the LOGGED metrics."""
    of_runs = []
    for (name, seed), folder in runs.items():
        table = pd.read_csv(folder / "train_results.csv")
        table = table[["Epoch", *LOGGED.values()]].set_axis(["epoch", *LOGGED], axis=1)
        of_runs.append(table.assign(name=name, seed=seed))
    return pd.concat(of_runs, ignore_index=True)


def last_epochs(curves, last_k):
    """Mean over the last k epochs: over all seeds, of the lowest and of the highest seed.

    -> a row per configuration, with columns (metric, mean | min | max).
    """
    last = curves[curves["epoch"] > curves["epoch"].max() - last_k]
    by_seed = last.groupby(["name", "seed"], sort=False)[list(LOGGED)].mean()
    return by_seed.groupby("name", sort=False).agg(["mean", "min", "max"])


# ---------------------------------------------------------------------------------------------
# Tables and words


def number(metric, value, sign=""):
    """A metric's value with the digits that it deserves."""
    return f"{value:{sign}.{3 if metric == 'psnr_y' else 4}f}"


def sentence(pair):
    """One difference in plain words."""
    title = TITLES.get(pair.metric, pair.metric.replace("_", " of judge ", 1))
    difference, low, high, *seeds = (
        number(pair.metric, value, "+")
        for value in (pair.difference, pair.low, pair.high, *pair.by_seed))
    words = ("not decided: a single seed shows no spread" if pair.significant is None
             else tables.verdict(pair))
    return (f"{pair.model} - {pair.minus}: {title} {difference} [{low}, {high}], {words} "
            f"(by seed: {', '.join(seeds)})")


def conditions(args, configs):
    """Under which conditions the figures hold, in words; configs: of all runs."""
    config = configs[0]
    flags, data, networks = config["flags"], config["data"], config["networks"]
    commits = dict.fromkeys(str(config["git"]["commit"])[:7] for config in configs)
    return (f"{data['train']['n']} training photographs ({flags['crop']} crops of "
            f"{flags['crop_size']} px), {data['valid']['n']} validation photographs (whole "
            f"frames), {flags['upscale_factor']}x. Each run: {args.epochs} epochs from the same "
            f"generator ({Path(args.start).name}; SHA-256 {config['start'][:12]}), seeds "
            f"{', '.join(map(str, args.seeds))}, batches of {flags['batch_size']}, learning rate "
            f"{flags['lr']:g}, {flags['precision']}; departures undone (--without): "
            f"{', '.join(flags['without']) or 'none'}; commit {', '.join(commits)}. Networks: "
            f"VGG16 {networks['vgg16']}; InceptionResnetV1 {networks['inception_resnet_v1']}.")


def report(args, words, summary, labels, pairs, last, weights):
    """ablation.md; words: of `conditions`, weights: {configuration: alpha, beta and gamma}."""
    last_rows = [[name, *weights[name].values(),
                  *("{} ({} to {})".format(*(number(m, row[m, what])
                                             for what in ("mean", "min", "max"))) for m in LOGGED)]
                 for name, row in last.iterrows()]
    return "\n".join([
        "# Ablation of the identity loss", "", words, "", "## Final checkpoints", "",
        "Each photograph's values are averaged over the seeds first. Bicubic and the start "
        "are there for comparison; blend 0.3 has 0.3 of `identity`'s weights and 0.7 of "
        f"`visual`'s, seed {args.seeds[0]}.", "", tables.markdown(summary, labels),
        "## Differences", "",
        "From `baseline`; and from `gamma_0`, if there is one, which has no identity loss and the "
        "alpha that `identity` and each gamma have: what that loss does by itself.", "",
        "A difference is called significant if its 95 % interval excludes 0 (final "
        f"checkpoints, {RESAMPLES:,} paired bootstrap samples of the photographs), its p-value is "
        f"below {tables.LEVEL} after Holm's correction for all comparisons of that metric, and it "
        "is larger than the spread between seeds: the largest minus the smallest of the "
        "differences that each seed shows by itself. Pure noise would pass this "
        f"second test in {passed_by_noise(len(args.seeds)):.0%} of all cases with "
        f"{len(args.seeds)} seed(s): more seeds, a sharper test.", "",
        *(f"- {sentence(pair)}" for pair in pairs.itertuples()), "",
        f"## Last {args.last_k} epochs", "",
        "Mean over epochs and seeds (lowest to highest seed). D accuracy: the share of real and "
        "generated validation images that the discriminator tells apart, with the statistics of "
        "the batch, as in training; 0.5 is guessing.", "",
        *markdown_table(["configuration", "alpha", "beta", "gamma", *TITLES.values()], last_rows),
        "", "## The report's values, for reference", "",
        "Single epochs of single runs, on CelebA-HQ.", "",
        *markdown_table(["configuration", "PSNR-Y (dB)", "SSIM", "cosine"],
                        [[name, *values.values()] for name, values in figures.REPORT.items()]), ""])


def wide(summary, pairs, last, weights):
    """ablation.csv: a row per configuration with its means, differences and last epochs."""
    rows = []
    for row in summary.to_dict("records"):
        name = row.pop("model")
        row = {"name": name} | weights.get(name, {}) | row
        for pair in pairs[pairs["model"] == name].itertuples():
            row |= {f"{pair.metric}_difference": pair.difference,
                    f"{pair.metric}_difference_low": pair.low,
                    f"{pair.metric}_difference_high": pair.high,
                    f"{pair.metric}_significant": pair.significant}
        if name in last.index:
            row |= {f"{metric}_last_{what}": value
                    for (metric, what), value in last.loc[name].items()}
        rows.append(row)
    return pd.DataFrame(rows)


def paired_intervals(table):
    """`wide`'s configurations, each interval that of the paired difference, put at baseline's mean.

    How much photographs differ from one another says nothing of how much configurations do.
    """
    table = table[table["gamma"].notna()].copy()
    baseline = table[table["name"] == "baseline"].iloc[0]
    for metric in ("psnr_y", "cosine"):
        for end in ("low", "high"):
            table[f"{metric}_{end}"] = baseline[metric] + table[f"{metric}_difference_{end}"]
    return table


# ---------------------------------------------------------------------------------------------
# The script


def parse(argv=None):
    """The ablation's own flags; `.training` holds the others, which are train_identity.py's."""
    parser = Parser(
        description="Train the report's weightings from one generator with the same seeds and\n"
                    "batches, and compare them. Every other flag goes to train_identity.py, for\n"
                    "all runs alike: --train_dir, --batch_size, --lr, --without, --device, ...\n"
                    f"Unless --lr says another, the learning rate begins at {RATE:g}.",
        epilog="example: python ablation.py --gamma 3 10 --seeds 0 1")
    add = parser.add_argument_group("what").add_argument
    add("--gamma", nargs="*", type=float, default=[0, 0.05, 1, 3],
        help="further identity weights, with alpha and beta of the identity preset (0: what its "
             "alpha does by itself)")
    add("--seeds", nargs="+", type=not_negative, default=[0, 1, 2],
        help="seeds of each configuration")
    add("--start", help="generator to start from (default: the shipped one of the pixel loss)")
    add("--epochs", type=positive, default=15, help="GAN epochs of each run from there")
    add = parser.add_argument_group("evaluation").add_argument
    add("--last_k", type=positive, default=5, help="epochs to average at the end of each run")
    add("--judge", action="append", metavar="NAME|PATH",
        help="a face network that training never saw, as in evaluate.py; may be repeated "
             "(default: dlib, which needs requirements-judge.txt)")
    add = parser.add_argument_group("where").add_argument
    add("--out_dir", default="epochs/ablation", help="folder of the runs' folders")
    add("--results_dir", default="results", help="folder of ablation.csv, .md and .png")
    args, args.training = parser.parse_known_args(argv)
    for flag in args.training:
        if flag.split("=")[0] in OWN_FLAGS:
            raise InputError(f"{flag}: the ablation sets it for each run; leave it out")
    args.seeds = list(dict.fromkeys(args.seeds))
    if len(configurations(args.gamma)) < len(PRESETS) + len(set(args.gamma)):
        raise InputError(f"--gamma {' '.join(map(str, args.gamma))}: two of them are equal to six "
                         "digits, and their runs would share a folder")
    args.start = args.start or checkpoints.shipped_generator("pixel")
    args.judge = args.judge or ["dlib"]
    args.last_k = min(args.last_k, args.epochs)
    return args


def main(argv=None):
    keep_freed_memory()
    args = parse(argv)
    again = shlex.join(["python", "ablation.py", *(sys.argv[1:] if argv is None else argv)])
    # what could be refused after hours of training is loaded before
    training = args.training
    settings = train_identity.parse(training)
    embedders, labels = evaluate.load_embedders(settings.face_weights, args.judge)
    device, _, _ = set_up_machine(settings.device)
    if settings.precision == "auto":  # one for all runs, also if another machine makes some
        training = [*training, "--precision", fast_precision(device)]
    for flags in configurations(args.gamma).values():
        train_identity.parse([*training, *flags])
    folder = Path(args.results_dir)
    check_out_dir(folder, "--results_dir", train_dir=settings.train_dir,
                  valid_dir=settings.valid_dir)
    figures.check_ours([folder / f"ablation.{kind}" for kind in ("csv", "md", "png")],
                       "--results_dir")
    train_set, valid_set = load_data(settings)
    data = {name: {"n": len(photographs), "hash": photographs.digest()}
            for name, photographs in (("train", train_set), ("valid", valid_set))}
    del train_set  # each run reads its own
    runs = train_all(args, training, data, again)

    for network in embedders.values():
        network.to(device)
    per_image, per_run = measure_all(args, runs, valid_set, embedders, device)
    averaged, summary = average_seeds(per_image, per_run, runs)
    pairs, curves = differences(averaged, per_run, runs), learning_curves(runs)
    last = last_epochs(curves, args.last_k)
    configs = [checkpoints.read_config(folder / "config.json") for folder in runs.values()]
    weights = {name: {term: config["flags"][term] for term in ("alpha", "beta", "gamma")}
               for (name, _), config in zip(runs, configs)}
    compared = pairs
    if "gamma_0" in weights:
        same_alpha = {(name, seed): run for (name, seed), run in runs.items()
                      if weights[name]["alpha"] == weights["gamma_0"]["alpha"]}
        compared = pd.concat([pairs, differences(averaged, per_run, same_alpha, "gamma_0")])
    words = conditions(args, configs)

    table = wide(summary, pairs, last, weights)
    checkpoints.save_csv(table, folder / "ablation.csv")
    checkpoints.save_text(report(args, words, summary, labels, compared, last, weights),
                          folder / "ablation.md")
    blend = table[table["name"].str.startswith("blend ")].assign(weight=BLEND)
    figures.save_tradeoff(paired_intervals(table), curves, folder / "ablation.png", blend)
    print(words, *map(sentence, compared.itertuples()), sep="\n")
    print(f"wrote ablation.csv, ablation.md and ablation.png to {folder}/")


if __name__ == "__main__":
    run_script(main)
