"""Objects are found as by looking at every pixel of the frame, label by label."""

import numpy as np
import torch
from scipy import ndimage

from fastgrpo.shapes import verifier
from fastgrpo.shapes.verifier import Found, find_objects
from fastgrpo.shapes.world import BACKGROUND, SHAPES, all_captions, coverage, draw, sample_scene


def expected_objects(image_HWC: np.ndarray) -> list[Found]:
    difference = image_HWC.astype(np.float32) - np.array(BACKGROUND, dtype=np.float32)
    along = difference @ verifier._DIRECTIONS.T / verifier._LENGTHS
    color = along.argmax(axis=-1)
    best = np.take_along_axis(along, color[..., None], axis=-1)[..., 0]
    is_object = best >= verifier._MIN_BLEND * verifier._LENGTHS[color]
    is_object &= best >= verifier._MIN_COSINE * np.linalg.norm(difference, axis=-1)
    found = []
    for index, name in enumerate(verifier._NAMES):
        labels, count = ndimage.label(is_object & (color == index))
        for label in range(1, count + 1):
            mask = labels == label
            area = int(mask.sum())
            if area >= verifier._MIN_AREA:
                rows, columns = np.nonzero(mask)
                x, y = float(columns.mean()) + 0.5, float(rows.mean()) + 0.5
                overlap = {}
                for shape in SHAPES:
                    ideal = coverage(shape, x, y, float(np.sqrt(area / np.pi))) >= 0.5
                    overlap[shape] = float((mask & ideal).sum() / (mask | ideal).sum())
                found.append(Found(name, x, y, area, overlap))
    return found


def test_objects_are_those_of_the_plain_search_to_the_bit() -> None:
    generator = np.random.default_rng(0)
    scenes_BCHW = draw([sample_scene(caption, generator) for caption in all_captions()])
    noise_BCHW = torch.randn(scenes_BCHW.shape, generator=torch.Generator().manual_seed(0))
    # blurred, torn by noise, two in one, and noise in large patches
    patches_BCHW = torch.nn.functional.interpolate(noise_BCHW[:100, :, ::8, ::8], scale_factor=8)
    images = [
        draw([[]]),
        scenes_BCHW,
        torch.nn.functional.avg_pool2d(scenes_BCHW, 7, stride=1, padding=3),
        scenes_BCHW + 0.15 * noise_BCHW,
        torch.maximum(scenes_BCHW, scenes_BCHW.roll(1, dims=0)),
        (patches_BCHW / 4 + 0.5).clamp(0, 1),
    ]
    images_BHWC = torch.cat(images).permute(0, 2, 3, 1).numpy()
    sizes = set()
    for image_HWC in images_BHWC:
        found = find_objects(image_HWC)
        assert found == expected_objects(image_HWC)
        sizes.add(len(found))
    assert sizes >= {0, 1, 2, 3, 4, 5, 6}
