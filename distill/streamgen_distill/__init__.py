"""Distillation: from a model of many steps to one of few, made the way that it will stream.

teacher.py  what students of an autoregressive teacher share
cd.py       causal consistency distillation, plain or in segments
ode.py      regression on the ends of the teacher's own paths
main.py     `streamgen distill`: the run machinery of streamgen_train with the objectives of this package

Every method is an objective for the loop of streamgen_train. The self-forcing family (DMD, SiD, GAN, long tuning)
joins here, one file each; its rollouts are streamgen.rollout, so that what is trained is what is served.
"""
