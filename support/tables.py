"""What evaluate.py and ablation.py tell of their measurements: means, differences, tables."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from support import checkpoints
from support.cli import markdown_table
from support.statistics import RESAMPLES, bootstrap, holm, p_value
from support.verification import recognition, similarity

LEVEL = 0.05  # of p-values, after Holm's correction
RATES = ("rank1", "rank5", "auc", "tar_at_far_1")


def is_distance(metric):
    """Whether a metric is dlib's distance: lower is better, NaN where it finds no face."""
    return metric.startswith("distance")


def metrics_of(per_image):
    """Names of the columns that hold a metric."""
    return [column for column in per_image.columns if column not in ("model", "image")]


def restored_exactly(per_image):
    """Names of the images whose PSNR-Y is infinite for a model, as a flat picture's is."""
    infinite = np.isinf(per_image["psnr_y"]) & (per_image["model"] != "HR")
    return list(per_image["image"][infinite].unique())


def left_out(per_image, metric):
    """Names of the images that a metric says nothing of, for any model."""
    if is_distance(metric):
        return list(per_image["image"][per_image[metric].isna()].unique())
    return restored_exactly(per_image) if metric == "psnr_y" else []


def remarks(per_image):
    """A sentence for each metric that leaves images out, with their names."""
    why = {metric: f"dlib finds no face on HR ({metric})" for metric in metrics_of(per_image)
           if is_distance(metric)}
    why["psnr_y"] = "restored without any error by a model (psnr_y)"
    total = per_image["image"].nunique()
    return [f"left out, {reason}, {len(images)} of {total}: {', '.join(images)}"
            for metric, reason in why.items() if (images := left_out(per_image, metric))]


def summarise(per_image, vectors, seed):
    """One row per model: means with their 95 % intervals, the pooled PSNR-Y, recognition.

    Pooled is the report's way: the PSNR of the mean squared error over all images. Every metric
    leaves out the same images for all models (`left_out`); n_dlib: those that dlib counts.
    """
    rows = []
    for name, table in per_image.groupby("model", sort=False):
        row = {"model": name, "n": len(table)}
        for metric in metrics_of(per_image):
            counted = ~table["image"].isin(left_out(per_image, metric))
            values = table[metric][counted].to_numpy()
            mean = values.mean() if len(values) else np.nan  # HR's PSNR with itself is infinite
            low, high = bootstrap(values, seed) if np.isfinite(mean) else (mean, mean)
            row |= {metric: mean, f"{metric}_low": low, f"{metric}_high": high}
            if is_distance(metric):
                row[metric.replace("distance", "n")] = counted.sum()
        mse = np.mean(10 ** (-table["psnr_y"] / 10))
        row["psnr_y_pooled"] = -10 * np.log10(mse) if mse else np.inf
        for metric in metrics_of(per_image)[2:]:
            suffix = metric.removeprefix("cosine").removeprefix("distance")  # _casia-webface
            for rate, values in rates_of(vectors, name, metric, seed).items():
                row |= dict(zip([f"{rate}{suffix}{end}" for end in ("", "_low", "_high")], values))
        rows.append(row)
    return pd.DataFrame(rows)


def rates_of(vectors, model, metric, seed):
    """`recognition` of a model's faces among HR's; dlib's, of those that it finds."""
    probes, gallery = vectors[model, metric], vectors["HR", metric]
    if is_distance(metric):
        seen = np.isfinite(gallery).all(1)
        probes, gallery = probes[seen], gallery[seen]
    if not len(gallery):
        return dict.fromkeys(RATES, (np.nan,) * 3)
    return recognition(similarity(probes, gallery, is_distance(metric)), seed=seed)


def differences(per_image, seed, names=None, minus=None):
    """Every pair of models, metric by metric: the mean paired difference with its interval.

    names: the models to compare, all but HR unless given; minus: the one that all others are
    compared with, if not with each other. What any model of the table leaves out is left out. p:
    of random sign flips, p_holm: corrected for all comparisons of the metric; below 0.05 the
    difference is called significant.
    """
    if names is None:
        names = [m for m in per_image["model"].unique() if m != "HR"]
    pairs = [(minus, name) for name in names if name != minus] if minus else combinations(names, 2)
    rows = []
    for a, b in pairs:
        of_a, of_b = (per_image[per_image["model"] == m].set_index("image") for m in (a, b))
        for metric in metrics_of(per_image):
            values = of_b[metric] - of_a[metric]
            values = values.drop(left_out(per_image, metric)).to_numpy()
            mean = values.mean() if len(values) else np.nan
            low = high = p = np.nan
            if np.isfinite(mean):
                (low, high), p = bootstrap(values, seed), p_value(values, seed)
            rows.append({"model": b, "minus": a, "metric": metric, "difference": mean, "low": low,
                         "high": high, "p": p})
    return correct(pd.DataFrame(rows, columns=["model", "minus", "metric", "difference", "low",
                                               "high", "p"]))


def correct(pairs):
    """`differences`, or some of them, with p_holm and significant for just these."""
    p_holm = pairs.groupby("metric")["p"].transform(holm)
    return pairs.assign(p_holm=p_holm, significant=p_holm < LEVEL)


def verdict(pair):
    """A row of `differences` in words."""
    if not pair.significant:
        return "not significant"
    is_better = (pair.difference > 0) != is_distance(pair.metric)
    return "significantly better" if is_better else "significantly worse"


# ---------------------------------------------------------------------------------------------
# Markdown


def with_interval(value, low, high, digits, sign=""):
    """A cell: the value and its interval; a dash for what is none, as HR's PSNR-Y with itself."""
    if not np.isfinite(value):
        return "-"
    value, low, high = (f"{number:{sign}.{digits}f}" for number in (value, low, high))
    return value if "nan" in low else f"{value} [{low}, {high}]"  # a single image has no interval


def cells(summary):
    """The summary as texts, figures with their intervals -> (head of the table, its rows)."""
    measured = [c for c in summary.columns if f"{c}_low" in summary.columns]
    rates = [c for c in measured if c.startswith(RATES)]
    metrics = [c for c in measured if c not in rates]
    def cell(row, column, digits):
        return with_interval(*(row[f"{column}{end}"] for end in ("", "_low", "_high")), digits)

    rows = []
    for _, row in summary.iterrows():
        pooled = row["psnr_y_pooled"]
        rows.append([row["model"], str(row["n"]),
                     *(cell(row, metric, 2 if metric == "psnr_y" else 4) for metric in metrics),
                     f"{pooled:.2f}" if np.isfinite(pooled) else "-",
                     *(cell(row, rate, 3) for rate in rates)])
    return ["model", "n", *metrics, "psnr_y_pooled", *rates], rows


def words_of(summary, labels):
    """A line on units, intervals and face networks."""
    counts = [c for c in summary.columns if c.startswith("n_")]
    return "; ".join([
        "PSNR-Y in dB; [95 % bootstrap interval: of images, of people for the rates]",
        *(f"{name}: {label}" for name, label in labels.items()),
        *(f"distance{count[1:]}: lower is better; of the {summary[count].iloc[0]:.0f} photographs "
          "with a face that it finds on HR" for count in counts)])


def markdown(summary, labels):
    """The summary as a Markdown table, figures with their intervals, and what measured them."""
    return "\n".join([*markdown_table(*cells(summary)), "", words_of(summary, labels), ""])


def difference_lines(pairs):
    """Lines of Markdown: each paired difference with its interval, p and verdict."""
    lines = [f"- {p.model} - {p.minus}: {p.metric} "
             f"{with_interval(p.difference, p.low, p.high, 4, '+')}, "
             + (f"p {p.p_holm:.4f}, {verdict(p)}" if np.isfinite(p.p_holm) else "not decided")
             for p in pairs.itertuples()]
    if lines:
        of_each = len(pairs) // pairs["metric"].nunique()
        lines += ["", f"p: of {RESAMPLES:,} random sign flips of the paired differences, corrected "
                      f"by Holm for the {of_each} comparison(s) of each metric; significant: p < "
                      f"{LEVEL}"]
    return "\n".join(lines) + "\n" * bool(lines)


def write_people(folder, rows, labels):
    """people.csv and people.md in `folder`: recognition against other photographs; printed, too.

    rows: dicts with protocol, framing, judge, model, n and {rate: (value, low, high)}.
    """
    text = ""
    for key in dict.fromkeys((row["protocol"], row["framing"], row["judge"]) for row in rows):
        of_key = [row for row in rows if (row["protocol"], row["framing"], row["judge"]) == key]
        rates = [name for name, value in of_key[0].items() if isinstance(value, tuple)]
        lines = [[row["model"], row["n"], *(with_interval(*row[rate], 3) for rate in rates)]
                 for row in of_key]
        text += "\n".join([f"## {key[0]}, {key[1]}, {key[2]}", "", labels[key[2]], "",
                           *markdown_table(["model", "n", *rates], lines), "", ""])
    text += ("Probes are restored, their counterparts are HR of another photograph; n: pairs, or "
             "probes of the gallery; FAR in per cent; [95 % bootstrap interval of people]\n")
    flat = [{name: value for name, value in row.items() if not isinstance(value, tuple)}
            | {f"{rate}{end}": value for rate, values in row.items() if isinstance(values, tuple)
               for end, value in zip(("", "_low", "_high"), values)} for row in rows]
    checkpoints.save_csv(pd.DataFrame(flat), folder / "people.csv")
    checkpoints.save_text(text, folder / "people.md")
    print(text, end="")


def write_tables(folder, tables, labels, pictures):
    """CSV and Markdown of all framings in `folder`; prints what a person wants to know.

    tables: {framing: (per image, summary, differences)}; pictures: {framing: rows of faces}.
    -> the sections of `report.save_report`.
    """
    folder, text, sections = Path(folder), "", []
    for n, name in enumerate(("per_image", "summary", "differences")):
        whole = pd.concat([table[n].assign(framing=framing) for framing, table in tables.items()])
        checkpoints.save_csv(whole[["framing", *whole.columns[:-1]]], folder / f"{name}.csv")
    for framing, (per_image, summary, pairs) in tables.items():
        lines, left = difference_lines(pairs), remarks(per_image)
        text += f"## {framing}\n\n{markdown(summary, labels)}\n"
        text += "".join(f"{remark}\n\n" for remark in left) + f"{lines}\n"
        notes = [words_of(summary, labels), *left]
        shown = [line.removeprefix("- ") for line in lines.splitlines() if line]
        sections.append((framing, cells(summary), notes, shown, pictures[framing]))
    checkpoints.save_text(text, folder / "summary.md")
    print(text, end="")
    return sections
