"""Distillation: from a model of many steps to one of few, made the way that it will stream.

Every method is an objective for the loop of streamgen_train; its rollouts are streamgen.rollout, so
that what is trained is what is served.
"""
