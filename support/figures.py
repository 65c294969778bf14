"""Every picture and plot that the scripts write.

Each plot must read in black and white: lines differ in dashes and markers, and carry their name at
their end instead of in a legend.
"""

import os
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from support.checkpoints import replacing
from support.cli import InputError

# matplotlib is imported where something is plotted: it would add a second to every --help.

SOFTWARE = "Identity-preserving super-resolution of faces"  # in each picture: we wrote it
# How our tables and pages begin, by suffix.
BEGINNINGS = {
    ".csv": (b"framing,model,", b"sweep,value,model,", b"protocol,framing,judge,",
             b"name,n,psnr_y,", b"Epoch,Loss_D,"),
    ".md": (b"## crop_", b"## whole_frames", b"## pairs, ", b"## gallery, ",
            b"# Ablation of the identity loss"),
    ".html": (b'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
              b"<title>Evaluation</title>",)}

# The report's "Results Summary": PSNR-Y in dB, SSIM, cosine.
REPORT = {
    "baseline": {"PSNR": 26.87, "SSIM": 0.764, "Cosine": 0.8404},
    "best visual": {"PSNR": 27.07, "SSIM": 0.771, "Cosine": 0.8406},
    "best identity": {"PSNR": 26.75, "SSIM": 0.759, "Cosine": 0.8630},
}
REPORT_DASHES = ((0, (1, 1)), (0, (4, 2)), (0, (8, 2, 1, 2)))

# (colour, dashes, marker); Okabe and Ito's colours, which most colour-blind people tell apart
STYLES = (("black", "-", "o"), ("#0072b2", (0, (5, 2)), "s"), ("#d55e00", (0, (1, 1)), "^"),
          ("#007f5f", (0, (6, 2, 1, 2)), "D"), ("#b0508a", (0, (3, 1, 1, 1)), "v"),
          ("#666666", (0, (8, 3)), "P"), ("#8a6d00", (0, (2, 2)), "X"))

# ---------------------------------------------------------------------------------------------
# Pictures


def to_image(tensor):
    """Float tensor (3, H, W) in [0, 1] -> PIL RGB picture, rounded to 8 bit."""
    array = tensor.detach().float().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def save_image(image, path):
    """A PIL picture to `path`, a PNG, atomically; its metadata say that we wrote it."""
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", SOFTWARE)
    with replacing(path) as temporary:
        image.save(temporary, pnginfo=mark)


def check_ours(paths, flag="--out_dir"):
    """Raise InputError naming the first of `paths` at which lies what this project did not write.

    flag: what the user may change to write elsewhere.
    """
    for path in filter(os.path.lexists, map(Path, paths)):
        if not (path.is_file() and is_marked(path)):
            raise InputError(f"{path} was not written by this project and is not overwritten; move "
                             f"it, or choose another {flag}")


def is_marked(path):
    """Whether a file is a PNG of `save_image` or `save_plot`, a table of ours, or an empty one."""
    if path.suffix in BEGINNINGS:
        with open(path, "rb") as file:
            beginning = file.read(100)
        return not beginning or beginning.startswith(BEGINNINGS[path.suffix])
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Software") == SOFTWARE
    except Exception:  # decoders raise anything on damaged bytes
        return False


def shorten(text, font, width):
    """`text`, its middle replaced by an ellipsis if it would be wider than `width` pixels."""
    short, kept = text, len(text)
    while font.getlength(short) > width and kept > 2:
        kept -= 1
        short = text[:(kept + 1) // 2] + "…" + text[len(text) - kept // 2:]
    return short


def grid(rows, headings, labels=None, captions=None):
    """Rows of PIL pictures -> one picture with a heading over each column, never scaled.

    labels: a word to the left of each row; captions: for each row a list with a line under each
    picture. The letters grow with the pictures; a text wider than its column loses its middle.
    """
    import matplotlib

    width = max(image.width for row in rows for image in row)
    heights = [max(image.height for image in row) for row in rows]
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf",
                              max(11, width // 12))
    gap, line = max(4, width // 32), round(1.4 * font.size)
    left = gap + (round(max(map(font.getlength, labels))) + gap if labels else 0)
    below = gap + (line if captions else 0)
    sheet = Image.new("RGB", (left + (width + gap) * len(headings),
                              gap + line + sum(heights) + below * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)

    def write(x, y, text):  # centred on x, in a line that starts at y
        draw.text((x, y + line // 2), shorten(text, font, width), "black", font, anchor="mm")

    centres = [left + (width + gap) * column + width // 2 for column in range(len(headings))]
    for x, heading in zip(centres, headings):
        write(x, gap // 2, heading)
    y = gap + line
    for r, row in enumerate(rows):
        if labels:
            draw.text((left - gap, y + heights[r] // 2), labels[r], "black", font, anchor="rm")
        for column, image in enumerate(row):
            sheet.paste(image, (centres[column] - image.width // 2, y))
            if captions:
                write(centres[column], y + heights[r], captions[r][column])
        y += heights[r] + below
    return sheet


def save_samples(path, rows):
    """samples/epoch_N.png: rows of bicubic, SR and HR, each (3, H, W) in [0, 1]."""
    rows = [[to_image(image) for image in row] for row in rows]
    save_image(grid(rows, ("bicubic", "SR", "HR")), path)


def save_comparison(path, columns, rows):
    """comparison.png, the report's Figure 1: one face per row, one method per column.

    columns: headings, such as ["LR", "bicubic", "netG_epoch_8_100", "HR"]; rows: dicts with
    "label" (printed at the left), "images" (PIL pictures; an LR one is enlarged to the size of the
    others) and "captions" (a short line under each). Every image pixel becomes a square of whole
    output pixels, so that nothing is smoothed: 3 x 3 for four columns of 128 px, 2 x 2 for six.
    """
    sizes = [max(image.size for image in row["images"]) for row in rows]
    width = max(sizes)[0]
    zoom = max(1, min(400 // width, 2150 // (width * len(columns))))
    pictures = [[image.convert("RGB").resize((w * zoom, h * zoom), Image.Resampling.NEAREST)
                 for image in row["images"]] for row, (w, h) in zip(rows, sizes)]
    save_image(grid(pictures, columns, [row["label"] for row in rows],
                    [row["captions"] for row in rows]), path)


# ---------------------------------------------------------------------------------------------
# Plots


def panels(mosaic, size, titles):
    """A matplotlib figure of `size` inches and its axes by name, in the manner of all our plots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = figure.subplot_mosaic(mosaic)
    for name, title in titles.items():
        axes[name].set_title(title, fontsize=10, loc="left", pad=16)
        axes[name].spines[["top", "right"]].set_visible(False)
        axes[name].tick_params(labelsize=8)
        axes[name].grid(color="0.92", linewidth=0.6)
    return figure, axes


def save_plot(figure, path):
    """A matplotlib figure to `path`, atomically; a PNG's metadata say that we wrote it."""
    mark = {"Software": SOFTWARE} if Path(path).suffix == ".png" else None
    with replacing(path) as temporary:
        figure.savefig(temporary, metadata=mark)


def draw_line(axes, x, y, style):
    """Plot the finite points of (x, y), NaN gaps bridged -> the last point, (nan, nan) if none.

    A logarithmic axis leaves out what is not positive.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    shown = np.isfinite(y) & ((y > 0) | (axes.get_yscale() != "log"))
    if not shown.any():
        return np.nan, np.nan
    colour, dashes, marker = style
    axes.plot(x[shown], y[shown], color=colour, linestyle=dashes, linewidth=1.6,
              marker=marker, markersize=4, markevery=max(1, shown.sum() // 10))
    return x[shown][-1], y[shown][-1]


def label_ends(axes, ends):
    """Write texts beside the axes, each as near to its point's height as the others allow.

    ends: (x, y, text, colour), x and y in data coordinates; NaN is skipped, the middle of a long
    text left out. The limits of the axes must be final.
    """
    axes.autoscale_view()  # matplotlib puts this off until it draws
    to_fraction = axes.transData + axes.transAxes.inverted()
    ends = sorted(((*to_fraction.transform((x, y)),
                    text if len(text) <= 40 else f"{text[:19]}…{text[-20:]}", colour)
                   for x, y, text, colour in ends if np.isfinite([x, y]).all()),
                  key=lambda end: end[1])
    heights = np.array([y for _, y, _, _ in ends])
    room = min(0.065, 1 / max(1, len(ends) - 1))
    for _ in range(200):  # neighbours that are too close push each other apart
        for i in range(len(heights) - 1):
            push = max(0, room - (heights[i + 1] - heights[i])) / 2
            heights[i:i + 2] += -push, push
        heights = heights.clip(0, 1)
    for (x, y, text, colour), height in zip(ends, heights):
        axes.plot([x, 1.03], [y, height], transform=axes.transAxes, clip_on=False, color=colour,
                  linewidth=0.5)
        # a file's name may hold bytes that are no text, and dollars, which would begin a formula
        axes.text(1.035, height, text.encode(errors="backslashreplace").decode(),
                  transform=axes.transAxes, va="center", fontsize=8, color=colour,
                  parse_math=False)


def save_curves(table, path):
    """curves.png: train_results.csv (a table of train_identity's `epoch_row`s) at a glance.

    The report validated whole frames: its values stand beside those of "frames".
    """
    shown = {  # panel: title, {label: column}, number format
        "loss": ("loss terms, unweighted, and their weighted sum L_total", {
            "L_total": "Loss_G", "pixel": "Pixel", "content": "Content", "identity": "Identity",
            "adversarial": "Adversarial", "discriminator": "Loss_D"}, "#.2g"),
        "D": ("discriminator: mean D(x) and D(G(z)), accuracy", {
            "D(x)": "Score_D", "D(G(z))": "Score_G", "accuracy": "D_accuracy"}, ".2f"),
        "PSNR": ("PSNR-Y (dB)", {"frames": "PSNR", "crops": "PSNR_crop"}, ".2f"),
        "SSIM": ("SSIM", {"frames": "SSIM", "crops": "SSIM_crop"}, ".3f"),
        "Cosine": ("cosine of face embeddings", {"frames": "Cosine", "crops": "Cosine_crop"},
                   ".4f"),
    }
    # each row a grid of its own: of panels that span columns, matplotlib 3.10 cuts the labels
    figure, axes = panels([[[["loss", "D"]]], [[["PSNR", "SSIM", "Cosine"]]]], (13, 7),
                          {name: title for name, (title, _, _) in shown.items()})
    axes["loss"].set_yscale("log")
    axes["D"].set_ylim(-0.03, 1.03)
    epochs = table["Epoch"].to_numpy()
    gan = epochs[table["Phase"] == "gan"]
    first, last = epochs[0] - 0.5, epochs[-1] + 0.5
    for name, (_, lines, digits) in shown.items():
        panel, ends = axes[name], []
        panel.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        panel.set_xlabel("epoch", fontsize=8)
        panel.set_xlim(first, last)
        for (text, column), style in zip(lines.items(), STYLES):
            x, y = draw_line(panel, epochs, table[column], style)
            ends.append((x, y, f"{text} {y:{digits}}", style[0]))
        if not panel.lines:
            panel.text(0.5, 0.5, "no values yet", transform=panel.transAxes, ha="center",
                       fontsize=9, color="0.4")
        for (model, values), dashes in zip(REPORT.items(), REPORT_DASHES):
            if name in values:
                panel.axhline(values[name], color="0.4", linewidth=0.8, linestyle=dashes)
                text = f"report's frames, {model} {values[name]:{digits}}"
                ends.append((last, values[name], text, "0.4"))
        label_ends(panel, ends)
        if 0 < len(gan) < len(epochs):
            panel.axvline(gan[0] - 0.5, color="0.3", linewidth=0.8)
            panel.text(gan[0] - 0.5, 1.01, "GAN phase", transform=panel.get_xaxis_transform(),
                       fontsize=7, color="0.3")
    save_plot(figure, path)


def save_tradeoff(table, curves, path, blend=None):
    """ablation.png: cosine against PSNR-Y, and both over the epochs.

    table: a row per configuration, columns name, psnr_y, cosine and the bars psnr_y_low,
    psnr_y_high, cosine_low, cosine_high (NaN: none); curves: columns name, seed, epoch, psnr_y,
    cosine; blend: columns weight, psnr_y, cosine, the path between two configurations. The
    report's points have a small panel of their own, as they may lie far away, and show in the
    large one where they are near.
    """
    figure, axes = panels(
        [["trade", "psnr_y"]] * 3 + [["trade", "cosine"]] + [["report", "cosine"]] * 2, (13, 8),
        {"trade": "identity against fidelity; bars: 95 % of the difference from baseline",
         "report": "the report's values, on CelebA-HQ",
         "psnr_y": "PSNR-Y (dB): mean over seeds (thin: each seed)",
         "cosine": "cosine: mean over seeds (thin: each seed)"})
    styles = {name: STYLES[i % len(STYLES)] for i, name in enumerate(table["name"])}
    trade, ends = axes["trade"], []
    for row in table.itertuples():
        colour, _, marker = styles[row.name]
        for x, y, cap in (((row.psnr_y_low, row.psnr_y_high), (row.cosine, row.cosine), "|"),
                          ((row.psnr_y, row.psnr_y), (row.cosine_low, row.cosine_high), "_")):
            trade.plot(x, y, color=colour, linewidth=0.9, marker=cap, markersize=7)
        trade.plot(row.psnr_y, row.cosine, color=colour, marker=marker, markersize=8)
        ends.append((row.psnr_y, row.cosine, row.name, colour))
    if blend is not None:
        trade.plot(blend["psnr_y"], blend["cosine"], color="0.3", linewidth=0.8, marker=".")
        for row in blend.itertuples():
            trade.annotate(f"{row.weight:g}", (row.psnr_y, row.cosine), (4, 3), fontsize=7,
                           textcoords="offset points", color="0.3")
        for row in blend.iloc[len(blend) // 2:][:1].itertuples():
            ends.append((row.psnr_y, row.cosine, "blend, one seed", "0.3"))

    limits = trade.axis()
    axes["report"].margins(0.4, 0.3)
    for panel in (trade, axes["report"]):
        panel.set_xlabel("PSNR-Y (dB)", fontsize=8)
        panel.set_ylabel("cosine", fontsize=8)
        for model, values in REPORT.items():
            point = values["PSNR"], values["Cosine"]
            panel.plot(*point, color="0.3", marker="o", markerfacecolor="white")
            panel.annotate(f"report, {model}", point, (7, 0), textcoords="offset points",
                           va="center", fontsize=8, color="0.3")
    trade.axis(limits)
    label_ends(trade, ends)

    for measure in ("psnr_y", "cosine"):
        panel, ends = axes[measure], []
        panel.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        panel.set_xlabel("epoch", fontsize=8)
        for name, style in styles.items():
            runs = curves[curves["name"] == name].dropna(subset=[measure])
            for _, run in runs.groupby("seed"):
                panel.plot(run["epoch"], run[measure], color=style[0], linewidth=0.5, alpha=0.5)
            mean = runs.groupby("epoch")[measure].mean()
            ends.append((*draw_line(panel, mean.index, mean, style), name, style[0]))
        label_ends(panel, ends)
    save_plot(figure, path)


def save_sweep(table, path):
    """sweep.png: what a generator gains over bicubic, against the framing.

    table: of `evaluate.sweep`, columns sweep ("shift" in px, "scale"), value, model and psnr_y,
    ssim and cosine with the ending _gain.
    """
    sweeps = [name for name in ("shift", "scale") if name in set(table["sweep"])]
    measures = {"psnr_y": "gain in PSNR-Y (dB)", "ssim": "gain in SSIM",
                "cosine": "gain in cosine"}
    words = {"shift": "centre crop, shifted right and down by (px)",
             "scale": "whole frame, face times as large"}
    figure, axes = panels([[f"{s} {m}" for m in measures] for s in sweeps],
                          (13, 3.6 * len(sweeps)),
                          {f"{s} {m}": title for s in sweeps for m, title in measures.items()})
    figure.get_layout_engine().set(hspace=0.08)  # a title keeps clear of the label above it
    for name in sweeps:
        for measure in measures:
            panel, ends = axes[f"{name} {measure}"], []
            panel.axhline(0, color="0.4", linewidth=0.8)
            panel.set_xlabel(words[name], fontsize=8)
            for model, style in zip(table["model"].unique()[1:], cycle(STYLES)):
                rows = table[(table["sweep"] == name) & (table["model"] == model)]
                rows = rows.sort_values("value")
                x, y = draw_line(panel, rows["value"], rows[f"{measure}_gain"], style)
                ends.append((x, y, model, style[0]))
            if np.isfinite([end[0] for end in ends]).any():
                ends.append((panel.get_xlim()[1], 0, "bicubic", "0.4"))
            label_ends(panel, ends)
    save_plot(figure, path)
