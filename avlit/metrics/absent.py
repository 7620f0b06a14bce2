"""Metrics that the papers report and that nothing here can compute: each says exactly what would have to be there."""

from __future__ import annotations

from math import inf

from avlit.metrics.metric import Absent, Better, Measure, Meter, Metric, Tools


def _open(tools: Tools) -> Measure:
    raise AssertionError("a network that no library knows cannot be opened")


def _absent(
    name: str, about: str, better: Better, low: float, high: float, source: str, needs: str, unit: str = ""
) -> Metric:  # fmt: skip
    return Metric(name, about, better, low, high, unit, source, Meter(name, _open, (), (Absent(needs),)))


AESTHETICS = "Meta's audiobox-aesthetics and its checkpoint; no installed library has that network"
PANNS = "PANNs' CNN14 (Cnn14_mAP=0.431.pth); no installed library has that network"
PASST = "PaSST (passt-s-f128-p16-s10-ap.476.pt); no installed library has that network"
JOVA, MMCONTROL = "JoVA, Section 4.1", "MMControl, Section 4.1"

METRICS = (
    _absent(
        "Text-C", "cosine of text and video", "higher", -100, 100, "MTV, Section 7.3",
        "VideoCLIP-XL; no installed library has that network", "%",
    ),
    _absent(
        "Audio-C", "cosine of sound and video", "higher", -100, 100, "MTV, Section 7.3",
        "ImageBind (imagebind_huge.pth); no installed library has that network", "%",
    ),
    _absent("FD", "Fréchet distance of sounds in PANNs' features", "lower", 0, inf, JOVA, PANNS),
    _absent("KL", "divergence of what PaSST hears in generated and true sounds", "lower", 0, inf, JOVA, PASST),
    _absent("CE", "content enjoyment of the sound", "higher", 1, 10, JOVA, AESTHETICS),
    _absent("CU", "content usefulness of the sound", "higher", 1, 10, JOVA, AESTHETICS),
    _absent("PC", "production complexity of the sound", "lower", 1, 10, JOVA, AESTHETICS),
    _absent("PQ", "production quality of the sound", "higher", 1, 10, JOVA, AESTHETICS),
    _absent(
        "MS", "motion score of RAFT's optical flow", "higher", 0, inf, JOVA,
        "how the paper scales the flow's length, which it does not say; flow_raft is the length",
    ),
    _absent(
        "AS", "mean of MANIQA, aesthetic-predictor-v2-5 and MUSIQ", "higher", 0, 1, JOVA,
        "the three networks; no installed library has them",
    ),
    _absent(
        "Subject DINO Similarity", "cosine of the cut-out person and the reference image, by DINO", "higher", -1, 1,
        MMCONTROL, "Grounding DINO and SAM 2 to cut persons out of frames; DINO is that of whole frames",
    ),
    _absent(
        "Dynamic Degree", "mean length of RAFT's optical flow over 49 frames", "higher", 0, 1, MMCONTROL,
        "how the paper scales the flow's length, which it does not say; flow_raft is the length",
    ),
    _absent(
        "Aesthetic Quality", "VBench's aesthetic score", "higher", 0, 1, MMCONTROL,
        "LAION's aesthetic head (sa_0_4_vit_l_14_linear.pth); no installed library has it",
    ),
    _absent(
        "Motion Smoothness", "how well frames between others are foretold", "higher", 0, 1, MMCONTROL,
        "AMT-S (amt-s.pth); no installed library has that network",
    ),
    _absent(
        "Mean MAE", "error of estimated depth against the depth given", "lower", 0, 255, MMCONTROL,
        "how the paper scales the depth of Depth Anything V2, which it does not say",
    ),
    _absent(
        "SIM-o", "cosine of the voice and the reference voice", "higher", -1, 1, "MMControl, Appendix B",
        "ZipVoice's WavLM-Large with ECAPA-TDNN (wavlm_large_finetune.pth); no installed library has that network",
    ),
    _absent(
        "Speaker Similarity", "likeness of the voice and the reference voice", "higher", -1, 1,
        "UniTalking, Section 5.3",
        "Qwen3-Omni's protocol and its speaker encoder, which the paper does not name",
    ),
    _absent(
        "UTMOS", "predicted naturalness of the speech", "higher", 1, 5, "MMControl, Appendix B",
        "UTMOS22 Strong (utmos22_strong_step7459_v1.pt); no installed library has that network",
    ),
)  # fmt: skip
