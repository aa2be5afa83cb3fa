"""Names and colours of the classes of well-known segmentation data sets, and colours for others.

The lists are facts of the data sets: SceneParse150, the part of ADE20K that is segmented
(http://sceneparsing.csail.mit.edu), Cityscapes' 19 evaluated classes
(https://www.cityscapes-dataset.com), and Pascal VOC's 21 (http://host.robots.ox.ac.uk/pascal/VOC).
"""

import colorsys
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

from ..labeler.draw import PALETTE, Colour


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassSet:
    """Classes in the order of their indices."""

    names: tuple[str, ...]
    colours: tuple[Colour, ...]


def class_set_of(names: Sequence[str]) -> ClassSet:
    """Give classes colours: their data set's own where the names are those of a known one."""
    for known in CLASS_SETS.values():
        if [_plain(name) for name in names] == [_plain(name) for name in known.names]:
            return ClassSet(names=tuple(names), colours=known.colours)
    return ClassSet(names=tuple(names), colours=generated_colours(len(names)))


def numbered(num_classes: int) -> ClassSet:
    """Name classes whose names nobody knows."""
    names = tuple(f"class {index}" for index in range(num_classes))
    return ClassSet(names=names, colours=generated_colours(num_classes))


def generated_colours(number: int) -> tuple[Colour, ...]:
    """Choose colours that are all different, the first ones as different as can be."""
    return tuple(islice(_distinct(), number))


def voc_colour(index: int) -> Colour:
    """Compute Pascal VOC's colour of a class: its bits, dealt out to the channels from the top."""
    channels = [0, 0, 0]
    for bit in range(24):
        channels[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
    return channels[0], channels[1], channels[2]


def _distinct() -> Iterator[Colour]:
    seen = set(PALETTE)
    yield from PALETTE
    for number in count():
        # Steps of the golden ratio keep hues apart, however many there are.
        hue = number * 0.61803399 % 1
        lightness, saturation = ((0.5, 0.85), (0.33, 0.7), (0.72, 0.75))[number % 3]
        red, green, blue = colorsys.hls_to_rgb(hue, lightness, saturation)
        colour = (round(255 * red), round(255 * green), round(255 * blue))
        if colour not in seen:
            seen.add(colour)
            yield colour


def _plain(name: str) -> str:
    """Take the first of several synonyms, as ADE20K's own list has them."""
    return re.split("[,;]", name)[0].strip().lower().replace("_", " ")


def _parse(names: str, colours: str) -> ClassSet:
    codes = colours.split()
    return ClassSet(
        names=tuple(" ".join(name.split()) for name in names.split(",")),
        colours=tuple((int(c[:2], 16), int(c[2:4], 16), int(c[4:], 16)) for c in codes),
    )


_VOC_NAMES = """
    background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse
    motorbike person pottedplant sheep sofa train tvmonitor
"""
CLASS_SETS = {
    "ade20k": _parse(
        """
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
    person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa,
    shelf, house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp,
    bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter, sand,
    sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool
    table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet,
    flower, book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair,
    boat, bar, arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning,
    streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land,
    bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer
    belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag,
    minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle,
    lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray,
    ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass,
    clock, flag
    """,
        """
    787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d
    787846 08ff33 ff0652 8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0
    0907e6 dcdcdc ff095c 7009ff 08ffd6 07ffe0 ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06
    ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00 1fff00
    ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff 00ff70
    00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99
    ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52
    000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00
    08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070 5cff00 00e0ff 70e0ff 46b8a0 a300ff
    9900ff 47ff00 ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500 0abed4 d6ff00
    00ccff 1400ff ffff00 0099ff 0029ff 00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8
    005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
    """,
    ),
    "cityscapes": _parse(
        """
    road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation,
    terrain, sky, person, rider, car, truck, bus, train, motorcycle, bicycle
    """,
        """
    804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000
    00008e 000046 003c64 005064 0000e6 770b20
    """,
    ),
    "voc": ClassSet(
        names=tuple(_VOC_NAMES.split()),
        colours=tuple(voc_colour(index) for index in range(21)),
    ),
}
"""By name. ADE20K's colours are not all different: road and skyscraper share theirs."""
