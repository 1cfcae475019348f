"""Training: run machinery in which an objective is the only thing that knows the mathematics.

config.py      the dataclasses of a run, and clear messages for what does not fit them
objectives/    bidirectional, autoregressive and diffusion-forcing flow matching, the codec, ...
clips.py videos/   what they are trained on: clips of the sprites world, own videos
objective.py   the door: what the loop asks of something that can be trained
loop.py        the run itself: steps, log, samples, checkpoints, when to stop
trainer.py     one step, and the state that it changes
players.py seeds.py     who learns with which optimiser; where all random numbers come from
distributed.py          several processes: microbatches, shards, gradients
optim.py       Muon for the matrices, AdamW for the rest, learning-rate schedules
precision.py   fp32 masters for bf16 weights, and the probe that chooses
ema.py lora.py averaged weights; low-rank adapters
checkpoint.py saved.py plain.py     writing checkpoints; reading them; plain data in them
logs.py curves.py display.py timing.py provenance.py   what a run writes, draws, shows, measures, and how it was started
export.py      a run becomes a model folder (`streamgen convert`)
"""
