"""Runs the stock processor, with the torchvision that only builds for CUDA, on what a test wrote; in its own process.

`python stock_reference.py torchvision_folder processor_folder work_folder`: reads `work_folder/inputs.pt`, writes
`work_folder/outputs.pt`, and times the video processor.
"""

import sys
import time

import torch


torchvision_folder, processor_folder, work_folder = sys.argv[1:]
sys.path.append(torchvision_folder)
# Without the operators of its compiled half torchvision does not import; the resize used here is plain torch.
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from transformers import AutoProcessor  # noqa: E402


processor = AutoProcessor.from_pretrained(processor_folder)
assert type(processor).__module__.startswith("transformers.models.qwen3_vl.")
outputs = []
for call in torch.load(f"{work_folder}/inputs.pt", weights_only=False):
    started = time.perf_counter()
    made = dict(processor(**call))
    outputs.append((made, time.perf_counter() - started))
torch.save(outputs, f"{work_folder}/outputs.pt")
