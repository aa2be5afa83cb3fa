"""Draw a photo beside its label map; the README's picture was made like this.

After `make demo`:

    tl-label generate --images demo/photos-val --out demo/labels-val \
        --teacher tf_efficientnet_lite0 --checkpoint demo/teacher.pth --image-size 352
    python examples/label_map_picture.py --images demo/photos-val --labels demo/labels-val \
        --key n03877845/china --title "A photo and its label map" --out docs/images/label-map.jpg
"""

from pathlib import Path

import click

from tokenlabel.labeler.draw import draw_label_map, with_legend
from tokenlabel.labeler.images import load_image
from tokenlabel.labeler.label_map import decode
from tokenlabel.labeler.label_set import LabelSet
from tokenlabel.labeler.sources import open_source

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.option("--images", type=FOLDER, required=True, help="Photos in class folders.")
@click.option("--labels", type=FOLDER, required=True, help="Made from them by tl-label generate.")
@click.option("--key", required=True, help="Path of the photo below IMAGES without its suffix.")
@click.option("--title", help="A line above the picture.  [default: KEY]")
@click.option("--longest-px", default=560, show_default=True, help="Of photo and map each.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
def main(
    images: Path, labels: Path, key: str, title: str | None, longest_px: int, out: Path
) -> None:
    """Draw a photo beside its label map."""
    source, label_set = open_source(images), LabelSet.open(labels)
    samples = {sample.key: sample for sample in source.samples}
    if key not in samples or key not in label_set:
        known = ", ".join([key for key in samples if key in label_set][:5])
        raise click.ClickException(f"there is no labelled photo {key!r}; there are {known}, …")
    photo = load_image(source.read(samples[key]))
    label_map = decode(label_set.read(key), dictionary=label_set.dictionary)[0]
    drawing = draw_label_map(photo, label_map, source.class_names, longest_px=longest_px)
    with_legend(drawing, photo=photo, title=title or key).save(out, quality=88)


if __name__ == "__main__":
    main()
