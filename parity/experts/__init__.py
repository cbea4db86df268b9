"""RIDE, SADE and BatchFormer."""
