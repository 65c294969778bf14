"""Every picture and plot that the scripts write.

`python figures.py` draws the README's pipeline.svg. Each plot must read in black and white: lines
differ in dashes and markers, and carry their name at their end instead of in a legend.
"""

import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from checkpoints import replacing
from data_utils import to_image

# matplotlib is imported where something is plotted: it would add a second to every --help.

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


def save_image(image, path):
    """A PIL picture to `path`, atomically."""
    with replacing(path) as temporary:
        image.save(temporary)


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


def save_samples(path, restored, sr, hr):
    """samples/epoch_N.png: a row of bicubic | SR | HR per image; (N, 3, H, W) in [0, 1] each."""
    rows = [[to_image(image) for image in row] for row in zip(restored, sr, hr)]
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

    ends: (x, y, text, colour), x and y in data coordinates; NaN is passed by. The limits of the
    axes must be final.
    """
    axes.autoscale_view()  # matplotlib puts this off until it draws
    to_fraction = axes.transData + axes.transAxes.inverted()
    ends = sorted(((*to_fraction.transform((x, y)), text, colour)
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
        axes.text(1.035, height, text, transform=axes.transAxes, va="center", fontsize=8,
                  color=colour)


def save_curves(table, path):
    """curves.png: train_results.csv (a table of train_identity's `epoch_row`s) at a glance."""
    shown = {  # panel: title, {label: column}, number format
        "loss": ("loss terms, unweighted, and their weighted sum L_total", {
            "L_total": "Loss_G", "pixel": "Pixel", "content": "Content", "identity": "Identity",
            "adversarial": "Adversarial", "discriminator": "Loss_D"}, "#.2g"),
        "D": ("discriminator: mean D(x) and D(G(z)), accuracy", {
            "D(x)": "Score_D", "D(G(z))": "Score_G", "accuracy": "D_accuracy"}, ".2f"),
        "PSNR": ("PSNR-Y (dB)", {"this run": "PSNR"}, ".2f"),
        "SSIM": ("SSIM", {"this run": "SSIM"}, ".3f"),
        "Cosine": ("cosine of face embeddings", {"this run": "Cosine"}, ".4f"),
    }
    figure, axes = panels([["loss"] * 3 + ["D"] * 3, ["PSNR"] * 2 + ["SSIM"] * 2 + ["Cosine"] * 2],
                          (13, 7), {name: title for name, (title, _, _) in shown.items()})
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
                ends.append((last, values[name], f"report, {model} {values[name]:{digits}}", "0.4"))
        label_ends(panel, ends)
        if 0 < len(gan) < len(epochs):
            panel.axvline(gan[0] - 0.5, color="0.3", linewidth=0.8)
            panel.text(gan[0] - 0.5, 1.01, "GAN phase", transform=panel.get_xaxis_transform(),
                       fontsize=7, color="0.3")
    with replacing(path) as temporary:
        figure.savefig(temporary)


def save_tradeoff(table, curves, path, blend=None):
    """ablation.png: cosine against PSNR-Y, and both over the epochs.

    table: a row per configuration, columns name, psnr_y, cosine and their 95 % intervals
    psnr_y_low, psnr_y_high, cosine_low, cosine_high; curves: columns name, seed, epoch, psnr_y,
    cosine; blend: columns weight, psnr_y, cosine, the path between two configurations. The
    report's points have a small panel of their own, as they may lie far away, and show in the
    large one where they are near.
    """
    figure, axes = panels(
        [["trade", "psnr_y"]] * 3 + [["trade", "cosine"]] + [["report", "cosine"]] * 2, (13, 8),
        {"trade": "identity against fidelity, with 95 % intervals",
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
        between = blend[blend["weight"].between(0, 1, inclusive="neither")]
        for row in between.itertuples():
            trade.annotate(f"{row.weight:g}", (row.psnr_y, row.cosine), (4, 3), fontsize=7,
                           textcoords="offset points", color="0.3")
        for row in between.iloc[len(between) // 2:][:1].itertuples():
            ends.append((row.psnr_y, row.cosine, "blend, by weight", "0.3"))

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
    with replacing(path) as temporary:
        figure.savefig(temporary)


# ---------------------------------------------------------------------------------------------
# The pipeline, for the README

# A drawn face in 100 x 100 units, and its middle at low resolution (a colour per letter).
FACE = """<rect width="100" height="100" fill="#b9d3e6"/>
<path d="M15 100Q22 80 50 80Q78 80 85 100Z" fill="#54708a"/>
<ellipse cx="50" cy="47" rx="24" ry="30" fill="#4a3427"/>
<ellipse cx="50" cy="53" rx="19" ry="26" fill="#e3b795"/>
<path d="M42 48v.1M58 48v.1" stroke="#222" stroke-width="5" stroke-linecap="round"/>
<path d="M49 53L48 60H51M42 67Q50 73 58 67" fill="none" stroke="#8d5a44" stroke-width="2"/>"""
PIXELS = "hhhhhhhh hhsssshh hssssssh hsessesh hssssssh hssnsssh hssmmssh bhsssshb".split()
COLOURS = {"h": "#5f4636", "s": "#dfb392", "e": "#6e5a50", "n": "#c49778", "m": "#b37f64",
           "b": "#93a9b8"}


def save_pipeline(path):
    """pipeline.svg: from a photograph to L_total; white behind, so that it suits dark pages too."""
    parts = []

    def text(x, y, words, weight="normal", size=12, anchor="middle"):
        words = re.sub(r"_(\w+)([^L]*)",  # L_total: a subscript, then up again
                       r'<tspan dy="3" font-size="75%">\1</tspan><tspan dy="-3">\2</tspan>', words)
        parts.append(f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" '
                     f'text-anchor="{anchor}">{words}</text>')

    def box(x, y, width, height, *lines, fill="#f6f8fa"):
        parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" '
                     f'fill="{fill}" stroke="#57606a"/>')
        for n, words in enumerate(lines):
            text(x + width / 2, y + height / 2 + 4 + 18 * n - 9 * (len(lines) - 1), words)

    def arrow(*points, head="url(#head)"):
        parts.append(f'<path d="M{"L".join(f"{x} {y}" for x, y in points)}" fill="none" '
                     f'stroke="#1f2328" stroke-width="1.5" marker-end="{head}"/>')

    def picture(x, name, size, view, content):
        parts.append(f'<svg x="{x}" y="44" width="96" height="96" viewBox="{view}">{content}</svg>')
        text(x + 48, 158, name, "bold")
        text(x + 48, 174, size)

    pixels = "".join(f'<path d="M{x} {y}h1v1h-1z" fill="{COLOURS[letter]}"/>'
                     for y, row in enumerate(PIXELS) for x, letter in enumerate(row))
    square = '<path d="M25 25h50v50h-50z" fill="none" stroke="#000" stroke-dasharray="3 2"/>'
    picture(24, "frame", "256 × 256", "0 0 100 100", FACE + square)
    picture(192, "HR", "128 × 128", "25 25 50 50", FACE)
    picture(360, "LR", "16 × 16", "0 0 8 8", pixels)
    picture(860, "SR", "128 × 128", "25 25 50 50", FACE)
    for left, right, *words in ((124, 188, "centre", "crop"), (292, 356, "bicubic", "÷ 8"),
                                (460, 484), (832, 856)):
        arrow((left, 92), (right, 92))
        for n, word in enumerate(words):
            text((left + right) / 2, 84 + 24 * n, word)
    box(488, 36, 344, 112, fill="#ddf4ff")
    text(660, 58, "Generator", "bold", 14)
    for x, width, *words in ((496, 48, "9×9", "conv"), (550, 76, "5 residual", "blocks"),
                             (632, 84, "3 sub-pixel", "blocks"), (722, 48, "9×9", "conv"),
                             (776, 48, "tanh")):
        box(x, 70, width, 66, *words, fill="#fff")

    arrow((240, 182), (240, 212), head="")
    arrow((908, 182), (908, 212), head="")
    arrow((136, 212), (908, 212), head="")
    text(490, 205, "SR and HR")
    for n, (loss, weight, *words) in enumerate((
            ("L_pixel", "× 1", "mean squared error", "of the pixels"),
            ("L_content", "× α (alpha)", "VGG16 features[:31]", "mean squared error"),
            ("L_GAN", "× β (beta)", "Discriminator", "real HR or generated SR?"),
            ("L_identity", "× γ (gamma)", "InceptionResnetV1 embeddings", "mean squared error"))):
        x = 24 + 236 * n
        arrow((x + 112, 212), (x + 112, 236))
        box(x, 240, 224, 78, "", *words, fill="#fff8c5" if loss == "L_identity" else "#f6f8fa")
        text(x + 112, 261, loss, "bold", 14)
        arrow((x + 112, 318), (x + 112, 358))
        text(x + 124, 343, weight, anchor="start")
    box(24, 362, 932, 44)
    text(490, 389, "L_total = L_pixel + α L_content + β L_GAN + γ L_identity", "bold", 16)

    with replacing(path) as temporary:
        temporary.write_bytes((
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 14 980 412" role="img" '
            'font-family="Helvetica, Arial, sans-serif" fill="#1f2328">\n'
            "<title>From a photograph to L_total</title>\n"
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
            'markerHeight="8" markerUnits="userSpaceOnUse" orient="auto">'
            '<path d="M0 0L8 4L0 8z"/></marker>\n'
            '<rect x="1" y="15" width="978" height="410" rx="12" fill="#fff" stroke="#d0d7de"/>\n'
            + "\n".join(parts) + "\n</svg>\n").encode())


if __name__ == "__main__":
    save_pipeline(Path(__file__).with_name("pipeline.svg"))
