"""One file per objective: a dataclass `Config` and `build(config) -> Objective`.

What they share: video.py (clips, codec, text, export), flow_matching.py (loss and validation on noised clips), views.py
(what noisy blocks see of the past, and their noise levels then).
"""
