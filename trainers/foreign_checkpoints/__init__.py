"""Reads checkpoints of other projects: LIFT, PEL, RIDE, SADE and BatchFormer."""
