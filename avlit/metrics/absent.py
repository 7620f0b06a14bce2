"""Metrics that the papers report and that nothing here can compute: each says what would have to be there."""

from __future__ import annotations

from avlit.metrics.metric import Absent, Better, Measure, Meter, Metric, Tools


def _open(tools: Tools) -> Measure:
    raise AssertionError("what is absent cannot be opened")


JOVA, MMCONTROL = "JoVA, Section 4.1", "MMControl, Section 4.1"
MTV, UNITALKING = "MTV, Section 7.3", "UniTalking, Section 5.3"

NO_NETWORK = "; neither avlit nor a package that it uses has that network"

REASONS: tuple[tuple[str, str, Better, float, float, str, str, str], ...] = (
    ("Text-C", "cosine of text and video", "higher", -100, 100, "%", MTV, f"VideoCLIP-XL{NO_NETWORK}"),
    ("Audio-C", "cosine of sound and video", "higher", -100, 100, "%", MTV,
     "ImageBind (imagebind_huge.pth) and its code: avlit has none, and its packages need torchaudio and pytorchvideo"),
    ("AS", "mean of MANIQA, aesthetic-predictor-v2-5 and MUSIQ", "higher", 0, 1, "", JOVA,
     "the weights of all three; neither avlit nor a package that it uses has the networks MANIQA and MUSIQ"),
    ("Subject DINO Similarity", "cosine of the cut-out person and the reference image, by DINO", "higher", -1, 1, "",
     MMCONTROL, "Grounding DINO and SAM 2 to cut persons out of frames; DINO is that of whole frames"),
    ("Dynamic Degree", "mean length of RAFT's optical flow over 49 frames", "higher", 0, 1, "", MMCONTROL,
     "how the paper scales the flow's length, which it does not say; flow_raft is the length"),
    ("Motion Smoothness", "how well frames between others are foretold", "higher", 0, 1, "", MMCONTROL,
     f"AMT-S (amt-s.pth){NO_NETWORK}"),
    ("Mean MAE", "error of estimated depth against the depth given", "lower", 0, 255, "", MMCONTROL,
     "how the paper scales the depth of Depth Anything V2, which it does not say"),
    ("Speaker Similarity", "likeness of the voice and the reference voice", "higher", -1, 1, "", UNITALKING,
     "Qwen3-Omni's protocol and its speaker encoder, which the paper does not name"),
)  # fmt: skip
"""Name, about, better, range, unit, source, and what would have to be there."""

METRICS = tuple(
    Metric(name, about, better, low, high, unit, source, Meter(name, _open, (), (Absent(needs),)))
    for name, about, better, low, high, unit, source, needs in REASONS
)
