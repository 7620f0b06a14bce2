"""The mouth mask: latent cells of mouth boxes against brute force, at borders, without faces, and from bad input."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from avlit.mouth_mask import Box, draw_boxes, mouth_coverage, mouth_mask
from avlit.timing import VIDEO_FACTORS, Timing
from data.corpus.clips import make_clip
from data.corpus.settings import CorpusSettings


def timing_of(*, factors: tuple[int, int], latent_frames: int, cells: tuple[int, int]) -> Timing:
    temporal, spatial = factors
    return Timing(
        fps=24,
        num_frames=1 + temporal * (latent_frames - 1),
        height=cells[0] * spatial,
        width=cells[1] * spatial,
        rate_hz=16000,
        temporal_factor=temporal,
        spatial_factor=spatial,
    )


SMALL = timing_of(factors=(4, 8), latent_frames=3, cells=(4, 6))
"""9 frames of 32x48 pixels: windows {0}, {1..4}, {5..8}."""


def mask_of(boxes: list[list[Box]], timing: Timing = SMALL) -> torch.Tensor:
    return mouth_mask(boxes, timing=timing, sample="clip-7")


def cells(mask: torch.Tensor) -> set[tuple[int, int, int]]:
    return {tuple(place) for place in mask.nonzero().tolist()}


def brute_force(boxes: list[list[Box]], timing: Timing) -> set[tuple[int, int, int]]:
    """Cell by cell: is it between the lowest and the highest rounded edge of a person's boxes in its window?"""
    s, t_s = timing.spatial_factor, timing.temporal_factor
    found = set()
    height, width = timing.latent_size
    for latent_frame, y, x in product(range(timing.latent_frames), range(height), range(width)):
        last = latent_frame * t_s
        window = boxes[0:1] if latent_frame == 0 else boxes[last - t_s + 1 : last + 1]
        for person in range(max(map(len, boxes))):
            clipped = [
                (max(b[0], 0), max(b[1], 0), min(b[2], timing.width), min(b[3], timing.height))
                for b in (frame[person] for frame in window if person < len(frame))
            ]
            seen = [b for b in clipped if b[2] > b[0] and b[3] > b[1]]
            if not seen:
                continue
            is_in_row = any(y >= math.floor(b[1] / s) for b in seen) and any(y < math.ceil(b[3] / s) for b in seen)
            is_in_column = any(x >= math.floor(b[0] / s) for b in seen) and any(x < math.ceil(b[2] / s) for b in seen)
            if is_in_row and is_in_column:
                found.add((latent_frame, y, x))
    return found


def random_boxes(rng: np.random.Generator, timing: Timing) -> list[list[Box]]:
    """Boxes of up to three persons who come and go, some at or over a border or empty, some on cell edges."""
    size = np.array([timing.width, timing.height])
    boxes = []
    for _ in range(timing.num_frames):
        persons = []
        for _ in range(rng.integers(0, 4)):
            corners = np.sort(rng.uniform(-0.3 * size, 1.3 * size, (2, 2)), axis=0)  # x, y of both corners
            if rng.random() < 0.3:
                corners = np.round(corners / timing.spatial_factor) * timing.spatial_factor
            if rng.random() < 0.1:
                corners[1] = corners[0]
            persons.append(tuple(corners.ravel().tolist()))
        boxes.append(persons)
    return boxes


@pytest.mark.parametrize("factors", sorted({*VIDEO_FACTORS.values(), (1, 8), (8, 32), (2, 4)}))
def test_mask_equals_brute_force_for_any_factors(factors: tuple[int, int]):
    rng = np.random.default_rng(sum(factors))
    for _ in range(40):
        timing = timing_of(factors=factors, latent_frames=int(rng.integers(1, 5)), cells=(5, 7))
        boxes = random_boxes(rng, timing)
        boxes[-1].append((1.0, 1.0, 2.0, 2.0))
        assert cells(mask_of(boxes, timing)) == brute_force(boxes, timing)


def test_corpus_mouths_lie_inside_their_mask_in_every_frame():
    settings = CorpusSettings(num_frames=9, height=64, width=64, fps=12)
    timing = Timing(fps=12, num_frames=9, height=64, width=64, rate_hz=16000)
    clip = make_clip("multiple_characters", 3, settings)
    mask = mask_of(clip.mouth_boxes, timing)
    for frame, persons in enumerate(clip.mouth_boxes):
        for x1, y1, x2, y2 in persons:
            rows, columns = slice(int(y1 // 8), math.ceil(y2 / 8)), slice(int(x1 // 8), math.ceil(x2 / 8))
            assert mask[timing.latent_frame_of(frame), rows, columns].all()
    assert 0 < mouth_coverage(mask) < 0.5


def test_edges_are_rounded_outwards_and_whole_cells_stay_whole():
    inside: list[list[Box]] = [[(8.0, 8.0, 16.0, 16.0)], *[[]] * 8]
    assert cells(mask_of(inside)) == {(0, 1, 1)}
    over: list[list[Box]] = [[(7.99, 8.0, 16.01, 16.0)], *[[]] * 8]
    assert cells(mask_of(over)) == {(0, 1, 0), (0, 1, 1), (0, 1, 2)}


def test_first_frame_has_a_window_of_its_own():
    box: Box = (0.0, 0.0, 8.0, 8.0)
    for frame, latent_frame in ((0, 0), (1, 1), (4, 1), (5, 2), (8, 2)):
        boxes = [[box] if at == frame else [] for at in range(9)]
        assert cells(mask_of(boxes)) == {(latent_frame, 0, 0)}


def test_moving_mouth_is_enclosed_over_its_window():
    boxes: list[list[Box]] = [[]] + [[(8.0 * at, 0.0, 8.0 * at + 8, 8.0)] for at in range(4)] + [[]] * 4
    assert cells(mask_of(boxes)) == {(1, 0, x) for x in range(4)}


def test_each_person_is_enclosed_alone_and_cells_are_united():
    left, right, unseen = (0.0, 0.0, 8.0, 8.0), (40.0, 24.0, 48.0, 32.0), (0.0, 0.0, 0.0, 0.0)
    both = {(1, 0, 0), (1, 3, 5)}
    assert cells(mask_of([[], [left, right], [left, right], [left], [left, right], *[[]] * 4])) == both
    assert cells(mask_of([[], [left, right], [unseen, right], [unseen, right], [], *[[]] * 4])) == both
    enclosed = cells(mask_of([[], [left], [right], [], [], *[[]] * 4]))
    assert len(enclosed) == 24, "one person who moves that far: the whole frame"


def test_without_faces_no_cell_is_mouth():
    mask = mask_of([[]] * 9)
    assert mask.shape == (3, 4, 6) and mask.dtype == torch.bool
    assert not mask.any() and mouth_coverage(mask) == 0


def test_boxes_are_cut_at_the_border_and_those_outside_are_no_mouth():
    whole = [[(-5.0, -5.0, 500.0, 500.0)]] * 9
    assert mask_of(whole).all() and mouth_coverage(mask_of(whole)) == 1
    outside: list[list[Box]] = [[(48.0, 0.0, 60.0, 8.0)], *[[(-9.0, 0.0, 0.0, 8.0)]] * 8]
    assert not mask_of(outside).any()
    corner: list[list[Box]] = [[(47.5, 31.5, 60.0, 60.0)], *[[]] * 8]
    assert cells(mask_of(corner)) == {(0, 3, 5)}


def test_coverage_is_of_each_sample():
    masks = torch.stack([mask_of([[(0.0, 0.0, 8.0, 8.0)]] * 9), mask_of([[]] * 9)])  # [B, T, h, w]
    assert mouth_coverage(masks).tolist() == pytest.approx([1 / 24, 0])


@pytest.mark.parametrize("count", [0, 8, 10])
def test_boxes_of_another_number_of_frames_are_refused_with_the_sample(count: int):
    with pytest.raises(ValueError, match=f"sample clip-7: has mouth boxes of {count} frames, but 9 frames"):
        mask_of([[]] * count)


@pytest.mark.parametrize(
    "box",
    [
        (5.0, 0.0, 4.0, 8.0),
        (0.0, 5.0, 8.0, 4.0),
        (0.0, 0.0, 8.0),
        (0.0, 0.0, 8.0, 8.0, 1.0),
        (0.0, 0.0, math.nan, 8.0),
        (0.0, 0.0, math.inf, 8.0),
        ("a", 0.0, 8.0, 8.0),
        (None, 0.0, 8.0, 8.0),
        7.0,
    ],
)
def test_malformed_box_is_refused_with_sample_frame_and_person(box: Box):
    boxes: list[list[Box]] = [[] for _ in range(9)]
    boxes[3] = [(0.0, 0.0, 8.0, 8.0), box]
    with pytest.raises(
        ValueError, match=r"sample clip-7: mouth box .* of frame 3, person 1: must be four finite numbers"
    ):
        mask_of(boxes)


def test_drawn_boxes_touch_their_outline_only():
    frames = np.full((9, 32, 48, 3), 9, np.uint8)
    boxes: list[list[Box]] = [[(10.2, 4.0, 19.5, 12.0), (40.0, 25.0, 99.0, 99.0)], *[[]] * 8]
    drawn = draw_boxes(frames, boxes, colour=(255, 0, 0))
    assert (frames == 9).all(), "what is given stays as it is"
    changed = (drawn != 9).any(-1)
    expected = np.zeros((9, 32, 48), bool)
    for top, bottom, left, right in ((4, 12, 10, 20), (25, 32, 40, 48)):
        expected[0, top:bottom, left:right] = True
        expected[0, top + 1 : bottom - 1, left + 1 : right - 1] = False
    assert (changed == expected).all()
    assert (drawn[changed] == (255, 0, 0)).all()


def test_boxes_of_other_frames_are_not_drawn():
    with pytest.raises(ValueError, match="mouth boxes of 2 frames, but 3 frames"):
        draw_boxes(np.zeros((3, 8, 8, 3), np.uint8), [[], []])
