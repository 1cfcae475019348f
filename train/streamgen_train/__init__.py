"""Training: run machinery in which an objective is the only thing that knows the mathematics.

config.py      the dataclasses of a run, and clear messages for what does not fit them
objectives/    codec.py (reconstruction), ar.py (flow matching with teacher forcing)
clips.py       what they are trained on: clips of the sprites world, with changes of prompt
objective.py   the door: what the loop asks of something that can be trained
loop.py        the run itself: step, average, log, sample, save, resume
optim.py       Muon for the matrices, AdamW for the rest, learning-rate schedules
precision.py   fp32 masters for bf16 weights, and the probe that chooses
ema.py checkpoint.py logs.py   averaged weights; exact resume; JSONL, CSV, pictures, wandb
export.py      a run becomes a model folder (`streamgen convert`)
"""
