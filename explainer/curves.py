"""A picture of how answers change while pixels go, or come, in the order of heatmaps."""

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..labeler.verify import Interval
from .perturb import ACCURACY_CURVES, Curve
from .scores import CONTROL, MEASURES, Faithfulness

_TITLES: dict[Curve, str] = {
    "positive": "positive: the hottest pixels go first",
    "negative": "negative: the coldest pixels go first",
    "insertion": "insertion: the hottest pixels come first",
    "deletion": "deletion: the hottest pixels go first",
}
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # told apart by the colour-blind
_CONTROL_COLOUR = "#707070"
_PANEL_INCHES = (5.2, 3.6)
_DPI = 110


def draw_curves(found: Faithfulness) -> bytes:
    """Draw a panel for each curve that was followed, a line for each method, as a PNG.

    Raises:
        ValueError: There is no curve.
    """
    names = list(found.methods[CONTROL].curves)
    if not names:
        raise ValueError("no curve was followed, so there is nothing to draw")
    num_cols = min(2, len(names))
    num_rows = -(-len(names) // num_cols)
    width, height = _PANEL_INCHES
    figure = Figure((width * num_cols, height * num_rows + 0.7), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(num_rows, num_cols, squeeze=False)
    for axes, name in zip(panels.flat, names):
        _panel(axes, name, found)
    for axes in panels.flat[len(names) :]:
        axes.set_axis_off()
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(_heading(found), fontsize=10)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _panel(axes: Axes, name: Curve, found: Faithfulness) -> None:
    is_accuracy = name in ACCURACY_CURVES
    colours = iter(_COLOURS)
    for method, scores in found.methods.items():
        curve = scores.curves[name]
        is_control = method == CONTROL
        _line(
            axes,
            [100 * x for x in curve.fractions],
            curve.accuracy if is_accuracy else curve.probability,
            method,
            _CONTROL_COLOUR if is_control else next(colours),
            "--" if is_control else "-",
        )
    better = "higher" if MEASURES[name].higher_is_better else "lower"
    axes.set_title(f"{_TITLES[name]} ({better} is better)", fontsize=10)
    axes.set_xlabel("pixels shown, %" if name == "insertion" else "pixels removed, %")
    agreement = "accuracy, %" if found.clean_accuracy else "same answer as of the whole image, %"
    axes.set_ylabel(agreement if is_accuracy else "probability of the class, %")
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, 100 * found.methods[CONTROL].curves[name].fractions[-1])
    axes.grid(alpha=0.3)


def _line(
    axes: Axes,
    x: Sequence[float],
    points: Sequence[Interval],
    label: str,
    colour: str,
    style: str,
) -> None:
    value, low, high = ([100 * each for each in own] for own in zip(*points, strict=True))
    axes.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
    axes.plot(x, value, style, color=colour, label=label, linewidth=1.6)


def _heading(found: Faithfulness) -> str:
    height, width = found.facts["view"]["image_size"]
    return (
        f"{found.facts['model']}, {height} × {width} px, {found.num_images:,} images; bands: 95 % "
        "intervals over images"
    )
