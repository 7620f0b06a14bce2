"""Clips that a model was trained on before, laid beside new ones, so that training on those does not undo the old."""

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from avlit.errors import UserError
from data.manifest import Identity
from data.order import Mix
from data.sample import DamagedSample, EncodedSample
from data.shard_writer import ShardWriter
from data.shards import ShardSet

REPLAY = "replay"
"""The subset that replayed clips are of, whatever they were of before."""

CODECS = ("video_codec", "audio_codec", "track_encoder", "text_encoder", "fps", "rate_hz")
"""What must be equal for a clip of one shard set to stand in another."""

COUNTS = {"train": 256, "heldout": 32}
"""Clips of each split that are replayed."""


def check_replay(theirs: Mapping[str, object], ours: Mapping[str, object]) -> None:
    """UserError naming the first codec or rate that the new clips (`ours`) were made with and the old were not."""
    for key in CODECS:
        if key in ours and ours[key] != theirs.get(key):
            raise UserError(f"{key} is {theirs.get(key)} there, {ours[key]} for the new clips")


def write_replay(base: ShardSet, out: Path, *, identity: Identity, weights: Mapping[str, float]) -> dict[str, int]:
    """Copy clips of `base` into `out`, a new shard set of the new clips' identity; returns how many of each split.

    weights: subset -> how often it was trained on; those of a split are taken by turns, the first clips of each. What
    the new set's codecs do not make is left out. UserError: they do not fit together.
    """
    check_replay(base.identity, identity)
    counts = dict.fromkeys(COUNTS, 0)
    with ShardWriter(out, identity) as writer:
        for split, wanted in COUNTS.items():
            places: dict[str, list[tuple[int, int]]] = {name: [] for name, weight in weights.items() if weight > 0}
            for number, shard in base.select(split):
                if shard.subset in places:
                    places[shard.subset] += [(number, index) for index in range(shard.samples)]
            names, mix, turn = list(places), Mix([Fraction(str(weights[name])) for name in places]), 0
            while counts[split] < wanted and any(places.values()):
                name = names[mix.draw(turn)[0]]
                turn += 1
                if not places[name]:
                    continue
                try:
                    sample = base.read(*places[name].pop(0), sound=True)
                except DamagedSample:
                    continue  # the next one takes its place
                writer.add(REPLAY, split, _fitted(sample, identity))
                counts[split] += 1
    return counts


def _fitted(sample: EncodedSample, identity: Identity) -> EncodedSample:
    """A sample as the new set holds it."""
    has_audio, has_references = "audio_codec" in identity, "reference_tokens" in identity
    return replace(
        sample,
        key=f"{REPLAY}-{sample.key}",
        annotation=replace(sample.annotation, subset=REPLAY),
        audio_latents=sample.audio_latents if has_audio else None,
        references=sample.references if has_references else (),
    )
